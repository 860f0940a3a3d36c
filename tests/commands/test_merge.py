from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

import peft_mlm
from peft_mlm import checksums, merging
from peft_mlm.errors import MergeError
from tests.commands.conftest import Answer, train
from tests.tiny import perturb, save_base

KEYS = {
    "output_dir", "bytes", "proved", "max_abs_logit_diff", "tolerance", "tolerance_because",
    "max_abs_logit_diff_as_run",
    "max_abs_logit", "top1_agreement", "positions", "tied", "dtype", "compared_in", "max_abs_logit_diff_quantised",
    "text", "into", "built_because", "base", "base_revision", "base_fingerprint", "versions",
}  # fmt: skip
IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval().double()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)


def adapter_copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run / "adapter", folder))


def test_the_merged_weights_are_base_plus_scaled_product_and_the_rest_is_the_base(
    trained_run: Path, base_folder: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    before = snapshot(trained_run), snapshot(base_folder)
    record = command("merge", trained_run, "--output_dir", tmp_path / "merged", "--json").record
    assert (snapshot(trained_run), snapshot(base_folder)) == before
    base, merged, adapter = (
        weights(base_folder),
        weights(tmp_path / "merged"),
        load_file(trained_run / "adapter" / "adapter_model.safetensors"),
    )
    assert merged.keys() == base.keys()
    adapted = set()
    for name, b in adapter.items():
        if "lora_B" in name:
            layer = name.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")
            a = adapter[name.replace("lora_B", "lora_A")]
            expected = base[layer].double() + 16 / 8 * b.double() @ a.double()
            assert (merged[layer].double() - expected).abs().max() < 1e-7, layer
            assert not torch.equal(merged[layer], base[layer])
            adapted.add(layer)
    assert len(adapted) == 12
    assert all(torch.equal(merged[name], base[name]) for name in base.keys() - adapted)
    assert set(record) == KEYS
    assert record["max_abs_logit_diff"] < 1e-6
    assert record["top1_agreement"] == 1
    assert (record["tied"], record["dtype"], record["compared_in"]) == (True, "float32", "float64")
    assert record["bytes"] == sum(len(content) for content in snapshot(tmp_path / "merged").values())


def test_the_merged_folder_is_a_plain_model_with_the_logits_of_the_adapter(
    trained_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    report = peft_mlm.merge(str(trained_run), tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merge_report.json",
        "README.md", "checksums.json",
    }  # fmt: skip
    told = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert told == {name: report[name] for name in KEYS - {"output_dir", "bytes"}}
    adapted = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base_folder), str(trained_run / "adapter"))
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-6
    fill = pipeline("fill-mask", model=str(tmp_path / "merged"))
    (result,) = peft_mlm.fill_mask(str(trained_run), "ABC<mask>EF")
    answers = fill("ABC<mask>EF")
    assert [a["token_str"] for a in answers] == [p["token"] for p in result["masks"][0]["predictions"]]
    assert [a["score"] for a in answers] == pytest.approx(
        [p["probability"] for p in result["masks"][0]["predictions"]], rel=1e-5
    )
    assert peft_mlm.fill_mask(str(tmp_path / "merged"), "ABC<mask>EF")[0]["filled"] == result["filled"]


