"""A site: one hospital, with its books open; what it says yes to.

Its settings are `client/settings.py`, its scans `client/site_scans.py`, which are read when they are asked
for, after the ledger has reserved. Does not do: answer messages (`client/exchanges/exchange.py`), or let
anything out (`client/release.py`).
"""

from datetime import datetime
from pathlib import Path

from client.books.books import open_books
from client.connection.keys import SiteKeys
from client.consent.approvals import AllowedHours
from client.exchanges.exchange import AskRefused
from client.jobs.launcher import Launcher
from client.settings import SiteConfig, approvals_of, ceiling_of, load_site_config, resolve_device
from client.site_scans import SiteScans
from federation.bundle import running_bundle
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.keys.key_files import read_text
from federation.plan.plan import RunPlan
from federation.published_plan import plan_of
from federation.wire.wire import RefusalKind
from meduet_models.published.expiry import check_unexpired
from meduet_models.tokenizer.tokenizer import Tokenizer
from privacy.ledger import Ledger


class Site(SiteScans):
    """One hospital. Its books are open; its scans are read when `scans` is called, and not before."""

    def __init__(
        self,
        config: SiteConfig,
        tokenizer: Tokenizer | None = None,
        secret: bytes | None = None,
        identity: SiteIdentity | None = None,
    ) -> None:
        """Open the books in `config.state_dir`.

        `identity`: None reads the keys in `config.keys_dir`, when it must sign; the rest as `SiteScans`.
        Raises `BrokenChain` when a book was tampered with or lost, and `ValueError` when the device is not
        there.
        """
        super().__init__(config, tokenizer, secret)
        self.launcher = Launcher.of(config)
        """How its jobs are started; None: work is done here."""
        if self.launcher is None:
            resolve_device(config.device)  # a job's machine may have what this one has not
        self.ledger = Ledger(self.state_dir / "ledger.jsonl", ceiling_of(config))
        """What this site's patients have been charged; reserves before anything is read."""
        self.journal = Journal(self.state_dir / "journal.jsonl")
        """What left this site."""
        open_books(self.state_dir)
        self._identity = identity

    def identity(self) -> SiteIdentity:
        """The site's key and certificate, with which it signs what other sites must believe. Raises
        `AskRefused` where they are missing or do not belong together."""
        if self._identity is None:
            try:
                self._identity = SiteKeys.read_identity(self.config.keys_dir)
            except ValueError as error:
                raise AskRefused(str(error), RefusalKind.NO_KEYS) from error
        return self._identity

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Raise `AskRefused` unless the plan fits this site, makes no latents leave without its agreement,
        its people have approved it (or the fine-tuning of that hash) with the code that is running, it has
        not expired, and it is an hour at which work may begin.

        Reads no scan.
        """
        self.fits(plan)
        try:
            check_unexpired(plan.release.expires, "a plan")
        except ValueError as error:
            raise AskRefused(f"{error} Nothing was read.", RefusalKind.PLAN_NOT_ACCEPTED) from None
        if self.config.plan_approval == "required":
            self._approved(finetuning_sha256 or plan.sha256)
        hours = self.config.allowed_hours
        if hours and not AllowedHours.parse(hours).contain(datetime.now().time()):
            raise AskRefused(
                f"Expected to be asked between {hours} (site.yaml: allowed_hours). Nothing was read.",
                RefusalKind.OUTSIDE_HOURS,
            )

    def _approved(self, sha256: str) -> None:
        book = approvals_of(self.config)
        bundle = book.approved_bundle(sha256)
        if bundle is None:
            raise AskRefused(
                f"Expected a plan that this hospital approved; {len(book.approvers(sha256))} of "
                f"{book.rule.needed} needed approved {sha256[:12]}…: meduet-site plan show, plan approve. "
                "Nothing was read.",
                RefusalKind.PLAN_NOT_ACCEPTED,
            )
        if bundle != running_bundle():
            raise AskRefused(
                f"Plan {sha256[:12]}… was approved with code {bundle[:12]}…; the code that runs is "
                f"{running_bundle()[:12]}…. Nothing was read.",
                RefusalKind.PLAN_NOT_ACCEPTED,
            )


def load_plan(path: Path) -> RunPlan:
    """Read plan.json or a published plan, which the centre gives to every site. Raises `ValueError` naming
    the file."""
    try:
        text = read_text(path, "the plan")
    except ValueError as error:
        raise ValueError(f"{error} Ask the centre for plan.json.") from None
    try:
        return plan_of(text)
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a plan of FedMeDUET; {error}") from None


def open_site(config_path: Path) -> Site:
    """The site that a `site.yaml` describes. Raises as `load_site_config` and `Site` do."""
    return Site(load_site_config(config_path))
