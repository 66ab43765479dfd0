"""A patient who withdrew: nothing of her is left in the site's folder, killed in any step or not."""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from client.books.books import read_books
from client.books.forgotten import KEY, LIST, Forgotten
from client.cli import main
from client.exchanges.latents import ANSWER, TABLE_NAME
from client.forgetting import KIND, forget
from client.latents.prepared_volumes import volume_path
from client.secrets.site_secret import site_secret
from client.site import Site, approvals_of
from federation.journal import read_journal
from federation.plan.plan import RunPlan
from privacy.chain import Chain
from scans.scans import Reason
from tests.client.exchanges.test_latents import a_site, ask, folder, plan, site_yaml

__all__ = ["folder", "plan"]
HER = "Mustermann3"


def reopened(folder: Path) -> Site:
    return a_site(folder)


@pytest.fixture
def site(folder: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site that released latents, trained, and keeps a key by which two of its lists can be compared."""
    for memo in ("cohort_memo", "judgement_memo", "fingerprints"):  # scans of a moment ago are remembered
        monkeypatch.setattr(f"client.scans.{memo}.SETTLED_S", -1.0)
    opened = a_site(folder)
    approvals_of(opened.config)
    for first in (0, 5):
        ANSWER.once(opened, ask(plan, first), plan)
    opened.scans(plan).volumes(range(10), plan.volumes)
    for name in ("state", "diffusion", "answers"):
        place = opened.state_dir / name / plan.sha256[:12]
        place.mkdir(parents=True, exist_ok=True)
        kinds = ("round-0000", "round-0001", "round-0001.partial")
        if name == "answers":
            kinds = ("survey-0001", "train-0001", "train-0001-a")
        for kind in kinds:
            (place / f"{kind}.safetensors").write_bytes(b"made of everybody")
    site_secret(opened.state_dir / KEY)
    (opened.state_dir / ".cohort.csv.0123abcd").write_text(HER)  # a write that a kill cut off
    return opened


def holding(folder: Path, name: str = HER) -> set[str]:
    """Files of the site that hold her name."""
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / "state").rglob("*")
        if path.is_file() and name.encode() in path.read_bytes()
    }


def left(folder: Path) -> dict[str, object]:
    """The site's folder, to be compared: books by their records, everything else by its bytes."""
    state = folder / "state"
    return {
        path.relative_to(state).as_posix(): (
            [json.loads(line)["record"] for line in path.read_text().splitlines()]
            if path.suffix == ".jsonl"
            else path.read_bytes()
        )
        for path in sorted(state.rglob("*"))
        if path.is_file()
    }


def test_nothing_of_her_is_left_and_everything_of_the_others_is(
    folder: Path, plan: RunPlan, site: Site
) -> None:
    scans = site.scans(plan)
    mine = {scans.path(row) for row in range(10) if scans.patients[row] == HER}
    others = scans.files() - mine
    (memo,) = (folder / "state").glob("cohort-*.json")
    assert holding(folder) >= {"state/cohort.csv", f"state/{memo.name}", "state/patients.json"}
    assert len(mine) == 1 and all(volume_path(path).is_file() for path in mine | others)
    forget(site, HER)
    assert holding(folder) == set()
    assert not any(path.exists() or volume_path(path).exists() for path in mine)
    assert all(path.exists() and volume_path(path).exists() for path in others)
    kept = {path.name for path in site.state_dir.rglob("*.safetensors")} - {path.name for path in others}
    assert kept == {"round-0000.safetensors"}, "the common start, in which no patient is"
    assert holding(folder, "Mustermann4"), "others stay in the tables"
    read_books(site.state_dir)


def test_she_takes_part_no_more_not_even_under_another_name(folder: Path, plan: RunPlan, site: Site) -> None:
    forget(site, HER)
    (folder / "scans" / HER).rename(folder / "scans" / "Nobody")
    random = np.random.default_rng(77)  # a scan of hers that nobody here has seen
    (folder / "scans" / HER).mkdir()
    nib.save(
        nib.Nifti1Image(random.random((14, 20, 15)).astype(np.float32), np.diag([2.0, 2.5, 3.0, 1.0])),
        folder / "scans" / HER / "t1.nii.gz",
    )
    scans = reopened(folder).scans(plan)
    assert len(scans) == 9 and not {HER, "Nobody"} & set(scans.patients)
    gone = [one for one in scans.cohort.exclusions if one.reason is Reason.WITHDREW]
    assert {one.path.parent.name for one in gone} == {HER, "Nobody"}


def test_what_left_and_holds_her_is_named_and_what_does_not_is_not(
    folder: Path, plan: RunPlan, site: Site
) -> None:
    with (site.state_dir / TABLE_NAME).open(newline="") as table:
        hers = tuple(row["item"] for row in csv.DictReader(table) if row["patient"] == HER)
    released = read_journal(site.state_dir / "journal.jsonl")
    found = forget(site, HER)
    assert found.items == hers
    with_her = [e.record["sha256"] for e in released if set(hers) & set(e.record["items"])]
    assert [row["sha256"] for row in found.releases] == with_her and len(with_her) == len(hers) == 1
    line = read_journal(site.state_dir / "journal.jsonl")[-1].record
    assert line["kind"] == KIND and tuple(line["items"]) == hers and HER not in json.dumps(line)
    assert forget(reopened(folder), HER) == found, "said again, it says the same"
    assert read_journal(site.state_dir / "journal.jsonl")[-1].record == line


class Killed(BaseException):
    """As a kill: nothing catches it."""


def changes(monkeypatch: pytest.MonkeyPatch, most: int) -> Iterator[None]:
    """Let so many changes of files happen, then kill."""
    done = 0

    def counted(change: object) -> object:
        def wrapped(*given: object, **named: object) -> object:
            nonlocal done
            if done == most:
                raise Killed
            done += 1
            return change(*given, **named)  # type: ignore[operator]

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Chain, "extend", counted(Chain.extend))
        yield


