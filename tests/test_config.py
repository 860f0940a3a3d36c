"""Command line, JSON, YAML and dict become the same four typed groups."""

import json
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml

from peft_mlm.argument_fields import GROUPS, argument_fields
from peft_mlm.argument_rules import NOT_RECORDED
from peft_mlm.config import describe_help, read_arguments, write_arguments, write_sources
from peft_mlm.errors import ArgumentsError
from peft_mlm.quantization_rules import NEEDS

BASE = {"model_name_or_path": "base", "train_file": "a.txt", "output_dir": "out"}
WALK_THROUGH = {
    "model_name_or_path": "bert-base-uncased",
    "dataset_name": "glue",
    "dataset_config_name": "cola",
    "max_seq_length": 512,
    "mlm_probability": 0.15,
    "output_dir": "runs/cola",
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 16,
    "eval_strategy": "no",
    "use_lora": True,
    "lora_target_modules": ["query", "value"],
    "rank_pattern": {"query": 16},
    "bf16": False,
    "cache_dir": None,
}


def groups(arguments):
    return arguments.model, arguments.data, arguments.peft, arguments.training


def as_words(values):
    words = []
    for name, value in values.items():
        if isinstance(value, list | dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def faults(*args, **options):
    with pytest.raises(ArgumentsError) as caught:
        read_arguments(*args, **options)
    return caught.value.faults


def test_dict_json_yaml_and_flags_give_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(WALK_THROUGH))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(WALK_THROUGH))
    (tmp_path / "b.yml").write_text(
        "model: {model_name_or_path: bert-base-uncased, cache_dir: null}\n"
        "data: {dataset_name: glue, dataset_config_name: cola, max_seq_length: '512', mlm_probability: .15}\n"
        "training:\n  output_dir: runs/cola\n  num_train_epochs: 3\n  learning_rate: 5e-5\n"
        "  per_device_train_batch_size: 1_6\n  eval_strategy: no\n  bf16: off\n"
        "peft:\n  use_lora: on\n  lora_target_modules: query, value\n  rank_pattern: {query: '16'}\n"
    )
    words = ["--model_name_or_path", "bert-base-uncased", "--dataset_name", "glue", "--dataset-config-name", "cola"]
    words += ["--max_seq_length", "512", "--mlm_probability=0.15", "--output_dir", "runs/cola", "--cache_dir", "none"]
    words += ["--num_train_epochs", "3", "--learning_rate", "5e-5", "--per_device_train_batch_size", "16", "--no_bf16"]
    words += ["--eval_strategy", "no", "--use_lora", "--lora_target_modules", "query", "value"]
    strings = {name: str(value) for name, value in WALK_THROUGH.items() if not isinstance(value, list | dict)}
    strings |= {"lora_target_modules": "query,value", "rank_pattern": '{"query": 16}'}
    expected = groups(read_arguments(values=WALK_THROUGH))
    assert groups(read_arguments(tmp_path / "a.json")) == expected
    assert groups(read_arguments(tmp_path / "a.yaml")) == expected
    assert groups(read_arguments(tmp_path / "b.yml")) == expected
    assert groups(read_arguments(flags=[*words, "--rank_pattern", '{"query": 16}'])) == expected
    assert groups(read_arguments(flags=as_words(WALK_THROUGH))) == expected
    assert groups(read_arguments(values=strings)) == expected
    model, data, peft, training = expected
    assert model.model_name_or_path == "bert-base-uncased"
    assert data.max_seq_length == 512
    assert peft.lora_target_modules == ["query", "value"]
    assert peft.rank_pattern == {"query": 16}
    assert training["learning_rate"] == 5e-5
    assert training["eval_strategy"] == "no"


def test_the_written_file_is_plain_yaml_with_a_title_per_group_and_numbers_as_numbers(tmp_path):
    write_arguments(read_arguments(values=BASE | {"use_lora": True, "project": "漢字"}), tmp_path / "a.yaml")
    text = (tmp_path / "a.yaml").read_text(encoding="utf-8")
    plain = yaml.safe_load(text)
    assert text.count("\n# ") == 1 + len(GROUPS)
    assert "漢字" in text
    assert plain["adam_epsilon"] == 1e-8
    assert plain["learning_rate"] == 3e-4
    assert plain["train_file"] == ["a.txt"]
    known = {name for name, field in argument_fields().items() if field.default not in (None, MISSING)}
    assert set(plain) == known - NOT_RECORDED - set(NEEDS) | set(BASE) | {"eval_steps"}


