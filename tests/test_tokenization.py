from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    DebertaTokenizer,
    DebertaV2Tokenizer,
    EsmTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from peft_mlm.errors import ModelError
from peft_mlm.tokenization import describe_tokens, length_histogram, special_token_frame, text_separator, tokenize

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
TEXTS = ["ab ba abab", "a", "ACD EFG", "b <mask> [MASK] a", "  ab\tzz ", "ab" * 400]

# Family -> prefix, suffix, separator.
FRAMES: dict[str, tuple[list[str], list[str], str | None]] = {
    "bert": (["[CLS]"], ["[SEP]"], "[SEP]"),
    "roberta": (["<s>"], ["</s>"], "</s>"),
    "xlm_roberta": (["<s>"], ["</s>"], "</s>"),
    "deberta": (["[CLS]"], ["[SEP]"], "[SEP]"),
    "deberta_v2": (["[CLS]"], ["[SEP]"], "[SEP]"),
    "esm": (["<cls>"], ["<eos>"], "<eos>"),
    "letters": ([], [], None),
    "letters_with_sep": ([], [], "<sep>"),
    "only_start": (["<cls>"], [], "<eos>"),
    "two_at_each_end": (["<cls>", "<eos>"], ["<sep>", "<eos>"], "<eos>"),
}


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def letter_tokenizer(template: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    vocabulary = numbered("<pad>", "<unk>", "<mask>", "<cls>", "<sep>", "<eos>", *LETTERS)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, vocabulary[name]) for name in ("<cls>", "<sep>", "<eos>")]
        )
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_tokenizer(family: str, folder: Path) -> Any:
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<mask>", 0.0)]
    bracketed = [("[CLS]", 0.0), ("[PAD]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0), ("[MASK]", 0.0)]
    pieces = [("▁", -3.0), ("a", -2.0), ("b", -2.0), ("▁ab", -1.0)]
    byte_pairs = ("a", "b", "Ġ", "ab", "A", "C")
    match family:
        case "bert":
            return BertTokenizer(vocab=numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "##a"))
        case "roberta":
            vocabulary = numbered(*(token for token, _ in special), *byte_pairs)
            return RobertaTokenizer(vocab=vocabulary, merges=[("a", "b")], model_max_length=8)
        case "xlm_roberta":
            return XLMRobertaTokenizer(vocab=[*special, *pieces])
        case "deberta":
            vocabulary = numbered(*(token for token, _ in bracketed), *byte_pairs)
            return DebertaTokenizer(vocab=vocabulary, merges=[("a", "b")])
        case "deberta_v2":
            return DebertaV2Tokenizer(vocab=[*bracketed, *pieces], unk_id=3)
        case "esm":
            file = folder / "vocab.txt"
            file.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<mask>"]))
            return EsmTokenizer(str(file), model_max_length=8)
        case "letters":
            return letter_tokenizer()
        case "letters_with_sep":
            return letter_tokenizer(sep_token="<sep>", eos_token="<eos>")
        case "only_start":
            return letter_tokenizer("<cls> $A", eos_token="<eos>")
        case "two_at_each_end":
            return letter_tokenizer("<cls> <eos> $A <sep> <eos>")
    raise ValueError(family)


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(params=FRAMES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str, tmp_path: Path) -> Any:
    return make_tokenizer(family, tmp_path)


def on_disk(texts: list[str], path: Path) -> Dataset:
    with ArrowWriter(path=str(path), fingerprint="texts") as writer:
        writer.write_batch({"text": texts})
        writer.finalize()
    return Dataset.from_file(str(path))


def test_frame_and_separator_are_the_tokenizers_own(family: str, tokenizer: Any) -> None:
    prefix, suffix, separator = FRAMES[family]
    expected = tokenizer.convert_tokens_to_ids(prefix), tokenizer.convert_tokens_to_ids(suffix)
    assert special_token_frame(tokenizer) == expected
    assert text_separator(tokenizer) == (None if separator is None else tokenizer.convert_tokens_to_ids(separator))


def test_tokens_in_their_frame_are_what_the_tokenizer_gives(tokenizer: Any) -> None:
    prefix, suffix = special_token_frame(tokenizer)
    tokenized = tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer)
    assert tokenized.column_names == ["input_ids"]
    for text, ids in zip(TEXTS, tokenized["input_ids"], strict=True):
        assert prefix + ids + suffix == tokenizer(text, verbose=False)["input_ids"]


