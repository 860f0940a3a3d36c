"""Packed rows: every token once, no row over its limit, the same rows each time."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from peft_mlm import document_attention, document_packing
from peft_mlm.batching import row_lengths
from peft_mlm.document_packing import DOCUMENT_LENGTHS, DOCUMENT_NUMBERS, WINDOW, cut_documents, gather, pack
from peft_mlm.errors import DataError
from peft_mlm.packing import make_rows

BERT: dict[str, Any] = {"prefix": [101], "suffix": [102], "separator_id": 102}
BARE: dict[str, Any] = {"prefix": [], "suffix": [], "separator_id": 7}
TEXTS = st.lists(st.lists(st.integers(1, 2000), max_size=30), max_size=40)


def token_data(texts: list[list[int]]) -> Dataset:
    return Dataset(pa.table({"input_ids": pa.array(texts, pa.list_(pa.int32()))}))


def documents_of(rows: Dataset) -> list[list[list[int]]]:
    """The documents of each row, their frame included."""
    split = []
    for ids, lengths in zip(rows["input_ids"], rows[DOCUMENT_LENGTHS], strict=True):
        ends = np.cumsum(lengths)
        assert ends[-1] == len(ids)
        split.append([ids[end - length : end] for end, length in zip(ends, lengths, strict=True)])
    return split


def plain_pieces(texts: list[list[int]], capacity: int) -> list[list[int]]:
    return [text[i : i + capacity] for text in texts for i in range(0, len(text), capacity)]


def plain_numbers(texts: list[list[int]], capacity: int) -> list[int]:
    """The text of each piece."""
    return [number for number, text in enumerate(texts) for _ in range(0, len(text), capacity)]


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Tokens per row, each document in the fullest row that takes it, the longest first."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, held in enumerate(rows) if held + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


@given(texts=TEXTS, length=st.integers(3, 20), frame=st.sampled_from([BERT, BARE]))
def test_every_piece_of_every_text_stands_in_a_row_once_and_no_row_is_too_long(
    texts: list[list[int]], length: int, frame: dict[str, Any]
) -> None:
    capacity = length - len(frame["prefix"]) - len(frame["suffix"])
    pieces = plain_pieces(texts, capacity)
    if not pieces:
        with pytest.raises(DataError, match="hold no tokens"):
            make_rows(token_data(texts), rows="packed", max_seq_length=length, **frame)
        return
    rows, facts = make_rows(token_data(texts), rows="packed", max_seq_length=length, **frame)
    held = documents_of(rows)
    framed = [[*frame["prefix"], *piece, *frame["suffix"]] for piece in pieces]
    assert sorted(document for row in held for document in row) == sorted(framed)
    numbered = zip((d for row in held for d in row), (n for row in rows[DOCUMENT_NUMBERS] for n in row), strict=True)
    assert sorted(numbered) == sorted(zip(framed, plain_numbers(texts, capacity), strict=True))
    assert all(len(ids) <= length for ids in rows["input_ids"])
    assert facts.tokens == sum(map(len, texts))
    assert facts.documents == len(pieces)
    assert facts.cut_texts == sum(len(text) > capacity for text in texts)
    assert facts.rows == len(rows)
    assert (facts.truncated_tokens, facts.dropped_tokens) == (0, 0)
    again, _ = make_rows(token_data(texts), rows="packed", max_seq_length=length, **frame)
    assert again["input_ids"][:] == rows["input_ids"][:]


@given(texts=TEXTS, length=st.integers(3, 20))
def test_apart_each_piece_has_a_row_of_its_own_in_the_order_of_the_texts(texts: list[list[int]], length: int) -> None:
    pieces = plain_pieces(texts, length - 2)
    if pieces:
        rows, facts = make_rows(token_data(texts), rows="packed", max_seq_length=length, side_by_side=False, **BERT)
        assert rows.column_names == ["input_ids", DOCUMENT_NUMBERS]
        assert rows[DOCUMENT_NUMBERS][:] == [[number] for number in plain_numbers(texts, length - 2)]
        assert rows["input_ids"][:] == [[101, *piece, 102] for piece in pieces]
        assert facts.documents == facts.rows == len(pieces)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300), capacity=st.integers(50, 90))
def test_packing_is_a_best_fit_with_rows_in_the_order_of_their_first_documents(
    lengths: list[int], capacity: int
) -> None:
    sizes = np.array(lengths)
    order, per_row = pack(sizes, capacity)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    rows = np.split(order, np.cumsum(per_row)[:-1])
    held = [int(sizes[row].sum()) for row in rows]
    assert max(held) <= capacity
    assert [int(row[0]) for row in rows] == sorted(int(row.min()) for row in rows)
    assert all((np.diff(row) > 0).all() for row in rows)
    assert sorted(held) == sorted(plain_best_fit(lengths, capacity))


@given(lengths=st.lists(st.integers(0, 6), max_size=20), data=st.data())
def test_documents_are_brought_into_any_order(lengths: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    content = np.arange(sum(lengths), dtype=np.int32)
    parts = np.split(content, np.cumsum(lengths)[:-1]) if lengths else []
    wanted = [token for number in order for token in parts[number].tolist()]
    assert gather(content, np.array(lengths, np.int64), np.array(order, np.int64)).tolist() == wanted


def test_documents_are_packed_a_window_at_a_time_and_fill_their_rows() -> None:
    chance = np.random.default_rng(0)
    lengths = chance.integers(5, 120, size=2 * WINDOW + 500)
    texts = Dataset(
        pa.table({"input_ids": pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                                                        np.ones(lengths.sum(), np.int32))})
    )  # fmt: skip
    rows, facts = make_rows(texts, rows="packed", max_seq_length=128, **BERT)
    framed = int((lengths + 2).sum())
    assert framed / (128 * len(rows)) > 0.97
    assert facts.short_rows == int((row_lengths(rows) < 128).sum())
    # A window closes after the batch of 1000 texts that fills it: the rows of the first 9000 texts come first.
    first = int((lengths[:9000] + 2).sum())
    reached = np.cumsum(row_lengths(rows))
    assert first in reached.tolist()


def test_cutting_leaves_no_empty_piece() -> None:
    assert cut_documents(np.array([0, 4, 8, 9, 0]), 4).tolist() == [4, 4, 4, 4, 4, 1]
    assert cut_documents(np.array([], np.int64), 4).tolist() == []


def test_rows_on_disk_carry_their_documents(tmp_path: Path) -> None:
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    token_data(texts).save_to_disk(tmp_path / "tokens")
    stored = Dataset.load_from_disk(str(tmp_path / "tokens"))
    rows, _ = make_rows(stored, rows="packed", max_seq_length=8, **BERT)
    assert rows.cache_files
    assert documents_of(rows) == [[[101, 1, 2, 3, 102], [101, 4, 102]], [[101, 5, 6, 7, 8, 9, 10, 102]]]


@pytest.mark.parametrize("module", [document_packing, document_attention])
def test_examples_in_docstrings_are_right(module: Any) -> None:
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0
