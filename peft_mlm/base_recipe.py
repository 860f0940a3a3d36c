"""How a base was prepared for its adapter: kept beside the adapter, so that any later load prepares it alike.

A quantised base has other weights than the file it came from, an untied one another graph; an adapter fits only the
base it was trained on. What is kept are the arguments of `ModelArguments` that shape the base, where they differ from
their defaults.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft_mlm.arguments import ModelArguments
from peft_mlm.errors import AdapterError
from peft_mlm.run_folder import write_json

BASE_RECIPE = "base_recipe.json"
SHAPING = (
    "untie_embeddings",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
    "llm_int8_threshold",
)


def base_recipe(arguments: ModelArguments) -> dict[str, Any]:
    """Give the arguments that shape the base, where they differ from their defaults.

    Args:
        arguments: How the base was loaded.

    Returns:
        Values by name; empty for the plain base.
    """
    defaults = {item.name: item.default for item in fields(ModelArguments)}
    return {name: getattr(arguments, name) for name in SHAPING if getattr(arguments, name) != defaults[name]}


def write_base_recipe(arguments: ModelArguments, folder: Path) -> None:
    """Write the recipe beside an adapter; nothing for the plain base.

    Args:
        arguments: How the base was loaded.
        folder: The adapter's folder.
    """
    recipe = base_recipe(arguments)
    if recipe:
        write_json(folder / BASE_RECIPE, recipe)


def with_base_recipe(arguments: ModelArguments, folder: Path) -> ModelArguments:
    """Load the base as it was prepared for an adapter.

    Args:
        arguments: Which base to load.
        folder: The adapter's folder.

    Returns:
        The same arguments with those of the recipe in place of theirs.

    Raises:
        AdapterError: The recipe is damaged, or made by a later version.
    """
    file = folder / BASE_RECIPE
    recipe: Any = {}
    if file.is_file():
        try:
            recipe = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AdapterError(f"{file} is damaged: {error}. Take the adapter from its source again.") from error
    defaults = {item.name: item.default for item in fields(ModelArguments)}
    wrong = [n for n, value in recipe.items() if n not in SHAPING or type(value) is not type(defaults[n])]
    if wrong:
        raise AdapterError(
            f"{file} says {', '.join(wrong)}, which this version does not know: was the adapter made by a later one?"
        )
    return replace(arguments, **{name: recipe.get(name, defaults[name]) for name in SHAPING})
