"""Turn command line, JSON, YAML or dict into four typed groups of arguments, and write them down again.

Defaults give way to the file, the file to flags, flags to a dict. All faults are collected and reported together.
Nothing here imports torch or transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peft_mlm.argument_fields import GROUPS, TITLES, Field, Group, argument_fields, render_help
from peft_mlm.argument_rules import (
    FOLLOWERS,
    NOT_RECORDED,
    SETS_ASIDE,
    TRAINING_DEFAULTS,
    check_arguments,
    default_training,
)
from peft_mlm.argument_sources import read_file, read_flags, ungroup
from peft_mlm.argument_types import FALSE_WORDS, NONE_WORDS, ArgumentType, convert, parse_type, show
from peft_mlm.arguments import DataTrainingArguments, ModelArguments, PEFTArguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.method_options import methods_with
from peft_mlm.peft_rules import LORA_FLAGS, LORA_OPTIMISERS, check_shape, settle_method
from peft_mlm.quantization_rules import check_quantization, idle_options
from peft_mlm.renamed_arguments import OLD_ARGUMENTS, Dropped, OldArgument, Refused, Renamed, Translated
from peft_mlm.run_folder import write_json, write_text

SECRETS = ("token", "hub_token", "use_auth_token")
_ANY_NUMBER_OF_WORDS = ArgumentType(none=True, boolean=True, anything=True)


@dataclass
class Arguments:
    """The arguments of a run.

    Attributes:
        model: Base model and tokenizer.
        data: Text, rows and masks.
        peft: The adapter, or None where the whole model is trained.
        training: Values for `transformers.TrainingArguments` by name: what was given, our defaults, and those of
            transformers that can be read without importing it. None is left out.
        sources: For every argument of all groups where its value comes from: `default`, `file NAME`, `flag`, `dict`,
            `default for an adapter`, `follows eval_steps` and the like.
        notices: What to tell the user once: old names that were translated, values that change nothing.
    """

    model: ModelArguments
    data: DataTrainingArguments
    peft: PEFTArguments | None
    training: dict[str, Any]
    sources: dict[str, str]
    notices: list[str]


@dataclass
class _Findings:
    """What reading the sources has brought so far."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)


def read_arguments(
    config_file: str | Path | None = None,
    flags: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    for_training: bool = True,
    planned: bool = False,
) -> Arguments:
    """Read arguments from a file, from the words of a command line, from a dict, or from several of these.

    Args:
        config_file: A `.json`, `.yaml` or `.yml` file.
        flags: Words of a command line, such as `["--lora_r", "16"]`; they override the file.
        values: Arguments by name with values of any kind (text, numbers, lists, paths); they override both.
        for_training: Whether a model is to be trained; else model, output_dir and training text may be missing.
        planned: Whether the training is only planned: output_dir and text may be missing then.

    Returns:
        The four groups, every value of its declared type.

    Raises:
        ArgumentsError: An argument is unknown, cannot be read, is out of range, or does not go with another. All
            faults are in it.
    """
    found = _Findings()
    readable = True
    for label, raw in _sources(config_file, flags, values, found):
        if raw is None:
            readable = False
        else:
            _take(raw, label, found)
    if not readable:
        # Rules would complain of everything that the file may have said.
        raise ArgumentsError(found.faults)
    return _resolve(found, for_training=for_training, planned=planned)


def _sources(
    config_file: str | Path | None, flags: Sequence[str], values: Mapping[str, Any] | None, found: _Findings
) -> list[tuple[str, dict[str, Any] | None]]:
    """Read what is there, in rising order of precedence; None for a source that cannot be read."""
    read: list[tuple[str, dict[str, Any] | None]] = []
    if config_file is not None:
        try:
            read.append((f"file {Path(config_file).name}", read_file(Path(config_file))))
        except ValueError as error:
            found.faults.append(str(error))
            read.append(("file", None))
    words, faults, broken = read_flags(flags, _type_of)
    found.faults += faults
    found.broken |= broken
    read.append(("flag", words))
    if values is not None:
        try:
            read.append(("dict", ungroup(dict(values))))
        except ValueError as error:
            found.faults.append(f"In the dict of arguments, {error}")
            read.append(("dict", None))
    return read


def _type_of(name: str) -> ArgumentType | None:
    """Give the type of an argument by its new or old name."""
    old = OLD_ARGUMENTS.get(name)
    if old is None or not _applies(old, name):
        return argument_fields()[name].type if name in argument_fields() else None
    if isinstance(old, Renamed):
        return argument_fields()[old.name].type
    return parse_type(old.type) if isinstance(old, Translated) else _ANY_NUMBER_OF_WORDS


def _applies(old: OldArgument, name: str) -> bool:
    """Tell whether an old name is translated: not where the transformers that is installed knows only the old one."""
    return not (isinstance(old, Renamed) and old.name not in argument_fields() and name in argument_fields())


