"""The direction of imports, and what may be imported before a command runs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import peft_mlm
from peft_mlm.cli import COMMANDS

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "tokenizers", "numpy", "pyarrow")
WITHOUT_HEAVY = f"""
import logging, os, signal, sys, warnings

def settings():
    return dict(os.environ), signal.getsignal(signal.SIGTERM), warnings.filters[:], logging.root.handlers[:]

before = settings()
exec(sys.argv[1])
print([name for name in {HEAVY} if name in sys.modules], settings() == before, file=sys.stderr)
"""


def layers() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    return [module.strip() for layer in contract["layers"] for module in layer.split("|")]


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "Contracts: 1 kept, 0 broken." in done.stdout


def test_every_module_has_its_layer() -> None:
    package = ROOT / "peft_mlm"
    modules = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/*.py")}
    expected = {f"peft_mlm.{name}" for name in modules if not name.startswith("__")}
    assert set(layers()) == expected
    assert len(layers()) == len(expected)


@pytest.mark.parametrize(
    "code",
    [
        "import peft_mlm; dir(peft_mlm)",
        "import peft_mlm.cli, peft_mlm.config, peft_mlm.run_folder, peft_mlm.console, peft_mlm.card",
        *(f"import peft_mlm.commands.{module}" for module, _ in COMMANDS.values()),
        *(f"from peft_mlm.cli import main; main([{name!r}, '--help'])" for name in COMMANDS),
        "from peft_mlm.cli import main; main(['--help'])",
    ],
)
def test_imports_and_help_load_nothing_heavy_and_change_no_setting(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_HEAVY, code], capture_output=True, text=True)
    assert done.stderr == "[] True\n"


def test_the_public_names_are_those_of_their_modules() -> None:
    for name in peft_mlm.__all__:
        function = getattr(peft_mlm, name)
        assert function.__name__ == name
        assert function.__module__.startswith("peft_mlm.")
    assert set(peft_mlm.__all__) <= set(dir(peft_mlm))
    with pytest.raises(
        AttributeError, match="doctor, evaluate, export, extract, fill_mask, inspect, load, merge, push"
    ):
        peft_mlm.nothing  # noqa: B018
