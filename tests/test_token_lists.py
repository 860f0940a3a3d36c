from __future__ import annotations

from pathlib import Path

import pytest

from peft_mlm.errors import ArgumentsError
from peft_mlm.token_lists import read_token_list


def test_a_list_and_a_file_with_the_same_tokens_are_the_same(tmp_path: Path) -> None:
    tokens = ["mg/dL", "a b", "#1", "naïveté"]
    (tmp_path / "tokens.txt").write_text("\ufeff" + "\r\n".join(["mg/dL", "", " a b ", "#1", "naïveté", "#1"]))
    assert read_token_list("add_tokens", tokens) == tokens
    assert read_token_list("add_tokens", [str(tmp_path / "tokens.txt")]) == tokens
    assert read_token_list("add_tokens", tokens * 2) == tokens
    assert read_token_list("add_tokens", None) == []


@pytest.mark.parametrize("word", ["mg/dL", "x" * 5000, "a\0b"])
def test_a_lone_token_that_is_no_file_is_a_token(word: str) -> None:
    assert read_token_list("add_tokens", [word]) == [word]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere.txt"], "nowhere.txt cannot be read: there is no such file"),
        (["./nowhere"], "there is no such file"),
        (["TMP/empty.txt"], "holds no tokens"),
        (["TMP/latin.txt"], "no UTF-8 text file"),
        (["a", ""], "an empty token"),
        (["a", "  "], "an empty token"),
        ([], "an empty token"),
        (["a", "b "], "'b ' begins or ends with space"),
        (["a\tb", "c"], "holds a tab"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_sentence(given: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("naïveté".encode("latin-1"))
    with pytest.raises(ArgumentsError, match="add_special_tokens: ") as caught:
        read_token_list("add_special_tokens", [word.replace("TMP", str(tmp_path)) for word in given])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
