"""What happens around the steps of a training: masks by epoch, metrics.jsonl, the progress bar."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_mlm.run_folder import RunFolder, append_jsonl


def show_progress(arguments: TrainingArguments) -> bool:
    """Tell whether progress bars are shown: on a terminal, in the first process."""
    return sys.stderr.isatty() and arguments.process_index == 0


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


class Progress(TrainerCallback):
    """A bar for the steps, and one line per evaluation, on stderr."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                file=sys.stderr,
                disable=not show_progress(args),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss; write a line for an evaluation."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if "eval_loss" in logs:
            self.bar.write(
                f"step {state.global_step:>6}/{state.max_steps}  loss {logs['eval_loss']:.4f}  "
                f"perplexity {logs['eval_perplexity']:.3f}  masked accuracy {logs['eval_accuracy']:.4f}",
                file=sys.stderr,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
