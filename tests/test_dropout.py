from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_mlm.dropout import turn_off_dropout
from tests.tiny import MODEL_TYPES, tiny_model

IDS = torch.arange(5, 25).view(2, 10)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


# Every name under which a config keeps a dropout probability; some types are published with 0.
DROPOUT = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "mlp_dropout": 0.1,
    "hidden_dropout": 0.1,
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_base_without_dropout_trains_on_what_it_computes_in_evaluation(model_type: str, attention: str) -> None:
    model: Any = tiny_model(model_type, **DROPOUT)
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{model_type} has no {attention}")
    expected, published = logits(model), model.config.to_dict()
    model.train()
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    assert turn_off_dropout(model) > 0
    assert turn_off_dropout(model) == 0
    for _ in range(3):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    assert model.config.to_dict() == published
