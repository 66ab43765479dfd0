"""A stream of draws is fixed by its words: the recorded seeds are those of every run so far."""

import torch

from client.latents.batches import step_generator
from client.scans.cohort import split_of
from client.secrets.site_secret import seed_of as keyed_seed_of
from meduet_models.diffusion import draws
from meduet_models.seeds import digest_of, generator_of, seed_of
from scans.volumes import View, draw_view
from server.tokenizer.training import draw_recipes
from simulations.consortium import simulated_secret

SECRET = bytes(range(32))


def test_every_purpose_draws_from_the_seed_that_it_always_had() -> None:
    assert draws.generator_of("sample", 7, 3).initial_seed() == 7184355139409579913
    assert draws.generator_of("validation", 0, 1, 12).initial_seed() == 1744568354852196839
    assert draws.generator_of("projector", -3).initial_seed() == 7647816340480551919
    assert generator_of("fedmeduet finetuning", 7, 1, 20).initial_seed() == 110164766304288649
    assert seed_of("fedmeduet evaluation samples", 3, "content, own style") == 4901946482536678464
    assert keyed_seed_of(bytes(32), "diffusion", 5) == 1387854397986116215
    assert step_generator(SECRET, 7, 3, 2).initial_seed() == keyed_seed_of(SECRET, "step", 7, 3, 2)


def test_views_splits_phantoms_and_simulated_secrets_are_those_of_earlier_runs() -> None:
    turns = (-6.858679950533416, -1.8760421187888863, -3.8426840902469905)
    assert draw_view("a1", 1) == View(False, turns, 1.0538308503388045)
    splits = [split_of(f"patient {n}", (0.4, 0.3, 0.3), "seed 3")[1] for n in range(16)]
    assert "".join(splits) == "erearererraeraea"  # tEst, tRain, vAlidation
    assert simulated_secret(7, "north").hex().startswith("1f4dd68db28075f2f72bfb50")
    assert [recipe.seed for recipe in draw_recipes(5, "held out", 1)] == [2928986383754125458]


def test_a_digest_is_of_the_words_and_of_what_stands_between_them() -> None:
    assert digest_of("a", 1, separator="/") == digest_of("a/1") != digest_of("a", 1)


def test_other_words_give_other_streams_and_no_global_generator_moves() -> None:
    before = torch.get_rng_state()
    words = [("x", 1, 12), ("x", 11, 2), ("x", 1), ("y", 1, 12)]
    first = {int(torch.randint(2**62, (), generator=generator_of(*one))) for one in words}
    again = {int(torch.randint(2**62, (), generator=generator_of(*one))) for one in reversed(words)}
    assert first == again and len(first) == 4
    assert all(0 <= seed_of(*one) < 2**63 for one in words)
    assert torch.equal(before, torch.get_rng_state())
