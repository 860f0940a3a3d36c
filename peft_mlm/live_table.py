"""The table on a terminal while a run trains: the last logs, how far it is, what the last evaluation gave.

It is drawn by the process that trains, between two steps and once a second at most; there is no thread beside it. What
is printed meanwhile stands above it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_mlm.console import bytes_text
from peft_mlm.metrics import MaskedScores
from peft_mlm.throughput import Throughput

ROWS = 8
SECONDS = 1.0  # between two drawings; one takes 7 milliseconds
LINES_BELOW = 10  # that the table leaves for its head, the lines below it, and the prompt
Batch = TypeVar("Batch")


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        name: Its head.
        key: What it shows of a log.
        text: How.
        goes: Where the terminal is narrow, columns go in this order; 0 stays.
    """

    name: str
    key: str
    text: Callable[[Any], str]
    goes: int


COLUMNS = (
    Column("step", "step", "{:,}".format, 0),
    Column("loss", "loss", "{:.4f}".format, 0),
    Column("learning\nrate", "learning_rate", "{:.2e}".format, 3),
    Column("perplexity", "eval_perplexity", "{:.3f}".format, 1),
    Column("masked\naccuracy", "eval_accuracy", "{:.4f}".format, 5),
    Column("tokens/s", "tokens_per_second", "{:,.0f}".format, 4),
    Column("memory", "peak_memory_bytes", bytes_text, 2),
)


