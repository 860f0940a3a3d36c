"""The values for training, handed to transformers' own class."""

import dataclasses
from dataclasses import MISSING

import pytest
from transformers import TrainingArguments

from peft_mlm.argument_fields import argument_fields
from peft_mlm.argument_rules import RANGES
from peft_mlm.argument_types import convert
from peft_mlm.config import read_arguments
from tests.test_config import BASE


def sample(field):
    """Give a value that is right for transformers too, and not the default."""
    kind = field.type
    if field.name in ("accelerator_config", "lr_scheduler_kwargs", "activation_checkpointing_kwargs"):
        return {"accelerator_config": {"split_batches": True}}.get(field.name, {"a": "1"})
    if kind.choices and field.default is not MISSING:
        return next(choice for choice in kind.choices if choice != field.default)
    if kind.choices:
        return "adafactor"
    if kind.boolean:
        return str(not field.default)
    if field.name in RANGES and RANGES[field.name].high == 1:
        return "0.25"
    return "2" if kind.whole or kind.number else "x"


# These want hardware, another library, or contradict the base.
ELSEWHERE = {
    "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "torch_compile", "fsdp", "fsdp_config", "deepspeed",
    "parallelism_config", "push_to_hub", "do_train", "do_predict", "debug", "local_rank", "ddp_backend",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile_backend", "torch_compile_mode",
    "eval_do_concat_batches", "full_determinism", "use_cpu", "liger_kernel_config", "dataloader_prefetch_factor",
}  # fmt: skip
TRAINING = [name for name, field in argument_fields().items() if field.group == "training" and name not in ELSEWHERE]


@pytest.mark.parametrize("name", TRAINING)
def test_typed_values_make_the_training_arguments_of_transformers(name):
    text = sample(argument_fields()[name])
    training = read_arguments(values=BASE | {name: text}).training
    made = TrainingArguments(**training | {"use_cpu": True})
    value = convert(text, argument_fields()[name].type)
    assert training[name] == value
    if name not in ("report_to", "accelerator_config"):
        assert getattr(made, name) == value


def test_what_is_not_given_equals_what_transformers_would_choose():
    arguments = read_arguments(values=BASE)
    ours = {name for name, source in arguments.sources.items() if source != "default"}
    ours |= {"eval_strategy", "eval_steps", "logging_steps", "report_to", "logging_dir"}
    made, plain = TrainingArguments(**arguments.training), TrainingArguments(output_dir="out")
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in ours | {"do_eval", "accelerator_config"}:
            assert getattr(made, field.name) == getattr(plain, field.name), field.name
