"""docs/merging.md is complete, within its bounds, and what a merge of today gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_mlm.methods import METHODS
from scripts.build_merging_table import TITLES, cell
from tests.matrix_of_merges import CASES, KINDS, refusal, rows, save_merge_base

PAGE = (Path(__file__).parent.parent / "docs" / "merging.md").read_text(encoding="utf-8")
FIGURE = re.compile(r"(?<![\w.])(\d+(?:e[-+]?\d+)?)(?![\w.])")
# Cells that are merged again: each kind of base, each case, both ways of merging.
AGAIN = (
    ("lora", None, "float32", ""), ("lora", "dora", "bfloat16", "head"), ("vera", None, "float32", ""),
    ("lora", None, "nf4", ""), ("lora", None, "int8", "head"), ("lora", "rslora", "float32", "tokens"),
    ("trainable_tokens", None, "nf4", "tokens"), ("randlora", None, "float32", ""),
)  # fmt: skip


def cells_of(case: str) -> dict[str, list[str]]:
    """The cells of a table by the name of their row."""
    _, _, rest = PAGE.partition(f"### {TITLES[case].capitalize()}\n")
    part = re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [[one.strip() for one in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    return {cells[1]: cells[2:] for cells in lines if cells[1] not in ("name", "---")}


def figures(text: str) -> list[float]:
    return [float(figure) for figure in FIGURE.findall(text)]


@pytest.mark.parametrize("case", CASES)
def test_every_method_that_merges_has_a_row_where_any_base_takes_it(case: str) -> None:
    expected = {v or m for m, v in rows() if not all(refusal(m, v, kind, case) for kind in KINDS)}
    assert set(cells_of(case)) == expected
    assert len(expected) > 8


def test_what_does_not_merge_is_told_with_its_reason() -> None:
    _, _, told = PAGE.partition("## Not merged\n")
    for name, row in METHODS.items():
        if row.merge:
            assert f"* {row.title} ({name}): {row.merge}." in told


@pytest.mark.parametrize("case", CASES)
def test_every_cell_is_within_its_bound_or_has_the_reason_of_its_refusal(case: str) -> None:
    table = cells_of(case)
    for method, variant in rows():
        for kind, text in zip(KINDS, table.get(variant or method, []), strict=False):
            where = method, variant, kind
            if reason := refusal(method, variant, kind, case):
                assert text == f"refused: {reason}", where
                continue
            seen = figures(text)
            if kind == "bfloat16":
                assert 0 < seen[0] <= seen[1], where
            else:
                assert seen[0] <= 1e-5, where
                assert len(seen) == (1 if kind == "float32" else 2), where


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_merge_base(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return base


@pytest.mark.parametrize(("method", "variant", "kind", "case"), AGAIN)
def test_a_merge_of_today_gives_what_the_page_says(
    method: str, variant: str | None, kind: str, case: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    told = cells_of(case)[variant or method][list(KINDS).index(kind)]
    given = cell(bases(kind), tmp_path, method, variant, kind, case)
    assert FIGURE.sub("", given) == FIGURE.sub("", told)  # all but the figures, the star of the files too
    for one, other in zip(figures(given), figures(told), strict=True):
        assert max(one, other) < 1e-6 or 0.5 * other <= one <= 2 * other
