"""`peft-mlm report` on real runs: it says what the run's files say, and overwrites nothing that is not its own."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from peft_mlm.leaks import PATHS, TOKENS
from peft_mlm.run_folder import RunFolder
from tests.commands.conftest import Answer
from tests.test_report_page import Page


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A finished run of our own to write into."""
    return Path(shutil.copytree(trained_run, tmp_path / "notes"))


def test_a_finished_run_is_told_with_the_figures_of_its_files(run: Path, command: Callable[..., Answer]) -> None:
    record = command("report", run, "--json").record
    assert record["files"] == [str(run / "report.html"), str(run / "report.md")]
    summary = json.loads((run / "summary.json").read_text())
    facts = json.loads((run / "dataset.json").read_text())
    page = Page((run / "report.html").read_text())
    for row, key, form in (("Loss, nats per masked token", "loss", ".4f"), ("Masked accuracy", "accuracy", ".4f")):
        for part, shown in zip(("base", "adapted"), page.row(row), strict=False):
            assert shown.startswith(f"{summary[part][key]:{form}} ("), row
    assert page.row("rank") == ["8"]
    assert page.row("trained parameters")[0].startswith(f"{summary['trainable_parameters']:,} of ")
    assert page.row("rows used") == [f"{facts[split]['rows_used']:,}" for split in ("train", "validation")]
    assert page.row("torch") == [json.loads((run / "environment.json").read_text())["versions"]["torch"]]
    (told,) = record["runs"]
    assert told["summary"]["adapted"] == summary["adapted"]
    assert [evaluation["step"] for evaluation in told["evaluations"]] == [15, 30]
    markdown = (run / "report.md").read_text()
    both = " → ".join(f"{summary[part]['accuracy']:.4f}" for part in ("base", "adapted"))
    assert f"| Masked accuracy | {both} |" in markdown


def test_every_text_was_counted_by_its_length(run: Path) -> None:
    for facts in json.loads((run / "dataset.json").read_text()).values():
        assert sum(facts["text_lengths"]["counts"]) == facts["texts"]
        assert facts["text_lengths"]["edges"][-1] > facts["longest_text"]


def test_no_path_of_this_machine_is_in_a_report(run: Path) -> None:
    peft_mlm.report(run)
    for name in ("report.html", "report.md"):
        text = (run / name).read_text()
        assert str(run.parent) not in text
        assert not PATHS.search(text)
        assert not TOKENS.search(text)
        assert "letters.txt" in text


def test_a_run_of_the_whole_model_is_told(full_run: Path, tmp_path: Path) -> None:
    peft_mlm.report(full_run, output_file=tmp_path / "full.html")
    page = Page((tmp_path / "full.html").read_text())
    assert page.row("method") == ["all parameters trained"]
    assert "Model" in page.texts
    assert not {"report.html", "report.md"} & {file.name for file in full_run.iterdir()}


def test_a_run_that_was_killed_is_told(run: Path, command: Callable[..., Answer]) -> None:
    files = RunFolder(run)
    shutil.rmtree(files.adapter)
    summary = json.loads(files.summary.read_text())
    kept = {name: summary[name] for name in ("method", "trainable_parameters", "total_parameters", "quantisation")}
    files.summary.write_text(json.dumps({"status": "running", **kept, "base": None, "adapted": None}))
    lines = files.metrics.read_text().splitlines(keepends=True)
    last = next(place for place, line in enumerate(lines) if "eval_loss" in line)
    files.metrics.write_text("".join(lines[: last + 1]) + lines[last + 1][:20])
    shown = command("report", run)
    assert shown.code == 0
    assert "not finished" in shown.out
    page = Page((run / "report.html").read_text())
    text = " ".join(page.texts)
    assert "LoRA, rank 8, alpha 16" in text
    assert "last record is of step 15" in text
    assert "last line of metrics.jsonl is cut off" in text
    (shown,) = page.row("Masked accuracy")
    assert shown.startswith(f"{json.loads(lines[last])['eval_accuracy']:.4f} (")


def test_several_runs_stand_side_by_side(
    run: Path, full_run: Path, command: Callable[..., Answer], tmp_path: Path
) -> None:
    out = tmp_path / "both.html"
    record = command("report", run, full_run, "--output_file", out, "--json").record
    assert [told["name"] for told in record["runs"]] == ["notes", "full_run"]
    page = Page(out.read_text())
    assert page.row("use_lora") == ["true", "not set"]
    assert page.row("learning_rate") == ["0.01", "0.001"]
    for told in record["runs"]:
        assert page.row(told["name"])[1].startswith(f"{told['summary']['adapted']['accuracy']:.4f} (")
    assert command("report", run, full_run).fault.startswith("Several runs belong to no one folder")


def test_our_own_report_is_renewed_and_a_changed_one_kept(run: Path, command: Callable[..., Answer]) -> None:
    peft_mlm.report(run)
    before = (run / "report.md").read_text()
    (run / "metrics.jsonl").write_text("")
    peft_mlm.report(run)
    renewed = (run / "report.md").read_text()
    assert renewed != before
    changed = renewed + "\nWhat I think of it.\n"
    (run / "report.md").write_text(changed)
    page = (run / "report.html").read_bytes()
    shutil.rmtree(run / "adapter")
    fault = command("report", run).fault
    assert "report.md is no report of peft-mlm, or was changed since it was written; it is not overwritten" in fault
    assert (run / "report.md").read_text() == changed
    assert (run / "report.html").read_bytes() == page


@pytest.mark.parametrize("name", ["README.md", "page.html"])
def test_a_file_of_the_user_is_not_overwritten(name: str, run: Path, command: Callable[..., Answer]) -> None:
    mine = run.parent / name
    mine.write_text("mine")
    assert "is not overwritten" in command("report", run, "--output_file", mine).fault
    assert mine.read_text() == "mine"


def test_a_file_that_cannot_be_written_is_said(run: Path, command: Callable[..., Answer]) -> None:
    (run.parent / "folder.html").mkdir()
    assert "is a folder" in command("report", run, "--output_file", run.parent / "folder.html").fault
    (run.parent / "file").write_text("")
    assert "cannot be written" in command("report", run, "--output_file", run.parent / "file" / "x.html").fault


@pytest.mark.usefixtures("untouched")
def test_mistakes_are_one_sentence_and_write_nothing(
    trained_run: Path, command: Callable[..., Answer], tmp_path: Path
) -> None:
    assert "is no run folder" in command("report", tmp_path).fault
    assert "is no run folder" in command("report", trained_run / "adapter").fault
    assert "is given 2 times" in command("report", trained_run, trained_run, "--output_file", tmp_path / "x.md").fault
    fault = command("report", trained_run, "--output_file", tmp_path / "report.pdf").fault
    assert "Use .html or .md" in fault
    assert "RUN" in command("report").fault.upper()


def test_a_damaged_line_is_one_sentence(run: Path, command: Callable[..., Answer]) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    assert "line 2 is no record of a step ('nonsense')" in command("report", run).fault
    assert not (run / "report.html").exists()


def test_without_matplotlib_html_is_refused_at_once_and_markdown_written(
    run: Path, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'peft-mlm[report]'" in command("report", run).fault
    assert not (run / "report.html").exists()
    assert command("report", run, "--output_file", run / "report.md").code == 0


def test_the_start_of_a_run_is_recorded(trained_run: Path) -> None:
    environment = json.loads(RunFolder(trained_run).environment.read_text())
    assert environment["started"].endswith("+00:00")
