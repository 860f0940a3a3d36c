from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_mlm.arguments import DataTrainingArguments
from peft_mlm.corpus import Corpus, build_corpus
from peft_mlm.data import load_text
from tests.tiny import letter_texts, letter_tokenizer, tiny_model

MODEL, TOKENIZER = tiny_model("roberta"), letter_tokenizer()
HELD = 62
HELD_OUT = letter_texts(20, shortest=41, longest=45)  # longer than any text that is trained on
SPECIAL = set(TOKENIZER.all_special_ids)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts) + "\n")
    return str(path)


def corpus(tmp_path: Path, texts: list[str], held_out: list[str] | None = None, **options: Any) -> Corpus:
    held_out = HELD_OUT if held_out is None else held_out
    data = DataTrainingArguments(
        train_file=[write(tmp_path / "train.txt", texts)],
        validation_file=[write(tmp_path / "held_out.txt", held_out)],
        **options,
    )
    return build_corpus(load_text(data), data, MODEL, TOKENIZER)


def rows_of(made: Corpus, split: str) -> list[list[int]]:
    return [list(row) for row in made.rows[split]["input_ids"]]


def test_line_rows_are_what_the_tokenizer_makes_of_each_text(tmp_path: Path) -> None:
    texts = {"train": letter_texts(50), "validation": HELD_OUT}
    made = corpus(tmp_path, texts["train"], rows="line")
    for split, lines in texts.items():
        assert rows_of(made, split) == [TOKENIZER(text)["input_ids"] for text in lines]
        assert made.facts[split]["texts"] == made.facts[split]["rows"] == made.facts[split]["rows_used"] == len(lines)
    assert made.max_seq_length == HELD
    assert made.notices == ()


def test_chunked_rows_hold_every_token_once_in_order(tmp_path: Path) -> None:
    texts = letter_texts(50)
    made = corpus(tmp_path, texts)
    rows, facts = rows_of(made, "train"), made.facts["train"]
    letters = [i for row in rows for i in row if i not in SPECIAL]
    assert letters == [i for text in texts for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    assert facts["tokens"] == facts["text_tokens"] == len(letters)
    assert facts["dropped_tokens"] == facts["truncated_tokens"] == 0
    assert max(map(len, rows)) == HELD
    assert made.notices == ()


def test_what_is_cut_is_counted_and_told(tmp_path: Path) -> None:
    texts = ["A" * length for length in (5, 10, 11, 12, 30)]
    made = corpus(tmp_path, texts, ["AB"], rows="line", max_seq_length=12)
    assert [len(row) for row in rows_of(made, "train")] == [7, 12, 12, 12, 12]
    facts = made.facts["train"]
    assert (facts["truncated_texts"], facts["truncated_tokens"], facts["longest_text"]) == (3, 1 + 2 + 20, 30)
    (notice,) = made.notices
    assert notice.startswith("train: 3 texts are longer than max_seq_length 12")
    assert "23 tokens are lost" in notice
    assert "--rows chunked" in notice


def test_what_run_mlm_drops_is_counted_and_told(tmp_path: Path) -> None:
    texts = letter_texts(50)
    made = corpus(tmp_path, texts, texts[:10], rows="run_mlm", max_seq_length=16)
    rows = rows_of(made, "train")
    assert {len(row) for row in rows} == {16}
    dropped = sum(map(len, texts)) - sum(i not in SPECIAL for row in rows for i in row)
    assert made.facts["train"]["dropped_tokens"] == dropped > 0
    assert any(notice.startswith(f"train: {dropped} tokens at the ends of batches") for notice in made.notices)


def test_limits_take_the_first_rows(tmp_path: Path) -> None:
    texts = letter_texts(50)
    whole = corpus(tmp_path, texts)
    limited = corpus(tmp_path, texts, max_train_samples=3, max_eval_samples=2)
    for split, limit in (("train", 3), ("validation", 2)):
        assert rows_of(limited, split) == rows_of(whole, split)[:limit]
        assert limited.facts[split] == {**whole.facts[split], "rows_used": limit}
    generous = corpus(tmp_path, texts, max_train_samples=10_000)
    assert rows_of(generous, "train") == rows_of(whole, "train")
    assert generous.facts == whole.facts


@pytest.mark.parametrize(("asked", "used"), [(None, HELD), (HELD, HELD), (20, 20), (HELD + 1, HELD), (512, HELD)])
def test_rows_are_never_longer_than_the_model_holds(asked: int | None, used: int, tmp_path: Path) -> None:
    made = corpus(tmp_path, letter_texts(50), max_seq_length=asked)
    assert made.max_seq_length == made.facts["train"]["max_seq_length"] == used
    assert max(map(len, rows_of(made, "train"))) == used
    told = [notice for notice in made.notices if f"max_seq_length {asked} is more than" in notice]
    assert len(told) == (asked is not None and asked > HELD)


def test_much_unknown_text_is_told_and_a_little_is_not(tmp_path: Path) -> None:
    made = corpus(tmp_path, ["ABCDEFGHIz"] * 10 + ["ABCDEFGHIJKLMNOPQRST"], ["ABCDEFGHIJKLMNOPQRS" * 2 + "z"])
    assert made.facts["train"]["unknown_tokens"] == 10
    assert made.facts["train"]["unknown_share"] == pytest.approx(10 / 120)
    assert made.facts["validation"]["unknown_tokens"] == 1
    assert [notice for notice in made.notices if "unknown" in notice] == [
        "train: 8.3% of the tokens are unknown to the tokenizer. Does it fit the text?"
    ]


def test_validation_text_that_is_trained_on_is_told(tmp_path: Path) -> None:
    texts = letter_texts(30)
    made = corpus(tmp_path, texts, [*texts[:3], "TSRQ"])
    assert made.facts["validation"]["also_in_train"] == 3
    assert made.notices == ("validation: 3 texts also stand in the training text; its figures flatter.",)


def test_one_split_alone_is_made_as_it_is_with_the_other(tmp_path: Path) -> None:
    both = corpus(tmp_path, letter_texts(30))
    data = DataTrainingArguments(validation_file=[str(tmp_path / "held_out.txt")])
    alone = build_corpus(load_text(data, splits=("validation",)), data, MODEL, TOKENIZER)
    assert set(alone.rows) == set(alone.facts) == {"validation"}
    assert rows_of(alone, "validation") == rows_of(both, "validation")


def test_facts_name_the_source_and_can_be_written_as_json(tmp_path: Path) -> None:
    made = corpus(tmp_path, letter_texts(30))
    assert json.loads(json.dumps(made.facts)) == made.facts
    for split, file in (("train", "train.txt"), ("validation", "held_out.txt")):
        assert made.facts[split]["source"] == {"files": [str(tmp_path / file)]}
        assert made.facts[split]["text_column"] == "text"
        assert len(made.facts[split]["fingerprint"]) == 32
