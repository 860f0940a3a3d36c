"""What a value of an argument may be, and how text, numbers and lists become one.

Command line, JSON and YAML spell the same value differently (`5e-5`, `"5e-5"`, `5.0e-05`); `convert` gives the
declared type, or says in a `ValueError` why it cannot.
"""

from __future__ import annotations

import ast
import json
import math
import numbers
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

TRUE_WORDS = frozenset({"true", "yes", "on", "1", "y", "t"})
FALSE_WORDS = frozenset({"false", "no", "off", "0", "n", "f"})
NONE_WORDS = frozenset({"none", "null"})

_WHOLE = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_YAML_INFINITY = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf"}


@dataclass(frozen=True)
class ArgumentType:
    """What a value may be; several may hold at once, as in `bool | str | None`.

    Attributes:
        none: It may be None.
        boolean: It may be True or False.
        whole: It may be a whole number.
        number: It may be a number.
        text: It may be any text.
        anything: It may be whatever JSON can hold; text that reads as a number, true, false or null becomes that.
        choices: It may be one of these.
        items: It may be a list of values of this type.
        entries: It may be a mapping from names to values of this type.
        unknown: Name of a class that cannot be written in text.
    """

    none: bool = False
    boolean: bool = False
    whole: bool = False
    number: bool = False
    text: bool = False
    anything: bool = False
    choices: tuple[str | bool, ...] = ()
    items: ArgumentType | None = None
    entries: ArgumentType | None = None
    unknown: str | None = None


_ANYTHING = ArgumentType(none=True, anything=True)
_PLAIN_TYPES = {
    "None": ArgumentType(none=True),
    "bool": ArgumentType(boolean=True),
    "int": ArgumentType(whole=True),
    "float": ArgumentType(number=True),
    "str": ArgumentType(text=True),
    "Any": _ANYTHING,
    "list": ArgumentType(items=_ANYTHING),
    "dict": ArgumentType(entries=_ANYTHING),
}


def parse_type(annotation: str, named_choices: Mapping[str, tuple[str, ...]] | None = None) -> ArgumentType:
    """Read an annotation as Python code spells it.

    Args:
        annotation: Such as `float | None`, `Optional[List[str]]`, `Literal["a", "b"]`.
        named_choices: Values of the enumerations and of the aliases of `Literal` that annotations may name.

    Returns:
        The type. A name that is not known gives a type with `unknown` set.
    """
    return _parse(ast.parse(annotation, mode="eval").body, named_choices or {})


def _parse(node: ast.expr, named_choices: Mapping[str, tuple[str, ...]]) -> ArgumentType:
    if isinstance(node, ast.Constant):
        return _PLAIN_TYPES["None"] if node.value is None else parse_type(str(node.value), named_choices)
    if isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in named_choices:
            return ArgumentType(choices=named_choices[name])
        return _PLAIN_TYPES.get(name.replace("List", "list").replace("Dict", "dict"), ArgumentType(unknown=name))
    if isinstance(node, ast.BinOp):
        return _either([node.left, node.right], named_choices)
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value).rpartition(".")[2].lower()
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer == "literal":
            return ArgumentType(choices=tuple(ast.literal_eval(choice) for choice in inner))
        if outer in ("optional", "union"):
            return _either([*inner, ast.Constant(None)] if outer == "optional" else inner, named_choices)
        if outer in ("list", "sequence", "tuple"):
            return ArgumentType(items=_parse(inner[0], named_choices))
        if outer in ("dict", "mapping"):
            return ArgumentType(entries=_parse(inner[-1], named_choices))
    return ArgumentType(unknown=ast.unparse(node))


def _either(nodes: list[ast.expr], named_choices: Mapping[str, tuple[str, ...]]) -> ArgumentType:
    types = [_parse(node, named_choices) for node in nodes]
    # `SchedulerType | str` means the enumeration, or its value as text: not any text.
    enumerated = any(isinstance(node, ast.Name) and node.id in named_choices for node in nodes)
    return ArgumentType(
        none=any(kind.none for kind in types),
        boolean=any(kind.boolean for kind in types),
        whole=any(kind.whole for kind in types),
        number=any(kind.number for kind in types),
        text=any(kind.text for kind in types) and not enumerated,
        anything=any(kind.anything for kind in types),
        choices=tuple(choice for kind in types for choice in kind.choices),
        items=next((kind.items for kind in types if kind.items), None),
        entries=next((kind.entries for kind in types if kind.entries), None),
        unknown=next((kind.unknown for kind in types if kind.unknown), None),
    )


def describe_type(kind: ArgumentType) -> str:
    """Say what a value may be.

    Args:
        kind: The type.

    Returns:
        Such as `a whole number or none`; to be read after "is not".
    """
    parts = []
    if kind.choices:
        shown = ["false" if choice is False else str(choice) for choice in kind.choices]
        parts.append(f"one of {', '.join(shown)}" if len(shown) > 1 else shown[0])
    parts += ["true or false"] * kind.boolean
    parts += ["a whole number"] * (kind.whole and not kind.number) + ["a number"] * kind.number
    parts += ["text"] * kind.text + ["a value that JSON can hold"] * kind.anything
    if kind.items:
        parts.append(f"a list (each item {describe_type(kind.items)})")
    if kind.entries:
        parts.append(f"a mapping (each value {describe_type(kind.entries)})")
    parts += ["none"] * (kind.none and not kind.anything)
    return " or ".join(parts)


