"""`fill-mask` with targets, a restricted vocabulary, files, and the base beside a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import peft_mlm
from peft_mlm.console import probability_text
from tests.adapters import save_random_adapter
from tests.commands.conftest import Answer, train
from tests.tiny import LETTERS

TEXTS = ["ABC<mask>EF", "A<mask>C<mask>", "<mask>"]


def test_targets_and_a_restricted_vocabulary_by_list_or_by_file(
    trained_run: Path, command: Callable[..., Answer], tmp_path: Path
) -> None:
    expected = peft_mlm.fill_mask(str(trained_run), TEXTS, targets=["C", "T"], only=["A", "B", "C"], top_k=2)
    (tmp_path / "words.txt").write_text("A\nB\n\n C\n")
    for words in (["A,B,C"], ["A,B", "--only", "C"], [tmp_path / "words.txt"]):
        record = command("fill-mask", trained_run, *TEXTS, "--targets", "C,T", "--only", *words, "--top_k", 2, "--json")
        assert record.record["results"] == expected
    everything = peft_mlm.fill_mask(str(trained_run), TEXTS, top_k=25)
    for result, whole in zip(expected, everything, strict=True):
        for mask, all_of_it in zip(result["masks"], whole["masks"], strict=True):
            tokens = [p["token"] for p in all_of_it["predictions"]]
            among = sum(p["probability"] for p in all_of_it["predictions"] if p["token"] in "ABC")
            assert [p["token"] for p in mask["predictions"]] == [t for t in tokens if t in "ABC"][:2]
            for found in [*mask["predictions"], *mask["targets"]]:
                same = all_of_it["predictions"][tokens.index(found["token"])]
                assert found["probability"] == pytest.approx(same["probability"], rel=1e-5)
                assert found["rank"] == tokens.index(found["token"]) + 1
                if found["token"] != "T":
                    assert found["probability_among"] == pytest.approx(same["probability"] / among, rel=1e-5)


def test_without_them_results_have_the_keys_they_always_had(trained_run: Path) -> None:
    (result,) = peft_mlm.fill_mask(str(trained_run), "A<mask>")
    assert set(result["masks"][0]) == {"position", "predictions"}
    assert set(result["masks"][0]["predictions"][0]) == {"token", "token_id", "probability"}


def test_the_table_shows_targets_ranks_and_both_probabilities(
    trained_run: Path, command: Callable[..., Answer]
) -> None:
    words = [trained_run, "A<mask>C", "--targets", "T", "--top_k", 1]
    (result,) = peft_mlm.fill_mask(str(trained_run), "A<mask>C", targets=["T"], top_k=1)
    (target,) = result["masks"][0]["targets"]
    lines = [line.split() for line in command("fill-mask", *words).out.splitlines()]
    assert ["token", "probability", "rank"] in lines
    assert ["target", "T", probability_text(target["probability"]), str(target["rank"])] in lines
    restricted = command("fill-mask", *words, "--only", "A,B").out
    assert "of these" in restricted
    assert ["target", "T", probability_text(target["probability"]), "-", str(target["rank"])] in map(
        str.split, restricted.splitlines()
    )


@pytest.mark.parametrize(
    ("name", "content", "flags"),
    [
        ("texts.txt", "\n\n".join(TEXTS) + "\n", []),
        ("texts.csv", "number,note\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS)), []),
        ("texts.jsonl", "".join(json.dumps({"a": text, "b": "x"}) + "\n" for text in TEXTS), ["--text_column", "a"]),
    ],
)
def test_texts_come_from_files(
    name: str, content: str, flags: list[str], trained_run: Path, command: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    record = command("fill-mask", trained_run, "--file", tmp_path / name, *flags, "--json").record
    assert record["results"] == peft_mlm.fill_mask(str(trained_run), TEXTS)


def test_the_base_stands_beside_a_run_an_adapter_or_a_merged_model_as_it_answers_alone(
    trained_run: Path, base_folder: Path, command: Callable[..., Answer], tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained_run / "adapter", tmp_path / "adapter")
    alone = peft_mlm.fill_mask(str(trained_run), TEXTS)
    base = peft_mlm.fill_mask(str(base_folder), TEXTS)
    assert alone != base
    for given, flags in ((trained_run, []), (adapter, ["--base", base_folder, "--any_base"])):
        record = command("fill-mask", given, *TEXTS, "--with_base", *flags, "--json").record
        assert record == {"model": str(given), "results": alone, "base": base}
    shown = command("fill-mask", trained_run, TEXTS[0], "--with_base", "--targets", "B").out
    assert "base" in shown
    assert "adapted" in shown
    assert "rank" in shown


def test_the_base_stands_beside_a_run_that_trained_the_whole_model(
    full_run: Path, base_folder: Path, command: Callable[..., Answer]
) -> None:
    record = command("fill-mask", full_run, *TEXTS, "--with_base", "--json").record
    assert record["results"] == peft_mlm.fill_mask(str(full_run), TEXTS)
    assert record["base"] == peft_mlm.fill_mask(str(base_folder), TEXTS)
    assert record["base"] != record["results"]


def test_a_base_without_a_head_of_its_own_is_not_asked(
    encoder: Path, text_file: Path, held_out: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    run = train(encoder, text_file, held_out, tmp_path / "run", max_steps=2, eval_steps=2)
    alone = peft_mlm.fill_mask(str(run), TEXTS)
    answer = command("fill-mask", run, *TEXTS, "--with_base", "--json")
    assert answer.record == {"model": str(run), "results": alone, "base": None}
    assert "no masked LM head of its own" in answer.err
    answer = command("fill-mask", encoder, *TEXTS, "--adapter", f"mine={run}", "--json")
    assert answer.record == {"model": str(encoder), "results": None, "adapters": {"mine": alone}}
    shown = command("fill-mask", encoder, TEXTS[0], "--adapter", f"mine={run}").out
    assert "base" not in shown


def test_an_adapter_that_changes_the_bases_biases_stands_beside_its_base(
    base_folder: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "biased", 3, bias="all")
    record = command("fill-mask", adapter, *TEXTS, "--with_base", "--json").record
    assert record["results"] == peft_mlm.fill_mask(str(adapter), TEXTS)
    assert record["base"] == peft_mlm.fill_mask(str(base_folder), TEXTS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "A<mask>", "--targets", "AB"], "targets: not one token within a word: 'AB' is A + B"),
        (["RUN", "A<mask>", "--only", "A,z"], "only: not one token within a word: 'z' is unknown"),
        (["RUN", "A<mask>", "--targets", ""], "targets: an empty token is given"),
        (["RUN", "A<mask>", "--targets", "A,,B"], "targets: an empty token is given"),
        (["RUN", "A<mask>", "--only", "no_such_file.txt"], "no such file"),
        (["RUN", "A<mask>", "--max_tokens_per_batch", 0], "max_tokens_per_batch is 0"),
        (["RUN", "A<mask>", "--file", "texts.txt"], "not both"),
        (["RUN", "--file", "no_such_file.txt"], "There is no file no_such_file.txt"),
        (["RUN", "--file", "texts.xyz"], "texts.xyz"),
        (["RUN", "A<mask>", "--text_column", "a"], "names a column of --file"),
        (["RUN", "A<mask>", "--with_base", "--use_base"], "--use_base does not go with --with_base"),
        (["RUN", "A<mask>", "--with_base", "--load_in_4bit"], "--load_in_4bit does not go with --with_base"),
        (["BASE", "A<mask>", "--with_base"], "Leave --with_base out"),
        (["BASE", "A<mask>", "--with_base", "--adapter", "RUN"], "--with_base does not go with --adapter"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_mistake_is_one_message(
    words: list[object], said: str, trained_run: Path, base_folder: Path, command: Callable[..., Answer]
) -> None:
    names = {"RUN": trained_run, "BASE": base_folder}
    assert said in command("fill-mask", *(names.get(str(word), word) for word in words)).fault


def test_every_letter_is_a_target(trained_run: Path) -> None:
    (result,) = peft_mlm.fill_mask(str(trained_run), "AB<mask>", targets=list(LETTERS), top_k=25)
    ranked = {p["token"]: place for place, p in enumerate(result["masks"][0]["predictions"], 1)}
    assert {t["target"]: t["rank"] for t in result["masks"][0]["targets"]} == {
        letter: ranked[letter] for letter in LETTERS
    }
