"""Spearman's rank correlation against scipy's."""

from __future__ import annotations

import math
import random

import pytest
import scipy.stats

from peft_mlm.rank_correlation import ranks, spearman


@pytest.mark.parametrize("values", [1000, 5, 2])
def test_it_is_scipys_with_and_without_ties(values: int) -> None:
    draw = random.Random(values)
    for count in (2, 3, 10, 200):
        one = [float(draw.randrange(values)) for _ in range(count)]
        other = [x + draw.randrange(values) for x in one]
        if len(set(one)) < 2 or len(set(other)) < 2:
            continue
        found = spearman(one, other)
        assert found.rho == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-12)
        assert ranks(one).tolist() == scipy.stats.rankdata(one).tolist()
        assert found.pairs == count
        assert found.tied == tuple(sum(xs.count(x) > 1 for x in xs) for xs in (one, other))


def test_pairs_with_a_missing_number_are_left_out_and_infinite_ones_are_ranked() -> None:
    found = spearman([1.0, 2.0, math.nan, -math.inf, 4.0], [2.0, math.nan, 3.0, 1.0, 9.0])
    assert found == (1.0, 3, (0, 0))


@pytest.mark.parametrize(("one", "other"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_without_two_different_numbers_on_each_side_there_is_none(one: list[float], other: list[float]) -> None:
    assert math.isnan(spearman(one, other).rho)