def test_tokenizers_own_truncation_and_padding_are_not_used(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bert", tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    tokenized = tokenize(Dataset.from_dict({"text": ["ab" * 10, "a"]}), tokenizer)
    assert tokenized["input_ids"][:] == [[5, *[7, 8] * 9, 7], [5]]


@pytest.mark.parametrize("name", ["roberta", "esm"])
def test_texts_longer_than_the_model_takes_are_kept_whole_without_a_warning(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(name, tmp_path)
    handler = Recorder()
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenized = tokenize(Dataset.from_dict({"text": ["ACAC" * 50]}), tokenizer)
        assert handler.messages == []
        tokenizer("ACAC" * 50)  # the same call without our options does warn: the handler hears it
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert len(tokenized[0]["input_ids"]) == 200
    assert any("longer than" in message for message in handler.messages)


def test_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": [f"{'ab ' * (number % 7)}a" for number in range(2500)]})
    for name in ("bert", "esm"):
        tokenizer = make_tokenizer(name, tmp_path)
        alone = tokenize(texts, tokenizer)
        assert tokenize(texts, tokenizer, num_proc=2)[:] == alone[:]
        assert tokenize(texts.select(range(1)), tokenizer, num_proc=2)[:] == alone[:1]


def test_other_columns_are_left_out_and_row_order_is_that_of_the_data_set(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"label": [0, 1, 2], "text": ["a", "b", "ab"]}).select([2, 0])
    assert tokenize(texts, make_tokenizer("bert", tmp_path))[:] == {"input_ids": [[5, 7], [5]]}


def test_no_texts_give_no_tokens(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bert", tmp_path)
    tokenized = tokenize(Dataset.from_dict({"text": ["a"]}).select([]), tokenizer)
    assert tokenized.column_names == ["input_ids"]
    no_lengths = {"edges": [], "counts": [], "median": None}
    assert astuple(describe_tokens(tokenized, tokenizer)) == (0, 0, 0, 0.0, 0, no_lengths)


def test_second_run_finds_the_result_of_the_first(tmp_path: Path) -> None:
    texts = on_disk(TEXTS, tmp_path / "texts.arrow")
    first = tokenize(texts, make_tokenizer("bert", tmp_path))
    file = Path(first.cache_files[0]["filename"])
    written = file.stat().st_mtime_ns
    used = make_tokenizer("bert", tmp_path)
    used(["ab"], padding="max_length", max_length=9, truncation=True)  # changes the state of the tokenizer object
    used.model_max_length = 77
    assert tokenize(texts, used).cache_files == first.cache_files
    assert tokenize(texts, used, num_proc=2).cache_files == first.cache_files
    assert file.stat().st_mtime_ns == written
    tokenize(texts, used, overwrite_cache=True)
    assert file.stat().st_mtime_ns != written


def test_another_process_finds_the_result(tmp_path: Path) -> None:
    on_disk(TEXTS, tmp_path / "texts.arrow")
    make_tokenizer("esm", tmp_path)  # slow, and keeps its vocabulary in Python sets and dicts
    program = """
import sys
from datasets import Dataset
from transformers import EsmTokenizer
from peft_mlm.tokenization import tokenize
print(tokenize(Dataset.from_file(sys.argv[1]), EsmTokenizer(sys.argv[2])).cache_files)
"""
    outputs = []
    for seed in ("1", "2"):
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", program, tmp_path / "texts.arrow", tmp_path / "vocab.txt"],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert outputs[0] == outputs[1] != ""
    assert len(list(tmp_path.glob("cache-*.arrow"))) == 1


@pytest.mark.parametrize("name", ["bert", "esm"])
def test_changed_tokenizer_tokenises_again(name: str, tmp_path: Path) -> None:
    texts = on_disk(["ab A C zz"], tmp_path / "texts.arrow")
    before = tokenize(texts, make_tokenizer(name, tmp_path))[0]["input_ids"]
    changed = make_tokenizer(name, tmp_path)
    changed.add_tokens(["zz"])
    after = tokenize(texts, changed)[0]["input_ids"]
    assert before[-1] == changed.unk_token_id
    assert after == [*before[:-1], changed.convert_tokens_to_ids("zz")]


def test_changed_normalisation_tokenises_again(tmp_path: Path) -> None:
    texts = on_disk(["AB"], tmp_path / "texts.arrow")
    vocabulary = numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b")
    assert tokenize(texts, BertTokenizer(vocab=vocabulary))[0]["input_ids"] == [5, 6]
    assert tokenize(texts, BertTokenizer(vocab=vocabulary, do_lower_case=False))[0]["input_ids"] == [1]


def test_facts_count_the_tokens(tokenizer: Any) -> None:
    tokenized = tokenize(Dataset.from_dict({"text": TEXTS * 300}), tokenizer)
    rows = tokenized["input_ids"][:]
    tokens = sum(len(row) for row in rows)
    unknown = sum(row.count(tokenizer.unk_token_id) for row in rows)
    facts = describe_tokens(tokenized, tokenizer)
    lengths = [len(row) for row in rows]
    histogram = length_histogram(np.array(lengths))
    assert astuple(facts) == (len(rows), tokens, unknown, unknown / tokens, max(lengths), histogram)


@given(st.lists(st.one_of(st.integers(0, 30), st.integers(0, 10**6)), min_size=1, max_size=200))
def test_classes_of_lengths_are_few_and_count_every_text_once(lengths: list[int]) -> None:
    told = length_histogram(np.array(lengths, np.int32))
    edges, counts = told["edges"], told["counts"]
    assert 1 <= len(counts) <= 13
    assert edges == sorted(set(edges))
    assert counts == [sum(a <= length < b for length in lengths) for a, b in pairwise(edges)]
    assert sum(counts) == len(lengths)
    assert told["median"] == statistics.median(lengths)


def test_classes_of_lengths_are_as_wide_as_people_count_and_double_where_lengths_differ_much() -> None:
    even = length_histogram(np.arange(100, 120))
    assert even == {"edges": list(range(100, 121, 2)), "counts": [2] * 10, "median": 109.5}
    many_short = length_histogram(np.array([3] * 80 + [900] * 20))["edges"]
    assert many_short == [3, 4, 8, 16, 32, 64, 128, 256, 512, 901]


def test_tokenizer_without_unknown_token_has_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("roberta", tmp_path)
    tokenizer.unk_token = None
    assert describe_tokens(tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer), tokenizer).unknown_tokens == 0


def test_tokenizer_without_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a mask token"):
        special_token_frame(letter_tokenizer(mask_token=None))


def test_tokenizer_that_does_not_frame_the_text_is_refused() -> None:
    with pytest.raises(ModelError, match="does not just put special tokens around"):
        special_token_frame(letter_tokenizer("<cls> <eos>"))
