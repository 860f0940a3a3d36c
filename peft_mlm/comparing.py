"""Two models on the same masked tokens: what the second one does better, where, and how sure that is.

Pairing takes out what is hard or easy about a text: both models see it. All differences are those of the second model
less those of the first (the reference); a lower loss is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_mlm.cluster_statistics import LEVEL, REPLICATES, SEED
from peft_mlm.metrics import MaskedScores, MaskedTokens, describe_change

# Losses that differ by no more count as equal, in nats: what rounding does to a float32 model in another batch.
TIE = 1e-5


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        replicates: How often clusters are drawn.
        level: Share of such intervals that hold the true value.
        seed: Of the draws.
    """

    replicates: int = REPLICATES
    level: float = LEVEL
    seed: int = SEED


@dataclass
class TokenLosses:
    """The loss of each masked token, in the order of evaluation: 8 bytes a token.

    Attributes:
        targets: The right tokens, batch by batch.
        losses: Their losses in nats, likewise.
    """

    targets: list[npt.NDArray[np.int32]] = field(default_factory=list)
    losses: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def keep(self, tokens: MaskedTokens) -> None:
        """Keep the masked tokens of a batch."""
        self.targets.append(tokens.targets.astype(np.int32))
        self.losses.append(tokens.losses.astype(np.float32))

    def arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Give all tokens and losses, (n,) each."""
        none = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return np.concatenate([none[0], *self.targets]), np.concatenate([none[1], *self.losses])


@dataclass(frozen=True)
class Measured:
    """A model on a data set.

    Attributes:
        scores: Sums by cluster.
        targets: The right token of each masked position, (n,).
        losses: Its loss in nats, (n,).
    """

    scores: MaskedScores
    targets: npt.NDArray[np.int32]
    losses: npt.NDArray[np.float32]


def measured(measure: Callable[[Callable[[MaskedTokens], None]], MaskedScores]) -> Measured:
    """Measure a model, and keep the loss of each masked token.

    Args:
        measure: Measures it, and hands on the tokens of each batch.

    Returns:
        Its scores and losses.
    """
    kept = TokenLosses()
    return Measured(measure(kept.keep), *kept.arrays())


def same_tokens(one: Measured, other: Measured) -> bool:
    """Tell whether two models were measured on the same masked tokens of the same clusters."""
    return np.array_equal(one.targets, other.targets) and np.array_equal(one.scores.counts, other.scores.counts)


def describe_paired(reference: Measured, other: Measured, resampling: Resampling) -> dict[str, Any]:
    """Compare a model with the reference, figure by figure.

    Args:
        reference: The first model.
        other: The second one, on the same masked tokens.
        resampling: How intervals are made.

    Returns:
        `loss` and `accuracy` (each `difference`, `low`, `high`, `level`), and `win_rate`: the share of `clusters` and
        of `masked_tokens` on which the second model has the lower loss, ties counted half.
    """
    before, after = reference.scores, other.scores
    counted = before.counts > 0
    by_cluster = (after.losses - before.losses)[counted] / before.counts[counted]
    by_token = other.losses.astype(np.float64) - reference.losses
    return {
        **describe_change(before, after, **vars(resampling)),
        "win_rate": {"clusters": win_rate(by_cluster), "masked_tokens": win_rate(by_token)},
    }


def win_rate(differences: npt.NDArray[np.float64]) -> float:
    """Give the share of the differences below zero, those of at most `TIE` counted half; nan for none."""
    if len(differences) == 0:
        return float("nan")
    won, tied = np.count_nonzero(differences < -TIE), np.count_nonzero(np.abs(differences) <= TIE)
    return (won + tied / 2) / len(differences)


def tokens_that_changed(
    reference: Measured,
    other: Measured,
    name_of: Callable[[Sequence[int]], Sequence[str]],
    *,
    most: int,
    least_count: int,
) -> dict[str, list[dict[str, Any]]]:
    """Find the tokens of the vocabulary whose loss fell and rose most.

    Args:
        reference: The first model.
        other: The second one, on the same masked tokens.
        name_of: Gives the tokens of ids.
        most: How many tokens to give of each.
        least_count: Tokens that were masked less often are passed over: their mean is chance.

    Returns:
        `gained` (the loss fell) and `lost`: lists of `token`, `token_id`, `count`, and `difference`, the mean change
        of its losses in nats; the largest first.
    """
    by_token = other.losses.astype(np.float64) - reference.losses
    counts = np.bincount(other.targets)
    ids = np.flatnonzero(counts >= least_count)
    means = np.bincount(other.targets, by_token)[ids] / counts[ids]
    ascending = np.argsort(means, kind="stable")
    gained = [place for place in ascending if means[place] < -TIE][:most]
    lost = [place for place in np.argsort(-means, kind="stable") if means[place] > TIE][:most]

    def listed(places: list[np.intp]) -> list[dict[str, Any]]:
        names = name_of([int(ids[place]) for place in places])
        return [
            {
                "token": name,
                "token_id": int(ids[place]),
                "count": int(counts[ids[place]]),
                "difference": float(means[place]),
            }
            for name, place in zip(names, places, strict=True)
        ]

    return {"gained": listed(gained), "lost": listed(lost)}
