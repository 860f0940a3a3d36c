"""Text to token ids: one list of ids per text, without special tokens and without truncation.

Special tokens are added when rows are made (`packing`), so that the tokens of a text are stored once whatever rows are
cut from them: what one text is wrapped in is found here, by `special_token_frame`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher
from datasets.utils import tqdm as progress_bar
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from peft_mlm.arrow_files import written_beside
from peft_mlm.errors import ModelError
from peft_mlm.word_memo import Ids, Lengths, WordMemo, joined

_TOKEN_FEATURES = Features({"input_ids": List(Value("int32"))})
_BATCH_SIZE = 1000
# Bytes of text that are worth a process of their own: to start some takes two seconds.
_FAST_SHARE, _SLOW_SHARE = 2**28, 2**22
# What a tokenizer saves in its config that does not decide its ids here.
_CONFIG = "tokenizer_config.json"
_NO_MATTER = {"is_local", "local_files_only", "name_or_path", "model_max_length", "chat_template"}
# Classes of lengths in a histogram; how many times the median the long texts have to be for classes that double.
_CLASSES, _MANY_TIMES = 12, 8
# Part of the cache key: raise it when this module gives other ids for the same text and tokenizer.
_RESULT_VERSION = 1


@dataclass(frozen=True)
class TokenFacts:
    """What tokenising gave.

    Attributes:
        texts: Number of texts.
        tokens: Number of tokens, special tokens not included.
        unknown_tokens: How many of them are the tokenizer's unknown token.
        unknown_share: unknown_tokens / tokens, between 0 and 1; 0 if there are no tokens.
        longest_text: Tokens in the longest text.
        text_lengths: How many texts have how many tokens (`length_histogram`).
    """

    texts: int
    tokens: int
    unknown_tokens: int
    unknown_share: float
    longest_text: int
    text_lengths: dict[str, Any]


def special_token_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the special tokens that the tokenizer puts before and after one text.

    The mask token is encoded with and without special tokens, and looked up in the longer result: this works for any
    tokenizer, whatever its special tokens are called. BERT has ([101], [102]); one that adds nothing has ([], []).

    Args:
        tokenizer: A tokenizer with a mask token.

    Returns:
        Prefix ids and suffix ids; each may be empty.

    Raises:
        ModelError: If the tokenizer has no mask token, or changes a text when it adds special tokens.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"A masked language model needs a mask token, and this tokenizer ({type(tokenizer).__name__}) has none. "
            'Choose the tokenizer of a masked language model, or set one: tokenizer.add_special_tokens({"mask_token": '
            '"[MASK]"}).'
        )
    plain = _encode([tokenizer.mask_token], tokenizer, add_special_tokens=False)[0]
    framed = _encode([tokenizer.mask_token], tokenizer, add_special_tokens=True)[0]
    for start in range(len(framed) - len(plain) + 1):
        if plain and framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    raise ModelError(
        f"This tokenizer ({type(tokenizer).__name__}) does not just put special tokens around a text: its mask token "
        f"{tokenizer.mask_token!r} is {plain} without them and {framed} with them. Check its special tokens and its "
        "post-processor."
    )


def text_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Choose the token that stands between two texts in one row.

    It is what the model has seen at the end of a text: the last token of the frame's suffix; else the tokenizer's
    separator, else its end-of-sequence token.

    Args:
        tokenizer: A tokenizer with a mask token.

    Returns:
        The id, or None if the tokenizer has no such token: then texts are set side by side.

    Raises:
        ModelError: As in `special_token_frame`.
    """
    _, suffix = special_token_frame(tokenizer)
    for token in (*suffix[-1:], tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


def tokenize(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> Dataset:
    """Turn texts into token ids, without special tokens and without truncation.

    The result is kept beside the Arrow files of `texts` and found again when the same texts are tokenised with an equal
    tokenizer and the same library versions. Texts that are held in memory only are tokenised each time.

    Args:
        texts: Data set with the column `text`.
        tokenizer: Fast or slow; its own truncation and padding settings are not used.
        num_proc: Processes to use; None (default) for this process alone, or as many as there are cores where there is
            much text. It does not change the result.
        overwrite_cache: Tokenise again although a result is kept. Default False.

    Returns:
        Data set of as many rows, with the one column `input_ids` (list of int32).
    """
    key = [_RESULT_VERSION, texts._fingerprint, _tokenizer_fingerprint(tokenizer)]
    versions = [transformers.__version__, tokenizers.__version__]
    if len(texts) == 0:  # map() gives an empty data set back without calling the function
        return Dataset.from_dict({"input_ids": []}, features=_TOKEN_FEATURES)
    fingerprint = Hasher.hash(key + versions)
    processes = _processes(num_proc, texts, fast=_is_plain_rust(tokenizer))
    encoder = _Encoder(tokenizer, one_thread=processes is not None)
    if processes is None:
        write = partial(_write_tokens, texts=texts, encoder=encoder)
        return written_beside(texts, fingerprint, _TOKEN_FEATURES, write, reuse=not overwrite_cache)
    return texts.map(
        encoder,
        batched=True,
        batch_size=_BATCH_SIZE,
        remove_columns=texts.column_names,
        features=_TOKEN_FEATURES,
        num_proc=processes,
        load_from_cache_file=not overwrite_cache,
        new_fingerprint=fingerprint,
        desc="Tokenise",
    )


def describe_tokens(tokenized: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenFacts:
    """Count what `tokenize` gave.

    Args:
        tokenized: Data set with the column `input_ids`.
        tokenizer: The tokenizer it was made with.

    Returns:
        The counts. A byte-level tokenizer has no unknown tokens.
    """
    unknown, lengths = 0, [np.zeros(0, np.int32)]
    for table in tokenized.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        column = table.column("input_ids").combine_chunks()
        lengths.append(column.value_lengths().to_numpy(zero_copy_only=False))
        if tokenizer.unk_token_id is not None:
            unknown += int(np.count_nonzero(column.flatten().to_numpy() == tokenizer.unk_token_id))
    of_texts = np.concatenate(lengths)
    tokens = int(of_texts.sum(dtype=np.int64))
    return TokenFacts(
        texts=len(tokenized),
        tokens=tokens,
        unknown_tokens=unknown,
        unknown_share=unknown / tokens if tokens else 0.0,
        longest_text=int(of_texts.max(initial=0)),
        text_lengths=length_histogram(of_texts),
    )


def length_histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Count texts by their length, in at most 13 classes.

    The classes have one width (1, 2 or 5 times a power of ten), or, where most texts are far shorter than the long
    ones, each has twice the width of the one before. Beyond the 99th percentile the last class holds the rest.

    Args:
        lengths: (texts,), tokens of each text.

    Returns:
        `edges` (of n classes, n + 1 lengths: class i holds the lengths from edge i to below edge i + 1), `counts` (n),
        and the `median`; no class and a median of None where there is no text.
    """
    if len(lengths) == 0:
        return {"edges": [], "counts": [], "median": None}
    shortest, longest = int(lengths.min()), int(lengths.max())
    median, high = (float(value) for value in np.percentile(lengths, (50, 99)))
    if high > _MANY_TIMES * max(median, 1):
        top = int(high).bit_length()
        powers = (2**exponent for exponent in range(max(0, top + 1 - _CLASSES), top + 1))
        edges = [shortest, *(power for power in powers if shortest < power <= longest), longest + 1]
    else:
        widths = (step * 10**power for power in range(12) for step in (1, 2, 5))
        width = next(w for w in widths if shortest // w * w + _CLASSES * w > high)
        edges = list(range(shortest // width * width, int(high) + 1 + width, width))
        edges += [longest + 1] if edges[-1] <= longest else []
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges, "counts": counts.tolist(), "median": median}


def _processes(num_proc: int | None, texts: Dataset, *, fast: bool) -> int | None:
    """Resolve the number of processes: None for this process alone (datasets starts a pool even for 1)."""
    if num_proc is None and multiprocessing.get_all_start_methods()[0] != "fork":
        return None  # where a process starts anew, a script has to be written for that: only if it is asked for
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, texts.data.nbytes // (_FAST_SHARE if fast else _SLOW_SHARE))
    processes = min(num_proc, len(texts))
    return processes if processes > 1 else None


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = False) -> list[list[int]]:
    """Encode texts to ids, whole, without a warning that they are longer than the model takes."""
    # TAPAS' tokenizer takes no answer to this question without special tokens, not even no.
    kinds = {} if type(tokenizer).__name__ == "TapasTokenizer" else {"return_token_type_ids": False}
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
        **kinds,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _write_tokens(writer: ArrowWriter, texts: Dataset, encoder: _Encoder) -> None:
    """Encode batch after batch: a thread has the next one while this one is written."""
    batches = texts.with_format("arrow").iter(batch_size=_BATCH_SIZE)

    def encoded() -> Iterator[pa.Table]:
        with ThreadPoolExecutor(1) as ahead:
            waiting = None
            for batch in batches:
                following = ahead.submit(encoder, {"text": batch.column("text").to_pylist()})
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    with progress_bar(total=len(texts), desc="Tokenise", unit=" texts") as bar:
        for table in encoded():
            writer.write_table(table, len(table))
            bar.update(len(table))


class _Encoder:
    """Encodes batches of texts to Arrow tables, which datasets writes as they are.

    What a fast tokenizer needs beside itself is made in the process that encodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, one_thread: bool = False) -> None:
        self.tokenizer, self.one_thread = tokenizer, one_thread
        self.memo: WordMemo | None = None

    def __call__(self, batch: dict[str, list[str]]) -> pa.Table:
        ids, lengths = self._encode(batch["text"])
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))})

    def _encode(self, texts: list[str]) -> tuple[Ids, Lengths]:
        if not _is_plain_rust(self.tokenizer):
            return joined(_encode(texts, self.tokenizer))
        if self.memo is None:
            if self.one_thread:  # in one of several processes, which fill the cores
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            # Puts truncation, padding and the splitting of special tokens into the state of such calls.
            _encode([""], self.tokenizer)
            self.memo = WordMemo(self.tokenizer.backend_tokenizer)
        return self.memo.encode(texts)


def _is_plain_rust(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether calling the tokenizer is calling its Rust part: some do more in Python."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
    )


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids: the files that the tokenizer saves.

    A fast one saves the truncation and padding of its last call too: the last call is one without. Its large file is
    hashed as it is; to take it apart takes seconds where the vocabulary is large.
    """
    files: dict[str, Any] = {}
    _encode([""], tokenizer)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                files[path.name] = path.read_bytes()
    if _CONFIG in files:
        files[_CONFIG] = {key: value for key, value in json.loads(files[_CONFIG]).items() if key not in _NO_MATTER}
    return str(Hasher.hash([type(tokenizer).__name__, files]))
