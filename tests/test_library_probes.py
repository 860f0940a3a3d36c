"""Broken libraries, as real packages in the way of the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_mlm.library_probes import one_line, probe

BREAKS = {
    "raises": 'raise OSError("libcudart.so.13: cannot open shared object file\\nand more")',
    "aborts": "import os; os.abort()",
    "exits": "import sys; print('no licence', file=sys.stderr); sys.exit(3)",
    "hangs": "import time; time.sleep(60)",
    "chats": 'print(\'{"name": "chats"}\')',
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in BREAKS.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("broken")
def test_a_library_that_is_broken_is_found_out_and_keeps_none_of_the_others_back() -> None:
    found = probe(["raises", "aborts", "yaml", "exits", "hangs", "nothing-there", "chats"], timeout=8)
    assert {name: facts.get("error") for name, facts in found.items()} == {
        "raises": "OSError: libcudart.so.13: cannot open shared object file",
        "aborts": "the interpreter was ended by SIGABRT",
        "yaml": None,
        "exits": "no licence",
        "hangs": "no answer in 8 seconds",
        "nothing-there": "ModuleNotFoundError: No module named 'nothing_there'",
        "chats": None,
    }


def test_one_line_is_the_first_that_says_something() -> None:
    assert one_line("\n  a   b\nc") == "a b"
    assert one_line("x" * 300) == "x" * 200
    assert one_line("") == ""
