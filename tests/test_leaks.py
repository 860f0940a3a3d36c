"""What is shortened before others see it."""

from __future__ import annotations

import pytest

from peft_mlm.leaks import PATHS, TOKENS, without_leaks


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/my texts/notes.txt", "notes.txt"),
        ("/data/notes/*.txt", "*.txt"),
        ("~/models/bert", "bert"),
        ("../bert", "bert"),
        ("C:\\Users\\ada\\bert", "bert"),
        ("file:///home/ada/bert", "bert"),
        ("/home/ada/bert/", "bert"),
        ("hf_" + "a" * 30, "..."),
        ("no file '/home/ada/my texts/x.txt', nor /srv/ada/y.txt.", "no file 'x.txt', nor y.txt."),
        ("OSError: /srv/ada/x: no space; tried hf_" + "a" * 30, "OSError: x: no space; tried ..."),
    ],
)
def test_paths_are_shortened_to_their_last_parts_and_tokens_left_out(text: str, shown: str) -> None:
    assert without_leaks(text) == shown
    assert "ada" not in shown
    assert not PATHS.search(shown)
    assert not TOKENS.search(shown)


@pytest.mark.parametrize(
    "text",
    [
        "roberta-base",
        "nyu-mll/glue",
        "notes/*.txt",
        "loss and/or accuracy",
        "see https://example.org/a/b",
        "1/2 of 3 / 4",
        "attention.self.query",
        "",
    ],
)
def test_names_relative_paths_and_addresses_stay(text: str) -> None:
    assert without_leaks(text) == text
