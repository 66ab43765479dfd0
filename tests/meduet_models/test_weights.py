"""Weights on disk: whole or not at all, named by what they hold."""

import json
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from meduet_models.weights import load_weights, open_weights, save_weights, sha256_of_tensors, shapes_of

TENSORS = {
    "wide": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
}


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", TENSORS, {"seed": "3", "command": "train"})
    tensors, provenance = load_weights(tmp_path / "a.safetensors")
    assert provenance == {"seed": "3", "command": "train"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_the_same_weights_and_provenance_give_the_same_bytes(tmp_path: Path) -> None:
    provenance = {f"field {i}": str(i) for i in range(8)}
    save_weights(tmp_path / "a.safetensors", TENSORS, provenance)
    save_weights(
        tmp_path / "b.safetensors",
        dict(reversed(TENSORS.items())),
        dict(reversed(provenance.items())),
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_slice_of_a_large_tensor_is_saved_without_the_rest_of_it(tmp_path: Path) -> None:
    large = torch.zeros(100_000)
    save_weights(tmp_path / "a.safetensors", {"first": large[:10], "second": large[10:20]}, {})
    assert (tmp_path / "a.safetensors").stat().st_size < 1000


def test_the_file_is_byte_for_byte_the_librarys(tmp_path: Path) -> None:
    tensors = {
        **TENSORS,
        "flags": torch.tensor([True, False, True]),
        "turned": TENSORS["wide"].T,
        "nothing": torch.empty(0, 4),
        "naïve “name”\n": torch.tensor([2.5]).expand(1, 1),
    }
    save_weights(tmp_path / "a.safetensors", tensors, {"seed": "3", "é": "ü"})
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    expected = save(plain, {"provenance": json.dumps({"seed": "3", "é": "ü"}, sort_keys=True)})
    assert (tmp_path / "a.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float16]
)
def test_every_dtype_comes_back_beside_others_of_its_size(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {
        **TENSORS,
        "a": torch.tensor([[1], [0], [1]], dtype=kind),
        "z": torch.ones(1, dtype=torch.uint8),
    }
    save_weights(tmp_path / "a.safetensors", tensors, {})
    came = load_file(tmp_path / "a.safetensors")  # the library's own reading
    assert sha256_of_tensors(came) == sha256_of_tensors(tensors)


def test_stored_weights_are_read_from_the_file_that_was_opened_and_when_they_are_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, {"x:a": torch.ones(2, 3), "x:b": torch.tensor(1.0), "y:a": torch.zeros(4)}, {})
    stored, provenance = open_weights(path)
    part = stored.part("x:")
    save_weights(path, {"x:a": torch.zeros(2, 3)}, {"later": "yes"})
    path.unlink()
    assert provenance == {} and set(stored) == {"x:a", "x:b", "y:a"} and part.keys() == {"a", "b"}
    assert shapes_of(part) == {"a": (2, 3), "b": ()} == shapes_of(dict(part))
    part["a"].add_(1.0)
    assert torch.equal(part["a"], torch.ones(2, 3))  # nobody's memory but the asker's
    with pytest.raises(KeyError):
        part["y:a"]


def test_stored_weights_that_are_cut_short_after_they_were_opened_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, TENSORS, {})
    stored, _ = open_weights(path)
    with path.open("r+b") as file:
        file.truncate(16)
    with pytest.raises(ValueError, match="Expected to read 'wide'"):
        stored["wide"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path, share: float) -> None:
    whole = tmp_path / "a.safetensors"
    save_weights(whole, TENSORS, {})
    content = whole.read_bytes()
    whole.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="truncated or foreign") as refusal:
        load_weights(whole)
    assert "\n" not in str(refusal.value)


def test_a_file_of_another_kind_or_no_file_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="truncated or foreign"):
        load_weights(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="there is none"):
        load_weights(tmp_path / "b.safetensors")


def test_a_foreign_safetensors_file_keeps_its_own_metadata(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert load_weights(tmp_path / "a.safetensors")[1] == {"format": "pt"}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, TENSORS, {"version": "old"})

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("storage.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, TENSORS, {"version": "new"})
    assert load_weights(path)[1] == {"version": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_only_the_owner_may_read_what_was_saved(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", TENSORS, {})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o600


def test_saving_into_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to exist"):
        save_weights(tmp_path / "missing" / "a.safetensors", TENSORS, {})


@pytest.mark.parametrize(
    "changed",
    [
        {"wide": TENSORS["wide"] + 1e-6},
        {"wide": TENSORS["wide"].reshape(4, 3)},
        {"count": torch.tensor(7, dtype=torch.int32)},
        {"half": -TENSORS["half"]},
    ],
)
def test_the_hash_sees_every_value_shape_and_dtype(changed: dict[str, Tensor]) -> None:
    assert sha256_of_tensors(TENSORS | changed) != sha256_of_tensors(TENSORS)


def test_the_hash_sees_names_and_how_values_are_divided_among_them() -> None:
    x = torch.arange(4.0)
    assert len({sha256_of_tensors(t) for t in ({"a": x}, {"b": x}, {"a": x[:2], "b": x[2:]}, {})}) == 4


@given(st.permutations(sorted(TENSORS)))
@settings(max_examples=6, deadline=None)
def test_the_hash_does_not_see_the_order(names: list[str]) -> None:
    assert sha256_of_tensors({name: TENSORS[name] for name in names}) == sha256_of_tensors(TENSORS)


def test_the_hash_does_not_see_the_memory_layout() -> None:
    assert sha256_of_tensors({"a": TENSORS["wide"].T}) == sha256_of_tensors(
        {"a": TENSORS["wide"].T.contiguous()}
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_hash_reads_expanded_values(count: int) -> None:
    expanded = torch.tensor([1.5], dtype=torch.float64).expand(count)
    assert sha256_of_tensors({"a": expanded}) == sha256_of_tensors({"a": torch.full((count,), 1.5).double()})