def split_list(text: str) -> list[str]:
    """Split text at its commas, but not within brackets, so that a pattern such as `layer.{1,2}` stays whole.

    Args:
        text: Such as `query, value`.

    Returns:
        The parts without the blanks around them; empty parts are left out.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def convert(value: Any, kind: ArgumentType) -> Any:
    """Turn a value, as a file, a flag or Python code gave it, into one of the declared type.

    Args:
        value: Text, a number, a boolean, None, a path, an enumeration's member, a list or a mapping.
        kind: What it may be.

    Returns:
        The value in the declared type. Converting that again gives the same.

    Raises:
        ValueError: It is not, and does not read as, what the type allows. The message starts with the value.
    """
    value = _plain(value)
    nothing = value is None or (isinstance(value, str) and value.strip().lower() in NONE_WORDS)
    if kind.unknown and not (kind.none and nothing):
        raise ValueError(f"{show(value)} cannot be used: a {kind.unknown} cannot be written as an argument")
    if value is None:
        if not kind.none:
            raise ValueError(f"none (null) is not {describe_type(kind)}")
        return None
    if isinstance(value, _Path):
        # A path is one file, though its name holds a comma.
        return [str(value)] if kind.items and not kind.text else convert(str(value), replace(kind, items=None))
    if isinstance(value, str):
        return _from_text(value, kind)
    if isinstance(value, list):
        if kind.items or kind.anything:
            return [convert(item, kind.items or _ANYTHING) for item in value]
    elif isinstance(value, dict):
        if kind.entries or kind.anything:
            return _from_mapping(value, kind.entries or _ANYTHING)
    elif isinstance(value, bool):
        return _from_boolean(value, kind)
    else:
        return _from_number(value, kind)
    raise ValueError(f"{show(value)} is not {describe_type(kind)}")


class _Path(str):
    """Text that came as a path object."""


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return _Path(os.fspath(value))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str | bool | int | float | None):
        return value
    # numpy's scalars
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError(f"{show(value)} is a {type(value).__name__}, which is not a kind of value that arguments have")


def _from_boolean(value: bool, kind: ArgumentType) -> Any:
    if kind.boolean or kind.anything or value in [choice for choice in kind.choices if isinstance(choice, bool)]:
        return value
    for word in ("true",) if value else ("no", "false"):
        if word in kind.choices:
            return word
    if kind.text:
        return "true" if value else "false"
    if kind.items:
        return [_from_boolean(value, kind.items)]
    raise ValueError(f"{show(value)} is not {describe_type(kind)}")


def _from_number(value: int | float, kind: ArgumentType) -> Any:
    if kind.anything:
        return value
    if kind.number and value == value:  # not nan
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{show(value)} is too large a number") from None
    if kind.whole and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if kind.boolean and value in (0, 1) and isinstance(value, int):
        return bool(value)
    if kind.text:
        return str(value)
    if kind.items:
        return [_from_number(value, kind.items)]
    raise ValueError(f"{show(value)} is not {describe_type(kind)}")


def _from_text(text: str, kind: ArgumentType) -> Any:
    word = text.strip()
    for spelling in (text, word, word.lower()):
        if spelling in kind.choices:
            return spelling
    if kind.anything:
        return _resolve(text)
    if kind.none and word.lower() in NONE_WORDS:
        return None
    # Beside free text only the two words that cannot be meant otherwise are read as booleans.
    if (kind.boolean or False in kind.choices) and word.lower() in ({"false"} if kind.text else FALSE_WORDS):
        return False
    if kind.boolean and word.lower() in ({"true"} if kind.text else TRUE_WORDS):
        return True
    if kind.entries and word.startswith("{"):
        return _from_mapping(_read_json(word, dict), kind.entries)
    if kind.number or kind.whole:
        number = _read_number(word, whole=not kind.number)
        if number is not None:
            return number
    if kind.items:
        return _list_from_text(text, kind, kind.items)
    if kind.text:
        return text
    raise ValueError(f"{show(text)} is not {describe_type(kind)}" + " (as JSON)" * (kind.entries is not None))


def _list_from_text(text: str, kind: ArgumentType, item: ArgumentType) -> Any:
    if text.lstrip().startswith("["):
        try:
            return [convert(value, item) for value in _read_json(text, list)]
        except ValueError:
            # It may be a pattern such as [ab]*.txt.
            if not item.text:
                raise
    parts = split_list(text)
    if kind.text and len(parts) < 2:
        return text
    return [convert(part, item) for part in parts]


def _from_mapping(value: Mapping[Any, Any], entry: ArgumentType) -> dict[str, Any]:
    converted = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise ValueError(f"{show(dict(value))} has the name {show(name)}, which is not text")
        try:
            converted[name] = convert(item, entry)
        except ValueError as error:
            raise ValueError(f"{show(dict(value))}: the value of {name}, {error}") from None
    return converted


def _read_json(text: str, wanted: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{show(text)} is not JSON: {error}") from None
    if not isinstance(value, wanted):
        raise ValueError(f"{show(text)} is not a {wanted.__name__}")
    return value


def _read_number(word: str, *, whole: bool) -> int | float | None:
    """Give the number, or None if the text is not one (or not a whole one)."""
    word = _YAML_INFINITY.get(word.lower(), word)
    if whole:
        try:
            return int(word)
        except ValueError:
            pass
    try:
        number = float(word)
    except ValueError:
        return None
    if math.isnan(number):
        return None
    if not whole:
        return number
    return int(number) if number.is_integer() else None


def _resolve(text: str) -> Any:
    """Read text whose type nothing declares, as the core of YAML 1.2 does."""
    word = text.strip()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word == "null":
        return None
    if _WHOLE.fullmatch(word):
        return int(word)
    if _NUMBER.fullmatch(word) or word.lower() in _YAML_INFINITY:
        return float(_YAML_INFINITY.get(word.lower(), word))
    return text


def show(value: Any) -> str:
    """Show a value in a message.

    Args:
        value: Any value.

    Returns:
        At most 80 characters; booleans and None as files spell them.
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