def test_writing_replaces_a_file_and_leaves_no_other(tmp_path):
    (tmp_path / "a.yaml").write_text("old: 1")
    write_arguments(read_arguments(values=BASE), tmp_path / "a.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    assert "old: 1" not in (tmp_path / "a.yaml").read_text()


def test_tokens_are_neither_written_nor_shown(tmp_path):
    secrets = {"token": "hf_secret1", "push_to_hub_token": "hf_secret2"}
    arguments = read_arguments(values=BASE | secrets)
    assert arguments.model.token == "hf_secret1"
    write_arguments(arguments, tmp_path / "a.yaml")
    write_sources(arguments, tmp_path / "s.json")
    written = (tmp_path / "a.yaml").read_text() + (tmp_path / "s.json").read_text() + str(arguments.notices)
    assert "hf_secret" not in written
    told = faults(
        values=BASE | {"token": ["hf_secret1"], "hub_token": {"a": "hf_secret2"}, "use_auth_token": ["hf_secret3"]}
    )
    assert len(told) == 3
    assert "hf_secret" not in str(told)


def test_flags_override_the_file_and_a_dict_overrides_both(tmp_path):
    (tmp_path / "a.yaml").write_text("use_lora: true\nlora_r: 4\nlora_alpha: 8\nseed: 1\nmodel_name_or_path: base\n")
    words = ["--lora_r", "16", "--seed", "2", "--train_file", "a.txt"]
    arguments = read_arguments(tmp_path / "a.yaml", words, {"seed": 3, "output_dir": Path("out")})
    assert (arguments.peft.lora_alpha, arguments.peft.lora_r, arguments.training["seed"]) == (8.0, 16, 3)
    assert arguments.training["output_dir"] == "out"
    expected = {"lora_alpha": "file a.yaml", "lora_r": "flag", "seed": "dict", "lora_dropout": "default"}
    assert {name: arguments.sources[name] for name in expected} == expected
    assert set(arguments.sources) == set(argument_fields())
    write_sources(arguments, tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == arguments.sources


def test_a_flag_can_take_a_value_of_the_file_back(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "dataset_name: glue\noutput_dir: out\nmodel_name_or_path: base\nmax_seq_length: 64"
    )
    arguments = read_arguments(tmp_path / "a.yaml", ["--max_seq_length", "none"])
    assert arguments.data.max_seq_length is None


@pytest.mark.parametrize(
    ("words", "dropped"),
    [
        (["--adapter_name_or_path", "old"], "lora_r, lora_alpha"),
        (["--no_use_lora"], "lora_r, lora_alpha"),
        (["--dataset_name", "glue"], "train_file"),
    ],
)
def test_what_a_flag_overrides_in_the_file_as_a_whole_is_set_aside_and_told(tmp_path, words, dropped):
    (tmp_path / "a.json").write_text(json.dumps(BASE | {"use_lora": True, "lora_r": 4, "lora_alpha": 8}))
    arguments = read_arguments(tmp_path / "a.json", words)
    (notice,) = arguments.notices
    assert notice.endswith(f"sets aside {dropped}.")
    for name in dropped.split(", "):
        assert arguments.sources[name] == "default"


def test_a_resolved_file_can_be_run_with_another_adapter_or_none(tmp_path):
    write_arguments(read_arguments(values=BASE | {"use_lora": True, "lora_r": 4}), tmp_path / "a.yaml")
    assert read_arguments(tmp_path / "a.yaml", ["--adapter_name_or_path", "x"]).peft.adapter_name_or_path == "x"
    assert read_arguments(tmp_path / "a.yaml", ["--use_lora", "false"]).peft is None


def test_all_faults_of_all_sources_are_reported_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text("lora_r: many\nlearning_rat: 1\nsave_safetensors: false\nstreaming: yes\n")
    words = ["--seed", "x", "--max_steps", "--evaluation_strategy", "often", "--mlm_probability", "2", "extra.txt"]
    told = faults(tmp_path / "a.yaml", words, {"bf16": "perhaps", "whole_word_mask": True})
    assert sorted(told) == sorted(
        [
            "lora_r in a.yaml: 'many' is not a whole number.",
            "learning_rat in a.yaml: there is no such argument. Nearest: learning_rate.",
            "save_safetensors in a.yaml cannot be used. Weights are saved as safetensors only: leave it out.",
            "streaming is not supported: the text is memory-mapped from disk, so that it need not fit in memory. Leave "
            "it out, or download the data set first.",
            "--seed: 'x' is not a whole number.",
            "--max_steps needs a value.",
            "--evaluation_strategy: 'often' is not one of no, steps, epoch. "
            "(evaluation_strategy is eval_strategy now.)",
            "--mlm_probability takes one value, but has 2: '2 extra.txt'.",
            "bf16: 'perhaps' is not true or false.",
            "whole_word_mask cannot be used. Whole-word masking is not in this version: leave it out.",
            "No model is given: name a base model by model_name_or_path, or train from scratch by model_type or "
            "config_name.",
            "No text to train on is given: name files by train_file, or a data set by dataset_name.",
            "output_dir is missing: give the folder that the run is written to, such as runs/first.",
        ]
    )


def test_a_file_that_cannot_be_read_is_reported_with_the_flags_but_without_what_it_may_have_said(tmp_path):
    told = faults(tmp_path / "no.yaml", ["--seed", "x"])
    assert told == [
        f"{tmp_path / 'no.yaml'} does not exist: give the path of a file of arguments.",
        "--seed: 'x' is not a whole number.",
    ]


@pytest.mark.parametrize("spelling", ["learning_r", "learning_rat", "learningrate", "LEARNING_RATE", "learning"])
def test_a_shortened_or_mistyped_name_is_refused_with_the_nearest_one(spelling):
    for told in (faults(values=BASE | {spelling: 1}), faults(flags=[*as_words(BASE), f"--{spelling}", "1"])):
        (fault,) = told
        assert "there is no such argument" in fault
        assert "learning_rate" in fault or spelling == "LEARNING_RATE"


def test_a_name_at_fault_is_not_missed_as_well():
    (fault,) = faults(values={"model_name_or_pth": "base", "train_file": "a.txt", "output_dir": "out"})
    assert "model_name_or_path" in fault
    (fault,) = faults(flags=[*as_words(BASE)[:2], "--output_dir"])
    assert fault == "--output_dir needs a value."
    (fault,) = faults(values=BASE | {"use_lora": "perhaps", "lora_r": 8})
    assert fault == "use_lora: 'perhaps' is not true or false."


def test_every_example_of_a_bad_dict_is_an_arguments_error():
    assert faults(values={1: 2}) == ["In the dict of arguments, the name 1 is not text."]
    assert faults(values=BASE | {"model": {"output_dir": "x"}}) == [
        "In the dict of arguments, output_dir is given twice."
    ]


def test_reading_does_not_change_what_was_given_nor_share_it():
    values = BASE | {"use_lora": True, "lora_target_modules": ["query"], "rank_pattern": {"query": 2}}
    before = json.dumps(values)
    arguments = read_arguments(values=values)
    arguments.peft.lora_target_modules.append("x")
    arguments.peft.rank_pattern["x"] = 1
    arguments.training["include_for_metrics"].append("inputs")
    assert json.dumps(values) == before
    assert read_arguments(values=BASE).training["include_for_metrics"] == []


def test_help_shows_our_defaults():
    text = describe_help()
    assert "--eval_steps NUMBER  (default: 0.2)" in text
    assert "--learning_rate NUMBER  (default: 0.0003 for an adapter, else 5e-05)" in text
    assert "--save_steps NUMBER  (default: as eval_steps)" in text
    assert "--lora_r N  (default: 8)" in text
    assert "--lora_r" not in describe_help(["data"])


LIGHT = """
import sys
from peft_mlm.config import *
read_arguments(sys.argv[1], ["--lora_r", "4", "--lora_target_modules", "query", "value"])
describe_help()
heavy = {"torch", "transformers", "peft", "datasets", "numpy", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_reading_and_help_import_nothing_heavy(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(WALK_THROUGH))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, tmp_path / "a.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
