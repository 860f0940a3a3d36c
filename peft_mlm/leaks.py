"""Local paths and tokens that stand in files which are about to leave the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft_mlm.shipped import files_in

TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".py", ".model_card")
# Vocabularies: long, and full of what looks like anything.
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
LARGEST = 20_000_000
SHOWN = 60
_ROOTS = (
    "home|Users|root|tmp|mnt|media|data|scratch|var|private|opt|srv|work|workspace|content|kaggle|gpfs|lustre|nfs|storage|"
    "projects?|Volumes"
)
_END = r"[^\s\"'`<>)\]},;|]+"
PATHS = re.compile(rf"(?<![\w./:~-])(?:/(?:{_ROOTS})/{_END}|[A-Za-z]:\\{{1,2}}[\w]{_END})|\bfile://{_END}")
# A text in JSON that is nothing but an absolute path.
JSON_PATHS = re.compile(r"\"(/[\w.@+-]+(?:/[\w.@+ -]+)+/?)\"")
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}|xox[baprs]-[\w-]{10,})|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
)

# What is shortened in texts that are shown to others: a text that is a path as a whole (spaces and all), one in quotes,
# and any path from a root among other words.
_IS_PATH = re.compile(r"(?:/|~|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\|file://).*", re.DOTALL)
_QUOTED_PATH = re.compile(r"(?<=[\"'`])(?:/|~/|[A-Za-z]:\\)[^\"'`\n]+(?=[\"'`])")
_ANY_PATH = re.compile(rf"(?<![\w./:~-])(?:~|/[\w.@+-]+)/{_END}")


@dataclass(frozen=True)
class Leak:
    """Something that should not leave the machine.

    Attributes:
        file: Where it stands, as a path in the folder.
        what: "local path" or "token".
        shown: A path shortened, or the first letters of a token.
    """

    file: str
    what: Literal["local path", "token"]
    shown: str

    def __str__(self) -> str:
        return f"{self.file} holds a {self.what} ({self.shown})"


def find_leaks(folder: Path) -> list[Leak]:
    """Look for local paths and tokens in all texts of a folder.

    Args:
        folder: What is shipped.

    Returns:
        The first of each kind in each file.
    """
    found: list[Leak] = []
    for file in files_in(folder):
        if file.suffix.lower() in TEXTS and file.is_file():
            found += leaks_in(file, file.relative_to(folder).as_posix())
    return found


def leaks_in(file: Path, name: str) -> Iterator[Leak]:
    """Look for local paths and tokens in one text.

    Args:
        file: The file.
        name: How to call it.

    Yields:
        The first of each kind.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST).decode("utf-8", "replace")
    except OSError:
        return
    if token := TOKENS.search(text):
        yield Leak(name, "token", f"{token[0][:6]}...")
    if file.name in VOCABULARY:
        return
    path = PATHS.search(text)
    shown = path[0] if path else next(iter(JSON_PATHS.findall(text)), None) if file.suffix == ".json" else None
    if shown:
        yield Leak(name, "local path", shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...")


def without_leaks(text: str) -> str:
    """Shorten local paths to their last parts, and leave tokens out.

    Args:
        text: A name, a path, or a sentence with some in it. A relative path stays, unless it leads upwards.

    Returns:
        What others may see of it.
    """

    def last_part(path: re.Match[str] | str) -> str:
        whole = path if isinstance(path, str) else path[0]
        return re.split(r"[/\\]+", whole.rstrip("/\\"))[-1]

    text = TOKENS.sub("...", text)
    if _IS_PATH.fullmatch(text) and not re.search(r"\s/|: ", text):
        return last_part(text)
    for pattern in (_QUOTED_PATH, PATHS, _ANY_PATH):
        text = pattern.sub(last_part, text)
    return text
