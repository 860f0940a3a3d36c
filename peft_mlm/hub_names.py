"""A name on the hub, with a revision behind it if need be -> the files of the adapter there."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.utils import cached_file

from peft_mlm.base_recipe import BASE_RECIPE
from peft_mlm.fingerprint import BASE_FINGERPRINT
from peft_mlm.shipped import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peft_mlm.training_facts import TRAINING_FACTS

FILES_OF_ADAPTER = (
    ADAPTER_WEIGHTS,
    "tokenizer_config.json",
    "tokenizer.json",
    BASE_RECIPE,
    BASE_FINGERPRINT,
    TRAINING_FACTS,
)


def parted(name: str) -> tuple[str, str]:
    """Part a hub name from a revision behind it.

    Args:
        name: Such as "org/name@v1" or "org/name"; or a path.

    Returns:
        Name and revision, which is "main" where none is given; a folder that is there keeps its name.
    """
    parts = re.fullmatch(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)@([\w./-]+)", name)
    return (parts[1], parts[2]) if parts and not Path(name).exists() else (name, "main")


def adapter_on_hub(name: str) -> Path | None:
    """Fetch an adapter from the hub.

    Args:
        name: As for `parted`.

    Returns:
        The folder in the cache; None where that name is no adapter there (a model, or nothing).
    """
    name, revision = parted(name)
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return None
    options = {
        "revision": revision,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        config = cached_file(name, ADAPTER_CONFIG, **options)
        if config is None:
            return None
        for file in FILES_OF_ADAPTER:
            cached_file(name, file, **options)
    except (OSError, ValueError):
        return None
    return Path(config).parent
