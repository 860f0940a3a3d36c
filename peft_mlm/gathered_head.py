"""The head, and the end of the encoder, computed where tokens are masked, and nowhere else.

85 of 100 rows of the vocabulary projection are thrown away: the loss reads masked positions only. The *door* is the
first module after the encoder that receives its last hidden state, (B, T, H). A hook there hands on the N masked rows
as (1, N, H), so that head and cross-entropy run on them alone; all of a head works row by row, so nothing else changes.
So does what follows the attention of the last layer: where a module there gives the hidden state that all the rest is
computed from, its rows are picked already. Where a model gives other logits through a door, it is run without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.document_attention import documents_apart
from peft_mlm.heads import encoder_layers
from peft_mlm.probing import evaluating, probe_inputs

# Logits beyond this are computed in pieces, each thrown away and computed again for its gradient.
LOGITS_BYTES = 2**28

RowFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Door(NamedTuple):
    """Where the masked rows are picked.

    Attributes:
        head: Name of the module that receives the encoder's last hidden state, within the base model.
        last_layer: Name of the module of the last layer after which all works row by row; None if there is none.
    """

    head: str
    last_layer: str | None = None


def find_door(model: PreTrainedModel | PeftModel) -> Door | None:
    """Find the modules where the masked rows can be picked, and prove it on a short probe.

    Args:
        model: A masked LM, with or without an adapter.

    Returns:
        The door, or None where the model has to be run whole.
    """
    base = base_of(model)
    if base.base_model is base:
        return None
    # An odd length: some types (Longformer) pad rows to a multiple of their window, and cut them again at the end.
    inputs = {name: tensor[:, :-1] for name, tensor in probe_inputs(base, rows=2).items()}
    # Fewer rows than a row has tokens, and more: code behind the door may cut at the length of a row (LUKE's does).
    few = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    few[0, 2], few[1, 1], few[1, 5] = True, True, True
    picks = (few, ~few)
    with evaluating(model), torch.no_grad():
        head, whole = _receiver_of_hidden_state(model, inputs)
        if head is None or not _gives_the_same(model, Door(head), inputs, picks, whole):
            return None
        for name in _parts_of_last_layer(base):
            door = Door(head, name)
            if _gives_the_same(model, door, inputs, picks, whole):
                return door
    return Door(head)


def _receiver_of_hidden_state(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[str | None, torch.Tensor]:
    """Name the first module after the encoder that gets its last hidden state, and give the logits."""
    base = base_of(model)
    seen: dict[str, Any] = {}
    within = {id(module) for module in base.base_model.modules()}
    outside = [(name, one) for name, one in base.named_modules() if one is not base and id(one) not in within]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if "door" not in seen and "output" in seen and args and args[0] is seen["output"][0]:
                seen["door"] = name

        return hook

    handles = [base.base_model.register_forward_hook(lambda module, args, output: seen.update(output=output))]
    handles += [module.register_forward_pre_hook(watch(name)) for name, module in outside]
    try:
        logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen.get("door"), logits


def _parts_of_last_layer(base: PreTrainedModel) -> list[str]:
    """Name the parts of the encoder's last layer, in the order in which they are written down."""
    layers = list(encoder_layers(base).items())
    if not layers:
        return []
    name, last = layers[-1]
    never = (nn.Dropout, nn.ModuleList)
    return [f"{name}.{part}" for part, module in last.named_children() if not isinstance(module, never)]


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
    door: Door | None,
    logits_bytes: int = LOGITS_BYTES,
) -> torch.Tensor:
    """Run a model and sum up a function of the logits at masked positions.

    Args:
        model: A masked LM, wrapped or not.
        inputs: Its inputs, (B, T) each; `document_ids` where rows hold documents side by side.
        labels: (B, T), `IGNORE_INDEX` off-mask.
        function: Takes logits (n, V) and labels (n) of some masked positions; returns a tensor of fixed shape.
        door: From `find_door`; None runs the head on every position.
        logits_bytes: Largest size of the logits held at a time, in bytes.

    Returns:
        The sum of the function's results; it carries gradients where they are on.
    """
    first, *others = _parts_over_masked(model, inputs, labels, function, door, logits_bytes)
    return sum(others, start=first)


def gather_over_masked(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    function: RowFunction,
    *,
    door: Door | None,
    logits_bytes: int = LOGITS_BYTES,
) -> torch.Tensor:
    """Run a model and gather a function of the logits at masked positions.

    Args:
        model: A masked LM, wrapped or not.
        inputs: As for `sum_over_masked`.
        labels: (B, T), `IGNORE_INDEX` off-mask.
        function: Takes logits (n, V) and labels (n) of some masked positions; returns a tensor of n rows.
        door: From `find_door`; None runs the head on every position.
        logits_bytes: Largest size of the logits held at a time, in bytes.

    Returns:
        The function's results for all masked positions, row by row of the batch.
    """
    return torch.cat(_parts_over_masked(model, inputs, labels, function, door, logits_bytes))


