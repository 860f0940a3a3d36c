"""Base model -> adapted model: a new adapter, one to go on with, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peft_mlm.adapter import Plan, load_adapter, plan_adapter, wrap
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import base_recipe, with_base_recipe
from peft_mlm.config import Arguments
from peft_mlm.errors import AdapterError
from peft_mlm.loading import find_adapter
from peft_mlm.model import Base
from peft_mlm.quantization import check_trainable, is_quantised


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
    if adapter is None or arguments.tokenizer_name is not None:
        return arguments
    carried = (adapter / "tokenizer_config.json").is_file()
    return replace(arguments, tokenizer_name=str(adapter)) if carried else arguments


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


def adapt(base: Base, arguments: Arguments, adapter: Path | None) -> tuple[Any, Plan | None]:
    """Wrap the base: a new adapter, an existing one to go on with, or none.

    Args:
        base: The base; its model is changed in place.
        arguments: All groups.
        adapter: Folder of the adapter to go on with, or None.

    Returns:
        The model to train, and for a new adapter what it consists of.

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
        return base.model, None
    if adapter is not None:
        _check_tokenizer(base, adapter)
        return load_adapter(base.model, adapter, is_trainable=True, new_token_ids=base.new_token_ids), None
    plan = plan_adapter(base.model, peft, fresh_parameters=base.fresh_parameters, new_token_ids=base.new_token_ids)
    check_trainable(base.model, plan.trained_modules)
    return wrap(base.model, plan), plan


def _check_tokenizer(base: Base, adapter: Path) -> None:
    """Refuse a tokenizer that gives the ids of an adapter's tokens to others: its rows would mean something else."""
    if not (adapter / "tokenizer_config.json").is_file():
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
