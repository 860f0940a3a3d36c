"""Base + adapter -> one plain model, written as a whole and compared with what was trained.

The merged weights come from PEFT's `merge_and_unload` of the built model, or file by file (`streaming_merge.py`); the
proof is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.console import quiet_transformers
from peft_mlm.errors import MergeError
from peft_mlm.heads import tied_parameters
from peft_mlm.merge_proof import (
    ROUNDING_MARGIN,
    TOLERANCE,
    TOLERANCE_ON_TEXT,
    ProofRows,
    Seen,
    check_difference,
    compare_text,
    effect_of_rounding,
    largest_number,
    observe,
    precise_type,
    probe_rows,
)
from peft_mlm.merged_card import finish_merged
from peft_mlm.quantization import is_quantised
from peft_mlm.run_folder import staged, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "merge_report.json"
# Writes weights and config into a folder; gives the SHA-256 of files that it has hashed, by name.
Writer = Callable[[Path], Mapping[str, str]]


@dataclass(frozen=True)
class MergeReport:
    """How far a merged model, loaded afresh, is from base + adapter.

    Attributes:
        max_abs_logit_diff: Largest difference of any logit, on random rows of tokens, computed in `compared_in`.
        tolerance: What this difference may be.
        tolerance_because: Why.
        max_abs_logit_diff_as_run: The same, each model run in the type its weights have: with the rounding of its sums.
        max_abs_logit: Largest logit among them, to compare it with.
        top1_agreement: Share of positions where both give the same most probable token.
        positions: Number of positions compared.
        tied: Whether the decoder is still the embedding matrix in the merged model (None: it was not in the base).
        dtype: Type the merged weights were written in.
        compared_in: Type the comparison was computed in.
        max_abs_logit_diff_quantised: Largest difference from the adapter on its quantised base as it ran in training,
            which rounds inputs too (8 bits) or computes in a half type; None where the base was float.
        text: The same on real text, run in float32 (`merge_proof.compare_text`), with its `tolerance`, its `source`,
            and `quantised`, the scores of the adapter on its quantised base; None where no text was given.
    """

    max_abs_logit_diff: float
    tolerance: float
    tolerance_because: str
    max_abs_logit_diff_as_run: float
    max_abs_logit: float
    top1_agreement: float
    positions: int
    tied: bool | None
    dtype: str
    compared_in: str
    max_abs_logit_diff_quantised: float | None = None
    text: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Give the report as a record."""
        return dict(vars(self))


@dataclass(frozen=True)
class Expected:
    """What a merged model must be.

    Attributes:
        seen: What base + adapter gave.
        rows: On what.
        compared_in: Type that `seen.precise` was computed in.
        tied: Whether embeddings and decoder are one matrix.
        quantised: What the adapter gave on its quantised base; None where the base was float.
    """

    seen: Seen
    rows: ProofRows
    compared_in: torch.dtype
    tied: bool
    quantised: Seen | None = None


def expect(model: PeftModel, rows: ProofRows, *, quantised: Seen | None = None) -> Expected:
    """See what base + adapter give, for the proof.

    Args:
        model: A float base with the adapter; it is left in float64 (float32 if it is large).
        rows: What to run it on.
        quantised: What the adapter gave on its quantised base, where it was trained on one.

    Returns:
        What the merged model is compared with.
    """
    precise = precise_type(model)
    tied = is_tied(model)
    return Expected(observe(model.eval(), rows, precise=precise), rows, precise, tied, quantised)


def merge_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path, *, dtype: str = "float32"
) -> MergeReport:
    """Merge the adapter into its base, write the model, load it afresh, and compare it with what was trained.

    Args:
        model: Base in float32 with the adapter; it is merged in place.
        tokenizer: Written beside the model.
        output_dir: Made by this call; it appears complete or not at all.
        dtype: float32, bfloat16 or float16; the sum is made in float64 (float32 if the model is large), and cast once.

    Returns:
        What the comparison, on rows of random tokens, gave; it is written beside the model as merge_report.json.

    Raises:
        MergeError: The method cannot be merged, or the merged model differs by more than rounding.
    """
    writer = built_merge(model, dtype)
    expected = expect(model, ProofRows(probe_rows(model.get_base_model(), tokenizer)))
    report = write_merged(output_dir, writer, tokenizer, dtype=dtype, expected=expected)
    assert report is not None
    return report


def built_merge(model: PeftModel, dtype: str) -> Writer:
    """Merge an adapter into a model that is loaded.

    Args:
        model: Float base with the adapter; it is merged in place, in the type it has when that is called.
        dtype: Type of the merged weights.

    Returns:
        Writes weights and config into a folder; it has hashed no file.

    Raises:
        MergeError: The base is quantised; or, later, the method cannot be merged.
    """
    if is_quantised(model):
        raise MergeError("A sum put back into 4 or 8 bits is another model: dequantise the base first.")
    was_tied, ties = is_tied(model), model.config.tie_word_embeddings

    def write(folder: Path) -> Mapping[str, str]:
        try:
            merged = cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise MergeError(f"This adapter cannot be merged into its base: {error}") from error
        for name, wrapper in list(merged.named_modules()):
            if isinstance(wrapper, ModulesToSaveWrapper):  # PEFT's LN tuning leaves them in (0.21.2)
                whole = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
                merged.set_submodule(name, whole)
        if not was_tied:
            merged.config.tie_word_embeddings = ties  # PEFT takes a decoder never tied (LUKE's) for one cut loose
        merged.to(dtype=DTYPES[dtype])
        merged.save_pretrained(str(folder))
        return {}

    return write


