"""Loss, accuracy and perplexity of a masked language model, with one definition for training and evaluation.

Everything is a sum over masked positions divided by their number; nothing is an average of batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import nn

from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.cross_entropy import cross_entropies, losses_and_hits
from peft_mlm.gathered_head import Door, sum_over_masked


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


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum the cross-entropies of some masked positions.

    Args:
        logits: (n, V), any float type; the sum is computed in float32 (float64 stays).
        targets: (n,), the right tokens.
        label_smoothing: Share of the target spread over the vocabulary.

    Returns:
        A scalar, in nats; 0 for n = 0.
    """
    return cross_entropies(logits, targets, label_smoothing=label_smoothing).sum()


def masked_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    masked_in_batch: torch.Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
    door: Door | None = None,
) -> torch.Tensor:
    """Cross-entropy at the masked positions, divided by the masked tokens of the whole (accumulated) batch.

    Dividing each micro-batch's sum by the count of all micro-batches makes their gradients add up to exactly the
    gradient of one large batch, however the masked tokens fall. Without a masked token the loss is 0, not nan.

    Args:
        model: A masked LM, wrapped or not.
        inputs: Its inputs, (B, T) each.
        labels: (B, T), `IGNORE_INDEX` off-mask.
        masked_in_batch: Masked tokens in all micro-batches of this optimiser step; those of `labels` if None.
        label_smoothing: Share of the target spread over the vocabulary.
        door: Where the masked rows are picked before the head (`gathered_head.find_door`); None: after it.

    Returns:
        A scalar that carries gradients.
    """
    function = partial(cross_entropy_sum, label_smoothing=label_smoothing)
    total = sum_over_masked(model, inputs, labels, function, door=door)
    masked = (labels != IGNORE_INDEX).sum() if masked_in_batch is None else masked_in_batch
    return total / torch.as_tensor(masked, device=total.device).reshape(-1)[0].clamp(min=1)


@torch.no_grad()
def evaluate_masked_lm(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    device: torch.device,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    door: Door | None = None,
) -> MaskedScores:
    """Sum loss and hits over the masked positions of all batches.

    Memory is that of one batch; only three numbers are kept. Where several processes run, each gives its own batches
    and all get the sums over all.

    Args:
        model: A masked LM; its mode (train or eval) is restored afterwards.
        batches: Dicts with `input_ids`, `attention_mask` and `labels`, each (B, T).
        device: Where the model is.
        autocast: Makes a context manager for the forward pass, such as mixed precision.
        door: Where the masked rows are picked before the head (`gathered_head.find_door`); None: after it.

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
                sums += sum_over_masked(model, inputs, labels, _scores, door=door)
    finally:
        model.train(was_training)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = sums.to(device)
        torch.distributed.all_reduce(everyone)
        sums = everyone.cpu()
    return MaskedScores(float(sums[0]), int(sums[1]), int(sums[2]))


def _scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses (float64), right predictions and positions, (3,), on the CPU."""
    losses, hits = losses_and_hits(logits, targets)
    count = torch.tensor(float(len(targets)), dtype=torch.float64)
    return torch.stack([losses.double().sum().cpu(), hits.sum().cpu().double(), count])
