"""Base + adapter -> one plain model, written as a whole and compared with what was trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.adapter import cast_with_adapter
from peft_mlm.console import quiet_transformers
from peft_mlm.errors import MergeError
from peft_mlm.heads import tied_parameters
from peft_mlm.merged_card import finish_merged
from peft_mlm.positions import position_limit
from peft_mlm.quantization import is_quantised
from peft_mlm.run_folder import staged, write_json

PROBE_ROWS, PROBE_LENGTH = 16, 64
# Largest difference, as a share of the largest logit: far above rounding, far below any real fault.
TOLERANCE = 1e-5
# Up to this many parameters the sum and the comparison are made in float64, where only what was written counts: in
# float32 the same model differs from itself by as much, when its sums are made in another order.
FLOAT64_PARAMETERS = 500_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "merge_report.json"


@dataclass(frozen=True)
class MergeReport:
    """How far a merged model, loaded afresh, is from base + adapter.

    Attributes:
        max_abs_logit_diff: Largest difference of any logit, on random rows of tokens, computed in `compared_in`.
        max_abs_logit_diff_as_run: The same, each model run in the type its weights have: with the rounding of its sums.
        max_abs_logit: Largest logit among them, to compare it with.
        top1_agreement: Share of positions where both give the same most probable token.
        positions: Number of positions compared.
        tied: Whether the decoder is still the embedding matrix in the merged model (None: it was not in the base).
        dtype: Type the merged weights were written in.
        compared_in: Type the comparison was computed in.
        max_abs_logit_diff_quantised: Largest difference from the adapter on its quantised base as it ran in training,
            which rounds inputs too (8 bits) or computes in a half type; None where the base was float.
    """

    max_abs_logit_diff: float
    max_abs_logit_diff_as_run: float
    max_abs_logit: float
    top1_agreement: float
    positions: int
    tied: bool | None
    dtype: str
    compared_in: str
    max_abs_logit_diff_quantised: float | None = None

    def describe(self) -> dict[str, Any]:
        """Give the report as a record."""
        return dict(vars(self))


def merge_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    dtype: str = "float32",
    quantised: torch.Tensor | None = None,
    adapter: Path | None = None,
) -> MergeReport:
    """Merge the adapter into its base, write the model, load it afresh, and compare it with what was trained.

    Args:
        model: Base in float32 with the adapter; it is merged in place.
        tokenizer: Written beside the model.
        output_dir: Made by this call; it appears complete or not at all.
        dtype: float32, bfloat16 or float16; the merge itself is done in float32, and cast once.
        quantised: Logits (`probe_logits`) of the adapter on its quantised base, where `model` has it dequantised.
        adapter: The adapter's folder, for the model's card; no card and no checksums without it.

    Returns:
        What the comparison gave; it is written beside the model as merge_report.json.

    Raises:
        MergeError: The method cannot be merged, or the merged model differs by more than rounding.
    """
    if is_quantised(model):
        raise MergeError("A sum put back into 4 or 8 bits is another model: dequantise the base first.")
    model.eval()
    was_tied, ties = is_tied(model), model.config.tie_word_embeddings
    probe = probe_rows(model.get_base_model(), tokenizer)
    as_run = _logits(model, probe)
    precise = torch.float64 if sum(p.numel() for p in model.parameters()) <= FLOAT64_PARAMETERS else torch.float32
    expected = _logits(cast_with_adapter(model, precise), probe)
    try:
        merged = cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise MergeError(f"This adapter cannot be merged into its base: {error}") from error
    if not was_tied:
        merged.config.tie_word_embeddings = ties  # PEFT takes a decoder that never was tied (LUKE's) for one cut loose
    with staged(output_dir) as folder:
        with quiet_transformers():
            merged.to(dtype=DTYPES[dtype])
            merged.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
            loaded = AutoModelForMaskedLM.from_pretrained(str(folder), dtype=DTYPES[dtype]).eval()
        tied = is_tied(loaded) if was_tied else None
        loaded_as_run = _logits(loaded, probe)
        given = _logits(loaded.to(precise), probe)
        report = MergeReport(
            max_abs_logit_diff=float((expected - given).abs().max()),
            max_abs_logit_diff_as_run=float((as_run - loaded_as_run).abs().max()),
            max_abs_logit=float(expected.abs().max()),
            top1_agreement=float((expected.argmax(-1) == given.argmax(-1)).double().mean()),
            positions=probe.numel(),
            tied=tied,
            dtype=dtype,
            compared_in=str(precise).removeprefix("torch."),
            max_abs_logit_diff_quantised=None if quantised is None else float((quantised - given).abs().max()),
        )
        _check(report)
        write_json(folder / REPORT, report.describe())
        if adapter is not None:
            finish_merged(folder, adapter, report.describe())
    return report


def is_tied(model: Any) -> bool:
    """Tell whether input embeddings and decoder are one matrix.

    Args:
        model: A masked LM, with or without an adapter.

    Returns:
        True if the embedding matrix stands in more than one place.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tied = tied_parameters(base)
    return any(id(parameter) in tied for parameter in base.get_input_embeddings().parameters())


def probe_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Make rows of random tokens, a seventh of them masked, to compare two models on.

    Args:
        model: Its positions limit the length.
        tokenizer: Its ordinary tokens are drawn from.

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
    return rows


def probe_logits(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Compute the logits that models are compared by, in the type the model runs in.

    Args:
        model: Base with adapter, in evaluation mode.
        tokenizer: Its tokenizer.

    Returns:
        (rows, tokens, vocabulary), float64, on the CPU.
    """
    return _logits(model, probe_rows(model.get_base_model(), tokenizer))


@torch.no_grad()
def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.to(model.device)
    pieces = [model(input_ids=row, attention_mask=torch.ones_like(row)).logits.double().cpu() for row in rows.split(4)]
    return torch.cat(pieces)


def _check(report: MergeReport) -> None:
    if not math.isfinite(report.max_abs_logit_diff_as_run):
        raise MergeError(
            f"The merged model gives logits that are not finite in {report.dtype}: a weight or a sum is beyond "
            "what the type holds; nothing was written. Use --dtype bfloat16 or float32."
        )
    allowed = TOLERANCE * max(1.0, report.max_abs_logit)
    if report.dtype == "float32" and not report.max_abs_logit_diff <= allowed:
        raise MergeError(
            f"The merged model differs from base + adapter by {report.max_abs_logit_diff:.2e} in a logit (allowed: "
            f"{allowed:.1e}); nothing was written. Is --base the model the adapter was trained on, in float32?"
        )
    if report.tied is False:
        raise MergeError("The merged model no longer ties its decoder to its embeddings; nothing was written.")
