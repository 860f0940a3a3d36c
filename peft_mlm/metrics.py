"""Loss, accuracy and perplexity of a masked language model, with one definition for training and evaluation.

Everything is a sum over masked positions divided by their number; nothing is an average of batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn import functional

IGNORE_INDEX = -100


@dataclass(frozen=True)
class MaskedScores:
    """Sums over the masked positions of an evaluation.

    Attributes:
        loss_sum: Sum of -ln p(right token), in nats.
        correct: Number of positions whose most probable token is the right one.
        masked: Number of masked positions.
    """

    loss_sum: float
    correct: int
    masked: int

    @property
    def loss(self) -> float:
        """Nats per masked token; nan if none is masked."""
        return self.loss_sum / self.masked if self.masked else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the masked tokens whose most probable token is the right one; nan if none is masked."""
        return self.correct / self.masked if self.masked else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that is beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def describe(self) -> dict[str, float | int]:
        """Give loss, perplexity, accuracy and the number of masked tokens as a record."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "masked_tokens": self.masked,
        }


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy at the masked positions, divided by the masked tokens of the whole (accumulated) batch.

    Dividing each micro-batch's sum by the count of all micro-batches makes their gradients add up to exactly the
    gradient of one large batch, however the masked tokens fall. Without a masked token the loss is 0, not nan.

    Args:
        logits: (B, T, V), any float type; the loss is computed in float32 (float64 stays).
        labels: (B, T), `IGNORE_INDEX` off-mask.
        masked_in_batch: Masked tokens in all micro-batches of this optimiser step; those of `labels` if None.
        label_smoothing: Share of the target spread over the vocabulary.

    Returns:
        A scalar that carries gradients.
    """
    chosen = labels != IGNORE_INDEX
    rows = _at_least_float32(logits[chosen])
    total = functional.cross_entropy(rows, labels[chosen], reduction="sum", label_smoothing=label_smoothing)
    count = chosen.sum() if masked_in_batch is None else torch.as_tensor(masked_in_batch, device=logits.device)
    return total / count.reshape(-1)[0].clamp(min=1)


@torch.no_grad()
def evaluate_masked_lm(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    device: torch.device,
    autocast: Callable[[], Any] = contextlib.nullcontext,
) -> MaskedScores:
    """Sum loss and hits over the masked positions of all batches.

    Memory is that of one batch; only three numbers are kept. Where several processes run, each gives its own batches
    and all get the sums over all.

    Args:
        model: A masked LM; its mode (train or eval) is restored afterwards.
        batches: Dicts with `input_ids`, `attention_mask` and `labels`, each (B, T).
        device: Where the model is.
        autocast: Makes a context manager for the forward pass, such as mixed precision.

    Returns:
        The sums.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with autocast():
                logits = model(**inputs).logits
            chosen = labels != IGNORE_INDEX
            rows, targets = _at_least_float32(logits[chosen]), labels[chosen]
            losses = functional.cross_entropy(rows, targets, reduction="none").cpu()
            hits = (rows.argmax(dim=-1) == targets).sum()
            sums += torch.tensor([losses.double().sum(), hits, targets.numel()], dtype=torch.float64)
    finally:
        model.train(was_training)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = sums.to(device)
        torch.distributed.all_reduce(everyone)
        sums = everyone.cpu()
    return MaskedScores(float(sums[0]), int(sums[1]), int(sums[2]))


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
