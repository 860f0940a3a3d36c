"""What is to be scored: texts or mutations with their other columns, a wild type, and measured values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.errors import ArgumentsError, DataError

if TYPE_CHECKING:
    from peft_mlm.text_files import TextRows

# Names of the column of mutations in tables (ProteinGym's is "mutant").
MUTATION_COLUMNS = ("mutation", "mutant", "mutations")
# How tables say that a number is missing.
NOTHING = ("", "na", "n/a", "nan", "null", "none")


def read_input(
    texts: str | Sequence[str] | None, file: str | Path | None, text_column: str | None, *, mutations: bool
) -> TextRows:
    """Read texts or mutations, with what else a file says of them.

    Args:
        texts: The texts or mutations themselves; or None.
        file: A file of them, or a glob; or None.
        text_column: Their column, if it is not told by its name or by being the only one.
        mutations: Whether they are mutations.

    Returns:
        The rows.

    Raises:
        ArgumentsError: Both are given, or neither.
        DataError: The file cannot be read, or there is nothing in it.
    """
    from peft_mlm.text_files import TextRows, read_rows

    if (texts is None) == (file is None):
        raise ArgumentsError("Give either texts or a file of them.")
    if file is not None:
        table = read_rows([str(file)], text_column, usual=MUTATION_COLUMNS if mutations else ())
    else:
        given = [texts] if isinstance(texts, str) else list(texts or ())
        name = "mutation" if mutations else "text"
        table = TextRows([{name: text} for text in given], given, [name])
    if not table.texts:
        raise DataError(f"There is nothing to score{'' if file is None else f' in {file}'}.")
    return table


def read_wild_type(given: str) -> str:
    """Take a wild type as it is written, or from a FASTA file of one sequence.

    Args:
        given: Residues, white space between them left out; or a file.

    Returns:
        The residues, in capital letters.

    Raises:
        DataError: There is no such file, or it holds another number of sequences than one.
    """
    from peft_mlm.text_files import read_rows

    letters = "".join(given.split()).upper()
    if letters.isalpha() and not Path(given).expanduser().is_file():
        return letters
    found = read_rows([given], None).texts
    if len(found) != 1:
        raise DataError(f"{given} holds {len(found)} sequences; --sequence wants the one that all mutations change.")
    return "".join(found[0].split()).upper()


def read_measured(table: TextRows, column: str | None) -> list[float] | None:
    """Read the column of measured values.

    Args:
        table: The rows.
        column: Its name; None for no such column.

    Returns:
        Numbers, nan where a row has none; None without a column.

    Raises:
        DataError: There is no such column, or it holds something else than numbers.
    """
    if column is None:
        return None
    if column not in table.columns:
        raise DataError(f"There is no column {column!r} of measured values; columns: {', '.join(table.columns)}.")
    values = []
    for number, row in enumerate(table.rows, 1):
        try:
            values.append(number_of(row.get(column)))
        except (TypeError, ValueError):
            raise DataError(f"Row {number}: {column} is {row[column]!r}, which is no number.") from None
    return values


def number_of(value: Any) -> float:
    """Read a number of a table.

    Args:
        value: A number, or its text, as csv files have it; nothing, in any way that tables say it.

    Returns:
        The number, nan for nothing.

    Raises:
        ValueError: It is no number.
    """
    return math.nan if value is None or str(value).strip().lower() in NOTHING else float(value)
