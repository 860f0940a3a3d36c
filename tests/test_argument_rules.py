"""Defaults for training, ranges, and rules between arguments."""

import math
import re

import pytest

from peft_mlm.argument_fields import argument_fields
from peft_mlm.argument_rules import FOLLOWERS, RANGES, SETS_ASIDE, STEPS, TRAINING_DEFAULTS, default_training
from peft_mlm.config import read_arguments
from peft_mlm.errors import ArgumentsError

BASE = {"model_name_or_path": "base", "train_file": "a.txt", "output_dir": "out"}
LORA = BASE | {"use_lora": True}
SCRATCH = {"model_type": "bert", "tokenizer_name": "tok", "train_file": "a.txt", "output_dir": "out"}


def training(**values):
    return read_arguments(values=BASE | values).training


def faults(values, **options):
    with pytest.raises(ArgumentsError) as caught:
        read_arguments(values=values, **options)
    return caught.value.faults


def test_the_tables_name_arguments_only():
    named = (
        {row.name for row in TRAINING_DEFAULTS} | set(FOLLOWERS) | set(FOLLOWERS.values()) | set(RANGES) | set(STEPS)
    )
    named |= {re.sub("^no | lora$", "", name) for name in SETS_ASIDE} | {
        name for row in SETS_ASIDE.values() for name in row
    }
    assert named <= set(argument_fields())


def test_our_defaults_evaluate_and_save_five_times():
    values = training()
    assert (values["eval_strategy"], values["eval_steps"]) == ("steps", 0.2)
    assert (values["save_strategy"], values["save_steps"]) == ("steps", 0.2)
    assert values["logging_steps"] == 0.02
    assert values["report_to"] == "none"
    assert values["load_best_model_at_end"] is False


def test_the_learning_rate_depends_on_whether_an_adapter_is_trained():
    assert training()["learning_rate"] == 5e-5
    assert training(use_lora=True)["learning_rate"] == 3e-4
    assert training(adapter_name_or_path="a")["learning_rate"] == 3e-4
    assert training(use_lora=True, learning_rate=1)["learning_rate"] == 1
    sources = read_arguments(values=LORA).sources
    assert sources["learning_rate"] == "default for an adapter"
    assert sources["eval_steps"] == "default"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"eval_steps": 100}, {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 100}),
        ({"eval_strategy": "epoch"}, {"save_strategy": "epoch"}),
        ({"eval_strategy": "no"}, {"save_strategy": "steps", "save_steps": 500}),
        ({"do_eval": False}, {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 500, "do_eval": False}),
        ({"eval_strategy": "epoch", "save_steps": 50}, {"save_strategy": "steps", "save_steps": 50}),
        ({"save_steps": 0.1}, {"eval_steps": 0.2, "save_strategy": "steps", "save_steps": 0.1}),
        ({"save_strategy": "no"}, {"eval_strategy": "steps", "save_strategy": "no", "save_steps": 500}),
        ({"save_strategy": "best"}, {"eval_strategy": "steps", "save_strategy": "best"}),
        (
            {"early_stopping_patience": 3},
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_steps": 0.2},
        ),
        ({"early_stopping_patience": 3, "load_best_model_at_end": False}, {"load_best_model_at_end": False}),
        ({"early_stopping_patience": 3, "metric_for_best_model": "accuracy"}, {"metric_for_best_model": "accuracy"}),
        ({"eval_steps": None, "report_to": None}, {"eval_steps": 0.2, "report_to": "none"}),
    ],
)
def test_our_defaults_follow_what_is_given(told, expected):
    values = training(**told)
    assert {name: values[name] for name in expected} == expected


def test_without_steps_no_number_of_steps_is_made_up():
    assert "eval_steps" not in training(eval_strategy="epoch")
    assert "metric_for_best_model" not in training()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_what_is_given_is_never_replaced(adapter, early_stopping):
    given = {row.name: "given" for row in TRAINING_DEFAULTS} | dict.fromkeys(FOLLOWERS, "given")
    assert default_training(given, adapter=adapter, early_stopping=early_stopping, lengths_differ=True) == ({}, {})


