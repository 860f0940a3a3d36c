"""The proof of a merge: its figures are those of a plain loop, and a model that is merged wrong is never left."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import peft_mlm
from peft_mlm import merging, streaming_merge
from peft_mlm.collator import from_tokenizer
from peft_mlm.commands.demo import SHIPPED
from peft_mlm.errors import DataError, MergeError
from peft_mlm.merge_proof import probe_rows
from tests.adapters import save_random_adapter
from tests.commands.conftest import Answer, train
from tests.tiny import save_texts

Damage = Callable[[dict[str, torch.Tensor], Mapping[str, torch.Tensor]], None]


def adapted(base: Path, adapter: Path) -> Any:
    """Base + adapter by plain PEFT."""
    return PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), str(adapter)).eval()


def plain(folder: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def measured(model: Any, texts: list[str], folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Loss and accuracy at the masked tokens, one text after the other; and the best token at every place."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mask = from_tokenizer(tokenizer, fixed=True, seed=0)
    loss, hits, count, best = 0.0, 0, 0, []
    for text in texts:
        batch = mask([{"input_ids": tokenizer(text)["input_ids"]}])
        (logits,) = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        best.append(logits.argmax(-1))
        for place, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                loss -= float(logits[place].log_softmax(-1)[label])
                hits += int(logits[place].argmax()) == label
                count += 1
    figures = {"loss": loss / count, "perplexity": math.exp(loss / count), "accuracy": hits / count}
    return {**figures, "masked_tokens": count}, torch.cat(best)


def texts_of(file: Path) -> list[str]:
    return file.read_text().splitlines()


def check_against_a_plain_loop(told: dict[str, Any], base: Path, adapter: Path, merged: Path, texts: list[str]) -> None:
    one, best = measured(adapted(base, adapter), texts, base)
    other, best_merged = measured(plain(merged), texts, base)
    for part, figures in (("adapter", one), ("merged", other)):
        assert {name: told[part][name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert told["positions"] == len(best)
    assert told["top1_agreement"] == pytest.approx(float((best == best_merged).double().mean()), abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_figures_on_the_run_s_text_are_those_of_a_plain_loop(
    dtype: str, trained_run: Path, base_folder: Path, held_out: Path, tmp_path: Path
) -> None:
    told = peft_mlm.merge(str(trained_run), tmp_path / "merged", dtype=dtype)["text"]
    assert told["rows"] == 60
    assert told["fingerprint"] == json.loads((trained_run / "dataset.json").read_text())["validation"]["fingerprint"]
    check_against_a_plain_loop(told, base_folder, trained_run / "adapter", tmp_path / "merged", texts_of(held_out))
    assert 0 < told["max_abs_logit_diff"] < told["tolerance"]
    if dtype == "bfloat16":
        assert told["merged"]["loss"] != told["adapter"]["loss"]


def test_packed_rows_are_read_and_masked_text_by_text(
    base_folder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run = train(base_folder, text_file, held_out, tmp_path / "run", rows="packed", max_steps=10, eval_steps=10)
    told = peft_mlm.merge(str(run), tmp_path / "merged")["text"]
    assert told["rows"] < 45  # of 60 texts
    check_against_a_plain_loop(told, base_folder, run / "adapter", tmp_path / "merged", texts_of(held_out))
    summary = json.loads((run / "summary.json").read_text())
    assert told["adapter"] == pytest.approx(summary["adapted"], rel=1e-5)


def test_text_that_is_given_is_used_for_an_adapter_that_has_none_and_in_place_of_a_run_s(
    trained_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    text = save_texts(tmp_path / "other.txt", 9, seed=3)
    moved = Path(shutil.copytree(trained_run / "adapter", tmp_path / "adapter"))
    flags = ["--validation_file", str(text)]
    for number, place in enumerate((moved, trained_run)):
        merged = tmp_path / str(number)
        told = peft_mlm.merge(str(place), merged, base=str(base_folder), flags=[*flags, "--rows", "line"])["text"]
        assert told["rows"] == 9
        check_against_a_plain_loop(told, base_folder, moved, merged, texts_of(text))
    fewer = peft_mlm.merge(str(trained_run), tmp_path / "fewer", flags=[*flags, "--max_eval_samples", "4"])
    assert fewer["text"]["rows"] == 4
    assert peft_mlm.merge(str(moved), tmp_path / "none", base=str(base_folder))["text"] is None


def test_a_run_whose_text_is_gone_is_proved_without_but_text_that_is_asked_for_must_be_there(
    trained_run: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    arguments = yaml.safe_load((run / "arguments.yaml").read_text())
    (run / "arguments.yaml").write_text(yaml.safe_dump({**arguments, "validation_file": str(tmp_path / "gone.txt")}))
    told = peft_mlm.merge(str(run), tmp_path / "merged")
    assert told["proved"]
    assert told["text"] is None
    with pytest.raises(DataError):
        peft_mlm.merge(str(run), tmp_path / "no", flags=["--validation_file", str(tmp_path / "gone.txt")])
    words = ["merge", trained_run, "--output_dir", tmp_path / "no", "--validation_file", tmp_path / "gone.txt"]
    assert "gone.txt" in command(*words).fault
    assert not (tmp_path / "no").exists()


def test_without_a_proof_the_report_says_so(trained_run: Path, tmp_path: Path) -> None:
    told = peft_mlm.merge(str(trained_run), tmp_path / "merged", proof=False)
    assert told["proved"] is False
    assert "max_abs_logit_diff" not in told
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["proved"] is False


def without_a_layer(merged: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
    merged |= {name: base[name] for name in merged if ".layer.1." in name}


def twice_as_much(merged: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
    for name in merged:
        merged[name] = 2 * merged[name].float() - base[name]


def one_number(merged: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
    merged["roberta.embeddings.LayerNorm.weight"][3] *= 1.5


DAMAGES: dict[str, Damage] = {
    "a layer left as it was": without_a_layer,
    "twice the scaling": twice_as_much,
    "one number": one_number,
}


def damaging(way: Callable[..., Any], base: Path, damage: Damage) -> Callable[..., Any]:
    """Let a way of merging write what it writes, and then spoil a tensor of it."""

    def spoiled(*given: Any) -> Callable[[Path], Mapping[str, str]]:
        write = way(*given)

        def write_and_spoil(folder: Path) -> Mapping[str, str]:
            sums: Mapping[str, str] = write(folder)
            file = folder / "model.safetensors"
            merged = load_file(file)
            types = {name: tensor.dtype for name, tensor in merged.items()}
            damage(merged, load_file(base / "model.safetensors"))
            kept = {name: tensor.to(types[name]).contiguous() for name, tensor in merged.items()}
            save_file(kept, file, metadata={"format": "pt"})
            shutil.copytree(folder, folder.parent.parent / "seen", dirs_exist_ok=True)
            return sums

        return write_and_spoil

    return spoiled


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_is_merged_wrong_is_refused_by_how_much_and_not_left(
    dtype: str, damage: str, trained_run: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = damaging(streaming_merge.streamed_merge, base_folder, DAMAGES[damage])
    monkeypatch.setattr(streaming_merge, "streamed_merge", spoiled)
    (tmp_path / "place").mkdir()
    with pytest.raises(MergeError, match="nothing was written") as raised:
        peft_mlm.merge(str(trained_run), tmp_path / "place" / "merged", dtype=dtype)
    assert list((tmp_path / "place").iterdir()) == []
    (told,) = re.findall(r"differs from base \+ adapter by (\S+) in a logit", str(raised.value))
    one, other = adapted(base_folder, trained_run / "adapter").double(), plain(tmp_path / "seen").double()
    rows = probe_rows(other, AutoTokenizer.from_pretrained(base_folder))
    with torch.no_grad():
        off = [model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits for model in (one, other)]
    assert float(told) == pytest.approx(float((off[0] - off[1]).abs().max()), rel=0.01)


def test_another_adapter_than_the_one_that_is_proved_is_refused(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that is merged in the built model: its adapter changes once base + adapter have been looked at."""
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config="LoHaConfig", r=2)
    written = merging.built_merge

    def moved(model: Any, dtype: str) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(1.1 if ".hada_w1_a." in name else 1)
        return written(model, dtype)

    monkeypatch.setattr(merging, "built_merge", moved)
    with pytest.raises(MergeError, match=r"differs from base \+ adapter by \d"):
        peft_mlm.merge(str(adapter), tmp_path / "merged", base=str(base_folder))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_weights_so_large_that_float32_rounds_them_to_other_logits_are_merged(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, lora_alpha=8 * 3000, size=0.3)
    told = peft_mlm.merge(str(adapter), tmp_path / "merged", base=str(base_folder))
    assert told["max_abs_logit_diff"] > 1e-5 * max(1, told["max_abs_logit"])
    assert "the unit of float32" in told["tolerance_because"]
    spoiled = damaging(streaming_merge.streamed_merge, base_folder, without_a_layer)
    monkeypatch.setattr(streaming_merge, "streamed_merge", spoiled)
    with pytest.raises(MergeError, match="differs from base"):
        peft_mlm.merge(str(adapter), tmp_path / "wrong", base=str(base_folder))


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped antibody model, kept in float16, with an adapter that learns mouse antibodies; its base beside it."""
    place = tmp_path_factory.mktemp("half")
    shipped = {name: str(path) for name, path in SHIPPED.items()}
    AutoModelForMaskedLM.from_pretrained(shipped["model_name_or_path"]).half().save_pretrained(place / "base")
    AutoTokenizer.from_pretrained(shipped["model_name_or_path"]).save_pretrained(place / "base")
    given = {**shipped, "model_name_or_path": str(place / "base"), "output_dir": str(place / "run"), "use_lora": True}
    steps = {"max_steps": 40, "eval_steps": 40, "learning_rate": 3e-3, "rows": "line", "max_eval_samples": 32}
    return peft_mlm.train({**given, **steps}).run_folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_real_model_in_half_precision_passes_and_with_half_the_scaling_it_does_not(
    dtype: str, half_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = peft_mlm.merge(str(half_run), tmp_path / "merged", dtype=dtype)
    assert told["max_abs_logit_diff"] < 0.6 * told["tolerance"]
    assert told["text"]["max_abs_logit_diff"] < 0.6 * told["text"]["tolerance"]
    assert told["text"]["merged"]["perplexity"] == pytest.approx(told["text"]["adapter"]["perplexity"], rel=5e-3)

    def half(merged: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
        for name in merged:
            merged[name] = (merged[name].float() + base[name].float()) / 2

    spoiled = damaging(streaming_merge.streamed_merge, half_run.parent / "base", half)
    monkeypatch.setattr(streaming_merge, "streamed_merge", spoiled)
    with pytest.raises(MergeError, match="differs from base"):
        peft_mlm.merge(str(half_run), tmp_path / "place" / "wrong", dtype=dtype)
