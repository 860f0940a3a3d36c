"""Does a merged model compute what base + adapter compute? Both are run on the same rows, one after the other.

Two kinds of rows: some of random tokens, compared in float64 where only what was written counts; and real text, where
there is any, compared as the models are used, in float32, with loss and accuracy at its masked places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.adapter import cast_with_adapter
from peft_mlm.collator import IGNORE_INDEX
from peft_mlm.document_attention import documents_apart
from peft_mlm.errors import MergeError
from peft_mlm.gathered_head import base_of
from peft_mlm.metrics import MaskedScores, scores_of_batch
from peft_mlm.positions import position_limit

PROBE_ROWS, PROBE_LENGTH = 16, 64
# Largest difference, as a share of the largest logit: far above rounding, far below any real fault. In float32 the same
# sums made in another order differ by more, and on text models are run in float32.
TOLERANCE, TOLERANCE_ON_TEXT = 1e-5, 1e-3
# A half type rounds each weight by at most its unit. Weights moved by the whole unit, up or down by chance, are off by
# more than rounded ones; the merged model may differ by this many times what that does to its logits.
ROUNDING_MARGIN = 2
# Up to this many parameters sums and comparison are made in float64.
FLOAT64_PARAMETERS = 500_000_000
# So many logits of the text are kept to be compared; top-1 and loss are of all of it.
KEPT_LOGITS = 2**25
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ProofRows:
    """What two models are compared on.

    Attributes:
        probe: Rows of random tokens, (rows, tokens).
        text: Batches of real text with masks (`input_ids`, `attention_mask`, `labels`, and `document_ids` where texts
            share a row); none where there is none.
        source: What the text is, for the report.
    """

    probe: torch.Tensor
    text: Sequence[Batch] = ()
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextSeen:
    """What a model gives on real text.

    Attributes:
        logits: Of its first places, (places, vocabulary), float32.
        best: The most probable token at every place.
        scores: Loss and hits at the masked places.
    """

    logits: torch.Tensor
    best: torch.Tensor
    scores: MaskedScores


@dataclass(frozen=True)
class Seen:
    """What a model gives.

    Attributes:
        as_run: Logits of the probe in the type that its weights have, as float64: (rows, tokens, vocabulary).
        precise: The same computed in float64 (float32 for large models); None where that was not asked for.
        text: On real text, in float32; None where there is none.
    """

    as_run: torch.Tensor
    precise: torch.Tensor | None
    text: TextSeen | None


def precise_type(model: nn.Module) -> torch.dtype:
    """Choose the type that a model is merged and compared in: float64 up to 500 million parameters, else float32."""
    return torch.float64 if sum(p.numel() for p in model.parameters()) <= FLOAT64_PARAMETERS else torch.float32


def probe_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained_ids: Sequence[int] = ()
) -> torch.Tensor:
    """Make rows of random tokens, a seventh of them masked, to compare two models on.

    Args:
        model: Its positions limit the length.
        tokenizer: Its ordinary tokens are drawn from.
        trained_ids: Tokens whose rows were trained: all of them, up to a seventh of the places, are in the rows.

    Returns:
        Ids, (16, 64) or shorter where the model holds less.
    """
    limit = position_limit(model)
    length = PROBE_LENGTH if limit is None else min(PROBE_LENGTH, limit)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor(sorted(i for i in set(tokenizer.get_vocab().values()) if i not in special))
    generator = torch.Generator().manual_seed(0)
    rows = ordinary[torch.randint(len(ordinary), (PROBE_ROWS, length), generator=generator)]
    rows[:, 3::7] = tokenizer.mask_token_id
    if trained_ids:
        places = rows[:, 5::7]
        wanted = torch.tensor(trained_ids[: places.numel()])
        rows[:, 5::7] = wanted.repeat(-(-places.numel() // len(wanted)))[: places.numel()].view_as(places)
    return rows


def observe(model: Any, rows: ProofRows, *, precise: torch.dtype | None) -> Seen:
    """Run a model on the rows.

    Args:
        model: A masked LM, with or without an adapter, in evaluation mode. A float one is left in the type `precise`.
        rows: What to run it on.
        precise: Type of the exact comparison; None to run it only as it is (a quantised model).

    Returns:
        What it gives.
    """
    as_run = probe_logits(model, rows.probe)
    if precise is None:
        return Seen(as_run, None, _observe_text(model, rows.text))
    text = _observe_text(cast_with_adapter(model, torch.float32), rows.text) if rows.text else None
    return Seen(as_run, probe_logits(cast_with_adapter(model, precise), rows.probe), text)


@torch.no_grad()
def probe_logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Compute the logits of rows without padding, in the type the model runs in.

    Args:
        model: In evaluation mode.
        rows: Ids, (rows, tokens).

    Returns:
        (rows, tokens, vocabulary), float64, on the CPU.
    """
    rows = rows.to(model.device)
    pieces = [model(input_ids=row, attention_mask=torch.ones_like(row)).logits.double().cpu() for row in rows.split(4)]
    return torch.cat(pieces)


