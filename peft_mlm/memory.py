"""What a run takes of a device's memory, known before it starts: weights, adapter, optimiser, and what a step holds.

The weights are counted on an outline of the model (its parameters on the meta device), each kind in the type that it is
held in; what a step holds is counted by `step_memory`. The prediction is for the largest moment of a run: the gradients
and logits in it are those that are there at that moment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_mlm.adaptation import adapter_to_go_on_with, with_adapter_tokenizer, with_base_of_adapter
from peft_mlm.adapter import ADAPTER, Plan, count_parameters, plan_adapter, wrap
from peft_mlm.base_memory import describe_memory, quantise_outline, weight_bytes
from peft_mlm.batching import row_lengths
from peft_mlm.config import Arguments
from peft_mlm.document_attention import why_not_apart
from peft_mlm.document_packing import DOCUMENT_LENGTHS
from peft_mlm.dropout import turn_off_dropout
from peft_mlm.errors import ModelError
from peft_mlm.gathered_head import Door, base_of
from peft_mlm.live_memory import LiveBytes, without_values
from peft_mlm.model import Base, outline_base
from peft_mlm.optimizer_memory import optimizer_bytes
from peft_mlm.optimizers import freeze_a
from peft_mlm.positions import resolve_max_seq_length
from peft_mlm.quantization import check_trainable, is_quantised
from peft_mlm.step_memory import Batch, Step, dequantised, door_of, evaluation_bytes, training_bytes

logger = logging.getLogger(__name__)

# Tokens of the longest of the documents on which it is tried whether they can stand side by side.
PROBED_LENGTH = 64
# What is beside tensors, as a share of all but the weights, and a fixed part. On a GPU: blocks that PyTorch's allocator
# rounds up, cuBLAS's workspace. On a CPU: code and objects that loading and training bring, and the holes between the
# blocks of glibc's heap, which gives freed memory back only where a user says so (MALLOC_MMAP_THRESHOLD_); where layers
# run again in the backward pass, the holes are a share of what would be kept without. The shares were measured
# (docs/planning.md).
GPU_MARGIN = (0.06, 64 * 2**20)
CPU_MARGIN, CPU_HOLES, CPU_HOLES_OF_CHECKPOINTING = (0.07, 80 * 2**20), 0.18, 0.62
# What CUDA and the libraries' kernels take of a GPU outside of PyTorch's allocator: 300 to 600 MB, by card and driver.
CUDA_CONTEXT = 512 * 2**20
KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "margin")


@dataclass(frozen=True)
class Outline:
    """A model to train, without its weights.

    Attributes:
        model: On the meta device, with its adapter where there is one.
        door: Where its masked rows are picked.
        tokenizer: Its tokenizer.
        weights: Bytes of the base's weights by kind: `embeddings`, `encoder`, `norms`, `head`, `quantised`.
        adapter_bytes: Bytes of what the adapter adds.
        trainable: Numbers that are trained.
        total: All numbers.
        optimizer: Bytes of the optimiser's states.
        max_seq_length: Tokens of a row at most.
        apart: Whether documents can stand side by side in a row.
        notices: Sentences that the user should read.
    """

    model: Any
    door: Door | None
    tokenizer: PreTrainedTokenizerBase
    weights: Mapping[str, int]
    adapter_bytes: int
    trainable: int
    total: int
    optimizer: int
    max_seq_length: int
    apart: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The memory of a run at its largest moment.

    Attributes:
        device: "cpu" or "cuda".
        parts: Bytes by kind (`KINDS`).
        phase: "training" or "evaluation", whichever takes more.
    """

    device: str
    parts: Mapping[str, int] = field(default_factory=dict)
    phase: str = "training"

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def build_outline(arguments: Arguments, *, total_steps: int = 1000) -> Outline:
    """Build the model that a run trains, without weights, by the code that a run wraps it with.

    Args:
        arguments: All groups, types settled.
        total_steps: Optimiser steps, for methods with a schedule; they do not change the memory.

    Returns:
        The outline with its counts.

    Raises:
        ModelError: There is no such model, or it cannot serve.
        AdapterError: The adapter's options do not fit it.
    """
    adapter = adapter_to_go_on_with(arguments)
    arguments = with_base_of_adapter(arguments, adapter)
    base = outline_base(with_adapter_tokenizer(arguments.model, adapter))
    model, peft, packed = base.model, arguments.peft, arguments.data.rows == "packed"
    with without_values(model), LiveBytes(masked=8):
        apart = packed and why_not_apart(model, PROBED_LENGTH) is None
    length, notice = resolve_max_seq_length(arguments.data.max_seq_length, model, base.tokenizer)
    if arguments.model.load_in_4bit or arguments.model.load_in_8bit:
        quantise_outline(model, arguments.model, str(base.name_or_path))
    weights, of_base = weight_bytes(model), {id(tensor) for tensor in _tensors(model)}
    adapted, plan = _wrapped(base, arguments, adapter, total_steps)
    trainable, total = count_parameters(adapted)
    return Outline(
        model=adapted,
        door=door_of(adapted),
        tokenizer=base.tokenizer,
        weights=weights,
        adapter_bytes=0 if peft is None else sum(_size(t) for t in _tensors(adapted) if id(t) not in of_base),
        trainable=trainable,
        total=total,
        optimizer=optimizer_bytes(adapted, str(arguments.training.get("optim") or "adamw_torch")),
        max_seq_length=length,
        apart=apart,
        notices=(*base.notices, *((notice,) if notice else ()), *(() if plan is None else plan.notices)),
    )