def _take(raw: Mapping[str, Any], label: str, found: _Findings) -> None:
    """Convert the values of one source, and let them override those of sources before it."""
    taken: dict[str, str] = {}
    # New names first, so that an old one is compared with the new one and not the other way round.
    for name in sorted(raw, key=lambda name: name in OLD_ARGUMENTS):
        written = f"--{name}" if label == "flag" else f"{name} in {label[5:]}" if label.startswith("file ") else name
        try:
            pairs = _translate(name, raw[name], written, found)
        except ValueError as error:
            found.faults.append(str(error))
            found.broken.add(name)
            continue
        for new, value in pairs.items():
            try:
                converted = _convert(argument_fields()[new], value)
            except ValueError as error:
                text = f"{written}: {error}." if new not in SECRETS else f"{written}: the value is not text."
                found.faults.append(text if new == name else f"{text} ({name} is {new} now.)")
                found.broken.add(new)
                continue
            if new in taken and found.values[new] != converted:
                found.faults.append(f"{written} and {taken[new]} say different things about {new}: leave {name} out.")
                found.broken.add(new)
                continue
            found.values[new], found.sources[new], taken[new] = converted, label, name
    for name in taken:
        _set_aside(name, label, found)


def _set_aside(name: str, label: str, found: _Findings) -> None:
    """Drop what an argument overrides, where that comes from an earlier source."""
    value = found.values[name]
    named = SETS_ASIDE.get(f"no {name}" if value is False else name, ()) if value is not None else ()
    others = SETS_ASIDE.get(f"{name} {value}", named)
    dropped = [other for other in others if found.values.get(other) is not None and found.sources[other] != label]
    for other in dropped:
        del found.values[other], found.sources[other]
    if dropped:
        _notice(found, f"{name} (given as {label}) sets aside {', '.join(dropped)}.")


def _translate(name: str, value: Any, written: str, found: _Findings) -> Mapping[str, Any]:
    """Give the arguments that a name stands for, with values still to be converted, or raise a ValueError."""
    old = OLD_ARGUMENTS.get(name)
    if old is None or not _applies(old, name):
        if name in argument_fields():
            return {name: value}
        near = _nearest(name)
        found.broken |= set(near)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        if methods := methods_with(name):
            hint = f" It is an option of {', '.join(methods)}: give it in peft_config."
        raise ValueError(f"{written}: there is no such argument.{hint}")
    if value is None:
        return {}
    if isinstance(old, Refused):
        raise ValueError(f"{written} cannot be used. {old.why}")
    if isinstance(old, Dropped):
        _notice(found, f"{name} is left out: {old.why}.")
        return {}
    if isinstance(old, Renamed):
        _notice(found, f"{name} was read as {old.name}, its name now.")
        return {old.name: value}
    try:
        read = convert(value, parse_type(old.type))
    except ValueError as error:
        raise ValueError(f"{written}: {error if name not in SECRETS else 'the value is not text'}.") from None
    pairs = old.function(read)
    if isinstance(pairs, str):
        raise ValueError(f"{written} cannot be used. {pairs}")
    shown = ", ".join(f"{new} {show(item) if new not in SECRETS else '(not shown)'}" for new, item in pairs.items())
    _notice(found, f"{name} was read as {shown}." if pairs else f"{name} is left out: {old.notice}.")
    return pairs


def _notice(found: _Findings, text: str) -> None:
    if text not in found.notices:
        found.notices.append(text)


def _nearest(name: str) -> list[str]:
    """Find at most three arguments that a mistyped or shortened name may mean, the likeliest first."""
    names = list(argument_fields())
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    near += [other for other in names if len(name) > 3 and name in other]
    return list(dict.fromkeys(near or difflib.get_close_matches(name, names, n=2, cutoff=0.5)))[:3]


def _convert(argument: Field, value: Any) -> Any:
    """Convert a value; where the word none means something, so do null and false."""
    if argument.default == "none":
        word = value.strip().lower() if isinstance(value, str) else value
        if word is None or word is False or (isinstance(word, str) and word in NONE_WORDS | FALSE_WORDS):
            return "none"
    return convert(value, argument.type)