def write_merged(
    output_dir: Path,
    write: Writer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    expected: Expected | None,
    details: Mapping[str, Any] | None = None,
    adapter: Path | None = None,
) -> MergeReport | None:
    """Write a merged model beside its place, prove it, and only then put it there.

    Args:
        output_dir: Made by this call; it appears complete or not at all.
        write: Writes weights and config into a folder, and gives the SHA-256 of the files that it has hashed.
        tokenizer: Written beside the model.
        dtype: Type of the weights.
        expected: What base + adapter gave; None for no proof.
        details: What else is to stand in merge_report.json.
        adapter: The adapter's folder, for the model's card; no card and no checksums without it.

    Returns:
        What the comparison gave; None for no proof.

    Raises:
        MergeError: The merged model differs by more than rounding.
    """
    with staged(output_dir) as folder:
        with quiet_transformers():
            sums = write(folder)
            tokenizer.save_pretrained(str(folder))
        report = None if expected is None else prove(folder, expected, dtype=dtype)
        record = {"dtype": dtype} if report is None else report.describe()
        write_json(folder / REPORT, {"proved": report is not None, **record, **(details or {})})
        if adapter is not None:
            finish_merged(folder, adapter, record, sums)
    return report


def prove(folder: Path, expected: Expected, *, dtype: str) -> MergeReport:
    """Load a merged model afresh and compare it with base + adapter.

    Args:
        folder: Of the merged model.
        expected: What base + adapter gave.
        dtype: Type of the merged weights.

    Returns:
        What was seen.

    Raises:
        MergeError: It differs by more than rounding, or has lost a tie.
    """
    with quiet_transformers():
        loaded = AutoModelForMaskedLM.from_pretrained(str(folder), dtype=DTYPES[dtype]).eval()
    tied = is_tied(loaded) if expected.tied else None
    given = observe(loaded, expected.rows, precise=expected.compared_in)
    report = _compare(expected, given, (0.0, 0.0), tied=tied, dtype=dtype)
    if dtype != "float32" or _is_over(report):  # weights can be so large that rounding to float32 shows too
        effect = effect_of_rounding(loaded, given, expected.rows, DTYPES[dtype])
        report = _compare(expected, given, effect, tied=tied, dtype=dtype)
    _check(report)
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


def _compare(
    expected: Expected, given: Seen, rounding: tuple[float, float], *, tied: bool | None, dtype: str
) -> MergeReport:
    on_probe, on_text = rounding
    one, other = expected.seen.precise, given.precise
    assert one is not None
    assert other is not None
    largest, because = largest_number(one), f"{TOLERANCE:.0e} of the largest logit"
    if on_probe:
        because += f", and {ROUNDING_MARGIN} times what weights off by the unit of {dtype} change ({on_probe:.1e})"
    text = None
    if expected.seen.text is not None and given.text is not None:
        text = {**expected.rows.source, **compare_text(expected.seen.text, given.text)}
        text["tolerance"] = TOLERANCE_ON_TEXT * max(1.0, text["max_abs_logit"]) + ROUNDING_MARGIN * on_text
        held = expected.quantised and expected.quantised.text
        text["quantised"] = held.scores.describe() if held else None
    apart = None if expected.quantised is None else largest_number(expected.quantised.as_run - other)
    return MergeReport(
        max_abs_logit_diff=largest_number(one - other),
        tolerance=TOLERANCE * max(1.0, largest) + ROUNDING_MARGIN * on_probe,
        tolerance_because=because,
        max_abs_logit_diff_as_run=largest_number(expected.seen.as_run - given.as_run),
        max_abs_logit=largest,
        top1_agreement=float((one.argmax(-1) == other.argmax(-1)).double().mean()),
        positions=expected.rows.probe.numel(),
        tied=tied,
        dtype=dtype,
        compared_in=str(expected.compared_in).removeprefix("torch."),
        max_abs_logit_diff_quantised=apart,
        text=text,
    )


def _is_over(report: MergeReport) -> bool:
    on_text = report.text is not None and report.text["max_abs_logit_diff"] > report.text["tolerance"]
    return report.max_abs_logit_diff > report.tolerance or on_text


def _check(report: MergeReport) -> None:
    if not math.isfinite(report.max_abs_logit_diff_as_run):
        raise MergeError(
            f"The merged model gives logits that are not finite in {report.dtype}: a weight or a sum is beyond "
            "what the type holds; nothing was written. Use --dtype bfloat16 or float32."
        )
    check_difference("", report.max_abs_logit_diff, report.tolerance, report.tolerance_because)
    if report.text is not None:
        because = f"{TOLERANCE_ON_TEXT:.0e} of the largest logit, with the rounding of {report.dtype}"
        check_difference(" on text", report.text["max_abs_logit_diff"], report.text["tolerance"], because)
    if report.tied is False:
        raise MergeError("The merged model no longer ties its decoder to its embeddings; nothing was written.")
