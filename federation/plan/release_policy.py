"""Release policies: what sites let out for a diffusion model, each one value with all that is said of it.

A policy carries where the model is trained, whether latents leave, whether what is made of them is patient
data, the sentence with which a hospital agrees, and the words in which people are told. Whoever decides or
speaks asks the value, whose guarantee, what it does not cover and smallest cohort `plan show` repeats; a
word that is none of the table's is refused, not taken for the mild one. A further policy is a further value,
and an exchange of its own if it lets out something else.
What this file does not do: it decides nothing for a site, and lets nothing out.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReleasePolicy:
    """What leaves a site for a diffusion model."""

    name: str
    """The word in the plan: `diffusion.policy`."""
    trained_at: Literal["centre", "sites", "nowhere"]
    """Where the model is trained."""
    releases_latents: bool
    """Whether latents of single scans leave."""
    noised: bool
    """Whether what leaves has noise, under the plan's `privacy`; a plan has such a policy with privacy, and
    any other without."""
    sealed: bool
    """Whether what leaves is sealed to the key of the centre's latent bank, which the plan names then."""
    is_patient_data: bool
    """Whether what is made at the centre (latent bank, model, samples) is handled as scans are."""
    consent: str
    """What site.yaml must say, word for word, before a site takes part; empty: nothing."""
    agreed: str
    """What leaves, for a site that takes part."""
    warning: str
    """What a site that has not agreed is told would leave."""
    beside_sums: str
    """What leaves besides sums, in a few words for the plan as people read it."""
    sentence: str
    """The same in full; the plan's part `diffusion`, `amount` and `told` are filled in."""
    guarantee: str
    """What is promised of it to a patient."""
    not_covered: str
    """What is not."""
    smallest_cohort: str
    """Of how few patients it may leave."""
    page: str
    """What a run's page adds to its promise."""
    moved: str
    """What a run's page says moved of the scans."""
    without_effect: tuple[str, ...]
    """Settings of the plan's part `diffusion` that mean nothing under this policy."""


