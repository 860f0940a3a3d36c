from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import peft_mlm
from peft_mlm.argument_fields import argument_fields
from peft_mlm.cli import COMMANDS

ARGUMENTS = {
    "train": tuple(argument_fields()),
    "plan": ("gpu", "device", *argument_fields()),
    "evaluate": tuple(name for name, field in argument_fields().items() if field.group in ("data", "training")),
    "fill-mask": ("top_k", "base", "use_base", "with_base", "targets", "only", "file", "text_column"),
    "playground": ("base", "any_base", "host", "port", "open"),
    "score": ("method", "variant", "sequence", "offset", "measured", "output_file", "with_base", "truncate"),
    "compare": ("eval_file", "bootstrap", "level", "top_tokens", "output_file", "base", "eval_mask_draws"),
    "merge": ("output_dir", "base", "dtype"),
    "combine": ("output_dir", "weights", "method", "rank", "density", "seed", "trained_modules", "base", "search"),
    "convert": ("output_dir", "rank", "base", "any_base"),
    "extract": ("output_dir", "rank", "base", "carry", "lora_target_modules"),
    "export": ("output_dir", "format", "encoder_only", "pooling", "dtype", "base", "any_base"),
    "inspect": ("base",),
    "verify": (),
    "report": ("output_file",),
    "push": ("private", "revision", "commit_message", "dry_run"),
    "doctor": (),
    "demo": ("output_dir",),
}
# The signal comes while the command reads standard input.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
from peft_mlm.cli import main

class Stdin:
    def __iter__(self):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        yield "A<mask>"

sys.stdin = Stdin()
sys.exit(main(["fill-mask", "nothing"]))
"""


def peft_mlm_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "peft_mlm", *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("help",)])
def test_help_names_every_command_with_what_it_does(words: tuple[str, ...]) -> None:
    done = peft_mlm_command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout
    assert "--json" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_every_argument_and_runs_nothing(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peft_mlm", name, "--output_dir", "x", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: peft-mlm {name} ")
    words = set(done.stdout.replace("[", " ").replace(",", " ").split())
    assert {f"--{argument}" for argument in ARGUMENTS[name]} - words == set()
    assert "--json" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_the_package() -> None:
    done = peft_mlm_command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"peft-mlm {peft_mlm.__version__}\n", "")
    assert peft_mlm.__version__ == importlib.metadata.version("peft-mlm")


def test_the_installed_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("peft-mlm")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.stdout == peft_mlm_command("--help").stdout


def test_without_a_command_the_overview_goes_to_stderr() -> None:
    done = peft_mlm_command()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == peft_mlm_command("--help").stdout


@pytest.mark.parametrize("word", ["trian", "fill_mask", "--json", ""])
def test_an_unknown_command_is_one_message_with_the_real_ones(word: str) -> None:
    done = peft_mlm_command(word)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"peft-mlm: error: there is no command {word!r}")
    for name in COMMANDS:
        assert name in line


def test_the_reader_of_a_pipe_may_leave() -> None:
    words = [sys.executable, "-m", "peft_mlm", "train", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_command_that_is_stopped_says_so_and_ends_with_130(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, name], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "peft-mlm: interrupted\n")
