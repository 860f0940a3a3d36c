"""`peft-mlm score`: texts and mutations, from files into files, beside the base, stopped and gone on with."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

import peft_mlm
from peft_mlm.cli import main
from peft_mlm.commands.demo import ASSETS
from peft_mlm.loading import load_target, resolve_target, with_quantisation
from tests.commands.conftest import Answer
from tests.test_pseudo_likelihood import plain
from tests.tiny import letter_texts, letter_tokenizer, save_base

Command = Callable[..., Answer]
SEQUENCE = "ABCDEFGHIJ"


def adapted(run: Path, base: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), str(run / "adapter")).double().eval()


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def test_texts_of_a_run_score_as_in_a_plain_loop(trained_run: Path, base_folder: Path, command: Command) -> None:
    record = command("score", trained_run, "--text", "ABCDE", "--text", "TSR", "--token_scores", "--json").record
    tokenizer = letter_tokenizer()
    wanted = [plain(adapted(trained_run, base_folder), tokenizer, text) for text in ("ABCDE", "TSR")]
    first, second = record["results"]
    assert first["log_probabilities"] == pytest.approx(wanted[0], abs=1e-5)
    assert first["tokens"] == list("ABCDE")
    assert second["pseudo_log_likelihood"] == pytest.approx(sum(wanted[1]), abs=1e-5)
    assert second["pseudo_perplexity"] == pytest.approx(math.exp(-sum(wanted[1]) / 3), rel=1e-5)
    assert (record["part"], record["method"], record["variant"], record["rows"], record["scored_tokens"]) == (
        "adapted", "pseudo_likelihood", "original", 2, 8,
    )  # fmt: skip
    assert record["pseudo_perplexity"] == pytest.approx(math.exp(-(sum(wanted[0]) + sum(wanted[1])) / 8), rel=1e-5)


def test_the_base_beside_the_adapter_is_the_base_alone(trained_run: Path, base_folder: Path) -> None:
    both = peft_mlm.score(str(trained_run), ["ABCDE", "TSR"], with_base=True)
    base = peft_mlm.score(str(base_folder), ["ABCDE", "TSR"])
    alone = peft_mlm.score(str(trained_run), ["ABCDE", "TSR"], use_base=True)
    assert (base["part"], alone["part"], both["part"]) == ("model", "base", "adapted")
    for one, other, row in zip(base["results"], alone["results"], both["results"], strict=True):
        assert one == other
        assert row["base_pseudo_log_likelihood"] == one["pseudo_log_likelihood"]
        change = row["pseudo_log_likelihood"] - one["pseudo_log_likelihood"]
        assert row["pseudo_log_likelihood_change"] == change != 0
    assert both["base_pseudo_perplexity"] == base["pseudo_perplexity"]


def test_a_table_keeps_its_columns_and_order_and_is_correlated_with_measured_values(
    base_folder: Path, tmp_path: Path, command: Command
) -> None:
    texts = letter_texts(30, shortest=3, longest=20)
    draw = random.Random(0)
    measured: list[object] = [draw.randrange(5) for _ in texts]
    measured[3], measured[4] = "", "NA"
    table = write_csv(
        tmp_path / "in.csv",
        ["id", "text", "liked"],
        [[f"x{i}", t, m] for i, (t, m) in enumerate(zip(texts, measured, strict=True))],
    )
    words = ["score", base_folder, table, "--measured", "liked", "--output_file"]
    record = command(*words, tmp_path / "out.csv", "--json").record
    assert "results" not in record
    made = pandas.read_csv(tmp_path / "out.csv")
    assert list(made["id"]) == [f"x{i}" for i in range(30)]
    assert list(made["text"]) == texts
    plain_scores = peft_mlm.score(str(base_folder), texts, max_tokens_per_batch=1)["results"]
    assert made["pseudo_log_likelihood"].tolist() == pytest.approx(
        [row["pseudo_log_likelihood"] for row in plain_scores], abs=1e-4
    )
    values = pandas.to_numeric(pandas.Series(measured), errors="coerce")
    expected = made["pseudo_log_likelihood"].corr(values, method="spearman")
    spearman = record["spearman"]
    assert spearman["rho"] == pytest.approx(expected, abs=1e-12)
    assert (spearman["pairs"], spearman["measured"]) == (28, "liked")
    assert spearman["tied"][1] == 28
    command(*words, tmp_path / "out.jsonl", "--json")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["pseudo_log_likelihood"] for line in lines] == made["pseudo_log_likelihood"].tolist()
    assert lines[3]["liked"] == ""


def test_fasta_and_standard_input_are_read(
    base_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = tmp_path / "some.fasta"
    fasta.write_text(">one first\nABC\nDE\n>two\nTSR*\n")
    results = command("score", base_folder, fasta, "--json").record["results"]
    assert [(row["name"], row["sequence"]) for row in results] == [("one first", "ABCDE"), ("two", "TSR")]
    monkeypatch.setattr("sys.stdin", iter(["ABCDE\n", "\n", "TSR\n"]))
    read = command("score", base_folder, "--json").record["results"]
    assert [row["pseudo_log_likelihood"] for row in read] == [row["pseudo_log_likelihood"] for row in results]


def test_mutations_of_a_table_are_scored_on_a_fasta_file_with_the_base_beside(
    trained_run: Path, base_folder: Path, tmp_path: Path, command: Command
) -> None:
    fasta = tmp_path / "wild_type.fasta"
    fasta.write_text(f">it\n{SEQUENCE}\n")
    rows: list[list[object]] = [["A101C", 1.0], ["C103D:E105F", 3.0], ["J110A", 2.0], ["wt", ""]]
    table = write_csv(tmp_path / "dms.csv", ["mutant", "DMS_score"], rows)
    words = ("score", trained_run, table, "--sequence", fasta, "--offset", 100, "--measured", "DMS_score")
    record = command(*words, "--with_base", "--json").record
    assert (record["method"], record["variant"]) == ("masked_marginal", None)
    model, base = adapted(trained_run, base_folder), AutoModelForMaskedLM.from_pretrained(base_folder).double().eval()
    ids = torch.tensor([letter_tokenizer()(SEQUENCE)["input_ids"]])
    ids[0, [3, 5]] = 4
    for one, name in ((model, "masked_marginal"), (base, "base_masked_marginal")):
        with torch.no_grad():
            found = one(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        expected = float(found[3, 8] - found[3, 7] + found[5, 10] - found[5, 9])
        assert record["results"][1][name] == pytest.approx(expected, abs=1e-4)
    scores = [row["masked_marginal"] for row in record["results"]]
    assert scores[3] == 0.0
    assert record["spearman"]["rho"] == pytest.approx(
        pandas.Series(scores[:3]).corr(pandas.Series([1, 3, 2.0]), "spearman")
    )
    shown = command(*words).out
    assert "Spearman's rho with DMS_score (3 rows)" in shown
    assert "masked marginal" in shown


def test_a_quantised_base_is_scored_as_it_is_loaded(tmp_path: Path) -> None:
    base = save_base(tmp_path / "wide", "bert", hidden_size=64, intermediate_size=128)
    (found,) = peft_mlm.score(str(base), ["ABCDEFGH"], load_in_4bit=True)["results"]
    loaded = load_target(with_quantisation(resolve_target(str(base)), {"load_in_4bit": True}))
    wanted = sum(plain(loaded.model, letter_tokenizer(), "ABCDEFGH"))
    float_base = sum(plain(AutoModelForMaskedLM.from_pretrained(base).eval(), letter_tokenizer(), "ABCDEFGH"))
    assert found["pseudo_log_likelihood"] == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted - float_base) > 1e-3


def start(words: list[str]) -> int:
    """Run the command in a process of its own, which has the libraries already."""
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main(words))
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_job_that_was_killed_goes_on_and_ends_with_the_same_file(
    ending: str, base_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_mlm.scoring.CPU_TOKENS_PER_STEP", 3000)
    table = write_csv(tmp_path / "in.csv", ["text"], [[text] for text in letter_texts(60)])
    whole, killed = tmp_path / f"whole{ending}", tmp_path / f"killed{ending}"
    words = ["score", str(base_folder), str(table), "--output_file"]
    assert command(*words, whole, "--json").record["rows"] == 60
    child = start([*words, str(killed)])
    job = tmp_path / f"killed{ending}.job.json"
    while not (job.exists() and json.loads(job.read_text())["rows"] > 0):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = json.loads(job.read_text())["rows"]
    assert 0 < done < 60
    answer = command(*words, killed, "--json")
    assert f"{done} of 60 rows are scored already" in answer.err
    assert killed.read_bytes() == whole.read_bytes()
    again = command(*words, killed, "--json")
    assert "has all its results already" in again.err
    assert again.record == answer.record == {**command(*words, whole, "--json").record, "output_file": str(killed)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "AB", "--method", "masked_marginal"], "Mutations want the protein"),
        (["--mutation", "A1B"], "--mutation wants the protein"),
        (["--text", "AB", "--variant", "half"], "invalid choice: 'half'"),
        (["--sequence", SEQUENCE, "--mutation", "C1A"], "C1A (row 1): residue 1 of the sequence is A, not C."),
        (["--sequence", SEQUENCE, "--mutation", "A1C", "--mutation", "A1"], "Row 2: 'A1' is no mutation"),
        (["--sequence", "nowhere.fasta", "--mutation", "A1C"], "There is no file nowhere.fasta"),
        (["--sequence", SEQUENCE, "--mutation", "A1C", "--variant", "whole_word"], "variant whole_word is one of"),
        (["--text", "AB", "--measured", "liked"], "There is no column 'liked' of measured values; columns: text."),
        (["--text", "A" * 99], "The model holds 62 tokens, and longer are the texts 1 (101 tokens)."),
        (["--text", "AB", "--max_tokens_per_batch", "0"], "max_tokens_per_batch is 0: give 1 or more."),
        (["--text", "AB", "--with_base"], "is a model without adapter, with no base beside it."),
        (["nothing.csv"], "There is no file nothing.csv"),
        (["--text", "AB", "--output_file", "scores.xlsx"], "scores.xlsx has the ending .xlsx: give one of .csv, .tsv,"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_mistake_is_one_message_and_writes_nothing(
    words: list[str], said: str, base_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in command("score", base_folder, *words).fault


def test_a_file_of_the_users_or_of_another_job_is_kept(base_folder: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine\n")
    assert "exists already" in command("score", base_folder, "--text", "AB", "--output_file", out).fault
    assert out.read_text() == "mine\n"
    out.unlink()
    assert command("score", base_folder, "--text", "AB", "--output_file", out).code == 0
    before = out.read_bytes()
    other = command("score", base_folder, "--text", "ABC", "--output_file", out)
    assert "another job: text is another" in other.err
    other = command("score", base_folder, "--text", "AB", "--variant", "whole_word", "--output_file", out)
    assert 'variant is "original" there and "whole_word" here' in other.err
    table = write_csv(tmp_path / "in.csv", ["text", "scored_tokens"], [["AB", 2]])
    assert "has the columns scored_tokens already" in command("score", base_folder, table).fault
    assert out.read_bytes() == before


def test_what_is_left_out_is_told(base_folder: Path, command: Command) -> None:
    answer = command("score", base_folder, "--text", "", "--text", "A?", "--text", "A" * 99, "--truncate")
    assert answer.code == 0
    assert "No token to score: row 1." in answer.err
    assert "1 tokens are unknown" in answer.err
    assert "1 texts were cut off" in answer.err


def test_the_shipped_antibody_model_prefers_its_own_residues(command: Command) -> None:
    human = "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYYMHWVRQAPGQGLEWMGIINPSGGSTSYAQKFQGRVTMTRDTSTSTVYMELSSLRSEDTAVYYCAR"
    mutations = [word for m in ("C22A", "W36A", "V2I") for word in ("--mutation", m)]
    record = command("score", ASSETS / "sapiens_vh", "--sequence", human, *mutations, "--json").record
    cysteine, tryptophan, mild = (row["masked_marginal"] for row in record["results"])
    assert max(cysteine, tryptophan) < mild < 0
