from client.commands.plan_words import plan_words
from federation.bundle import running_bundle
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from federation.plan.finetuning_privacy import FinetunePrivacy, with_noise
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from federation.published_plan import PublishedPlan
from tests.worlds import protected_plan, public_latents, small_plan


def words_of(plan: RunPlan) -> str:
    words = plan_words(PublishedPlan(plan=plan, bundle_sha256=running_bundle(), finetuning=None))
    return " ".join(sentence for _, sentence in words)


def test_the_words_of_a_plan_with_privacy_say_what_leaves_once_and_what_it_costs() -> None:
    text = words_of(protected_plan(public_latents(), epsilon=1.0))
    for said in (
        "Once: 5 numbers with noise",
        "epsilon 0.999 to 1.000 at delta 1e-05 for the whole run",
        "In all: style code: 1.",
        "your site is asked nothing more",
        "epsilon_ceiling",
    ):
        assert said in text
    for unsaid in ("None is added anywhere", "Each round", "anonymous", "compliant"):
        assert unsaid not in text


def test_the_words_of_noisy_steps_say_how_many_how_patients_are_drawn_and_what_all_of_it_costs() -> None:
    noisy = NoisySteps(steps=4, steps_per_round=2, sampling_rate=0.25, clip_norm=1.0, epsilon_style=1.0)
    text = words_of(protected_plan(public_latents(), level="full", epsilon=3.0, noisy=noisy))
    for said in (
        "then your site takes 4 steps on its patients, in 2 rounds",
        "In each of 2 rounds: by how much",
        "in each of which about 25% of your patients, drawn in secret, take part and noise is added",
        "to 3.000 at delta 1e-05 for the whole run",
        "of which there are 2 and in each of which she is with a chance of 0.25",
        "In all: style code: 1, rounds of noisy steps: 2.",
    ):
        assert said in text
    for unsaid in ("asked nothing more", "No weights", "output layer", "anonymous", "compliant"):
        assert unsaid not in text


def test_the_words_of_a_fine_tuning_with_privacy_say_what_all_rounds_cost_and_what_no_site_tells() -> None:
    plan = small_plan()
    finetuning = FinetunePlan(
        run_sha256=plan.sha256,
        pretrained_sha256="0" * 64,
        local=LocalFinetuning(task="classification", classes=2, encoder="frozen", steps=5),
        rounds=2,
        target="sex",
        target_values=("F", "M"),
        privacy=FinetunePrivacy(epsilon=3.0, clip_norm=0.5, sampling_rate=0.1, expected_patients=1200),
    )
    published = PublishedPlan(plan=plan, bundle_sha256=running_bundle(), finetuning=with_noise(finetuning))
    text = " ".join(sentence for _, sentence in plan_words(published))
    for said in (
        "about 10% of your patients with labels, drawn in secret, take part, each cut to a length of 0.5",
        "1,200 as number of patients, which the plan says of every site",
        "to 3.000 at delta 1e-05 for the whole fine-tuning",
        "of which there are 5 and in each of which she is with a chance of 0.1",
        "epsilon_ceiling",
        "In all: rounds of fine-tuning: 2.",
    ):
        assert said in text
    for unsaid in ("None is added anywhere", "losses and seconds", "anonymous", "compliant"):
        assert unsaid not in text


def test_the_words_of_level_adapters_say_what_its_steps_are_for_and_what_they_leave_as_it_is() -> None:
    noisy = NoisySteps(steps=4, steps_per_round=2, sampling_rate=0.25, clip_norm=1.0, epsilon_style=1.0)
    plan = protected_plan(public_latents(), level="adapters", epsilon=3.0, noisy=noisy)
    text, config = words_of(plan), plan.network
    values = (config.decoder_width + 1) * config.latent_channels * config.patch_size**3
    for said in (
        "train the output layer alone (level adapters)",
        "They improve reconstructions and swaps of style, as far as noise lets them",
        "change nothing that is read from content",
        f"by how much {values:,} weights changed in 2 steps",
        "In all: style code: 1, rounds of noisy steps: 2.",
    ):
        assert said in text
