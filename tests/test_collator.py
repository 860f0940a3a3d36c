from __future__ import annotations

import itertools
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from peft_mlm.collator import IGNORE_INDEX, MaskingCollator
from peft_mlm.errors import DataError

PAD, UNK, CLS, SEP, MASK = range(5)
VOCABULARY = 1005
SPECIAL = (PAD, UNK, CLS, SEP, MASK)

ALL_RANDOM = {"mlm_probability": 1.0, "mask_replace_prob": 0.0, "random_replace_prob": 1.0}

Row = dict[str, list[int]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def collator(**options: Any) -> MaskingCollator:
    facts: dict[str, Any] = {"mask_id": MASK, "pad_id": PAD, "special_ids": SPECIAL, "vocab_size": VOCABULARY}
    return MaskingCollator(**facts | options)


def make_rows(rows: int, length: int | None = None, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    lengths = [length or draw.randrange(1, 60) for _ in range(rows)]
    return [{"input_ids": [CLS, *(draw.randrange(5, VOCABULARY) for _ in range(n)), SEP]} for n in lengths]


def unpadded(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Input and labels of each row, without padding."""
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    return [(ids[mask].tolist(), labels[mask].tolist()) for ids, labels, mask in rows]


def selection(batch: dict[str, torch.Tensor]) -> Flags:
    return (batch["labels"] != IGNORE_INDEX).numpy()


def binomial_bounds(n: int, p: float, beyond: float = 1e-6) -> tuple[int, int]:
    """The counts that n draws with chance p stay between, but for a chance of at most `beyond` on each side."""

    def chance(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))

    width = int(20 * math.sqrt(n * p * (1 - p)) + 20)
    low, high = max(0, int(n * p) - width), min(n, int(n * p) + width)
    below = above = 0.0
    while (below := below + chance(low)) < beyond:
        low += 1
    while (above := above + chance(high)) < beyond:
        high -= 1
    return low, high


def assert_share(count: int, n: int, p: float) -> None:
    low, high = binomial_bounds(n, p)
    assert low <= count <= high, f"{count} of {n} is {count / n:.5f}, expected {p} ({low} to {high})"


def assert_independent(a: Flags, b: Flags) -> None:
    """Chi-square test of a table of two by two; by chance it fails once in a million."""
    table = np.array([[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]], np.float64)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert float(((table - expected) ** 2 / expected).sum()) < 24


def assert_even(counts: np.ndarray[Any, Any], variance: float) -> None:
    """Chi-square test of many counts around their mean: five standard deviations."""
    statistic = float(((counts - counts.mean()) ** 2).sum() / variance)
    assert abs(statistic - (len(counts) - 1)) < 5 * math.sqrt(2 * len(counts))


# ---------------------------------------------------------------- the batch


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_is_the_rows_padded_with_labels_at_masked_places(fixed: bool, side: str) -> None:
    rows = make_rows(40)
    batch = collator(fixed=fixed, padding_side=side)(rows)
    width = max(len(row["input_ids"]) for row in rows)
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].shape == (40, width)
        assert batch[name].dtype == torch.int64
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        inside = slice(0, length) if side == "right" else slice(width - length, width)
        mask = torch.zeros(width, dtype=torch.bool)
        mask[inside] = True
        assert batch["attention_mask"][number].tolist() == mask.long().tolist()
        assert batch["input_ids"][number][~mask].tolist() == [PAD] * (width - length)
        assert batch["labels"][number][~mask].tolist() == [IGNORE_INDEX] * (width - length)
        original, labels = torch.tensor(row["input_ids"]), batch["labels"][number][mask]
        masked = labels != IGNORE_INDEX
        assert labels[masked].tolist() == original[masked].tolist()
        assert batch["input_ids"][number][mask][~masked].tolist() == original[~masked].tolist()
        assert not masked[0]
        assert not masked[-1]


def test_rows_may_be_lists_arrays_tensors_or_rows_of_a_data_set() -> None:
    rows = make_rows(5)
    expected = collator()(rows)
    data = Dataset.from_dict({"input_ids": [row["input_ids"] for row in rows], "other": list("abcde")})
    for same in (
        [{"input_ids": np.array(row["input_ids"], np.int32)} for row in rows],
        [{"input_ids": torch.tensor(row["input_ids"])} for row in rows],
        [data[number] for number in range(5)],
        [data.with_format("torch")[number] for number in range(5)],
    ):
        batch = collator()(same)
        assert list(batch) == ["input_ids", "attention_mask", "labels"]
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_the_rows_given_are_left_as_they_are() -> None:
    rows = [{"input_ids": np.arange(5, 105)} for _ in range(3)]
    batch = collator(mlm_probability=1.0)(rows)
    assert (batch["labels"] != batch["input_ids"]).any()
    assert all((row["input_ids"] == np.arange(5, 105)).all() for row in rows)


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 13),
        ({"pad_to": 40}, 40),
        ({"pad_to_multiple_of": 8}, 16),
        ({"pad_to_multiple_of": 13}, 13),
        ({"pad_to": 20, "pad_to_multiple_of": 8}, 24),
    ],
)
def test_padding_options_set_the_length_of_the_batch(options: dict[str, int], width: int) -> None:
    rows = [{"input_ids": [CLS, *range(10, 21), SEP]}, {"input_ids": [CLS, 7, SEP]}]
    batch = collator(**options)(rows)
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(1).tolist() == [13, 3]


def test_row_longer_than_pad_to_is_refused() -> None:
    with pytest.raises(DataError, match=r"A row has 13 tokens, and rows are padded to 12.*max_seq_length"):
        collator(pad_to=12)([{"input_ids": [CLS, *range(10, 21), SEP]}])


def test_special_tokens_are_never_selected_wherever_they_stand() -> None:
    rows = [{"input_ids": [CLS, 50, UNK, 60, MASK, SEP, 70, PAD, 80, SEP]}, {"input_ids": [CLS, SEP]}]
    batch = collator(mlm_probability=1.0)(rows)
    assert batch["labels"].tolist() == [[-100, 50, -100, 60, -100, -100, 70, -100, 80, -100], [-100] * 10]
    assert batch["attention_mask"].tolist() == [[1] * 10, [1, 1] + [0] * 8]


def test_rows_without_anything_to_select_come_back_as_they_are() -> None:
    batch = collator(mlm_probability=1.0)([{"input_ids": [CLS, UNK, SEP]}, {"input_ids": []}])
    assert batch["input_ids"].tolist() == [[CLS, UNK, SEP], [PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 3] * 2


# ---------------------------------------------------------------- rates and independence


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    ("selected", "mask", "rand"), [(0.15, 0.8, 0.1), (0.4, 1.0, 0.0), (0.3, 0.0, 0.0), (0.3, 0.0, 1.0), (1.0, 0.5, 0.5)]
)
def test_shares_are_those_asked_for(fixed: bool, selected: float, mask: float, rand: float) -> None:
    rows = make_rows(1000, length=500)
    made = collator(fixed=fixed, mlm_probability=selected, mask_replace_prob=mask, random_replace_prob=rand)(rows)
    chosen = selection(made)
    ids, labels = made["input_ids"].numpy()[chosen], made["labels"].numpy()[chosen]
    count = len(labels)
    if selected == 1:
        assert count == 1000 * 500
    else:
        assert_share(count, 1000 * 500, selected)
    masked, kept = int(np.sum(ids == MASK)), int(np.sum(ids == labels))
    for number, share in ((masked, mask), (kept, 1 - mask - rand + rand / 1000)):
        if share == 0 or share == 1:
            assert number == count * share
        else:
            assert_share(number, count, share)


def test_random_tokens_are_drawn_evenly_from_the_tokens_that_are_not_special() -> None:
    special = (0, 1, 2, 500, 1004)
    made = collator(special_ids=special, pad_id=0, mask_id=1, **ALL_RANDOM)
    ids = made([{"input_ids": [7] * 512} for _ in range(1000)])["input_ids"].numpy()
    counts = np.bincount(ids.ravel(), minlength=VOCABULARY)
    assert counts[list(special)].sum() == 0
    drawn = np.delete(counts, special)
    assert len(drawn) == 1000
    assert_even(drawn, 512_000 / 1000)


@pytest.mark.parametrize("fixed", [True, False])
def test_selections_are_independent_of_position_token_and_neighbours(fixed: bool) -> None:
    rows = make_rows(1000, length=500)
    tokens = np.array([row["input_ids"] for row in rows])[:, 1:-1]
    chosen = selection(collator(fixed=fixed, mlm_probability=0.3)(rows))[:, 1:-1]
    for lag in (1, 2, 7, 64):
        assert_independent(chosen[:, lag:], chosen[:, :-lag])
        assert_independent(chosen[lag:], chosen[:-lag])
    assert_independent(chosen, tokens % 2 == 0)
    assert_independent(chosen, tokens > 500)
    assert_even(chosen.sum(0), 1000 * 0.3 * 0.7)
    assert_even(chosen.sum(1), 500 * 0.3 * 0.7)


@pytest.mark.parametrize("fixed", [True, False])
def test_what_becomes_of_a_token_is_independent_of_why_it_was_selected(fixed: bool) -> None:
    rows = make_rows(1000, length=500)

    def made(**options: float) -> tuple[Flags, Any]:
        batch = collator(fixed=fixed, **options)(rows)
        return selection(batch), batch["input_ids"].numpy()

    half, ids = made(mlm_probability=0.5, mask_replace_prob=0.5, random_replace_prob=0.0)
    quarter, _ = made(mlm_probability=0.25)
    assert not (quarter & ~half).any()  # a lower share selects a part of the same: its numbers are the lower ones
    assert_independent(quarter[half], (ids == MASK)[half])
    _, random_ids = made(**ALL_RANDOM)
    assert_independent(quarter[half], (random_ids > 500)[half])
    # The same for the second draw against the third: where a quarter is masked, and what the random token would be.
    _, masked = made(mlm_probability=1.0, mask_replace_prob=0.25, random_replace_prob=0.0)
    assert_independent((masked == MASK)[:, 1:-1], (random_ids > 500)[:, 1:-1])


# ---------------------------------------------------------------- evaluation masks


def test_evaluation_masks_depend_on_content_and_seed_alone() -> None:
    rows = make_rows(64)
    whole = unpadded(collator(fixed=True)(rows))
    for other in (collator(fixed=True), collator(fixed=True, padding_side="left"), collator(fixed=True, pad_to=99)):
        other.set_epoch(5)
        assert unpadded(other(rows)) == whole
        assert unpadded(other(rows[::-1])) == whole[::-1]
        assert [unpadded(other([row]))[0] for row in rows] == whole
        assert [row for first in range(0, 64, 7) for row in unpadded(other(rows[first : first + 7]))] == whole
    assert unpadded(collator(fixed=True, seed=1)(rows)) != whole


def test_evaluation_masks_are_the_same_in_every_version() -> None:
    # Figures of two runs compare only if their masks do: this row was masked when the function was written.
    batch = collator(fixed=True, mlm_probability=0.4, vocab_size=105)([{"input_ids": [CLS, *range(10, 30), SEP]}])
    before = [10, 101, MASK, MASK, 14, MASK, 16, 17, MASK, MASK, 20, 21, 22, 23, 24, MASK, MASK, 27, 28, MASK]
    assert batch["input_ids"].tolist() == [[CLS, *before, SEP]]
    assert [label for label in batch["labels"][0].tolist() if label >= 0] == [11, 12, 13, 15, 18, 19, 20, 25, 26, 29]


def test_further_draws_are_fixed_unrelated_masks_and_draw_0_is_the_first() -> None:
    rows, first = make_rows(64), collator(fixed=True)
    drawn = [unpadded(first.drawn(number)(rows)) for number in range(4)]
    assert drawn[0] == unpadded(first(rows))
    assert unpadded(first.drawn(3).drawn(0)(rows)) == drawn[0]
    for number, masks in enumerate(drawn):
        assert unpadded(collator(fixed=True, pad_to=99).drawn(number)(rows[::-1])) == masks[::-1]
        assert [unpadded(first.drawn(number)([row]))[0] for row in rows] == masks
    long = make_rows(100, length=500)
    chosen = [selection(first.drawn(number)(long))[:, 1:-1] for number in range(4)]
    for one, other in itertools.combinations(chosen, 2):
        assert_independent(one, other)
    assert_independent(chosen[1], selection(collator(fixed=True, seed=1)(long))[:, 1:-1])
    training = collator(fixed=False)
    assert unpadded(training.drawn(2)(rows)) == unpadded(training(rows))


def test_evaluation_is_the_same_for_other_shares_where_they_agree() -> None:
    rows = make_rows(64)
    lower, higher = (selection(collator(fixed=True, mlm_probability=p)(rows)) for p in (0.15, 0.5))
    assert higher[lower].all()


@pytest.mark.parametrize("fixed", [True, False])
def test_rows_that_differ_in_one_token_have_unrelated_masks(fixed: bool) -> None:
    length = 1000
    row = make_rows(1, length)[0]["input_ids"]
    others = []
    for place in range(1, 401):
        other = row.copy()
        other[place] = 5 + (other[place] - 4) % 1000
        others.append({"input_ids": other})
    swapped = row.copy()
    swapped[3], swapped[9] = swapped[9], swapped[3]
    made = collator(fixed=fixed, mlm_probability=0.5)
    first, *rest = (selection(made([one]))[0, 1:-1] for one in ({"input_ids": row}, {"input_ids": swapped}, *others))
    for chosen in rest:
        assert_independent(first, chosen)
    assert_share(int(sum(np.sum(first & chosen) for chosen in rest)), len(rest) * int(first.sum()), 0.5)


# ---------------------------------------------------------------- training masks


def test_training_masks_are_new_in_each_epoch_and_repeat_on_return() -> None:
    rows = make_rows(200, length=500)
    made = collator(mlm_probability=0.5)
    chosen = []
    for epoch in (0, 1, 2, 0):
        made.set_epoch(epoch)
        assert made.epoch == epoch
        chosen.append(selection(made(rows))[:, 1:-1])
    assert (chosen[0] == chosen[3]).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert_independent(chosen[a], chosen[b])


def test_training_masks_are_unrelated_to_evaluation_masks_and_to_those_of_other_seeds() -> None:
    rows = make_rows(200, length=500)
    options: list[dict[str, Any]] = [
        {"fixed": True},
        {},
        {"seed": 1},
        {"seed": -1},
        {"seed": 2**70 + 7},
        {"seed": 1, "fixed": True},
    ]
    chosen = [selection(collator(mlm_probability=0.5, **option)(rows))[:, 1:-1] for option in options]
    for number, first in enumerate(chosen):
        for second in chosen[number + 1 :]:
            assert_independent(first, second)


def test_equal_rows_of_a_training_batch_have_unrelated_masks() -> None:
    rows = make_rows(1, length=500) * 200
    chosen = selection(collator(mlm_probability=0.5)(rows))[:, 1:-1]
    assert_independent(chosen[1:], chosen[:-1])
    assert_even(chosen.sum(0), 200 * 0.5 * 0.5)
    fixed = selection(collator(mlm_probability=0.5, fixed=True)(rows))
    assert (fixed == fixed[0]).all()


def test_resumed_run_goes_on_with_the_same_masks() -> None:
    rows = make_rows(60)

    def batches(made: MaskingCollator, epoch: int) -> list[Any]:
        made.set_epoch(epoch)
        return [made(rows[first : first + 8]) for first in range(0, 60, 8)]

    made = collator()
    batches(made, 0)
    expected = batches(made, 1)[3:]
    resumed = batches(collator(), 1)[3:]  # a new process knows the epoch, and skips the batches that it has had
    for one, other in zip(expected, resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- processes and global state


@pytest.mark.parametrize(("start", "processes", "fixed"), [("fork", 2, True), ("fork", 2, False), ("spawn", 1, False)])
def test_worker_processes_make_the_same_batches_and_see_each_new_epoch(start: str, processes: int, fixed: bool) -> None:
    rows = make_rows(24)
    made = collator(fixed=fixed)
    workers: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=made,
        num_workers=processes,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    seen = []
    for epoch in (0, 1):
        made.set_epoch(epoch)
        seen.append([unpadded(batch) for batch in workers])
        alone = collator(fixed=fixed)
        alone.set_epoch(epoch)
        assert seen[-1] == [unpadded(alone(rows[first : first + 4])) for first in range(0, 24, 4)]
    assert (seen[0] == seen[1]) == fixed


def test_pickled_collator_makes_the_same_batches_and_has_its_own_epoch() -> None:
    rows = make_rows(20)
    made = collator()
    made.set_epoch(3)
    copy = pickle.loads(pickle.dumps(made))
    assert unpadded(copy(rows)) == unpadded(made(rows))
    made.set_epoch(4)
    assert copy.epoch == 3
    workers: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=20,
        collate_fn=copy,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for epoch in (3, 4):
        copy.set_epoch(epoch)
        made.set_epoch(epoch)
        assert [unpadded(batch) for batch in workers] == [unpadded(made(rows))]


def global_states() -> list[str]:
    return [repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist())]


def test_global_random_states_are_neither_used_nor_changed() -> None:
    rows = make_rows(20)
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = global_states()
        results.append(unpadded(collator()(rows)))
        assert global_states() == before
    assert results[0] == results[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
def test_wrapping_of_64_bit_numbers_is_silent(seed: int) -> None:
    with np.errstate(all="raise"):
        made = collator(seed=seed)
        made.set_epoch(2**62)
        made([{"input_ids": [50]}])
        made(make_rows(3))
        collator(seed=seed, fixed=True)(make_rows(3))
