"""Token ids to rows: what one sequence of the model holds.

Four ways, on the texts `a b c d` and `e f`, with at most 5 tokens per row, special tokens `<` and `>`, and `|` between
texts:

chunked   `< a b c >` `< d | e >` `< f >`: texts side by side, cut where a row is full; no token is lost
line      `< a b c >` `< e f >`: one row per text, cut at its end (`d` is lost)
run_mlm   `< a b c d` `> < e f >`: the rows of run_mlm.py: framed texts end to end, cut anywhere; what does not fill the
          last row of a batch of 1000 texts is lost
packed    `< a b c >` `< e f >` `< d >`: whole texts side by side, each with its special tokens, those that fit a row
          together (here none do); too long ones in pieces, no token is lost; `document_lengths` tells them apart

The work is array arithmetic on Arrow buffers, over one batch of texts at a time: memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher

from peft_mlm.arguments import Rows
from peft_mlm.arrow_files import written_beside
from peft_mlm.document_packing import DOCUMENT_LENGTHS, DOCUMENT_NUMBERS, WINDOW, cut_documents, gather, pack
from peft_mlm.errors import ArgumentsError, DataError

Ids = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_TOKENS = List(Value("int32"))
# run_mlm's rows depend on it: datasets.map hands over 1000 texts at a time.
_BATCH_SIZE = 1000
_WRITE_SIZE = 1000
# Part of the result's fingerprint: raise it when this module makes other rows of the same tokens.
_RESULT_VERSION = 2


@dataclass(frozen=True)
class RowFacts:
    """What became of the tokens of the texts.

    The tokens given = `tokens` + `truncated_tokens` + `dropped_tokens`. Special tokens that were added count in none.

    Attributes:
        rows: Number of rows.
        tokens: Tokens of the texts that are in the rows.
        texts: Number of texts given.
        empty_texts: How many of them have no tokens; with chunked and line they give nothing.
        truncated_texts: Texts that were cut at max_seq_length (line).
        truncated_tokens: Tokens lost by that.
        dropped_tokens: Tokens lost where a batch of texts does not fill its last row (run_mlm).
        short_rows: Rows with fewer than max_seq_length tokens, special tokens included.
        documents: Texts and pieces of texts that stand in the rows on their own (packed).
        cut_texts: Texts that are longer than a row and were cut into pieces (packed).
    """

    rows: int = 0
    tokens: int = 0
    texts: int = 0
    empty_texts: int = 0
    truncated_texts: int = 0
    truncated_tokens: int = 0
    dropped_tokens: int = 0
    short_rows: int = 0
    documents: int = 0
    cut_texts: int = 0


def make_rows(
    tokenized: Dataset,
    *,
    rows: Rows = "chunked",
    max_seq_length: int,
    prefix: list[int],
    suffix: list[int],
    separator_id: int | None,
    num_proc: int | None = None,
    side_by_side: bool = True,
) -> tuple[Dataset, RowFacts]:
    """Make the model's rows of the tokens of texts.

    The rows are written beside the Arrow files of `tokenized`, or held in memory if those are.

    chunked: the texts stand side by side with one separator between two, and are cut into pieces that fill a row
    together with prefix and suffix. A piece never starts or ends with a separator: there it is left out. The last piece
    may be short. The rows depend on the order of the texts and on nothing else.

    packed: the texts, framed by prefix and suffix, side by side in as few rows as a window of some thousand of them
    allows; texts longer than a row are cut into pieces first. They are told apart by the column `document_lengths`.

    run_mlm: the rows of run_mlm.py, for comparison with its results. A row starts and ends anywhere.

    Args:
        tokenized: Data set with the column `input_ids` (list of int32, without special tokens), one list per text.
        rows: chunked (default), line, packed, or run_mlm.
        max_seq_length: Tokens per row at most, special tokens included.
        prefix: Special tokens at the start of a row (run_mlm: of a text); may be empty.
        suffix: Special tokens at the end of a row (run_mlm: of a text); may be empty.
        separator_id: Token between two texts in a row (chunked); None to put nothing between them.
        num_proc: What run_mlm.py got as `preprocessing_num_workers`: its rows depend on it, as each process has batches
            of its own. It changes the rows of run_mlm only, and starts no process.
        side_by_side: Whether packed rows hold several texts (default), or one text or piece each.

    Returns:
        Data set with the column `input_ids` (list of int32), and `document_lengths` (the same; tokens of each document)
        where documents stand side by side; with chunked and packed also `document_numbers` (the same): the number of
        the text of each document in the row, or of the text that a chunk begins in. And the counts.

    Raises:
        ArgumentsError: If `rows` is not one of these, or `max_seq_length` leaves no room for a token.
        DataError: If the texts give no row at all.

    Example:
        >>> from datasets import Dataset
        >>> texts = Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5, 6]]})
        >>> options = {"max_seq_length": 5, "prefix": [101], "suffix": [102], "separator_id": 102}
        >>> made, facts = make_rows(texts, rows="chunked", **options)
        >>> made["input_ids"][:]
        [[101, 1, 2, 3, 102], [101, 4, 102, 5, 102], [101, 6, 102]]
        >>> made["document_numbers"][:]
        [[0], [0], [1]]
        >>> facts.rows, facts.tokens, facts.short_rows
        (3, 6, 1)
        >>> made, facts = make_rows(texts, rows="line", **options)
        >>> made["input_ids"][:]
        [[101, 1, 2, 3, 102], [101, 5, 6, 102]]
        >>> facts.tokens, facts.truncated_texts, facts.truncated_tokens
        (5, 1, 1)
        >>> made, facts = make_rows(texts, rows="run_mlm", **options)
        >>> made["input_ids"][:]
        [[101, 1, 2, 3, 4], [102, 101, 5, 6, 102]]
    """
    if rows not in get_args(Rows):
        raise ArgumentsError(f"rows is {rows!r}, which is not one of {', '.join(get_args(Rows))}. Choose one of these.")
    special = len(prefix) + len(suffix)
    if max_seq_length <= special:
        raise ArgumentsError(
            f"max_seq_length is {max_seq_length}, and a row has {special} special tokens: no room for text. Give at "
            f"least {special + 1}; the model's own limit is usual."
        )
    if rows == "run_mlm":
        batches = _run_mlm_rows(tokenized, max_seq_length, prefix, suffix, num_proc or 1)
    elif rows == "packed":
        batches = _packed_rows(tokenized, max_seq_length - special, prefix, suffix, side_by_side)
    elif rows == "line":
        batches = _line_rows(tokenized, max_seq_length - special, prefix, suffix)
    else:
        batches = _chunked_rows(tokenized, max_seq_length - special, prefix, suffix, separator_id)
    key = [
        _RESULT_VERSION,
        tokenized._fingerprint,
        rows,
        max_seq_length,
        prefix,
        suffix,
        separator_id,
        num_proc,
        side_by_side,
    ]
    fingerprint = Hasher.hash(key)
    columns = ["input_ids"]
    columns += [DOCUMENT_LENGTHS] if rows == "packed" and side_by_side else []
    columns += [DOCUMENT_NUMBERS] if rows in ("packed", "chunked") else []
    counted: list[RowFacts] = []

    def write(writer: ArrowWriter) -> None:
        counted.append(_write(batches, writer, max_seq_length))
        _check_rows(counted[0], rows, max_seq_length)

    made = written_beside(tokenized, fingerprint, Features(dict.fromkeys(columns, _TOKENS)), write)
    return made, counted[0]


def _check_rows(facts: RowFacts, rows: Rows, max_seq_length: int) -> None:
    """Refuse a corpus that gives not one row, and say what to do."""
    if facts.rows:
        return
    if facts.texts == facts.empty_texts:
        raise DataError(f"There is nothing to learn from: the {facts.texts} texts given hold no tokens. Give others.")
    raise DataError(
        f"The text is too short for one row of {max_seq_length} tokens: {facts.texts} texts with "
        f"{facts.dropped_tokens} tokens were given, and rows={rows} drops what does not fill a row. Set rows to "
        "chunked or line, which keep short rows, or give a smaller max_seq_length, or more text."
    )


def _line_rows(
    tokenized: Dataset, capacity: int, prefix: list[int], suffix: list[int]
) -> Iterator[tuple[pa.Table, RowFacts]]:
    """Give one row per text that has tokens."""
    for ids, lengths in _text_batches(tokenized):
        kept = np.minimum(lengths, capacity)
        content = ids
        if kept.sum() < len(ids):
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            content = ids[place < capacity]
        values, offsets, _ = _frame(content, kept[kept > 0], prefix, suffix)
        yield (
            _table(values, offsets),
            RowFacts(
                tokens=len(content),
                texts=len(lengths),
                empty_texts=int(np.count_nonzero(lengths == 0)),
                truncated_texts=int(np.count_nonzero(lengths > capacity)),
                truncated_tokens=len(ids) - len(content),
            ),
        )


def _chunked_rows(
    tokenized: Dataset, capacity: int, prefix: list[int], suffix: list[int], separator_id: int | None
) -> Iterator[tuple[pa.Table, RowFacts]]:
    """Give the full pieces of each batch of texts; what does not fill a piece goes on with the next batch."""
    stream, is_content, numbers = np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.int32)
    before = 0
    # A separator before each text, rather than between two: the first is at the edge of a piece, thus left out.
    separator = [] if separator_id is None else [separator_id]
    for ids, lengths in _text_batches(tokenized):
        more, offsets, more_is_content = _frame(ids, lengths[lengths > 0], separator, [])
        stream, is_content = np.concatenate([stream, more]), np.concatenate([is_content, more_is_content])
        texts = before + np.flatnonzero(lengths).astype(np.int32)
        numbers = np.concatenate([numbers, np.repeat(texts, np.diff(offsets))])
        before += len(lengths)
        pieces, starts, used = _cut(stream, is_content, capacity)
        facts = RowFacts(
            tokens=int(np.count_nonzero(is_content[:used])),
            texts=len(lengths),
            empty_texts=int(np.count_nonzero(lengths == 0)),
        )
        yield _framed_pieces(pieces, numbers[starts], prefix, suffix), facts
        stream, is_content, numbers = stream[used:], is_content[used:], numbers[used:]
    if is_content.any():
        start = int(np.argmax(is_content))
        facts = RowFacts(tokens=int(np.count_nonzero(is_content)))
        yield _framed_pieces([stream[start:]], numbers[start : start + 1], prefix, suffix), facts


def _cut(stream: Ids, is_content: Flags, capacity: int) -> tuple[list[Ids], list[int], int]:
    """Cut a stream into pieces of `capacity` tokens, less the separators at their edges.

    Two separators never follow each other, so that one look at each edge is enough. A piece that ends with a separator
    is one token short: to fill it with the next text's first token would join two texts without a separator.

    Args:
        stream: Tokens of texts with separators between them.
        is_content: Which of these are no separators.
        capacity: Tokens per piece.

    Returns:
        The pieces (views), where each starts, and how much of the stream they use up.
    """
    content = is_content.tobytes()  # reading one byte of bytes is several times faster than one item of an array
    pieces: list[Ids] = []
    starts: list[int] = []
    start = 0
    while True:
        first = start if start >= len(content) or content[start] else start + 1
        end = first + capacity
        if end > len(content):
            return pieces, starts, start
        starts.append(first)
        pieces.append(stream[first : end if content[end - 1] else end - 1])
        start = end


def _framed_pieces(pieces: list[Ids], numbers: Ids, prefix: list[int], suffix: list[int]) -> pa.Table:
    """Put prefix and suffix around each piece; each has the number of a text."""
    lengths = np.fromiter((len(piece) for piece in pieces), np.int64, len(pieces))
    content = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    values, offsets, _ = _frame(content, lengths, prefix, suffix)
    return _table(values, offsets).append_column(DOCUMENT_NUMBERS, _lists(numbers, np.arange(len(numbers) + 1)))


def _run_mlm_rows(
    tokenized: Dataset, max_seq_length: int, prefix: list[int], suffix: list[int], num_proc: int
) -> Iterator[tuple[pa.Table, RowFacts]]:
    """Give run_mlm's rows: per process a run of neighbouring texts, per batch of it the rows that are full."""
    num_proc = max(1, min(num_proc, len(tokenized)))
    for rank in range(num_proc):
        shard = tokenized.shard(num_shards=num_proc, index=rank, contiguous=True) if num_proc > 1 else tokenized
        for ids, lengths in _text_batches(shard):
            values, _, is_content = _frame(ids, lengths, prefix, suffix)
            used = len(values) // max_seq_length * max_seq_length
            tokens = int(np.count_nonzero(is_content[:used]))
            facts = RowFacts(
                tokens=tokens,
                texts=len(lengths),
                empty_texts=int(np.count_nonzero(lengths == 0)),
                dropped_tokens=len(ids) - tokens,
            )
            yield _table(values[:used], np.arange(0, used + 1, max_seq_length)), facts


