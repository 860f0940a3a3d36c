from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, AutoTokenizer

import peft_mlm
from tests.commands.conftest import Answer, train
from tests.tiny import LETTERS, letter_tokenizer, tiny_model

TOKENS = 25
HELD = 62  # positions of the tiny model


def plain_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval().double()(input_ids=torch.tensor([ids])).logits[0].softmax(-1))


def adapted_model(run: Path, base: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), str(run / "adapter"))


def letters_to_ids(text: str) -> list[int]:
    """What the letter tokenizer does, by hand; `?` is the mask."""
    return [0, *(4 if letter == "?" else 5 + LETTERS.index(letter) for letter in text), 2]


def test_one_mask_gets_the_most_probable_tokens_of_a_plain_softmax(trained_run: Path, base_folder: Path) -> None:
    (result,) = peft_mlm.fill_mask(str(trained_run), "ABC<mask>EF")
    assert set(result) == {"text", "masks", "filled"}
    assert result["text"] == "ABC<mask>EF"
    (mask,) = result["masks"]
    assert mask["position"] == 4
    probabilities = plain_probabilities(adapted_model(trained_run, base_folder), letters_to_ids("ABC?EF"))[4]
    best = probabilities.sort(descending=True)
    assert [p["token_id"] for p in mask["predictions"]] == best.indices[:5].tolist()
    assert [p["probability"] for p in mask["predictions"]] == pytest.approx(best.values[:5].tolist(), rel=1e-5)
    for prediction in mask["predictions"]:
        assert prediction["token"] == letter_tokenizer().convert_ids_to_tokens(prediction["token_id"])


def test_several_masks_are_predicted_together_with_all_of_them_in_place(trained_run: Path, base_folder: Path) -> None:
    (result,) = peft_mlm.fill_mask(str(trained_run), "<mask>BC<mask><mask>F", top_k=3)
    probabilities = plain_probabilities(adapted_model(trained_run, base_folder), letters_to_ids("?BC??F"))
    assert [mask["position"] for mask in result["masks"]] == [1, 4, 5]
    for mask in result["masks"]:
        assert [p["token_id"] for p in mask["predictions"]] == probabilities[mask["position"]].topk(3).indices.tolist()
    one, two, three = (mask["predictions"][0]["token"] for mask in result["masks"])
    assert result["filled"].replace(" ", "") == f"{one}BC{two}{three}F"


def test_texts_are_answered_one_by_one_in_their_order(trained_run: Path) -> None:
    texts = ["A<mask>", "ABCDEFGH<mask>", "<mask>", "A<mask>"]
    together = peft_mlm.fill_mask(str(trained_run), texts)
    assert [result["text"] for result in together] == texts
    for result, text in zip(together, texts, strict=True):  # sums may be in another order in another batch
        (alone,) = peft_mlm.fill_mask(str(trained_run), text)
        assert result["filled"] == alone["filled"]
        for mask, expected in zip(result["masks"], alone["masks"], strict=True):
            assert mask["position"] == expected["position"]
            for prediction, single in zip(mask["predictions"], expected["predictions"], strict=True):
                assert prediction == {**single, "probability": pytest.approx(single["probability"], rel=1e-6)}


def test_top_k_gives_as_many_as_asked_and_at_most_the_vocabulary(trained_run: Path) -> None:
    for asked, given in ((1, 1), (TOKENS, TOKENS), (1000, TOKENS)):
        (result,) = peft_mlm.fill_mask(str(trained_run), "AB<mask>", top_k=asked)
        assert len(result["masks"][0]["predictions"]) == given
    probabilities = [p["probability"] for p in result["masks"][0]["predictions"]]
    assert sum(probabilities) == pytest.approx(1, rel=1e-5)
    assert probabilities == sorted(probabilities, reverse=True)


def test_the_base_and_another_base_can_be_asked(trained_run: Path, base_folder: Path, other_base: Path) -> None:
    def probability(**options: Any) -> float:
        (result,) = peft_mlm.fill_mask(str(trained_run), "ABC<mask>", top_k=TOKENS, **options)
        return next(float(p["probability"]) for p in result["masks"][0]["predictions"] if p["token"] == "D")

    ids, d = letters_to_ids("ABC?"), 5 + LETTERS.index("D")
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    assert probability(use_base=True) == pytest.approx(plain_probabilities(base, ids)[4, d].item(), rel=1e-5)
    other = plain_probabilities(adapted_model(trained_run, other_base), ids)[4, d].item()
    assert probability(base=str(other_base), any_base=True) == pytest.approx(other, rel=1e-5)
    other = plain_probabilities(AutoModelForMaskedLM.from_pretrained(other_base), ids)[4, d].item()
    assert probability(base=str(other_base), use_base=True) == pytest.approx(other, rel=1e-5)


def test_both_spellings_of_the_mask_are_read_whatever_the_tokenizer_calls_it(base_folder: Path, tmp_path: Path) -> None:
    tiny_model("roberta").save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.glob("token*.json"):
        file.write_text(file.read_text().replace("<mask>", "[MASK]"))
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "[MASK]"
    results = [
        peft_mlm.fill_mask(str(folder), text)[0]["masks"]
        for folder in (base_folder, tmp_path)
        for text in ("AB[MASK]D<mask>", "AB<mask>D<mask>", "AB[MASK]D[MASK]")
    ]
    assert [mask["position"] for mask in results[0]] == [3, 5]
    assert all(masks == results[0] for masks in results)


