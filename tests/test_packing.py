from __future__ import annotations

import doctest
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from hypothesis import given
from hypothesis import strategies as st

from peft_mlm import packing
from peft_mlm.errors import ArgumentsError, DataError
from peft_mlm.packing import RowFacts, make_rows

BERT: dict[str, Any] = {"prefix": [101], "suffix": [102], "separator_id": 102}
FRAMES: list[dict[str, Any]] = [
    BERT,
    {"prefix": [], "suffix": [], "separator_id": None},
    {"prefix": [], "suffix": [], "separator_id": 7},
    {"prefix": [101, 5], "suffix": [6, 7, 102], "separator_id": 5},
    {"prefix": [101], "suffix": [], "separator_id": None},
]
# Ids that the frames use stand in the texts as well: a separator is known by its place, not by its id.
TEXT = st.lists(st.sampled_from([1, 2, 3, 5, 6, 7, 101, 102]), max_size=9)


def token_data(texts: list[list[int]]) -> Dataset:
    return Dataset(pa.table({"input_ids": pa.array(texts, pa.list_(pa.int32()))}))


def corpus(texts: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 30000) for _ in range(draw.randrange(longest + 1))] for _ in range(texts)]


def plain_chunks(texts: list[list[int]], capacity: int, separator: int | None) -> list[list[int]]:
    """Chunked rows without their frame, token by token."""
    pieces: list[list[int]] = [[]]
    for text in texts:
        for number, token in enumerate(text):
            if len(pieces[-1]) == capacity:
                pieces.append([])
            if number == 0 and pieces[-1] and separator is not None:
                if len(pieces[-1]) + 1 == capacity:
                    pieces.append([])
                else:
                    pieces[-1].append(separator)
            pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def plain_run_mlm(texts: list[list[int]], length: int, frame: dict[str, Any], num_proc: int = 1) -> list[list[int]]:
    """What run_mlm.py makes of texts: per process, per 1000 texts, whole rows only."""
    rows: list[list[int]] = []
    start = 0
    for rank in range(num_proc):
        stop = start + len(texts) // num_proc + (rank < len(texts) % num_proc)
        for first in range(start, stop, 1000):
            joined: list[int] = []
            for text in texts[first : min(first + 1000, stop)]:
                joined.extend([*frame["prefix"], *text, *frame["suffix"]])
            while len(joined) >= length:
                rows.append(joined[:length])
                joined = joined[length:]
        start = stop
    return rows


def made_by_map(texts: list[list[int]], length: int, frame: dict[str, Any], num_proc: int | None) -> list[list[int]]:
    """The same with datasets' own batches and processes."""

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for text in batch["input_ids"] for token in [*frame["prefix"], *text, *frame["suffix"]]]
        return {"input_ids": [joined[end - length : end] for end in range(length, len(joined) + 1, length)]}

    mapped = token_data(texts).map(group, batched=True, batch_size=1000, num_proc=num_proc)
    rows: list[list[int]] = mapped["input_ids"][:]
    return rows


def facts_of(**counts: int) -> dict[str, int]:
    return asdict(RowFacts()) | counts


