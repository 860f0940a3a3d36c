"""TIES and DARE against a plain reading of their papers, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mlm.sparse_changes import disjoint_mean, drop_and_rescale, magnitude_threshold, trim


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    density=st.floats(0.001, 1),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)
@settings(max_examples=60, deadline=None)
def test_exactly_the_largest_entries_of_all_tensors_together_are_kept(
    sizes: list[int], density: float, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) * scale for size in sizes]
    threshold = magnitude_threshold(lambda: iter(tensors), density)
    everything = torch.cat([trim(tensor, threshold) for tensor in tensors])
    whole = torch.cat(tensors)
    kept = max(1, round(density * sum(sizes)))
    order = whole.abs().argsort(descending=True)
    expected = torch.zeros_like(whole)
    expected[order[:kept]] = whole[order[:kept]]
    assert torch.equal(everything, expected)


def test_a_threshold_of_nothing_or_of_zeros_is_zero() -> None:
    assert magnitude_threshold(lambda: iter([]), 0.5) == 0
    assert magnitude_threshold(lambda: iter([torch.zeros(5)]), 0.5) == 0


def ties_by_the_paper(task_vectors: np.ndarray) -> np.ndarray:
    """Elect and disjoint merge, entry by entry, as in Yadav et al. 2023, section 4; trimming is done before."""
    merged = np.zeros(task_vectors.shape[1])
    for p in range(task_vectors.shape[1]):
        column = task_vectors[:, p]
        elected = np.sign(column.sum())
        agreeing = [value for value in column if np.sign(value) == elected and value != 0]
        merged[p] = np.mean(agreeing) if elected != 0 and agreeing else 0.0
    return merged


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_the_disjoint_mean_is_that_of_the_paper(seed: int, count: int) -> None:
    chance = np.random.default_rng(seed)
    vectors = np.where(chance.random((count, 30)) < 0.5, 0, chance.integers(-3, 4, (count, 30)).astype(float))
    given_back = disjoint_mean([torch.tensor(vector) for vector in vectors]).numpy()
    np.testing.assert_allclose(given_back, ties_by_the_paper(vectors), atol=1e-12)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_drops_its_share_scales_the_others_up_and_keeps_the_expectation(density: float) -> None:
    change = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dropped = drop_and_rescale(change, density, "0 a")
    kept = dropped != 0
    assert float(kept.double().mean()) == pytest.approx(density, abs=0.01)
    assert torch.allclose(dropped[kept], change[kept] / density)
    several = torch.stack([drop_and_rescale(change, density, f"{seed} a") for seed in range(200)]).mean(dim=0)
    spread = float((change.square().mean() * (1 - density) / density / 200).sqrt())
    assert float((several - change).square().mean().sqrt()) == pytest.approx(spread, rel=0.05)


def test_dare_drops_the_same_entries_for_the_same_seed_alone() -> None:
    change = torch.ones(1000, dtype=torch.float64)
    one, again, other = (drop_and_rescale(change, 0.5, seed) for seed in ("1", "1", "2"))
    assert torch.equal(one, again)
    assert 0.4 < float((one == other).double().mean()) < 0.6
    assert torch.equal(drop_and_rescale(change, 1.0, "1"), change)
