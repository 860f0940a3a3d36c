"""What the playground shows, as HTML: tables of predictions, and a text coloured by what an adapter changed.

Everything that comes from a user or a vocabulary is escaped. Colours have meaning of their own: blue is more probable
than with the base, orange less, a frame is another most probable token. They are light enough over a white and over a
dark page that the text on them stays readable, and each is said in words or numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from peft_mlm.console import probability_text

BASE = "base"
# Change of a log probability (nats) that gets the full colour: a factor of 20.
FULL_CHANGE = 3.0
STRONGEST = 0.55
CSS = """
.play table { border-collapse: collapse; width: auto; margin: 0.3rem 0 0.9rem; border: 0;
  color: var(--body-text-color); }
.play thead, .play tr { border: 0; background: none; }
.play th, .play td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; vertical-align: top; border: 0;
  border-bottom: 1px solid var(--border-color-primary); white-space: nowrap; background: none; }
.play th { font-weight: 600; white-space: normal; }
.play .number { text-align: right; font-variant-numeric: tabular-nums; }
.play .wrapped { white-space: normal; overflow-wrap: anywhere; }
.play .wide { overflow-x: auto; max-width: 100%; }
.play h3 { margin: 1rem 0 0.2rem; font-size: 1.05rem; color: var(--body-text-color); }
.play p { margin: 0.3rem 0; color: var(--body-text-color); }
.play .quiet { opacity: 0.75; font-size: 0.92em; }
.play .text { line-height: 2.1; overflow-wrap: anywhere; margin: 0.2rem 0 0.8rem; }
.play .text span { border-radius: 3px; padding: 0.14rem 0.12rem; }
.play .text .other, .play code.other { outline: 2px solid var(--body-text-color); outline-offset: -1px;
  border-radius: 3px; }
.play code { background: none; border: 0; padding: 0.08rem 0.3rem; margin-left: -0.3rem; font-size: 0.95em;
  color: var(--body-text-color); }
.play code.other { margin-left: 0; }
.play .bar { display: block; height: 3px; margin-top: 2px; border-radius: 2px; background: rgb(59, 130, 246); }
.play .probability { opacity: 0.8; font-variant-numeric: tabular-nums; padding-left: 0.2rem; }
.play .best { display: block; font-size: 0.88em; }
.play details summary { cursor: pointer; color: var(--body-text-color); padding: 0.2rem 0; }
.play .fault { border-left: 4px solid rgb(234, 88, 12); padding: 0.3rem 0.8rem; }
"""


def side_name(name: str | None) -> str:
    """Give the heading of a model's column: its name, or "base"."""
    return BASE if name is None else name


def fault(message: str) -> str:
    """Show a message in place of a result.

    Args:
        message: Plain text.

    Returns:
        HTML.
    """
    return f'<div class="play"><p class="fault" role="alert">{escape(message)}</p></div>'


def masks_html(found: Mapping[str | None, dict[str, Any]]) -> str:
    """Show what models predict at the masks of a text, side by side.

    Args:
        found: By name of the model (None for the base, which comes first) what `Predictor.predict` gives for the text.

    Returns:
        HTML: a table for each mask, and the text as each model fills it.
    """
    first = next(iter(found.values()))
    parts = []
    for number, _ in enumerate(first["masks"]):
        each = {name: result["masks"][number]["predictions"] for name, result in found.items()}
        best = [predictions[0]["token_id"] for predictions in each.values()]
        told = _told([name for name, one in zip(each, best, strict=True) if one != best[0]], len(each))
        parts.append(f"<h3>Mask {number + 1}</h3>{told}{_predictions(each)}")
    filled = [[_name(name), _code(result["filled"])] for name, result in found.items()]
    parts.append("<h3>Filled with the most probable tokens</h3>" + _table(["", "text"], filled, wrap=True))
    if len(first["masks"]) > 1:
        parts.append(
            '<p class="quiet">Each mask is predicted with all masks in place, independently of the others.</p>'
        )
    return _page(parts)


def tokens_html(record: Mapping[str, Any]) -> str:
    """Show what models make of each token of a text, masked in turn.

    Args:
        record: From `each_token.each_token`.

    Returns:
        HTML: pseudo-perplexities, the text coloured for each adapter, the tokens that changed, and all tokens.
    """
    names = [side["name"] for side in record["sides"]]
    tokens = dict(enumerate(record["tokens"], start=1))
    totals = [
        [_name(side["name"]), f"{side['pseudo_perplexity']:.4g}", f"{side['log_likelihood']:.2f}"]
        for side in record["sides"]
    ]
    header = ["", "pseudo-perplexity", "pseudo-log-likelihood"]
    parts = ["<h3>Each token masked in turn</h3>", _table(header, totals, numbers=True)]
    parts.append(
        f'<p class="quiet">{_count(len(tokens), "token")} scored'
        + (f"; {_count(record['unknown'], 'unknown one')} left out" if record["unknown"] else "")
        + ". Lower pseudo-perplexity: the model finds the text more probable.</p>"
    )
    compared = [place for place in range(1, len(names)) if names[0] is None]
    for place in compared:
        parts.append(f"<h3>{escape(side_name(names[place]))} against the base</h3>{_coloured(record, place)}")
    if compared:
        parts.append(
            '<p class="quiet">Blue: more probable than with the base. Orange: less. The stronger, the more (full at a '
            "factor of 20). Framed: another most probable token than the base's.</p>"
        )
        rows = {place: token for place, token in tokens.items() if _differ(token)}
        parts.append(f"<h3>Tokens that changed: {len(rows)} of {len(tokens)}</h3>")
        parts.append(_tokens(names, rows) if rows else "<p>All models would write the same token everywhere.</p>")
    shown = " open" if not compared else ""
    parts.append(f"<details{shown}><summary>All tokens</summary>{_tokens(names, tokens)}</details>")
    return _page(parts)


