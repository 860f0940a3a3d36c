from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from peft_mlm.errors import AdapterError
from peft_mlm.fingerprint import (
    BASE_FINGERPRINT,
    base_fingerprint,
    changed_weights,
    misfits,
    read_fingerprint,
    write_fingerprint,
)
from tests.tiny import MODEL_TYPES, tiny_model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_same_weights_in_any_float_type_are_the_same_base(model_type):
    there = base_fingerprint(tiny_model(model_type))
    assert len(there["weights"]) > 10
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        here = base_fingerprint(tiny_model(model_type).to(dtype))
        assert misfits(there, here) + changed_weights(there, here) == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_base_that_was_trained_further_is_another(model_type):
    model = tiny_model(model_type)
    before = base_fingerprint(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as far as a few hundred steps of 1e-5 move it, a tenth of its weights or so
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 5e-3
    (told,) = changed_weights(before, base_fingerprint(model))
    assert misfits(before, base_fingerprint(model)) == []
    assert told.startswith("weights of ")


def test_another_architecture_and_another_vocabulary_are_named():
    told = misfits(base_fingerprint(tiny_model("bert")), base_fingerprint(tiny_model("roberta", vocab_size=30)))
    assert told[0] == "architecture: BertForMaskedLM in training, RobertaForMaskedLM here"
    assert told[1] == "rows in the vocabulary: 25 in training, 30 here"
    assert told[2] == "no weight has the same name"
    (told,) = misfits(base_fingerprint(tiny_model("bert")), base_fingerprint(tiny_model("bert", intermediate_size=48)))
    assert told.startswith("shapes of 6 of ")


def test_what_the_checkpoint_did_not_bring_and_what_is_quantised_is_not_compared():
    model = tiny_model("bert")
    head = [name for name, _ in model.named_parameters() if name.startswith("cls.")]
    without = base_fingerprint(model, without=head)
    assert not set(head) & set(without["weights"])
    torch.nn.init.normal_(model.cls.predictions.transform.dense.weight)
    assert changed_weights(without, base_fingerprint(model)) == []
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert changed_weights(without, base_fingerprint(model)) == []


def test_it_is_written_and_read_back_and_a_damaged_one_is_refused(tmp_path):
    fingerprint = base_fingerprint(tiny_model("esm"))
    assert read_fingerprint(tmp_path) is None
    write_fingerprint(fingerprint, tmp_path)
    assert read_fingerprint(tmp_path) == fingerprint
    for damage in ("{", "[]", '{"weights": {}}'):
        (tmp_path / BASE_FINGERPRINT).write_text(damage)
        with pytest.raises(AdapterError, match="is damaged"):
            read_fingerprint(tmp_path)


def test_reading_one_needs_no_torch():
    code = "import sys, peft_mlm.fingerprint; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
