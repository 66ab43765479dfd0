"""Opening a run that another version made: said in a line, not in a trace."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from simulations.finished_run import begun_run
from simulations.progress import Live


def test_a_run_whose_settings_another_version_wrote_is_refused_in_a_line(tmp_path: Path) -> None:
    OmegaConf.save({"seed": 0}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="Expected every setting of this version"):
        begun_run(tmp_path, Live())
