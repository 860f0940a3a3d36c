"""What is kept of a training beside its adapter; another tokenizer is found out, and it is said in what it differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

import peft_mlm
from peft_mlm.errors import AdapterError
from peft_mlm.training_facts import TRAINING_FACTS, changed_tokenizer, tokenizer_fingerprint
from tests.commands.conftest import train
from tests.tiny import letter_tokenizer


def test_a_tokenizer_loaded_again_is_the_same(base_folder: Path) -> None:
    one, other = (AutoTokenizer.from_pretrained(str(base_folder)) for _ in range(2))
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


def test_what_was_trained_with_is_told_without_a_path(trained_run: Path) -> None:
    record = json.loads((trained_run / "adapter" / TRAINING_FACTS).read_text())
    summary = json.loads((trained_run / "summary.json").read_text())
    facts = json.loads((trained_run / "dataset.json").read_text())
    assert record["masking"] == {
        "mlm_probability": 0.15, "mask_replace_prob": 0.8, "random_replace_prob": 0.1, "eval_mask_seed": 0,
        "eval_mask_draws": 1, "rows": "line",
    }  # fmt: skip
    assert record["data"]["name"] == "letters.txt"
    assert record["data"]["train"]["fingerprint"] == facts["train"]["fingerprint"]
    assert record["data"]["train"]["rows_used"] == facts["train"]["rows_used"]
    assert record["figures"]["adapted"] == summary["adapted"]
    assert str(trained_run.parent.parent) not in json.dumps(record)


def no_case(folder: Path) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)


def swapped(folder: Path) -> None:
    """The ids of A and B change places."""
    letter_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    record = json.loads(file.read_text())
    vocabulary = record["model"]["vocab"]
    pairs = dict(vocabulary) if isinstance(vocabulary, dict) else {token: i for i, (token, *_) in enumerate(vocabulary)}
    pairs["A"], pairs["B"] = pairs["B"], pairs["A"]
    record["model"]["vocab"] = pairs
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_case, "has the same tokens, but splits text otherwise"),
        (swapped, "as many, with other ids"),
    ],
)
def test_the_right_weights_behind_another_tokenizer_are_refused_with_what_differs(
    change: Callable[[Path], None],
    said: str,
    trained_run: Path,
    base_folder: Path,
    tmp_path: Path,
) -> None:
    other = shutil.copytree(base_folder, tmp_path / "base")
    assert peft_mlm.load(str(trained_run), base=str(other)).model is not None
    change(other)
    with pytest.raises(AdapterError, match=said):
        peft_mlm.load(str(trained_run), base=str(other))
    assert peft_mlm.load(str(trained_run), base=str(other), any_base=True).model is not None


def test_other_sizes_and_other_special_tokens_are_told(trained_run: Path, tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(extra=["[new]"])
    told = changed_tokenizer(trained_run / "adapter", tokenizer)
    assert told == [f"tokens of the tokenizer: {len(tokenizer) - 1} in training, {len(tokenizer)} here"]
    other = letter_tokenizer()
    other.mask_token = "A"
    assert "mask_token: ['<mask>', 4] in training, ['A'," in changed_tokenizer(trained_run / "adapter", other)[0]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tokenizer": {"special": 5}}'])
def test_damaged_facts_are_refused(content: str, trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / TRAINING_FACTS).write_text(content)
    with pytest.raises(AdapterError, match="is damaged"):
        changed_tokenizer(tmp_path, letter_tokenizer())
    (tmp_path / TRAINING_FACTS).unlink()
    assert changed_tokenizer(tmp_path, letter_tokenizer()) == []


def test_a_run_with_more_tokens_and_one_that_goes_on_from_it_are_loaded(
    base_folder: Path,
    text_file: Path,
    held_out: Path,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"max_steps": 2, "eval_steps": 2}
    first = train(base_folder, text_file, held_out, tmp_path / "one", add_tokens=["[x]"], **options)
    assert peft_mlm.load(str(first)).model is not None
    more = {"use_lora": False, "adapter_name_or_path": first, "add_tokens": ["[y]"]}
    second = train(base_folder, text_file, held_out, tmp_path / "two", **more, **options)
    assert "[y]" in peft_mlm.load(str(second)).tokenizer.get_vocab()
