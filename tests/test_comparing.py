"""Paired figures against plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from peft_mlm.comparing import (
    TIE,
    Measured,
    Resampling,
    describe_paired,
    measured,
    same_tokens,
    tokens_that_changed,
    win_rate,
)
from peft_mlm.metrics import MaskedScores, MaskedTokens


def batches(seed: int, shift: float = 0.0) -> list[MaskedTokens]:
    """Masked tokens of 20 rows in batches of 4, the loss of even tokens lower by a shift."""
    chance, made = np.random.default_rng(seed), []
    sizes = np.random.default_rng(9).integers(0, 9, 20)
    tokens = np.random.default_rng(8)
    for start in range(0, 20, 4):
        clusters = np.repeat(np.arange(4), sizes[start : start + 4])
        targets = tokens.integers(5, 12, len(clusters))
        losses = chance.exponential(2.0, len(clusters)) - shift * (targets % 2 == 0)
        hits = (losses < 0.7).astype(np.float64)
        made.append(MaskedTokens(targets, losses, hits, hits, clusters))
    return made


def model(seed: int, shift: float = 0.0) -> Measured:
    def measure(keep: Any) -> MaskedScores:
        parts = []
        for tokens in batches(seed, shift):
            keep(tokens)
            parts.append(tokens.sums(4))
        return MaskedScores(np.concatenate(parts))

    return measured(measure)


def test_differences_and_win_rates_are_those_of_a_plain_loop() -> None:
    reference, other = model(1), model(2, shift=0.5)
    record = describe_paired(reference, other, Resampling(replicates=300))
    before, after = batches(1), batches(2, shift=0.5)
    pairs, rows = [], []
    for one, two in zip(before, after, strict=True):
        for row in range(4):
            own = [
                (float(a), float(b))
                for a, b, cluster in zip(one.losses, two.losses, one.clusters, strict=True)
                if cluster == row
            ]
            pairs += own
            if own:
                rows.append(sum(b - a for a, b in own))
    assert record["loss"]["difference"] == pytest.approx(sum(b - a for a, b in pairs) / len(pairs), rel=1e-9)
    wins = sum(b < a for a, b in pairs) / len(pairs)
    assert record["win_rate"]["masked_tokens"] == pytest.approx(wins)
    assert record["win_rate"]["clusters"] == pytest.approx(sum(row < 0 for row in rows) / len(rows))
    hits = sum(float(two.hits.sum() - one.hits.sum()) for one, two in zip(before, after, strict=True))
    assert record["accuracy"]["difference"] == pytest.approx(hits / len(pairs))
    for name in ("loss", "accuracy"):
        assert record[name]["low"] < record[name]["difference"] < record[name]["high"]
        assert record[name]["level"] == 0.95


def test_pairing_makes_the_interval_narrower_than_the_figures_alone_would() -> None:
    """A text is hard or easy for both models."""
    chance = np.random.default_rng(0)
    counts = chance.integers(1, 30, 60).astype(np.float64)
    hard = chance.normal(3, 1, 60) * counts
    sums = np.stack([hard, 0 * hard, 0 * hard, counts], axis=1)
    better = sums.copy()
    better[:, 0] -= counts * chance.normal(0.1, 0.05, 60)
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    first, second = Measured(MaskedScores(sums), *none), Measured(MaskedScores(better), *none)
    loss = describe_paired(first, second, Resampling())["loss"]
    assert loss["high"] < 0
    assert loss["high"] - loss["low"] < 0.2 * first.scores.describe()["loss_standard_error"]


def test_a_model_against_itself_differs_by_nothing_and_wins_half() -> None:
    record = describe_paired(model(3), model(3), Resampling())
    nothing = {"difference": 0.0, "low": 0.0, "high": 0.0, "level": 0.95}
    assert (record["loss"], record["accuracy"]) == (nothing, nothing)
    assert record["win_rate"] == {"clusters": 0.5, "masked_tokens": 0.5}


def test_ties_count_half_and_no_difference_at_all_is_no_rate() -> None:
    assert win_rate(np.array([-1.0, -TIE / 2, TIE, 2.0])) == 0.5
    assert win_rate(np.array([-1.0, -1.0, 0.0, 2.0])) == 0.625
    assert math.isnan(win_rate(np.array([])))


def test_the_tokens_that_changed_are_those_of_a_plain_loop() -> None:
    reference, other = model(1), model(2, shift=0.5)
    by_token: dict[int, list[float]] = {}
    for token, before, after in zip(reference.targets, reference.losses, other.losses, strict=True):
        by_token.setdefault(int(token), []).append(float(after) - float(before))
    least = sorted(map(len, by_token.values()))[1]  # one token is too rare
    means = {token: sum(all_) / len(all_) for token, all_ in by_token.items() if len(all_) >= least}
    assert len(means) == len(by_token) - 1
    found = tokens_that_changed(reference, other, lambda ids: [f"t{i}" for i in ids], most=2, least_count=least)
    gained = sorted((mean, token) for token, mean in means.items() if mean < 0)[:2]
    lost = sorted((-mean, token) for token, mean in means.items() if mean > 0)[:2]
    assert [(one["token_id"], one["token"]) for one in found["gained"]] == [(t, f"t{t}") for _, t in gained]
    assert [(one["token_id"], one["token"]) for one in found["lost"]] == [(t, f"t{t}") for _, t in lost]
    for one in (*found["gained"], *found["lost"]):
        assert one["difference"] == pytest.approx(means[one["token_id"]], rel=1e-9)
        assert one["count"] == len(by_token[one["token_id"]])


def test_other_tokens_or_clusters_are_told_apart() -> None:
    one = model(1)
    assert same_tokens(one, model(2))
    assert not same_tokens(one, Measured(one.scores, one.targets + 1, one.losses))
    assert not same_tokens(one, Measured(MaskedScores(one.scores.sums[::-1]), one.targets, one.losses))
