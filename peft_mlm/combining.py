"""Several adapters -> one, in the space of what they add to the weights.

Each adapter i changes a weight by D_i = s_i B_i A_i. Combined is Σ w_i D_i (task arithmetic, Ilharco et al. 2023,
https://arxiv.org/abs/2212.04089; a negative weight takes away what an adapter has learned), or a sum of the D_i made
sparse first (`sparse_changes.py`). PEFT's `linear` sums the matrices A and B each for itself, and gives cross terms
√(w_i w_j) B_i A_j that nobody trained.

TIES is the paper's procedure applied to w_i D_i with λ = 1: with equal weights w it is the paper's result for λ = w.
Its trimming, as that of magnitude pruning, ranks all entries of an adapter together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import xxhash

from peft_mlm.combination_rules import METHODS, TRAINED_MODULES, Recipe
from peft_mlm.deltas import Change, Parts, plain_config
from peft_mlm.errors import AdapterError
from peft_mlm.low_rank import Loss, join, truncate, truncate_dense
from peft_mlm.sparse_changes import disjoint_mean, drop_and_rescale, magnitude_threshold, trim

# What is combined entry by entry: ("matrix", layer), ("bias", layer) or ("whole", parameter).
Entry = tuple[str, str]
Entries = Mapping[Entry, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Combined:
    """Several adapters in one.

    Attributes:
        parts: What the new adapter holds.
        losses: What was left out of each layer's sum to bring it to its rank.
    """

    parts: Parts
    losses: Mapping[str, Loss]


def combine_parts(
    adapters: Sequence[Parts], recipe: Recipe, base: Mapping[str, torch.Tensor], *, fresh: Iterable[str] = ()
) -> Combined:
    """Combine adapters.

    Args:
        adapters: What they hold; all for one base.
        recipe: How.
        base: Values of the base's parameters by name; those of `needs_base` are enough.
        fresh: Names of parameters that the base does not have of its own.

    Returns:
        A plain LoRA adapter of scaling 1.

    Raises:
        AdapterError: What they hold beside LoRA matrices cannot be combined.
    """
    check_combinable(adapters, recipe, fresh)
    values = _Values(adapters, recipe, base, fresh)
    changes, losses = {}, {}
    for name in _union(parts.changes for parts in adapters):
        changes[name], losses[name] = _combine_layer(name, values)
    whole = {name: _combine_whole(name, values) for name in _union(parts.whole for parts in adapters)}
    rows = {name: _mean_rows(name, adapters, recipe) for name in _union(parts.rows for parts in adapters)}
    parts = Parts({}, changes, whole | _missing_biases(adapters, changes, whole, base), rows)
    return Combined(replace(parts, config=_config(adapters, parts)), losses)


def needs_base(adapters: Sequence[Parts], recipe: Recipe) -> bool:
    """Tell whether combining takes values of the base.

    Args:
        adapters: What they hold.
        recipe: How they are combined.

    Returns:
        True where parameters are put in place of the base's, and combined as differences from it, or some adapters
        have trained biases of their layers and others have not.
    """
    return any(p.whole for p in adapters) and (recipe.trained_modules == "delta" or _bias_option(adapters) != "none")


def check_combinable(adapters: Sequence[Parts], recipe: Recipe, fresh: Iterable[str] = ()) -> None:
    """Refuse adapters whose parts have no sum.

    Args:
        adapters: What they hold.
        recipe: How they are to be combined.
        fresh: Names of parameters that the base does not have of its own.

    Raises:
        AdapterError: A layer is adapted by one and trained in full by another, or of two makes; trained parameters
            have no base to differ from; or token rows are to be taken away.
    """
    layers, whole = _union(p.changes for p in adapters), _union(p.whole for p in adapters)
    both = sorted({name.rpartition(".")[0] for name in whole if not name.endswith(".bias")} & set(layers))
    if both:
        raise AdapterError(
            f"{', '.join(both[:3])}: one adapter changes it by LoRA, another has trained it in full. Combine adapters "
            "that treat a layer alike."
        )
    for name in layers:
        makes = {(len(c.factors.b), c.inputs, c.kind) for p in adapters if (c := p.changes.get(name)) is not None}
        if len(makes) > 1:
            raise AdapterError(f"The adapters have matrices of other sizes for {name}: they are for different bases.")
    _check_fresh(adapters, recipe, set(fresh) & set(whole))
    having = [w for parts, w in zip(adapters, recipe.weights, strict=True) if parts.rows]
    if having and len(adapters) > 1 and (min(having) < 0 or sum(having) <= 0):
        raise AdapterError(
            "Adapters with rows of new tokens have a weight below zero, or all zero: a token's row is averaged, and "
            "there is none without it. Give these adapters weights above zero."
        )


def _check_fresh(adapters: Sequence[Parts], recipe: Recipe, fresh: set[str]) -> None:
    owners = [[p.whole[name] for p in adapters if name in p.whole] for name in sorted(fresh)]
    apart = any(not all(torch.equal(value, values[0]) for value in values) for values in owners)
    if apart and recipe.trained_modules == "delta":
        modules = sorted({name.rpartition(".")[0] for name in fresh})
        choices = ", ".join(f"{name} ({TRAINED_MODULES[name]})" for name in TRAINED_MODULES if name != "delta")
        raise AdapterError(
            f"The base has no {', '.join(modules)} of its own: each adapter has trained them from a start of its own, "
            f"and their differences from the base have no sum. Say what to take by --trained_modules: {choices}."
        )


class _Values:
    """The changes of all adapters, entry by entry, made when they are asked for.

    Args:
        adapters: What they hold.
        recipe: How they are combined.
        base: Values of the base's parameters.
        fresh: Names of parameters that the base does not have of its own.
    """

    def __init__(
        self, adapters: Sequence[Parts], recipe: Recipe, base: Mapping[str, torch.Tensor], fresh: Iterable[str]
    ) -> None:
        self.adapters, self.recipe, self.base, self.fresh = adapters, recipe, base, set(fresh)
        self.method = METHODS[recipe.method]
        self.entries = [self._entries_of(parts) for parts in adapters]
        self.thresholds = [self._threshold_of(entries) for entries in self.entries]

    def mixed(self, entry: Entry) -> torch.Tensor:
        """Combine one entry: the weighted sum, or what a sparse method makes of it; float64."""
        row, density, terms = self.method, self.recipe.density, []
        for parts, entries, threshold, weight in zip(
            self.adapters, self.entries, self.thresholds, self.recipe.weights, strict=True
        ):
            if entry not in entries:
                continue
            change = entries[entry]()
            if row.trims:
                change = trim(change, threshold)
            if row.drops and density is not None:
                change = drop_and_rescale(change, density, f"{self.recipe.seed} {entry} {_digest(parts, entry)}")
            terms.append(weight * change)
        return disjoint_mean(terms) if row.elects else torch.stack(terms).sum(dim=0)

    def _entries_of(self, parts: Parts) -> Entries:
        found: dict[Entry, Callable[[], torch.Tensor]] = {}
        for name, change in parts.changes.items():
            found["matrix", name] = change.factors.dense
            if change.bias is not None:
                found["bias", name] = change.bias.clone
        if self.recipe.trained_modules == "delta":
            for name, value in parts.whole.items():
                if name not in self.fresh:
                    found["whole", name] = partial(_difference, value, self.base[name])
        return found

    def _threshold_of(self, entries: Entries) -> float:
        if not self.method.trims or self.recipe.density is None:
            return 0.0
        return magnitude_threshold(lambda: (make() for make in entries.values()), self.recipe.density)


def _difference(value: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return value.double() - start.double()


def _combine_layer(name: str, values: _Values) -> tuple[Change, Loss]:
    terms = [
        (weight, parts.changes[name])
        for weight, parts in zip(values.recipe.weights, values.adapters, strict=True)
        if name in parts.changes
    ]
    method, rank, like = values.recipe.method, values.recipe.rank, terms[0][1]
    if values.method.low_rank:
        factors = join([(weight, change.factors) for weight, change in terms])
        factors, loss = (factors, Loss(0.0, 0.0)) if method == "cat" else truncate(factors, rank)
    else:
        sum_of_ranks = sum(change.factors.rank for _, change in terms)
        factors, loss = truncate_dense(values.mixed(("matrix", name)), rank or sum_of_ranks)
    bias = None
    if any(change.bias is not None for parts in values.adapters for change in parts.changes.values()):
        # PEFT's `lora_bias` is for all layers or for none
        has_bias = any(change.bias is not None for _, change in terms)
        bias = values.mixed(("bias", name)) if has_bias else torch.zeros(len(like.factors.b), dtype=torch.float64)
    return replace(like, factors=factors, bias=bias), loss


def _combine_whole(name: str, values: _Values) -> torch.Tensor:
    terms = [
        (weight, parts.whole[name].double())
        for weight, parts in zip(values.recipe.weights, values.adapters, strict=True)
        if name in parts.whole
    ]
    how = values.recipe.trained_modules
    if how == "first" or (how == "delta" and name in values.fresh):  # those that are fresh are all the same here
        return terms[0][1]
    if how == "delta":
        return values.base[name].double() + values.mixed(("whole", name))
    total = sum(weight for weight, _ in terms)
    if total == 0:
        raise AdapterError(f"The weights of the adapters that have {name} sum to zero: it has no mean. Change them.")
    return torch.stack([weight * value for weight, value in terms]).sum(dim=0) / total


def _mean_rows(name: str, adapters: Sequence[Parts], recipe: Recipe) -> dict[int, torch.Tensor]:
    """Average the rows of each token over the adapters that have trained it."""
    if len(adapters) == 1:
        return dict(adapters[0].rows[name])
    rows = {}
    for token in sorted({i for parts in adapters for i in parts.rows.get(name, {})}):
        terms = [
            (weight, parts.rows[name][token])
            for weight, parts in zip(recipe.weights, adapters, strict=True)
            if token in parts.rows.get(name, {})
        ]
        total = sum(weight for weight, _ in terms)
        if total == 0:
            raise AdapterError(f"Token {token} is trained by adapters of weight zero alone: leave these adapters out.")
        rows[token] = torch.stack([weight * row for weight, row in terms]).sum(dim=0) / total
    return rows


def _missing_biases(
    adapters: Sequence[Parts],
    changes: Mapping[str, Change],
    whole: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Give the base's own biases of layers that only adapters without trained biases change; PEFT looks for them."""
    if _bias_option(adapters) == "none":
        return {}
    names = [f"{name}.bias" for name in changes]
    return {name: base[name].double() for name in names if name in base and name not in whole}


