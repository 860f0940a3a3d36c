"""The options of each PEFT method: names, types and defaults, read from PEFT's source text.

Importing PEFT means importing torch, which takes seconds; and its classes of options check no types.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_mlm.argument_types import ArgumentType, convert, parse_type, show
from peft_mlm.dataclass_source import annotated_lines, literal, package_folder
from peft_mlm.methods import METHODS

# What the declared type leaves open or says too narrowly, and why.
TYPES_BY_NAME: dict[str, str] = {
    # The declared choices hold "pissa_niter_[number of iters]"; lora_ga is missing.
    "init_lora_weights": "bool | str",
    # Fractions are fine: they only scale.
    "lora_alpha": "float",
    "delora_lambda": "float",
}


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: Its name in PEFT.
        type: What its value may be; for options that are a class of options, a mapping.
        default: Its value if not given; `dataclasses.MISSING` where it is not written as a literal.
        parts: The options within it, by name; empty where it is a plain value.
    """

    name: str
    type: ArgumentType
    default: Any
    parts: Mapping[str, Option] = dataclasses.field(default_factory=dict)


@functools.cache
def method_options(method: str) -> Mapping[str, Option]:
    """Read the options of a method.

    Args:
        method: A key of `METHODS`.

    Returns:
        Options by name, those of every PEFT method (such as task_type) left out.
    """
    common = {
        line.target.id
        for line in annotated_lines(_classes()["PeftConfig"], _classes())
        if isinstance(line.target, ast.Name)
    }
    return {name: option for name, option in _options(METHODS[method].config).items() if name not in common}


def methods_with(option: str) -> list[str]:
    """List the methods that have an option and serve masked language models.

    Args:
        option: Its name in PEFT.

    Returns:
        Names of methods.
    """
    return [name for name, row in METHODS.items() if not row.refused and option in method_options(name)]


def convert_options(method: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check options against those that a method has, and give their values the declared types.

    Args:
        method: A key of `METHODS`.
        given: Values of any kind by PEFT's names.

    Returns:
        The values in their types, and one sentence per fault.
    """
    return _convert(given, method_options(method), f"peft_method {method}", within="peft_config")


def _convert(
    given: Mapping[str, Any], options: Mapping[str, Option], owner: str, *, within: str
) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    faults: list[str] = []
    for name, value in given.items():
        if name not in options:
            faults.append(f"{within}: {owner} has no option {show(name)}.{_hint(name, options)}")
            continue
        option = options[name]
        if option.parts and isinstance(value, Mapping):
            values[name], inner = _convert(value, option.parts, name, within=f"{within}.{name}")
            faults += inner
            continue
        try:
            values[name] = convert(value, option.type)
        except ValueError as error:
            faults.append(f"{within}: the value of {name}, {error}.")
    return values, faults


def _hint(name: str, options: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.7)
    if near:
        return f" Nearest: {', '.join(near)}."
    others = methods_with(name)
    belongs = f" It belongs to {', '.join(others)}." if others else ""
    return f"{belongs} It has: {', '.join(sorted(options))}."


def _options(config: str) -> dict[str, Option]:
    read: dict[str, Option] = {}
    for line in annotated_lines(_classes()[config], _classes()):
        name, annotation = ast.unparse(line.target), ast.unparse(line.annotation)
        keywords: dict[str | None, ast.expr] = {}
        default = line.value
        if isinstance(line.value, ast.Call) and ast.unparse(line.value.func) in ("field", "dataclasses.field"):
            keywords = {keyword.arg: keyword.value for keyword in line.value.keywords}
            default = keywords.get("default", keywords.get("default_factory"))
        if "init" in keywords and not literal(keywords["init"]):
            continue
        kind = parse_type(TYPES_BY_NAME.get(name, annotation))
        parts = _options(kind.unknown) if kind.unknown is not None and kind.unknown in _classes() else {}
        if parts:
            # Some are on by default parts, so that an empty mapping asks for them.
            kind = dataclasses.replace(kind, unknown=None, entries=ArgumentType(none=True, anything=True))
        elif kind.unknown and kind.text:
            kind = dataclasses.replace(kind, unknown=None)  # an enumeration's value as text
        if literal(default) is None and not kind.none:
            kind = dataclasses.replace(kind, none=True)
        read[name] = Option(name, kind, literal(default), parts)
    return read


@functools.cache
def _classes() -> Mapping[str, ast.ClassDef]:
    """Read all classes of options: of the methods, and what they share."""
    folder = package_folder("peft")
    files = [folder / "config.py", folder / "tuners" / "lycoris_utils.py", *sorted(folder.glob("tuners/*/config.py"))]
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef) and "Config" in node.name}