def _wrapped(base: Base, arguments: Arguments, adapter: Path | None, total_steps: int) -> tuple[Any, Plan | None]:
    """Put the adapter on, as `adaptation.adapt` does with weights."""
    model, peft = base.model, arguments.peft
    if peft is None:
        return model, None
    if not peft.base_dropout:
        turn_off_dropout(model)
    if adapter is not None:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        plan = Plan(config, (), (), ())
    else:
        with without_values(model), LiveBytes(masked=8), dequantised(model):
            plan = plan_adapter(
                model,
                peft,
                fresh_parameters=base.fresh_parameters,
                new_token_ids=base.new_token_ids,
                total_steps=total_steps,
            )
        check_trainable(model, plan.trained_modules)
    with torch.device("meta"), LiveBytes(masked=0):
        adapted = wrap(model, plan)
    if peft.use_lorafa:
        freeze_a(adapted)
    return adapted, plan


def predict(
    outline: Outline, arguments: Arguments, batch: Batch, evaluated: Batch | None, *, on_gpu: bool
) -> Prediction:
    """Predict the memory of a run.

    Args:
        outline: The model.
        arguments: All groups, types settled.
        batch: Its largest training batch.
        evaluated: Its largest batch of an evaluation; None without evaluations.
        on_gpu: Whether for a CUDA GPU.

    Returns:
        The memory at the larger of both moments.
    """
    held = {
        "weights": sum(outline.weights.values()),
        "adapter": outline.adapter_bytes,
        "optimizer": outline.optimizer,
    }
    return _predict(outline.model, outline.door, held, (batch, evaluated), step_of(arguments, on_gpu=on_gpu))


