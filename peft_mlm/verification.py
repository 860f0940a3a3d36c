"""Is what lies here whole, and safe to open? Told from the bytes: nothing is loaded, and no pickle is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_mlm.checksums import CHECKSUMS, compare, read_checksums
from peft_mlm.console import few_names
from peft_mlm.errors import DamagedFileError
from peft_mlm.run_folder import RunFolder
from peft_mlm.safetensors_header import count_no_numbers, read_header
from peft_mlm.shipped import ADAPTER_WEIGHTS, Shipped, files_in, is_pickle

LARGEST_JSON = 100_000_000
# What a file of JSON must be, so that the commands can use it: the type of the whole, and of some of its keys.
NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "adapter_config.json": {"peft_type": str},
    "config.json": {"model_type": str},
    "base_fingerprint.json": {"architecture": str, "vocab_size": int, "weights": dict},
    "base_recipe.json": {},
    "training_facts.json": {},
    "tokenizer_config.json": {},
    "summary.json": {"status": str},
    "dataset.json": {},
    "environment.json": {},
    "sources.json": {},
}


@dataclass
class Verdict:
    """What was found.

    Attributes:
        faults: One sentence for each; empty where all is well.
        notices: What could not be checked, and what is left unopened.
        checked: How many files were held against checksums, tensors and values looked at.
    """

    faults: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=lambda: {"checksums": 0, "tensors": 0, "values": 0})

    def describe(self) -> dict[str, Any]:
        """Give the verdict as a record."""
        return {"ok": not self.faults, "faults": self.faults, "notices": self.notices, **self.checked}


def verify_shipped(shipped: Shipped) -> Verdict:
    """Check an adapter, a model, a checkpoint or a run.

    Args:
        shipped: What lies there.

    Returns:
        The verdict; a damaged file is a fault, never an exception.
    """
    verdict = Verdict()
    _check_checksums(shipped, verdict)
    for file in _safetensors_of(shipped, verdict):
        check_safetensors(file, file.name, verdict)
    records = [file for file in files_in(shipped.folder) if file.suffix == ".json" and file.name != CHECKSUMS]
    if shipped.place == "run" and shipped.run is not None:
        run = RunFolder(shipped.run)
        records += [file for file in (run.summary, run.dataset, run.environment, run.sources) if file.is_file()]
    for file in records:
        verdict.faults += list(faults_of_json(file, file.name))
    pickles = [file.relative_to(shipped.folder).as_posix() for file in files_in(shipped.folder) if is_pickle(file)]
    if pickles:
        verdict.notices.append(
            f"{few_names(pickles)}: pickles, or formats that can hold one; they can run code when they are opened, and "
            "were not read."
        )
    return verdict


def check_safetensors(file: Path, name: str, verdict: Verdict) -> None:
    """Check a file of safetensors: its header, and that all its values are numbers.

    Args:
        file: The file.
        name: How to call it.
        verdict: Where to write what is found.
    """
    try:
        header = read_header(file)
        if not header.tensors:
            verdict.faults.append(f"{name} holds no tensor.")
        bad = {tensor: count for tensor in header.tensors if (count := count_no_numbers(header, tensor))}
    except DamagedFileError as error:
        verdict.faults.append(str(error).replace(str(file), name))
        return
    verdict.checked["tensors"] += len(header.tensors)
    verdict.checked["values"] += header.count
    if bad:
        verdict.faults.append(
            f"{name} holds {sum(bad.values()):,} values that are NaN or infinite, in "
            f"{few_names(list(map(ascii, bad)))}."
        )


def faults_of_json(file: Path, name: str) -> Iterator[str]:
    """Check a file of JSON, and that it has the keys without which it is of no use.

    Args:
        file: The file.
        name: How to call it.

    Yields:
        Sentences, one for each fault.
    """
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_JSON:
            yield f"{name} is no plain file, or has more than {LARGEST_JSON:,} bytes."
            return
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"{name} is damaged: it is no JSON ({type(error).__name__})."
        return
    needed = NEEDED.get(file.name)
    if needed is None:
        return
    if not isinstance(record, dict):
        yield f"{name} is damaged: it is a {type(record).__name__}, not a table."
        return
    for key, kind in needed.items():
        if not isinstance(record.get(key), kind):
            yield f"{name} is damaged: {key} is {ascii(record.get(key))[:80]}."


def _check_checksums(shipped: Shipped, verdict: Verdict) -> None:
    try:
        sums = read_checksums(shipped.folder)
        if sums is None:
            verdict.notices.append(f"There is no {CHECKSUMS}: whether a file was changed cannot be told.")
            return
        differences = compare(shipped.folder, sums)
    except (DamagedFileError, OSError) as error:
        verdict.faults.append(str(error))
        return
    verdict.checked["checksums"] = len(sums)
    for names, what in (
        (differences.changed, "is not what was written: its checksum differs"),
        (differences.missing, f"is missing: {CHECKSUMS} names it"),
        (differences.extra, f"was not written with the others: {CHECKSUMS} does not name it"),
    ):
        verdict.faults += [f"{ascii(name)[1:-1]} {what}." for name in names]


def _safetensors_of(shipped: Shipped, verdict: Verdict) -> list[Path]:
    """List all files of safetensors; say so where the weights are not among them."""
    try:
        weights = shipped.weights()
    except DamagedFileError as error:
        weights = []
        verdict.faults.append(str(error))
    else:
        if not weights:
            wanted = ADAPTER_WEIGHTS if shipped.kind == "adapter" else "model.safetensors"
            verdict.faults.append(f"There are no weights in safetensors: no {wanted}.")
    if not shipped.config.is_file():
        verdict.faults.append(f"{shipped.config.name} is missing.")
    others = [file for file in files_in(shipped.folder) if file.suffix == ".safetensors" and file not in weights]
    return [*weights, *others]
