"""Dataclasses of a library read as source text: importing them would mean importing torch, which takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

FACTORIES: Mapping[str, Any] = {"list": [], "dict": {}}


def package_folder(package: str) -> Path:
    """Find the source of an installed package without importing it.

    Args:
        package: Its name.

    Returns:
        Its folder.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; `pip install {package}` brings it")
    return Path(spec.submodule_search_locations[0])


def annotated_lines(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[ast.AnnAssign]:
    """Give the annotated lines of a dataclass, those of its bases first.

    Args:
        node: The class.
        classes: All classes that may be its bases, by name.

    Returns:
        The lines, in the order of the fields.
    """
    lines: list[ast.AnnAssign] = []
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            lines += annotated_lines(classes[base.id], classes)
    return lines + [line for line in node.body if isinstance(line, ast.AnnAssign)]


def literal(node: ast.expr | None) -> Any:
    """Evaluate an expression of constants.

    Args:
        node: The expression, or None.

    Returns:
        Its value; what `list` and `dict` make, as factories of defaults; else `dataclasses.MISSING`.
    """
    if node is None:
        return MISSING
    try:
        return ast.literal_eval(node)
    except ValueError:
        return FACTORIES.get(ast.unparse(node), MISSING)
