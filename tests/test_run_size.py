from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_mlm.config import read_arguments
from peft_mlm.memory import build_outline
from peft_mlm.preparation import prepare
from peft_mlm.run_folder import RunFolder
from peft_mlm.run_size import describe_run_size
from tests.tiny import save_texts


def size_of(base: Path, text: Path | None, **changes: Any) -> dict[str, Any]:
    values = {"model_name_or_path": base, "use_lora": True, "max_seq_length": 24, **changes}
    arguments = read_arguments(values=values | ({} if text is None else {"train_file": text}), planned=True)
    outline = build_outline(arguments)
    return describe_run_size(arguments, outline.tokenizer, outline.max_seq_length, apart=outline.apart)


@pytest.mark.parametrize("rows", ["chunked", "line", "packed", "run_mlm"])
def test_rows_are_those_that_a_run_makes(base_folder: Path, text_file: Path, tmp_path: Path, rows: str) -> None:
    changes = {"rows": rows, "do_eval": False, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    size = size_of(base_folder, text_file, **changes)
    values = {"model_name_or_path": base_folder, "train_file": text_file, "output_dir": tmp_path / "run"}
    real = prepare(
        read_arguments(values={**values, "use_lora": True, "max_seq_length": 24, **changes}),
        RunFolder(tmp_path / "run"),
    )
    facts = real.corpus.facts["train"]
    exact = 0.0 if rows in ("line", "chunked") else 0.05
    assert size["rows"] == pytest.approx(facts["rows"], rel=exact + 0.01)
    assert size["about"] == (rows == "packed")
    lengths = [len(row) for row in real.corpus.rows["train"]["input_ids"]]
    assert size["longest_row"] == max(lengths)
    assert size["steps"] == pytest.approx(2 * -(-len(lengths) // 4), rel=exact + 0.02)
    assert size["tokens"] == pytest.approx(2 * sum(lengths), rel=0.1)


def test_of_many_texts_a_part_is_read_and_said_so(base_folder: Path, tmp_path: Path) -> None:
    text = save_texts(tmp_path / "many.txt", 5000)
    size = size_of(base_folder, text, rows="chunked", do_eval=False)
    whole = sum(len(line) + 1 for line in text.read_text().splitlines())
    assert size["about"]
    assert size["rows"] == pytest.approx(whole / 22, rel=0.03)


def test_without_text_the_steps_are_those_asked_for(base_folder: Path) -> None:
    size = size_of(base_folder, None, max_steps=70)
    assert (size["steps"], size["rows"], size["tokens"]) == (70, None, None)
    assert "not known" in str(size["why"])
    assert size_of(base_folder, None)["steps"] is None
    gone = size_of(base_folder, Path("nowhere/*.txt"), max_steps=70)
    assert (gone["steps"], gone["rows"]) == (70, None)
    assert "nowhere" in str(gone["why"])


def test_a_smaller_batch_with_more_accumulation_is_as_many_steps(base_folder: Path, text_file: Path) -> None:
    one = size_of(base_folder, text_file, rows="line", per_device_train_batch_size=8)
    other = size_of(base_folder, text_file, rows="line", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert one["steps"] == other["steps"]
    assert size_of(base_folder, text_file, max_train_samples=16, rows="line")["rows"] == 16