def predict_loaded(trainer: Any, arguments: Arguments) -> Prediction:
    """Predict the memory of a run whose model and rows are there: the step alone is run without values.

    Args:
        trainer: With model, rows and the batch that it trains with.
        arguments: All groups, types settled.

    Returns:
        The prediction, as a plan gives it for rows that are as long.
    """
    model, given = base_of(trainer.model), trainer.args
    held: dict[str, int] = dict.fromkeys(("weights", "adapter"), 0)
    seen: set[int] = set()
    for name, tensor in (*trainer.model.named_parameters(), *trainer.model.named_buffers()):
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            held["adapter" if f".{ADAPTER}" in name else "weights"] += _size(tensor)
    if is_quantised(model):
        held["weights"] = describe_memory(model)["total"] - held["adapter"]  # scales and tables are no buffers
    held["optimizer"] = optimizer_bytes(trainer.model, str(arguments.training.get("optim") or "adamw_torch"))
    step = replace(
        step_of(arguments, on_gpu=given.device.type == "cuda"), accumulation=given.gradient_accumulation_steps
    )
    rows, validation = trainer.train_dataset, trainer.eval_dataset
    longest = int(row_lengths(rows).max())
    if trainer.max_tokens is not None:
        count = int(max(1, trainer.max_tokens // longest))
    else:
        count = given.per_device_train_batch_size
    apart = DOCUMENT_LENGTHS in rows.column_names
    batches = [batch_of(arguments, min(count, len(rows)), longest, apart=apart)]
    if validation is not None:
        size = min(given.per_device_eval_batch_size, len(validation))
        batches.append(batch_of(arguments, size, int(row_lengths(validation).max()), apart=apart))
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled anew, for tensors without values
        return _predict(trainer.model, trainer.door, held, (batches[0], batches[1] if len(batches) > 1 else None), step)


def describe_run_memory(trainer: Any, arguments: Arguments, measured: int | None) -> dict[str, Any]:
    """Say what a run's largest moment took, beside what is predicted for it.

    Args:
        trainer: Of the run, which is finished.
        arguments: All groups, types settled.
        measured: Bytes (`memory_watch.peak_bytes`); None where they are not known.

    Returns:
        `device`, `predicted_bytes` and `parts` (None and empty where that fails, as where a model's code does not run
        without values), `measured_bytes`.
    """
    prediction = None
    try:
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # else a process holds a part of the model
            prediction = predict_loaded(trainer, arguments)
    except Exception as error:  # the run is finished, and nothing that only tells of it may end it as failed
        logger.debug(f"the memory of the run is not predicted: {error}")
    return {
        "device": trainer.args.device.type,
        "predicted_bytes": None if prediction is None else prediction.total,
        "measured_bytes": measured,
        "parts": {} if prediction is None else dict(prediction.parts),
    }


def _predict(
    model: Any, door: Door | None, held: Mapping[str, int], batches: tuple[Batch, Batch | None], step: Step
) -> Prediction:
    batch, evaluated = batches
    try:
        phases = {"training": training_bytes(model, door, batch, step)}
        if evaluated is not None:
            phases["evaluation"] = evaluation_bytes(model, door, evaluated, step)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"The memory of a {base_of(model).config.model_type} model is not predicted: its code does not run on "
            f"tensors without values ({reason}). Train a few steps: summary.json tells what they took."
        ) from error
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {**held, "gradients": 0, **phases[phase]}
    device = "cuda" if step.on_gpu else "cpu"
    share, fixed = GPU_MARGIN if step.on_gpu else CPU_MARGIN
    moving = sum(parts.values()) - held["weights"]
    parts["margin"] = int(share * moving) + fixed
    if not step.on_gpu and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        if phase == "training" and step.checkpointing:
            kept = sum(training_bytes(model, door, batch, replace(step, checkpointing=False)).values())
            parts["margin"] += int(CPU_HOLES_OF_CHECKPOINTING * kept)
        else:
            parts["margin"] += int(CPU_HOLES * moving)
    return Prediction(device, {kind: parts[kind] for kind in KINDS}, phase)


def step_of(arguments: Arguments, *, on_gpu: bool) -> Step:
    """Say how a run computes its steps.

    Args:
        arguments: All groups, types settled.
        on_gpu: Whether on a CUDA GPU.

    Returns:
        For `step_memory`.
    """
    given = arguments.training
    return Step(
        on_gpu=on_gpu,
        half=bool(given.get("bf16") or given.get("fp16")),
        checkpointing=bool(given.get("activation_checkpointing")),
        accumulation=int(given.get("gradient_accumulation_steps") or 1),
    )


def training_batch(outline: Outline, arguments: Arguments, longest: int | None = None) -> Batch:
    """Say how large a run's largest training batch is.

    Args:
        outline: The model.
        arguments: All groups.
        longest: Tokens of the longest row, where it is known to be shorter than the model's rows.

    Returns:
        For `step_memory`.
    """
    data = arguments.data
    tokens = outline.max_seq_length if longest is None or data.pad_to_max_length else longest
    rows = int(arguments.training.get("per_device_train_batch_size") or 8)
    if data.max_tokens_per_batch is not None:
        rows = max(1, data.max_tokens_per_batch // tokens)
    return batch_of(arguments, rows, tokens, apart=outline.apart)


def evaluation_batch(outline: Outline, arguments: Arguments, longest: int | None = None) -> Batch | None:
    """Say how large a run's largest batch of an evaluation is.

    Args:
        outline: The model.
        arguments: All groups.
        longest: As in `training_batch`.

    Returns:
        For `step_memory`; None where nothing is evaluated.
    """
    if arguments.training.get("do_eval") is False:
        return None
    tokens = outline.max_seq_length if longest is None or arguments.data.pad_to_max_length else longest
    rows = int(arguments.training.get("per_device_eval_batch_size") or 8)
    return batch_of(arguments, rows, tokens, apart=outline.apart)


def batch_of(arguments: Arguments, rows: int, tokens: int, *, apart: bool) -> Batch:
    """Describe a batch of so many rows and tokens.

    Args:
        arguments: How rows are made, and the share of tokens that is predicted.
        rows: Rows.
        tokens: Tokens of each.
        apart: Whether documents stand side by side in a row.

    Returns:
        For `step_memory`.
    """
    one_text_a_row = arguments.data.rows == "line" or (arguments.data.rows == "packed" and not apart)
    return Batch(
        rows=rows,
        tokens=tokens,
        masked=max(1, round(arguments.data.mlm_probability * rows * tokens)),
        padded=one_text_a_row or arguments.data.pad_to_max_length,
        documents=apart,
    )


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """List parameters and buffers, a tied one once."""
    return [*model.parameters(), *model.buffers()]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
