"""Text to token ids: one list of ids per text, without special tokens and without truncation.

Special tokens are added when rows are made (`packing`), so that the tokens of a text are stored once whatever rows are
cut from them: what one text is wrapped in is found here, by `special_token_frame`.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from peft_mlm.arrow_files import written_beside
from peft_mlm.errors import ModelError

_TOKEN_FEATURES = Features({"input_ids": List(Value("int32"))})
_BATCH_SIZE = 1000
# What a tokenizer saves that does not decide its ids here: settings of the last call, and of the way it was loaded.
_NO_MATTER = {
    "tokenizer.json": {"truncation", "padding"},
    "tokenizer_config.json": {"is_local", "local_files_only", "name_or_path", "model_max_length", "chat_template"},
}
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
    """

    texts: int
    tokens: int
    unknown_tokens: int
    unknown_share: float
    longest_text: int


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
        num_proc: Processes to use where the tokenizer is a slow one, or has code of its own around the fast one; the
            fast ones use all cores by threads. It does not change the result.
        overwrite_cache: Tokenise again although a result is kept. Default False.

    Returns:
        Data set of as many rows, with the one column `input_ids` (list of int32).
    """
    key = [_RESULT_VERSION, texts._fingerprint, _tokenizer_fingerprint(tokenizer)]
    fingerprint = Hasher.hash([*key, transformers.__version__, tokenizers.__version__])
    if len(texts) == 0:  # map() gives an empty data set back without calling the function
        return Dataset.from_dict({"input_ids": []}, features=_TOKEN_FEATURES)
    if _takes_batches_as_they_are(tokenizer):
        write = partial(_write_tokens, texts=texts, tokenizer=tokenizer)
        return written_beside(texts, fingerprint, _TOKEN_FEATURES, write, reuse=not overwrite_cache)
    return texts.map(
        partial(_encode_batch, tokenizer=tokenizer),
        batched=True,
        batch_size=_BATCH_SIZE,
        remove_columns=texts.column_names,
        features=_TOKEN_FEATURES,
        num_proc=_processes(num_proc, len(texts)),
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
    tokens = unknown = longest = 0
    for table in tokenized.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        column = table.column("input_ids").combine_chunks()
        ids = column.flatten().to_numpy()
        tokens += len(ids)
        longest = max(longest, int(np.max(column.value_lengths().to_numpy(zero_copy_only=False))))
        if tokenizer.unk_token_id is not None:
            unknown += int(np.count_nonzero(ids == tokenizer.unk_token_id))
    return TokenFacts(
        texts=len(tokenized),
        tokens=tokens,
        unknown_tokens=unknown,
        unknown_share=unknown / tokens if tokens else 0.0,
        longest_text=longest,
    )


def _processes(num_proc: int | None, texts: int) -> int | None:
    """Resolve the number of processes: None for this process alone (datasets starts a pool even for 1)."""
    processes = min(num_proc or 1, texts)
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


def _takes_batches_as_they_are(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether encoding is the Rust tokenizer's work alone."""
    kind: Any = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
    )


def _write_tokens(writer: ArrowWriter, texts: Dataset, tokenizer: Any) -> None:
    """Encode batch after batch: the threads of the Rust tokenizer have the next one while this one is written."""
    backend = tokenizer.backend_tokenizer
    truncation, padding, splits = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens

    def encode(table: pa.Table) -> list[tokenizers.Encoding]:
        # Without offsets, which nobody reads.
        return list(backend.encode_batch_fast(table.column("text").to_pylist(), add_special_tokens=False))

    tables = texts.with_format("arrow").iter(batch_size=_BATCH_SIZE)
    try:
        with ThreadPoolExecutor(1) as ahead, progress_bar(total=len(texts), desc="Tokenise", unit="texts") as bar:
            waiting = ahead.submit(encode, next(tables))
            for table in chain(tables, [None]):
                encoded = waiting.result()
                if table is not None:
                    waiting = ahead.submit(encode, table)
                writer.write_table(_token_table([one.ids for one in encoded]), len(encoded))
                bar.update(len(encoded))
    finally:
        backend.encode_special_tokens = splits
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _encode_batch(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """Encode a batch of texts to an Arrow table, which datasets writes as it is."""
    return _token_table(_encode(batch["text"], tokenizer))


def _token_table(rows: list[list[int]]) -> pa.Table:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids: the files that the tokenizer saves.

    Not the pickled object, whose truncation and padding settings change with each call, so that the second run would
    not find the cache of the first.
    """
    files: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                files[path.name] = path.read_bytes()
    for name, no_matter in _NO_MATTER.items():
        if name in files:
            files[name] = {key: value for key, value in json.loads(files[name]).items() if key not in no_matter}
    return str(Hasher.hash([type(tokenizer).__name__, files]))