def _packed_rows(
    tokenized: Dataset, capacity: int, prefix: list[int], suffix: list[int], side_by_side: bool
) -> Iterator[tuple[pa.Table, RowFacts]]:
    """Give the rows of one window of documents after the other."""
    waiting: list[tuple[Ids, Lengths, Ids]] = []
    before = 0
    for ids, lengths in _text_batches(tokenized):
        pieces = cut_documents(lengths, capacity)
        numbers = np.repeat(np.arange(before, before + len(lengths), dtype=np.int32), -(-lengths // capacity))
        before += len(lengths)
        waiting.append((ids, pieces, numbers))
        facts = RowFacts(
            tokens=len(ids),
            texts=len(lengths),
            empty_texts=int(np.count_nonzero(lengths == 0)),
            documents=len(pieces),
            cut_texts=int(np.count_nonzero(lengths > capacity)),
        )
        full = sum(len(held) for _, held, _ in waiting) >= WINDOW
        yield _side_by_side(waiting if full else [], capacity, prefix, suffix, side_by_side), facts
        waiting = [] if full else waiting
    yield _side_by_side(waiting, capacity, prefix, suffix, side_by_side), RowFacts()


def _side_by_side(
    documents: list[tuple[Ids, Lengths, Ids]], capacity: int, prefix: list[int], suffix: list[int], side_by_side: bool
) -> pa.Table:
    """Put documents into rows: several in one, or each in one of its own."""
    content = np.concatenate([np.empty(0, np.int32), *(ids for ids, _, _ in documents)])
    lengths = np.concatenate([np.empty(0, np.int64), *(held for _, held, _ in documents)])
    numbers = np.concatenate([np.empty(0, np.int32), *(texts for _, _, texts in documents)])
    if not side_by_side:
        values, offsets, _ = _frame(content, lengths, prefix, suffix)
        return _table(values, offsets).append_column(DOCUMENT_NUMBERS, _lists(numbers, np.arange(len(numbers) + 1)))
    special = len(prefix) + len(suffix)
    order, per_row = pack(lengths + special, capacity + special)
    values, offsets, _ = _frame(gather(content, lengths, order), lengths[order], prefix, suffix)
    edges = np.concatenate([[0], np.cumsum(per_row)])
    table = _table(values, offsets[edges])
    table = table.append_column(DOCUMENT_LENGTHS, _lists(np.diff(offsets).astype(np.int32), edges))
    return table.append_column(DOCUMENT_NUMBERS, _lists(numbers[order], edges))


def _text_batches(tokenized: Dataset) -> Iterator[tuple[Ids, Lengths]]:
    """Read texts, 1000 at a time: the ids of all of them end to end, and the number of ids of each."""
    for table in tokenized.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        column = table.column("input_ids").combine_chunks()
        ids = column.flatten().to_numpy().astype(np.int32, copy=False)
        yield ids, column.value_lengths().to_numpy().astype(np.int64)


def _frame(content: Ids, lengths: Lengths, prefix: list[int], suffix: list[int]) -> tuple[Ids, Lengths, Flags]:
    """Put prefix and suffix around sequences that lie end to end.

    Example:
        >>> values, offsets, is_content = _frame(np.array([1, 2, 3], np.int32), np.array([2, 1]), [8], [9])
        >>> values.tolist(), offsets.tolist()
        ([8, 1, 2, 9, 8, 3, 9], [0, 4, 7])

    Args:
        content: Tokens of the sequences.
        lengths: Tokens per sequence.
        prefix: Special tokens before each.
        suffix: Special tokens after each.

    Returns:
        The framed sequences end to end, where each starts (and, last, where all end), and which of the values are
        content.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths + len(prefix) + len(suffix), out=offsets[1:])
    values = np.empty(offsets[-1], np.int32)
    is_content = np.ones(offsets[-1], np.bool_)
    for places, token in [
        *((offsets[:-1] + place, token) for place, token in enumerate(prefix)),
        *((offsets[1:] - len(suffix) + place, token) for place, token in enumerate(suffix)),
    ]:
        values[places] = token
        is_content[places] = False
    values[is_content] = content
    return values, offsets, is_content


def _lists(values: Ids, offsets: Lengths) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _table(values: Ids, offsets: Lengths) -> pa.Table:
    return pa.table({"input_ids": _lists(values, offsets)})


def _write(batches: Iterator[tuple[pa.Table, RowFacts]], writer: ArrowWriter, max_seq_length: int) -> RowFacts:
    """Write rows, and add up the counts."""
    total = RowFacts()
    pending: list[pa.Table] = []
    for table, facts in batches:
        lengths = table.column("input_ids").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        facts = replace(facts, rows=len(table), short_rows=int(np.count_nonzero(lengths < max_seq_length)))
        total = RowFacts(*(a + b for a, b in zip(astuple(total), astuple(facts), strict=True)))
        pending.append(table)
        # Short texts give few rows per batch, and a file of many small pieces is slow to open and to read.
        if sum(map(len, pending)) >= _WRITE_SIZE:
            _write_table(writer, pending)
            pending = []
    _write_table(writer, pending)
    return total


def _write_table(writer: ArrowWriter, tables: list[pa.Table]) -> None:
    if any(map(len, tables)):
        table = pa.concat_tables(tables)
        writer.write_table(table, len(table))
