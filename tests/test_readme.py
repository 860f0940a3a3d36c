"""The README says what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_mlm.argument_fields import argument_fields
from peft_mlm.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Flags of commands that are no arguments of a run.
OTHER_FLAGS = {
    "json",
    "eval_file",
    "help",
    "use_base",
    "base",
    "any_base",
    "output_dir",
    "output_file",
    "top_k",
    "targets",
    "only",
    "file",
    "with_base",
    "gpu",
    "adapter",
    "format",
    "pooling",
    "encoder_only",
}


def test_every_command_and_make_target_it_names_exists() -> None:
    assert set(re.findall(r"^peft-mlm ([\w-]+)", README, re.MULTILINE)) <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


def test_every_flag_it_names_exists() -> None:
    named = set(re.findall(r"--(\w+)", README))
    assert named
    assert named <= set(argument_fields()) | OTHER_FLAGS


def test_the_layout_lists_every_module_but_the_parts_of_a_listed_one() -> None:
    layout = README[README.index("## Layout") : README.index("## Licence")]
    listed = set(re.findall(r"(\w+)\.py", layout))
    there = {file.stem for file in (ROOT / "peft_mlm").glob("*.py")}
    assert listed <= there
    parts = {"argument_fields", "argument_rules", "argument_sources", "argument_types", "renamed_arguments"}
    parts |= {"quantization_rules", "method_options", "peft_rules", "settled_arguments", "dataclass_source"}
    assert there - listed <= parts | {"text_formats", "errors", "__init__", "__main__"}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([\w./]+)\)", README))))
def test_every_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).is_file()
