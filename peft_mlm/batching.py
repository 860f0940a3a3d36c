"""Which rows go into one batch: rows of like length, so that little is padded, in another order each epoch.

Rows are put into buckets by their length, shuffled within each, and cut into batches; what is left over in the buckets
is batched from the longest to the shortest. The number of batches is the same in every epoch, which the learning-rate
schedule counts on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow.compute as compute
from datasets import Dataset
from torch.utils.data import Sampler

from peft_mlm.document_packing import DOCUMENT_NUMBERS, gather

# Rows whose lengths share their leading bits go together: up to 16 tokens each length by itself, above that steps of an
# eighth to a sixteenth of the length, so that few tokens are padding and buckets stay few and full.
LENGTHS_PER_DOUBLING = 8

Indices = npt.NDArray[np.int64]


def row_lengths(rows: Dataset) -> Indices:
    """Give the number of tokens of each row.

    Args:
        rows: With `input_ids`.

    Returns:
        Lengths, (rows,).
    """
    # Piece by piece: the tokens stay where they are, on disk.
    lengths = np.asarray(compute.list_value_length(rows.data.column("input_ids")).to_numpy(), np.int64)
    return lengths if rows._indices is None else lengths[rows._indices.column(0).to_numpy()]


def clusters_of(rows: Dataset, order: Indices) -> tuple[Indices, int]:
    """Number the clusters that rows belong to: what was drawn independently, for standard errors.

    Rows with the column `document_numbers` name the document of each part of a row that is read on its own; all parts
    of a document are one cluster. Other rows are clusters of their own.

    Args:
        rows: With `input_ids`, and perhaps `document_numbers`.
        order: Numbers of the rows that are asked for, (n,).

    Returns:
        The clusters of these rows, one number for each part, in that order; and how many clusters all rows have.
    """
    if DOCUMENT_NUMBERS not in rows.column_names:
        return order, len(rows)
    column = rows.data.column(DOCUMENT_NUMBERS)
    if rows._indices is not None:
        column = column.take(rows._indices.column(0))
    names, numbers = np.unique(compute.list_flatten(column).to_numpy(), return_inverse=True)
    lengths = np.asarray(compute.list_value_length(column).to_numpy(), np.int64)
    return gather(numbers, lengths, order), len(names)


def bucket_lengths(lengths: Indices) -> Indices:
    """Round lengths up to those of their buckets.

    Example:
        >>> bucket_lengths(np.array([1, 7, 16, 17, 19, 33, 128]))
        array([  1,   7,  16,  18,  20,  36, 128])

    Args:
        lengths: Tokens per row, (rows,).

    Returns:
        The longest length of each row's bucket, (rows,).
    """
    below = np.maximum(lengths - 1, 1)
    step = np.maximum(1, 2 ** np.floor(np.log2(below)).astype(np.int64) // LENGTHS_PER_DOUBLING)
    return -(-lengths // step) * step


class LengthBatches(Sampler[list[int]]):
    """Batches of row numbers, by length.

    Args:
        lengths: Tokens per row, (rows,).
        batch_size: Rows per batch at most.
        max_tokens: Tokens per batch at most, padding included, in place of `batch_size`; a longer row is a batch of
            its own.
        seed: Decides, with the epoch, which rows meet and in which order.
        drop_last: Whether every batch has `batch_size` rows: what is over is left out, other rows in each epoch. It has
            no effect with `max_tokens`, whose batches differ in size.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        batch_size: int,
        max_tokens: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.batch_size, self.max_tokens, self.seed, self.drop_last = batch_size, max_tokens, seed, drop_last
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order: that of the epoch with this number, from 0."""
        self.batches = self._make(np.random.default_rng([self.seed, epoch]))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch.tolist()

    def _make(self, chance: np.random.Generator) -> list[Indices]:
        shuffled = chance.permutation(len(self.lengths))
        if self.drop_last and self.max_tokens is None:
            shuffled = shuffled[: len(shuffled) // self.batch_size * self.batch_size]
        buckets = bucket_lengths(self.lengths[shuffled])
        full: list[Indices] = []
        left: list[Indices] = []
        for bucket in np.unique(buckets)[::-1]:
            rows, size = shuffled[buckets == bucket], self._rows_of(int(bucket))
            whole = len(rows) // size * size
            full += list(rows[:whole].reshape(-1, size))
            left.append(rows[whole:])
        batches = full + self._cut(np.concatenate(left) if left else shuffled)
        # The longest first: what does not fit into memory fails at once.
        longest = max(range(len(batches)), key=lambda number: int(self.lengths[batches[number]].max()), default=0)
        order = [longest, *(number for number in chance.permutation(len(batches)) if number != longest)]
        return [batches[number] for number in order] if batches else []

    def _rows_of(self, tokens: int) -> int:
        return self.batch_size if self.max_tokens is None else max(1, self.max_tokens // tokens)

    def _cut(self, rows: Indices) -> list[Indices]:
        """Cut rows that go from the longest bucket to the shortest; the first of a batch decides its size."""
        batches = []
        while len(rows):
            batches.append(rows[: self._rows_of(int(bucket_lengths(self.lengths[rows[:1]])[0]))])
            rows = rows[len(batches[-1]) :]
        return batches