def largest_number(numbers: torch.Tensor) -> float:
    """Give the largest absolute value; infinity where one is not a number."""
    value = float(numbers.abs().max())
    return value if math.isfinite(value) else math.inf


def rounding_unit(dtype: torch.dtype) -> float:
    """Give the largest share by which a type rounds a number (2^-8 for bfloat16, 2^-11 for float16)."""
    return torch.finfo(dtype).eps / 2


def effect_of_rounding(model: Any, seen: Seen, rows: ProofRows, dtype: torch.dtype) -> tuple[float, float]:
    """Measure what weights that are off by the unit of their type do to the logits.

    Args:
        model: The merged model, in the type of its exact comparison; its weights are changed.
        seen: What it gave before.
        rows: What to run it on.
        dtype: The half type that its weights were rounded to.

    Returns:
        Largest difference of a logit, on the probe and on the text (0 where there is none).
    """
    generator = torch.Generator().manual_seed(0)
    unit, least = rounding_unit(dtype), torch.finfo(dtype).tiny * rounding_unit(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            sign = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8).to(parameter) * 2 - 1
            parameter += sign * (parameter.abs() * unit).clamp(min=least)
    moved = probe_logits(model, rows.probe)
    assert seen.precise is not None
    on_probe = largest_number(moved - seen.precise)
    if seen.text is None:
        return on_probe, 0.0
    text = _observe_text(cast_with_adapter(model, torch.float32), rows.text)
    assert text is not None
    return on_probe, largest_number(text.logits - seen.text.logits)


def compare_text(one: TextSeen, other: TextSeen) -> dict[str, Any]:
    """Compare what two models give on the same text.

    Args:
        one: Of base + adapter.
        other: Of the merged model.

    Returns:
        `max_abs_logit_diff` over `logits_of_positions` places, `max_abs_logit`, `top1_agreement` over `positions`
        places, and of each model the figures of `MaskedScores.describe`.
    """
    return {
        "max_abs_logit_diff": largest_number(one.logits - other.logits),
        "max_abs_logit": largest_number(one.logits),
        "logits_of_positions": len(one.logits),
        "top1_agreement": float((one.best == other.best).double().mean()),
        "positions": len(one.best),
        "adapter": one.scores.describe(),
        "merged": other.scores.describe(),
    }


def check_difference(what: str, difference: float, allowed: float, because: str) -> None:
    """Refuse a merged model that differs by more than is allowed.

    Args:
        what: Where it differs, for the message: "" or " on text".
        difference: Largest difference of a logit.
        allowed: What may be.
        because: Why so much may be.

    Raises:
        MergeError: It differs by more; or by something that is no number.
    """
    if not math.isfinite(difference) or difference > allowed:
        raise MergeError(
            f"The merged model differs from base + adapter by {difference:.2e} in a logit{what} (allowed: "
            f"{allowed:.1e}, {because}); nothing was written. Is --base the model the adapter was trained on?"
        )


@torch.no_grad()
def _observe_text(model: Any, batches: Sequence[Batch]) -> TextSeen | None:
    if not batches:
        return None
    kept: list[torch.Tensor] = []
    best: list[torch.Tensor] = []
    sums, room = [np.zeros((0, 4))], KEPT_LOGITS
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        with documents_apart(base_of(model), inputs) as apart:
            logits = model(**apart).logits.float().cpu()
        real, labels = batch["attention_mask"].bool(), batch["labels"]
        best.append(logits[real].argmax(-1))
        places = max(room // logits.shape[-1], 0 if kept else 1)
        if places:
            kept.append(logits[real][:places].clone())
            room -= kept[-1].numel()
        sums.append(scores_of_batch(logits[labels != IGNORE_INDEX], batch).sums)
    return TextSeen(torch.cat(kept), torch.cat(best), MaskedScores(np.concatenate(sums)))