NONE = ReleasePolicy(
    name="none",
    trained_at="nowhere",
    releases_latents=False,
    noised=False,
    sealed=False,
    is_patient_data=False,
    consent="",
    agreed="no diffusion model; no latents leave",
    warning="nothing",
    beside_sums="no scan, no file name, no label",
    sentence="For a diffusion model: nothing; there is none, and no latent leaves.",
    guarantee="nothing leaves for it",
    not_covered="what leaves for the pretraining, which is said above",
    smallest_cohort="none is needed",
    page="",
    moved="scans, none of which moved",
    without_effect=(),
)
"""Of a plan without a diffusion model."""
RAW = ReleasePolicy(
    name="raw",
    trained_at="centre",
    releases_latents=True,
    noised=False,
    sealed=True,
    is_patient_data=True,
    consent="We release raw latents, from which our patients' scans can be reconstructed, to the "
    "coordinating centre.",
    agreed="raw latents leave: patient data, from which scans can be reconstructed; site.yaml agrees",
    warning="raw latents, from which scans can be reconstructed",
    beside_sums="AND LATENTS OF SINGLE SCANS, SEE BELOW",
    sentence="For a diffusion model: LATENTS OF {amount} of your training scans, each clipped to a root mean "
    "square of {diffusion.latent_clip:g}, told with {told}. They leave encrypted to the key "
    "{diffusion.recipient:.12}… of the centre's latent bank, so no server on the way reads them; whoever has "
    "that key does. The tokenizer's decoder is public: whoever holds a latent can see the scan.",
    guarantee="a bound on each scan's latents; epsilon is infinite everywhere",
    not_covered="any patient: whose latents leave, her scan can be reconstructed and found again, also in "
    "samples of a model that learned from it, and who has read it cannot be made to forget",
    smallest_cohort="none: a smallest cohort protects sums, and here single scans leave",
    page=" Under this plan raw latents of training scans left too: the scans can be reconstructed from them, "
    "so they are patient data at the centre, and so is a model that learned from them.",
    moved="scans; latents of those for training left",
    without_effect=("rounds", "update_clip_norm"),
)
_AFTER_THE_PRETRAINING = (
    "begin_round",
    "steps_per_round",
    "rounds",
    "items_per_site",
    "items_per_round",
    "update_clip_norm",
)
SYNTHETIC = ReleasePolicy(
    name="synthetic",
    trained_at="centre",
    releases_latents=False,
    noised=True,
    sealed=True,
    is_patient_data=False,
    consent="",
    agreed="no latent of a scan leaves; samples of a model that your site trains with noise do",
    warning="samples of a diffusion model that was trained with noise",
    beside_sums="no latent of a scan, no file name, no label",
    sentence="For a diffusion model, once, after the pretraining: {diffusion.synthetic.samples:,} SYNTHETIC "
    "LATENTS, samples of a small model that your site trains for {diffusion.synthetic.steps:,} steps on its "
    "patients, with noise in each step; no latent of a scan leaves. Each is clipped to a root mean square of "
    "{diffusion.latent_clip:g}. How many there are is a number of the plan; nothing is told beside them, and "
    "no condition but your site's name. They leave encrypted to the key {diffusion.recipient:.12}… of the "
    "centre's latent bank, where they are labelled synthetic, with your site's name and epsilon.",
    guarantee="(epsilon, delta) for each patient, as said below, over the style code and the training "
    "together: samples are made of noisy steps and of nothing else, however many there are",
    not_covered="that your site takes part; what patients have in common, which the samples are there to "
    "show; and a sample may look like a scan, as it may without her: it is no proof that anybody is among "
    "yours",
    smallest_cohort="500 patients, as the plan expects them, unless it says although_noise_wins; your site "
    "does not refuse by its number, which would tell it",
    page=" Samples of models that sites trained with noise left too, within the same epsilon.",
    moved="scans, none of which moved; synthetic latents left",
    without_effect=_AFTER_THE_PRETRAINING,
)
AGGREGATE = ReleasePolicy(
    name="aggregate",
    trained_at="centre",
    releases_latents=False,
    noised=True,
    sealed=False,
    is_patient_data=False,
    consent="",
    agreed="no latent of a scan leaves; a mean and a spread along a few public axes do, with noise",
    warning="moments of latents with noise",
    beside_sums="no latent of a scan, no file name, no label",
    sentence="For a diffusion model, once, after the pretraining: mean and spread of your patients' latents "
    "along {diffusion.aggregate.dimensions} axes of phantoms, and about how many patients there are, with "
    "noise; no latent of a scan leaves. From them the centre makes "
    "{diffusion.aggregate.samples:,} latents of phantoms that were nobody.",
    guarantee="(epsilon, delta) for each patient, as said below, over the style code and these moments "
    "together",
    not_covered="that your site takes part; what patients have in common along these axes, which is what is "
    "told",
    smallest_cohort="none is enforced at your site, which would tell its number; the centre puts aside "
    "moments of fewer than twice the plan's smallest cohort, as far as noise lets tell",
    page=" Moments of latents along a few public axes left too, with noise, within the same epsilon.",
    moved="scans, none of which moved; moments of latents left, with noise",
    without_effect=(*_AFTER_THE_PRETRAINING, "latent_clip", "recipient"),
)
FEDERATED = ReleasePolicy(
    name="federated",
    trained_at="sites",
    releases_latents=False,
    noised=False,
    sealed=False,
    is_patient_data=False,
    consent="",
    agreed="no latents leave; the diffusion model's updates do, bounded",
    warning="updates of a diffusion model",
    beside_sums="no scan, no file name, no label",
    sentence="For a diffusion model, in {diffusion.rounds} more rounds: the change of its weights, clipped "
    "to a length of {diffusion.update_clip_norm:g} times how many scans were trained on; no latent leaves.",
    page="",
    moved="scans, none of which moved",
    guarantee="a bound on each site's update; without noise, so epsilon is infinite",
    not_covered="whether a person is among yours, what a single update gives away of her, and samples that "
    "resemble a scan that was learned from",
    smallest_cohort="that of the pretraining for what it tells; for the updates none is enforced",
    without_effect=(
        "begin_round",
        "final_steps",
        "items_per_site",
        "items_per_round",
        "latent_clip",
        "recipient",
    ),
)
POLICIES = {policy.name: policy for policy in (RAW, FEDERATED, SYNTHETIC, AGGREGATE)}
"""Those that a plan's diffusion model may name."""


def release_policy(name: str) -> ReleasePolicy:
    """The policy of this name; raises `ValueError` for a word that is none."""
    if name not in POLICIES:
        raise ValueError(f"Expected diffusion.policy to be one of {', '.join(POLICIES)}; got {name[:40]!r}.")
    return POLICIES[name]


def check_sentence(sentence: str) -> None:
    """Raise `ValueError` unless site.yaml's `latent_release` is empty or the sentence of a policy."""
    agreements = [policy.consent for policy in POLICIES.values() if policy.consent]
    if sentence and sentence not in agreements:
        raise ValueError(
            "Expected latent_release to be left out, or to be, word for word: "
            f"{' or '.join(map(repr, agreements))}; got {sentence[:60]!r}."
        )
