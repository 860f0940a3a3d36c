"""A run folder -> one record of what the run was and gave: what a report tells. Nothing that computes is loaded.

The record may leave the machine: local paths are shortened to their last parts, and tokens are left out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_mlm.errors import DamagedFileError, RunFolderError
from peft_mlm.inspection import inspect_shipped, largest_changes, read_table
from peft_mlm.leaks import without_leaks
from peft_mlm.run_folder import RunFolder, is_run_folder
from peft_mlm.shipped import find_shipped

# Beyond this nothing is a count, a size or a figure; NaN is below no number.
LARGEST = 1e300
# Layers that are listed by how much they were changed.
LAYERS_LISTED = 8
# Where a run is written, goes on from or is sent to is not part of how to run it again.
NOT_REPEATED = (
    *("output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir", "run_name"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_revision", "hub_always_push"),
    *("token", "hub_token", "use_auth_token"),
)
OF_EVALUATION, OF_WHOLE_TRAINING = "eval_", "train_runtime"
OF_ADAPTER = (
    "method",
    "title",
    "rank",
    "alpha",
    "scaling",
    "targets",
    "target_layers",
    "trained_modules",
    "new_tokens",
)
OF_BASE = ("name", "revision", "architecture", "recipe")


def read_runs(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Read several runs; of two folders of one name the second is called "name (2)".

    Args:
        paths: Run folders.

    Returns:
        Their records, as `read_run` gives them, in the same order.

    Raises:
        RunFolderError: One is no run folder, or is given twice.
        DamagedFileError: A file of one is damaged.
    """
    places = [Path(path).expanduser().resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise RunFolderError(f"{path} is given {places.count(place)} times. Name each run once.")
    records: list[dict[str, Any]] = []
    for path in paths:
        record = read_run(path)
        same = sum(other["folder"] == record["folder"] for other in records)
        records.append({**record, "name": f"{record['folder']} ({same + 1})" if same else record["folder"]})
    return records


def read_run(path: str | Path) -> dict[str, Any]:
    """Read what a run left, finished or not.

    Args:
        path: The run folder.

    Returns:
        `name` and `folder` (the folder's last part); `summary`, `environment`, `data` (as in summary.json,
        environment.json, dataset.json); `base` (`name`, `revision`, `architecture`, `recipe`); `adapter` (what it is
        and which layers it changes most; None where there is none); `arguments` (all of them); `given` (name -> source
        of those that are no defaults); `command` (runs it again); `logs` and `evaluations` (numbers by name, `step`
        among them, in order); and `notices` (what could not be read).

    Raises:
        RunFolderError: It is no run folder.
        DamagedFileError: A file is damaged.
    """
    run = RunFolder(Path(path).expanduser())
    if not is_run_folder(run.path):
        raise RunFolderError(
            f"{path} is no run folder: it does not hold arguments.yaml and summary.json. Give the output_dir of a "
            "training."
        )
    arguments, notices = _read_yaml(run.arguments), list[str]()
    sources = read_table(run.sources) if run.sources.is_file() else {}
    given = {name: sources[name] for name in arguments if name in sources and _is_given(str(sources[name]))}
    logs, evaluations = _read_metrics(run.metrics, notices)
    adapter, base = _read_adapter(run)
    record = {
        "folder": run.path.resolve().name,
        "summary": read_table(run.summary),
        "environment": read_table(run.environment) if run.environment.is_file() else {},
        "data": read_table(run.dataset) if run.dataset.is_file() else {},
        "base": base or {"name": arguments.get("model_name_or_path")},
        "adapter": adapter,
        "arguments": {name: value for name, value in arguments.items() if name not in NOT_REPEATED},
        "given": given,
        "logs": logs,
        "evaluations": evaluations,
        "notices": notices,
    }
    told = _without_leaks(record)
    return {"name": told["folder"], **told, "command": _command(told["arguments"], told["given"], told["folder"])}


def number(value: Any) -> float | int | None:
    """Take a value of a record as a number.

    Args:
        value: Anything.

    Returns:
        The number, or None for what is none, or is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < LARGEST else None


def figure(record: Mapping[str, Any], *names: str) -> float | int | None:
    """Look a number up in nested tables.

    Args:
        record: A table.
        *names: Key after key.

    Returns:
        The number, or None where a key is missing or its value is no number.
    """
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return number(value)


def table(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Look a nested table up.

    Args:
        record: A table.
        name: Its key.

    Returns:
        The nested table; empty where there is none.
    """
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DamagedFileError(f"{file} is damaged: it is no YAML ({type(error).__name__}).") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DamagedFileError(f"{file} is damaged: it is no table of arguments.")
    return values


def _is_given(source: str) -> bool:
    return source in ("flag", "dict") or source.startswith("file ")


def _read_metrics(file: Path, notices: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Part the records of metrics.jsonl into logs and evaluations; what a killed process left half written is told."""
    logs: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.is_file() else []
    for place, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or number(record.get("step")) is None:
            if place == len(lines) and not line.endswith("\n"):
                notices.append("The last line of metrics.jsonl is cut off: the run was stopped while it wrote it.")
                break
            raise DamagedFileError(
                f"{file} is damaged: line {place} is no record of a step ({ascii(line.strip())[:60]}). Take the line "
                "out, or take the file from its source again."
            )
        numbers = {name: value for name, value in record.items() if number(value) is not None}
        if any(name.startswith(OF_EVALUATION) for name in record):
            evaluations.append({name.removeprefix(OF_EVALUATION): value for name, value in numbers.items()})
        elif OF_WHOLE_TRAINING not in record:
            logs.append(numbers)
    return logs, evaluations


def _read_adapter(run: RunFolder) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Describe the adapter and the base it belongs to; (None, None) where the run has saved none."""
    try:
        shipped = find_shipped(run.path)
    except RunFolderError:
        return None, None
    if shipped.kind != "adapter" or not shipped.weights():
        return None, None
    told = inspect_shipped(shipped)
    changes = [{name: layer[name] for name in ("name", "delta_norm")} for layer in largest_changes(told, LAYERS_LISTED)]
    adapter = {**{name: told[name] for name in OF_ADAPTER}, "largest_changes": changes, "layers": len(told["layers"])}
    return adapter, {name: told["base"][name] for name in OF_BASE}


def _without_leaks(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_without_leaks(str(name)): _without_leaks(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_leaks(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_leaks(str(value).encode("utf-8", "replace").decode())  # some letters of JSON are none of UTF-8


def _command(arguments: Mapping[str, Any], given: Mapping[str, Any], folder: str) -> str:
    """Write the command that runs it again, one argument a line; paths stand in it with their last parts."""
    lines = ["peft-mlm train"]
    for name in given:
        if name in arguments and name not in NOT_REPEATED:
            words = _words(arguments[name])
            # A word that looks like a flag belongs to this one.
            joined = f"={words[0]}" if words and words[0].startswith("-") else "".join(f" {word}" for word in words)
            lines.append(f"--{name}{joined}")
    lines.append(f"--output_dir runs/{shlex.quote(folder)}")
    return " \\\n  ".join(lines)


def _words(value: Any) -> list[str]:
    """Spell a value as the words of a command line."""
    if value is True:
        return []
    if isinstance(value, list):
        return [word for part in value for word in _words(part)]
    if isinstance(value, Mapping):
        return [shlex.quote(json.dumps(value, ensure_ascii=False))]
    return [shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))]
