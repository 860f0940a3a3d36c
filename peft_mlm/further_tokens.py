"""Tokens added to an adapter that training goes on from: the rows it has, and a start for those it does not have."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_mlm.errors import AdapterError
from peft_mlm.vocabulary import row_tables, token_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextlib.contextmanager
def with_rows_for(model: PreTrainedModel, folder: Path, new_token_ids: Sequence[int]) -> Iterator[Path]:
    """Give the folder of an adapter that has rows for all new tokens: its own, or a temporary copy with rows added.

    PEFT keeps the ids of trained rows in the adapter's config and takes no others later.

    Args:
        model: The masked LM, grown, without adapter; added rows start as they are in it.
        folder: The adapter.
        new_token_ids: Ids of all tokens that the base's own tokenizer does not have.

    Yields:
        The folder to load from.

    Raises:
        AdapterError: The adapter is of a method that trains no rows of tokens, or trains the whole embedding.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    trained = _trained_ids(model, config)
    wanted = token_rows(model, new_token_ids) or {}
    missing = {name: sorted(set(ids) - set(trained.get(name, ()))) for name, ids in wanted.items()}
    if not any(missing.values()):
        yield folder
        return
    whole = [name for name in wanted if any(name.endswith(kept) for kept in config.get("modules_to_save") or ())]
    if config["peft_type"] != "LORA" or whole:
        why = f"trains {whole[0]} as a whole" if whole else f"is of the method {config['peft_type']}, not LORA"
        raise AdapterError(
            f"{len(missing[next(iter(missing))])} tokens are new to the adapter {folder}, which {why}: PEFT cannot "
            "train single rows of the embeddings beside it. Leave add_tokens out, or merge the adapter and start from "
            "the merged model."
        )
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        shutil.copy(folder / CONFIG, copy)
        config["trainable_token_indices"] = {name: [*trained.get(name, ()), *ids] for name, ids in missing.items()}
        (copy / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        weights = load_file(folder / WEIGHTS)
        for name, ids in missing.items():
            key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
            start: Any = row_tables(model)[name].weight
            rows = [weights[key]] if key in weights else []
            weights[key] = torch.cat([*rows, start[ids].detach().float()])
        save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
        yield copy


def _trained_ids(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Read which rows an adapter trains, by the full names of their matrices."""
    given = config.get("trainable_token_indices") or {}
    tables = list(row_tables(model))
    if isinstance(given, list):  # PEFT's short form: of the embeddings
        return {tables[0]: given}
    return {name: ids for name in tables for key, ids in given.items() if name == key or name.endswith("." + key)}
