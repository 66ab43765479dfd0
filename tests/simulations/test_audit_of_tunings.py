"""Fine-tunings and federated diffusion models of a whole run: every update and published model is tried."""

from pathlib import Path

import pytest

from audit.record.record import read_record
from server.config import compose_config
from simulations.audit_cli import main
from simulations.downstream.run import run_downstream
from simulations.run import run
from tests.small_simulation import small_simulation

DIFFUSION = (
    "diffusion=federated",
    "diffusion.rounds=2",
    "diffusion.steps_per_round=2",
    "diffusion.transformer.width=24",
    "diffusion.transformer.depth=1",
    "diffusion.transformer.heads=2",
    "generation=none",
)
LABELS = ("task=classification", "target=sex", "target_values=[F,M]", "modes=[frozen]", "federated=true")
QUICK = ("steps=4", "rounds=2", "bootstrap=20", "label_shares=[1]", "label_counts=[]", "draws=1")


@pytest.mark.slow
def test_every_update_of_either_is_attacked_and_so_is_what_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = small_simulation(patients=16, paired=2, rounds=1, steps_per_round=1)
    split = ("site.split_fractions=[0.5,0.0,0.5]", "probes.every_rounds=0")
    run(compose_config([*settings, *split, *DIFFUSION, f"folder={folder}"]))
    run_downstream(compose_config([f"pretrained={folder}", *LABELS, *QUICK], name="downstream"))
    main([str(folder), "--quick"])
    rows = {one.name: one for one in read_record(folder / "audit" / "audit.json").artefacts}
    for kind in ("diffusion", "finetuning"):
        attacks = {finding.attack for finding in rows[f"north: {kind}"].findings}
        assert attacks == {"update", "alignment"} and rows[f"north: {kind}"].releases == 2
    (tuned,) = [one for name, one in rows.items() if name.startswith("finetuned.safetensors")]
    assert {one.attack for one in tuned.findings} == {"loss", "calibrated_loss"} and tuned.sha256[0]
    published = {finding.attack for finding in rows["diffusion.safetensors"].findings}
    assert {"diffusion_loss", "diffusion_sima", "diffusion_pia"} <= published
    assert "not audited" not in {one.verdict for one in rows.values()}
