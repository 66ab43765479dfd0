"""Weights that a consortium signed are refused when a bit of them, or of who signed, is another."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

import meduet_models
from federation.keys.certificates import Authority, certificate_pem, fingerprint
from meduet_models.published.signature import check_signature
from server.cli import main
from server.consortium.provisioning import load_consortium, provision
from server.consortium.signing import sign_file
from tests.published_weights import published

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def authority(name: str, folder: Path) -> tuple[Authority, Path]:
    made = Authority.create(name, 3000, NOW)
    path = folder / f"{name}.crt"
    path.write_bytes(certificate_pem(made.certificate))
    return made, path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return published(tmp_path / "run") / "model.safetensors"


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_signed_weights_say_by_whom_and_unsigned_ones_that_they_are_not(
    weights: Path, tmp_path: Path
) -> None:
    ours, certificate = authority("hippocampus", tmp_path)
    assert meduet_models.load(weights).signature is None
    with pytest.raises(ValueError, match="it is not signed"):
        meduet_models.load(weights, trusted=certificate)
    sign_file(weights, ours)
    signed = meduet_models.load(weights.parent, trusted=certificate).signature
    assert signed is not None and signed.consortium == "hippocampus"
    assert signed.fingerprint == fingerprint(ours.certificate)


def test_a_flipped_bit_is_refused_wherever_it_is_and_read_without_the_signature(
    weights: Path, tmp_path: Path
) -> None:
    last = weights.stat().st_size - 1  # of a tensor: nothing else would notice
    flipped(weights, last)
    assert meduet_models.load(weights).signature is None, "the attack, without the defence"
    flipped(weights, last)
    sign_file(weights, authority("hippocampus", tmp_path)[0])
    for place in (30, last // 2, last):
        flipped(weights, place)
        with pytest.raises(ValueError, match="as it was signed"):
            meduet_models.load(weights)
        flipped(weights, place)
    beside = weights.with_name("model.safetensors.sig")
    whole = beside.read_bytes()
    for place in range(0, len(whole), 37):
        flipped(beside, place)
        try:
            found = check_signature(weights)
        except ValueError:
            pass
        else:  # the hash that is written there is for people; it is reckoned anew
            assert found is not None and found == check_signature(weights)
        beside.write_bytes(whole)


def test_a_stranger_who_signs_anew_is_refused_by_whoever_trusts_the_consortium(
    weights: Path, tmp_path: Path
) -> None:
    _, trusted = authority("hippocampus", tmp_path)
    stranger = Authority.create("hippocampus", 3000, NOW)  # the same name
    sign_file(weights, stranger)
    assert meduet_models.load(weights).signature is not None, "the attack, without the certificate"
    with pytest.raises(ValueError, match="another signed it"):
        meduet_models.load(weights, trusted=trusted)


def test_the_centre_signs_with_the_key_that_it_provisioned(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "consortium.yaml"
    settings.write_text("name: hippocampus\nserver: meduet.example.org:8443\nsites:\n  - name: north\n")
    office = provision(load_consortium(settings), tmp_path / "office").office
    assert main(["sign", str(weights), "--folder", str(tmp_path / "office")]) == 0
    assert office.fingerprint in capsys.readouterr().out
    signed = check_signature(weights, tmp_path / "office" / "ca.pem")
    assert signed is not None and signed.fingerprint == office.fingerprint
