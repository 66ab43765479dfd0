from client.commands.plan_words import plan_words
from federation.bundle import running_bundle
from federation.published_plan import PublishedPlan
from tests.worlds import protected_plan, public_latents


def test_the_words_of_a_plan_with_privacy_say_what_leaves_once_and_what_it_costs() -> None:
    plan = protected_plan(public_latents(), epsilon=1.0)
    words = plan_words(PublishedPlan(plan=plan, bundle_sha256=running_bundle(), finetuning=None))
    text = " ".join(sentence for _, sentence in words)
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
