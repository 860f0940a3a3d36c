"""docs/support.md is complete, exact, and of this version's tables."""

from __future__ import annotations

import re
from pathlib import Path

from peft_mlm.methods import METHODS, VARIANTS
from peft_mlm.model_types import MODEL_TYPES

PAGE = (Path(__file__).parent.parent / "docs" / "support.md").read_text(encoding="utf-8")
TYPES, REST = PAGE.split("## Methods")
METHOD_ROWS, VARIANT_ROWS = REST.split("## Variants")
DIFFERENCE = re.compile(r"(?<![\w.])(\d+e-\d+|0)(?![\w.])")


def rows(part: str, column: int) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    return {cells[column]: cells for cells in lines if cells[column] not in ("type", "name", "---")}


def test_every_type_method_and_variant_has_a_row() -> None:
    assert set(rows(TYPES, 0)) == set(MODEL_TYPES)
    assert set(rows(METHOD_ROWS, 1)) == set(METHODS)
    assert set(rows(VARIANT_ROWS, 1)) == set(VARIANTS)


def test_the_page_says_of_each_type_whether_texts_can_stand_side_by_side() -> None:
    for name, cells in rows(TYPES, 0).items():
        row = MODEL_TYPES[name]
        assert cells[9] == ("" if row.refusal else "no" if row.documents == "none" else "yes"), name


def test_every_cell_is_a_result_or_the_reason_of_a_refusal() -> None:
    for name, cells in rows(TYPES, 0).items():
        if MODEL_TYPES[name].refusal is not None:
            assert cells[1] == f"refused: {MODEL_TYPES[name].refusal}"
        else:
            assert all(DIFFERENCE.fullmatch(cell) for cell in cells[1:5]), name
    for part, table in ((METHOD_ROWS, METHODS), (VARIANT_ROWS, VARIANTS)):
        for name, cells in rows(part, 1).items():
            if table[name].refused:
                assert cells[2] == f"refused: {table[name].refused}"
                continue
            for cell in cells[2:6]:
                assert cell.startswith("refused: ") or DIFFERENCE.match(cell), (name, cell)


def test_differences_on_float_bases_are_below_1e_5() -> None:
    cells = [cell for row in rows(TYPES, 0).values() for cell in row[1:5] if not cell.startswith("refused")]
    cells += [row[2] for part in (METHOD_ROWS, VARIANT_ROWS) for row in rows(part, 1).values()]
    figures = [float(figure) for cell in cells if not cell.startswith("refused") for figure in DIFFERENCE.findall(cell)]
    assert len(figures) > 250
    assert max(figures) < 1e-5
