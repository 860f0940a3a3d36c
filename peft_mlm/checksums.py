"""Checksums of a folder as it was written, so that it can be told later whether a file is still the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_mlm.errors import DamagedFileError
from peft_mlm.run_folder import write_json
from peft_mlm.shipped import files_in

CHECKSUMS = "checksums.json"
# The card is for people, who may write in it.
FREE = (CHECKSUMS, "README.md")
PIECE = 4 * 2**20


@dataclass(frozen=True)
class Differences:
    """How a folder differs from its checksums.

    Attributes:
        changed: Files with another content.
        missing: Files that are no longer there.
        extra: Files that were not there.
    """

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the checksums of all files in a folder into it, but for the card's.

    Args:
        folder: What is shipped; nothing is written into it afterwards.
        known: SHA-256 of files that were hashed while they were written, by their paths in the folder.
    """
    files = {file.relative_to(folder).as_posix(): file for file in files_in(folder)}
    sums = {
        name: {"sha256": (known or {}).get(name) or sha256(file), "bytes": file.stat().st_size}
        for name, file in files.items()
        if name not in FREE
    }
    write_json(folder / CHECKSUMS, {"algorithm": "sha256", "files": sums})


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Read the checksums of a folder.

    Args:
        folder: What is shipped.

    Returns:
        SHA-256 in hexadecimal digits by the file's path in the folder; None where there are no checksums.

    Raises:
        DamagedFileError: Their file is damaged.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return None
    try:
        sums = {str(name): str(record["sha256"]) for name, record in json.loads(file.read_bytes())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{file} is damaged: {type(error).__name__}.") from error
    if not all(re.fullmatch(r"[0-9a-f]{64}", value) for value in sums.values()):
        raise DamagedFileError(f"{file} is damaged: it holds something that is no SHA-256.")
    return sums


def compare(folder: Path, sums: Mapping[str, str]) -> Differences:
    """Hold a folder against its checksums.

    Args:
        folder: What is shipped.
        sums: From `read_checksums`.

    Returns:
        What differs; hidden files and the card are left out.
    """
    there = {file.relative_to(folder).as_posix(): file for file in files_in(folder) if file.is_file()}
    return Differences(
        changed=tuple(name for name in sums if name in there and sha256(there[name]) != sums[name]),
        missing=tuple(name for name in sums if name not in there),
        extra=tuple(name for name in there if name not in sums and name not in FREE),
    )


def sha256(file: Path) -> str:
    """Compute the SHA-256 of a file, in pieces.

    Args:
        file: The file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
