from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_mlm.arguments import DataTrainingArguments
from peft_mlm.data import TextData, load_text
from peft_mlm.errors import DataError


def write(file: Path, texts: list[str]) -> list[str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{text}\n" for text in texts))
    return [str(file)]


def load(*splits: str, **data: Any) -> TextData:
    return load_text(DataTrainingArguments(**data), splits=splits or ("train", "validation"))


def texts(text: TextData, split: str) -> list[str]:
    return list(text.splits[split]["text"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 30), min_size=2, max_size=80).filter(lambda n: len(set(n)) > 1),
    percentage=st.floats(0.01, 99.99),
    seed=st.integers(-(2**31), 2**31),
)
def test_a_split_moves_the_share_asked_for_and_keeps_every_text_on_one_side(
    tmp_path: Path, numbers: list[int], percentage: float, seed: int
) -> None:
    corpus = [f"text {number}" for number in numbers]
    split = load(
        train_file=write(tmp_path / "a.txt", corpus),
        validation_split_percentage=percentage,
        validation_split_seed=seed,
    )
    train, validation = texts(split, "train"), texts(split, "validation")
    distinct = len(set(corpus))
    assert Counter(train) + Counter(validation) == Counter(corpus)
    assert not set(train) & set(validation)
    assert len(set(validation)) == min(max(round(percentage / 100 * distinct), 1), distinct - 1)
    assert split.facts["validation"]["also_in_train"] == 0
    assert [split.facts[name]["texts"] for name in ("train", "validation")] == [len(train), len(validation)]


def test_a_split_keeps_the_order_of_the_texts(tmp_path: Path) -> None:
    corpus = [f"text {i:03}" for i in range(200)]
    split = load(train_file=write(tmp_path / "a.txt", corpus), validation_split_percentage=30)
    assert texts(split, "train") == sorted(texts(split, "train"))
    assert texts(split, "validation") == sorted(texts(split, "validation"))


def test_a_split_depends_on_the_texts_and_the_seed_alone(tmp_path: Path) -> None:
    corpus = [f"text {i}" for i in range(400)]
    shuffled = random.Random(1).sample(corpus, len(corpus))
    first = load(train_file=write(tmp_path / "one" / "a.txt", corpus))
    other_order = load(train_file=write(tmp_path / "two" / "b.txt", shuffled))
    two_files = load(train_file=write(tmp_path / "c.txt", corpus[:150]) + write(tmp_path / "d.txt", corpus[150:]))
    other_seed = load(train_file=write(tmp_path / "one" / "a.txt", corpus), validation_split_seed=43)
    drawn = set(texts(first, "validation"))
    assert len(drawn) == 20
    assert set(texts(other_order, "validation")) == drawn
    assert texts(two_files, "validation") == texts(first, "validation")
    assert set(texts(other_seed, "validation")) != drawn


