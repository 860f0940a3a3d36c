"""Other methods as LoRA: held against what plain PEFT computes with the original, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import peft_mlm
from peft_mlm import derived_adapter, loading
from peft_mlm.errors import AdapterError, ArgumentsError
from tests.adapters import adapted_logits, changes_of, merged_parameters, save_random_adapter
from tests.commands.conftest import Answer
from tests.tiny import save_base

# Methods whose change of a weight has a low rank, and that rank: LoRA of it loses nothing.
EXACT: dict[str, tuple[str, dict[str, Any], int]] = {
    "loha": ("LoHaConfig", {"r": 2}, 4),
    "vera": ("VeraConfig", {"r": 6}, 6),
    "miss": ("MissConfig", {"r": 4}, 4),
    "delora": ("DeloraConfig", {"r": 3}, 3),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}, 4),
}
# Methods whose change has a full rank.
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "ia3": ("IA3Config", {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50}),
    "hira": ("HiraConfig", {"r": 2}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
}


def convert(adapter: Path, output: Path, base: Path, **options: Any) -> dict[str, Any]:
    return peft_mlm.convert(str(adapter), output, base=str(base), **options)


@pytest.mark.parametrize("method", EXACT)
def test_a_change_of_low_rank_becomes_lora_without_loss(method: str, base_folder: Path, tmp_path: Path) -> None:
    config, options, rank = EXACT[method]
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config=config, **options)
    record = convert(adapter, tmp_path / "out", base_folder)
    assert record["relative_error"] < 1e-6
    assert record["ranks"] == [rank, rank]
    original, lora = adapted_logits(base_folder, adapter), adapted_logits(base_folder, tmp_path / "out")
    assert (original - lora).abs().max() < 1e-5 * original.abs().max()
    assert record["logits"]["max_abs_logit_diff"] < 1e-5 * record["logits"]["max_abs_logit"]
    assert record["logits"]["max_abs_logit_diff_base"] > 1e-3
    config_of = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config_of["peft_type"] == "LORA"


@pytest.mark.parametrize("method", FULL)
def test_a_change_of_full_rank_is_refused_without_a_rank_and_is_the_best_of_that_rank_with_one(
    method: str, base_folder: Path, tmp_path: Path
) -> None:
    config, options = FULL[method]
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config=config, **options)
    with pytest.raises(AdapterError, match=r"full rank: without loss.* 4 loses \d+\.\d+%"):
        convert(adapter, tmp_path / "out", base_folder)
    assert not (tmp_path / "out").exists()
    record = convert(adapter, tmp_path / "out", base_folder, rank=6)
    exact, given = changes_of(base_folder, adapter), changes_of(base_folder, tmp_path / "out")
    lost = whole = 0.0
    for name, change in exact.items():
        if change.dim() == 2 and change.any():
            spectrum = torch.linalg.svdvals(change)
            assert (change - given[name]).norm() == pytest.approx(float(spectrum[6:].norm()), rel=1e-4, abs=1e-5)
            lost, whole = lost + float(spectrum[6:].square().sum()), whole + float(spectrum.square().sum())
        else:
            assert (change - given[name]).abs().max() < 1e-6, name  # biases are carried whole
    assert record["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert record["relative_error"] > 0.01
    all_of_it = convert(adapter, tmp_path / "whole", base_folder, rank=32)
    assert all_of_it["logits"]["max_abs_logit_diff"] < 1e-5 * all_of_it["logits"]["max_abs_logit"]


def test_the_conversion_is_the_one_of_peft_where_that_is_right(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config="FourierFTConfig", n_frequency=50)
    convert(adapter, tmp_path / "out", base_folder, rank=5)
    model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base_folder), str(adapter))
    _, theirs = convert_to_lora(model, rank=5)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in theirs:
        if ".lora_A." in key:
            b = key.replace("lora_A", "lora_B")
            assert (ours[b] @ ours[key] - theirs[b] @ theirs[key]).abs().max() < 1e-4
            assert ours[key].shape == theirs[key].shape


def test_a_trained_head_and_its_parts_go_over_which_peft_names_wrong(base_folder: Path, tmp_path: Path) -> None:
    options = {"r": 2, "modules_to_save": ["attention.output", "lm_head.dense"]}
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config="LoHaConfig", **options)
    record = convert(adapter, tmp_path / "out", base_folder)
    assert len(record["trained_parameters"]) == 2 * 4 + 2
    original, lora = adapted_logits(base_folder, adapter), adapted_logits(base_folder, tmp_path / "out")
    assert (original - lora).abs().max() < 1e-5 * original.abs().max()
    model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base_folder), str(adapter))
    _, theirs = convert_to_lora(model, rank=4)
    assert not any("attention.output.dense.weight" in key for key in theirs)


def test_pissa_as_plain_peft_saves_it_becomes_lora_for_the_untouched_base(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, r=2, init_lora_weights="pissa")
    record = convert(adapter, tmp_path / "out", base_folder, rank=4)  # s (B A - B0 A0)
    original, lora = adapted_logits(base_folder, adapter), adapted_logits(base_folder, tmp_path / "out")
    assert (original - lora).abs().max() < 2e-5 * original.abs().max()
    assert record["relative_error"] < 1e-5


def test_a_rank_is_lowered_from_the_files_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    options = {"r": 6, "use_rslora": True, "modules_to_save": ["lm_head.dense"]}
    adapter = save_random_adapter(base, tmp_path / "adapter", 1, **options)
    exact, before = changes_of(base, adapter), merged_parameters(base, adapter)
    base.rename(tmp_path / "gone")
    record = peft_mlm.convert(str(adapter), tmp_path / "out", rank=2)
    after = merged_parameters(tmp_path / "gone", tmp_path / "out")
    given = changes_of(tmp_path / "gone", tmp_path / "out")
    for layer, share in record["matrices"].items():
        change = exact[f"{layer}.weight"]
        spectrum = torch.linalg.svdvals(change)
        assert share == pytest.approx(float(spectrum[2:].norm() / spectrum.norm()), rel=1e-5)
        assert (change - given[f"{layer}.weight"]).norm() == pytest.approx(float(spectrum[2:].norm()), rel=1e-4)
    assert torch.equal(after["lm_head.dense.weight"], before["lm_head.dense.weight"])
    assert record["logits"] is None
    higher = peft_mlm.convert(str(adapter), tmp_path / "higher", rank=20)
    assert higher["ranks"] == [6, 6]
    assert higher["relative_error"] < 1e-12


@pytest.mark.parametrize("config", ["LNTuningConfig", "TrainableTokensConfig"])
def test_what_changes_no_matrix_is_refused_before_the_base_is_loaded(
    config: str, base_folder: Path, tmp_path: Path
) -> None:
    options = {"target_modules": ["LayerNorm"]} if config == "LNTuningConfig" else {
        "target_modules": ["word_embeddings"], "token_indices": [5],
    }  # fmt: skip
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config=config, **options)
    with pytest.raises(AdapterError, match="LoRA changes matrices"):
        peft_mlm.convert(str(adapter), tmp_path / "out", base="no/such-base")
    assert not (tmp_path / "out").exists()


def test_mistakes_end_in_one_sentence(base_folder: Path, tmp_path: Path, command: Callable[..., Answer]) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1)
    out = tmp_path / "out"
    assert "plain LoRA already" in command("convert", adapter, "--output_dir", out).fault
    assert "rank is 0" in command("convert", adapter, "--rank", "0", "--output_dir", out).fault
    assert "is not empty" in command("convert", adapter, "--rank", "2", "--output_dir", adapter).fault
    assert "no adapter" in command("convert", base_folder, "--rank", "2", "--output_dir", out).fault
    assert not out.exists()
    with pytest.raises(ArgumentsError):
        peft_mlm.convert(str(adapter), out)


def test_a_quantised_base_is_loaded_once_and_the_adapter_written_once(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1, config="MissConfig", r=4)
    (adapter / "base_recipe.json").write_text(json.dumps({"load_in_4bit": True}))
    loaded: list[Any] = []
    written: list[Path] = []
    load_base, write_parts = loading.load_base, derived_adapter.write_parts

    def counted_load(*given: Any, **options: Any) -> Any:
        loaded.append(given)
        return load_base(*given, **options)

    def counted_write(parts: Any, folder: Path) -> None:
        written.append(folder)
        write_parts(parts, folder)

    monkeypatch.setattr(loading, "load_base", counted_load)
    monkeypatch.setattr(derived_adapter, "write_parts", counted_write)
    record = convert(adapter, tmp_path / "out", base_folder, any_base=True)
    assert (len(loaded), len(written)) == (1, 1)
    assert record["logits"]["max_abs_logit_diff"] < 1e-5 * record["logits"]["max_abs_logit"]
    told = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert told["logits"] == record["logits"]
    assert record["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