def test_killed_before_any_change_and_begun_again_it_ends_the_same(
    folder: Path,
    plan: RunPlan,
    site: Site,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site.scans(plan)
    kept = tmp_path_factory.mktemp("kept") / "site"
    shutil.copytree(folder / "state", kept)
    expected_dependents = forget(site, HER)
    expected, kills = left(folder), 0
    while True:
        shutil.rmtree(folder / "state")
        shutil.copytree(kept, folder / "state")
        killed = False
        for _ in changes(monkeypatch, kills):
            try:
                forget(Site(site.config), HER)
            except Killed:
                killed = True
        if not killed:
            break
        assert forget(Site(site.config), HER) == expected_dependents
        assert left(folder) == expected, f"killed after {kills} changes"
        kills += 1
    assert kills > 15


def test_an_unknown_patient_changes_nothing_and_a_damaged_list_opens_no_cohort(
    folder: Path, plan: RunPlan, site: Site
) -> None:
    before = left(folder)
    with pytest.raises(ValueError, match=r"Expected a patient of this site.*Nothing was changed") as refused:
        forget(site, "Doe")
    assert left(folder) == before and "Doe" not in str(refused.value)
    forget(site, HER)
    whole = (site.state_dir / LIST).read_bytes()
    for damaged in (b"", b"{}", b'["a"]', b"[1]", whole[:-5], whole + b"]"):
        (site.state_dir / LIST).write_bytes(damaged)
        with pytest.raises(ValueError, match="list of who withdrew"):
            reopened(folder).scans(plan)
    (site.state_dir / LIST).write_bytes(whole)
    (site.state_dir / KEY).rename(site.state_dir / "elsewhere")
    with pytest.raises(ValueError, match="key of the list of who withdrew"):
        Forgotten(site.state_dir)


def typed(*arguments: str) -> tuple[int, str]:
    screen = io.StringIO()
    return main(arguments, Console(file=screen, width=300)), screen.getvalue()


def test_by_typing(folder: Path, plan: RunPlan, site: Site) -> None:
    status, screen = typed("forget", HER, "--config", str(site_yaml(folder)))
    assert status == 0 and "Forgotten here" in screen and HER not in screen
    status, screen = typed("forget", "Doe", "--config", str(site_yaml(folder)))
    assert status == 2 and "Nothing was changed" in screen