@pytest.mark.parametrize(
    "text", ["<mask></s>", "<s>A<mask>", "A<pad><mask>B", "<unk>z<mask>", "A</s></s>B<mask>", "<mask>"]
)
def test_special_tokens_and_unknown_letters_in_a_text_are_what_the_tokenizer_makes_of_them(
    text: str, trained_run: Path, base_folder: Path
) -> None:
    ids = AutoTokenizer.from_pretrained(base_folder)(text)["input_ids"]
    (result,) = peft_mlm.fill_mask(str(trained_run), text)
    (mask,) = result["masks"]
    assert mask["position"] == ids.index(4)
    best = plain_probabilities(adapted_model(trained_run, base_folder), ids)[mask["position"]].topk(5)
    assert [p["token_id"] for p in mask["predictions"]] == best.indices.tolist()
    assert [p["probability"] for p in mask["predictions"]] == pytest.approx(best.values.tolist(), rel=1e-5)


def test_a_text_may_fill_every_position_and_no_more(trained_run: Path, command: Callable[..., Answer]) -> None:
    longest = "A" * (HELD - 3) + "<mask>"
    (result,) = peft_mlm.fill_mask(str(trained_run), longest)
    assert result["masks"][0]["position"] == HELD - 2
    fault = command("fill-mask", trained_run, "A" + longest).fault
    assert f"{HELD + 1} tokens" in fault
    assert f"holds {HELD}" in fault


def test_texts_come_from_the_command_line_or_from_standard_input(
    trained_run: Path, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["A<mask>C", "CB<mask>"]
    record = command("fill-mask", trained_run, *texts, "--json").record
    assert set(record) == {"model", "results"}
    assert record["model"] == str(trained_run)
    assert record["results"] == peft_mlm.fill_mask(str(trained_run), texts)
    assert command("fill-mask", "--top_k", 5, trained_run, texts[0], "--json", texts[1]).record == record
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{texts[0]}\n\n   \n{texts[1]}\r\n"))
    assert command("fill-mask", trained_run, "--json").record == record
    assert command("fill-mask", trained_run, "--json", "--", *texts).record == record


def test_the_table_shows_tokens_probabilities_and_the_filled_text(
    trained_run: Path, command: Callable[..., Answer]
) -> None:
    (result,) = peft_mlm.fill_mask(str(trained_run), "A<mask>C<mask>", top_k=2)
    answer = command("fill-mask", trained_run, "A<mask>C<mask>", "--top_k", 2)
    assert (answer.code, answer.err) == (0, "")
    for mask in result["masks"]:
        for prediction in mask["predictions"]:
            assert f"{prediction['probability']:.4f}" in answer.out
    assert "mask 2" in answer.out
    assert answer.out.splitlines()[-1] == result["filled"]


def test_only_the_first_process_of_a_launcher_speaks(
    trained_run: Path, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, spoken in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        answer = command("fill-mask", trained_run, "A<mask>", "--json")
        assert (answer.code, bool(answer.out)) == (0, spoken)


def test_a_checkpoint_of_a_run_that_saved_no_adapter_yet_can_be_asked(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    run = train(base_folder, text_file, held_out, tmp_path / "run", max_steps=2, eval_steps=2)
    expected = peft_mlm.fill_mask(str(run), "A<mask>")
    for file in (run / "adapter").iterdir():
        file.unlink()
    (run / "adapter").rmdir()
    assert "has saved neither adapter nor model yet" in command("fill-mask", run, "A<mask>").fault
    assert peft_mlm.fill_mask(str(run / "checkpoints" / "checkpoint-2"), "A<mask>") == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: model"),
        (["RUN", "ABC"], "There is no mask in 'ABC'. Write <mask>"),
        (["RUN", "A<mask>", "ABC"], "There is no mask in 'ABC'"),
        (["RUN", ""], "There is no mask in ''"),
        (["RUN", "A<mask>", "--top_k", 0], "top_k is 0"),
        (["RUN", "A<mask>", "--top_k", -1], "top_k is -1"),
        (["RUN", "A<mask>", "--top_k", "five"], "'five'"),
        (["RUN", "A<mask>", "--topk", 3], "nearest: --top_k"),
        (["RUN", "A<mask>", "--top_k=3", "--bas", "x"], "nearest: --base"),
        (["RUN", "A<mask>", "--base"], "--base"),
        (["BASE", "A<mask>", "--use_base"], "Leave --use_base out"),
        (["BASE", "A<mask>", "--base", "BASE"], "Leave --base out"),
        (["/no/such/folder", "A<mask>"], "no folder"),
        (["nobody/nothing", "A<mask>"], "nobody/nothing"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_mistake_is_one_message(
    words: list[object], said: str, trained_run: Path, base_folder: Path, command: Callable[..., Answer]
) -> None:
    names = {"RUN": trained_run, "BASE": base_folder}
    assert said in command("fill-mask", *(names.get(str(word), word) for word in words)).fault


def test_no_text_at_all_is_one_message(
    trained_run: Path, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    assert "There is no text" in command("fill-mask", trained_run).fault
