import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meduet_models.objective.contrast import pool_tokens, restyling_invariance, supervised_contrast


def plain(queries, keys, query_labels, key_labels, temperature, excluded):
    losses = []
    for q, query in enumerate(queries):
        cosine = torch.stack([torch.cosine_similarity(query, key, dim=0) for key in keys]) / temperature
        allowed = [m for m in range(len(keys)) if not excluded[q, m]]
        positives = [m for m in allowed if key_labels[m] == query_labels[q]]
        logs = [torch.logsumexp(cosine[allowed], 0) - cosine[m] for m in positives]
        losses.append(torch.stack(logs).mean() if logs else torch.tensor(0.0))
    return torch.stack(losses).mean()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), labels=st.integers(1, 4), temperature=st.floats(0.05, 1.0))
def test_supervised_contrast_is_its_definition(seed: int, labels: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(6, 5, generator=generator), torch.randn(8, 5, generator=generator)
    query_labels = torch.randint(labels, (6,), generator=generator)
    key_labels = torch.randint(labels, (8,), generator=generator)
    excluded = torch.rand(6, 8, generator=generator) < 0.2
    excluded[:, 0] = False

    loss = supervised_contrast(queries, keys, query_labels, key_labels, temperature, excluded)

    torch.testing.assert_close(
        loss, plain(queries, keys, query_labels, key_labels, temperature, excluded), rtol=1e-4, atol=1e-4
    )


def test_excluded_keys_neither_attract_nor_repel() -> None:
    queries, keys, label = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 0, 1, 1])
    diagonal = torch.eye(4, dtype=torch.bool)
    queries.requires_grad_()
    others = keys.clone()
    others[0] = torch.randn(5)

    before = supervised_contrast(queries, keys, label, label, 0.1, diagonal)
    after = supervised_contrast(queries, others, label, label, 0.1, diagonal)
    (gradient,) = torch.autograd.grad(before, queries)
    (changed,) = torch.autograd.grad(after, queries)

    torch.testing.assert_close(gradient[0], changed[0])  # query 0 does not see key 0
    assert not torch.allclose(gradient[1], changed[1])
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("cold", [0.05, 0.5])
def test_temperature_acts(cold: float) -> None:
    queries, keys, label = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
    loss = [supervised_contrast(queries, keys, label, label, t) for t in (cold, 2 * cold)]
    assert abs(float(loss[0] - loss[1])) > 1e-3


def test_two_scans_of_one_label_do_not_repel() -> None:
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.1]], requires_grad=True)
    keys = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
    same, other = torch.tensor([0, 0]), torch.tensor([0, 1])

    (together,) = torch.autograd.grad(supervised_contrast(queries, keys[:1], same, same[:1], 0.1), queries)
    (apart,) = torch.autograd.grad(supervised_contrast(queries, keys, same, other, 0.1), queries)

    assert torch.equal(together, torch.zeros(2, 2))  # the only key is theirs: nothing to push from
    assert apart.abs().max() > 1e-6


def test_pooling_counts_visible_tokens_alone_and_ignores_their_scale() -> None:
    tokens, visible = torch.randn(2, 6, 4), torch.tensor([[True, True, False, True, False, False]] * 2)
    changed = torch.where(visible.unsqueeze(-1), 3.0 * tokens + 1.0, torch.randn_like(tokens))
    torch.testing.assert_close(
        pool_tokens(changed, visible), pool_tokens(tokens, visible), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(pool_tokens(tokens), pool_tokens(tokens, torch.ones_like(visible)))


def test_invariance_is_least_when_a_restyled_scan_reads_as_the_scan() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4, 6, 8, generator=generator)
    subject = torch.arange(4)

    same = restyling_invariance(clean, clean, subject, 0.1)
    noisy = restyling_invariance(
        clean + 0.5 * torch.randn(clean.shape, generator=generator), clean, subject, 0.1
    )
    others = restyling_invariance(clean.roll(1, 0), clean, subject, 0.1)

    assert same < noisy < others
