from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, EsmTokenizer

from peft_mlm.collator import IGNORE_INDEX, from_tokenizer
from peft_mlm.errors import ArgumentsError, ModelError
from tests.test_collator import ALL_RANDOM, collator


def test_facts_are_taken_from_the_tokenizer(tmp_path: Path) -> None:
    bert = BertTokenizer(vocab={t: n for n, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"])})
    bert.padding_side = "left"
    bert.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWC", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    esm = EsmTokenizer(str(tmp_path / "vocab.txt"))
    for tokenizer, special in ((bert, {0, 1, 2, 3, 4, 11}), (esm, {0, 1, 2, 3, 24})):
        every_token = sorted(tokenizer.get_vocab().values())
        batch = from_tokenizer(tokenizer, mlm_probability=1.0)([{"input_ids": every_token}, {"input_ids": [5]}])
        assert set(batch["labels"][0].tolist()) == {IGNORE_INDEX, *every_token} - special
        assert (batch["labels"][0] == IGNORE_INDEX).sum() == len(special)
        assert tokenizer.mask_token_id in batch["input_ids"][0]
        padding = batch["attention_mask"][1] == 0
        assert (batch["input_ids"][1][padding] == tokenizer.pad_token_id).all()
        assert padding.tolist() == ([True] * 11 + [False] if tokenizer is bert else [False] + [True] * 24)
        drawn = from_tokenizer(tokenizer, **ALL_RANDOM)([{"input_ids": [5] * 5000}])["input_ids"]  # type: ignore[arg-type]
        assert set(drawn[0].tolist()) == set(every_token) - special


def test_options_reach_the_collator() -> None:
    bert = BertTokenizer(vocab={t: n for n, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"])})
    options: dict[str, Any] = {
        "mlm_probability": 0.4,
        "mask_replace_prob": 0.5,
        "random_replace_prob": 0.3,
        "seed": 11,
        "fixed": True,
        "pad_to": 90,
        "pad_to_multiple_of": 64,
    }
    rows = [{"input_ids": [2, *[5, 6, 7, 8, 9, 10] * 10, 3]}] * 3
    direct = collator(vocab_size=11, **options)(rows)
    batch = from_tokenizer(bert, **options)(rows)
    assert all(torch.equal(batch[name], direct[name]) for name in batch)
    assert batch["labels"].shape == (3, 128)


@pytest.mark.parametrize(("token", "need"), [("mask_token", "masked language model"), ("pad_token", "batch of rows")])
def test_tokenizer_without_a_needed_token_is_refused(token: str, need: str) -> None:
    tokenizer = BertTokenizer()
    setattr(tokenizer, token, None)
    with pytest.raises(ModelError, match=rf"A {need}.*needs a {token[:-6]} token.*BertTokenizer"):
        from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 0.0}, "mlm_probability is 0.0"),
        ({"mlm_probability": 1.5}, "mlm_probability is 1.5"),
        ({"mlm_probability": math.nan}, "mlm_probability is nan"),
        ({"mask_replace_prob": -0.1}, "mask_replace_prob is -0.1"),
        ({"random_replace_prob": 1.1}, "random_replace_prob is 1.1"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "together they must be at most 1"),
        ({"padding_side": "top"}, "choose left or right"),
        ({"pad_to": 0}, "pad_to is 0"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of is -8"),
        ({"vocab_size": 5}, "Every token of the vocabulary is special"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentsError, match=message):
        collator(**options)


def test_all_options_out_of_range_are_named_together() -> None:
    with pytest.raises(ArgumentsError) as caught:
        collator(mlm_probability=2.0, mask_replace_prob=0.9, random_replace_prob=0.9, pad_to=-1)
    assert len(caught.value.faults) == 3


def test_shares_that_add_up_to_one_but_for_rounding_are_taken() -> None:
    for mask in np.arange(1, 100) / 100:
        collator(mask_replace_prob=float(mask), random_replace_prob=float(1.0 - mask))
    collator(mask_replace_prob=0.7, random_replace_prob=0.1 + 0.2)
