"""Loss, accuracy and perplexity of a masked language model, with one definition for training and evaluation.

Everything is a sum over masked positions divided by their number; nothing is an average of batches. Sums are kept for
each cluster (a row, or a document that rows were cut from), which is what a standard error needs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn

from peft_mlm.cluster_statistics import LEVEL, REPLICATES, SEED, bootstrap_ratios, ratio_standard_error
from peft_mlm.collator import DOCUMENT_IDS, IGNORE_INDEX
from peft_mlm.cross_entropy import cross_entropies, losses_and_hits
from peft_mlm.gathered_head import Door, gather_over_masked, sum_over_masked

Numbers = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]


class MaskedTokens(NamedTuple):
    """The masked tokens of a batch, row by row.

    Attributes:
        targets: The right tokens, (n,) int64.
        losses: -ln p(right token) in nats, (n,).
        hits: Whether the most probable token is the right one, (n,) 0 or 1.
        top5_hits: Whether fewer than five tokens are more probable than the right one, (n,) 0 or 1.
        clusters: Number of the row or document that each is from, among those of the batch from 0, (n,) int64.
    """

    targets: Numbers
    losses: Sums
    hits: Sums
    top5_hits: Sums
    clusters: Numbers

    def sums(self, count: int) -> Sums:
        """Sum up loss, hits, top-5 hits and tokens by cluster, (count, 4)."""
        columns = (self.losses, self.hits, self.top5_hits, None)
        return np.stack([np.bincount(self.clusters, column, count) for column in columns], axis=1)


@dataclass(frozen=True, eq=False)
class MaskedScores:
    """Sums over the masked positions of an evaluation, cluster by cluster.

    A cluster is a row, or a document where rows are cut from documents: what is drawn independently of the others.

    Attributes:
        sums: Float64, (clusters, 4): of -ln p(right token) in nats, of positions whose most probable token is the right
            one, of positions where the right token is among the five most probable, and of masked positions.
    """

    sums: Sums

    def __add__(self, other: MaskedScores) -> MaskedScores:
        """Add the scores of other masks on the same clusters."""
        return MaskedScores(self.sums + other.sums)

    @property
    def losses(self) -> Sums:
        """Sum of the losses of each cluster, in nats."""
        return self.sums[:, 0]

    @property
    def hits(self) -> Sums:
        """Right predictions of each cluster."""
        return self.sums[:, 1]

    @property
    def counts(self) -> Sums:
        """Masked tokens of each cluster."""
        return self.sums[:, 3]

    @property
    def correct(self) -> int:
        """Number of positions whose most probable token is the right one."""
        return int(self.hits.sum())

    @property
    def masked(self) -> int:
        """Number of masked positions."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Nats per masked token; nan if none is masked."""
        return self._per_token(0)

    @property
    def accuracy(self) -> float:
        """Share of the masked tokens whose most probable token is the right one; nan if none is masked."""
        return self._per_token(1)

    @property
    def top5_accuracy(self) -> float:
        """Share of the masked tokens than which fewer than five tokens are more probable; nan if none is masked."""
        return self._per_token(2)

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that is beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def describe(self) -> dict[str, float | int]:
        """Give the figures as a record; standard errors are those of a ratio of sums over clusters."""
        return {
            "loss": self.loss,
            "loss_standard_error": ratio_standard_error(self.losses, self.counts),
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "accuracy_standard_error": ratio_standard_error(self.hits, self.counts),
            "top5_accuracy": self.top5_accuracy,
            "masked_tokens": self.masked,
        }

    def _per_token(self, column: int) -> float:
        return float(self.sums[:, column].sum()) / self.masked if self.masked else math.nan


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
    clusters: npt.ArrayLike | None = None,
    count: int | None = None,
    keep: Callable[[MaskedTokens], None] | None = None,
) -> MaskedScores:
    """Sum loss and hits over the masked positions of all batches, cluster by cluster.

    Memory is that of one batch and four numbers per row. Where several processes run, each gives its own batches and
    all get the sums over all.

    Args:
        model: A masked LM; its mode (train or eval) is restored afterwards.
        batches: Dicts with `input_ids`, `attention_mask` and `labels`, each (B, T); `document_ids` where rows hold
            documents side by side.
        device: Where the model is.
        autocast: Makes a context manager for the forward pass, such as mixed precision.
        door: Where the masked rows are picked before the head (`gathered_head.find_door`); None: after it.
        clusters: Number of the cluster of each row (of each document, where rows hold several side by side), in the
            order in which they come; each is one of its own if None.
        count: How many clusters there are in all processes; needed with `clusters`.
        keep: Is given the masked tokens of each batch.

    Returns:
        The sums of each cluster.
    """
    parts: list[Sums] = []
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with autocast():
                found = gather_over_masked(model, inputs, labels, _scores, door=door)
            tokens, units = _tokens(found, batch)
            parts.append(tokens.sums(units))
            if keep is not None:
                keep(tokens)
    finally:
        model.train(was_training)
    own = np.concatenate(parts) if parts else np.zeros((0, 4))
    if clusters is None:
        first, count = _place_among_processes(len(own), device)
        clusters = np.arange(first, first + len(own))
    assert count is not None
    sums = np.zeros((count, 4))
    np.add.at(sums, np.asarray(clusters), own)
    return MaskedScores(_over_processes(sums, device))


