"""A site's update of a federated diffusion model: many steps on few are found out, none are not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from audit.attacks.by_kind import ATTACKED
from audit.attacks.diffusion_update import attack_diffusion_round
from audit.evidence import Evidence, Release
from audit.findings import Finding
from meduet_models.diffusion.artefact import GenerativeModel
from tests.audit.released import toy_plan
from tests.audit.test_memorisation import PATIENTS, overtrained
from tests.audit.trained import cohort_of
from tests.generative_models import small_model, small_tokenizer

SCANS = torch.randn(2 * PATIENTS, 2, 4, 6, 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def trained() -> GenerativeModel:
    return overtrained(SCANS[:PATIENTS], 300)


def attacked(after: GenerativeModel) -> dict[str, Finding]:
    before = small_model(small_tokenizer())
    release = Release("north", {"kind": "diffusion", "round": 1}, dict[str, Tensor]())
    evidence = Evidence(
        name="toy",
        plan=toy_plan(),
        books={},
        releases=[release],
        cohorts={"north": cohort_of(SCANS, PATIENTS)},
        hashes={},
        diffusion=after,
        transformers_of=lambda release: (before.transformer, after.transformer),
    )
    lacking = replace(evidence, transformers_of=lambda release: None)
    assert not list(attack_diffusion_round(lacking, release, 8, []))
    return {one.attack: one for one in attack_diffusion_round(evidence, release, 8, [])}


def test_an_update_of_many_steps_tells_on_whom_the_loss_fell(trained: GenerativeModel) -> None:
    found = attacked(trained)
    assert set(found) == {"update", "alignment"} and "diffusion" in ATTACKED
    assert found["update"].verdict == "found" and (found["update"].value or 0) > 0.7
    assert found["update"].artefact == "north: diffusion"


def test_of_a_model_that_did_not_move_nothing_is_claimed() -> None:
    still = attacked(small_model(small_tokenizer()))
    assert {one.verdict for one in still.values()} <= {"not found", "under-powered"}
