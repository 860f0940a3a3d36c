"""Sums of thin products, and what a cut to a rank loses, against dense float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mlm.low_rank import Factors, Loss, add_losses, join, truncate, truncate_dense


def random_factors(m: int, n: int, r: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Factors(draw(r, n), draw(m, r))


@given(m=st.integers(1, 12), n=st.integers(1, 12), ranks=st.lists(st.integers(1, 15), min_size=1, max_size=3),
       rank=st.integers(1, 16), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_cut_of_a_sum_is_the_best_one_of_the_dense_sum_and_its_loss_is_told(
    m: int, n: int, ranks: list[int], rank: int, seed: int
) -> None:
    terms = [(0.5 - i, random_factors(m, n, r, seed + i)) for i, r in enumerate(ranks)]
    dense = sum(w * f.b.numpy() @ f.a.numpy() for w, f in terms)
    joined = join(terms)
    assert joined.rank == sum(ranks)
    np.testing.assert_allclose(joined.dense().numpy(), dense, atol=1e-12)
    u, s, vh = np.linalg.svd(np.asarray(dense), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    for cut, loss in (truncate(joined, rank), truncate_dense(torch.tensor(dense), rank)):
        assert cut.rank == min(rank, sum(ranks), m, n) or cut.rank == min(rank, m, n)
        # where two singular values meet, the best cut is not one alone; its loss is
        lost = np.linalg.norm(cut.dense().numpy() - dense)
        assert lost == pytest.approx(np.linalg.norm(best - dense), abs=1e-9)
        assert loss.lost == pytest.approx(lost, abs=1e-9)
        assert loss.whole == pytest.approx(np.linalg.norm(dense), abs=1e-9)


def test_without_a_rank_the_sum_has_the_rank_that_it_really_has() -> None:
    shared = random_factors(9, 7, 2, 0)
    other = Factors(shared.a, random_factors(9, 7, 2, 1).b)  # the same A, as LoRA-FA leaves it
    joined = join([(0.5, shared), (0.5, other)])
    cut, loss = truncate(joined, None)
    assert (joined.rank, cut.rank) == (4, 2)
    assert loss.share < 1e-12
    assert torch.allclose(cut.dense(), joined.dense(), atol=1e-12)
    nothing, loss = truncate(join([(1.0, shared), (-1.0, shared)]), None)
    assert nothing.rank == 1
    assert nothing.dense().abs().max() < 1e-12


def test_losses_add_up_as_those_of_one_matrix() -> None:
    total = add_losses([Loss(3.0, 5.0), Loss(4.0, 12.0)])
    assert (total.lost, total.whole, total.share) == (5.0, 13.0, pytest.approx(5 / 13))
    assert add_losses([]).share == 0
