"""A site's answer with synthetic latents: it trains a small diffusion model at home, and its samples leave.

However many patients there are, none included, the answer has the same form: as many samples as the plan
says, of a model that is a function of noisy sums. Nothing is refused for what a patient's scans hold. Does
not do: the steps (`client/training/private_diffusion.py`), or keep the model.
"""

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork, before_deadline
from client.release import Gate, Released, clipped_rows
from client.training.private_diffusion import HomeScans, train_at_home
from federation.exchanges.latents import BOUNDED, LatentsReply, ToldLatents, banked, latent_bound
from federation.exchanges.synthetic_latents import (
    SYNTHETIC_LATENTS,
    SyntheticAsk,
    home_transformer,
    synthetic_examples,
    synthetic_items,
    synthetic_of,
    synthetic_shapes,
)
from federation.plan.plan import RunPlan
from federation.wire.sealing import check_recipient
from federation.wire.wire import GROWTH, RefusalKind
from meduet_models.diffusion.conditions import Conditions
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.style.bank import StyleBank
from meduet_models.style.common_style import CommonStyle


def answer_synthetic(
    site: SiteAtWork, ask: SyntheticAsk, plan: RunPlan, gate: Gate, on_step: OnStep
) -> Released:
    """The plan's number of samples. Raises `AskRefused` for a network, a bank or a key that is not one of the
    plan's, before a scan is read."""
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    try:
        check_recipient(banked(plan).recipient)
        transformer = _started(plan, ask)
        common = CommonStyle.of(StyleBank.from_tensors(ask.bank, plan.sites))
        if site.name not in common.style_bank.present:
            raise ValueError("Expected the protected style of this site in the bank; it has none.")
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    synthetic, noise = synthetic_of(plan), gate.step_secrets()
    transformer.to(site.device)
    home = HomeScans(site.scans(plan), lambda latents: common.into(latents, site.name))
    train_at_home(transformer, home, synthetic, noise, on_step)
    drawn = sample(
        transformer,
        Conditions(),
        synthetic.samples,
        SamplingSettings(steps=synthetic.sampling_steps),
        seed=plan.seed,
    )
    bound = latent_bound(plan) * (1 - GROWTH[plan.release.latent_dtype])
    samples = clipped_rows({BOUNDED: common.back(drawn, site.name)}, bound)
    return gate.release(samples, synthetic_shapes(plan), wire_dtype=plan.release.latent_dtype)


def _started(plan: RunPlan, ask: SyntheticAsk) -> DiffusionTransformer:
    transformer = home_transformer(plan)
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    came = {name: tuple(tensor.shape) for name, tensor in ask.start.items()}
    if expected != came:
        odd = min(name for name, _ in expected.items() ^ came.items())
        raise ValueError(f"Expected the network at home as the plan has it; {odd!r} is another.")
    transformer.load_state_dict(ask.start)
    if not bool((transformer.latent_deviation > 0).all()):
        raise ValueError("Expected a network at home whose latents have a positive deviation.")
    return transformer


def synthetic_mail(released: Released, ask: SyntheticAsk, site: str) -> LatentsReply:
    """The reply, sealed to the bank's key."""
    plan = ask.plan()
    latents = released.tensors[BOUNDED]
    told = ToldLatents(
        plan_sha256=ask.plan_sha256,
        site=site,
        round=ask.round,
        first=0,
        total=len(latents),
        items=synthetic_items(plan, site, len(latents)),
        examples=synthetic_examples(plan, site, latents),
        wire_dtype=released.wire_dtype,
    )
    return told.sealed_to(banked(plan).recipient)


ANSWER = Answer(SYNTHETIC_LATENTS, answer_synthetic, synthetic_mail)
