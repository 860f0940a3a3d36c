"""docs/merging.md is complete, exact, and what its cells give when they are run again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.merge import markdown
from peft_mlm.methods import METHODS
from tests.matrix_of_merges import CASES, KINDS, refusal, rows, run_merge, save_merge_base

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
TITLES = ("### The method alone", "### With a trained head", "### With new tokens", "## Not merged")
SEEN = re.compile(r"(\d+e-\d+|0)(?: of (\d+e-\d+))?(?:, (\d+e-\d+|0))?( \*)?")


def table(case: str) -> dict[str, list[str]]:
    start, end = TITLES[CASES.index(case)], TITLES[CASES.index(case) + 1]
    part = PAGE[PAGE.index(start) : PAGE.index(end)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    return {cells[1]: cells[2:] for cells in lines if cells[1] not in ("name", "---")}


@pytest.mark.parametrize("case", CASES)
def test_every_cell_is_a_difference_within_its_bound_or_the_reason_of_a_refusal(case: str) -> None:
    told = table(case)
    expected = [(m, v) for m, v in rows() if not all(refusal(m, v, kind, case) for kind in KINDS)]
    assert list(told) == [variant or method for method, variant in expected]
    for method, variant in expected:
        for kind, cell in zip(KINDS, told[variant or method], strict=True):
            reason = refusal(method, variant, kind, case)
            if reason:
                assert cell == f"refused: {reason}"
                continue
            seen = SEEN.fullmatch(cell)
            assert seen, cell
            difference, allowed, quantised, _ = seen.groups()
            assert float(difference) <= (float(allowed) if kind == "bfloat16" else 1e-5), (method, variant, kind)
            assert (quantised is not None) == (kind in ("nf4", "int8"))
            assert quantised is None or float(quantised) <= (1e-4 if kind == "nf4" else 1)


def test_what_is_not_merged_is_named_with_its_reason() -> None:
    part = PAGE[PAGE.index("## Not merged") : PAGE.index("## Speed")]
    for name, row in METHODS.items():
        assert (f"({name}): {row.merge}." in part) == bool(row.merge)


def test_the_figures_of_speed_are_those_of_the_last_measurement() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "merge.json").read_text())
    assert markdown(measured) in PAGE
    for ways in measured["medians"].values():
        beyond = ways["ours"]["peak_mb"] - ways["ours"]["imports_mb"]
        assert beyond < 2 * measured["largest_shard_mb"] < ways["peft"]["peak_mb"] - ways["peft"]["imports_mb"]


@pytest.mark.parametrize(
    ("name", "kind", "case"),
    [
        ("lora", "float32", "head"), ("lora", "bfloat16", "tokens"), ("dora", "nf4", ""), ("oft", "bfloat16", "head"),
        ("loha", "int8", ""), ("lora", "nf4", "tokens"), ("bias", "float32", ""),
    ],
)  # fmt: skip
def test_a_cell_that_is_run_again_gives_what_the_page_says(name: str, kind: str, case: str, tmp_path: Path) -> None:
    base = save_merge_base(tmp_path / "base", kind)
    (tmp_path / "cell").mkdir()
    method, variant = next((m, v) for m, v in rows() if (v or m) == name)
    seen = run_merge(base, tmp_path / "cell", method, variant, kind, case)
    told = SEEN.fullmatch(table(case)[name][list(KINDS).index(kind)])
    assert told
    assert seen.effect > 1e-3
    assert seen.file_by_file == (told[4] is not None)
    assert seen.difference <= (seen.allowed if kind == "bfloat16" else 1e-5)
    if kind == "bfloat16":  # which weights are rounded up is the same everywhere, but for the last bits of sums
        assert seen.difference == pytest.approx(float(told[1]), rel=0.5)
