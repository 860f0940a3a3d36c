"""`peft-mlm compare`: base, adapter and merged model on the same masked tokens."""

from __future__ import annotations

import csv
import doctest
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

import peft_mlm
from peft_mlm import comparison_tables, console
from peft_mlm.collator import from_tokenizer
from peft_mlm.commands.demo import ASSETS, HUMAN, SHIPPED
from peft_mlm.console import interval_text
from peft_mlm.errors import ArgumentsError
from tests.commands.conftest import Answer, train
from tests.tiny import letter_tokenizer, save_base, save_texts

FIGURES = (
    "loss", "loss_standard_error", "perplexity", "accuracy", "accuracy_standard_error", "top5_accuracy",
    "masked_tokens",
)  # fmt: skip


def figures(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in FIGURES}


def models_of(record: dict[str, Any], data_set: int = 0) -> list[dict[str, Any]]:
    models = record["data_sets"][data_set]["models"]
    assert isinstance(models, list)
    return models


@pytest.fixture(scope="module")
def merged(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    peft_mlm.merge(str(trained_run), folder)
    return folder


@pytest.fixture(scope="module")
def mouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sapiens after a few steps on mouse sequences."""
    arguments = {**{name: str(path) for name, path in SHIPPED.items()}, "rows": "line", "use_lora": True}
    folder = tmp_path_factory.mktemp("sapiens") / "mouse"
    arguments |= {"max_steps": 30, "learning_rate": 1e-2, "eval_strategy": "no", "save_strategy": "no"}
    return peft_mlm.train({**arguments, "max_eval_samples": 20, "output_dir": folder}).run_folder


def test_an_adapter_alone_is_compared_with_its_base_on_the_runs_own_masks(trained_run: Path) -> None:
    summary = json.loads((trained_run / "summary.json").read_text())
    record = peft_mlm.compare([str(trained_run)])
    base, adapted = models_of(record)
    assert (base["model"], base["part"], base["against_reference"]) == (f"{trained_run}:base", "base", None)
    assert (adapted["model"], adapted["part"]) == (str(trained_run), "adapted")
    assert figures(base) == pytest.approx(summary["base"], rel=1e-6)
    assert figures(adapted) == pytest.approx(summary["adapted"], rel=1e-6)
    for name in ("loss", "accuracy"):
        assert adapted["against_reference"][name] == pytest.approx(summary["change"][name], abs=1e-6)
    change = adapted["against_reference"]["loss"]
    assert change["difference"] == pytest.approx(adapted["loss"] - base["loss"], rel=1e-9)
    assert change["low"] < change["difference"] < change["high"] < 0
    assert adapted["against_reference"]["win_rate"]["clusters"] > 0.8
    (one,) = record["data_sets"]
    assert (one["rows"], one["cluster"], one["mask_draws"]) == (60, "row", 1)


def test_a_model_against_itself_differs_by_exactly_nothing(trained_run: Path) -> None:
    record = peft_mlm.compare([str(trained_run), str(trained_run)], flags=["--rows", "chunked"])
    first, second = models_of(record)
    assert figures(first) == figures(second)
    nothing = {"difference": 0.0, "low": 0.0, "high": 0.0, "level": 0.95}
    against = second["against_reference"]
    assert (against["loss"], against["accuracy"]) == (nothing, nothing)
    assert against["win_rate"] == {"clusters": 0.5, "masked_tokens": 0.5}
    assert against["tokens"] == {"gained": [], "lost": []}


def test_a_merged_model_is_its_adapter(trained_run: Path, merged: Path) -> None:
    record = peft_mlm.compare([str(trained_run), str(merged), f"{merged}:4bit"])
    _, plain, quantised = models_of(record)
    against = plain["against_reference"]
    assert abs(against["loss"]["difference"]) < 1e-5
    assert against["accuracy"]["difference"] == 0
    assert against["win_rate"]["clusters"] == pytest.approx(0.5, abs=0.1)
    assert (plain["bits"], quantised["bits"]) == (None, 4)
    assert abs(quantised["against_reference"]["loss"]["difference"]) > 1e-4


def test_it_gives_the_same_twice_and_the_same_figures_at_any_batch_size(trained_run: Path) -> None:
    """Sums of another batch are rounded otherwise; what is shown is the same."""
    records = [
        peft_mlm.compare([str(trained_run)], flags=["--per_device_eval_batch_size", str(size)])
        for size in (7, 7, 1, 64)
    ]
    assert len({comparison_tables.markdown_text(record) for record in records}) == 1
    first = models_of(records[0])[1]
    for record in records[1:]:
        again = models_of(record)[1]
        assert figures(again) == pytest.approx(figures(first), rel=1e-6)
        for name in ("difference", "low", "high"):
            given = again["against_reference"]["loss"][name]
            assert given == pytest.approx(first["against_reference"]["loss"][name], abs=1e-6)
        assert again["against_reference"]["win_rate"] == first["against_reference"]["win_rate"]
        assert again["accuracy"] == first["accuracy"]


def test_forgetting_is_seen_data_set_by_data_set(mouse: Path) -> None:
    files = {"mouse": str(SHIPPED["validation_file"]), "human": str(HUMAN)}
    record = peft_mlm.compare(
        [str(ASSETS / "sapiens_vh"), str(mouse)], eval_files=files, flags=["--max_eval_samples", "80"]
    )
    assert [one["name"] for one in record["data_sets"]] == ["mouse", "human"]
    on_mouse, on_human = (models_of(record, place)[1]["against_reference"] for place in (0, 1))
    assert on_mouse["loss"]["high"] < 0 < on_human["loss"]["low"]
    assert on_mouse["win_rate"]["clusters"] > 0.9
    assert on_human["win_rate"]["clusters"] < 0.1
    lost = on_human["tokens"]["lost"]
    assert [token["difference"] for token in lost] == sorted((token["difference"] for token in lost), reverse=True)
    assert all(token["count"] >= 5 and token["token"].isupper() for token in lost)


def test_several_draws_of_masks_are_scored_together_and_rows_stay_the_clusters(
    base_folder: Path, held_out: Path
) -> None:
    flags = ["--validation_file", str(held_out), "--rows", "line", "--eval_mask_draws", "3"]
    given = peft_mlm.evaluate(str(base_folder), flags=flags)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForMaskedLM.from_pretrained(base_folder).double().eval()
    masks, total, rows = from_tokenizer(tokenizer, seed=0, fixed=True), 0.0, []
    for text in held_out.read_text().splitlines():
        row = [0.0, 0]
        for draw in range(3):
            batch = masks.drawn(draw)([{"input_ids": tokenizer(text)["input_ids"]}])
            log_p = model(input_ids=batch["input_ids"]).logits[0].log_softmax(-1)
            for place, label in enumerate(batch["labels"][0].tolist()):
                if label != -100:
                    row[0] -= float(log_p[place, label])
                    row[1] += 1
        rows.append(row)
    total, count = sum(row[0] for row in rows), sum(row[1] for row in rows)
    assert given["masked_tokens"] == count
    assert given["loss"] == pytest.approx(total / count, rel=1e-6)
    squares = sum((y - total / count * x) ** 2 for y, x in rows)
    assert given["loss_standard_error"] == pytest.approx(math.sqrt(60 / 59 * squares) / count, rel=1e-5)
    record = peft_mlm.compare([str(base_folder), str(base_folder)], flags=flags)
    assert models_of(record)[0]["loss"] == pytest.approx(given["loss"], rel=1e-6)
    assert record["data_sets"][0]["clusters"] <= 60


def test_a_runs_last_figures_are_of_all_draws_and_those_on_the_way_of_the_first(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run = train(base_folder, text_file, held_out, tmp_path / "run", max_steps=2, eval_steps=2, eval_mask_draws=2)
    summary = json.loads((run / "summary.json").read_text())
    assert figures(peft_mlm.evaluate(str(run))) == pytest.approx(summary["adapted"], rel=1e-6)
    assert figures(peft_mlm.evaluate(str(run), use_base=True)) == pytest.approx(summary["base"], rel=1e-6)
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (log,) = [log for log in logs if "eval_loss" in log]
    first = peft_mlm.evaluate(str(run), flags=["--eval_mask_draws", "1"])["loss"]
    assert log["eval_loss"] == pytest.approx(first, rel=1e-6)
    assert log["eval_loss"] != pytest.approx(summary["adapted"]["loss"], rel=1e-4)


def test_rows_of_one_text_are_one_cluster(base_folder: Path, tmp_path: Path) -> None:
    save_texts(tmp_path / "long.txt", 9, shortest=150, longest=200)
    for rows in ("chunked", "packed"):
        flags = ["--validation_file", str(tmp_path / "long.txt"), "--rows", rows, "--max_seq_length", "20"]
        (one,) = peft_mlm.compare([str(base_folder)] * 2, flags=flags)["data_sets"]
        assert one["cluster"] == "text"
        assert one["clusters"] == 9
        assert one["data"]["tokens"] > 9 * 150


def test_the_table_names_every_model_and_files_hold_the_same_figures(
    trained_run: Path, held_out: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    words = ["compare", trained_run, "--eval_file", f"letters={held_out}", "--bootstrap", 200]
    record = command(*words, "--output_file", tmp_path / "a.json", "--json").record
    assert json.loads((tmp_path / "a.json").read_text()) == {k: v for k, v in record.items() if k != "output_file"}
    answer = command(*words, "--output_file", tmp_path / "a.csv")
    assert answer.err == ""
    base, adapted = models_of(record)
    change = interval_text(**adapted["against_reference"]["loss"])
    assert "95 %" in change
    for shown in ("letters: ", f"{base['perplexity']:.4g}", f"{adapted['perplexity']:.4g}", change):
        assert shown in answer.out
    assert max(len(line) for line in answer.out.splitlines() if not line.startswith("written to ")) <= 80
    lines = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [line["data_set"] for line in lines] == ["letters"] * 2
    for line, model in zip(lines, models_of(record), strict=True):
        assert float(line["loss"]) == model["loss"]
    assert float(lines[1]["loss_difference_low"]) == models_of(record)[1]["against_reference"]["loss"]["low"]
    command(*words, "--output_file", tmp_path / "a.md")
    assert "| --- | ---: |" in (tmp_path / "a.md").read_text()
    before = (tmp_path / "a.md").read_text()
    assert "not overwritten" in command(*words, "--output_file", tmp_path / "a.md").fault
    assert (tmp_path / "a.md").read_text() == before


def test_other_tokenizers_and_other_rows_are_refused(
    trained_run: Path,
    base_folder: Path,
    text_file: Path,
    held_out: Path,
    tmp_path: Path,
    command: Callable[..., Answer],
) -> None:
    other = save_base(tmp_path / "other", vocab_size=26)
    letter_tokenizer(extra=["[odd]"]).save_pretrained(other)
    said = command("compare", base_folder, other, "--eval_file", held_out).fault
    assert "another tokenizer" in said
    assert "size" in said
    longer = save_base(tmp_path / "longer", max_position_embeddings=40)
    said = command("compare", base_folder, longer, "--eval_file", held_out).fault
    assert "--max_seq_length 38" in said


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the models"),
        (["BASE"], "name another one"),
        (["RUN:base"], "name another one"),
        (["BASE", "BASE"], "On which text?"),
        (["RUN", "RUN:5bit"], "4bit"),
        (["RUN:4bit", "RUN"], "merge the adapter first"),
        (["RUN", "RUN", "--load_in_4bit", "true"], "MODEL:4bit"),
        (["RUN", "--bootstrap", "3", "--level", "95"], "level is 95"),
        (["RUN", "--eval_file", "nowhere.txt"], "nowhere.txt"),
        (["RUN", "--eval_file", "a=HELD", "--eval_file", "a=HELD"], "named 'a'"),
        (["RUN", "--eval_file", "a="], "names no file"),
        (["RUN", "--output_file", "x.html"], ".json, .csv, .md"),
        (["RUN", "--output_file", "none/x.csv"], "no folder none"),
        (["RUN", "--lora_r", "4"], "--lora_r"),
        (["RUN", "--no_such_thing", "4"], "no_such_thing"),
        (["/no/such/folder", "RUN"], "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_message(
    words: list[str],
    said: str,
    trained_run: Path,
    base_folder: Path,
    held_out: Path,
    tmp_path: Path,
    command: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for short, path in (("RUN", trained_run), ("BASE", base_folder), ("HELD", held_out)):
        words = [word.replace(short, str(path)) for word in words]
    answer = command("compare", *words)
    assert answer.code == 2, answer.out
    assert said in answer.err


def test_examples_in_the_documentation_are_right() -> None:
    for module in (comparison_tables, console):
        result = doctest.testmod(module)
        assert result.failed == 0
        assert result.attempted >= 1


def test_faults_of_numbers_are_told_together(trained_run: Path) -> None:
    with pytest.raises(ArgumentsError) as caught:
        peft_mlm.compare([str(trained_run)], bootstrap=0, level=1.0, top_tokens=-1, least_count=0)
    assert len(caught.value.faults) == 4
