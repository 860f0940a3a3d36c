"""How adapters are combined: the methods, what each takes, and what is refused before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft_mlm.errors import ArgumentsError

TrainedModules = Literal["delta", "average", "first"]
TRAINED_MODULES: dict[TrainedModules, str] = {
    "delta": "base + weighted sum of the differences from the base",
    "average": "weighted mean of the adapters that have them",
    "first": "those of the first adapter that has them",
}


@dataclass(frozen=True)
class Method:
    """One way to combine changes of weights.

    Attributes:
        about: What it does, in a few words.
        low_rank: Whether it sums the changes as they are, so that the sum is a product of thin factors.
        trims: Whether only the largest entries of each adapter are kept.
        drops: Whether entries are dropped at random and the others scaled up.
        elects: Whether each entry's sign is elected, and those that have it averaged; else entries are summed.
        density: Share of the entries kept, by default; None where all are.
    """

    about: str
    low_rank: bool = False
    trims: bool = False
    drops: bool = False
    elects: bool = False
    density: float | None = None


METHODS: dict[str, Method] = {
    "cat": Method("exact sum; the ranks add up", low_rank=True),
    "svd": Method("the sum's best approximation of a rank", low_rank=True),
    "linear": Method("exact sum, of no higher rank than it has", low_rank=True),
    "ties": Method("TIES: trim, elect signs, average what agrees", trims=True, elects=True, density=0.2),
    "dare_linear": Method("DARE: drop at random, rescale, sum", drops=True, density=0.5),
    "dare_ties": Method("DARE, then elect signs, average what agrees", drops=True, elects=True, density=0.5),
    "magnitude_prune": Method("keep the largest entries of each, sum", trims=True, density=0.2),
}
SAME_AS = {"add": "linear", "ties_svd": "ties", "dare_linear_svd": "dare_linear", "dare_ties_svd": "dare_ties"}


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        method: A name of `METHODS`.
        weights: One number for each adapter; a negative one takes what it has learned away.
        rank: Rank of each layer of the result; None for what the method gives.
        density: Share of the entries kept, where the method makes changes sparse.
        seed: Decides which entries DARE drops.
        trained_modules: What becomes of modules that were trained in full, a name of `TRAINED_MODULES`.
    """

    method: str
    weights: tuple[float, ...]
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    trained_modules: TrainedModules = "delta"


def make_recipe(
    count: int,
    *,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    trained_modules: str = "delta",
) -> Recipe:
    """Check how adapters are to be combined, and fill in what is not given.

    Args:
        count: How many adapters there are.
        method: A name of `METHODS`; "svd" where a rank is given, else "cat".
        weights: One for each adapter; by default 1 / count, or 1 for methods that average by themselves.
        rank: Rank of the result.
        density: Share of the entries that a sparse method keeps.
        seed: For what is drawn at random.
        trained_modules: A name of `TRAINED_MODULES`.

    Returns:
        The whole recipe.

    Raises:
        ArgumentsError: Something is unknown, out of range, or does not go together.
    """
    name = method or ("cat" if rank is None else "svd")
    if name not in METHODS:
        same = f" ({name} of PEFT: {SAME_AS[name]})" if name in SAME_AS else ""
        raise ArgumentsError(f"method is {name!r}: choose {', '.join(METHODS)}{same}.")
    row, faults = METHODS[name], []
    if weights is None:
        weights = [1.0 if row.elects else 1 / count] * count
    if len(weights) != count:
        faults.append(f"weights has {len(weights)} numbers for {count} adapters: give one for each, in their order.")
    if not all(math.isfinite(weight) for weight in weights):
        faults.append(f"weights are {', '.join(map(str, weights))}: they must be finite numbers.")
    if rank is not None and rank < 1:
        faults.append(f"rank is {rank}: it must be 1 or more.")
    if rank is not None and name in ("cat", "linear"):
        faults.append(f"method {name} keeps the whole sum and takes no rank: use --method svd with --rank {rank}.")
    if rank is None and name == "svd":
        faults.append("method svd needs --rank.")
    if density is not None and row.density is None:
        takers = ", ".join(taker for taker, other in METHODS.items() if other.density is not None)
        faults.append(f"method {name} keeps all entries and takes no density; these take one: {takers}.")
    if density is not None and not 0 < density <= 1:
        faults.append(f"density is {density}: the share of the entries to keep is above 0 and at most 1.")
    if trained_modules not in TRAINED_MODULES:
        faults.append(f"trained_modules is {trained_modules!r}: choose {', '.join(TRAINED_MODULES)}.")
    if faults:
        raise ArgumentsError(faults)
    chosen: TrainedModules = next(known for known in TRAINED_MODULES if known == trained_modules)
    return Recipe(name, tuple(map(float, weights)), rank, density or row.density, seed, chosen)


def read_weights(text: str | None) -> tuple[float, ...] | None:
    """Read weights as a command line has them.

    Args:
        text: Numbers separated by commas, such as `0.5,0.3,-0.2`; None for none.

    Returns:
        The numbers.

    Raises:
        ArgumentsError: One of them is no number.
    """
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ArgumentsError(f"weights is {text!r}: give numbers separated by commas, such as 0.7,0.3.") from error