# Name: values at the edges that are right, values that are wrong.
EDGES = {
    "max_tokens_per_batch": ([1], [0, -1]),
    "validation_split_percentage": ([0.1, 99.9], [0, 100, -1]),
    "validation_split_seed": ([0], [-1, 2**32]),
    "preprocessing_num_workers": ([1], [0]),
    "max_train_samples": ([1], [0, -5]),
    "max_eval_samples": ([1], [0]),
    "max_seq_length": ([1, 512], [0]),
    "mlm_probability": ([0.01, 1], [0, 1.1, -0.1]),
    "mask_replace_prob": ([0, 0.9], [-0.1, 1.1]),
    "random_replace_prob": ([0, 0.2], [-0.1, 1.1]),
    "eval_mask_seed": ([0, 2**32 - 1], [-1]),
    "eval_mask_draws": ([1, 100], [0, -1]),
    "early_stopping_patience": ([1], [-1]),
    "early_stopping_threshold": ([0], [-0.1, math.inf]),
    "lora_r": ([1], [0, -8]),
    "lora_alpha": ([0.5], [0, math.inf]),
    "lora_dropout": ([0, 0.99], [1, -0.1]),
    "layers_to_transform": ([[0, 11]], [[0, -1], []]),
    "rank_pattern": ([{"query": 1}], [{"query": 1, "key": 0}]),
    "alpha_pattern": ([{"query": 0.5}], [{"query": 0}]),
    "per_device_train_batch_size": ([1], [0]),
    "per_device_eval_batch_size": ([1], [0]),
    "gradient_accumulation_steps": ([1], [0]),
    "eval_accumulation_steps": ([1], [0]),
    "num_train_epochs": ([0.1], [0, -1, math.inf]),
    "max_steps": ([-1, 1], [-2]),
    "learning_rate": ([0, 1], [-1e-5, math.inf, -math.inf]),
    "weight_decay": ([0], [-0.1, math.inf]),
    "warmup_steps": ([0, 0.06, 100], [-1, 1.5, math.inf]),
    "adam_beta1": ([0, 0.9], [1]),
    "adam_beta2": ([0, 0.999], [1]),
    "adam_epsilon": ([0], [-1e-8]),
    "max_grad_norm": ([0, math.inf], [-1]),
    "label_smoothing_factor": ([0], [1]),
    "neftune_noise_alpha": ([5], [0]),
    "eval_steps": ([0.5, 1, 10], [0, 2.5, -1]),
    "logging_steps": ([0.5, 1, 10], [0, 2.5, -1]),
    "save_steps": ([0.5, 1, 10], [0, 2.5, -1]),
    "eval_delay": ([0], [-1]),
    "save_total_limit": ([0, 1], [-1]),
    "torch_empty_cache_steps": ([1], [0]),
    "dataloader_num_workers": ([0], [-1]),
    "dataloader_prefetch_factor": ([], [0]),
    "seed": ([0], [-1, 2**32]),
    "data_seed": ([0], [-1]),
    "ddp_timeout": ([1], [0]),
    "llm_int8_threshold": ([], [-1]),
}


@pytest.mark.parametrize("name", EDGES)
def test_numbers_must_lie_in_their_range(name):
    right, wrong = EDGES[name]
    for value in right:
        read_arguments(values=LORA | {name: value})
    for value in wrong:
        (fault, *_) = faults(LORA | {name: value})
        assert fault.startswith(f"{name} is ")


def test_every_range_is_tried_above():
    assert set(EDGES) == set(RANGES)


