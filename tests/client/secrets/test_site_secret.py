from pathlib import Path

import pytest

from client.secrets.site_secret import digest_of, seed_of, site_secret


def test_a_secret_is_made_once_for_its_owner_only_and_is_another_at_every_site(tmp_path: Path) -> None:
    path = tmp_path / "draws.key"
    secret = site_secret(path)
    assert site_secret(path) == secret == path.read_bytes() and len(secret) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert site_secret(tmp_path / "other.key") != secret


def test_a_damaged_secret_is_not_replaced_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "draws.key"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"32 bytes in .*draws\.key; got 5"):
        site_secret(path)


def test_what_follows_from_a_secret_depends_on_every_word() -> None:
    seeds = {
        seed_of(key, *words) for key in (b"a", b"b") for words in (("x", 1, 12), ("x", 11, 2), ("y", 1, 12))
    }
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert digest_of(b"a", "fold", "p1") == digest_of(b"a", "fold", "p1")
