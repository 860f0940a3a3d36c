from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from peft_mlm import word_memo
from peft_mlm.word_memo import WordMemo, encodes_words_alone, stands_alone
from tests.checkpoints import minilm
from tests.test_tokenization import make_tokenizer

# White space of all kinds, accents of their own, signs of no width, what normalisation turns into a space, other
# scripts, special tokens and their pieces.
PIECES = [
    *"ab AB.,'!?[]<>#\t\n\r  é¨´ʼßΣσς漢한กำ१5▁ﾞ`^",
    *("\u00a0", "\u3000", "\u200b", "\u200d", "\u00ad", "\ufeff", "\u0301", "\u0345", "\u0e33", "\ufe0f", "\U0001f3fb"),
    *("\x00", "\x1c", "\ue000", "[MASK]", "<mask>", "</s>", "[SEP]", "ab", "ba", "'s", "“", "…", "ﬁ", "½"),
]
FAMILIES = ("bert", "roberta", "xlm_roberta", "deberta", "deberta_v2")


def odd_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice(PIECES) for _ in range(draw.randrange(30))) for _ in range(count)]


def worded_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 6))).strip() or "a" for _ in range(400)]
    return [" ".join(draw.choice(words) for _ in range(draw.randrange(1, 20))) for _ in range(count)]


def prepared(tokenizer: Any) -> Tokenizer:
    tokenizer("a", padding=False, truncation=False)
    return tokenizer.backend_tokenizer