def _bias_option(adapters: Sequence[Parts]) -> str:
    options = {parts.config.get("bias", "none") for parts in adapters}
    return "all" if "all" in options else "lora_only" if "lora_only" in options else "none"


def _config(adapters: Sequence[Parts], parts: Parts) -> dict[str, Any]:
    configs = [adapter.config for adapter in adapters]
    # Of adapters for the same layers the first one's expression finds exactly these; else all are named.
    alike = all(adapter.changes.keys() == parts.changes.keys() for adapter in adapters)
    return plain_config(
        configs[0],
        parts.changes,
        target_modules=configs[0]["target_modules"] if alike else list(parts.changes),
        bias=_bias_option(adapters),
        modules_to_save=list(dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or ())),
        rows={name: list(by_id) for name, by_id in parts.rows.items()},
    )


def _digest(parts: Parts, entry: Entry) -> str:
    """Tell adapters apart by what they hold, so that their order makes no difference."""
    kind, name = entry
    if kind == "whole":
        tensors = [parts.whole[name]]
    else:
        change = parts.changes[name]
        tensors = [change.factors.a, change.factors.b]
    digest = xxhash.xxh64()
    for tensor in tensors:
        digest.update(tensor.double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _union(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Give all names, in the order in which they are first met."""
    return list(dict.fromkeys(name for group in groups for name in group))
