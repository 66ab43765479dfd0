"""What a site says when its scans are not there, or its disk takes nothing: one word, of its own."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict

from client.app import LOG_NAME, make_client_app
from client.scans.cohort import NoScans
from client.settings import SiteConfig
from client.site import Site
from federation.exchanges.survey import SURVEY, SurveyAsk
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.plan.plan import RunPlan
from federation.wire.messages import Refusal, RefusalKind
from privacy.ledger import Ledger
from simulations.consortium import simulated_identity

SECRET = "/scans/MUSTERMANN_ERIKA"


class ToySite:
    """A site that ends in an error when it is asked whether it takes part, or for its scans."""

    name, minimum_cohort, compile, progress_every_s = "north", 0, False, 30.0
    secret, exact_sums, device, launcher = bytes(32), True, torch.device("cpu"), None

    def __init__(self, state_dir: Path, error: Exception) -> None:
        self.state_dir, self._error = state_dir, error
        self.ledger, self.journal = Ledger(state_dir / "ledger.jsonl"), Journal(state_dir / "journal.jsonl")

    def identity(self) -> SiteIdentity:
        return simulated_identity(self.name)

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Every plan."""

    def scans(self, plan: RunPlan) -> Any:
        raise self._error


@pytest.fixture
def plan(toy_plan: Any) -> RunPlan:
    plan: RunPlan = toy_plan()
    return plan


def asked(site: Any, plan: RunPlan) -> Refusal:
    """What the site says to a survey."""
    metadata = Metadata(1, "id", 1, 2, "", "", 0.0, 60.0, SURVEY.route)
    question = Message(content=SurveyAsk(plan_json=plan.to_json()).to_record(), metadata=metadata)
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    refusal = Refusal.from_record(make_client_app(lambda context: site)(question, context).content)
    assert SECRET not in repr(refusal)
    return refusal


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NoScans(SECRET), RefusalKind.NO_SCANS),
        (OSError(errno.ENOSPC, SECRET), RefusalKind.STORAGE),
        (OSError(errno.EDQUOT, SECRET), RefusalKind.STORAGE),
        (OSError(errno.EROFS, SECRET), RefusalKind.STORAGE),
        (OSError(errno.EACCES, SECRET), RefusalKind.NOT_ANSWERED),
    ],
)
def test_no_scans_and_no_room_are_words_of_their_own(
    error: Exception, kind: RefusalKind, plan: RunPlan, tmp_path: Path
) -> None:
    site = ToySite(tmp_path, error)
    assert asked(site, plan).kind is kind
    assert site.journal.entries()[-1].record["told"] == kind


def test_a_full_disk_is_said_though_the_refusal_cannot_be_written_down(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, SECRET)

    site = ToySite(tmp_path, KeyError(SECRET))
    monkeypatch.setattr(site.journal, "append", full)
    assert asked(site, plan).kind is RefusalKind.STORAGE


def test_a_log_that_cannot_be_opened_lets_no_word_through_the_wall(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOG_NAME).mkdir()  # as on a disk that takes nothing
    monkeypatch.setattr("logging.raiseExceptions", False)
    assert asked(ToySite(tmp_path, ValueError(SECRET)), plan).kind is RefusalKind.NOT_ANSWERED


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_empty_or_not_mounted_has_no_scans(
    there: bool, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SiteConfig(
        name="north", data_root=tmp_path / "scans", state_dir=tmp_path / "state", device="cpu"
    )
    if there:
        config.data_root.mkdir()
    site = Site(config)
    monkeypatch.setattr(Site, "fits", lambda self, plan: None)
    with pytest.raises(NoScans, match=r"mounted|usable scan"):
        site.scans(plan)
