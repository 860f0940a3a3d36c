"""The head computed where tokens are masked, and nowhere else.

85 of 100 rows of the vocabulary projection are thrown away: the loss reads masked positions only. The *door* is the
first module after the encoder that receives its last hidden state, (B, T, H). A hook there hands on the N masked rows
as (1, N, H), so that head and cross-entropy run on them alone; all of a head works row by row, so nothing else changes.
Where a model has no such door, or gives other logits through it, it is run whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.probing import evaluating, probe_inputs

# Logits beyond this are computed in pieces, each thrown away and computed again for its gradient.
LOGITS_BYTES = 2**28

RowFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def find_door(model: PreTrainedModel | PeftModel) -> str | None:
    """Find the module where the masked rows can be picked, and prove it on a short probe.

    Args:
        model: A masked LM, with or without an adapter.

    Returns:
        The module's full name within the base model, or None where the model has to be run whole.
    """
    base = base_of(model)
    if base.base_model is base:
        return None
    seen: dict[str, Any] = {}
    handles = [base.base_model.register_forward_hook(lambda module, args, output: seen.update(output=output))]
    within = {id(module) for module in base.base_model.modules()}
    outside = [
        (name, module) for name, module in base.named_modules() if module is not base and id(module) not in within
    ]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if "door" not in seen and "output" in seen and args and args[0] is seen["output"][0]:
                seen["door"] = name

        return hook

    handles += [module.register_forward_pre_hook(watch(name)) for name, module in outside]
    inputs = probe_inputs(base, rows=2)
    chosen = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    chosen[0, 2], chosen[1, 1], chosen[1, 5] = True, True, True
    with evaluating(model), torch.no_grad():
        try:
            whole = model(**inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        door = seen.get("door")
        return door if door is not None and _gives_the_same(model, door, inputs, chosen, whole) else None


def base_of(model: Any) -> PreTrainedModel:
    """Give the transformers model within its wrappers.

    Args:
        model: A masked LM, perhaps within an adapter and one that synchronises processes.

    Returns:
        The masked LM itself.
    """
    inner = getattr(model, "module", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def sum_over_masked(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    function: RowFunction,
    *,
    door: str | None,
    logits_bytes: int = LOGITS_BYTES,
) -> torch.Tensor:
    """Run a model and sum up a function of the logits at masked positions.

    Args:
        model: A masked LM, wrapped or not.
        inputs: Its inputs, (B, T) each.
        labels: (B, T), `IGNORE_INDEX` off-mask.
        function: Takes logits (n, V) and labels (n) of some masked positions; returns a tensor of fixed shape.
        door: From `find_door`; None runs the head on every position.
        logits_bytes: Largest size of the logits held at a time, in bytes.

    Returns:
        The sum of the function's results; it carries gradients where they are on.
    """
    chosen = labels != IGNORE_INDEX
    targets = labels[chosen]
    if door is None or len(targets) == 0:
        return function(model(**inputs).logits[chosen], targets)
    base = base_of(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    at_once = max(1, logits_bytes // (4 * vocabulary))
    if len(targets) <= at_once:
        with _narrowed(base, door, lambda hidden: hidden[chosen]):
            return function(model(**inputs).logits[0], targets)
    return _in_pieces(model, inputs, chosen, targets, function, door, at_once)


def _in_pieces(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    chosen: torch.Tensor,
    targets: torch.Tensor,
    function: RowFunction,
    door: str,
    at_once: int,
) -> torch.Tensor:
    """Run the encoder once, and the head on pieces of the masked rows."""
    base, kept = base_of(model), {}

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        kept["hidden"] = hidden[chosen]
        # One row for the run to end with, not detached: where several processes train, the wrapper of theirs follows
        # the output's graph to find the parameters that will get no gradient.
        return kept["hidden"][:1]

    handle = base.base_model.register_forward_hook(lambda module, args, output: kept.update(output=output))
    try:
        with _narrowed(base, door, keep):
            model(**inputs)
    finally:
        handle.remove()
    inner = getattr(model, "module", model)

    def piece(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with _encoder_gives(base, kept["output"]), _narrowed(base, door, lambda _: hidden):
            return function(inner(**inputs).logits[0], labels)

    total = None
    for hidden, labels in zip(kept["hidden"].split(at_once), targets.split(at_once), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(piece, hidden, labels, use_reentrant=False)
        else:
            part = piece(hidden, labels)
        total = part if total is None else total + part
    assert total is not None
    return total


@contextlib.contextmanager
def _narrowed(base: PreTrainedModel, door: str, pick: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (pick(args[0]).unsqueeze(0), *args[1:])

    handle = base.get_submodule(door).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _encoder_gives(base: PreTrainedModel, output: Any) -> Iterator[None]:
    """Let the encoder hand out what it gave before instead of running again."""
    encoder = base.base_model
    before = encoder.__dict__.get("forward")
    encoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del encoder.forward
        else:
            encoder.forward = before


def _gives_the_same(
    model: nn.Module, door: str, inputs: Mapping[str, torch.Tensor], chosen: torch.Tensor, whole: torch.Tensor
) -> bool:
    with _narrowed(base_of(model), door, lambda hidden: hidden[chosen]):
        try:
            rows = model(**inputs).logits
        except (RuntimeError, ValueError, IndexError):  # a head that wants the whole row
            return False
    expected = whole[chosen]
    if rows.shape != (1, *expected.shape):
        return False
    allowed = 100 * torch.finfo(expected.dtype).eps * max(1.0, float(expected.abs().max()))
    return bool((rows[0] - expected).abs().max() <= allowed)
