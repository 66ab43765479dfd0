import pytest
import torch

from meduet_models.meduet import MeDUET
from meduet_models.objective.teacher import Teacher, momentum_at
from tests.worlds import small_network

TINY = small_network(latent_grid=(4, 4, 4), style_map_grid=(1, 2, 1))


def moved(student: MeDUET) -> MeDUET:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn_like(parameter)
    return student


def test_momentum_goes_from_first_to_last_along_a_cosine() -> None:
    values = [momentum_at(share, 0.99, 0.9997) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values[0] == pytest.approx(0.99)
    assert values[2] == pytest.approx((0.99 + 0.9997) / 2)
    assert values[4] == pytest.approx(0.9997)
    assert values == sorted(values)
    assert values[1] - values[0] < values[2] - values[1]  # slow at the ends


def test_a_new_teacher_is_an_exact_copy_without_classifiers_or_gradient() -> None:
    student = MeDUET(TINY, 3, seed=5)
    teacher = Teacher(student)
    latents = torch.randn(2, 2, 4, 4, 4)

    assert torch.equal(teacher.network.encode(latents).content, student.encode(latents).content)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("site_from" in name for name in teacher.state_dict())


def test_an_update_moves_weights_the_stated_share_and_copies_constants() -> None:
    teacher = Teacher(MeDUET(TINY, 3))
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    student = moved(MeDUET(TINY, 3))
    student.set_latent_scale(torch.randn(2, 4, 4, 4), torch.tensor([2.0, 3.0]))

    teacher.update(student, 0.9)

    theirs = student.state_dict()
    for name, value in teacher.network.state_dict().items():
        share = 1.0 if name in MeDUET.CONSTANTS else 0.1
        torch.testing.assert_close(value, before[name] + share * (theirs[name] - before[name]))


def test_momentum_one_holds_still_and_reset_copies() -> None:
    teacher, student = Teacher(MeDUET(TINY, 3)), moved(MeDUET(TINY, 3))
    before = teacher.network.embed.weight.clone()
    teacher.update(student, 1.0)
    assert torch.equal(teacher.network.embed.weight, before)
    teacher.reset(student)
    assert torch.equal(teacher.network.embed.weight, student.embed.weight)


def test_a_teacher_restored_from_its_state_is_the_same() -> None:
    teacher = Teacher(MeDUET(TINY, 3))
    teacher.update(moved(MeDUET(TINY, 3)), 0.5)
    restored = Teacher(MeDUET(TINY, 3, seed=9))
    restored.load_state_dict(teacher.state_dict())
    latents = torch.randn(2, 2, 4, 4, 4)
    assert torch.equal(restored.network.encode(latents).style, teacher.network.encode(latents).style)