def _resolve(found: _Findings, *, for_training: bool, planned: bool = False) -> Arguments:
    """Fill in defaults, check the rules, and build the groups."""
    fields = argument_fields()
    known = [item for item in fields.values() if item.default not in (MISSING, None) and item.name not in NOT_RECORDED]
    # Converted too: a number of steps that transformers declares as float has a whole number as default.
    values = {item.name: _convert(item, item.default) for item in known}
    sources = dict.fromkeys(fields, "default") | found.sources
    given = {name: value for name, value in found.values.items() if value not in (None, "", [], {})}
    training_given = {name: value for name, value in found.values.items() if fields[name].group == "training"}
    new_adapter = given.get("use_lora", False) or "peft_method" in given
    adapter = new_adapter or "adapter_name_or_path" in given
    ours, why = default_training(
        training_given,
        adapter=adapter,
        early_stopping="early_stopping_patience" in given,
        lengths_differ=given.get("rows") in ("line", "packed")
        or bool(given.get("line_by_line") or given.get("max_tokens_per_batch")),
    )
    values |= found.values | ours
    sources |= why
    if values["line_by_line"] and "rows" not in given:
        values["rows"], sources["rows"] = "line", "implied by line_by_line"
    if {"model_type", "model_name_or_path"} <= given.keys():
        _notice(found, "model_type is left out: model_name_or_path brings its own.")
        values["model_type"], sources["model_type"] = None, "default"
    peft_names = [name for name, item in fields.items() if item.group == "peft"]
    rules = check_shape(given, peft_names, wanted=new_adapter)
    if not rules:
        settled, rules = settle_method(values, given)
        values |= settled
        sources |= {name: found.sources.get("peft_config", "default") for name in settled if name not in given}
    rules += check_arguments(values, given, for_training=for_training, planned=planned)
    rules += check_quantization(values, given, for_training=for_training)
    # A rule that speaks of an argument already at fault says nothing new.
    faults = found.faults + [text for text in rules if not set(re.findall(r"\w+", text)) & found.broken]
    if faults:
        raise ArgumentsError(faults)

    if values.get("peft_method") not in (None, "lora"):
        values |= {name: fields[name].default for name in LORA_FLAGS}  # what was given stands in peft_config now

    def group(name: Group) -> dict[str, Any]:
        return {key: values[key] for key, item in fields.items() if item.group == name and values.get(key) is not None}

    return Arguments(
        model=ModelArguments(**group("model")),
        data=DataTrainingArguments(**group("data")),
        peft=PEFTArguments(**group("peft")) if adapter else None,
        training=group("training"),
        sources=sources,
        notices=found.notices,
    )


def describe_help(groups: Sequence[Group] = GROUPS) -> str:
    """Render the help text of some groups.

    Args:
        groups: Any of `model`, `data`, `peft`, `training`, in the order wanted.

    Returns:
        Every argument with its type, default and purpose.
    """
    defaults = {
        row.name: str(row.value).lower() for row in TRAINING_DEFAULTS if row.when in ("always", "eval_by_steps")
    }
    defaults |= {name: f"as {other}" for name, other in FOLLOWERS.items()}
    for row in TRAINING_DEFAULTS:
        if row.when == "adapter":
            defaults[row.name] = f"{row.value} for an adapter, else {argument_fields()[row.name].default}"
        elif row.when == "early_stopping":
            defaults[row.name] = f"{str(row.value).lower()} with early_stopping_patience"
        elif row.when == "lengths_differ":
            defaults[row.name] = f"{row.value} with rows line or max_tokens_per_batch, else random"
    return render_help(groups, defaults)


def write_arguments(arguments: Arguments, path: str | Path) -> None:
    """Write arguments as YAML that `read_arguments` reads back to the same groups.

    Tokens are never written; arguments that are None are left out.

    Args:
        arguments: The arguments.
        path: The file to write; it appears whole or not at all.
    """
    lines = ["# The arguments of a run, with all defaults. Run it again, into another folder, by:"]
    lines += ["#   peft-mlm train THIS_FILE --output_dir ANOTHER_FOLDER"]
    for group in GROUPS:
        record = _record(arguments, group)
        if record:
            lines += ["", f"# {TITLES[group]}"]
            lines += [_yaml_line(name, value) for name, value in record.items()]
    write_text(Path(path), "\n".join(lines) + "\n")


def write_sources(arguments: Arguments, path: str | Path) -> None:
    """Write where each value comes from as JSON: an object from names to sources.

    Args:
        arguments: The arguments.
        path: The file to write; it appears whole or not at all.
    """
    write_json(Path(path), arguments.sources)


def _record(arguments: Arguments, group: Group) -> dict[str, Any]:
    if group == "training":
        values = {name: arguments.training[name] for name in argument_fields() if name in arguments.training}
    else:
        part = getattr(arguments, group)
        values = {} if part is None else {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    if group == "model":
        values = {name: value for name, value in values.items() if name not in idle_options(values)}
    if group == "peft" and values.get("adapter_name_or_path"):
        # The adapter brings the rest.
        values = {name: values[name] for name in ("use_lora", "adapter_name_or_path", "base_dropout")}
    elif group == "peft" and values.get("peft_method") not in (None, "lora"):
        values = {name: value for name, value in values.items() if name not in (*LORA_FLAGS, *LORA_OPTIMISERS)}
    return {name: value for name, value in values.items() if value is not None and name not in SECRETS}


def _yaml_line(name: str, value: Any) -> str:
    # Some characters count as line breaks in YAML, and PyYAML writes them so that they are read as blanks.
    readable = not any(mark in str(value) for mark in ("\x85", "\u2028", "\u2029", "\\x85", "\\u2028", "\\u2029"))
    text: str = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=readable, width=2**31 - 1)
    return text.removesuffix("\n")
