"""An adapter for another architecture, size or vocabulary is refused before the base is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_mlm.adapter import check_adapter_folder, load_adapter, plan_adapter, save_adapter, wrap
from peft_mlm.adapter_fit import check_adapter_fits
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.checkpoint import load_outline
from peft_mlm.errors import AdapterError
from peft_mlm.loading import load
from peft_mlm.model import load_base
from tests.tiny import MODEL_TYPES, letter_tokenizer, save_base, tiny_model


def lora(**options: Any) -> PEFTArguments:
    return PEFTArguments(use_lora=True, **options)


def make_adapter(folder: Path, model_type: str = "roberta", **options: object) -> Path:
    model = tiny_model(model_type)
    plan = plan_adapter(model, PEFTArguments(use_lora=True, **options))  # type: ignore[arg-type]
    save_adapter(wrap(model, plan), folder, base_name="base")
    return folder


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_weights(folder: Path, model_type: str, **changes: object) -> Path:
    """A base whose weights would be missed as soon as anything tried to load them."""
    save_base(folder, model_type, **changes)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_fits_its_own_base_in_outline(model_type: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", model_type)
    base = without_weights(tmp_path / "base", model_type)
    outline = load_outline(ModelArguments(model_name_or_path=str(base)))
    assert outline is not None
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    config = check_adapter_folder(adapter)
    check_adapter_fits(adapter, "adapter_model.safetensors", config, outline, rows=25)


@pytest.mark.parametrize(
    ("base_type", "changes", "said"),
    [
        ("distilbert", {}, "was trained on a RobertaForMaskedLM, the base is a DistilBertForMaskedLM"),
        # the same names and shapes, and other weights
        ("camembert", {}, "was trained on a RobertaForMaskedLM, the base is a CamembertForMaskedLM"),
        ("xlm-roberta", {}, "was trained on a RobertaForMaskedLM, the base is a XLMRobertaForMaskedLM"),
        ("roberta", {"hidden_size": 48}, "is for a layer of size 32, the base has 48"),
        ("roberta", {"intermediate_size": 80}, "is for a layer of size 64, the base has 80"),
        ("roberta", {"num_hidden_layers": 1}, r"encoder\.layer\.1\.\S+, and the base has no such module"),
    ],
)
def test_an_adapter_for_another_base_is_refused_before_its_weights_are_looked_for(
    base_type: str, changes: dict[str, int], said: str, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    base = without_weights(tmp_path / "base", base_type, **changes)
    with pytest.raises(AdapterError, match=f"does not fit the base model: .*{said}.* Give the base"):
        load(str(adapter), base=str(base))


def test_without_the_architectures_name_the_modules_names_tell(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    change_config(adapter, auto_mapping=None)
    base = without_weights(tmp_path / "base", "bert")
    with pytest.raises(AdapterError, match=r"it changes roberta\.\S+, and the base has no such module"):
        load(str(adapter), base=str(base))


def shorter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t[:20] if t.shape[0] == 25 else t for name, t in tensors.items()}


def with_a_key_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "base_model.model.roberta.encoder.layer.0.gate.lora_A.weight": torch.zeros(8, 32)}


def with_a_trained_module_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "base_model.model.classifier.weight": torch.zeros(8, 32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shorter, "is for a layer of size 20, the base has 25"),
        (with_a_key_more, r"layer\.0\.gate\.lora_A\.weight, and the base has no such module"),
        (with_a_trained_module_more, r"classifier\.weight, and the base has no such module"),
    ],
)
def test_tensors_that_the_base_has_no_place_for_are_refused(
    change: Callable[..., dict[str, torch.Tensor]], said: str, tmp_path: Path
) -> None:
    """PEFT alone passes over keys that it does not know."""
    base = save_base(tmp_path / "base")
    arguments = ModelArguments(model_name_or_path=str(base), untie_embeddings=True)
    model = load_base(arguments).model
    plan = plan_adapter(model, PEFTArguments(use_lora=True, modules_to_save=["lm_head.decoder"]))
    save_adapter(wrap(model, plan), tmp_path / "adapter", base_name="base")
    load_adapter(load_base(arguments).model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=said):
        load_adapter(load_base(arguments).model, tmp_path / "adapter")


@pytest.mark.parametrize("option", ["lora_target_modules", "modules_to_save"])
def test_an_embedding_of_another_vocabulary_is_refused(option: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert")
    arguments = ModelArguments(model_name_or_path=str(base), untie_embeddings=True)
    model = load_base(arguments).model
    plan = plan_adapter(model, lora(**{option: ["word_embeddings"]}))
    save_adapter(wrap(model, plan), tmp_path / "adapter", base_name="base")
    other = without_weights(tmp_path / "other", "bert", vocab_size=31)
    with pytest.raises(AdapterError, match="is for a layer of size 25, the base has 31"):
        load(str(tmp_path / "adapter"), base=str(other))


def test_token_rows_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    letter_tokenizer(extra=["<new>"]).save_pretrained(tmp_path / "longer")
    arguments = ModelArguments(model_name_or_path=str(base), tokenizer_name=str(tmp_path / "longer"))
    grown = load_base(arguments)
    plan = plan_adapter(grown.model, PEFTArguments(use_lora=True), new_token_ids=grown.new_token_ids)
    save_adapter(wrap(grown.model, plan), tmp_path / "adapter", base_name="base")
    with pytest.raises(AdapterError, match="rows of tokens up to 25, the base's vocabulary has 25 rows"):
        load(str(tmp_path / "adapter"), base=str(without_weights(tmp_path / "other", "roberta")))
    shutil.copytree(tmp_path / "longer", tmp_path / "adapter", dirs_exist_ok=True)
    assert load(str(tmp_path / "adapter"), base=str(base)).base.new_token_ids == (25,)
