"""Base model -> adapted model: a new adapter, one to go on with, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from peft_mlm.adapter import ADAPTER_WEIGHTS, Plan, check_adapter_folder, load_adapter, plan_adapter
from peft_mlm.adapter_config import find_targets
from peft_mlm.adapter_fit import check_adapter_fits
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import base_recipe, with_base_recipe
from peft_mlm.checkpoint import load_outline
from peft_mlm.config import Arguments
from peft_mlm.data_passes import DataPass
from peft_mlm.dropout import turn_off_dropout
from peft_mlm.errors import AdapterError
from peft_mlm.initialization import Matrices, initialise, reopen, start_of
from peft_mlm.loading import check_base, find_adapter
from peft_mlm.model import Base, brings_tokenizer, load_base
from peft_mlm.optimizers import freeze_a
from peft_mlm.probing import evaluating, probe_inputs
from peft_mlm.quantization import check_trainable, is_quantised
from peft_mlm.resuming import read_initial
from peft_mlm.targets import ALL_LINEAR, resolve_modules_to_save
from peft_mlm.untying import keep_apart

# Rounding of a start that changes nothing, as a share of the largest logit.
SAME_START = 1e-4


@dataclass(frozen=True)
class Adapted:
    """A model ready to train.

    Attributes:
        model: The base, or a PeftModel on it.
        plan: What a new adapter consists of; None without one.
        initial: (A0, B0) by layer, where s B0 A0 was taken out of the base; empty where the base is untouched.
        notices: Sentences that the user should read.
    """

    model: Any
    plan: Plan | None = None
    initial: Mapping[str, Matrices] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def adapter_to_go_on_with(arguments: Arguments) -> Path | None:
    """Find the adapter that training goes on from.

    Args:
        arguments: All groups.

    Returns:
        Its folder, or None where a new adapter (or none) is trained.
    """
    peft = arguments.peft
    return None if peft is None or peft.adapter_name_or_path is None else find_adapter(peft.adapter_name_or_path)


def with_adapter_tokenizer(arguments: ModelArguments, adapter: Path | None) -> ModelArguments:
    """Use the tokenizer that an adapter carries, when training goes on from it.

    Args:
        arguments: Which base and tokenizer to load.
        adapter: Folder of the adapter to go on with, or None.

    Returns:
        The arguments; a tokenizer that the user names stays.
    """
    if adapter is None or arguments.tokenizer_name is not None or not brings_tokenizer(adapter):
        return arguments
    return replace(arguments, tokenizer_name=str(adapter))


def with_base_of_adapter(arguments: Arguments, adapter: Path | None) -> Arguments:
    """Prepare the base as it was for the adapter that training goes on from.

    Args:
        arguments: All groups.
        adapter: Folder of the adapter to go on with, or None.

    Returns:
        The arguments, those that shape the base taken from the adapter's recipe.

    Raises:
        AdapterError: The arguments ask for another base than the one the adapter was trained on.
    """
    if adapter is None:
        return arguments
    model = with_base_recipe(arguments.model, adapter)
    asked, real = base_recipe(arguments.model), base_recipe(model)
    wrong = [f"{name} {value}" for name, value in asked.items() if real.get(name) != value]
    if wrong:
        was = ", ".join(f"{name} {value}" for name, value in real.items()) or "none of these options"
        raise AdapterError(
            f"{', '.join(wrong)} is asked for, but the adapter {adapter} was trained on a base with {was}: leave that "
            "out, and the base is prepared as it was."
        )
    return replace(arguments, model=model)


def check_names(arguments: Arguments, adapter: Path | None) -> None:
    """Find a name that no layer has, or an adapter for another model, before text is read and weights are loaded.

    Args:
        arguments: All groups.
        adapter: Folder of the adapter to go on with, or None.

    Raises:
        AdapterError: An option names no layer of the model, or the adapter belongs to another architecture.
        ModelError: There is no such model.
    """
    peft = arguments.peft
    named = peft is not None and peft.lora_target_modules not in (None, [ALL_LINEAR])
    if peft is None or not (named or peft.modules_to_save or adapter is not None):
        return
    outline = load_outline(arguments.model)
    if outline is None:
        return
    if adapter is not None:
        check_adapter_fits(adapter, ADAPTER_WEIGHTS, check_adapter_folder(adapter), outline, rows=None)
        return
    if arguments.model.untie_embeddings:
        keep_apart(outline)
    resolve_modules_to_save(outline, peft.modules_to_save)
    if named:
        find_targets(outline, peft, without=())


def adapt(
    base: Base,
    arguments: Arguments,
    adapter: Path | None,
    *,
    data: DataPass,
    total_steps: int,
    checkpoint: Path | None = None,
) -> Adapted:
    """Wrap the base: a new adapter, an existing one to go on with, or none.

    Args:
        base: The base; its model is changed in place.
        arguments: All groups.
        adapter: Folder of the adapter to go on with, or None.
        data: Batches for the starts that need data.
        total_steps: Optimiser steps of the run, for methods with a schedule.
        checkpoint: Folder of the checkpoint that the run goes on from, or None: nothing is started anew then.

    Returns:
        The model to train, and what is new about it.

    Raises:
        AdapterError: The adapter, or its options, do not fit the base.
    """
    peft = arguments.peft
    if peft is None:
        if is_quantised(base.model):
            raise AdapterError(
                f"{base.name_or_path} is a quantised base, whose weights cannot be trained: add --use_lora to train an "
                "adapter beside them, or give its float checkpoint."
            )
        return Adapted(base.model)
    if not peft.base_dropout:
        turn_off_dropout(base.model)
    if adapter is not None:
        remedy = "Give the right one by model_name_or_path."
        check_base(adapter, base, same_tokenizer=not base.new_token_ids, remedy=remedy)
        _check_tokenizer(base, adapter)
        adapted = Adapted(load_adapter(base.model, adapter, is_trainable=True, new_token_ids=base.new_token_ids))
    else:
        plan = plan_adapter(
            base.model,
            peft,
            fresh_parameters=base.fresh_parameters,
            new_token_ids=base.new_token_ids,
            total_steps=total_steps,
        )
        check_trainable(base.model, plan.trained_modules)
        adapted = _new_adapter(base, arguments, plan, data, checkpoint)
    if peft.use_lorafa:
        freeze_a(adapted.model)
    return adapted


def _new_adapter(base: Base, arguments: Arguments, plan: Plan, data: DataPass, checkpoint: Path | None) -> Adapted:
    if checkpoint is not None:
        initial = read_initial(checkpoint)
        return Adapted(reopen(base.model, plan, checkpoint, initial), plan, initial, plan.notices)

    def load_float_base() -> PreTrainedModel:
        return load_base(replace(arguments.model, load_in_4bit=False, load_in_8bit=False, dtype="float32")).model

    before = _probe(base.model)
    model, initial = initialise(base.model, plan, data=data, load_float_base=load_float_base)
    moved, largest = float((_probe(model) - before).abs().max()), float(before.abs().max())
    notices = list(plan.notices)
    if not moved <= SAME_START * max(1.0, largest):
        notices.append(
            f"Before the first step the logits differ from the base's by up to {moved:.2g} (the largest is "
            f"{largest:.2g}): this adapter does not start as the base."
        )
    if initial:
        notices.append(
            f"init_lora_weights {start_of(plan)} takes a part of {len(initial)} weights out of the base for training; "
            "what is saved is plain LoRA of twice the rank, for the base as it was."
        )
    return Adapted(model, plan, initial, tuple(notices))


def _probe(model: Any) -> torch.Tensor:
    """Logits (1, T, V) of a short row of tokens, in evaluation mode."""
    with evaluating(model), torch.no_grad():
        logits: torch.Tensor = model(**probe_inputs(model)).logits.float().cpu()
    return logits


def _check_tokenizer(base: Base, adapter: Path) -> None:
    """Refuse a tokenizer that gives the ids of an adapter's tokens to others: its rows would mean something else."""
    if not brings_tokenizer(adapter):
        return
    given = base.tokenizer.get_vocab()
    theirs = AutoTokenizer.from_pretrained(str(adapter)).get_vocab()
    wrong = sorted((i, token) for token, i in theirs.items() if given.get(token) != i)
    if wrong:
        i, token = wrong[0]
        raise AdapterError(
            f"The adapter {adapter} brings a tokenizer in which id {i} is {token!r}; in the one given it is "
            f"{base.tokenizer.convert_ids_to_tokens(i)!r} ({len(wrong)} ids differ). Leave tokenizer_name out: the "
            "adapter's own is used, and add_tokens adds to it."
        )
