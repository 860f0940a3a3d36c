"""Base model -> adapted model: a new adapter, one to go on with, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_mlm.adapter import Plan, load_adapter, plan_adapter, wrap
from peft_mlm.arguments import ModelArguments
from peft_mlm.config import Arguments
from peft_mlm.loading import find_adapter
from peft_mlm.model import Base


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
        return base.model, None
    if adapter is not None:
        return load_adapter(base.model, adapter, is_trainable=True), None
    plan = plan_adapter(base.model, peft, fresh_parameters=base.fresh_parameters, new_token_ids=base.new_token_ids)
    return wrap(base.model, plan), plan
