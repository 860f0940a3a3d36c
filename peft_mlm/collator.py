"""Rows to a masked batch, by hashing instead of drawing random numbers.

Each position of each row gets its random numbers from a hash of (row, position, stream), as counter-based generators do
(Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405). There is no generator whose state could differ: not
between batch sizes, orders, worker processes or resumed runs, and the global generators are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from peft_mlm.document_packing import DOCUMENT_LENGTHS
from peft_mlm.errors import ArgumentsError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
# What a batch holds where rows hold documents side by side.
DOCUMENT_IDS = "document_ids"

Hashes = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The constants of SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# The streams: three random numbers per position. Far from epochs and slots, which are hashed into the row's key.
_SELECT, _KIND, _TOKEN = 2**63, 2**63 + 1, 2**63 + 2
# What sets further draws of evaluation masks apart from epochs and streams.
_DRAW = 2**63 + 3


class MaskingCollator:
    """Pads rows to a batch, and masks it for masked language modelling.

    Of the tokens that are not special, each is selected with `mlm_probability` on its own. A selected token becomes the
    mask token with `mask_replace_prob`, a random token with `random_replace_prob`, else it stays as it is; its label is
    the token that was there. All other labels are -100. Random tokens are drawn evenly from the tokens that are not
    special (transformers' collator also draws special tokens, such as padding).

    Special tokens, the unknown and the mask token included, are never selected, wherever they stand in a row.

    Masks for evaluation (`fixed=True`) depend on the row's tokens and on the seed alone: a row has the same masks at
    every pass, in whatever batch, order, padding, process or run; `drawn` gives further masks of the same kind. Masks
    for training depend on the epoch and on the
    row's place in its batch too: they are new in each epoch, two equal rows in a batch have different ones, and a run
    that is resumed goes on with the same ones. `set_epoch` reaches the worker processes of a DataLoader that are alive.

    Where a row holds several documents side by side, all this is said of each document: for evaluation it is masked as
    it would be in a row of its own.

    A pickled copy has an epoch of its own; the copies that torch sends to worker processes share one.

    Args:
        mask_id: The mask token.
        pad_id: The padding token.
        special_ids: All special tokens. `mask_id` and `pad_id` count as special in any case.
        vocab_size: Number of tokens that the tokenizer knows; ids from 0 to vocab_size - 1.
        padding_side: right (default) or left.
        mlm_probability: Share of the tokens to predict, above 0, at most 1. Default 0.15.
        mask_replace_prob: Share of these that become the mask token. Default 0.8.
        random_replace_prob: Share of these that become a random token. Default 0.1.
        seed: Any integer; it counts modulo 2^64. Default 0.
        fixed: Whether masks depend on content and seed alone (evaluation). Default False.
        pad_to: Length of every batch; None (default) for the longest row of each batch.
        pad_to_multiple_of: Pads on to a multiple of this many tokens; None (default) for no such thing.

    Raises:
        ArgumentsError: If a share or a length is out of range; all faults together.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        pad_id: int,
        special_ids: Sequence[int],
        vocab_size: int,
        padding_side: str = "right",
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        seed: int = 0,
        fixed: bool = False,
        pad_to: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.mask_id = mask_id
        self.pad_id = pad_id
        self.padding_side = padding_side
        self.mlm_probability = mlm_probability
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self.seed = seed
        self.fixed = fixed
        self.draw = 0
        self.pad_to = pad_to
        self.pad_to_multiple_of = pad_to_multiple_of
        self.special_ids = np.unique(np.array([*special_ids, mask_id, pad_id], np.int64))
        self.random_ids = np.setdiff1d(np.arange(vocab_size, dtype=np.int64), self.special_ids)
        if faults := self._faults():
            raise ArgumentsError(faults)
        # Shared memory: worker processes that live through several epochs see the new epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a plain pickle holds the number only

    def _faults(self) -> list[str]:
        """Name every option that is out of range."""
        faults = []
        if not 0 < self.mlm_probability <= 1:
            faults.append(f"mlm_probability is {self.mlm_probability}: give a share above 0, at most 1, such as 0.15.")
        for name in ("mask_replace_prob", "random_replace_prob"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} is {getattr(self, name)}: give a share from 0 to 1.")
        # Not `> 1` alone: 0.9 + 0.1 may come out a rounding error above 1.
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            faults.append(
                f"mask_replace_prob ({self.mask_replace_prob}) and random_replace_prob ({self.random_replace_prob}) "
                "are shares of the same tokens: together they must be at most 1."
            )
        if self.padding_side not in ("left", "right"):
            faults.append(f"padding_side is {self.padding_side!r}: choose left or right.")
        for name in ("pad_to", "pad_to_multiple_of"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                faults.append(f"{name} is {getattr(self, name)}: give 1 or more, or leave it out.")
        if self.random_replace_prob > 0 and len(self.random_ids) == 0:
            faults.append("Every token of the vocabulary is special: set random_replace_prob to 0.")
        return faults

    @property
    def epoch(self) -> int:
        """The epoch that training masks are made for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which training masks depend on.

        Args:
            epoch: Number of the epoch; the first is 0. Set it before the batches of the epoch are asked for.
        """
        self._epoch.fill_(epoch)

    def drawn(self, number: int) -> MaskingCollator:
        """Give a collator whose masks for evaluation are other ones, fixed just as these.

        Args:
            number: Number of the draw; 0 gives the masks of a collator that was not asked.

        Returns:
            A copy of this one.
        """
        other = copy.copy(self)
        other.draw = number
        return other

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows: B rows, each with `input_ids` (a list, an array or a tensor of ids), and `document_lengths` where it
                holds documents side by side (tokens of each; their sum is the row's); other keys are not read.

        Returns:
            `input_ids`, `attention_mask` and `labels`: int64 tensors of shape (B, T), T the length of the longest row,
            or `pad_to`, up to a multiple of `pad_to_multiple_of`. With documents side by side `document_ids` too, the
            number of each token's document in its row, from 1; 0 for padding.

        Raises:
            DataError: If a row is longer than `pad_to`.
        """
        ids = np.concatenate([np.asarray(row["input_ids"], np.int64) for row in rows])
        row_lengths = np.fromiter((len(row["input_ids"]) for row in rows), np.int64, len(rows))
        in_row = self._places_of_rows(row_lengths)
        packed = any(DOCUMENT_LENGTHS in row for row in rows)
        per_row = [np.asarray(row.get(DOCUMENT_LENGTHS, [len(row["input_ids"])]), np.int64) for row in rows]
        masked, labels = self._mask(ids, np.concatenate(per_row) if packed else row_lengths)
        batch = {
            "input_ids": _spread(masked, in_row, self.pad_id),
            "attention_mask": torch.from_numpy(in_row.astype(np.int64)),
            "labels": _spread(labels, in_row, IGNORE_INDEX),
        }
        if packed:
            numbers = np.concatenate([np.repeat(np.arange(1, len(one) + 1), one) for one in per_row])
            batch[DOCUMENT_IDS] = _spread(numbers, in_row, 0)
        return batch

    def _mask(self, ids: Ids, lengths: Ids) -> tuple[Ids, Ids]:
        """Mask documents that lie end to end: the ids that the model sees, and the labels."""
        starts = np.cumsum(lengths) - lengths
        places = np.arange(len(ids)) - np.repeat(starts, lengths)
        keys = np.repeat(self._keys(ids, places, starts, lengths), lengths)
        masked, labels = ids.copy(), np.full(len(ids), IGNORE_INDEX, np.int64)
        # From here on, only what may be selected is looked at, then only what is.
        chosen = np.flatnonzero(~np.isin(ids, self.special_ids))
        chosen = chosen[_uniform(keys[chosen], places[chosen], _SELECT) < self.mlm_probability]
        labels[chosen] = ids[chosen]
        keys, places = keys[chosen], places[chosen]
        kind = _uniform(keys, places, _KIND)
        to_mask = kind < self.mask_replace_prob
        masked[chosen[to_mask]] = self.mask_id
        to_random = ~to_mask & (kind < self.mask_replace_prob + self.random_replace_prob)
        drawn = _uniform(keys[to_random], places[to_random], _TOKEN) * len(self.random_ids)
        masked[chosen[to_random]] = self.random_ids[drawn.astype(np.int64)]
        return masked, labels

    def _places_of_rows(self, lengths: Ids) -> Flags:
        """Lay rows into a matrix, (B, T): true where it is not padding."""
        width = int(lengths.max())
        if self.pad_to is not None and width > self.pad_to:
            raise DataError(
                f"A row has {width} tokens, and rows are padded to {self.pad_to}. Make rows of at most {self.pad_to} "
                "tokens (max_seq_length), or pad to a greater length."
            )
        width = self.pad_to or width
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        places = np.broadcast_to(np.arange(width), (len(lengths), width))
        if self.padding_side == "left":
            places = places - (width - lengths[:, None])
        return (places >= 0) & (places < lengths[:, None])

    def _keys(self, ids: Ids, places: Ids, starts: Ids, lengths: Ids) -> Hashes:
        """Hash each document's tokens in their order, and what else its masks depend on: one key for each."""
        tokens = np.zeros(len(ids) + 1, np.uint64)
        np.cumsum(_hash(ids.astype(np.uint64), places.astype(np.uint64)), out=tokens[1:])
        # A sum from one place to another modulo 2^64 is the difference of the sums up to them.
        keys = _hash(tokens[starts + lengths] - tokens[starts], lengths.astype(np.uint64))
        keys = _hash(keys, self.seed)
        if self.fixed and self.draw:
            return _hash(_hash(keys, _DRAW), self.draw)
        return keys if self.fixed else _hash(_hash(keys, self.epoch), np.arange(len(lengths), dtype=np.uint64))


def from_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    mlm_probability: float = 0.15,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
    seed: int = 0,
    fixed: bool = False,
    pad_to: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> MaskingCollator:
    """Build the collator for the rows of a tokenizer.

    Args:
        tokenizer: A tokenizer with a mask token and a padding token.
        mlm_probability: Share of the tokens to predict. Default 0.15.
        mask_replace_prob: Share of these that become the mask token. Default 0.8.
        random_replace_prob: Share of these that become a random token. Default 0.1.
        seed: Any integer; it counts modulo 2^64. Default 0.
        fixed: Whether masks depend on content and seed alone (evaluation). Default False.
        pad_to: Length of every batch; None (default) for the longest row of each batch.
        pad_to_multiple_of: Pads on to a multiple of this many tokens; None (default) for no such thing.

    Returns:
        The collator.

    Raises:
        ModelError: If the tokenizer has no mask token or no padding token.
        ArgumentsError: As `MaskingCollator`.
    """
    for name, needed_for in (("mask", "masked language model"), ("pad", "batch of rows of different lengths")):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ModelError(
                f"A {needed_for} needs a {name} token, and this tokenizer ({type(tokenizer).__name__}) has none. "
                "Choose the tokenizer of a masked language model, or set one: "
                f'tokenizer.add_special_tokens({{"{name}_token": "[{name.upper()}]"}}).'
            )
    return MaskingCollator(
        mask_id=tokenizer.mask_token_id,
        pad_id=tokenizer.pad_token_id,
        special_ids=special_ids_of(tokenizer),
        vocab_size=len(tokenizer),
        padding_side=tokenizer.padding_side,
        mlm_probability=mlm_probability,
        mask_replace_prob=mask_replace_prob,
        random_replace_prob=random_replace_prob,
        seed=seed,
        fixed=fixed,
        pad_to=pad_to,
        pad_to_multiple_of=pad_to_multiple_of,
    )


def special_ids_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List special tokens: those with a role, and those added as special, which `all_special_ids` may leave out.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        Their ids, some twice.
    """
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return [*tokenizer.all_special_ids, *added]


def _spread(values: Ids, in_row: Flags, padding: int) -> torch.Tensor:
    """Lay the values of rows that lie end to end into a padded matrix."""
    matrix = np.full(in_row.shape, padding, np.int64)
    matrix[in_row] = values
    return torch.from_numpy(matrix)


def _mix(values: Hashes) -> Hashes:
    """Scramble 64-bit numbers, one to one: the finaliser of SplitMix64. Arrays only, whose overflow is silent."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _hash(values: Hashes, more: Hashes | int) -> Hashes:
    """Hash an array together with a second number for each of its items (or one for all)."""
    if isinstance(more, int):
        more = np.array([more % 2**64], np.uint64)
    return _mix(_mix(values + _GOLDEN) + (more + np.uint64(1)) * _GOLDEN)


def _uniform(keys: Hashes, places: Ids, stream: int) -> npt.NDArray[np.float64]:
    """Give one random number in [0, 1), a multiple of 2^-53, for each (row key, place in the row, stream)."""
    bits = _hash(_hash(keys, stream), places.astype(np.uint64)) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
