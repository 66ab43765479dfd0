"""What `meduet-site check` says of the site's keys: do they belong together, whose are they, when do they
end?

Does not do: connect; whether the centre's proxy takes the certificate shows when a site starts.
"""

import stat
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from client.connection.keys import NODE_KEY, SiteKeys
from federation.keys.certificates import utc_now
from federation.keys.kits import KEY
from federation.terminal import visible

SOON = timedelta(days=30)
"""A certificate that ends within this time is to be renewed now."""

Finding = tuple[Literal["ok", "look", "failed"], str, str]
"""Verdict, what was found, what to do (empty when it is fine)."""


def certificate_check(folder: Path, site: str, now: datetime) -> Finding:
    """Look at the keys in `folder`, which should be those of `site`."""
    renew = f"Ask the centre to run: meduet-server renew {site}; then install what it sends."
    try:
        keys = SiteKeys.open(folder)
        ends = keys.check(now)
    except ValueError as error:
        return "failed", str(error), f"Install the kit (meduet-site install). {renew}"
    for name in (KEY, NODE_KEY):
        if mode := stat.S_IMODE((folder / name).stat().st_mode) & 0o077:
            found = f"{name} can be read by others (mode {mode:03o} beyond the owner's)"
            advice = f"chmod 600 {folder / name}; if others may have read it, ask the centre for a new key."
            return "failed", found, advice
    if keys.connection.site != site:
        found = f"the keys are of {keys.connection.site!r}, site.yaml says {site!r}"
        return "failed", found, "Set name in site.yaml to the agreed one, or install this site's kit."
    found = (
        f"of {keys.connection.consortium}, until {ends:%Y-%m-%d} ({(ends - now).days} days); authority "
        f"{keys.authority_fingerprint[:19]}…"
    )
    if ends - now < SOON:
        return "look", found, renew
    return "ok", found, ""


def main() -> int:
    """With the folder of keys and the site's name as arguments: 0 if SuperNode can be started with them."""
    verdict, found, advice = certificate_check(Path(sys.argv[1]), sys.argv[2], utc_now())
    sys.stdout.write(visible(" ".join(f"{found}. {advice}".split())) + "\n")
    return 1 if verdict == "failed" else 0
