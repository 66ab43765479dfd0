"""A fine-tuning with labels, attacked by whoever holds candidates' scans and what is to be predicted of them.

The published network: is its loss on a candidate's own answer low, lower than that of the network that was
sent first? An update of a site: did that loss fall with it, does it point along the gradient of her own
answer? Members are those whose labels the site used.

What this file does not do: guess an answer that the reader does not have.

Axes: n = scans.
"""

import copy
import time
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from audit.attacks.membership import blind, scores_of
from audit.attacks.scores import Scores, judged
from audit.attacks.update import cosines, judged_update
from audit.evidence import Evidence, Finetuning, Labelled, Release
from audit.findings import Finding
from meduet_models.downstream.task import Task

FINETUNED = "finetuned.safetensors"


def task_losses(network: nn.Module, labelled: Labelled, task: Task) -> Float[Tensor, " n"]:
    """The task's loss on each scan by itself."""
    network.eval()
    with torch.no_grad():
        rows = range(len(labelled.answers))
        return torch.tensor([float(_loss(network, labelled, task, row)) for row in rows]).double()


def attack_finetuned(finetuning: Finetuning, scored: list[tuple[Finding, Scores]]) -> Iterator[Finding]:
    """The published network; nothing where it is not at hand, or nobody's answers are."""
    first, last = (finetuning.network_after(done) for done in (0, finetuning.plan.rounds))
    if last is None or not finetuning.labelled:
        return
    task, each = _task(finetuning), finetuning.labelled
    cohorts = [one.cohort for one in each.values()]
    without, artefact = blind(cohorts), name_of(finetuning)

    def finding(attack: str, values: dict[str, Tensor], beside: str, began: float) -> Finding:
        scores = scores_of(cohorts, values)
        sentence = (
            "Whoever has the network, a candidate's scan and what is to be predicted of it takes a low "
            f"loss{beside} for membership."
        )
        made = judged(artefact, attack, scores, sentence, without, began)
        scored.append((made, scores))
        return made

    began = time.process_time()
    own = {site: task_losses(last, one, task) for site, one in each.items()}
    yield finding("loss", {site: -one for site, one in own.items()}, "", began)
    if first is not None:
        began = time.process_time()
        before = {site: task_losses(first, one, task) for site, one in each.items()}
        less = {site: before[site] - own[site] for site in own}
        yield finding("calibrated_loss", less, ", less that of the network that was sent first,", began)


def attack_finetuning_round(
    evidence: Evidence, release: Release, scored: list[tuple[Finding, Scores]]
) -> Iterator[Finding]:
    """The update of a round; nothing where the weights are not at hand, or nobody's answers are."""
    finetuning = evidence.finetunings.get(str(release.record.get("plan")))
    labelled = None if finetuning is None else finetuning.labelled.get(release.site)
    before = None if finetuning is None else finetuning.network_after(release.round - 1)
    if finetuning is None or labelled is None or before is None or release.tensors is None:
        return
    task, weight, after = _task(finetuning), float(release.record["weight"]), copy.deepcopy(before)
    moved = {name: before.state_dict()[name] + sum_ / weight for name, sum_ in release.tensors.items()}
    after.load_state_dict(moved, strict=False)

    def fell() -> Tensor:
        return task_losses(before, labelled, task) - task_losses(after, labelled, task)

    def aligned() -> Tensor:
        own, count = lambda network, row: _loss(network, labelled, task, row), len(labelled.answers)
        return cosines(before.eval(), after.eval(), own, count)

    yield from judged_update(release, labelled.cohort, fell, aligned, scored)


def name_of(finetuning: Finetuning) -> str:
    """What the report calls the published network."""
    return f"{FINETUNED} of {finetuning.plan.sha256[:8]}"


def _task(finetuning: Finetuning) -> Task:
    from meduet_models.downstream.tasks import task_of  # MONAI takes seconds to import

    return task_of(finetuning.plan.local.task)


def _loss(network: nn.Module, labelled: Labelled, task: Task, row: int) -> Tensor:
    seen = [part[row : row + 1].float() for part in labelled.seen]
    return task.loss(network(*seen), labelled.answers[row : row + 1])