def whole(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def by_memo(memo: WordMemo, texts: list[str], batch: int = 700) -> list[list[int]]:
    rows: list[list[int]] = []
    for start in range(0, len(texts), batch):
        ids, lengths = memo.encode(texts[start : start + batch])
        assert ids.dtype == np.int32
        rows += [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    return rows


def backends(folder: Path) -> dict[str, Tokenizer]:
    made = {name: prepared(make_tokenizer(name, folder)) for name in FAMILIES}
    made["minilm"] = prepared(AutoTokenizer.from_pretrained(minilm()))
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("a", -2.0), ("b", -2.0), ("▁ab", -1.0), ("▁a", -1.5), ("s", -2.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.Replace("``", '"'), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    for scheme in ("always", "first", "never"):
        unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made[f"unigram {scheme}"] = Tokenizer.from_str(unigram.to_str())
    prefixed = Tokenizer.from_str(made["roberta"].to_str())
    prefixed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    made["prefixed"] = prefixed
    return made


@pytest.fixture
def always_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_memo, "LARGEST_SHARE", 1.0)


@pytest.mark.usefixtures("always_on")
def test_ids_are_those_of_the_whole_text_whatever_stands_in_it(tmp_path: Path) -> None:
    texts = [*odd_texts(1000, 1), *worded_texts(600, 2), "", " ", "a  b", " a", "a ", "[MASK]b <mask> a", "a b<mask>"]
    for name, backend in backends(tmp_path).items():
        assert encodes_words_alone(backend), name
        memo = WordMemo(backend)
        got, expected = by_memo(memo, texts), whole(backend, texts)
        assert memo.active, name  # the first texts came out equal
        wrong = [(text, a, b) for text, a, b in zip(texts, got, expected, strict=True) if a != b]
        assert not wrong, (name, wrong[:3])


@pytest.mark.usefixtures("always_on")
@pytest.mark.parametrize("kind", ["plain", "lstrip", "rstrip", "single_word", "normalized", "special"])
def test_added_tokens_are_found_as_in_the_whole_text(kind: str, tmp_path: Path) -> None:
    options = {} if kind == "plain" else {kind: True}
    texts = [*worded_texts(500, 3), "a zz b", "azz b", "zz zz", "a zzb zz", " zz", "ZZ a"]
    for name in FAMILIES:
        tokenizer = make_tokenizer(name, tmp_path)
        tokenizer.backend_tokenizer.add_tokens([AddedToken("zz", **{"normalized": False, **options})])
        backend = prepared(tokenizer)
        assert by_memo(WordMemo(backend), texts) == whole(backend, texts), name


def test_tokenizers_that_reach_across_spaces_are_not_trusted(tmp_path: Path) -> None:
    def made(**parts: Any) -> Tokenizer:
        backend = Tokenizer(models.BPE({"a": 0, "b": 1, "▁": 2, "a▁": 3}, [("a", "▁")]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        for name, part in parts.items():
            setattr(backend, name, part)
        return backend

    assert encodes_words_alone(made())
    assert not encodes_words_alone(made(pre_tokenizer=pre_tokenizers.Metaspace(split=False)))
    assert not encodes_words_alone(made(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)))
    assert not encodes_words_alone(made(pre_tokenizer=pre_tokenizers.Digits()))
    assert not encodes_words_alone(made(pre_tokenizer=None))
    assert not encodes_words_alone(made(normalizer=normalizers.Replace(" ", "▁")))
    assert not encodes_words_alone(made(normalizer=normalizers.Replace(Regex("a b"), "c")))
    assert not encodes_words_alone(made(normalizer=normalizers.Prepend("▁")))
    assert not encodes_words_alone(made(normalizer=normalizers.Strip()))
    assert not encodes_words_alone(made(model=models.BPE({"a": 0}, [], dropout=0.1)))
    assert not encodes_words_alone(prepared(make_tokenizer("letters", tmp_path)))
    phrase = made(decoder=decoders.Metaspace())
    phrase.add_tokens(["new york"])
    assert not encodes_words_alone(phrase)


def test_one_that_only_seems_to_work_by_words_is_found_out_on_the_first_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "▁": 2, "a▁": 3}, [("a", "▁")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False, prepend_scheme="never")
    texts = ["a b a"] * 100
    monkeypatch.setattr(word_memo, "encodes_words_alone", lambda backend: True)
    memo = WordMemo(backend)
    assert by_memo(memo, texts) == whole(backend, texts) == [[3, 1, 2, 0]] * 100
    assert not memo.active


def test_texts_whose_words_do_not_occur_again_are_encoded_whole_before_long(tmp_path: Path) -> None:
    backend = prepared(make_tokenizer("bert", tmp_path))
    memo = WordMemo(backend)
    texts = [f"a{number} b{number}" for number in range(11_000)]
    assert by_memo(memo, texts) == whole(backend, texts)
    assert not memo.active
    assert len(memo.further) == len(memo.first) == 0  # and nothing is kept


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_memo, "CHARACTERS_KEPT", 500)
    backend = prepared(AutoTokenizer.from_pretrained(minilm()))
    memo = WordMemo(backend)
    texts = [f"some words of number {number // 10}" for number in range(5000)]
    expected = whole(backend, texts)
    for start in range(0, len(texts), 100):
        assert by_memo(memo, texts[start : start + 100]) == expected[start : start + 100]
        assert memo.characters <= 500
        assert len(memo.first) + len(memo.further) <= 500
    assert memo.active


@pytest.mark.parametrize(
    ("word", "alone"),
    [
        *((word, True) for word in ("word", "über", "“So", "漢字", "#", "`")),
        *((word, False) for word in ("", "a\tb", "a\u200b", "\u0301a", "a" * 65, "a\u00a0b")),
    ],
)
def test_words_with_something_odd_at_their_edge_do_not_stand_alone(word: str, alone: bool) -> None:
    assert stands_alone(word) is alone


def test_no_texts_have_no_ids(tmp_path: Path) -> None:
    ids, lengths = WordMemo(prepared(make_tokenizer("bert", tmp_path))).encode([])
    assert (len(ids), len(lengths)) == (0, 0)


def test_processes_of_a_fast_tokenizer_say_nothing_of_threads(tmp_path: Path) -> None:
    program = """
import sys
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer
from peft_mlm.tokenization import special_token_frame, tokenize
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = Dataset.from_dict({"text": ["some text of words"] * 4000})
alone = tokenize(texts, tokenizer)
assert tokenize(texts, tokenizer, num_proc=2)[:] == alone[:]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(minilm())], env=environment, capture_output=True, text=True, check=True
    )
    assert "parallelism" not in done.stderr


def test_much_text_gets_a_process_per_core_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_mlm import tokenization

    texts = Dataset.from_dict({"text": ["some text"] * 4000})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert tokenization._processes(None, texts, fast=True) is None
    monkeypatch.setattr(tokenization, "_FAST_SHARE", 1000)
    assert tokenization._processes(None, texts, fast=True) == 3
    assert tokenization._processes(1, texts, fast=True) is None
    assert tokenization._processes(2, texts, fast=True) == 2
    monkeypatch.setattr(tokenization.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert tokenization._processes(None, texts, fast=True) is None