def can_draw() -> bool:
    """Tell whether the terminal can move its cursor.

    Returns:
        False for the dumb ones.
    """
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class LiveTable(TrainerCallback):
    """The table; it is there inside a `with`, and the terminal is as before when that ends, however it ends.

    Args:
        throughput: That of the trainer, for the time that is left.
        console: Where it is drawn; stderr if None.
    """

    def __init__(self, throughput: Throughput, console: Console | None = None) -> None:
        self.throughput = throughput
        self.console = console
        self.base: MaskedScores | None = None
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._drawn = 0.0
        self._begin(0, 0)

    def _begin(self, step: int, max_steps: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.step, self.max_steps, self.evaluations_left = step, max_steps, 0
        self.evaluation: dict[str, Any] = {}
        self.doing, self.is_done = "", False

    def __enter__(self) -> LiveTable:
        """Draw it, and let all that is printed stand above it."""
        streams = (sys.stderr, sys.stdout)
        console = self.console or Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        # A result that goes into a file goes past the terminal.
        both = sys.stdout.isatty()
        self._live = Live(
            console=console, auto_refresh=False, get_renderable=self._render, redirect_stdout=both, redirect_stderr=True
        )
        self._live.start(refresh=True)
        # Handlers of loggers hold the stream itself, past which the table would be drawn.
        for handler in _stream_handlers():
            if handler.stream in streams:
                self._handlers.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last drawing, and the terminal as it was."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        if self._live is not None:
            self.doing = ""
            self._live.stop()
            self._live = None

    @property
    def is_shown(self) -> bool:
        """Whether it is on the terminal now."""
        return self._live is not None

    def watch(self, batches: Iterable[Batch], label: str) -> Iterator[Batch]:
        """Pass batches of an evaluation on, and show how far it is.

        Args:
            batches: A sized iterable.
            label: What it is called.

        Yields:
            The batches.
        """
        count = len(batches)  # type: ignore[arg-type]
        for number, batch in enumerate(batches):
            self.doing = f"{label}, batch {number + 1} of {count}"
            self._draw()
            yield batch
        self.doing = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with an empty table."""
        self._begin(state.global_step, state.max_steps)
        self._draw(now=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on."""
        self.step = state.global_step
        self.evaluations_left = evaluations_left(args, state)
        self._draw()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a log, or an evaluation, as a row; both of the same step are one."""
        if not logs or not {"loss", "eval_loss"} & set(logs):
            return
        if not self.rows or self.rows[-1]["step"] != state.global_step:
            self.rows = [*self.rows[1 - ROWS :], {"step": state.global_step}]
        self.rows[-1] |= logs
        if "eval_loss" in logs:
            self.evaluation = self.rows[-1]
        self._draw(now="eval_loss" in logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the last step."""
        self.is_done = True
        self._draw(now=True)

    def _draw(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if self._live is not None and (now or moment - self._drawn >= SECONDS):
            self._live.refresh()
            self._drawn = moment

    def _render(self) -> RenderableType:
        return "" if self._live is None else self.render(self._live.console)

    def render(self, console: Console) -> RenderableType:
        """Draw what is known, as wide and as high as the terminal is now.

        Args:
            console: For its size.

        Returns:
            The table and the lines below it.
        """
        parts: list[RenderableType] = []
        shown = self.rows[-max(1, min(ROWS, console.height - LINES_BELOW)) :]
        if shown:
            parts.append(_fitting_table(shown, console))
        parts.append(self._bar(console.width))
        lines = (self._speed(), self._evaluated(), f" {self.doing}" if self.doing else "")
        parts += [Text(line, style="dim") for line in lines if line]
        return Group(*parts)

    def _bar(self, width: int) -> RenderableType:
        left = self.throughput.seconds_left(self.max_steps - self.step, self.evaluations_left)
        words = f"{self.step:,} of {self.max_steps:,} steps"
        time_left = "" if left is None else f"{clock_text(left)} left"
        if self.is_done:
            time_left = f"in {clock_text(self.throughput.step_seconds)}"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            f" {words}",
            ProgressBar(total=max(self.max_steps, 1), completed=self.step, width=24 if width >= 60 else 8),
            time_left,
        )
        return grid

    def _speed(self) -> str:
        reading = self.throughput.last
        if reading is None:
            return ""
        speed = reading.describe()["tokens_per_second"]
        return f" {speed:,.0f} tokens/s, {bytes_text(reading.peak_memory)} of memory at most"

    def _evaluated(self) -> str:
        if not self.evaluation:
            return ""
        parts = []
        for name, key in (("perplexity", "perplexity"), ("masked accuracy", "accuracy")):
            before = "" if self.base is None else f" (base {getattr(self.base, key):.4g})"
            parts.append(f"{name} {self.evaluation[f'eval_{key}']:.4g}{before}")
        return f" at step {self.evaluation['step']:,}: {', '.join(parts)}"


def evaluations_left(arguments: TrainingArguments, state: TrainerState) -> int:
    """Count the evaluations that are to come.

    Args:
        arguments: When to evaluate.
        state: How far the run is.

    Returns:
        Their number, with the one of this step.
    """
    if arguments.eval_strategy == "steps" and state.eval_steps:
        return int(state.max_steps // state.eval_steps - (state.global_step - 1) // state.eval_steps)
    if arguments.eval_strategy == "epoch":
        return max(0, int(state.num_train_epochs) - int(state.epoch or 0))
    return 0


def clock_text(seconds: float) -> str:
    """Say how long something takes.

    Args:
        seconds: Any number from 0 on.

    Returns:
        Such as "1:05" (minutes), "2:01:05", or "3 days, 2:01:05".
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    time_text = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} day{'s' if days > 1 else ''}, {time_text}" if days else time_text


def _fitting_table(rows: list[dict[str, Any]], console: Console) -> Table:
    """The table with as many columns as the terminal is wide."""
    table = Table()
    for dropped in range(len(COLUMNS)):
        columns = [column for column in COLUMNS if not 0 < column.goes <= dropped]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True)
        for column in columns:
            table.add_column(column.name, justify="right", no_wrap=True)
        for row in rows:
            values = (row.get(column.key) for column in columns)
            table.add_row(*("" if v is None else column.text(v) for v, column in zip(values, columns, strict=True)))
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            break
    return table


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = (logging.getLogger(), *logging.Logger.manager.loggerDict.values())
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
