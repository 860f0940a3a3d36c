"""A masked LM -> a folder for what comes next: its encoder, half-precision weights, a sentence-transformers model.

What is written is loaded afresh by plain transformers (or sentence-transformers) and compared with what was exported.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.console import quiet_transformers
from peft_mlm.errors import ExportError
from peft_mlm.merge_proof import largest_number, probe_rows
from peft_mlm.merging import DTYPES
from peft_mlm.positions import position_limit

# Largest difference, as a share of the largest output, of the same float32 weights.
TOLERANCE = 1e-5
TEXTS_COMPARED = 8
# From token vectors (rows, tokens, width) and attention mask (rows, tokens) to one vector per row.
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda vectors, mask: (vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "cls": lambda vectors, mask: vectors[:, 0],
    "max": lambda vectors, mask: vectors.masked_fill(mask[..., None] == 0, -math.inf).amax(1),
}


def write_safetensors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    encoder_only: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write a model, or its encoder alone, as safetensors with config and tokenizer; load it afresh, and compare.

    Args:
        model: A masked LM in float32, in evaluation mode; its weights are cast in place.
        tokenizer: Written beside it.
        folder: An empty folder.
        encoder_only: Whether the head is left out; the folder then opens as AutoModel.
        dtype: Type of the weights: float32, bfloat16 or float16.

    Returns:
        `max_abs_diff` (largest difference of an output, computed in float32 with the weights as written), `max_abs`
        (largest output), and `fresh`: names of weights that no masked LM has, such as a pooler's, which start at random
        wherever the folder is opened.

    Raises:
        ExportError: What was written is not what was exported, or does not fit the type.
    """
    part = model.base_model if encoder_only else model
    rows = probe_rows(model, tokenizer)
    expected = _outputs(part, rows)
    opens_as = AutoModel if encoder_only else AutoModelForMaskedLM
    with quiet_transformers():
        part.to(dtype=DTYPES[dtype])
        part.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        loaded, told = opens_as.from_pretrained(str(folder), dtype=DTYPES[dtype], output_loading_info=True)
    fresh = sorted(told["missing_keys"])
    _check_weights(part, loaded, fresh)
    given = _outputs(loaded.eval().float(), rows)
    report = {"max_abs_diff": largest_number(expected - given), "max_abs": largest_number(expected), "fresh": fresh}
    _check_outputs(report, dtype)
    return report


def write_sentence_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    pooling: str = "mean",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the encoder with a pooling layer, as sentence-transformers keeps it; load it afresh, and compare.

    Args:
        model: A masked LM in float32, in evaluation mode; its weights are cast in place.
        tokenizer: Written beside it.
        folder: An empty folder.
        pooling: How a text's vector comes from those of its tokens: mean, cls or max.
        dtype: Type of the weights: float32, bfloat16 or float16.

    Returns:
        `max_abs_diff` (largest difference of a number of a text's vector from plain pooling of the encoder that was
        exported), `max_abs`, `dimension` of the vectors, `max_seq_length` in tokens, and `fresh` as in
        `write_safetensors`.

    Raises:
        ExportError: The vectors are not those of plain pooling.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    limit = _row_limit(model, tokenizer)
    texts = _texts(model, tokenizer)
    expected = _pooled(model.base_model, tokenizer, texts, pooling, limit)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".encoder.") as temporary, quiet_transformers():
        written = write_safetensors(model, tokenizer, Path(temporary), encoder_only=True, dtype=dtype)
        transformer = Transformer(temporary, max_seq_length=limit)
        modules = [transformer, Pooling(expected.shape[1], pooling_mode=pooling)]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
        loaded = SentenceTransformer(str(folder), device="cpu")
    given = loaded.encode(texts, convert_to_tensor=True, show_progress_bar=False).float()
    report = {"max_abs_diff": largest_number(expected - given), "max_abs": largest_number(expected)}
    _check_outputs(report, dtype)
    return {
        **report,
        "dimension": expected.shape[1],
        "max_seq_length": loaded.max_seq_length,
        "fresh": written["fresh"],
    }


@torch.no_grad()
def _outputs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Logits, or the vectors of an encoder, on the CPU."""
    pieces = [
        model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].cpu() for ids in rows.to(model.device).split(4)
    ]
    return torch.cat(pieces)


@torch.no_grad()
def _pooled(
    encoder: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], pooling: str, limit: int | None
) -> torch.Tensor:
    batch = tokenizer(texts, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt")
    ids, mask = batch["input_ids"].to(encoder.device), batch["attention_mask"].to(encoder.device)
    vectors = encoder(input_ids=ids, attention_mask=mask)[0]
    return POOLINGS[pooling](vectors, mask).cpu()


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of unequal lengths, so that some are padded."""
    rows = probe_rows(model, tokenizer)[:TEXTS_COMPARED]
    ordinary = [[i for i in row.tolist() if i != tokenizer.mask_token_id] for row in rows]
    return [str(tokenizer.decode(row[: max(2, len(row) - 5 * number)])) for number, row in enumerate(ordinary)]


def _row_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a text may have: sentence-transformers takes 514 for RoBERTa, which holds 512."""
    stated = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return min((x for x in (position_limit(model), stated) if x is not None), default=None)


def _check_weights(written: nn.Module, loaded: nn.Module, fresh: list[str]) -> None:
    """Every weight that was written must come back bit by bit."""
    source = written.state_dict()
    other = [
        name
        for name, tensor in loaded.state_dict().items()
        if name not in fresh and not (name in source and torch.equal(tensor, source[name].cpu()))
    ]
    if other:
        raise ExportError(
            f"{len(other)} weights are not read back as they were written ({', '.join(other[:3])}); nothing is kept."
        )


def _check_outputs(report: dict[str, Any], dtype: str) -> None:
    if not math.isfinite(report["max_abs_diff"]):
        raise ExportError(
            f"In {dtype} the model gives numbers that are not finite: a weight or a sum is beyond what the type holds; "
            "nothing was written. Use --dtype bfloat16 or float32."
        )
    allowed = TOLERANCE * max(1.0, report["max_abs"])
    if dtype == "float32" and not report["max_abs_diff"] <= allowed:
        raise ExportError(
            f"The exported model gives outputs that differ by {report['max_abs_diff']:.2e} (allowed: {allowed:.1e}); "
            "nothing was written."
        )
