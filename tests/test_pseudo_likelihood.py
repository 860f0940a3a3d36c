"""Pseudo-log-likelihoods equal a plain loop: one masked row at a time, the whole head, float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import DataError, ModelError
from peft_mlm.gathered_head import find_door
from peft_mlm.masked_rows import MaskedRow, log_probabilities
from peft_mlm.pseudo_likelihood import (
    VARIANTS,
    PseudoLikelihood,
    encode_texts,
    masked_rows,
    pseudo_log_likelihoods,
    pseudo_perplexity,
)
from tests.tiny import MODEL_TYPES, letter_texts, letter_tokenizer, perturb, tiny_model

TEXTS = ["ABCDEFGH", "TSRQPONMLKJ", "AABB", "C", "HGFEDCBA"]
# Some of the types whose rows change with the padding beside them, or with their place in a batch.
SENSITIVE = ("fnet", "nystromformer", "longformer", "xmod")
SENTENCES = [
    "The souvenir shop isn't unaffordable.",
    "Antidisestablishmentarianism, naïvely 🙂 spelt",
    "x  y\tz",
]


def by_hand(model: Any, ids: list[int], masked: list[list[int]], read: list[int], mask_id: int) -> list[float]:
    """One row at a time: mask, run the whole model, read one number."""
    found = []
    for places, place in zip(masked, read, strict=True):
        row = torch.tensor([ids])
        row[0, places] = mask_id
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits.double()
        found.append(float(logits[0, place].log_softmax(-1)[ids[place]]))
    return found


def plain(model: Any, tokenizer: Any, text: str) -> list[float]:
    ids = tokenizer(text)["input_ids"]
    read = [place for place, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    return by_hand(model, ids, [[place] for place in read], read, tokenizer.mask_token_id)



@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *SENSITIVE])
def test_a_text_scores_as_in_a_plain_loop_alone_and_among_others_at_any_batch_size(model_type: str) -> None:
    model, tokenizer = tiny_model(model_type).double(), letter_tokenizer()
    expected = [plain(model, tokenizer, text) for text in TEXTS]
    for tokens in (1, 37, 4096):
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, max_tokens_per_batch=tokens)
        for score, wanted in zip(scores, expected, strict=True):
            assert score.log_probabilities.tolist() == pytest.approx(wanted, abs=1e-9)
            assert score.log_likelihood == pytest.approx(math.fsum(wanted), abs=1e-9)
            assert score.pseudo_perplexity == pytest.approx(math.exp(-math.fsum(wanted) / len(wanted)), rel=1e-9)
    (alone,) = pseudo_log_likelihoods(model, tokenizer, TEXTS[1:2])
    assert alone.log_probabilities.tolist() == pytest.approx(expected[1], abs=1e-9)