def test_a_split_is_drawn_from_everywhere(tmp_path: Path) -> None:
    corpus = [f"text {i:04}" for i in range(2000)]
    split = load(train_file=write(tmp_path / "a.txt", corpus), validation_split_percentage=20)
    quarters = Counter(int(text[5:]) // 500 for text in texts(split, "validation"))
    # 100 of 400 expected in each, standard deviation below 9.
    assert all(60 < quarters[quarter] < 140 for quarter in range(4))


def test_the_split_is_the_same_in_every_release(tmp_path: Path) -> None:
    # Figures of different versions can only be compared on the same texts.
    split = load(train_file=write(tmp_path / "a.txt", list("abcdefghij")), validation_split_percentage=30)
    assert texts(split, "validation") == ["e", "h", "j"]
    assert split.facts["train"]["fingerprint"] == "9dae91ff559a2bb7c6f821f4b0b2d266"


def test_validation_text_alone_is_the_same_as_with_training_text(tmp_path: Path) -> None:
    files = write(tmp_path / "a.txt", [f"text {i}" for i in range(50)])
    both, alone = load(train_file=files), load("validation", train_file=files)
    assert list(alone.splits) == ["validation"]
    assert texts(alone, "validation") == texts(both, "validation")
    assert alone.facts["validation"] == both.facts["validation"]


def test_training_text_alone_is_all_of_it(tmp_path: Path) -> None:
    corpus = [f"text {i}" for i in range(50)]
    # What is not asked for is not read.
    alone = load("train", train_file=write(tmp_path / "a.txt", corpus), validation_file=[str(tmp_path / "none.txt")])
    assert list(alone.splits) == ["train"]
    assert texts(alone, "train") == corpus


def test_given_validation_text_is_taken_whole_and_counted_against_the_training_text(tmp_path: Path) -> None:
    train, validation = ["a", "b", "b", "c"], ["b", "b", "x", "c", ""]
    files = {
        "train_file": write(tmp_path / "train.txt", train),
        "validation_file": write(tmp_path / "validation.txt", validation),
    }
    both, alone = load(**files), load("validation", **files)
    assert texts(both, "train") == train
    assert texts(both, "validation") == texts(alone, "validation") == ["b", "b", "x", "c"]
    assert both.facts["validation"]["also_in_train"] == 3
    assert alone.facts["validation"]["also_in_train"] is None
    assert both.facts["validation"] == {
        "source": {"files": files["validation_file"]},
        "text_column": "text",
        "texts": 4,
        "empty": 1,
        "fingerprint": alone.facts["validation"]["fingerprint"],
        "origin": "given",
        "also_in_train": 3,
    }


def test_validation_text_needs_no_training_text(tmp_path: Path) -> None:
    alone = load("validation", validation_file=write(tmp_path / "a.txt", ["only"]))
    assert texts(alone, "validation") == ["only"]


def test_blank_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    split = load(train_file=write(tmp_path / "a.txt", ["", "a", "  ", "b", "\t", "\u2003", "c"]))
    assert sorted(texts(split, "train") + texts(split, "validation")) == ["a", "b", "c"]
    assert split.facts["train"]["empty"] == 4
    assert split.facts["validation"]["origin"] == "split off: 5 % at random, seed 42"


def test_the_fingerprint_tells_texts_apart_and_nothing_else(tmp_path: Path) -> None:
    def fingerprint(*files: list[str]) -> str:
        found: str = load("train", train_file=[file for group in files for file in group]).facts["train"]["fingerprint"]
        return found

    (tmp_path / "table.csv").write_text("id,body\n1,one\n2,\n3,two\n")
    same = {
        fingerprint(write(tmp_path / "x.txt", ["one", "two"])),
        fingerprint(write(tmp_path / "y" / "z.txt", ["", "one", "two"])),
        fingerprint(write(tmp_path / "1.txt", ["one"]), write(tmp_path / "2.txt", ["two"])),
        fingerprint([str(tmp_path / "table.csv")]),
    }
    assert len(same) == 1
    assert (
        len(
            same
            | {
                fingerprint(write(tmp_path / f"{i}.txt", other))
                for i, other in enumerate([["two", "one"], ["onetwo"], ["one", "two", "two"], ["one", "tw"]])
            }
        )
        == 5
    )


def test_every_split_has_exactly_one_column_of_strings(tmp_path: Path) -> None:
    from datasets import Features, Value

    (tmp_path / "a.csv").write_text("id,text\n1,one\n2,two\n3,three\n")
    split = load(train_file=[str(tmp_path / "a.csv")])
    assert list(split.splits) == ["train", "validation"]
    assert all(part.features == Features({"text": Value("string")}) for part in split.splits.values())


def test_a_folder_laid_out_as_a_data_set_is_loaded_by_its_path(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write(tmp_path / "set" / f"{name}.csv", ["sentence,label", f"{name} one,0", f"{name} two,1"])
    given_split = load(dataset_name=str(tmp_path / "set"))
    assert texts(given_split, "train") == ["train one", "train two"]
    assert texts(given_split, "validation") == ["validation one", "validation two"]
    assert given_split.facts["train"]["source"]["commit"] is None
    own = load(dataset_name=str(tmp_path / "set"), validation_file=write(tmp_path / "own.txt", ["mine"]))
    assert texts(own, "validation") == ["mine"]


@pytest.mark.parametrize("percentage", [0, 100, -1, 250, float("nan")])
def test_a_share_that_is_no_share_is_refused(tmp_path: Path, percentage: float) -> None:
    files = write(tmp_path / "a.txt", ["a", "b"])
    with pytest.raises(DataError, match=r"validation_split_percentage is .*more than 0 and less than 100"):
        load(train_file=files, validation_split_percentage=percentage)


@pytest.mark.parametrize("corpus", [["one"], ["same", "same", "same"]])
def test_too_little_text_to_split_is_refused(tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(DataError, match=rf"a\.txt\) holds {len(corpus)} text.*1 of them different.*--validation_file"):
        load(train_file=write(tmp_path / "a.txt", corpus))


def test_a_source_that_is_missing_doubled_or_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path / "a.txt", ["a", "b"])
    with pytest.raises(DataError, match=r"No text to learn from is given: .*--train_file .*--dataset_name"):
        load()
    with pytest.raises(DataError, match="No text to learn from"):
        load(validation_file=files)
    with pytest.raises(DataError, match=r"Both a data set .*leave out --dataset_name or --train_file"):
        load(train_file=files, dataset_name="glue")
    with pytest.raises(DataError, match="is a file, not a data set: give it as --train_file"):
        load(dataset_name=files[0])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"The data set .*nothing cannot be loaded"):
        load(dataset_name=str(tmp_path / "nothing"))
    write(tmp_path / "tests" / "test.csv", ["text", "a"])
    with pytest.raises(DataError, match="has no training split, only test"):
        load(dataset_name=str(tmp_path / "tests"))
