"""What a user is told where a device's memory does not hold a step: what takes less of it. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from peft_mlm.config import Arguments
from peft_mlm.errors import DeviceMemoryError
from peft_mlm.run_folder import RunFolder

SHORTER = "a smaller --max_seq_length (shorter rows)"
# What the allocators of CUDA, cuBLAS and the CPU say.
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


class DoesNotFitError(Exception):
    """A step ran out of memory in the search for a batch that fits."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory was too small.

    Args:
        error: Any error.

    Returns:
        True for what the allocators of torch say.
    """
    return isinstance(error, RuntimeError | DoesNotFitError) and any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def memory_told(arguments: Arguments, *, training: bool = True) -> Iterator[None]:
    """Turn an error of a full memory into a message that says what takes less.

    Args:
        arguments: Of the run, or of the evaluation.
        training: Whether a model is trained.

    Yields:
        Nothing.

    Raises:
        DeviceMemoryError: The memory was too small.
    """
    try:
        yield
    except (RuntimeError, DoesNotFitError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        remedies = _for_training(arguments) if training else _for_evaluation(arguments)
        raise DeviceMemoryError(f"The memory is too small: {reason}. {' '.join(remedies)}") from error


def smaller_batch(rows: int, accumulation: int) -> tuple[int, int] | None:
    """Give the next smaller batch with which a step has as many rows.

    Args:
        rows: Rows per batch and device.
        accumulation: Batches per step.

    Returns:
        Rows, at most half as many, and batches; None where a batch is one row.
    """
    if rows == 1:
        return None
    fewer = max(part for part in range(1, rows // 2 + 1) if rows % part == 0)
    return fewer, accumulation * (rows // fewer)


def _for_training(arguments: Arguments) -> list[str]:
    """Say what takes less memory in training and is not in use yet."""
    given, run = arguments.training, RunFolder(Path(arguments.training["output_dir"]).expanduser())
    rows, accumulation = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
    smaller, ways = smaller_batch(rows, accumulation), []
    if given.get("auto_find_batch_size"):
        pass  # it has tried smaller ones
    elif arguments.data.max_tokens_per_batch is not None:
        tokens = arguments.data.max_tokens_per_batch // 2
        ways.append(f"--max_tokens_per_batch {tokens} --gradient_accumulation_steps {2 * accumulation}")
    elif smaller is not None:
        ways.append(
            f"--per_device_train_batch_size {smaller[0]} --gradient_accumulation_steps {smaller[1]} (the same steps, "
            "slower; --auto_find_batch_size looks for it)"
        )
    if not given.get("activation_checkpointing"):
        ways.append("--activation_checkpointing (computes activations again instead of keeping them)")
    if arguments.peft is None:
        ways.append("--use_lora (trains an adapter alone)")
    elif not arguments.model.load_in_4bit and not arguments.model.load_in_8bit:
        ways.append("--load_in_4bit (holds the base's layers in 4 bits)")
    fewer = max(1, given.get("per_device_eval_batch_size", 8) // 2)
    ways += [SHORTER, f"in an evaluation, --per_device_eval_batch_size {fewer}"]
    said = [f"What takes less: {'; '.join(ways)}."]
    if any(run.checkpoints.glob("checkpoint-*/trainer_state.json")):
        said.append(
            "To go on from the last checkpoint, add some of these to: "
            f"peft-mlm train {run.arguments} --resume_from_checkpoint true"
        )
    elif run.summary.is_file():
        said.append("No step was saved: start again with another --output_dir.")
    return said


def _for_evaluation(arguments: Arguments) -> list[str]:
    rows = arguments.training.get("per_device_eval_batch_size", 8)
    fewer = [f"--per_device_eval_batch_size {rows // 2}"] if rows > 1 else []
    return [f"What takes less: {'; '.join([*fewer, SHORTER])}; --use_cpu takes the machine's own memory."]
