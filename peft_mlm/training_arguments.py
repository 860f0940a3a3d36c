"""transformers' TrainingArguments of a run, from typed values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from peft_mlm.errors import ArgumentsError
from peft_mlm.precision import has_tf32

PERPLEXITY_NAMES = ("perplexity", "eval_perplexity")


def build_training_arguments(values: Mapping[str, Any], checkpoints: Path) -> TrainingArguments:
    """Build transformers' own TrainingArguments for a run.

    Args:
        values: Typed values by name; names that are not given keep transformers' defaults.
        checkpoints: Where checkpoints go; `output_dir` itself is the run folder.

    Returns:
        The arguments that Trainer reads.

    Raises:
        ArgumentsError: transformers refuses a value or a combination.
    """
    settings = {
        **values,
        "output_dir": str(checkpoints),
        "do_train": True,
        "disable_tqdm": bool(values.get("disable_tqdm")),  # transformers' depends on how loud its logger is
        "label_names": ["labels"],
        "remove_unused_columns": False,  # the collator reads the lengths of documents, which no model takes
        "push_to_hub": False,  # done once the run is finished, after a check of what goes up
    }
    if not torch.cuda.is_available():
        settings["dataloader_pin_memory"] = False  # torch warns at every data loader
        # A run of a GPU, looked at elsewhere: transformers refuses its bf16 unless the CPU is asked for by name.
        settings["use_cpu"] = settings.get("use_cpu") or not torch.accelerator.is_available()
    elif settings.get("tf32") is None and has_tf32():
        settings["tf32"] = True  # what is computed in float32; not recorded: elsewhere it would be refused
    if settings.get("metric_for_best_model") in PERPLEXITY_NAMES:
        settings.setdefault("greater_is_better", False)  # Trainer takes all but losses for "greater is better"
    try:
        (arguments,) = HfArgumentParser((TrainingArguments,)).parse_dict(settings)
    except (ValueError, TypeError, ImportError) as error:
        raise ArgumentsError(f"transformers refuses these training arguments: {error}") from error
    return arguments


def computes_in_half(arguments: TrainingArguments) -> bool:
    """Tell whether rows are best padded to lengths that 8 divides: in 16 bits, and for compiled layers.

    Args:
        arguments: Of a run or an evaluation.

    Returns:
        True for fp16, bf16 and torch_compile.
    """
    return bool(arguments.fp16 or arguments.bf16 or arguments.torch_compile)
