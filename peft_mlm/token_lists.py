"""Tokens to add, as a user gives them: a list, or a text file with one token a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_mlm.errors import ArgumentsError

SHOWN = 5


def read_token_list(option: str, given: Sequence[str] | None) -> list[str]:
    """Read the tokens of `add_tokens` or `add_special_tokens`.

    Args:
        option: Name of the argument, for messages.
        given: Tokens, or the name of one UTF-8 text file with a token a line (space around a token and empty lines do
            not count); None for no tokens.

    Returns:
        The tokens in their order, each once. A list that this function gave is given back as it is.

    Raises:
        ArgumentsError: The file does not exist or is not text, no token is in it, or a token is empty or blank.
    """
    if given is None:
        return []
    tokens = list(given)
    path = Path(tokens[0]).expanduser() if len(tokens) == 1 else None
    if path is not None and _names_a_file(tokens[0]):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is no UTF-8 text file"
            raise ArgumentsError(
                f"{option}: {tokens[0]} cannot be read: {reason}. Give a text file with one token a line, or the "
                "tokens themselves."
            ) from error
        tokens = [line.strip() for line in lines if line.strip()]
        if not tokens:
            raise ArgumentsError(f"{option}: the file {path} holds no tokens: write one a line.")
    if not tokens or any(not token.strip() for token in tokens):
        raise ArgumentsError(f"{option}: an empty token is given ({given!r}). Leave it out.")
    spaced = [token for token in tokens if token != token.strip() or any(c in token for c in "\r\n\t")]
    if spaced:
        raise ArgumentsError(
            f"{option}: {', '.join(map(repr, spaced[:SHOWN]))} begins or ends with space, or holds a tab or a line "
            "break. Give the token without it."
        )
    return list(dict.fromkeys(tokens))


def _names_a_file(word: str) -> bool:
    """Tell whether a lone word is a file: it exists, or it is written as one (a token may hold a slash: mg/dL)."""
    try:
        exists = Path(word).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or a character that no name has
        exists = False
    return exists or word.lower().endswith(".txt") or word.startswith(("./", "../", "~/", "/"))
