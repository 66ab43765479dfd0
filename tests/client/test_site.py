"""A site: strict settings, books before scans, refusal before reading."""

import dataclasses
import stat
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import client.scans.cohort_memo
import client.site_scans
from client.exchanges.exchange import AskRefused
from client.scans.cohort import Cohort
from client.settings import SiteConfig, load_site_config, resolve_device
from client.site import Site, open_site
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec
from privacy.ledger import LedgerRefusal, Place
from privacy.promise import Promise
from scans.volume_plan import VolumePlan

MINIMAL = "name: north\ndata_root: scans\nstate_dir: state\n"

PLACE = Place(plan_sha256="0" * 64, kind="round", round=1)


class Blocks(nn.Module):
    """Means of 4 x 4 x 4 voxels; counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.num_encoded = 0

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        self.num_encoded += int(volumes.flatten(1).any(dim=1).sum())  # zeros fill a batch up
        return nn.functional.avg_pool3d(volumes, 4).repeat(1, 2, 1, 1, 1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents[:, :1], scale_factor=4.0)


def tokenizer(codec: Blocks) -> Tokenizer:
    return Tokenizer(codec, {"kind": "blocks", "channels": 2})


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    volumes = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
    return toy_plan(volumes=volumes, tokenizer_sha256=tokenizer(Blocks()).sha256)


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    for number in range(5):
        path = tmp_path / "scans" / f"p{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        array = np.random.default_rng(number).random((14, 20, 15)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return SiteConfig(name="south", data_root=tmp_path / "scans", state_dir=tmp_path / "state", device="cpu")


@pytest.fixture
def no_scan_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*given: object, **named: object) -> Cohort:
        raise AssertionError("a scan was read")

    monkeypatch.setattr(client.site_scans, "open_cohort", read)
    monkeypatch.setattr(client.site_scans, "remembered", read)


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def test_paths_in_the_settings_start_at_their_own_folder(tmp_path: Path) -> None:
    text = MINIMAL + "tokenizer: {kind: file, path: weights.safetensors, channels: 8}\nminimum_cohort: 12\n"
    config = load_site_config(yaml_file(tmp_path, text))
    assert config.data_root == tmp_path / "scans" and config.state_dir == tmp_path / "state"
    expected = TokenizerSpec(kind="file", path=str(tmp_path / "weights.safetensors"), channels=8)
    assert config.tokenizer == expected and config.minimum_cohort == 12


def test_without_a_word_nothing_leaves_without_privacy(tmp_path: Path) -> None:
    config = load_site_config(yaml_file(tmp_path, MINIMAL))
    assert config.allow_non_private is False


BAD = {
    "data_roots: x\n" + MINIMAL: "site has no setting 'data_roots'",
    "name: north\n": "site lacks data_root, state_dir",
    MINIMAL + "device: gpu\n": "Expected site.device to be one of auto, cpu, cuda; got 'gpu'",
    MINIMAL + "threads: many\n": "Expected site.threads to be int; got 'many'",
    MINIMAL + "threads: -1\n": "Expected site.threads from 0",
    MINIMAL + "allow_non_private: 'yes'\n": "Expected site.allow_non_private to be bool",
    MINIMAL + "split_fractions: [0.8, 0.1, 0.2]\n": "Expected split_fractions that sum to 1",
    MINIMAL + "minimum_cohort: 0\n": "Expected site.minimum_cohort from 1",
    MINIMAL + "progress_every_s: -1\n": "Expected site.progress_every_s from 0 to 86,400; got -1",
    MINIMAL + "progress_every_s: .inf\n": "Expected site.progress_every_s to be float",
    MINIMAL + "tokenizer: {kind: magic}\n": "Expected site.tokenizer.kind to be one of",
    MINIMAL.replace("north", "'../north'"): "Expected site.name to be 1 to 63 letters",
    MINIMAL.replace(
        "state_dir: state", "state_dir: scans/state"
    ): "Expected state_dir outside the data folder",
    MINIMAL + "cache_dir: scans/cache\n": "Expected cache_dir outside the data folder",
    MINIMAL.replace("scans", "7"): "Expected site.data_root to be Path; got 7",
    MINIMAL + "cache_key_file: key\n": "cache_key_file has no effect with encrypt_cache: false",
    MINIMAL
    + "encrypt_cache: true\ncache_key_file: state/cache/key\n": "Expected cache_key_file outside the cache",
    MINIMAL + "encrypt_cache: true\nlauncher: [env]\n": "no job is told a passphrase",
    "- a list\n": "to hold settings",
    "name: [": "it is not YAML",
    "name: !!python/object/apply:os.getcwd []\n": "tags are not read",
}


@pytest.mark.parametrize("text", BAD)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "scans").mkdir()
    with pytest.raises(ValueError) as error:
        load_site_config(yaml_file(tmp_path, text))
    assert BAD[text] in str(error.value) and "site.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_are_not_there_say_where_they_were_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected the site's settings at .*site\.yaml; No such file"):
        open_site(tmp_path / "site.yaml")


def test_cuda_is_refused_where_there_is_none_and_auto_takes_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch finds none"):
        resolve_device("cuda")
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


def test_opening_a_site_opens_its_books_and_no_scan(config: SiteConfig, no_scan_is_read: None) -> None:
    site = Site(dataclasses.replace(config, allow_non_private=True), tokenizer(Blocks()))
    promise = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
    assert site.ledger.reserve(PLACE, "a5" * 32, promise).place == PLACE
    assert {path.name for path in config.state_dir.iterdir()} == {"ledger.jsonl", "journal.jsonl"}
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700


def test_without_consent_the_ledger_refuses_before_any_scan(
    config: SiteConfig, no_scan_is_read: None
) -> None:
    site = Site(config, tokenizer(Blocks()))
    promise = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
    with pytest.raises(LedgerRefusal, match="Nothing was read"):
        site.ledger.reserve(PLACE, "a5" * 32, promise)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"tokenizer_sha256": "f" * 64}, RefusalKind.WRONG_TOKENIZER),
        ({"wire_version": 99}, RefusalKind.WRONG_VERSION),
        ({"sites": ("north", "west")}, RefusalKind.PLAN_NOT_ACCEPTED),
    ],
)
def test_a_plan_for_another_tokenizer_or_consortium_is_refused_before_any_scan(
    config: SiteConfig, plan: RunPlan, no_scan_is_read: None, change: dict[str, object], kind: RefusalKind
) -> None:
    site = Site(config, tokenizer(Blocks()))
    with pytest.raises(AskRefused) as refusal:
        site.scans(dataclasses.replace(plan, **change))  # type: ignore[arg-type]
    assert refusal.value.kind is kind


def test_scans_are_encoded_once_for_all_messages_and_all_processes(config: SiteConfig, plan: RunPlan) -> None:
    codec = Blocks()
    site = Site(config, tokenizer(codec))
    seen: list[tuple[str, int, int]] = []
    scans = site.prepared(plan, lambda *done: seen.append(done))
    assert scans.num_scans == codec.num_encoded == 5
    assert scans.site_index.tolist() == [1] * 5, "the label is the site's place in the plan"
    assert scans.latents([0]).shape == (1, 2, 4, 6, 4)
    assert [phase for phase, _, _ in seen] == sorted((phase for phase, _, _ in seen), reverse=True)
    assert seen[4:] == [("reading", 5, 5), ("encoding", 5, 5)], "encoded as it was read"
    assert site.num_encoded == 5
    assert site.prepared(plan) is scans
    again = Site(config, tokenizer(codec)).prepared(plan)
    assert codec.num_encoded == 5 and torch.equal(again.latents(range(5)), scans.latents(range(5)))


def test_a_cache_of_its_own_folder_serves_several_states_and_several_data_roots(
    config: SiteConfig, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.scans.cohort_memo, "SETTLED_S", -1.0)  # files just written count as settled
    codec, opened = Blocks(), client.site_scans.open_cohort
    opens = []
    monkeypatch.setattr(client.site_scans, "open_cohort", lambda *a, **k: opens.append(a) or opened(*a, **k))
    other = tmp_path / "other"
    other.mkdir()
    (other / "p9.nii.gz").write_bytes((config.data_root / "p1.nii.gz").read_bytes())
    for state in ("one", "two"):
        for root in (config.data_root, other):
            own = dataclasses.replace(
                config, state_dir=tmp_path / state / root.name, data_root=root, cache_dir=tmp_path / "cache"
            )
            Site(own, tokenizer(codec)).prepared(plan)
            assert not (own.state_dir / "cache").exists()
    assert codec.num_encoded == 5, "the other root holds one of the same scans"
    assert len(opens) == 2, "each root's cohort is remembered beside the cache"


def test_two_plans_of_other_volumes_do_not_make_each_other_open_the_cohort_again(
    config: SiteConfig, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.scans.cohort_memo, "SETTLED_S", -1.0)  # files just written count as settled
    opened, opens = client.site_scans.open_cohort, list[object]()
    monkeypatch.setattr(client.site_scans, "open_cohort", lambda *a, **k: opens.append(a) or opened(*a, **k))
    volumes = dataclasses.replace(plan.volumes, mr_percentiles=(1.0, 99.0))
    other = dataclasses.replace(plan, name="other", volumes=volumes)
    for _ in range(3):
        for one in (plan, other):
            Site(config, tokenizer(Blocks())).prepared(one)
    assert len(opens) == 2


def test_every_file_is_in_the_tables_even_if_it_fails_after_the_cohort_was_opened(
    config: SiteConfig, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.data_root / "p9.nii.gz").write_bytes(b"not a scan")
    opened = client.site_scans.open_cohort

    def open_then_damage(*given: object, **named: object) -> Cohort:
        cohort = opened(*given, **named)  # type: ignore[arg-type]
        (config.data_root / "p3.nii.gz").write_bytes(b"")
        for encoding in (config.state_dir / "cache").glob("??/*"):  # so that scans are read again
            encoding.unlink()
        return cohort

    monkeypatch.setattr(client.site_scans, "open_cohort", open_then_damage)
    Site(config, tokenizer(Blocks())).prepared(plan)
    taken = (config.state_dir / "cohort.csv").read_text()
    left = (config.state_dir / "exclusions.csv").read_text()
    for number in (0, 1, 2, 4):
        assert f"p{number}.nii.gz" in taken and f"p{number}.nii.gz" not in left
    assert "p3.nii.gz,empty" in left and "p9.nii.gz,not_a_scan" in left
    assert "p3.nii.gz" not in taken


def test_a_folder_without_a_usable_scan_is_an_error_with_counts(config: SiteConfig, plan: RunPlan) -> None:
    for path in config.data_root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"Expected a usable scan in .*\{'empty': 5\}"):
        Site(config, tokenizer(Blocks())).prepared(plan)
    assert (config.state_dir / "exclusions.csv").read_text().count("empty") == 5


def test_a_data_folder_that_is_not_mounted_says_so(config: SiteConfig, plan: RunPlan) -> None:
    site = Site(dataclasses.replace(config, data_root=config.data_root / "gone"), tokenizer(Blocks()))
    with pytest.raises(ValueError, match="Is it mounted"):
        site.prepared(plan)
