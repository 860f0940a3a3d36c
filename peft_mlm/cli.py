"""The command line: one table of commands; a user's mistake ends in one message on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from peft_mlm import __version__
from peft_mlm.console import is_first_process, leave_processes, quiet_libraries, show_notices
from peft_mlm.errors import PeftMlmError
from peft_mlm.processor import tune_processor

# command: (module below peft_mlm.commands, what it does)
COMMANDS = {
    "train": ("train", "train an adapter (or the whole model) on your text"),
    "plan": ("plan", "tell what a training takes of memory, whether it fits, and how long it is, before it starts"),
    "evaluate": ("evaluate", "measure loss, perplexity and masked accuracy of a base, an adapter or a merged model"),
    "score": ("score", "score texts by pseudo-likelihood, and mutations of a protein"),
    "compare": ("compare", "compare models on the same masked tokens, with intervals, data set by data set"),
    "fill-mask": ("fill_mask", "predict the masked tokens of a text"),
    "playground": ("playground", "try a base and its adapters side by side, on a page of this machine"),
    "merge": ("merge", "merge an adapter into its base and prove that nothing changed"),
    "combine": ("combine", "combine several adapters into one, and search for their weights"),
    "convert": ("convert", "make LoRA of an adapter of another method, or lower the rank of a LoRA adapter"),
    "extract": ("extract", "make a LoRA adapter of a fully trained model and its base"),
    "export": ("export", "write the encoder alone, ONNX, or a sentence-transformers model"),
    "inspect": ("inspect_adapter", "tell what an adapter, a model or a run is, from its files alone"),
    "report": ("report", "tell on one page what runs were and gave: curves, before and after, facts"),
    "verify": ("verify", "check that what is shipped is whole and safe to open"),
    "push": ("push", "upload an adapter or a model to the hub, after a check of all that would go up"),
    "doctor": ("doctor", "check Python, libraries, GPU, disk and network, each with its remedy"),
    "demo": ("demo", "train, measure and merge on a real antibody model, without network"),
}
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process if None.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 when interrupted; what a command itself says (`exit_code`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(overview(), file=sys.stderr)
        return USER_ERROR
    if words[0] in ("-h", "--help", "help"):
        return _print(overview())
    if words[0] in ("-V", "--version"):
        return _print(f"peft-mlm {__version__}")
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}. Commands: {', '.join(COMMANDS)}.")
    command = importlib.import_module(f"peft_mlm.commands.{COMMANDS[name][0]}")
    if "-h" in rest or "--help" in rest:
        return _print(command.help_text())
    as_json = "--json" in rest
    return _run(command, [word for word in rest if word != "--json"], as_json=as_json)


def overview() -> str:
    """Give the text of `peft-mlm --help`."""
    lines = [
        "peft-mlm: adapt masked language models to your domain",
        "",
        "usage: peft-mlm COMMAND ...        (peft-mlm COMMAND --help says more)",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "Every command takes --json: one JSON object on stdout, everything else on stderr.",
    ]
    return "\n".join(lines)


def _run(command: Any, arguments: list[str], *, as_json: bool) -> int:
    quiet_libraries()
    tune_processor()
    show_notices(sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's "stop" ends a run like Ctrl-C: tidily
    try:
        # Libraries print; only the result belongs on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            record = command.run(arguments)
            leave_processes()
    except PeftMlmError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("peft-mlm: interrupted", file=sys.stderr)
        return INTERRUPTED
    if is_first_process():
        if as_json:
            from peft_mlm.run_folder import finite

            _print(json.dumps(finite(record), ensure_ascii=False))
        else:
            with _reader_may_leave():
                command.show(record)
    return command.exit_code(record) if hasattr(command, "exit_code") else 0


def _print(text: str) -> int:
    with _reader_may_leave():
        print(text)
    return 0


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Let the reader of a pipe (`| head`) leave when it has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"peft-mlm: error: {message}", file=sys.stderr)
    return USER_ERROR


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
