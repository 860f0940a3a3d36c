"""Adapters with random weights, as plain PEFT writes them, and the changes of weights that plain PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForMaskedLM

from peft_mlm.arguments import ModelArguments
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.model import load_base

IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2], [0, 8, 8, 4, 20, 6, 21, 4, 2]])


def save_random_adapter(
    base: Path, folder: Path, seed: int, *, config: str = "LoraConfig", size: float = 0.1, **options: Any
) -> Path:
    """Write an adapter all of whose trained numbers are random, with the fingerprint of its base beside it."""
    loaded = load_base(ModelArguments(model_name_or_path=str(base)))
    options = {"target_modules": ["query", "value"], **options}
    torch.manual_seed(seed)
    model = get_peft_model(loaded.model, getattr(peft, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_fingerprint(loaded.fingerprint, folder)
    return folder


def merged_parameters(base: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Merge by plain PEFT in float64; the base's own parameters without an adapter."""
    model = AutoModelForMaskedLM.from_pretrained(base).double()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).double().merge_and_unload()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changes_of(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter changes of each parameter, in float64."""
    before, after = merged_parameters(base, None), merged_parameters(base, adapter)
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits of two rows of letters, in float64."""
    with torch.no_grad():
        return torch.as_tensor(model.double().eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base + adapter, by plain PEFT, not merged."""
    return logits_of(PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), str(adapter)))


def logits_of_base_plus(base: Path, changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base with changes added to its parameters."""
    model = AutoModelForMaskedLM.from_pretrained(base).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(changes[name])
    return logits_of(model)