def test_an_infinite_rate_is_told_to_be_finite():
    (fault,) = faults(LORA | {"learning_rate": "inf"})
    assert fault == "learning_rate is inf: it must be at least 0 and finite."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        # model
        ({key: BASE[key] for key in ("train_file", "output_dir")}, "No model is given"),
        (BASE | {"config_overrides": "hidden_size=8"}, "config_overrides is given together with model_name_or_path"),
        (
            SCRATCH | {"config_name": "c", "config_overrides": "hidden_size=8"},
            "config_overrides is given together with config_name",
        ),
        (BASE | {"config_name": "c"}, "config_name is given together with model_name_or_path"),
        ({**SCRATCH, "tokenizer_name": None}, "model_type trains from scratch and brings no tokenizer"),
        (
            {"config_name": "c", "train_file": "a.txt", "output_dir": "out"},
            "config_name trains from scratch and brings no tokenizer",
        ),
        (SCRATCH | {"use_lora": True}, "use_lora is given, but model_type makes a model of random weights"),
        # data
        (BASE | {"dataset_name": "glue"}, "dataset_name and train_file are both given"),
        ({key: BASE[key] for key in ("model_name_or_path", "output_dir")}, "No text to train on is given"),
        (BASE | {"dataset_config_name": "cola"}, "dataset_config_name is given without dataset_name"),
        (BASE | {"dataset_revision": "main"}, "dataset_revision is given without dataset_name"),
        (BASE | {"line_by_line": True, "rows": "chunked"}, "but rows is chunked"),
        (BASE | {"streaming": True}, "streaming is not supported"),
        (BASE | {"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "together they must be at most 1"),
        # adapter
        (BASE | {"lora_r": 8}, "lora_r is given, but no adapter is asked for: add --use_lora"),
        (BASE | {"lora_r": 8, "use_dora": True}, "lora_r, use_dora are given, but no adapter"),
        (BASE | {"lora_r": 8, "use_lora": False}, "lora_r is given, but use_lora is false"),
        (BASE | {"adapter_name_or_path": "a", "lora_r": 8}, "lora_r is given together with adapter_name_or_path"),
        (LORA | {"adapter_name_or_path": "a", "lora_target_modules": "q"}, "the adapter brings its own shape"),
        (LORA | {"lora_target_modules": []}, "lora_target_modules is an empty list"),
        # training
        ({key: BASE[key] for key in ("model_name_or_path", "train_file")}, "output_dir is missing"),
        (BASE | {"output_dir": ""}, "output_dir is missing"),
        (BASE | {"do_train": False}, "do_train is false"),
        (BASE | {"do_predict": True}, "do_predict is not supported"),
        (BASE | {"push_to_hub": True}, "give hub_model_id as OWNER/NAME"),
        (BASE | {"fp16": True, "bf16": True}, "fp16 and bf16 are both true"),
        (BASE | {"fp16_full_eval": True, "bf16_full_eval": True}, "fp16_full_eval and bf16_full_eval are both true"),
        (BASE | {"dataloader_prefetch_factor": 2}, "needs dataloader_num_workers"),
        (BASE | {"do_eval": False, "eval_strategy": "epoch"}, "do_eval is false, but eval_strategy is epoch"),
        (BASE | {"do_eval": False, "early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
        (BASE | {"eval_strategy": "no", "load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        (
            BASE | {"eval_strategy": "no", "lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type reduce_lr_on_plateau needs evaluations",
        ),
        (BASE | {"load_best_model_at_end": True, "save_strategy": "epoch"}, "they are epoch and steps"),
        (BASE | {"load_best_model_at_end": True, "eval_steps": 10, "save_steps": 15}, "they are 15 and 10"),
        (BASE | {"load_best_model_at_end": True, "eval_steps": 0.1, "save_steps": 100}, "they are 100 and 0.1"),
        (BASE | {"load_best_model_at_end": True, "eval_steps": 10, "save_steps": 5}, "they are 5 and 10"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(values, said):
    told = faults(values)
    assert any(said in fault for fault in told), told
    assert all(fault.endswith(".") for fault in told)


@pytest.mark.parametrize(
    "values",
    [
        BASE,
        LORA,
        SCRATCH,
        SCRATCH | {"config_overrides": "hidden_size=8"},
        BASE | {"adapter_name_or_path": "a"},
        LORA | {"adapter_name_or_path": "a"},
        BASE | {"line_by_line": True, "rows": "line"},
        BASE | {"pad_to_max_length": True, "rows": "chunked"},
        {**BASE, "train_file": None, "dataset_name": "glue", "dataset_config_name": "cola"},
        BASE | {"mask_replace_prob": 0.9, "random_replace_prob": 0.1},
        BASE | {"mask_replace_prob": 0.7, "random_replace_prob": 0.3},
        BASE | {"load_best_model_at_end": True, "eval_steps": 10, "save_steps": 30},
        BASE | {"load_best_model_at_end": True, "eval_steps": 0.2, "save_steps": 0.6},
        BASE | {"load_best_model_at_end": True, "save_strategy": "best"},
        BASE | {"do_train": True, "do_eval": True},
        BASE | {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
        BASE | {"streaming": False, "push_to_hub": False},
    ],
)
def test_arguments_that_go_together_are_accepted_by_us_and_by_transformers(values):
    from transformers import TrainingArguments

    TrainingArguments(**read_arguments(values=values).training | {"use_cpu": True})


def test_a_model_type_beside_a_base_model_is_left_out_and_told():
    arguments = read_arguments(values=BASE | {"model_type": "bert"})
    assert arguments.model == read_arguments(values=BASE).model
    assert arguments.notices == ["model_type is left out: model_name_or_path brings its own."]


def test_line_by_line_means_rows_line():
    arguments = read_arguments(values=BASE | {"line_by_line": True})
    assert arguments.data.rows == "line"
    assert arguments.sources["rows"] == "implied by line_by_line"


@pytest.mark.parametrize("given", [{"dataset_name": "glue"}, {"train_file": "a"}, {"validation_file": "b"}])
def test_to_evaluate_neither_model_nor_folder_nor_training_text_is_needed(given):
    read_arguments(values=given, for_training=False)


def test_to_evaluate_some_text_is_needed():
    assert faults({"model_name_or_path": "base"}, for_training=False) == [
        "No text to evaluate on is given: name files by validation_file or train_file, or a data set by dataset_name."
    ]


def test_without_adapter_there_is_no_group_for_it():
    assert read_arguments(values=BASE).peft is None
    assert read_arguments(values=BASE | {"use_lora": False}).peft is None
    assert read_arguments(values=LORA).peft.use_lora
    assert read_arguments(values=BASE | {"adapter_name_or_path": "a"}).peft.adapter_name_or_path == "a"
