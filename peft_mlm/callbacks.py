"""What happens around the steps of a training: masks by epoch, metrics.jsonl, lines for evaluations."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_mlm.run_folder import RunFolder, append_jsonl


def show_progress(arguments: TrainingArguments) -> bool:
    """Tell whether progress is shown: on a terminal, in the first process, unless `disable_tqdm` is given."""
    return sys.stderr.isatty() and arguments.process_index == 0 and not arguments.disable_tqdm


class EpochOf(TrainerCallback):
    """Tells masks or batches the epoch, which they depend on; a resumed run gets the same ones."""

    def __init__(self, dependent: Any) -> None:
        self.dependent = dependent

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the epoch on."""
        self.dependent.set_epoch(int(state.epoch or 0))


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the record."""
        if state.is_world_process_zero and logs:
            append_jsonl(self.run.metrics, {"step": state.global_step, **logs})


class EvaluationLines(TrainerCallback):
    """One line per evaluation on stderr."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line."""
        if state.is_world_process_zero and logs and "eval_loss" in logs:
            print(
                f"step {state.global_step:>6}/{state.max_steps}  loss {logs['eval_loss']:.4f}  "
                f"perplexity {logs['eval_perplexity']:.3f}  masked accuracy {logs['eval_accuracy']:.4f}",
                file=sys.stderr,
                flush=True,
            )
