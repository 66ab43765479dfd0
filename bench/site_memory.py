"""How much memory does the process take that answers a round at a site?

A process of its own per case takes the question, trains four steps, and gives back what leaves. The highest
resident size while it did so, above what the process held before the question was made,
over the network's parameters. The floor in the same run: five copies of the network in float32 (student,
teacher, AdamW's two moments, gradients), what came and what leaves. Round 2 begins from the state that round
1 left on disk; "written" writes the round under way after each step; "resumed" goes on from what a round
that was cut short had written; "message" takes the question as a message and makes the reply.

    python bench/site_memory.py                  both sizes, five minutes on a busy core
    python bench/site_memory.py small            one of them
    MEASURED=/another/checkout python bench/site_memory.py        the same of other code

Found, on a CPU: 41 bytes per parameter at 10.2 million parameters, 32 at 40.8 million (1.14 of the floor), in
each case but the message (45 and 37: its bytes are held beside the tensors). Between the two sizes that is 29
bytes per parameter, and 0.1 GB whatever the size. When states were read, written and hashed whole: 93 and 84.

Batches of 4 scans of 12 tokens: the activations of a batch are as good as nothing here, and come on top.
Not importable; not shipped.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ.get("MEASURED") or str(Path(__file__).parents[1]))  # MEASURED: another checkout

import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import make_client_app
from client.exchanges.pretraining import ANSWER
from federation.exchanges.pretraining import TrainAsk, TrainReply
from federation.exchanges.survey import survey_layout
from federation.journal import Journal
from federation.plan.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from privacy.ledger import Ledger
from scans.volume_plan import VolumePlan

SITES = ("north", "south", "west")
GRID = (4, 6, 4)
WIDTHS = {"small": 320, "large": 640}
EARLIER = {
    "round 1": (),
    "round 2": ("round 1",),
    "round 2, written": ("round 1",),
    "round 2, resumed": ("round 1", "round 2, cut"),
    "round 2, message": ("round 1",),
}
CASES = tuple(EARLIER)
STEPS = 4
FLOOR_BYTES = 4 * (5 + 2)


class Killed(BaseException):
    """As if the process had ended."""


class Latents:
    """Twelve patients, one scan each."""

    def __init__(self, site: int) -> None:
        """Latents shifted and scaled by the site's number."""
        draws = torch.Generator().manual_seed(site)
        self.values = torch.randn(12, 2, *GRID, generator=draws) * (1 + site) + site
        self.patients = [f"{site}-{n}" for n in range(12)]
        self.covariates: list[dict[str, Any]] = [{} for _ in self.patients]
        self.site_index = torch.full((12,), site)

    def indices(self, split: str) -> list[int]:
        """All of them."""
        return list(range(12)) if split == "train" else []

    def latents(self, indices: Any, view: int = 0) -> torch.Tensor:
        """Latents of these rows."""
        return self.values[list(indices)].clone()


class Site:
    """A site in a folder, with latents in memory."""

    def __init__(self, folder: Path, progress_every_s: float) -> None:
        """Ledger and journal in `folder`."""
        self.name, self.state_dir, self.progress_every_s = SITES[0], folder, progress_every_s
        self.device, self.compile, self.minimum_cohort = torch.device("cpu"), False, 0
        self.exact_sums, self.secret, self.launcher = False, b"1" * 32, None
        self.ledger, self.journal = Ledger(folder / "ledger.jsonl"), Journal(folder / "journal.jsonl")

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Every plan."""

    def scans(self, plan: RunPlan) -> Any:
        """Its latents."""
        return Latents(0)


def plan_of(size: str) -> RunPlan:
    """Three rounds of four steps."""
    width = WIDTHS[size]
    return RunPlan(
        name="memory", seed=7, sites=SITES, tokenizer_sha256="0" * 64,
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16), registered=True),
        network=NetworkConfig(
            latent_channels=2, latent_grid=GRID, patch_size=2, width=width, depth=7, heads=8,
            decoder_width=width // 2, decoder_depth=2, decoder_heads=4, style_map_grid=(2, 3, 2),
        ),
        objective=ObjectiveConfig(), training=TrainingPlan(rounds=3, steps_per_round=STEPS, batch_size=4),
        style=StylePlan(minimum_cohort=3), aggregation=AggregationPlan(deadline_s=3600.0),
        release=ReleasePlan(),
    )  # fmt: skip


def question(plan: RunPlan, round_number: int) -> tuple[Message, int]:
    """The centre's message, and how many parameters its network has."""
    model = MeDUET(plan.network, len(SITES), seed=plan.seed)
    moments = {}
    for index, site in enumerate(SITES):
        scans = Latents(index)
        moments[site] = StyleMoments.of(scans.values, scans.patients, survey_layout(plan))
    weights, scope, method = model.state_dict(), plan.style.head, plan.aggregation.method
    ask = TrainAsk(
        plan_json=plan.to_json(),
        round=round_number,
        shared={name: weights[name] for name in shared_keys(model, scope, method)},
        bank=StyleBank.of(SITES, moments).to_tensors(),
        home={name: weights[name] for name in home_keys(model, scope, method)} if round_number == 1 else None,
    )
    parameters = sum(p.numel() for p in model.parameters())
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = (
        1  # from which messages read their sender
    )
    return Message(ask.to_record(), dst_node_id=1, message_type="train.round"), parameters


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def answer(folder: Path, size: str, case: str) -> None:
    """One process: print the parameters, the peak above the start in bytes, the seconds of the answer."""
    torch.set_num_threads(1)
    plan = plan_of(size)
    site = Site(folder, 0.0 if "written" in case or "cut" in case else 3600.0)
    before = resident("VmRSS")
    message, parameters = question(plan, int(case[6]))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    ask = None if "message" in case else TrainAsk.from_record(message.content)
    if ask is not None:
        message = Message(RecordDict(), dst_node_id=1, message_type="train.round")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on

    def on_step(step: int, loss: float) -> None:
        if "cut" in case and step == STEPS - 1:
            raise Killed

    began = time.perf_counter()
    if ask is None:
        reply = make_client_app(lambda context: site)(message, context)
    else:
        released = ANSWER.once(site, ask, plan, on_step)
    seconds, peak = time.perf_counter() - began, resident("VmHWM") - before
    if ask is None:
        TrainReply.from_record(reply.content)  # raises: a refusal is no answer
    else:
        assert released.record["bytes"] > 0
    sys.stdout.write(f"{parameters} {peak} {seconds}\n")


def measured(folder: Path, size: str, case: str) -> list[float]:
    """What a process of its own prints."""
    command = [sys.executable, __file__, "answer", str(folder), size, case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not ("cut" in case and "Killed" in done.stderr):
        raise RuntimeError(done.stderr)
    return [float(word) for word in done.stdout.split()]


def main(sizes: list[str]) -> None:
    """A table: size, case, bytes per parameter, ratio to the floor."""
    for size in sizes:
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                for earlier in EARLIER[case]:
                    measured(Path(folder), size, earlier)
                parameters, peak, seconds = measured(Path(folder), size, case)
            print(
                f"{parameters / 1e6:5.1f} M parameters, {case:19s}: {peak / 2**20:6.0f} MiB, "
                f"{peak / parameters:5.1f} bytes per parameter, {peak / parameters / FLOOR_BYTES:4.2f} of "
                f"the floor; {seconds:5.1f} s"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["answer"]:
        answer(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main(sys.argv[1:] or list(WIDTHS))
