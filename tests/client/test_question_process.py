"""The process that answers one question, as Flower starts it anew each time: what it has no use for, it does
not load. Each of these libraries is a quarter of a second to two seconds of every question."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import client.scans.cohort_memo
from client.site import open_site
from client.site_scans import confirm_patients
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.adamw import AdamW
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from scans.volume_plan import VolumePlan
from tests.worlds import small_network

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "meduet_models" / "tokenizer" / "tokenizer_8ch.safetensors"
YAML = f"""\
name: north
data_root: scans
state_dir: state
minimum_cohort: 2
allow_non_private: true
plan_approval: implied
split_fractions: [1.0, 0.0, 0.0]
tokenizer: {{kind: file, path: {TOKENIZER}, channels: 8}}
device: cpu
"""
CHILD = """\
import sys
from pathlib import Path
from flwr.supernode.cli import flwr_clientapp
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from client.app import app
from federation.exchanges.pretraining import TrainAsk, TrainReply

folder = Path(sys.argv[1])
def part(name):
    tensors = load_file(folder / "question").items()
    return {key.partition("/")[2]: tensor for key, tensor in tensors if key.startswith(name + "/")}
ask = TrainAsk(plan_json=(folder / "plan.json").read_text(), round=1, shared=part("shared"),
               bank=part("bank"), home=part("home"))
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
message = Message(ask.to_record(), dst_node_id=1, message_type="train.round")
config = {"site-config": str(folder / "site.yaml")}
context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
TrainReply.from_record(app(message, context).content)
print(*sorted({name for name in sys.modules if name == "torch._dynamo"}
              | {name.partition(".")[0] for name in sys.modules}))
"""
NEEDLESS = {"torch._dynamo", "sympy", "nibabel", "pydicom", "monai", "scipy", "sklearn", "pandas",
            "hydra", "omegaconf", "ray", "opacus"}  # fmt: skip


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    """The toy plan, for the shipped tokenizer."""
    network = small_network(latent_channels=8, width=16, style_map_grid=(2, 3, 2))
    volumes = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))
    return toy_plan(network=network, volumes=volumes)


def a_bank(plan: RunPlan) -> StyleBank:
    draws = torch.Generator().manual_seed(0)
    moments = {}
    for index, name in enumerate(plan.sites):
        values = torch.randn(6, 8, 4, 6, 4, generator=draws) * (1 + index) + index
        moments[name] = StyleMoments.of(values, [f"{name}{n}" for n in range(6)], survey_layout(plan))
    return StyleBank.of(plan.sites, moments)


def test_a_question_about_encoded_scans_loads_no_compiler_and_no_reader_of_scans(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        path = tmp_path / "scans" / f"p{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        array = np.random.default_rng(number).random((14, 20, 15)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    (tmp_path / "site.yaml").write_text(YAML)
    site = open_site(tmp_path / "site.yaml")
    plan = RunPlan.from_json(plan.to_json().replace("0" * 64, site.tokenizer.sha256))
    monkeypatch.setattr(client.scans.cohort_memo, "SETTLED_S", -1.0)  # the scans were written just now
    confirm_patients(site.config)
    site.scans(plan)  # encodes

    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    weights, scope, method = model.state_dict(), plan.style.head, plan.aggregation.method
    parts = {
        "shared": {name: weights[name] for name in shared_keys(model, scope, method)},
        "home": {name: weights[name] for name in home_keys(model, scope, method)},
        "bank": a_bank(plan).to_tensors(),
    }
    tensors = {f"{part}/{name}": t.clone() for part, held in parts.items() for name, t in held.items()}
    save_file(tensors, tmp_path / "question")
    (tmp_path / "plan.json").write_text(plan.to_json())

    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    log = tmp_path / "state" / "site.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.is_file() else "")
    loaded = set(done.stdout.split())
    assert "client" in loaded and not loaded & NEEDLESS


def test_steps_are_those_of_pytorchs_own_optimiser_to_the_last_bit() -> None:
    def trained(optimiser: type[torch.optim.AdamW], fused: bool) -> list[torch.Tensor]:
        network = torch.nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        groups = [{"params": [network.weight], "weight_decay": 0.1}, {"params": [network.bias]}]
        steps = optimiser(groups, lr=1e-2, betas=(0.8, 0.9), fused=fused)
        for number in range(4):
            network(torch.full((2, 5), number - 1.5)).square().sum().backward()
            steps.step()
            steps.zero_grad()
            assert network.weight.grad is None
        moments = [steps.state[network.weight][name] for name in ("step", "exp_avg", "exp_avg_sq")]
        return [network.weight.detach(), network.bias.detach(), *moments]

    for fused in (False, True):
        theirs = trained(torch.optim.AdamW, fused)
        assert all(map(torch.equal, trained(AdamW, fused), theirs))
