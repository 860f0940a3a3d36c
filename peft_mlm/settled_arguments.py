"""Arguments that mean the same in any folder and at any time: a run can be resumed, evaluated and merged by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_mlm.config import Arguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.token_lists import read_token_list


def with_whole_paths(arguments: Arguments) -> Arguments:
    """Write local paths out in full, so that later commands find the files from any folder.

    Args:
        arguments: All groups.

    Returns:
        The same with whole paths.
    """

    def whole(name: str | None, *, always: bool = False) -> str | None:
        if name is None or not (always or Path(name).expanduser().exists()):
            return name
        return str(Path(name).expanduser().absolute())

    def files(names: list[str] | None) -> list[str] | None:
        return None if names is None else [whole(name, always=True) or name for name in names]

    model, data, peft = arguments.model, arguments.data, arguments.peft
    return replace(
        arguments,
        model=replace(
            model,
            model_name_or_path=whole(model.model_name_or_path),
            config_name=whole(model.config_name),
            tokenizer_name=whole(model.tokenizer_name),
        ),
        data=replace(
            data,
            dataset_name=whole(data.dataset_name),
            train_file=files(data.train_file),
            validation_file=files(data.validation_file),
        ),
        peft=None if peft is None else replace(peft, adapter_name_or_path=whole(peft.adapter_name_or_path)),
    )


def with_token_lists(arguments: Arguments) -> Arguments:
    """Read the files of tokens to add, so that a run that is resumed later has the same tokens.

    Args:
        arguments: All groups.

    Returns:
        The same with lists in place of files.

    Raises:
        ArgumentsError: A file or a token cannot be used.
    """
    model, faults = arguments.model, []
    lists: dict[str, Any] = {}
    for option in ("add_tokens", "add_special_tokens"):
        try:
            lists[option] = read_token_list(option, getattr(model, option)) or None
        except ArgumentsError as error:
            faults += error.faults
    if faults:
        raise ArgumentsError(faults)
    return replace(arguments, model=replace(model, **lists))
