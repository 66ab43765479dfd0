"""A style code, attacked: without its noise it tells who is in it, with the noise of the plan it does not."""

import torch

from audit.attacks.by_kind import ATTACKED
from audit.attacks.sums import attack_sum, code_sum
from audit.evidence import Release
from audit.findings import Finding
from federation.exchanges.style_code import CODE, code_promise, style_code
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.style.code import entry_of_scans, vector_of
from tests.audit.trained import cohort_of
from tests.worlds import protected_plan, public_latents, small_network, small_plan

IN, ALL, NUMBERS = 6, 120, 8
PUBLIC = public_latents(72)
SCANS = public_latents(ALL, seed=7)


def plan() -> RunPlan:
    def small(**changes: object) -> RunPlan:
        return small_plan(network=small_network(code_size=24), **changes)

    return protected_plan(PUBLIC, small, style_dimensions=NUMBERS)


def attacked(noise: float, seed: int = 0) -> dict[str, Finding]:
    asked, cohort = plan(), cohort_of(SCANS, IN)
    layout, code = survey_layout(asked), style_code(asked, PUBLIC)
    total = code.total(vector_of(entry_of_scans(one[None], layout)) for one in SCANS[:IN])
    total = total + noise * torch.randn(len(total), generator=torch.Generator().manual_seed(seed))
    release = Release("north", {"kind": "style_code"}, {CODE: total.float()})
    own = code_sum(release, cohort, asked, PUBLIC)
    assert own is not None and own.noise == code_promise(asked).deviation > 1
    assert code_sum(Release("north", {}, {"another": total}), cohort, asked, PUBLIC) is None
    return {one.attack: one for one in attack_sum(own, [])}


def test_without_noise_it_tells_who_is_in_it_and_with_noise_it_seldom_does() -> None:
    assert "style_code" in ATTACKED
    bare = attacked(0.0)
    assert set(bare) == {"pool", "tracing"} and "found" in {one.verdict for one in bare.values()}
    sigma = code_promise(plan()).deviation
    noised = [one for seed in range(10) for one in attacked(sigma, seed).values()]
    assert _mean(noised) < _mean(list(bare.values())) - 0.1 and _mean(noised) < 0.65
    assert not [one for one in noised if one.measure != "AUC"]  # nothing exact is said of a sum with noise


def _mean(findings: list[Finding]) -> float:
    return sum(one.value or 0 for one in findings) / len(findings)
