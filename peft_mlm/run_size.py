"""How long a run will be: its rows, tokens and steps, counted on its text or told by its arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from peft_mlm.config import Arguments
from peft_mlm.document_packing import cut_documents, pack
from peft_mlm.errors import DataError
from peft_mlm.text_files import find_files, read_text_files
from peft_mlm.tokenization import special_token_frame, text_separator

# Texts that are tokenised; of more, so many spread evenly over all, and the longest ones.
SAMPLE, LONGEST = 2000, 20
# Files that are larger are not read for a plan.
READ_AT_MOST = 256 * 2**20


def describe_run_size(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, apart: bool
) -> dict[str, Any]:
    """Count rows, tokens and steps of a run as far as its text is at hand.

    Args:
        arguments: All groups.
        tokenizer: Makes the tokens.
        max_seq_length: Tokens per row at most.
        apart: Whether packed documents stand side by side.

    Returns:
        `texts`, `rows`, `longest_row` (tokens), `steps`, `tokens` (of the whole run; padding not counted), `epochs`,
        each None where it is not known; `about`, whether they are estimated; `why`, a sentence on what is not known.
    """
    counted, why = _count(arguments, tokenizer, max_seq_length, apart=apart)
    given = arguments.training
    size = int(given.get("per_device_train_batch_size") or 8)
    accumulation = int(given.get("gradient_accumulation_steps") or 1)
    rows, per_row = counted.get("rows"), counted.get("tokens_per_row")
    if arguments.data.max_tokens_per_batch is not None:
        size = max(1, int(arguments.data.max_tokens_per_batch // (per_row or max_seq_length)))
    most, steps = int(given.get("max_steps") or -1), None
    per_epoch = None if rows is None else max(1, math.ceil(math.ceil(rows / size) / accumulation))
    epochs = float(given.get("num_train_epochs") or 3)
    if most > 0:
        steps, epochs = most, None if per_epoch is None else round(most / per_epoch, 4)  # type: ignore[assignment]
    elif per_epoch is not None:
        steps = math.ceil(per_epoch * epochs)
    tokens = None if steps is None or per_row is None else round(steps * accumulation * size * per_row)
    return {
        "texts": counted.get("texts"),
        "rows": rows,
        "longest_row": counted.get("longest"),
        "steps": steps,
        "epochs": epochs,
        "tokens": tokens,
        "about": bool(counted.get("about")),
        "why": why,
    }


def _count(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, apart: bool
) -> tuple[dict[str, Any], str | None]:
    data = arguments.data
    if not data.train_file:
        what = f"the data set {data.dataset_name} is not loaded for a plan" if data.dataset_name else "no text is given"
        return {}, f"Rows and tokens are not known: {what}."
    try:
        files = find_files(data.train_file)
    except DataError as error:
        return {}, f"Rows and tokens are not known: {error}"
    held = sum(file.stat().st_size for file in files)
    if held > READ_AT_MOST:
        return {}, f"Rows and tokens are not known: the text has {held / 1e9:.1f} GB, and is not read for a plan."
    texts = read_text_files(data.train_file, data.text_column, arguments.model.cache_dir).dataset
    lengths, longest, about = _lengths(texts, tokenizer)
    count = len(texts)
    if not data.validation_file and arguments.training.get("do_eval") is not False:
        count, about = count - round(count * data.validation_split_percentage / 100), True
    return _rows(arguments, tokenizer, max_seq_length, lengths, (count, longest, about), apart=apart), None


def _lengths(texts: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray[Any, Any], int, bool]:
    """Give the tokens of some texts, of the longest one, and whether these are not all texts."""
    column: pa.ChunkedArray = texts.data.column("text")
    characters = pc.fill_null(pc.utf8_length(column), 0).to_numpy()
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(SAMPLE, len(texts))).astype(np.int64))
    largest = np.argsort(-characters)[:LONGEST]

    def tokens(places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        some = [text or "" for text in column.take(pa.array(places)).to_pylist()]
        encoded = tokenizer(some, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return np.array([len(ids) for ids in encoded], np.int64)

    lengths = tokens(chosen)
    longest = int(max(lengths.max(initial=0), tokens(largest).max(initial=0)))
    return lengths[lengths > 0], longest, len(chosen) < len(texts)


def _rows(
    arguments: Arguments,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    lengths: np.ndarray[Any, Any],
    known: tuple[int, int, bool],
    *,
    apart: bool,
) -> dict[str, Any]:
    """Turn lengths of texts into rows, by the way in which rows are made."""
    count, longest, about = known
    kind, special = arguments.data.rows, sum(map(len, special_token_frame(tokenizer)))
    capacity = max(1, max_seq_length - special)
    mean = float(lengths.mean()) if len(lengths) else 0.0
    longest_row = min(max_seq_length, longest + special)
    if kind == "chunked":
        between = 0 if text_separator(tokenizer) is None else 1
        rows = math.ceil(count * (mean + between) / capacity)
        per_row, longest_row = float(min(max_seq_length, count * (mean + between) + special)), max_seq_length
    elif kind == "run_mlm":
        rows = int(count * (mean + special) // max_seq_length)
        per_row, longest_row = float(max_seq_length), max_seq_length
    elif kind == "packed":
        pieces = cut_documents(lengths, capacity)
        per_text = 1 / max(1, len(lengths))
        total = count * mean + len(pieces) * per_text * count * special
        packed = len(pack(pieces + special, max_seq_length)[1]) if apart else len(pieces)
        rows = math.ceil(count * packed * per_text)
        per_row, about = total / max(rows, 1), about or apart
        longest_row = max_seq_length if apart else longest_row
    else:
        rows, per_row = count, float(np.minimum(lengths, capacity).mean()) + special if len(lengths) else 0.0
    if arguments.data.max_train_samples is not None:
        rows = min(rows, arguments.data.max_train_samples)
    return {"texts": count, "rows": rows, "tokens_per_row": per_row, "longest": longest_row, "about": about}