def scores_of_batch(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> MaskedScores:
    """Score the logits of a batch, each of its rows (or documents) as a cluster.

    Args:
        logits: (n, V), of its masked positions, row by row.
        batch: With `labels`, (B, T), and `document_ids` where rows hold documents side by side.

    Returns:
        The sums of each row.
    """
    tokens, units = _tokens(_scores(logits, batch["labels"][batch["labels"] != IGNORE_INDEX]), batch)
    return MaskedScores(tokens.sums(units))


def describe_change(
    before: MaskedScores,
    after: MaskedScores,
    *,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = SEED,
) -> dict[str, dict[str, float]]:
    """Describe how figures changed on the same masked tokens, with bootstrap intervals over clusters.

    Args:
        before: Of one model.
        after: Of another, on the same rows and masks.
        replicates: How often clusters are drawn. Default 2000.
        level: Share of such intervals that hold the true value. Default 0.95.
        seed: Of the draws. Default 0.

    Returns:
        For `loss` and `accuracy` the paired `difference` (after - before), `low`, `high` and `level`.
    """
    differences = (after.sums - before.sums)[:, :2]
    loss, accuracy = bootstrap_ratios(differences, before.counts, replicates=replicates, level=level, seed=seed)
    return {
        name: {"difference": one.value, "low": one.low, "high": one.high, "level": level}
        for name, one in (("loss", loss), ("accuracy", accuracy))
    }


def _tokens(found: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[MaskedTokens, int]:
    """Gather what is known of the masked tokens of a batch; and say how many rows or documents it has."""
    numbers, units = _units(batch)
    targets = batch["labels"][batch["labels"] != IGNORE_INDEX].cpu().numpy()
    losses, hits, top5_hits = found.double().cpu().numpy().T
    return MaskedTokens(targets, losses, hits, top5_hits, numbers), units


def _units(batch: Mapping[str, torch.Tensor]) -> tuple[Numbers, int]:
    """Number the row, or the document, that each masked token of a batch is from; and say how many there are."""
    labels = batch["labels"].cpu()
    rows, places = (labels != IGNORE_INDEX).numpy().nonzero()
    if DOCUMENT_IDS not in batch:
        return rows, len(labels)
    documents = batch[DOCUMENT_IDS].cpu().numpy()
    per_row = documents.max(axis=1)
    before = np.cumsum(per_row) - per_row
    return before[rows] + documents[rows, places] - 1, int(per_row.sum())


def _scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss, hit and top-5 hit of each position, (n, 3)."""
    losses, hits, top5_hits = losses_and_hits(logits, targets)
    return torch.stack([losses, hits.to(losses.dtype), top5_hits.to(losses.dtype)], dim=1)


def _over_processes(sums: Sums, device: torch.device) -> Sums:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    everyone = torch.from_numpy(sums).to(device)
    torch.distributed.all_reduce(everyone)
    return everyone.cpu().numpy()


def _place_among_processes(count: int, device: torch.device) -> tuple[int, int]:
    """Say where this process's numbers begin, and how many there are in all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, count
    rank = torch.distributed.get_rank()
    counts = np.zeros(torch.distributed.get_world_size())
    counts[rank] = count
    counts = _over_processes(counts, device)
    return int(counts[:rank].sum()), int(counts.sum())
