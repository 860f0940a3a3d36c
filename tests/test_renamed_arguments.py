"""Every argument that people still paste, row by row."""

import pytest

from peft_mlm.argument_fields import argument_fields
from peft_mlm.config import read_arguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.renamed_arguments import OLD_ARGUMENTS, Dropped, Refused, Renamed, Translated

BASE = {"model_name_or_path": "base", "train_file": "a.txt", "output_dir": "out", "use_lora": True}

# Old name, old value, and what says the same today.
TRANSLATIONS = [
    ("evaluate_during_training", True, {"eval_strategy": "steps"}),
    ("evaluate_during_training", False, {"eval_strategy": "no"}),
    ("warmup_ratio", 0.06, {"warmup_steps": 0.06}),
    ("warmup_ratio", "0", {"warmup_steps": 0}),
    ("group_by_length", True, {"train_sampling_strategy": "group_by_length"}),
    ("group_by_length", False, {}),
    ("no_cuda", "true", {"use_cpu": True}),
    ("no_cuda", False, {}),
    ("adafactor", True, {"optim": "adafactor"}),
    ("adafactor", False, {}),
    ("include_inputs_for_metrics", True, {"include_for_metrics": ["inputs"]}),
    ("include_inputs_for_metrics", False, {}),
    ("overwrite_output_dir", False, {}),
    ("save_safetensors", True, {}),
    ("half_precision_backend", "auto", {}),
    ("fp16_backend", "auto", {}),
    ("jit_mode_eval", False, {}),
    ("use_ipex", False, {}),
    ("past_index", -1, {}),
    ("mp_parameters", "", {}),
    ("tpu_metrics_debug", False, {}),
    ("use_auth_token", True, {}),
    ("use_auth_token", False, {}),
    ("use_auth_token", "hf_x", {"token": "hf_x"}),
    ("torch_dtype", "torch.bfloat16", {"dtype": "bfloat16"}),
    ("torch_dtype", "auto", {"dtype": "auto"}),
    ("mlm", True, {}),
    ("whole_word_mask", False, {}),
    ("wwm", False, {}),
    ("bias", "none", {}),
]
REFUSALS = [
    ("warmup_ratio", 1.0, "warmup_steps"),
    ("warmup_ratio", -0.1, "at least 0"),
    ("overwrite_output_dir", True, "new output_dir"),
    ("save_safetensors", False, "safetensors only"),
    ("half_precision_backend", "apex", "bf16"),
    ("fp16_backend", "apex", "bf16"),
    ("jit_mode_eval", True, "torch_compile"),
    ("use_ipex", True, "no longer supported"),
    ("past_index", 0, "leave it out"),
    ("mp_parameters", "a=1", "SageMaker"),
    ("tpu_metrics_debug", True, "TPU"),
    ("mlm", False, "masked language models"),
    ("whole_word_mask", True, "not in this version"),
    ("wwm", True, "not in this version"),
    ("bias", "all", "peft_config"),
]
# A value that each kind of argument can have, and that is not its default.
SAMPLES = {
    "eval_strategy": "epoch",
    "dtype": "bfloat16",
    "hub_token": "hf_x",
    "ddp_backend": "gloo",
    "use_lora": "true",
    "peft_method": "LORA",
}


def read(**values):
    return read_arguments(values=BASE | values)


def groups(arguments):
    return arguments.model, arguments.data, arguments.peft, arguments.training


def rows(kind):
    return [pytest.param(name, row, id=name) for name, row in OLD_ARGUMENTS.items() if isinstance(row, kind)]


def sample_for(name):
    kind = argument_fields()[name].type
    if name in SAMPLES:
        return SAMPLES[name]
    if kind.boolean:
        return not argument_fields()[name].default
    if kind.whole or kind.number:
        return 3
    return {"a": 1} if kind.entries else "some"


@pytest.mark.parametrize(("name", "row"), rows(Renamed))
def test_a_renamed_argument_gives_what_its_new_name_gives(name, row):
    assert row.name in argument_fields()
    value = sample_for(row.name)
    base = {key: item for key, item in BASE.items() if key != row.name}
    if row.name == "dataset_config_name":
        del base["train_file"]
        base["dataset_name"] = "glue"
    old, new = read_arguments(values=base | {name: value}), read_arguments(values=base | {row.name: value})
    assert groups(old) == groups(new)
    assert old.sources == new.sources
    assert old.notices == [f"{name} was read as {row.name}, its name now."]
    assert new.notices == []
    assert old.sources[row.name] == "dict"


@pytest.mark.parametrize(("name", "value", "today"), TRANSLATIONS)
def test_a_translated_argument_gives_what_its_new_spelling_gives(name, value, today):
    old, new = read(**{name: value}), read(**today)
    assert groups(old) == groups(new)
    assert len(old.notices) == 1
    assert old.notices[0].startswith(name)
    assert all(argument in old.notices[0] for argument in today)
    assert "hf_x" not in old.notices[0]


