"""Which documents stand side by side in a row: best fit, the longest first.

Documents are packed a window at a time, so that memory does not grow with the corpus. Best-fit decreasing is within
22 % of the fewest rows at worst (Johnson et al. 1974, https://doi.org/10.1137/0203025), and within one or two per cent
on documents of mixed lengths.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

# Column of a row that holds documents side by side: the tokens of each, special tokens included.
DOCUMENT_LENGTHS = "document_lengths"
# Column of a row that tells which text each of its parts is from: rows of one text are not independent of each other.
DOCUMENT_NUMBERS = "document_numbers"
# Documents packed together. Some hundred already fill rows well; the last row of a window is all that more would save.
WINDOW = 8192

Lengths = npt.NDArray[np.int64]
Numbers = TypeVar("Numbers", bound=npt.NDArray[np.integer[Any]])


def cut_documents(lengths: Lengths, capacity: int) -> Lengths:
    """Cut documents that are longer than a row into pieces, which lie where the documents lay.

    Example:
        >>> cut_documents(np.array([3, 11, 5]), 5).tolist()
        [3, 5, 5, 1, 5]

    Args:
        lengths: Tokens of each document; those without any give no piece.
        capacity: Tokens per row.

    Returns:
        Tokens of each piece, from 1 to `capacity`.
    """
    pieces = -(-lengths // capacity)
    cut = np.full(int(pieces.sum()), capacity, np.int64)
    last = np.cumsum(pieces)[pieces > 0] - 1
    cut[last] = (lengths - (pieces - 1) * capacity)[pieces > 0]
    return cut


def pack(lengths: Lengths, capacity: int) -> tuple[Lengths, Lengths]:
    """Put documents into rows, best fit, the longest first.

    Rows come in the order of their first documents, and each holds its documents in their own order.

    Example:
        >>> order, per_row = pack(np.array([3, 9, 6, 1]), 10)
        >>> order.tolist(), per_row.tolist()
        ([0, 2, 3, 1], [3, 1])

    Args:
        lengths: Tokens of each document, from 1 to `capacity`.
        capacity: Tokens per row.

    Returns:
        The numbers of the documents, row by row, and how many stand in each row.
    """
    row_of = _best_fit(lengths, capacity)
    rows = int(row_of.max(initial=-1)) + 1
    first = np.full(rows, len(lengths), np.int64)
    np.minimum.at(first, row_of, np.arange(len(lengths)))
    rank = np.empty(rows, np.int64)
    rank[np.argsort(first)] = np.arange(rows)
    order = np.argsort(rank[row_of], kind="stable")
    return order, np.bincount(rank[row_of], minlength=rows)


def gather(content: Numbers, lengths: Lengths, order: Lengths) -> Numbers:
    """Bring documents that lie end to end into another order.

    Example:
        >>> gather(np.array([1, 2, 3, 4, 5, 6], np.int32), np.array([3, 1, 2]), np.array([2, 0, 1])).tolist()
        [5, 6, 1, 2, 3, 4]

    Args:
        content: Tokens of the documents.
        lengths: Tokens per document.
        order: Numbers of the documents, as they shall lie.

    Returns:
        The tokens in that order.
    """
    starts, wanted = np.cumsum(lengths) - lengths, lengths[order]
    shift = starts[order] - (np.cumsum(wanted) - wanted)
    places = np.arange(wanted.sum()) + np.repeat(shift, wanted)
    return content[places]


def _best_fit(lengths: Lengths, capacity: int) -> Lengths:
    """Give the row of each document: that with the least room that is enough, or a new one.

    Rows wait in a stack for each number of free tokens; the bits of one number tell which stacks hold a row, so that
    the next larger one is found at once.
    """
    row_of = np.empty(len(lengths), np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    held = 0
    rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for document, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        enough = held >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                held ^= 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        row_of[document] = row
        left = room - length
        if left:
            waiting[left].append(row)
            held |= 1 << left
    return row_of