def total(texts: list[list[int]]) -> int:
    return sum(len(text) for text in texts)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_chunked_rows_are_the_plain_ones_for_any_batch_size(
    frame: dict[str, Any], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_SIZE", batch_size)

    @given(st.lists(TEXT, min_size=1, max_size=12), st.integers(1, 12))
    def check(texts: list[list[int]], capacity: int) -> None:
        length = capacity + len(frame["prefix"]) + len(frame["suffix"])
        pieces = plain_chunks(texts, capacity, frame["separator_id"])
        if not pieces:
            with pytest.raises(DataError, match="nothing to learn from"):
                make_rows(token_data(texts), max_seq_length=length, **frame)
            return
        made, facts = make_rows(token_data(texts), max_seq_length=length, **frame)
        assert made["input_ids"][:] == [frame["prefix"] + piece + frame["suffix"] for piece in pieces]
        assert asdict(facts) == facts_of(
            rows=len(pieces),
            tokens=total(texts),
            texts=len(texts),
            empty_texts=texts.count([]),
            short_rows=sum(len(piece) < capacity for piece in pieces),
        )

    check()


@pytest.mark.parametrize("length", [3, 4, 17, 128, 100_000])
def test_chunked_rows_lose_nothing_are_full_and_have_separators_inside_only(length: int) -> None:
    texts = corpus(3500)
    made, facts = make_rows(token_data(texts), max_seq_length=length, **BERT)
    rows = made["input_ids"][:]
    assert [token for row in rows for token in row if token not in (101, 102)] == [token for t in texts for token in t]
    assert facts.tokens == total(texts)
    assert all(row[0] == 101 and row[-1] == 102 and row[1] != 102 and row[-2] != 102 for row in rows)
    assert all(length - 1 <= len(row) <= length for row in rows[:-1])
    assert facts.short_rows == sum(len(row) < length for row in rows)


def test_chunked_rows_do_not_depend_on_arrow_pieces_slices_or_num_proc() -> None:
    texts = corpus(2300)
    expected, facts = make_rows(token_data(texts), max_seq_length=64, **BERT)
    ends = [0, 1, 2, 900, 901, 2300]
    pieces = concatenate_datasets([token_data(texts[a:b]) for a, b in pairwise(ends)])
    slices = Dataset(pa.table({"input_ids": pa.array([[9], *texts, [8]], pa.list_(pa.int32()))}).slice(1, 2300))
    shuffled = token_data(texts[::-1]).select(range(2299, -1, -1))
    for same in (pieces, slices, shuffled):
        assert make_rows(same, max_seq_length=64, num_proc=3, **BERT)[0]["input_ids"][:] == expected["input_ids"][:]
        assert make_rows(same, max_seq_length=64, **BERT)[1] == facts


@pytest.mark.parametrize("frame", FRAMES)
def test_chunks_tell_the_text_they_begin_in(frame: dict[str, Any]) -> None:
    chance, start = random.Random(1), len(frame["prefix"])
    texts = [[1000 + number] * chance.choice((0, 1, 5, 80)) for number in range(2500)]  # each token tells its text
    made, _ = make_rows(token_data(texts), max_seq_length=17, **frame)
    assert made["document_numbers"][:] == [[ids[start] - 1000] for ids in made["input_ids"]]


@pytest.mark.parametrize("frame", FRAMES)
def test_line_rows_are_the_texts_cut_and_framed(frame: dict[str, Any]) -> None:
    texts = corpus(2100, longest=30)
    special = len(frame["prefix"]) + len(frame["suffix"])
    for capacity in (1, 13, 30):
        made, facts = make_rows(token_data(texts), rows="line", max_seq_length=capacity + special, **frame)
        kept = [text[:capacity] for text in texts if text]
        assert made["input_ids"][:] == [frame["prefix"] + text + frame["suffix"] for text in kept]
        assert asdict(facts) == facts_of(
            rows=len(kept),
            tokens=total(kept),
            texts=2100,
            empty_texts=texts.count([]),
            truncated_texts=sum(len(text) > capacity for text in texts),
            truncated_tokens=total(texts) - total(kept),
            short_rows=sum(len(text) < capacity for text in kept),
        )


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("length", [6, 61, 512])
def test_run_mlm_rows_are_run_mlms(frame: dict[str, Any], length: int) -> None:
    texts = corpus(2750)
    expected = plain_run_mlm(texts, length, frame)
    made, facts = make_rows(token_data(texts), rows="run_mlm", max_seq_length=length, **frame)
    assert made["input_ids"][:] == expected == made_by_map(texts, length, frame, None)
    in_text = sum(token >= 1000 for row in expected for token in row)
    assert asdict(facts) == facts_of(
        rows=len(expected),
        tokens=in_text,
        texts=2750,
        empty_texts=texts.count([]),
        dropped_tokens=total(texts) - in_text,
    )


@pytest.mark.parametrize("num_proc", [2, 3])
def test_run_mlm_rows_of_several_processes_are_run_mlms(num_proc: int) -> None:
    texts = corpus(3100)
    made, facts = make_rows(token_data(texts), rows="run_mlm", max_seq_length=128, num_proc=num_proc, **BERT)
    expected = plain_run_mlm(texts, 128, BERT, num_proc)
    assert made["input_ids"][:] == expected == made_by_map(texts, 128, BERT, num_proc)
    assert expected != plain_run_mlm(texts, 128, BERT)
    assert facts.tokens + facts.dropped_tokens == total(texts)


def test_more_processes_than_texts_are_as_many_as_texts() -> None:
    texts = corpus(3, longest=90)
    made, _ = make_rows(token_data(texts), rows="run_mlm", max_seq_length=20, num_proc=8, **BERT)
    assert made["input_ids"][:] == plain_run_mlm(texts, 20, BERT, 3)


@pytest.mark.parametrize("rows", ["chunked", "packed", "line", "run_mlm"])
def test_rows_of_tokens_on_disk_lie_beside_them_and_are_the_same_as_in_memory(rows: Any, tmp_path: Path) -> None:
    texts = corpus(1500)
    with ArrowWriter(path=str(tmp_path / "tokens.arrow"), fingerprint="tokens") as writer:
        writer.write_table(token_data(texts).data.table)
        writer.finalize()
    tokenized = Dataset.from_file(str(tmp_path / "tokens.arrow"))
    in_memory, facts = make_rows(token_data(texts), rows=rows, max_seq_length=50, **BERT)
    fingerprints = set()
    for length in (50, 50, 60):
        made, made_facts = make_rows(tokenized, rows=rows, max_seq_length=length, **BERT)
        fingerprints.add(made._fingerprint)
        assert Path(made.cache_files[0]["filename"]).parent == tmp_path
        if length == 50:
            assert made["input_ids"][:] == in_memory["input_ids"][:]
            assert made_facts == facts
    assert len(fingerprints) == 2  # equal rows have an equal fingerprint
    assert len(list(tmp_path.iterdir())) == 3  # the tokens, and one file for each length


def test_rows_are_lists_of_int32_in_large_arrow_pieces() -> None:
    made, _ = make_rows(token_data(corpus(30_000, longest=8)), max_seq_length=10, **BERT)
    assert made.column_names == ["input_ids", "document_numbers"]
    assert made.data.schema.field("input_ids").type == pa.list_(pa.int32())
    pieces = [len(piece) for piece in made.data["input_ids"].chunks]
    assert all(piece >= 1000 for piece in pieces[:-1])


def test_examples_in_the_documentation_are_right() -> None:
    result = doctest.testmod(packing)
    assert result.failed == 0
    assert result.attempted >= 10


@pytest.mark.parametrize("rows", ["chunked", "packed", "line", "run_mlm"])
def test_length_without_room_for_text_is_refused(rows: Any) -> None:
    with pytest.raises(ArgumentsError, match=r"max_seq_length is 2, and a row has 2 special tokens.*at least 3"):
        make_rows(token_data([[1]]), rows=rows, max_seq_length=2, **BERT)


def test_unknown_kind_of_rows_is_refused_with_the_choices() -> None:
    with pytest.raises(ArgumentsError, match=r"'lines'.*chunked, packed, line, run_mlm"):
        make_rows(token_data([[1]]), rows="lines", max_seq_length=9, **BERT)  # type: ignore[arg-type]


def test_too_short_a_text_for_run_mlm_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with ArrowWriter(path=str(tmp_path / "tokens.arrow"), fingerprint="tokens") as writer:
        writer.write_table(token_data([[1, 2, 3], [4, 5]]).data.table)
        writer.finalize()
    tokenized = Dataset.from_file(str(tmp_path / "tokens.arrow"))
    with pytest.raises(DataError, match=r"one row of 10 tokens: 2 texts with 5 tokens.*chunked or line.*smaller"):
        make_rows(tokenized, rows="run_mlm", max_seq_length=10, **BERT)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.arrow"]
    assert make_rows(tokenized, rows="run_mlm", max_seq_length=9, **BERT)[1].rows == 1


@pytest.mark.parametrize("texts", [[], [[], []]])
def test_no_tokens_at_all_are_refused(texts: list[list[int]]) -> None:
    for rows in ("chunked", "line"):
        with pytest.raises(DataError, match=f"the {len(texts)} texts given hold no tokens"):
            make_rows(token_data(texts), rows=rows, max_seq_length=9, **BERT)
