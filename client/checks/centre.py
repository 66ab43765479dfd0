"""What `meduet-site check` says of the way to the centre: does it answer us, and do our clocks agree?

One question to the health service through the centre's proxy says at once that the network lets us out, that
names and certificates on both sides hold, and that SuperLink runs. Does not do: say whether the centre has
registered this site; only a start shows that.
"""

import ssl
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection

from client.connection.certificate_checks import Finding
from client.connection.keys import SiteKeys
from federation.keys.kits import AUTHORITY, CERTIFICATE, KEY, host_and_port
from federation.programs.health import NotServing, check_health

AHEAD_S, BEHIND_S = 5.0, 300.0
"""How far a site's clock may be ahead of or behind the centre's: Flower signs the time with every request."""
_TIMEOUT_S = 10.0
_REACH = (
    "Is the centre up? Does the firewall let this machine out to that port? Was the certificate revoked? Ask "
    "the centre."
)


def centre_check(keys: SiteKeys) -> Finding:
    """Ask the centre's health service, showing this site's certificate."""
    read = {name: (keys.folder / name).read_bytes() for name in (AUTHORITY, CERTIFICATE, KEY)}
    server = keys.connection.server
    try:
        check_health(
            server, ca=read[AUTHORITY], certificate=read[CERTIFICATE], key=read[KEY], timeout_s=_TIMEOUT_S
        )
    except NotServing as error:
        return "failed", str(error), _REACH
    return "ok", f"{server} answers, and takes this site's certificate", ""


def clock_check(keys: SiteKeys, now: Callable[[], datetime]) -> Finding:
    """Compare this machine's clock with the one that the centre's proxy puts on its replies (whole
    seconds)."""
    context = ssl.create_default_context(cafile=keys.folder / AUTHORITY)
    context.load_cert_chain(keys.folder / CERTIFICATE, keys.folder / KEY)
    connection = HTTPSConnection(*host_and_port(keys.connection.server), timeout=_TIMEOUT_S, context=context)
    try:
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("date")
    except (OSError, HTTPException) as error:
        return "failed", f"the centre's time cannot be read: {' '.join(str(error).split())}", _REACH
    finally:
        connection.close()
    if date is None:
        return "look", "the centre's proxy does not tell the time", "Ask the centre which proxy it has."
    ahead_s = (now() - parsedate_to_datetime(date)).total_seconds()
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the centre's (its proxy's Date)"
    if ahead_s > AHEAD_S or ahead_s < -BEHIND_S:
        advice = "The centre refuses every request until this clock is set right (chrony, timesyncd)."
        return "failed", found, advice
    return "ok", found, ""
