"""What commands say: notices and progress on stderr, results on stdout, the libraries' chatter nowhere.

Nothing here runs on import, and nothing heavy is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

from peft_mlm.errors import ArgumentsError

# Loggers of libraries that speak at the warning level about things that are no news to a user.
CHATTY = (
    *("transformers", "datasets", "accelerate", "bitsandbytes", "peft", "torch", "huggingface_hub", "httpx"),
    "matplotlib",
)


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are our errors, so that they too end in one message and exit code 2.

    Args:
        command: Name of the command.
        description: What it does, for its help text; None for a few arguments among others.
    """

    def __init__(self, command: str, description: str | None = None) -> None:
        super().__init__(
            f"peft-mlm {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Args:
            message: Its complaint.

        Raises:
            ArgumentsError: Always.
        """
        raise ArgumentsError(f"{message}. {self.prog} --help lists the arguments.")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words of a command line.

        Args:
            words: Words after the command's name.

        Returns:
            The values by name.

        Raises:
            ArgumentsError: A word is unknown, missing or wrong; an unknown flag with the nearest real one.
        """
        given, left = self.parse_known_intermixed_args(words)  # flags may stand between the others
        if left:
            near = difflib.get_close_matches(left[0].partition("=")[0], re.findall(r"--\w+", self.format_usage()), n=1)
            self.error(f"{left[0]}: there is no such argument" + (f"; nearest: {near[0]}" if near else ""))
        return given


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports and bars: what matters in them, we say ourselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def quiet_libraries() -> None:
    """Silence the libraries' warnings and bars in this process; for commands, not for library use.

    What of it matters, peft_mlm finds out itself and says with a remedy.
    """
    # Read when these libraries are imported, which sets their loggers anew.
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def is_first_process() -> bool:
    """Tell whether this is the process that writes and speaks (torchrun and accelerate number them in RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_processes() -> None:
    """Take leave of the other processes of a run, once the work is done; one that ends without it may be aborted."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def show_notices(stream: TextIO) -> None:
    """Show what peft_mlm's own logger says, one line each.

    Args:
        stream: Where to, usually stderr.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("peft-mlm: %(message)s"))
    logger = logging.getLogger("peft_mlm")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def print_table(title: str, header: Sequence[str] | None, rows: Sequence[Sequence[Any]], *, stream: TextIO) -> None:
    """Print a small table; numbers are right-aligned.

    Args:
        title: Line above it.
        header: Names of the columns; None for a list of names and values.
        rows: Cells; floats are shown with four significant digits.
        stream: Where to.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=header is not None)
    for index, name in enumerate(header or ("", "")):
        table.add_column(name, justify="left" if index == 0 or header is None else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if title:  # not the table's own, which is folded to the table's width
        console.print(title, style="bold", soft_wrap=True)
    console.print(table)


def cell(value: Any) -> str:
    """Show a value in a table.

    Args:
        value: Anything; None is a dash.

    Returns:
        Its text.
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def with_error(value: float | None, error: float | None) -> str:
    """Show a figure with its standard error, to the same number of decimals.

    Example:
        >>> with_error(1.23456, 0.0123), with_error(1.23456, None)
        ('1.235 ± 0.012', '1.235')

    Args:
        value: The figure; None or no finite number where there is none.
        error: Its standard error; None or no finite number where it is not known.

    Returns:
        The figure and its error, to two digits of the error; without ± where the error is not known.
    """
    if value is None or error is None or not (math.isfinite(value) and math.isfinite(error)) or error == 0:
        return cell(value)
    digits = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def interval_text(difference: float | None, low: float | None, high: float | None, level: float) -> str:
    """Show a difference with its interval.

    Example:
        >>> interval_text(-0.123456, -0.15, -0.0987, 0.95)
        '-0.123 (95 %: -0.150 to -0.099)'

    Args:
        difference: None or no finite number where there is none.
        low: Lower end, likewise.
        high: Upper end, likewise.
        level: Share of such intervals that hold the true value.

    Returns:
        All to the same decimals: two digits of the interval's half width.
    """
    if difference is None or not math.isfinite(difference):
        return "-"
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{difference:+.4g}"
    half = (high - low) / 2
    digits = 1 - math.floor(math.log10(half)) if half > 0 else 4
    shown = [f"{one:+.{min(max(digits, 0), 12)}f}" for one in (difference, low, high)]
    return f"{shown[0]} ({100 * level:.4g} %: {shown[1]} to {shown[2]})"


def few_names(names: Sequence[str], shown: int = 5) -> str:
    """Write names in a row, the first few of many.

    Args:
        names: All of them.
        shown: How many are written out. Default 5.

    Returns:
        Such as "a, b and 3 more".
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def bytes_text(count: int) -> str:
    """Say a number of bytes.

    Args:
        count: Bytes.

    Returns:
        With a unit of thousands, such as 312 kB.
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def probability_text(probability: float) -> str:
    """Write a probability.

    Args:
        probability: From 0 to 1.

    Returns:
        Such as 0.0312; such as 4.2e-06 where four decimals would show none.
    """
    return f"{probability:.4f}" if probability == 0 or probability >= 5e-5 else f"{probability:.1e}"
