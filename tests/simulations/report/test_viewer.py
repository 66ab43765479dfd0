"""The viewer's page: whole, offline, with the volumes that were given to it."""

import base64
import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from simulations.report.viewer import PATIENT_DATA, ViewedVolume, ViewerMissing, niivue, write_viewer


@pytest.fixture(scope="module")
def installed() -> None:
    try:
        niivue()
    except ViewerMissing as missing:
        pytest.skip(str(missing))


def volumes() -> list[ViewedVolume]:
    values = np.linspace(-0.2, 1.2, 6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = [-4, 5, 6]
    return [
        ViewedVolume("first </script>", "real", values, affine),
        ViewedVolume("second", "synthetic", values[::-1].copy(), affine),
    ]


def written(tmp_path: Path, patient_data: bool = True) -> str:
    path = tmp_path / "deep" / "viewer.html"
    write_viewer(path, volumes(), title="T", text="Words.", patient_data=patient_data, shown=(0, 1))
    return path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("installed")
def test_the_volumes_come_back_with_their_geometry(tmp_path: Path) -> None:
    page = written(tmp_path)
    embedded = re.search(r'id="volumes">(.*?)</script>', page, re.S)
    assert embedded is not None
    embedded_volumes = json.loads(embedded[1])
    assert [volume["name"] for volume in embedded_volumes] == ["first </script>", "second"]
    image = nib.nifti1.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(embedded_volumes[0]["nifti"])))
    given = volumes()[0]
    np.testing.assert_allclose(image.affine, given.affine)
    np.testing.assert_allclose(image.get_fdata(), np.clip(given.values, 0, 1), atol=0.5 / 255 + 1e-6)


@pytest.mark.usefixtures("installed")
def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = written(tmp_path)
    outside = page.split('id="volumes"')[0] + page.split("</script>", 2)[-1]
    assert not re.search(r"https?://|src=|@import|url\(", outside)


@pytest.mark.usefixtures("installed")
def test_the_page_says_when_it_holds_patient_data(tmp_path: Path) -> None:
    assert PATIENT_DATA[:40] in written(tmp_path)
    assert "Patient data" not in written(tmp_path / "other", patient_data=False)


@pytest.mark.usefixtures("installed")
def test_one_volume_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two volumes or more"):
        write_viewer(tmp_path / "v.html", volumes()[:1], title="T", text="", patient_data=False)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.report.viewer._PACKAGE", "no-such-package-of-a-viewer")
    with pytest.raises(ViewerMissing, match=r"fedmeduet\[viewer\]"):
        niivue()
