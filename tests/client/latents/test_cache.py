"""The cache: encoded once, again when anything changed, whole or not at all, and nobody's name in it."""

import dataclasses
import errno
import logging
import stat
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import client.latents.cache_files
import client.latents.encoding
import client.scans.fingerprints
from client.latents.cache import LatentCache
from client.latents.latent_set import LatentSet
from client.scans.cohort import Cohort, open_cohort, read_entry
from meduet_models.tokenizer.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from scans.scans import Reason
from scans.volume_plan import VolumePlan
from scans.volumes import lay_back, prepare

PLAN = VolumePlan(modality="t1", shape=(8, 12, 8), spacing_mm=(2.0, 2.0, 2.0))
OBLIQUE = np.array([[-1.2, 0.1, 0, 9], [0.1, 1.1, 0.2, -8], [0, -0.2, 1.3, 4], [0, 0, 0, 1]])
PATIENTS = ("Mustermann", "Doe", "Nowak", "Rossi", "Silva", "Svensson", "Ivanova")


class Blocks(nn.Module):
    """Means of 4 x 4 x 4 voxels; counts what it is given, and can be told to fail."""

    def __init__(self, weight: float = 1.0, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.num_encoded = 0
        self.fail_at = fail_at

    def posterior_mean(self, volumes: Tensor) -> Tensor:
        self.num_encoded += int(volumes.flatten(1).any(dim=1).sum())  # zeros fill a batch up
        if self.fail_at is not None and self.num_encoded > self.fail_at:
            raise KeyboardInterrupt
        return nn.functional.avg_pool3d(volumes, 4) * self.weight

    def reconstruct(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents / self.weight, scale_factor=4.0)


class Site:
    """A folder of scans and its cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root / "scans", root / "state" / "cache"
        for number, name in enumerate(PATIENTS):
            self.write(name, number)

    def write(self, name: str, seed: int, label: int = 1) -> Path:
        random = np.random.default_rng(seed)
        path = self.root / name / "t1.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(random.random((14, 20, 15)).astype(np.float32), OBLIQUE), path)
        mask = (random.random((14, 20, 15)) > 0.5).astype(np.uint8) * label
        if name != "Doe":  # one scan has no label
            nib.save(nib.Nifti1Image(mask, OBLIQUE), path.with_name("t1_seg.nii.gz"))
        return path

    def cohort(self, plan: VolumePlan = PLAN) -> Cohort:
        return open_cohort(self.root, plan=plan, split_salt="salt")

    def encode(self, codec: Blocks | None = None, plan: VolumePlan = PLAN) -> tuple[LatentSet, int]:
        """The set, and how many volumes were encoded for it."""
        codec = codec or Blocks()
        before = codec.num_encoded
        tokenizer = Tokenizer(codec, {"kind": "blocks", "channels": 1})
        encoded = LatentCache(self.folder, tokenizer, plan).encode(self.cohort(plan))
        return encoded, codec.num_encoded - before

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("??/*")}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_is_read_is_what_the_tokenizer_gives_for_the_prepared_scan(site: Site) -> None:
    plan = dataclasses.replace(PLAN, views=2)
    encoded, _ = site.encode(plan=plan)
    assert encoded.num_scans == len(PATIENTS) and encoded.num_views == 2
    for row, entry in enumerate(encoded.entries):
        scan, label = read_entry(entry, plan)
        for view in range(2):
            prepared = prepare(scan, plan, view, label)
            expected = nn.functional.avg_pool3d(prepared.volume[None], 4)
            torch.testing.assert_close(encoded.latents([row], view), expected, rtol=0, atol=0)
            labels = encoded.labels([row], view)
            if prepared.label is None:
                assert labels is None and entry.patient == "Doe"
            else:
                assert labels is not None and torch.equal(labels[0], prepared.label.long())
                assert labels.any()
            assert encoded.geometry(row, view).to_dict() == prepared.geometry.to_dict()


def test_an_unchanged_scan_is_never_encoded_again(site: Site) -> None:
    first, count = site.encode()
    assert count == len(PATIENTS)
    second, count = site.encode()
    assert count == 0
    rows = range(len(PATIENTS))
    assert torch.equal(first.latents(rows), second.latents(rows))


def test_a_scan_under_another_name_is_not_encoded_again(site: Site) -> None:
    site.encode()
    (site.root / "Rossi").rename(site.root / "Verdi")
    encoded, count = site.encode()
    assert count == 0 and "Verdi" in encoded.patients


CHANGES: dict[str, tuple[VolumePlan, int]] = {
    "spacing": (dataclasses.replace(PLAN, spacing_mm=(2.5, 2.0, 2.0)), 7),
    "shape": (dataclasses.replace(PLAN, shape=(8, 8, 8)), 7),
    "percentiles": (dataclasses.replace(PLAN, mr_percentiles=(1.0, 99.0)), 7),
    "window": (dataclasses.replace(PLAN, window="ct_hu"), 7),
    "another view": (dataclasses.replace(PLAN, views=2), 7),
    "the window of another modality": (dataclasses.replace(PLAN, ct_window_hu=(-100.0, 300.0)), 0),
    "whether crops are registered": (dataclasses.replace(PLAN, registered=False), 0),
    "another name of the modality": (dataclasses.replace(PLAN, modality="T1w"), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_encodes_again_what_it_changes_and_nothing_else(site: Site, change: str) -> None:
    site.encode()
    plan, expected = CHANGES[change]
    assert site.encode(plan=plan)[1] == expected
    assert site.encode()[1] == 0, "the first plan's encodings are still there"


@pytest.mark.parametrize("change", ["voxels", "label", "affine"])
def test_a_changed_scan_is_encoded_again_and_the_others_are_not(site: Site, change: str) -> None:
    site.encode()
    row = PATIENTS.index("Nowak")
    path = site.root / "Nowak" / "t1.nii.gz"
    if change == "voxels":
        site.write("Nowak", seed=99)
    elif change == "label":
        site.write("Nowak", seed=row, label=2)
    else:
        for file in (path, path.with_name("t1_seg.nii.gz")):
            image = nib.load(file)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), OBLIQUE + np.diag([0.1, 0, 0, 0])), file)
    encoded, count = site.encode()
    assert count == 1
    if change == "label":
        labels = encoded.labels([encoded.patients.index("Nowak")])
        assert labels is not None and labels.max() == 2


def test_another_tokenizer_or_format_encodes_everything_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.encode()
    assert site.encode(Blocks(weight=2.0))[1] == len(PATIENTS)
    monkeypatch.setattr(client.latents.encoding, "CACHE_FORMAT", client.latents.encoding.CACHE_FORMAT + 1)
    assert site.encode()[1] == len(PATIENTS)


def test_an_interrupted_encoding_goes_on_and_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.latents.encoding, "SCANS_AT_ONCE", 2)
    undisturbed, interrupted = Site(tmp_path / "one"), Site(tmp_path / "two")
    undisturbed.encode()
    with pytest.raises(KeyboardInterrupt):
        interrupted.encode(Blocks(fail_at=4))
    assert len(interrupted.files()) == 4
    _, count = interrupted.encode()
    assert count == len(PATIENTS) - 4
    assert interrupted.files() == undisturbed.files()


def test_a_full_disk_is_an_error_that_keeps_what_was_written(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = client.latents.cache_files.save_weights

    def full(path: Path, *rest: object) -> None:
        if len(site.files()) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(client.latents.cache_files, "save_weights", full)
        with pytest.raises(OSError, match="No space"):
            site.encode()
    kept = site.files()
    assert len(kept) == 3
    assert site.encode()[1] == len(PATIENTS) - 3
    assert kept.items() <= site.files().items()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut in the header": lambda content: content[:40],
    "cut by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "another header": lambda content: content.replace(b'"latents"', b'"latentz"'),
    "no file of ours": lambda content: b"\xff" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_encoded_again_and_said(
    site: Site, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.encode()
    whole = site.files()
    victim = sorted(site.folder.glob("??/*"))[2]
    victim.write_bytes(DAMAGES[damage](victim.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="client"):
        _, count = site.encode()
    assert count == 1 and site.files() == whole
    assert "1 cached encodings were damaged" in caplog.text


def test_a_volume_on_the_prepared_grid_is_laid_back_where_the_patient_is(site: Site) -> None:
    encoded, _ = site.encode()
    geometry = encoded.geometry(3)
    # A volume that says, at each voxel, where in the patient it is (mm towards right, anterior, superior).
    voxels = np.stack(np.meshgrid(*map(np.arange, geometry.prepared_shape), indexing="ij"), -1)
    world = voxels @ geometry.prepared_affine[:3, :3].T + geometry.prepared_affine[:3, 3]
    inside, _ = lay_back(torch.ones(1, *PLAN.shape), geometry)
    for axis in range(3):
        volume = torch.from_numpy(world[None, ..., axis].astype(np.float32))
        array, affine = lay_back(volume, geometry)
        assert array.shape == (14, 20, 15) and np.allclose(affine, OBLIQUE, atol=1e-6)
        theirs = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), -1)
        expected = (theirs @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3])[..., axis]
        covered = inside > 0.999
        assert covered.sum() > 500
        np.testing.assert_allclose(array[covered], expected[covered], atol=1e-2)


def test_no_name_and_no_path_is_in_any_byte_of_the_cache_and_only_its_owner_reads_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.scans.fingerprints, "SETTLED_S", -1.0)  # remember files just written, too
    site.encode()
    files = [path for path in site.folder.rglob("*") if path.is_file()]
    assert len(files) == len(PATIENTS) + 1  # and the fingerprints
    for path in files:
        content = path.read_bytes() + str(path.relative_to(site.folder)).encode()
        for secret in (*PATIENTS, "t1.nii", "t1_seg", str(site.root), "scans"):
            assert secret.encode() not in content
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (site.folder, *(path for path in site.folder.iterdir() if path.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_scan_that_changed_while_encoding_is_excluded_with_a_reason(site: Site) -> None:
    cohort = site.cohort()
    site.write("Silva", seed=123)
    (site.root / "Rossi" / "t1_seg.nii.gz").unlink()
    tokenizer = Tokenizer(Blocks(), {"kind": "blocks", "channels": 1})
    progress: list[tuple[int, int]] = []
    encoded = LatentCache(site.folder, tokenizer, PLAN).encode(
        cohort, progress=lambda *done: progress.append(done)
    )
    assert sorted(encoded.patients) == sorted(set(PATIENTS) - {"Silva", "Rossi"})
    reasons = {
        one.path.parent.name: one.reason for one in encoded.cohort.exclusions if "seg" not in one.path.name
    }
    assert reasons == {"Silva": Reason.CORRUPT, "Rossi": Reason.UNREADABLE}
    assert progress[0] == (1, 7) and progress[-1] == (7, 7)  # Rossi's label was seen to be missing at once


def test_latents_that_are_not_finite_are_refused_and_not_kept(site: Site) -> None:
    with pytest.raises(ValueError, match="Expected finite latents"):
        site.encode(Blocks(weight=float("nan")))
    assert not site.files()


def test_pruning_keeps_what_is_read_and_removes_everything_else(site: Site) -> None:
    site.encode(plan=dataclasses.replace(PLAN, spacing_mm=(3.0, 3.0, 3.0)))
    encoded, _ = site.encode()
    left = next(site.folder.glob("??")) / ".half.safetensors.x"
    left.write_bytes(b"half a file")
    cache = LatentCache(site.folder, Tokenizer(Blocks(), {"kind": "blocks", "channels": 1}), PLAN)
    assert cache.state(site.cohort()).unused == len(PATIENTS) + 1
    assert cache.prune(encoded) == len(PATIENTS) + 1
    assert set(site.files()) == {path.name for path in encoded.files()}
    state = cache.state(site.cohort())
    assert (state.complete, state.missing, state.damaged, state.unused) == (len(PATIENTS), 0, 0, 0)


def test_the_state_says_what_is_missing_and_about_how_much_it_takes(site: Site) -> None:
    cache = LatentCache(site.folder, Tokenizer(Blocks(), {"kind": "blocks", "channels": 1}), PLAN)
    before = cache.state(site.cohort())
    assert (before.complete, before.missing) == (0, len(PATIENTS))
    site.encode()
    written = sum(path.stat().st_size for path in site.folder.glob("??/*"))
    assert written <= before.bytes_to_write <= 3 * written
    assert cache.state(site.cohort()).bytes_to_write == 0


def test_a_shape_that_does_not_fit_the_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Blocks(), {"kind": "blocks", "channels": 1})
    with pytest.raises(ValueError, match="multiples of the tokenizer's stride 4"):
        LatentCache(tmp_path, tokenizer, dataclasses.replace(PLAN, shape=(8, 10, 8)))


def test_a_real_scan_decoded_and_laid_back_looks_like_the_scan(data_root: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in sorted((data_root / "msd_hippocampus" / "images").glob("*.nii.gz"))[:3]:
        (scans / path.name).write_bytes(path.read_bytes())
    plan = VolumePlan(modality="t1")
    tokenizer = load_tokenizer(TokenizerSpec())
    cohort = open_cohort(scans, plan=plan, split_salt="salt")
    encoded = LatentCache(tmp_path / "cache", tokenizer, plan).encode(cohort)
    decoded = tokenizer.decode(encoded.latents(range(3)))
    for row, entry in enumerate(encoded.entries):
        back, affine = lay_back(decoded[row], encoded.geometry(row))
        covered, _ = lay_back(torch.ones(1, *plan.shape), encoded.geometry(row))
        scan = nib.load(entry.path)
        assert np.allclose(affine, scan.affine) and back.shape == scan.shape
        inside = covered > 0.999
        assert np.corrcoef(back[inside], np.asarray(scan.dataobj)[inside])[0, 1] > 0.9
