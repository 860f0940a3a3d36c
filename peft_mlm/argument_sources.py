"""Read arguments from where they are written: JSON and YAML files, and the words of a command line.

Numbers, booleans and the like stay text here, so that `1.10` as a revision is not the number 1.1, and `no` as a
strategy not False; what a text means depends on the argument it is given to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_mlm.argument_fields import GROUPS
from peft_mlm.argument_types import ArgumentType, show, split_list

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

_NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|\.?inf)")
_STANDARD_TAGS = tuple(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "merge", "value", "seq", "map")
)


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of arguments.

    Args:
        path: A `.json`, `.yaml` or `.yml` file that holds a mapping from names to values; the four groups may be
            mappings in it.

    Returns:
        Values by name: text, None, booleans (of JSON), lists and mappings.

    Raises:
        ValueError: It cannot be read, or holds something else; the message starts with the file's name.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{path} is not a file of arguments: its name must end in .json, .yaml or .yml.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the path of a file of arguments.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return ungroup(_read_json(text) if suffix == ".json" else _read_yaml(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {'it contains itself' if isinstance(error, RecursionError) else error}") from None


def ungroup(values: Any) -> dict[str, Any]:
    """Lift the arguments out of the mappings `model`, `data`, `peft` and `training`, where there are such.

    Args:
        values: A mapping from names to values.

    Returns:
        Values by name.

    Raises:
        ValueError: It is no mapping, a name is not text, or an argument stands both in a group and outside of it.
    """
    if not isinstance(values, dict):
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"it holds {kind}, not a mapping from argument names to values.")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise ValueError(f"the name {show(name)} is not text.")
        inner = value if name in GROUPS and isinstance(value, dict) else {name: value}
        for key in inner:
            if key in flat:
                raise ValueError(f"{key} is given twice.")
        flat |= inner
    return flat


def _read_json(text: str) -> Any:
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for name, value in pairs:
        if name in read:
            raise ValueError(f"{name} is given twice.")
        read[name] = value
    return read


def _read_yaml(text: str) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}.") from None
    return None if node is None else _from_node(node)


def _from_node(node: yaml.Node) -> Any:
    line = node.start_mark.line + 1
    if node.tag not in _STANDARD_TAGS:
        raise ValueError(f"line {line}: the tag {node.tag} cannot be used.")
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(item) for item in node.value]
    pairs = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"line {line}: a name must be text.")
        pairs.append((key.value, _from_node(value)))
    try:
        return _unique(pairs)
    except ValueError as error:
        raise ValueError(f"in the mapping at line {line}, {error}") from None


def read_flags(
    words: Sequence[str], type_of: Callable[[str], ArgumentType | None]
) -> tuple[dict[str, Any], list[str], set[str]]:
    """Read the words of a command line.

    Args:
        words: Such as `["--lora_r", "16", "--use_lora", "--lora_target_modules", "query", "value"]`. Names may have
            dashes for underscores; `--name=value` and, for booleans, `--no_name` are understood.
        type_of: Gives the type of an argument, None if there is no such name.

    Returns:
        Values by name (True or False for a flag that stands alone, a list for several words), one sentence per fault,
        and the names that are at fault.
    """
    values: dict[str, Any] = {}
    faults: list[str] = []
    broken: set[str] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            hint = " (flags are written with two dashes)" if word.startswith("-") and len(word) > 1 else ""
            faults.append(f"{show(word)} belongs to no flag{hint}: write --name {show(word)}.")
            continue
        written, equals, attached = word.partition("=")
        following = next((i for i, other in enumerate(rest) if _is_flag(other)), len(rest))
        given = [attached] if equals else rest[:following]
        rest = rest if equals else rest[following:]
        name = written[2:].replace("-", "_")
        kind = type_of(name)
        positive = type_of(name.removeprefix("no_"))
        negated = kind is None and name.startswith("no_") and positive is not None and _may_be_false(positive)
        name, kind = (name.removeprefix("no_"), positive) if negated else (name, kind)
        try:
            value = _flag_value(written, given, kind, negated=negated)
        except ValueError as error:
            faults.append(str(error))
            broken.add(name)
            continue
        if name in values:
            faults.append(f"--{name} is given more than once: leave all but one out.")
            broken.add(name)
        values.setdefault(name, value)
    return values, faults, broken


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _NEGATIVE_NUMBER.match(word)


def _may_be_false(kind: ArgumentType) -> bool:
    return kind.boolean or False in kind.choices


def _flag_value(written: str, given: list[str], kind: ArgumentType | None, *, negated: bool) -> Any:
    if kind is None:
        # An unknown name is reported together with those of other sources.
        return given
    if negated:
        if given:
            raise ValueError(f"{written} takes no value, but has {show(' '.join(given))}.")
        return False
    if not given:
        if not kind.boolean:
            raise ValueError(f"{written} needs a value.")
        return True
    if len(given) == 1:
        return given[0]
    if kind.items is None and not kind.anything:
        raise ValueError(f"{written} takes one value, but has {len(given)}: {show(' '.join(given))}.")
    return [part for word in given for part in split_list(word)]
