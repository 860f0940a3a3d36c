"""All arguments by name: type, default and help, of our three groups and of transformers' TrainingArguments.

TrainingArguments is read as source text, since importing it means importing torch, which takes seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, get_args, get_origin

from peft_mlm import arguments
from peft_mlm.argument_types import ArgumentType, describe_type, parse_type
from peft_mlm.dataclass_source import annotated_lines, literal, package_folder

Group = Literal["model", "data", "peft", "training"]
GROUPS: tuple[Group, ...] = get_args(Group)
OWN_GROUPS: dict[Group, type] = {
    "model": arguments.ModelArguments,
    "data": arguments.DataTrainingArguments,
    "peft": arguments.PEFTArguments,
}
TITLES: dict[Group, str] = {
    "model": "Base model and tokenizer",
    "data": "Text, rows and masks",
    "peft": "Adapter (without it the whole model is trained)",
    "training": "Training (transformers' TrainingArguments)",
}

# What the declared type leaves open or says too narrowly, and why.
TYPES_BY_NAME: dict[str, str] = {
    # "true" stands for the newest checkpoint of the run.
    "resume_from_checkpoint": "bool | str | None",
    # Declared `str | bool`; Trainer compares it with these words.
    "include_num_input_tokens_seen": 'bool | Literal["all", "non_padding", "no"]',
    # Trainer takes the word none, not None.
    "report_to": "str | list[str]",
    # The choices are the keys of a dict in another module.
    "log_level": 'Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]',
    "log_level_replica": 'Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]',
}


@dataclass(frozen=True)
class Field:
    """One argument.

    Attributes:
        name: Its name, the same in files, flags and dicts.
        group: Which of the four groups it belongs to.
        type: What its value may be.
        default: Its value if not given; `dataclasses.MISSING` where transformers computes it.
        help: What it does, in a sentence or two.
    """

    name: str
    group: Group
    type: ArgumentType
    default: Any
    help: str

    @property
    def choices(self) -> tuple[str | bool, ...]:
        """The values it may have, or an empty tuple if others are possible too."""
        return self.type.choices


@functools.cache
def argument_fields() -> Mapping[str, Field]:
    """Read the fields of all four groups.

    Returns:
        Fields by name, in the order of the groups; nothing is imported but our own dataclasses.
    """
    fields: dict[str, Field] = {}
    for group, cls in OWN_GROUPS.items():
        fields |= {field.name: field for field in _own_fields(group, cls)}
    return fields | {field.name: field for field in _training_fields() if field.name not in fields}


def _own_fields(group: Group, cls: type) -> Iterator[Field]:
    aliases = {name: get_args(value) for name, value in vars(arguments).items() if get_origin(value) is Literal}
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind = parse_type(TYPES_BY_NAME.get(field.name, str(field.type)), aliases)
        yield Field(field.name, group, kind, default, field.metadata.get("help", ""))


def _training_fields() -> Iterator[Field]:
    folder = package_folder("transformers")
    classes: dict[str, ast.ClassDef] = {}
    for module in ("debug_utils.py", "trainer_utils.py", "training_args.py"):
        tree = ast.parse((folder / module).read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    enumerations = {name: values for name, node in classes.items() if (values := _enumeration(node))}
    for line in annotated_lines(classes["TrainingArguments"], classes):
        yield _training_field(line, enumerations)


def _enumeration(node: ast.ClassDef) -> tuple[str, ...]:
    """Give the values of an enumeration of texts; nothing for another class."""
    if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        return ()
    return tuple(
        line.value.value
        for line in node.body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
    )


def _training_field(line: ast.AnnAssign, enumerations: Mapping[str, tuple[str, ...]]) -> Field:
    name, annotation = ast.unparse(line.target), ast.unparse(line.annotation)
    default, metadata = literal(line.value), dict[str, Any]()
    if isinstance(line.value, ast.Call):
        options = {keyword.arg: keyword.value for keyword in line.value.keywords}
        default = literal(options.get("default_factory", options.get("default")))
        metadata = _literal_entries(options.get("metadata"))
    kind = parse_type(TYPES_BY_NAME.get(name, annotation), enumerations)
    if "choices" in metadata and not kind.choices:
        kind = dataclasses.replace(kind, choices=tuple(metadata["choices"]), text=False)
    if metadata.get("const") is True:  # the flag may stand alone
        kind = dataclasses.replace(kind, boolean=True)
    # argparse wants %% for a per cent sign.
    return Field(name, "training", kind, default, str(metadata.get("help", "")).replace("%%", "%"))


def _literal_entries(node: ast.expr | None) -> dict[str, Any]:
    if not isinstance(node, ast.Dict):
        return {}
    read = {literal(key): literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    return {str(key): value for key, value in read.items() if value is not MISSING}


def render_help(groups: Sequence[Group], defaults: Mapping[str, str], *, width: int = 100) -> str:
    """Render the arguments of some groups as help text.

    Args:
        groups: Which groups, in this order.
        defaults: How to say the default of an argument, where it is not the one of its field.
        width: Characters per line.

    Returns:
        One paragraph per argument below one title per group.
    """
    lines: list[str] = []
    for group in groups:
        lines += ["", f"{TITLES[group]}:", ""]
        for field in argument_fields().values():
            if field.group == group:
                lines += _help_lines(field, defaults.get(field.name, _default_text(field)), width)
    return "\n".join(lines[1:])


def _help_lines(field: Field, default: str, width: int) -> list[str]:
    head = f"  --{field.name} {_value_text(field.type)}".rstrip() + (f"  (default: {default})" if default else "")
    text = " ".join(field.help.split())
    if field.choices and field.type != ArgumentType(boolean=True):
        text = f"{text} Values: {describe_type(dataclasses.replace(field.type, none=False)).removeprefix('one of ')}."
    return [head, *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _value_text(kind: ArgumentType) -> str:
    words = []
    if kind.choices:
        words.append("CHOICE")
    words += ["[true|false]"] * kind.boolean + ["N"] * kind.whole + ["NUMBER"] * kind.number
    words += ["NAMES ..." if kind.items.text else "VALUES ..."] if kind.items else []
    words += ["JSON"] * (kind.entries is not None) + ["TEXT"] * (kind.text and kind.items is None)
    return " or ".join(words)


def _default_text(field: Field) -> str:
    if field.default is MISSING or field.default is None or field.default in ("", []):
        return ""
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
