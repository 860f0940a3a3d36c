"""How fast a run trains, and how much memory it took: tokens, seconds and bytes between two logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_mlm.machine import peak_memory


@dataclass(frozen=True)
class Reading:
    """What was measured since the reading before.

    Attributes:
        tokens: Tokens that were trained on, of all processes; padding is none.
        seconds: Time of the steps, with the loading of their batches; evaluations and saving are left out.
        peak_memory: Bytes, since the process began: reserved on a CUDA GPU by torch, else of the process; the most of
            all processes.
    """

    tokens: int
    seconds: float
    peak_memory: int

    def describe(self) -> dict[str, float]:
        """Give it as a part of a log."""
        speed = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return {"tokens_per_second": round(speed, 1), "peak_memory_bytes": self.peak_memory}


class Throughput(TrainerCallback):
    """A clock that runs while steps are made.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.evaluation_seconds = 0.0
        self._start()

    def _start(self) -> None:
        # on the device: it is read where a log waits for the device anyway
        self._tokens: torch.Tensor | None = None
        self._seconds = 0.0
        self._since: float | None = None
        self.last: Reading | None = None
        self.step_seconds, self.steps = 0.0, 0

    def count(self, attention_mask: torch.Tensor) -> None:
        """Count a batch that is trained on.

        Args:
            attention_mask: (B, T), 0 at padding.
        """
        tokens = attention_mask.detach().sum(dtype=torch.int64)
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def read(self, accelerator: Accelerator) -> Reading:
        """Read what was counted since the last reading; called by all processes, after the device has done its work.

        Args:
            accelerator: That of the trainer.

        Returns:
            The reading.
        """
        self._take()
        device = accelerator.device
        tokens = torch.zeros((), dtype=torch.int64, device=device) if self._tokens is None else self._tokens
        mine = torch.stack([tokens.to(device), torch.tensor(peak_bytes(device), device=device)])
        everyone = accelerator.gather(mine).reshape(-1, 2).cpu()
        self.last = Reading(int(everyone[:, 0].sum()), self._seconds, int(everyone[:, 1].max()))
        self._tokens, self._seconds = None, 0.0
        return self.last

    def seconds_left(self, steps: int, evaluations: int) -> float | None:
        """Foresee how long a run goes on.

        Args:
            steps: Steps that are left.
            evaluations: Evaluations that are left.

        Returns:
            Seconds, by the steps so far and the last evaluation; None before the first step.
        """
        if not self.steps:
            return None
        return steps * self.step_seconds / self.steps + evaluations * self.evaluation_seconds

    def _take(self) -> None:
        if self._since is not None:
            now = self.clock()
            self._seconds += now - self._since
            self.step_seconds += now - self._since
            self._since = now

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from nothing."""
        self._start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; what was loaded for the first step, or passed over to get there, does not count."""
        if self._since is None:
            self._since = self.clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time; a GPU must have done the step before something else begins."""
        if (control.should_evaluate or control.should_save) and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._take()
        self.steps += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave out the time since the step."""
        self._skip()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave out the time since the step."""
        self._skip()

    def _skip(self) -> None:
        if self._since is not None:
            self._since = self.clock()


def peak_bytes(device: torch.device) -> int:
    """Give the most memory that was in use so far.

    Args:
        device: Where the model trains.

    Returns:
        Bytes: what torch has reserved on a CUDA GPU, else those of this process.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory()