@pytest.mark.parametrize(("name", "value", "said"), REFUSALS)
def test_a_value_that_has_no_new_spelling_is_refused_with_a_remedy(name, value, said):
    with pytest.raises(ArgumentsError) as caught:
        read(**{name: value})
    (fault,) = caught.value.faults
    assert fault.startswith(f"{name} cannot be used. ")
    assert said in fault


@pytest.mark.parametrize(("name", "row"), rows(Dropped))
def test_a_dropped_argument_changes_nothing_and_is_told(name, row):
    arguments = read(**{name: "x"})
    assert groups(arguments) == groups(read())
    assert arguments.notices == [f"{name} is left out: {row.why}."]


@pytest.mark.parametrize(("name", "row"), rows(Refused))
def test_a_refused_argument_is_refused_with_its_sentence(name, row):
    with pytest.raises(ArgumentsError) as caught:
        read(**{name: 1})
    assert caught.value.faults == [f"{name} cannot be used. {row.why}"]


def test_every_translated_row_is_tried_above_and_every_refusal_too():
    translated = {name for name, row in OLD_ARGUMENTS.items() if isinstance(row, Translated)}
    assert translated == {name for name, *_ in TRANSLATIONS}
    assert {name for name, *_ in REFUSALS} < translated


@pytest.mark.parametrize("name", OLD_ARGUMENTS)
def test_null_for_an_old_argument_says_nothing(name):
    arguments = read(**{name: None})
    assert groups(arguments) == groups(read())
    assert arguments.notices == []


@pytest.mark.parametrize("name", OLD_ARGUMENTS)
def test_an_old_name_is_not_a_name_of_today(name):
    from transformers import TrainingArguments

    aliases = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # deprecated there
    today = {field for field, item in argument_fields().items() if item.group != "training"}
    today |= set(TrainingArguments.__dataclass_fields__)
    assert name not in today - aliases


def test_arguments_that_transformers_has_removed_have_a_row():
    removed = (
        "evaluation_strategy overwrite_output_dir warmup_ratio logging_dir save_safetensors no_cuda use_mps_device "
        "group_by_length push_to_hub_token half_precision_backend include_tokens_per_second jit_mode_eval use_ipex "
        "fp16_opt_level torchdynamo ray_scope past_index mp_parameters adafactor per_gpu_train_batch_size "
        "per_gpu_eval_batch_size include_inputs_for_metrics dispatch_batches split_batches tpu_num_cores "
        "fsdp_min_num_params use_legacy_prediction_loop use_auth_token torch_dtype low_cpu_mem_usage"
    )
    assert set(removed.split()) <= set(OLD_ARGUMENTS)


def test_old_and_new_name_together_must_agree():
    assert groups(read(evaluation_strategy="epoch", eval_strategy="epoch")) == groups(read(eval_strategy="epoch"))
    for order in (("evaluation_strategy", "eval_strategy"), ("eval_strategy", "evaluation_strategy")):
        with pytest.raises(ArgumentsError) as caught:
            read(**dict(zip(order, ("epoch", "steps"), strict=True)))
        (fault,) = caught.value.faults
        assert "evaluation_strategy" in fault
        assert "eval_strategy" in fault
    with pytest.raises(ArgumentsError, match="different things about learning_rate"):
        read(lr=1e-3, learning_rate=1e-4)


def test_a_new_name_by_flag_overrides_the_old_one_in_a_file(tmp_path):
    (tmp_path / "a.json").write_text('{"evaluation_strategy": "epoch", "r": 4}')
    words = [word for name, value in BASE.items() for word in (f"--{name}", str(value))]
    arguments = read_arguments(tmp_path / "a.json", [*words, "--eval_strategy", "no", "--lora-rank", "2"])
    assert arguments.training["eval_strategy"] == "no"
    assert arguments.peft.lora_r == 2


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--no_cuda"], "use_cpu", True),
        (["--no-cuda", "false"], "use_cpu", False),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--no_group_by_length"], "train_sampling_strategy", "random"),
        (["--gradient_checkpointing"], "activation_checkpointing", True),
        (["--warmup_ratio=0.1"], "warmup_steps", 0.1),
    ],
)
def test_old_names_work_as_flags(words, name, value):
    base = [word for key, item in BASE.items() for word in (f"--{key}", str(item))]
    assert read_arguments(flags=[*base, *words]).training[name] == value


def test_a_wrong_value_of_an_old_argument_is_told_under_both_names():
    with pytest.raises(ArgumentsError) as caught:
        read(per_gpu_train_batch_size="many")
    assert caught.value.faults == [
        "per_gpu_train_batch_size: 'many' is not a whole number. "
        "(per_gpu_train_batch_size is per_device_train_batch_size now.)"
    ]
