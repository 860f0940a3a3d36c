"""What people do with a merged model: every type opens as encoder and classifier, with the adapted weights exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification as AutoModelForTokens
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.merging import merge_adapter
from peft_mlm.model import load_base
from peft_mlm.model_types import MODEL_TYPES
from tests.tiny import perturb, save_base

TYPES = [name for name, row in MODEL_TYPES.items() if not row.refusal]
# Types for which transformers has no such class.
NO_SEQUENCES, NO_TOKENS = {"neomme"}, {"neomme", "tapas"}
# A part of the encoder that a class does not use: Funnel's decoder, LUKE's pooler.
UNUSED = {("funnel", "sequences"): "decoder.", ("luke", "tokens"): "pooler."}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_merged_model_opens_with_its_encoder_bit_by_bit(model_type: str, tmp_path: Path) -> None:
    base = load_base(ModelArguments(model_name_or_path=str(save_base(tmp_path / "base", model_type))))
    before = {name: tensor.clone() for name, tensor in base.model.base_model.state_dict().items()}
    model = wrap(base.model, plan_adapter(base.model, PEFTArguments(use_lora=True, lora_r=2)))
    perturb(model)
    merge_adapter(model, base.tokenizer, tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").base_model.state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.items())

    opened = {"encoder": AutoModel.from_pretrained(tmp_path / "merged")}
    if model_type not in NO_SEQUENCES:
        opened["sequences"] = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=3)
    if model_type not in NO_TOKENS:
        opened["tokens"] = AutoModelForTokens.from_pretrained(tmp_path / "merged", num_labels=3)
    for use, other in opened.items():
        encoder = other.base_model.state_dict()
        unused = UNUSED.get((model_type, use))
        left_out = {name for name in merged if name not in encoder}
        assert all(unused is not None and name.startswith(unused) for name in left_out), (use, left_out)
        # A pooler that no masked LM has starts at random, and nothing else does.
        assert all(name.startswith("pooler.") for name in encoder if name not in merged), use
        for name in merged.keys() & encoder.keys():
            assert torch.equal(encoder[name], merged[name]), (use, name)


def test_the_types_without_classifiers_are_those_that_transformers_has_none_for() -> None:
    assert {name for name in TYPES if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES} == NO_SEQUENCES
    assert {name for name in TYPES if name not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES} == NO_TOKENS
