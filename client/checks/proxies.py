"""What `meduet-site check` says of proxy variables: whether one is set, and what passes through it."""

import os
import re
from collections.abc import Mapping

from client.connection.certificate_checks import Finding
from federation.programs.loopback import PROXY_VARIABLES, passes_proxy


def proxy_check(server: str, variables: Mapping[str, str] | None = None) -> Finding:
    """Which proxy variables are set, and whether the way to `server` (host:port; "" when it is not known)
    goes through it. Credentials in them are not shown."""
    variables = os.environ if variables is None else variables
    proxies = {name: variables[name] for name in PROXY_VARIABLES if variables.get(name)}
    if not proxies:
        return "ok", "no proxy variable is set", ""
    found = ", ".join(f"{name}={re.sub('//[^/@]*@', '//…@', value)}" for name, value in proxies.items())
    found += "; what stays on this machine never passes through it"
    host = server.rpartition(":")[0]
    if not host:
        return "look", found, "What goes to the centre will; name the centre in no_proxy if it should not."
    if not passes_proxy(host, variables):
        return "ok", f"{found}, nor what goes to {host} (no_proxy)", ""
    advice = f"If it should not, add {host} to no_proxy. It must let TLS through unopened."
    return "look", f"{found}; what goes to {server} does", advice
