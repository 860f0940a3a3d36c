"""With which tokenizer, masks and text an adapter was trained, and what it gained: kept beside it.

An adapter on its own base, but behind another tokenizer, gives wrong predictions without an error. The texts are told
by counts and fingerprints alone; none of them, and no local path, is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.arguments import DataTrainingArguments
from peft_mlm.card import name_data
from peft_mlm.errors import AdapterError
from peft_mlm.run_folder import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_FACTS = "training_facts.json"
MASKING = ("mlm_probability", "mask_replace_prob", "random_replace_prob", "eval_mask_seed", "eval_mask_draws", "rows")
FIGURES = ("steps", "trainable_parameters", "total_parameters", "base", "adapted")
OF_SPLIT = ("texts", "rows_used", "tokens", "max_seq_length", "fingerprint")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What tokenizers of one vocabulary differ in: case, accents, spaces, digits, marks, scripts, a sequence of residues.
PROBE = (
    "The Cat sat, twice.",
    "na\u00efve  caf\u00e9 \u00c5",
    "3.14 %",
    "\u0394G \u4f60\u597d",
    "MKTAYIAKQR",
    "CC(=O)Oc1ccccc1",
)
SHOWN = 3


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Describe a tokenizer so that another one is found out.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        `size`, `vocabulary` (SHA-256 of the tokens in the order of their ids), `special` (token and id by name), and
        `splits` (SHA-256 of the tokens of a few texts, which tell how it treats case, accents and spaces).
    """
    ids = tokenizer.get_vocab()
    special = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    ordered = sorted((number, token) for token, number in ids.items())
    return {
        "size": len(ids),
        "vocabulary": _digest(ordered),
        "special": {name: [str(token), ids.get(str(token))] for name, token in special.items() if token is not None},
        "splits": _digest([tokenizer.tokenize(text) for text in PROBE]),
    }


def training_facts(
    data: DataTrainingArguments,
    facts: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe what an adapter was trained with.

    Args:
        data: The arguments of text and masks.
        facts: By split, as in `dataset.json`.
        tokenizer: The tokenizer of the run.
        summary: As in `summary.json`.

    Returns:
        `tokenizer` (see `tokenizer_fingerprint`), `masking` (arguments by name), `data` (its `name` without a local
        path, its `revision`, and counts and fingerprint of the texts by split), and `figures` of the summary.
    """
    splits = {split: {name: record.get(name) for name in OF_SPLIT} for split, record in facts.items()}
    source = facts["train"].get("source") or {}
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "masking": {name: getattr(data, name) for name in MASKING},
        "data": {"name": name_data(data), "revision": source.get("commit") or source.get("revision"), **splits},
        "figures": {name: summary.get(name) for name in FIGURES},
    }


def write_training_facts(record: Mapping[str, Any], folder: Path) -> None:
    """Write the facts beside an adapter.

    Args:
        record: From `training_facts`.
        folder: The adapter's folder.
    """
    write_json(folder / TRAINING_FACTS, dict(record))


def changed_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say in what a tokenizer differs from that of an adapter's training.

    Args:
        folder: The adapter's folder.
        tokenizer: The tokenizer that is there.

    Returns:
        Short sentences; empty where it is the same, or where the adapter has no such facts.

    Raises:
        AdapterError: The file is damaged.
    """
    file = folder / TRAINING_FACTS
    if not file.is_file():
        return []
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["tokenizer"]
        special = {str(name): list(pair) for name, pair in recorded["special"].items()}
        size, vocabulary, splits = recorded["size"], recorded["vocabulary"], recorded["splits"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file} is damaged: {error!r}. Take the adapter from its source again.") from error
    given, told = tokenizer_fingerprint(tokenizer), []
    if size != given["size"]:
        told.append(f"tokens of the tokenizer: {size} in training, {given['size']} here")
    names = [name for name in {**special, **given["special"]} if special.get(name) != given["special"].get(name)]
    told += [f"{name}: {special.get(name)} in training, {given['special'].get(name)} here" for name in names[:SHOWN]]
    if not told and vocabulary != given["vocabulary"]:
        told.append("tokens of the tokenizer: as many, with other ids")
    if not told and splits != given["splits"]:
        told.append("the tokenizer has the same tokens, but splits text otherwise (case, accents or spaces)")
    return told


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