def _parts_over_masked(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    function: RowFunction,
    door: Door | None,
    logits_bytes: int,
) -> list[torch.Tensor]:
    """Give the function's results, one for each piece of the masked positions."""
    base = base_of(model)
    chosen = labels != IGNORE_INDEX
    targets = labels[chosen]
    with documents_apart(base, inputs) as inputs:
        if door is None or len(targets) == 0:
            return [function(model(**inputs).logits[chosen], targets)]
        if door.last_layer is not None and _runs_again(base, door.last_layer):
            door = Door(door.head)
        vocabulary = base.get_input_embeddings().weight.shape[0]
        at_once = max(1, logits_bytes // (4 * vocabulary))
        if len(targets) <= at_once:
            with _narrowed(base, door, chosen):
                return [function(model(**inputs).logits.flatten(0, 1), targets)]
        return _in_pieces(model, inputs, chosen, targets, function, door, at_once)


def _in_pieces(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    chosen: torch.Tensor,
    targets: torch.Tensor,
    function: RowFunction,
    door: Door,
    at_once: int,
) -> list[torch.Tensor]:
    """Run the encoder once, and the head on pieces of the masked rows."""
    base, kept = base_of(model), {}

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        kept["hidden"] = hidden[0]
        # One row for the run to end with, not detached: where several processes train, the wrapper of theirs follows
        # the output's graph to find the parameters that will get no gradient.
        return hidden[:, :1]

    handle = base.base_model.register_forward_hook(lambda module, args, output: kept.update(output=output))
    try:
        with _narrowed(base, door, chosen), _replaced_input(base, door.head, keep):
            model(**inputs)
    finally:
        handle.remove()
    inner = getattr(model, "module", model)

    def piece(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with _encoder_gives(base, kept["output"]), _replaced_input(base, door.head, lambda _: hidden[None]):
            return function(inner(**inputs).logits.flatten(0, 1), labels)

    parts = []
    for hidden, labels in zip(kept["hidden"].split(at_once), targets.split(at_once), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(piece, hidden, labels, use_reentrant=False))
        else:
            parts.append(piece(hidden, labels))
    return parts


def _runs_again(base: PreTrainedModel, name: str) -> bool:
    """Tell whether a module is run once more in the backward pass (activation checkpointing), without our hooks."""
    module: nn.Module = base
    for part in name.split("."):
        if getattr(module, "gradient_checkpointing", False):
            return True
        module = getattr(module, part)
    return False


@contextlib.contextmanager
def _narrowed(base: PreTrainedModel, door: Door, chosen: torch.Tensor) -> Iterator[None]:
    """Hand on the chosen rows alone, (1, N, H): from the last layer on, or from the head where that was passed over."""
    where = chosen.flatten().nonzero()[:, 0]
    picked: list[bool] = []

    def pick(hidden: torch.Tensor) -> torch.Tensor:
        if picked:
            return hidden
        picked.append(True)
        return hidden.flatten(0, 1).index_select(0, where).unsqueeze(0)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (pick(output[0]), *output[1:]) if isinstance(output, tuple) else pick(output)

    with contextlib.ExitStack() as hooks:
        if door.last_layer is not None:
            hooks.callback(base.get_submodule(door.last_layer).register_forward_hook(after).remove)
        hooks.enter_context(_replaced_input(base, door.head, pick))
        yield


@contextlib.contextmanager
def _replaced_input(
    base: PreTrainedModel, name: str, replace: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let a module get another tensor in place of its first input; of several such, the last set comes last."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]), *args[1:])

    handle = base.get_submodule(name).register_forward_pre_hook(hook)
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
    model: nn.Module,
    door: Door,
    inputs: Mapping[str, torch.Tensor],
    picks: tuple[torch.Tensor, ...],
    whole: torch.Tensor,
) -> bool:
    for chosen in picks:
        with _narrowed(base_of(model), door, chosen):
            try:
                rows = model(**inputs).logits
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # what follows wants whole rows
                return False
        expected = whole[chosen]
        if rows.shape != (1, *expected.shape):
            return False
        allowed = 100 * torch.finfo(expected.dtype).eps * max(1.0, float(expected.abs().max()))
        if (rows[0] - expected).abs().max() > allowed:
            return False
    return True
