"""What a report says, and that nothing in a run's files can make more of it than text."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from peft_mlm.plots import COLOURS
from peft_mlm.report_content import Tile, half_interval, interval, seconds_text, with_interval
from peft_mlm.report_facts import memory_facts, text_facts
from peft_mlm.report_figures import curve_figures, length_figures
from peft_mlm.report_page import ASSETS, build_report, is_untouched_report, render_html, render_markdown
from peft_mlm.report_results import differences, lead, results, tiles
from peft_mlm.run_record import read_run, read_runs
from tests.run_folders import LENGTHS, figures, save_run

HOSTILE = "<script>alert(1)</script>\"' | `x` [a](javascript:b) {{ 7 * 7 }} &lt;"
# Elements that load, run or send something.
ACTIVE = {"script", "iframe", "object", "embed", "form", "input", "button", "img", "image", "audio", "video", "base"}


class Page(HTMLParser):
    """Collects tables, elements and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[list[str]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.add(tag)
        self.attributes += attrs
        self.inside.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("th", "td"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Note a text."""
        if "style" not in self.inside:
            self.texts.append(data)
        if {"th", "td"} & set(self.inside):
            self.cells[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells behind a name, of the first row that has it."""
        return next(cells[1:] for cells in self.cells if cells[0] == name)


def luminance(colour: str) -> float:
    """Relative luminance, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    """Colours by name: light, dark, print."""
    style = (ASSETS / "report.css").read_text()
    blocks = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    return [{**blocks[0], **block} for block in blocks]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_texts_and_curves_stand_out_from_their_ground(theme: int) -> None:
    colours = themes()[theme]
    assert len(themes()) == 3
    for ground in ("ground", "card"):
        for name in ("ink", "ink-soft", "accent", *(f"series-{n}" for n in range(COLOURS))):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def test_the_figures_are_those_of_the_summary(tmp_path: Path) -> None:
    run = read_run(save_run(tmp_path / "notes"))
    page = Page(render_html([run]))
    base, adapted = run["summary"]["base"], run["summary"]["adapted"]
    assert page.row("Loss, nats per masked token")[:2] == [f"{base['loss']:.4f}", f"{adapted['loss']:.4f}"]
    assert page.row("Perplexity")[:2] == [f"{base['perplexity']:#.4g}", f"{adapted['perplexity']:#.4g}"]
    assert page.row("Masked accuracy")[:2] == [f"{base['accuracy']:.4f}", f"{adapted['accuracy']:.4f}"]
    assert page.row("Masked accuracy")[2] == f"{adapted['accuracy'] - base['accuracy']:+.4f}"
    assert page.row("Perplexity")[2] == f"× {adapted['perplexity'] / base['perplexity']:.4g}"
    shown = " ".join(page.texts)
    for text in ("notes", "7.389 → 3.320", "4.32 kB", "61.2 s", "org/base", "letters.txt", "2026-03-04 05:06 UTC"):
        assert text in shown, text
    for word in ("nan", "None", "null", "interval"):
        assert not re.search(rf"\b{word}\b", shown), word


def test_intervals_are_of_the_normal_distribution() -> None:
    scores = figures(1.5, loss_standard_error=0.1, accuracy_standard_error=0.4)
    z = 1.959963984540054  # the 97.5th percentile of the normal distribution
    assert half_interval(0.1) == pytest.approx(0.1 * z, rel=1e-12)
    assert interval(scores, "loss") == f"{1.5 - 0.1 * z:.4f} to {1.5 + 0.1 * z:.4f}"
    assert interval(scores, "perplexity") == f"{math.exp(1.5 - 0.1 * z):#.4g} to {math.exp(1.5 + 0.1 * z):#.4g}"
    assert interval(scores, "accuracy") == "0.0000 to 1.0000"  # a share stays one
    assert with_interval(figures(1.5), "loss") == "1.5000"
    assert with_interval({}, "loss") == ""


@pytest.mark.parametrize(
    ("low", "high", "said"), [(-0.9, -0.7, "got better"), (0.1, 0.2, "got worse"), (-0.9, 0.1, "is not shown")]
)
def test_the_interval_of_the_paired_change_is_told_and_what_it_shows(
    low: float, high: float, said: str, tmp_path: Path
) -> None:
    change = {"loss": {"difference": -0.8, "low": low, "high": high, "level": 0.9}}
    run = read_run(save_run(tmp_path / "notes", more={"change": change}))
    section = results([run])
    assert section is not None
    assert "90 % interval" in section.texts[0]
    assert said in section.texts[0]
    page = Page(render_html([run]))
    minus = [f"{value:+.4f}".replace("-", "−") for value in (-0.8, low, high)]
    assert page.row("Loss, nats per masked token")[2] == f"{minus[0]} ({minus[1]} to {minus[2]})"
    assert page.row("Perplexity")[2] == f"× {math.exp(-0.8):.4g} ({math.exp(low):.4g} to {math.exp(high):.4g})"


def test_a_run_that_is_not_finished_tells_how_far_it_is(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    more = {"status": "running", "base": None, "adapted": None}
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("steps", "seconds", "saved_bytes", "saved_to", "train_seconds", "epochs"):
        del summary[name]
    (folder / "summary.json").write_text(json.dumps(summary | more))
    run = read_run(folder)
    assert "not finished" in lead([run])[0]
    assert "last record is of step 8" in lead([run])[0]
    assert [tile.label for tile in tiles(run)] == ["Perplexity", "Masked accuracy", "Trained parameters"]
    assert tiles(run)[0] == Tile("Perplexity", f"{math.exp(1.2):#.4g}", "at step 8")
    page = Page(render_html([run]))
    assert page.row("Loss, nats per masked token") == ["1.2000"]
    (folder / "metrics.jsonl").unlink()
    nothing = render_html([read_run(folder)])
    assert "it has logged nothing yet" in nothing
    assert "<figure>" in nothing  # the lengths of the texts are known


def test_a_run_without_held_out_text_has_a_report(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes", more={"base": None, "adapted": None})
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval_" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = read_runs([folder, save_run(tmp_path / "other")])
    assert results(runs[:1]) is None
    assert [tile.label for tile in tiles(runs[0])] == ["Model", "Time"]
    assert [len(figure.curves) for figure in curve_figures(runs[:1])] == [1, 1, 1]
    assert "Before and after" not in render_html(runs[:1])
    section = results(runs)
    assert section is not None
    assert section.texts == ()  # there is nothing to compare


def test_files_of_any_content_have_a_report(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    odd = {"status": [1], "method": {}, "base": [], "adapted": {"loss": "x"}, "steps": None, "seconds": {},
           "memory": [], "change": {"loss": []}, "trainable_parameters": 10**400, "error": "\ud800"}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(odd))
    (folder / "environment.json").write_text(json.dumps({"versions": [], "device": [], "started": 5, "commit": {}}))
    odd_split = {"source": [], "text_lengths": {"edges": ["a"], "counts": 3}, "texts": [], "unknown_share": "x"}
    (folder / "dataset.json").write_text(json.dumps({"train": odd_split, "validation": 7}))
    (folder / "arguments.yaml").write_text("seed: 2020-01-01\nrows: [1, {a: .nan}]\n")
    run = read_run(folder)
    for text in (render_html([run]), render_markdown([run]), render_html([run, {**run, "name": "b"}])):
        text.encode()
    json.dumps(run)


def test_a_run_that_failed_tells_why(tmp_path: Path) -> None:
    run = read_run(save_run(tmp_path / "notes", more={"status": "failed", "error": "DeviceMemoryError: too small"}))
    assert "DeviceMemoryError: too small" in render_html([run])
    assert "DeviceMemoryError: too small" in render_markdown([run])


@pytest.fixture
def hostile(tmp_path: Path) -> list[dict[str, Any]]:
    """Two runs whose names, texts, versions and layers are made to harm."""
    runs = [read_run(save_run(tmp_path / name, run_name=HOSTILE)) for name in ("one", "two")]
    for run in runs:
        run |= {
            "name": HOSTILE,
            "folder": HOSTILE,
            "command": f"peft-mlm train {HOSTILE}\n```\n</code>",
            "notices": [HOSTILE],
        }
        run["summary"] |= {"status": HOSTILE, "error": HOSTILE, "memory": {"device": HOSTILE, "parts": {HOSTILE: 1}}}
        run["environment"] = {"python": HOSTILE, "device": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        run["base"] = {"name": HOSTILE, "revision": HOSTILE, "architecture": HOSTILE, "recipe": {HOSTILE: HOSTILE}}
        run["adapter"] = dict.fromkeys(("title", "method", "rank", "alpha", "scaling", "new_tokens"), HOSTILE)
        run["adapter"] |= {"targets": {HOSTILE: 1}, "target_layers": 1, "trained_modules": [HOSTILE]}
        run["adapter"] |= {"layers": 1, "largest_changes": [{"name": HOSTILE, "delta_norm": 1.0}]}
        run["arguments"] = {HOSTILE: HOSTILE, "seed": run["folder"]}
        run["given"] = {HOSTILE: HOSTILE}
        run["data"] = {HOSTILE: {**run["data"]["train"], "source": {"files": [HOSTILE]}, "origin": HOSTILE}}
    runs[1]["name"] += "2"
    return runs


@pytest.mark.parametrize("several", [False, True])
def test_what_files_say_stays_text_in_html(several: bool, hostile: list[dict[str, Any]]) -> None:
    written = render_html(hostile if several else hostile[:1])
    page = Page(written)
    assert not page.elements & ACTIVE
    assert HOSTILE in "".join(page.texts)
    assert "{{ 7 * 7 }}" in html.unescape(written)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    links = [value or "" for name, value in page.attributes if name == "href"]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "http" not in written.replace("http-equiv", "")


@pytest.mark.parametrize("several", [False, True])
def test_what_files_say_stays_text_in_markdown(several: bool, hostile: list[dict[str, Any]]) -> None:
    text = render_markdown(hostile if several else hostile[:1])
    without_codes = re.sub(r"^(````+)sh\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" in text
    assert "```\n</code>" in text
    assert set(re.findall(r"<[^>]*>", without_codes.partition("-->")[2])) == {
        "<details>", "</details>", "<summary>", "</summary>",
    }  # fmt: skip
    assert not re.search(r"(?<!\\)\[a(?<!\\)\]", without_codes)
    for table in re.findall(r"(?:^\|.*\|$\n?)+", without_codes, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_the_same_runs_give_the_same_report(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / name, losses=losses) for name, losses in (("a", {4: 1.5}), ("b", {4: 1.4, 8: 1.3}))]
    for chosen in (folders[:1], folders):
        for render in (render_html, render_markdown):
            assert render(read_runs(chosen)) == render(read_runs(chosen))


def test_a_changed_report_is_found_out(tmp_path: Path) -> None:
    runs = [read_run(save_run(tmp_path / "notes"))]
    for text in (render_html(runs), render_markdown(runs)):
        assert is_untouched_report(text)
        assert not is_untouched_report(text + "\n")
        assert not is_untouched_report(text.replace("notes", "my notes", 1))
    assert not is_untouched_report("")
    assert not is_untouched_report("<!-- peft-mlm-report " + "0" * 64 + " -->")


def test_runs_side_by_side_show_the_arguments_that_differ_and_no_others(tmp_path: Path) -> None:
    lora = save_run(tmp_path / "lora", use_lora=True, lora_r=4)
    slower = save_run(tmp_path / "slower", use_lora=True, lora_r=4, learning_rate=1e-5)
    runs = read_runs([lora, slower, save_run(tmp_path / "full")])
    (shown,) = differences(runs).tables
    rows = {row[0]: row[1:] for row in shown.rows}
    assert rows["lora_r"] == ("4", "4", "not set")
    assert rows["use_lora"] == ("true", "true", "not set")
    assert rows["learning_rate"] == ("0.0003", "1e-05", "5e-05")
    # Nobody set it, and where it is set it is the same.
    assert "lora_dropout" not in rows
    assert not {"seed", "output_dir", "train_file", "mlm_probability"} & set(rows)
    assert "All arguments are the same" in differences([runs[0], runs[0]]).texts[0]


def test_figures_are_compared_only_over_the_same_masked_tokens(tmp_path: Path) -> None:
    one, other = (save_run(tmp_path / name, losses={4: loss}) for name, loss in (("one", 1.5), ("other", 1.25)))
    section = results(read_runs([one, other]))
    assert section is not None
    assert "same held-out text with the same masks" in section.texts[0]
    assert "other (1.2500 nats" in section.texts[1]
    rows = {row[0]: row for row in section.tables[0].rows}
    assert rows["base"][1:3] == (f"{math.exp(2):#.4g}", f"{math.exp(-2):.4f}")
    assert rows["one"][1:4] == (f"{math.exp(1.5):#.4g}", f"{math.exp(-1.5):.4f}", "−0.5000")
    for changed in ({"eval_mask_seed": 5}, {"mlm_probability": 0.3}, {"rows": "line"}):
        different = save_run(tmp_path / next(iter(changed)), **changed)
        section = results(read_runs([one, different]))
        assert section is not None
        assert "cannot be compared" in section.texts[0]
        assert len(section.texts) == 1


def test_curves_hold_the_logged_values_and_start_at_the_base(tmp_path: Path) -> None:
    run = read_run(save_run(tmp_path / "notes"))
    shown = {figure.name: figure for figure in curve_figures([run])}
    assert list(shown) == ["loss", "accuracy", "learning-rate", "grad-norm"]
    training, held_out = shown["loss"].curves
    assert (list(training.steps), list(training.values)) == ([2, 4, 6, 8], [2.3, 2.1, 1.9, 1.7])
    assert (list(held_out.steps), list(held_out.values)) == ([0, 4, 8], [2.0, 1.6, 1.2])
    assert shown["loss"].levels == ((None, 2.0),)
    assert "base 2.0000" in shown["loss"].words
    assert "at step 8" in shown["loss"].words


def test_curves_of_bases_that_differ_have_a_level_each(tmp_path: Path) -> None:
    runs = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", more={"base": figures(3.0)})])
    assert curve_figures(runs)[0].levels == ((0, 2.0), (1, 3.0))
    assert curve_figures([runs[0], {**runs[0], "name": "c"}])[0].levels == ((None, 2.0),)


def test_lengths_are_told_once_for_each_text(tmp_path: Path) -> None:
    runs = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b")])
    one, other = length_figures(runs)
    assert one.bars[0].edges == LENGTHS["edges"]
    assert one.bars[0].shares == [0.25, 0.625, 0.125]
    assert one.limit == 16
    assert (one.title, other.title) == ("Lengths of the texts, train", "Lengths of the texts, validation")
    section = text_facts(runs)
    assert section is not None
    table = next(table for table in section.tables if table.folded)
    assert table.rows == (("0 to 9", "10", "25.0%"), ("10 to 19", "25", "62.5%"), ("20 to 30", "5", "12.5%"))


def test_the_speed_is_the_median_of_the_logged_ones(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "notes")
    speeds = (900.0, 5000.0, 1000.0)
    lines = [json.dumps({"step": n, "tokens_per_second": speed}) for n, speed in enumerate(speeds)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert Page(render_html([read_run(folder)])).row("tokens per second, median") == ["1,000"]


def test_what_was_lost_of_the_text_is_told(tmp_path: Path) -> None:
    page = Page(render_html([read_run(save_run(tmp_path / "notes"))]))
    assert page.row("tokens lost") == ["10, where 2 texts are longer than a row"] * 2
    assert page.row("texts") == ["40", "40"]


def test_memory_stands_beside_its_prediction(tmp_path: Path) -> None:
    memory = {
        "device": "cpu",
        "predicted_bytes": 1_100_000_000,
        "measured_bytes": 1_000_000_000,
        "parts": {"weights": 5_000},
    }
    run = read_run(save_run(tmp_path / "notes", more={"memory": memory}))
    section = memory_facts([run])
    assert section is not None
    rows = dict(section.tables[0].rows)
    assert rows["predicted before the run"] == "1.1 GB"
    assert rows["measured, largest"] == "1 GB"
    assert rows["predicted / measured"] == "1.100"
    assert rows["predicted: weights"] == "5 kB"
    assert memory_facts([read_run(save_run(tmp_path / "older"))]) is None
    assert "Memory" not in [section.title for section in build_report([read_run(tmp_path / "older")]).sections]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (96.9, "96.9 s"), (119, "119 s"), (125, "2 min 5 s"), (7199.7, "2 h 0 min")],
)  # fmt: skip
def test_times_are_told_as_people_do(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