def test_run_adapter_checkpoint_and_moved_adapter_merge_to_the_same_weights(
    trained_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    moved = adapter_copy(trained_run, tmp_path / "elsewhere" / "adapter")
    places: list[tuple[Path, str | None]] = [
        (trained_run, None),
        (trained_run / "adapter", None),
        (trained_run / "checkpoints" / "checkpoint-30", None),
        (moved, str(base_folder)),
    ]
    for number, (place, base) in enumerate(places):
        peft_mlm.merge(str(place), tmp_path / str(number), base=base)
        assert same(weights(tmp_path / str(number)), weights(tmp_path / "0")), place
    peft_mlm.merge(str(trained_run / "checkpoints" / "checkpoint-15"), tmp_path / "earlier")
    assert not same(weights(tmp_path / "earlier"), weights(tmp_path / "0"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_type_is_the_float32_sum_rounded_once(
    dtype: str, trained_run: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    peft_mlm.merge(str(trained_run), tmp_path / "float32")
    record = command("merge", trained_run, "--output_dir", tmp_path / dtype, "--dtype", dtype, "--json").record
    whole, rounded = weights(tmp_path / "float32"), weights(tmp_path / dtype)
    assert same(rounded, {name: tensor.to(getattr(torch, dtype)) for name, tensor in whole.items()})
    assert record["dtype"] == dtype
    assert 1e-5 < record["max_abs_logit_diff"] < 0.05
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / dtype).dtype == getattr(torch, dtype)


def test_the_checksums_are_those_of_the_files_and_weights_are_hashed_while_they_are_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[str] = []
    read_again = checksums.sha256

    def counted(file: Path) -> str:
        later.append(file.name)
        return read_again(file)

    monkeypatch.setattr(checksums, "sha256", counted)
    peft_mlm.merge(str(trained_run), tmp_path / "merged")
    assert "config.json" in later
    assert "model.safetensors" not in later
    told = checksums.read_checksums(tmp_path / "merged")
    files = {file.name: file for file in (tmp_path / "merged").iterdir()}
    assert told == {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in told or ()}
    assert files.keys() - set(told or ()) == {"README.md", "checksums.json"}


def test_a_head_that_was_trained_is_part_of_the_merged_model(
    encoder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    run = train(encoder, text_file, held_out, tmp_path / "run", max_steps=5)
    report = peft_mlm.merge(str(run), tmp_path / "merged")
    assert report["max_abs_logit_diff"] < 1e-6
    assert report["tied"] is True
    merged, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    torch.manual_seed(1)  # the fresh head that the adapter replaces
    adapted = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(encoder), str(run / "adapter"))
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-6


def test_an_untied_base_stays_untied(text_file: Path, held_out: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "untied", tie_word_embeddings=False)
    run = train(base, text_file, held_out, tmp_path / "run", max_steps=5)
    report = peft_mlm.merge(str(run), tmp_path / "merged")
    assert report["tied"] is None
    assert report["max_abs_logit_diff"] < 1e-6
    assert weights(tmp_path / "merged").keys() == weights(base).keys()


def test_the_output_folder_may_be_new_deep_empty_or_a_link_to_an_empty_one(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    for place in (Path("new"), Path("deep") / "down", Path("empty"), Path("link")):
        peft_mlm.merge(str(trained_run), tmp_path / place)
        assert AutoTokenizer.from_pretrained(tmp_path / place).mask_token == "<mask>"
        assert AutoModelForMaskedLM.from_pretrained(tmp_path / place).dtype == torch.float32
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"new", "deep", "empty", "target", "link"}


def test_an_adapter_that_cannot_be_merged_rightly_is_refused(
    base_folder: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    # The embedding matrix is the decoder's too: merged, the change is in both, while the adapter changes one.
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["word_embeddings"]))
        perturb(adapted)
        adapted.save_pretrained(tmp_path / "tied")
    words = ["merge", tmp_path / "tied", "--base", base_folder, "--output_dir", tmp_path / "merged"]
    assert "differs from base + adapter by" in command(*words).fault
    assert [path.name for path in tmp_path.iterdir()] == ["tied"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MergeError, OSError])
def test_a_merge_that_ends_before_it_is_proved_leaves_nothing(
    error: type[BaseException], trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def fail(report: object) -> None:
        reached.append(list(tmp_path.rglob("model.safetensors")))
        raise error("stop")

    monkeypatch.setattr(merging, "_check", fail)
    with pytest.raises(error):
        peft_mlm.merge(str(trained_run), tmp_path / "deep" / "merged")
    assert [len(found) for found in reached] == [1]  # it was written, under another name, when the end came
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "merged").exists()


def test_the_table_shows_where_and_how_exact(trained_run: Path, tmp_path: Path, command: Callable[..., Answer]) -> None:
    answer = command("merge", trained_run, "--output_dir", tmp_path / "m")
    assert (answer.code, answer.err) == (0, "")
    assert "100.00% of 992 positions" in answer.out
    shown = answer.out.replace("\n", "").replace(" ", "")
    assert str(tmp_path / "m") in shown


def bad_words(case: str, run: Path, tmp_path: Path) -> list[object]:
    output = ["--output_dir", tmp_path / "merged"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").touch()
    broken = adapter_copy(run, tmp_path / "broken")
    content = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    incomplete = adapter_copy(run, tmp_path / "incomplete")
    tensors = load_file(incomplete / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), incomplete / "adapter_model.safetensors")
    poisoned = adapter_copy(run, tmp_path / "poisoned")
    save_file({k: v * float("nan") for k, v in tensors.items()}, poisoned / "adapter_model.safetensors")
    pickled = adapter_copy(run, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    nameless = adapter_copy(run, tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    lost = adapter_copy(run, tmp_path / "lost")
    (lost / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no_such_base"}))
    with_base = ["--base", "BASE", *output]
    words: dict[str, list[object]] = {
        "nothing": [],
        "no output": ["RUN"],
        "no adapter named": output,
        "two adapters": ["RUN", "RUN", *output],
        "unknown flag": ["RUN", *output, "--overwrite"],
        "abbreviated flag": ["RUN", "--output", tmp_path / "merged"],
        "unknown type": ["RUN", *output, "--dtype", "int8"],
        "full folder": ["RUN", "--output_dir", tmp_path / "full"],
        "a file": ["RUN", "--output_dir", tmp_path / "file"],
        "below a file": ["RUN", "--output_dir", tmp_path / "file" / "merged"],
        "the folder one is in": ["RUN", "--output_dir", "."],
        "a model": ["BASE", *output],
        "a whole run": ["FULL_RUN", *output],
        "no model at all": [tmp_path / "full", *output],
        "nothing there": [tmp_path / "nothing", *output],
        "half the weights": [broken, *with_base],
        "a tensor missing": [incomplete, *with_base],
        "not a number": [poisoned, *with_base],
        "a pickle": [pickled, *with_base],
        "no base named": [nameless, *output],
        "base not found": [lost, *output],
        "a base of another kind": ["RUN", "--base", "OTHER_KIND", *output],
    }
    return words[case]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nothing", "required"),
        ("no output", "required: --output_dir"),
        ("no adapter named", "required: adapter"),
        ("two adapters", "no such argument"),
        ("unknown flag", "--overwrite: there is no such argument"),
        ("abbreviated flag", "--output_dir"),
        ("unknown type", "int8"),
        ("full folder", "is not empty"),
        ("a file", "is a file"),
        ("below a file", "cannot be made"),
        ("the folder one is in", "the folder you are in"),
        ("a model", "is no adapter"),
        ("a whole run", "no run with one"),
        ("no model at all", "adapter_config.json"),
        ("nothing there", "There is no folder"),
        ("half the weights", "does not fit"),
        ("a tensor missing", "does not fit"),
        ("not a number", "cannot be merged"),
        ("a pickle", "pickle"),
        ("no base named", "--base"),
        ("base not found", "say where by --base"),
        ("a base of another kind", "does not fit"),
    ],
)
def test_a_mistake_or_a_damaged_adapter_is_one_message_and_nothing_is_written_or_lost(
    case: str,
    said: str,
    trained_run: Path,
    full_run: Path,
    base_folder: Path,
    encoder: Path,
    tmp_path: Path,
    command: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"RUN": trained_run, "FULL_RUN": full_run, "BASE": base_folder, "OTHER_KIND": encoder}
    words = [names.get(str(word), word) for word in bad_words(case, trained_run, tmp_path)]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = snapshot(tmp_path), sorted(os.walk(tmp_path))
    assert said in command("merge", *words).fault
    assert (snapshot(tmp_path), sorted(os.walk(tmp_path))) == before
