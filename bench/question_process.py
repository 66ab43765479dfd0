"""What does a site's process cost that answers one question, in processor seconds?

Flower starts a process for every question. Here one is started in the same way, with the same imports and
site.yaml, and asked to train a round of one step over the scans that it has encoded: a network of 1 MB, as
in bench/round_overhead.py, whose overhead this is most of. Only the transport is left out: the question is
read from a file.

    python bench/question_process.py                     five processes of each kind, a minute
    python bench/question_process.py --times 3
    MEASURED=/another/checkout python bench/question_process.py       the same of other code

Seconds are user + system of the process, the median; they hold on a busy machine where elapsed ones do not.
The floor in the same run: a process that imports PyTorch and Flower's program for a question, and ends. A
question can be below it: it leaves out some of Python's way out.

Found, three of each on a busy machine: a question 2.78 s, the floor 3.16 s (.88). As it was before: 5.57 s
and 3.87 s (1.44). Gone are PyTorch's compiler, imported by its optimisers (1.1 s), the search for cycles at
the way out (1.2 s), nibabel and pydicom. What is left is the import of PyTorch and Flower.

Not importable; not shipped.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = os.environ.get("MEASURED") or str(Path(__file__).parents[1])
sys.path.insert(0, ROOT)
STAGES = (
    "PyTorch and Flower",
    "our imports",
    "reading the question",
    "opening the site",
    "answer",
    "way out",
)
NETWORK = ("width=96", "depth=3", "heads=4", "decoder_width=60", "decoder_depth=2", "decoder_heads=4")
ROUNDS = 2


def cpu_s(who: int = resource.RUSAGE_SELF) -> float:
    """Processor seconds so far, user and system, of all threads."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def prepare(folder: Path) -> Path:
    """Three simulated hospitals with encoded scans, and a question; a site's site.yaml."""
    from safetensors.torch import save_file

    from client.latents.style_moments import survey
    from client.settings import load_site_config
    from client.site import open_site
    from meduet_models.meduet import MeDUET
    from meduet_models.sharing import home_keys, shared_keys
    from meduet_models.style.bank import StyleBank
    from simulations.poc import provision
    from simulations.progress import Live

    overrides = [
        "hospitals.num_hospitals=3", "hospitals.patients=9", "volumes.spacing_mm=[6,8,8]",
        "volumes.shape=[32,24,24]", "style.minimum_cohort=2", "release.wire_dtype=bfloat16",
        *(f"network.{setting}" for setting in NETWORK), f"training.rounds={ROUNDS}",
        "training.steps_per_round=1", "aggregation.deadline_s=900",
    ]  # fmt: skip
    with Live() as live:
        poc = provision(folder, overrides, live)
    plan, moments = poc.plan, {}
    for name, path in poc.site_yamls.items():
        cohort = load_site_config(path).minimum_cohort
        moments[name] = survey(open_site(path).prepared(plan), plan, cohort)
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    weights, scope, method = model.state_dict(), plan.style.head, plan.aggregation.method
    question = {
        f"shared/{name}": weights[name].clone().contiguous() for name in shared_keys(model, scope, method)
    }
    question |= {
        f"home/{name}": weights[name].clone().contiguous() for name in home_keys(model, scope, method)
    }
    style_bank = StyleBank.of(plan.sites, moments).to_tensors()
    save_file(
        question | {f"bank/{name}": t.contiguous() for name, t in style_bank.items()}, folder / "question"
    )
    return poc.site_yamls[plan.sites[0]]


def answer(folder: Path, site_yaml: str, round_number: int) -> None:
    """One process: floor, our imports, the question, the answer; prints what each stage took."""
    import torch  # noqa: F401
    from flwr.supernode.cli import flwr_clientapp  # noqa: F401, Flower's program

    at = [cpu_s()]
    if round_number == 0:
        sys.stdout.write(json.dumps({"at": at, "modules": len(sys.modules), "loaded": []}))
        return
    from client.app import make_client_app, open_site_from_context
    from client.watchdog import watchdog

    at.append(cpu_s())
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity
    from safetensors.torch import load_file

    from federation.exchanges.pretraining import TrainAsk, TrainReply

    tensors = load_file(folder / "question")
    parts = {
        part: {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{part}/")}
        for part in ("shared", "home", "bank")
    }
    ask = TrainAsk(
        plan_json=(folder / "plan.json").read_text("utf-8"),
        round=round_number,
        shared=parts["shared"],
        bank=parts["bank"],
        home=parts["home"] if round_number == 1 else None,
    )
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # from which a message reads it
    message = Message(ask.to_record(), dst_node_id=1, message_type="train.round")
    context = Context(
        run_id=1, node_id=1, node_config={"site-config": site_yaml}, state=RecordDict(), run_config={}
    )
    at.append(cpu_s())

    def open_the_site(context: Context) -> Any:
        site = open_site_from_context(context)
        at.append(cpu_s())
        return site

    reply = make_client_app(open_the_site, watch=watchdog)(message, context)
    at.append(cpu_s())
    TrainReply.from_record(reply.content)  # raises: a refusal is no answer
    loaded = [name for name in HEAVY if name in sys.modules]
    sys.stdout.write(json.dumps({"at": at, "modules": len(sys.modules), "loaded": loaded}))


HEAVY = ("torch._dynamo", "sympy", "torch._inductor", "nibabel", "pydicom", "monai", "scipy", "sklearn")
"""Libraries that such a question has no use for; those that were loaded are named."""


def measured(folder: Path, site_yaml: Path, round_number: int) -> dict[str, Any]:
    """A process of its own, and its stages; `round` 0: the floor."""
    before = cpu_s(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "answer", str(folder), str(site_yaml), str(round_number)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        log = site_yaml.parent / "state" / "site.log"
        raise RuntimeError(done.stderr + (log.read_text("utf-8") if log.is_file() else ""))
    total = cpu_s(resource.RUSAGE_CHILDREN) - before
    timings: dict[str, Any] = json.loads(done.stdout)
    ends = [*timings["at"], total]
    timings["stages"] = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    timings["total"] = total
    return timings


def main() -> None:
    """A table: stage, seconds; and the ratio to the floor."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "consortium"
        site_yaml = prepare(folder)
        for round_number in (0, 1):  # bytecode is compiled, files are read; the state of round 1
            measured(folder, site_yaml, round_number)
        floors, questions = [], []
        for _ in range(times):  # in turn: what else the machine does falls on both
            floors.append(measured(folder, site_yaml, 0))
            questions.append(measured(folder, site_yaml, ROUNDS))
    floor, total = (median(one["total"] for one in kind) for kind in (floors, questions))
    print(f"{'floor, whole process':24s} {floor:6.2f} s, {floors[0]['modules']} modules")
    for number, stage in enumerate(STAGES):
        print(f"{stage:24s} {median(one['stages'][number] for one in questions):6.2f} s")
    print(
        f"{'question, whole process':24s} {total:6.2f} s, {questions[0]['modules']} modules, of them heavy: "
        f"{', '.join(questions[0]['loaded']) or 'none'}"
    )
    print(f"ratio to the floor {total / floor:.2f}; above it {total - floor:.2f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["answer"]:
        answer(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