def colour(change: float) -> str:
    """Choose the background for a change of a log probability.

    Args:
        change: Of the right token, in nats; positive where it became more probable.

    Returns:
        A CSS colour: blue for more, orange for less, see-through for no change.
    """
    strength = STRONGEST * min(1.0, abs(change) / FULL_CHANGE)
    red, green, blue = (59, 130, 246) if change > 0 else (234, 120, 12)
    return f"rgba({red}, {green}, {blue}, {strength:.2f})"


def _coloured(record: Mapping[str, Any], place: int) -> str:
    parts, end = [], 0
    for token in record["tokens"]:
        base, view = token["views"][0], token["views"][place]
        change = _log(view["probability"]) - _log(base["probability"])
        if token["start"] is None:
            gap, word = " ", token["token"]
        else:
            gap, word = record["text"][end : token["start"]], record["text"][token["start"] : token["end"]]
            end = max(end, token["end"])
        figures = f"{probability_text(base['probability'])} → {probability_text(view['probability'])}"
        title = f"{figures}; most probable: {base['best']} → {view['best']}"
        other = ' class="other"' if view["best_id"] != base["best_id"] else ""
        parts.append(
            f'{escape(gap)}<span{other} style="background: {colour(change)}" title="{escape(title)}">'
            f"{escape(word)}</span>"
        )
    tail = "" if end == 0 else record["text"][end:]
    return f'<p class="text">{"".join(parts)}{escape(tail)}</p>'


def _tokens(names: Sequence[str | None], tokens: Mapping[int, dict[str, Any]]) -> str:
    """A row for each token: its place in the text, its probability with each model, and what that would write."""
    rows = []
    for place, token in tokens.items():
        base = token["views"][0]["best_id"]
        views = []
        for view in token["views"]:
            best = _code(view["best"], view["best_probability"], other=view["best_id"] != base)
            views.append(f'{probability_text(view["probability"])}<span class="best">{best}</span>')
        rows.append([str(place), _code(token["token"]), *views])
    told = '<p class="quiet">The probability of the token; below it what the model would write, and how probable.</p>'
    return told + _table(["", "token", *(side_name(name) for name in names)], rows)


def _predictions(each: Mapping[str | None, Sequence[dict[str, Any]]]) -> str:
    rows = []
    for place, guesses in enumerate(zip(*each.values(), strict=True)):
        cells = [
            _code(
                guess["token"],
                guess["probability"],
                other=place == 0 and guess["token_id"] != guesses[0]["token_id"],
                bar=True,
            )
            for guess in guesses
        ]
        rows.append([str(place + 1), *cells])
    return _table(["", *(side_name(name) for name in each)], rows)


def _told(others: Sequence[str | None], sides: int) -> str:
    if sides == 1:
        return ""
    if not others:
        return "<p>The most probable token is the same.</p>"
    would = "would write another token than" if len(others) == 1 else "would write other tokens than"
    return f"<p>{escape(', '.join(side_name(name) for name in others))} {would} the base.</p>"


def _differ(token: Mapping[str, Any]) -> bool:
    return len({view["best_id"] for view in token["views"]}) > 1


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-45))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _name(name: str | None) -> str:
    return escape(side_name(name))


def _code(token: str, probability: float | None = None, *, other: bool = False, bar: bool = False) -> str:
    framed = ' class="other"' if other else ""
    figure = "" if probability is None else f' <span class="probability">{probability_text(probability)}</span>'
    drawn = f'<span class="bar" style="width: calc(2px + {probability or 0:.4f} * 6rem)"></span>' if bar else ""
    return f"<code{framed}>{escape(token)}</code>{figure}{drawn}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False, wrap: bool = False) -> str:
    """Make a table that scrolls within itself where the page is narrow; cells are HTML, the header is text."""
    kind = ' class="number"' if numbers else ' class="wrapped"' if wrap else ""
    head = "".join(f'<th scope="col"{kind if place else ""}>{escape(name)}</th>' for place, name in enumerate(header))
    body = []
    for row in rows:
        cells = [f"<td{kind if place else ''}>{cell}</td>" for place, cell in enumerate(row)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _page(parts: Sequence[str]) -> str:
    return f'<div class="play">{"".join(parts)}</div>'
