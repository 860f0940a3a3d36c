"""The words of `peft-mlm compare`: which models, how each is loaded, and which texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_mlm.errors import ArgumentsError

# What may stand after a model's name: the argument that it sets.
SUFFIXES = {"base": "use_base", "4bit": "load_in_4bit", "8bit": "load_in_8bit"}


@dataclass(frozen=True)
class Named:
    """A model as it was named.

    Attributes:
        word: The whole word.
        path: Its name or path.
        suffixes: What stands after colons, from the last to the first.
    """

    word: str
    path: str
    suffixes: tuple[str, ...]


def read_name(word: str) -> Named:
    """Read a word that names a model; a path that has a colon in it is a path first.

    Args:
        word: Such as "runs/notes:base".

    Returns:
        The name or path, and its suffixes.

    Raises:
        ArgumentsError: Something else stands after a colon.
    """
    path, suffixes = word, []
    while not Path(path).expanduser().exists():
        front, colon, suffix = path.rpartition(":")
        if not colon or suffix not in SUFFIXES or not front:
            break
        path = front
        suffixes.append(suffix)
    if ":" in path and not Path(path).expanduser().exists():
        raise ArgumentsError(f"{word}: after a colon may stand {', '.join(SUFFIXES)}. There is no folder {path}.")
    return Named(word, path, tuple(suffixes))


def named_files(given: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Read which files make up which data set.

    Args:
        given: Files by name, or words: NAME=FILE, or FILE, which is named after itself; FILE may be several,
            separated by commas.

    Returns:
        Files by name.

    Raises:
        ArgumentsError: A word names no file, or two data sets have one name.
    """
    if isinstance(given, Mapping):
        return dict(given)
    named: dict[str, str] = {}
    for word in [given] if isinstance(given, str) else given:
        name, equals, files = word.partition("=")
        if not equals or not name or "/" in name or Path(word).exists():
            name, files = Path(word.partition(",")[0]).stem, word
        if not files:
            raise ArgumentsError(f"--eval_file {word!r} names no file: give NAME=FILE, or FILE.")
        if name in named:
            raise ArgumentsError(
                f"--eval_file: two data sets would be named {name!r}: give each a name of its own (NAME=FILE), or "
                "several files of one data set separated by commas."
            )
        named[name] = files
    return named
