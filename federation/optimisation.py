"""How a plan's steps of pretraining are taken: the optimiser and its learning rate, at a site and at the
centre.

Does not do: steps (`client/training/pretraining.py`; with privacy `server/phantom_training.py`).
Source: MeDUET (arXiv:2602.17901), section "Implementation"; Muon (`meduet_models/muon.py`) is not MeDUET's.
"""

from federation.plan import RunPlan
from meduet_models.adamw import AdamW, decay_groups
from meduet_models.meduet import MeDUET
from meduet_models.muon import Muon
from meduet_models.schedules import cosine, rise


def optimiser_of(student: MeDUET, plan: RunPlan) -> AdamW:
    """The plan's optimiser over all of the student's parameters."""
    training = plan.training
    rate, decay, betas = training.learning_rate, training.weight_decay, training.betas
    if training.optimiser == "muon":
        return Muon.of(student, lr=rate, betas=betas, weight_decay=decay)
    return AdamW(decay_groups(student.parameters(), decay), lr=rate, betas=betas, fused=True)


def learning_rate_at(number: int, plan: RunPlan) -> float:
    """Learning rate of step `number` of the run (from 0): a straight rise, then a cosine to the final
    rate."""
    training, total = plan.training, plan.total_steps
    rising = round(training.warmup * total)
    if number < rising:
        return rise(number, rising, training.learning_rate)
    share = (number - rising) / max(1, total - 1 - rising)
    return cosine(training.learning_rate, training.final_learning_rate, share)
