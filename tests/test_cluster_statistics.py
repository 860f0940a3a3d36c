"""Standard errors and intervals of ratios of sums: against plain loops, another library, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from peft_mlm import cluster_statistics
from peft_mlm.cluster_statistics import bootstrap_ratios, ratio_standard_error

Floats = npt.NDArray[np.float64]


def clusters(count: int, seed: int = 0, spread: float = 0.5) -> tuple[Floats, Floats]:
    """Sums and sizes of clusters that differ much in size, with a mean of their own each: (count,) both."""
    chance = np.random.default_rng(seed)
    sizes = 1 + chance.poisson(chance.gamma(1.0, 12.0, count))
    means = 2.0 + spread * chance.standard_normal(count)
    return means * sizes + np.sqrt(sizes) * chance.standard_normal(count), sizes.astype(np.float64)


def test_the_standard_error_is_that_of_a_plain_loop_and_does_not_see_empty_clusters() -> None:
    y, x = clusters(40)
    ratio = sum(y) / sum(x)
    squares = sum((one - ratio * size) ** 2 for one, size in zip(y, x, strict=True))
    expected = math.sqrt(40 / 39 * squares) / sum(x)
    assert ratio_standard_error(y, x) == pytest.approx(expected, rel=1e-12)
    assert ratio_standard_error([*y, 0, 0], [*x, 0, 0]) == pytest.approx(expected, rel=1e-12)


def test_with_clusters_of_one_token_it_is_the_usual_one_of_a_mean() -> None:
    y = np.random.default_rng(3).standard_normal(50)
    assert ratio_standard_error(y, np.ones(50)) == pytest.approx(y.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_it_is_the_spread_of_the_ratio_over_resamples_and_over_new_texts() -> None:
    y, x = clusters(400)
    told = ratio_standard_error(y, x)
    resampled = cluster_statistics._resampled(np.column_stack([y, x]), 4000, 1)
    assert (resampled[:, 0] / resampled[:, 1]).std() == pytest.approx(told, rel=0.05)
    anew = [clusters(400, seed) for seed in range(1, 1001)]
    assert np.std([sums.sum() / sizes.sum() for sums, sizes in anew]) == pytest.approx(told, rel=0.1)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_clusters_tell_nothing_about_others(count: int) -> None:
    assert math.isnan(ratio_standard_error([3.0] * count, [2.0] * count))
    (interval,) = bootstrap_ratios(np.full((count, 1), 3.0), [2.0] * count)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.value == pytest.approx(1.5 if count else math.nan, nan_ok=True)


@pytest.mark.parametrize("at_once", [1, 1000, 2**22])
def test_resamples_are_sums_over_as_many_clusters_drawn_with_replacement(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Powers of a base tell how often each cluster was drawn."""
    monkeypatch.setattr(cluster_statistics, "_DRAWN_AT_ONCE", at_once)
    sums = 8.0 ** np.arange(6)[:, None]
    drawn = cluster_statistics._resampled(sums, 3000, 5)[:, 0].astype(np.int64)
    times = np.stack([drawn // 8**place % 8 for place in range(6)])
    assert (times.sum(axis=0) == 6).all()
    assert times.mean(axis=1) == pytest.approx(np.ones(6), abs=0.08)
    assert times.var(axis=1) == pytest.approx(np.full(6, 5 / 6), abs=0.12)


def test_the_same_clusters_and_seed_give_the_same_interval_and_another_seed_another_one() -> None:
    y, x = clusters(60)
    one, other, moved = (bootstrap_ratios(y[:, None], x, seed=seed) for seed in (4, 4, 5))
    assert one == other != moved


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    y, x = clusters(50)
    (given,) = bootstrap_ratios(y[:, None], x, replicates=20_000, level=0.9)
    wanted = stats.bootstrap(
        (y, x),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=0.9,
        n_resamples=20_000,
        method="BCa",
        rng=1,
    )
    width = given.high - given.low
    assert given.low == pytest.approx(wanted.confidence_interval.low, abs=0.03 * width)
    assert given.high == pytest.approx(wanted.confidence_interval.high, abs=0.03 * width)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_200_intervals_hold_the_true_value_as_often_as_they_say(level: float) -> None:
    """Clusters of unequal sizes; the true ratio is 2. Within two standard deviations of the binomial."""
    held = 0
    for seed in range(200):
        y, x = clusters(60, seed=1000 + seed)
        (interval,) = bootstrap_ratios(y[:, None], x, replicates=1000, level=level, seed=seed)
        held += interval.low <= 2.0 <= interval.high
    assert abs(held - 200 * level) <= 2 * math.sqrt(200 * level * (1 - level))


def test_intervals_of_tokens_taken_for_independent_would_be_too_narrow() -> None:
    """Why clusters: the tokens of a text go up and down together."""
    chance = np.random.default_rng(0)
    means = chance.standard_normal(80)
    tokens = means[:, None] + 0.3 * chance.standard_normal((80, 25))
    by_text = ratio_standard_error(tokens.sum(axis=1), np.full(80, 25.0))
    assert by_text > 4 * ratio_standard_error(tokens.ravel(), np.ones(80 * 25))


def test_where_nothing_varies_the_interval_has_no_width() -> None:
    _, x = clusters(30)
    nothing, same = bootstrap_ratios(np.column_stack([np.zeros(30), 2 * x]), x)
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
