"""The search for a batch that the memory holds (`--auto_find_batch_size`), in steps of as many rows as were asked for.

A batch of b rows is computed as k batches of b / k rows whose gradients add up (gradient accumulation): the loss
divides by the masked tokens of all of them, so that the steps are those of b rows, only slower. transformers' own
search takes a tenth off the batch at a time, makes smaller steps of it, and goes on with what the weights had become.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainingArguments

from peft_mlm.batching import row_lengths
from peft_mlm.errors import ArgumentsError
from peft_mlm.out_of_memory import DoesNotFitError, smaller_batch
from peft_mlm.run_folder import write_text

logger = logging.getLogger(__name__)


def use_batch(arguments: TrainingArguments, rows: int) -> None:
    """Set the rows of a batch; as many batches make up a step that it has the rows it had.

    Args:
        arguments: Changed in place.
        rows: A divisor of the rows per batch and device.
    """
    arguments.gradient_accumulation_steps *= arguments.per_device_train_batch_size // rows
    arguments.per_device_train_batch_size = rows


def train_in_what_fits(trainer: Any, train: Callable[[], Any]) -> Any:
    """Train, and where memory runs out start again with a smaller batch and steps of as many rows.

    Args:
        trainer: The trainer; its `args` hold the batch that fits at the end, and its `max_tokens`.
        train: Trains from the start (or a checkpoint), and raises `DoesNotFitError` where memory runs out.

    Returns:
        What `train` gives.

    Raises:
        ArgumentsError: Several processes train: one cannot change its batch alone.
        DoesNotFitError: One row does not fit, or ranks have moved before memory ran out.
    """
    if trainer.args.world_size > 1:
        raise ArgumentsError(
            "auto_find_batch_size is for one process: where one of several runs out of memory, the others wait for "
            "it. Leave it out, and give a smaller per_device_train_batch_size with gradient_accumulation_steps."
        )
    trained = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    chance, on_gpu = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    metrics = trainer.run.metrics
    logged = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    while True:
        try:
            return train()
        except DoesNotFitError:
            if (trainer.schedule is not None and trainer.state.global_step) or not _take_less(trainer):
                raise
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        if torch.cuda.is_available():  # the peak that is told is that of the batch that fits
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.set_rng_state(chance)
        torch.cuda.set_rng_state_all(on_gpu)
        if metrics.is_file():
            write_text(metrics, logged)


def _take_less(trainer: Any) -> bool:
    """Make the batch smaller and tell so; False where it cannot be."""
    arguments = trainer.args
    if trainer.max_tokens is not None:
        if trainer.max_tokens < 2 or trainer.max_tokens // 2 < int(row_lengths(trainer.train_dataset).max()):
            return False
        trainer.max_tokens //= 2
        arguments.gradient_accumulation_steps *= 2
        what = f"{trainer.max_tokens} tokens"
    else:
        smaller = smaller_batch(arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps)
        if smaller is None:
            return False
        use_batch(arguments, smaller[0])
        trainer._train_batch_size = arguments.train_batch_size
        what = f"{smaller[0]} rows"
    logger.info(
        f"Memory ran out: starting again with batches of {what}, {arguments.gradient_accumulation_steps} to a step."
    )
    return True
