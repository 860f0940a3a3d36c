from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mlm.batching import LengthBatches, bucket_lengths, clusters_of, row_lengths
from peft_mlm.document_packing import DOCUMENT_NUMBERS


def test_lengths_are_those_of_the_rows_whatever_their_order_and_pieces():
    rows = [list(range(number % 7)) for number in range(50)]
    data = concatenate_datasets([Dataset.from_dict({"input_ids": part}) for part in (rows[:20], rows[20:])])
    for some in (data, data.select(range(5, 30)), data.select([49, 3, 21, 3]), data.shuffle(seed=1), data.select([])):
        assert row_lengths(some).tolist() == [len(ids) for ids in some["input_ids"]]


LENGTHS = st.lists(st.integers(1, 130), max_size=150)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 40), max_tokens=st.none() | st.integers(1, 500))
def test_every_row_is_in_exactly_one_batch_and_their_number_is_that_of_every_epoch(lengths, batch_size, max_tokens):
    batches = LengthBatches(lengths, batch_size=batch_size, max_tokens=max_tokens, seed=1)
    count = len(batches)
    for epoch in range(3):
        batches.set_epoch(epoch)
        made = list(batches)
        assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
        assert len(made) == len(batches) == count


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 40))
def test_no_batch_is_larger_than_asked_and_at_least_as_many_are_full_as_can_be(lengths, batch_size):
    sizes = [len(batch) for batch in LengthBatches(lengths, batch_size=batch_size)]
    assert all(size <= batch_size for size in sizes)
    assert len(sizes) == -(-len(lengths) // batch_size)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(8, 500))
def test_padded_tokens_stay_below_the_limit_unless_one_row_is_longer(lengths, max_tokens):
    for batch in LengthBatches(lengths, batch_size=4, max_tokens=max_tokens):
        longest = max(lengths[row] for row in batch)
        assert longest * len(batch) <= max_tokens or len(batch) == 1


def test_buckets_hold_their_rows_with_an_eighth_of_padding_at_most_and_stay_few():
    lengths = np.arange(1, 4097)
    rounded = bucket_lengths(lengths)
    assert (rounded >= lengths).all()
    assert ((rounded - lengths) / lengths).max() < 1 / 8
    assert len(np.unique(rounded)) < 100
    assert (bucket_lengths(rounded) == rounded).all()


def test_the_longest_row_comes_first_and_little_is_padded():
    lengths = np.random.default_rng(0).integers(5, 128, size=5000)
    batches = list(LengthBatches(lengths, batch_size=32))
    assert lengths.max() in lengths[batches[0]]
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded / lengths.sum() < 1.06
    in_order = lengths.reshape(-1, 50).max(axis=1).sum() * 50  # batches of rows as they come
    assert in_order / lengths.sum() > 1.8


def test_an_epoch_is_repeatable_and_another_one_has_other_batches():
    lengths = np.random.default_rng(0).integers(5, 60, size=400)

    def batches(seed: int, epoch: int) -> list[tuple[int, ...]]:
        sampler = LengthBatches(lengths, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return [tuple(batch) for batch in sampler]

    assert batches(0, 3) == batches(0, 3)
    assert len(set(batches(0, 0)) & set(batches(0, 1))) < 3
    assert len(set(batches(0, 0)) & set(batches(1, 0))) < 3


def test_rows_meet_others_of_their_length_in_each_epoch():
    sampler = LengthBatches([8] * 64, batch_size=8)
    met: set[int] = set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        met |= {row for batch in sampler if 0 in batch for row in batch}
    assert len(met) == pytest.approx(64, abs=4)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 40))
def test_only_full_batches_are_left_where_the_last_one_is_dropped(lengths, batch_size):
    batches = LengthBatches(lengths, batch_size=batch_size, drop_last=True)
    for epoch in range(3):
        batches.set_epoch(epoch)
        made = [row for batch in batches for row in batch]
        assert {len(batch) for batch in batches} <= {batch_size}
        assert len(batches) == len(lengths) // batch_size
        assert len(set(made)) == len(made) == len(batches) * batch_size


def test_the_rows_that_are_dropped_are_others_in_each_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, size=70)
    batches, kept = LengthBatches(lengths, batch_size=32, drop_last=True), set()
    for epoch in range(40):
        batches.set_epoch(epoch)
        kept |= {row for batch in batches for row in batch}
    assert kept == set(range(70))  # short ones too, which are batched last


def test_nothing_is_dropped_where_batches_are_made_by_tokens():
    lengths = np.random.default_rng(0).integers(5, 60, size=70)
    batches = LengthBatches(lengths, batch_size=32, max_tokens=700, drop_last=True)
    assert sorted(row for batch in batches for row in batch) == list(range(70))


def test_rows_of_one_text_are_one_cluster_in_whatever_order_and_through_an_index() -> None:
    numbers = [[3, 1], [3], [7], [1, 7, 2]]
    rows = Dataset.from_dict({"input_ids": [[5, 5], [5], [5], [5, 5, 5]], DOCUMENT_NUMBERS: numbers})
    order = np.array([3, 0, 1, 2])
    clusters, count = clusters_of(rows, order)
    assert count == 4
    assert clusters.tolist() == [0, 3, 1, 2, 0, 2, 3]  # numbers 1, 2, 3, 7
    backwards = rows.select([3, 2, 1, 0])
    assert clusters_of(backwards, np.array([0, 3, 2, 1]))[0].tolist() == clusters.tolist()
    plain = rows.remove_columns(DOCUMENT_NUMBERS)
    clusters, count = clusters_of(plain, order)
    assert (clusters.tolist(), count) == ([3, 0, 1, 2], 4)
