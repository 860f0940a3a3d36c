"""The playground's HTML."""

from __future__ import annotations

import re
from typing import Any

from peft_mlm.console import probability_text
from peft_mlm.playground_tables import FULL_CHANGE, STRONGEST, colour, fault, masks_html, tokens_html

EVIL = "<script>alert(1)</script>"


def guesses(*tokens: str, first: float = 0.5) -> dict[str, Any]:
    predictions = [
        {"token": token, "token_id": sum(map(ord, token)), "probability": first / (place + 1)}
        for place, token in enumerate(tokens)
    ]
    return {"text": "a <mask>", "masks": [{"position": 1, "predictions": predictions}], "filled": f"a {tokens[0]}"}


def view(probability: float, best: str, best_probability: float = 0.9) -> dict[str, Any]:
    best_id = sum(map(ord, best))
    return {
        "probability": probability,
        "rank": 1,
        "best": best,
        "best_id": best_id,
        "best_probability": best_probability,
    }


def token(text: str, start: int | None, *views: dict[str, Any]) -> dict[str, Any]:
    end = None if start is None else start + len(text)
    return {"token": text, "token_id": 7, "start": start, "end": end, "views": list(views)}


def record(text: str, tokens: list[dict[str, Any]], *names: str | None, unknown: int = 0) -> dict[str, Any]:
    sides = [{"name": name, "log_likelihood": -12.5, "pseudo_perplexity": 2.71828} for name in names]
    return {"text": text, "sides": sides, "tokens": tokens, "unknown": unknown}


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[re.sub(r"<[^>]*>", " ", cell).split() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_predictions_stand_side_by_side_and_a_change_is_framed_and_said() -> None:
    html = masks_html(
        {None: guesses("pain", "fever"), "notes": guesses("fever", "pain"), "other": guesses("pain", "ache")}
    )
    assert cells(html)[:3] == [
        [[], ["base"], ["notes"], ["other"]],
        [["1"], ["pain", "0.5000"], ["fever", "0.5000"], ["pain", "0.5000"]],
        [["2"], ["fever", "0.2500"], ["pain", "0.2500"], ["ache", "0.2500"]],
    ]
    assert re.findall(r'<code class="other">(\w+)</code>', html) == ["fever"]
    assert "notes would write another token than the base." in html
    assert "all masks in place" not in html


def test_where_nothing_changes_that_is_said_and_a_model_alone_is_compared_with_nothing() -> None:
    assert "The most probable token is the same." in masks_html({None: guesses("pain"), "notes": guesses("pain")})
    alone = masks_html({"model": guesses("pain")})
    assert "same" not in alone
    assert 'class="other"' not in alone


def test_a_text_is_coloured_by_the_change_and_framed_where_another_token_would_stand() -> None:
    tokens = [
        token("A", 0, view(0.2, "A"), view(0.6, "A")),
        token("BC", 2, view(0.9, "BC"), view(0.01, "X")),
        token("D", 4, view(0.5, "D"), view(0.5, "D")),
    ]
    html = tokens_html(record("A BCD!", tokens, None, "notes"))
    (text,) = re.findall(r'<p class="text">(.*?)</p>', html)
    assert re.sub(r"<[^>]*>", "", text) == "A BCD!"
    spans = re.findall(r"<span([^>]*)>(\w+)</span>", text)
    assert [word for _, word in spans] == ["A", "BC", "D"]
    assert ["other" in attributes for attributes, _ in spans] == [False, True, False]
    assert "rgba(59, 130, 246, 0.20)" in spans[0][0]
    assert f"rgba(234, 120, 12, {STRONGEST})" in spans[1][0]
    assert ", 0.00)" in spans[2][0]
    assert "Tokens that changed: 1 of 3" in html
    changed, everything = re.findall(r"<table>(?:(?!</table>).)*>token<.*?</table>", html)
    assert cells(changed)[1:] == [[["2"], ["BC"], ["0.9000", "BC", "0.9000"], ["0.0100", "X", "0.9000"]]]
    assert [row[0] for row in cells(everything)[1:]] == [["1"], ["2"], ["3"]]
    assert [["base"], ["2.718"], ["-12.50"]] in cells(html)


def test_a_model_without_base_shows_all_tokens_and_colours_none() -> None:
    html = tokens_html(record("A", [token("A", 0, view(0.2, "B"))], "model", unknown=2))
    assert "<details open>" in html
    assert 'class="text"' not in html
    assert "1 token scored; 2 unknown ones left out" in html


def test_a_text_whose_places_are_unknown_is_written_token_by_token() -> None:
    html = tokens_html(record("x", [token(t, None, view(0.5, t), view(0.5, t)) for t in ("A", "##B")], None, "a"))
    (text,) = re.findall(r'<p class="text">(.*?)</p>', html)
    assert re.sub(r"<[^>]*>", "", text).split() == ["A", "##B"]
    assert "All models would write the same token everywhere." in html


def test_a_colour_grows_with_the_change_up_to_its_full_strength() -> None:
    strengths = [float(colour(change).rpartition(",")[2].strip(" )")) for change in (0, 0.1, 1, FULL_CHANGE, 100)]
    assert strengths == sorted(strengths)
    assert (strengths[0], strengths[-2], strengths[-1]) == (0, STRONGEST, STRONGEST)
    assert colour(1) != colour(-1)


def test_nothing_of_a_text_a_vocabulary_or_a_name_becomes_html() -> None:
    evil = guesses(EVIL, "b")
    shown = [
        masks_html({None: evil, EVIL: guesses("x", EVIL)}),
        tokens_html(
            record(EVIL + EVIL, [token(EVIL, 0, view(0.1, EVIL), view(0.2, EVIL + '"'))], None, EVIL),
        ),
        tokens_html(record("x", [token(EVIL, None, view(0.1, EVIL), view(0.2, "y"))], None, EVIL)),
        fault(EVIL),
    ]
    for html in shown:
        assert "<script" not in html
        assert "&lt;script" in html
    assert re.findall(r'title="[^"]*"[^ >]', shown[1]) == []


def test_a_probability_of_zero_has_a_colour_and_a_small_one_is_told_from_it() -> None:
    assert [probability_text(p) for p in (0.0, 4.2e-6, 6e-5, 0.03125, 1.0)] == [
        "0.0000",
        "4.2e-06",
        "0.0001",
        "0.0312",
        "1.0000",
    ]
    html = tokens_html(record("A", [token("A", 0, view(0.0, "B"), view(1.0, "A"))], None, "a"))
    assert f", {STRONGEST})" in html
