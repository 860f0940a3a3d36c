"""A masked LM, or its encoder -> an ONNX file with free batch and length, compared with the model in ONNX Runtime.

The file is made by PyTorch's own exporter from one short batch that has padding in it: without padding transformers
leaves the attention mask out of what is traced.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.errors import ExportError
from peft_mlm.merge_proof import largest_number, probe_rows
from peft_mlm.positions import position_limit

ONNX_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
# A file of protobuf holds 2 GiB; from half of that on the weights lie in a file of their own, model.onnx.data.
LARGEST_FILE = 2**30
TRACED = (3, 11)
# The last is longer than the windows and landmarks of any attention in pieces.
COMPARED = ((1, 6), (2, 11), (5, 33), (3, 64), (2, 200))
# Largest difference, as a share of the largest output: both compute in float32, in other orders. Seen: 1e-6, and 1e-5
# for FNet, whose Fourier transforms become products of matrices.
TOLERANCE = 5e-5


class _OneOutput(nn.Module):
    """The model as a function of two tensors with one result, which is what ONNX knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return output


def output_name(*, encoder_only: bool) -> str:
    """Give the name of the output: transformers' own name of it."""
    return "last_hidden_state" if encoder_only else "logits"


def write_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    encoder_only: bool = False,
    largest_file: int = LARGEST_FILE,
) -> dict[str, Any]:
    """Write a model as ONNX with its config and tokenizer, and compare it with the model in ONNX Runtime.

    Args:
        model: A masked LM, float32, on the CPU, in evaluation mode.
        tokenizer: Written beside it.
        folder: An empty folder; the file is model.onnx.
        encoder_only: Whether the head is left out; the output is then `last_hidden_state` instead of `logits`.
        largest_file: Up to this many bytes the weights lie within model.onnx, beyond in model.onnx.data.

    Returns:
        `max_abs_diff` (largest difference of an output at any token), `max_abs` (largest output), `shapes` (rows and
        tokens compared), `inputs`, `output`, `opset`, `external_data`.

    Raises:
        ExportError: The exporter does not know what the model does, or ONNX Runtime gives something else.
    """
    part = model.base_model if encoder_only else model
    wrapped = _OneOutput(part).eval()
    size = sum(p.numel() * p.element_size() for p in wrapped.parameters())
    program = _export(wrapped, model, tokenizer, output_name(encoder_only=encoder_only))
    external = size > largest_file
    file = folder / ONNX_FILE
    try:
        program.save(str(file), external_data=external)
    except (RuntimeError, ValueError, OSError) as error:
        raise ExportError(f"The ONNX file cannot be written: {_one_line(error)}") from error
    opset = program.model.opset_imports[""]
    del program
    report = _compare(wrapped, model, tokenizer, file)
    part.config.architectures = [type(part).__name__]
    part.config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return {
        **report,
        "inputs": list(INPUTS),
        "output": output_name(encoder_only=encoder_only),
        "opset": opset,
        "external_data": external,
    }


def _export(wrapped: nn.Module, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: str) -> Any:
    batch = _batch(model, tokenizer, *TRACED)
    free = {0: "batch", 1: "length"}
    try:
        with _quietly():
            program = torch.onnx.export(
                wrapped,
                (),
                kwargs=batch,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(INPUTS, free),
                input_names=list(INPUTS),
                output_names=[output],
                verbose=False,
            )
    except Exception as error:  # whatever the tracer meets in a model's code
        raise ExportError(
            f"PyTorch's ONNX exporter cannot write a {model.config.model_type}: {_one_line(error)} Nothing was "
            "written. Export safetensors instead."
        ) from error
    assert program is not None
    # The exporter notes at each node where its code stands: paths of this machine.
    graphs: list[Any] = [program.model.graph, *program.model.functions.values()]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        node.metadata_props.clear()
    return program


def _compare(
    wrapped: nn.Module, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path
) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    largest, difference, shapes = 0.0, 0.0, []
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for rows, length in COMPARED:
            batch = _batch(model, tokenizer, rows, length)
            shapes.append(list(batch["input_ids"].shape))
            with torch.no_grad():
                expected = wrapped(**batch)[batch["attention_mask"].bool()]
            (given,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
            at_tokens = torch.from_numpy(given)[batch["attention_mask"].bool()]
            difference = max(difference, largest_number(expected - at_tokens))
            largest = max(largest, largest_number(expected))
    except Exception as error:  # ONNX Runtime's errors share no class of their own
        raise ExportError(
            f"ONNX Runtime cannot run this {model.config.model_type} at every batch and length "
            f"({shapes[-1] if shapes else 'not at all'}): {_one_line(error)} Nothing was written. Export safetensors "
            "instead."
        ) from error
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:
        raise ExportError(
            f"In ONNX Runtime the model gives outputs that differ by {difference:.2e} (allowed: {allowed:.1e}); "
            "nothing was written. Export safetensors instead."
        )
    return {"max_abs_diff": difference, "max_abs": largest, "shapes": shapes}


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int
) -> dict[str, torch.Tensor]:
    """Make rows of which each is two tokens shorter than the one before, padded."""
    limit = position_limit(model) or length
    probe = probe_rows(model, tokenizer)
    ids = probe.repeat(1, -(-length // probe.shape[1]))[:rows, : min(length, limit)].clone()
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        end = max(3, ids.shape[1] - 2 * row)
        ids[row, end:], mask[row, end:] = tokenizer.pad_token_id, 0
    return {"input_ids": ids, "attention_mask": mask}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'' if text.endswith('.') else '.'}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's progress, and its word on libraries that are not there, out of the way."""
    was = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(was)
