from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.gathered_head import find_door
from peft_mlm.metrics import MaskedScores, cross_entropy_sum, evaluate_masked_lm, masked_lm_loss
from tests.tiny import MODEL_TYPES, tiny_model


def masked_batch(rows: int, seed: int = 0, length: int = 16, share: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 25, (rows, length), generator=generator)
    chosen = torch.rand(ids.shape, generator=generator) < share
    labels = torch.where(chosen, ids, torch.full_like(ids, IGNORE_INDEX))
    return {"input_ids": ids.masked_fill(chosen, 4), "attention_mask": torch.ones_like(ids), "labels": labels}


def test_loss_is_the_mean_over_masked_positions() -> None:
    logits = torch.randn(3, 7, 11, dtype=torch.float64)
    labels = torch.full((3, 7), IGNORE_INDEX)
    labels[0, 2], labels[2, 5], labels[2, 6] = 4, 0, 10
    by_hand = -sum(logits[i, j].log_softmax(-1)[labels[i, j]] for i, j in ((0, 2), (2, 5), (2, 6))) / 3
    chosen = labels != IGNORE_INDEX
    assert torch.allclose(cross_entropy_sum(logits[chosen], labels[chosen]) / 3, by_hand)


def test_a_batch_without_a_masked_token_gives_zero_loss_and_zero_gradients() -> None:
    model = tiny_model("bert")
    batch = masked_batch(2)
    del batch["labels"]
    for door in (None, find_door(model)):
        model.zero_grad()
        loss = masked_lm_loss(model, batch, torch.full((2, 16), IGNORE_INDEX), torch.tensor(0), door=door)
        loss.backward()
        assert loss.item() == 0.0
        assert model.cls.predictions.bias.grad is not None
        assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters() if p.grad is not None)


def test_label_smoothing_spreads_its_share_over_the_vocabulary() -> None:
    logits, labels = torch.randn(1, 4, 6, dtype=torch.float64), torch.tensor([[1, IGNORE_INDEX, 5, 0]])
    log_p = logits.log_softmax(-1)
    by_hand = 0.0
    for position, label in ((0, 1), (2, 5), (3, 0)):
        by_hand += -(0.9 * log_p[0, position, label] + 0.1 * log_p[0, position].mean()) / 3
    chosen = labels != IGNORE_INDEX
    assert torch.allclose(cross_entropy_sum(logits[chosen], labels[chosen], label_smoothing=0.1) / 3, by_hand)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_accumulated_gradients_equal_those_of_one_large_batch(model_type: str) -> None:
    """The failure of plain Trainer: micro-batches with unequal numbers of masked tokens, for every kind of head."""
    model = tiny_model(model_type).double()
    door: str | None
    batch = masked_batch(8)
    batch["labels"][0] = IGNORE_INDEX  # a row without any masked token
    batch["labels"][5:, :12] = IGNORE_INDEX
    masked = (batch["labels"] != IGNORE_INDEX).sum()

    def gradients(sizes: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        start = 0
        for size in sizes:
            part = {name: tensor[start : start + size] for name, tensor in batch.items()}
            labels = part.pop("labels")
            loss = masked_lm_loss(model, part, labels, masked, door=door)
            loss.backward()
            total += loss.item()
            start += size
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    door = None
    whole, in_one = gradients([8])
    door = find_door(model)
    parts, in_parts = gradients([1, 3, 2, 2])
    assert parts == pytest.approx(whole, rel=1e-12)
    assert in_one.keys() == in_parts.keys()
    worst = max(float((in_one[name] - in_parts[name]).abs().max()) for name in in_one)
    assert worst < 1e-12


def test_evaluation_sums_over_masked_tokens_whatever_the_batches() -> None:
    model = tiny_model("roberta")
    batch = masked_batch(9)
    batch["labels"][0] = IGNORE_INDEX

    def cut(size: int) -> list[dict[str, torch.Tensor]]:
        return [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, 9, size)]

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    chosen = batch["labels"] != IGNORE_INDEX
    expected = functional.cross_entropy(logits[chosen], batch["labels"][chosen]).item()
    hits = int((logits[chosen].argmax(-1) == batch["labels"][chosen]).sum())
    for size in (1, 2, 9):
        scores = evaluate_masked_lm(model, cut(size), device=torch.device("cpu"), door=find_door(model))
        assert scores.loss == pytest.approx(expected, rel=1e-6)
        assert (scores.correct, scores.masked) == (hits, int(chosen.sum()))
        assert scores.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_evaluation_leaves_the_mode_of_the_model_as_it_was() -> None:
    model = tiny_model("bert").train()
    evaluate_masked_lm(model, [masked_batch(2)], device=torch.device("cpu"))
    assert model.training


def test_no_masked_token_at_all_is_nan_and_a_hopeless_loss_is_infinite_perplexity() -> None:
    nothing = MaskedScores(np.zeros((3, 4)))
    figures = nothing.describe()
    assert figures.pop("masked_tokens") == 0
    assert all(math.isnan(value) for value in figures.values())
    assert MaskedScores(np.array([[1e6, 0, 0, 1]])).perplexity == math.inf
