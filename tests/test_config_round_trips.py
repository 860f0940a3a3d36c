"""Any arguments: the same from every source, and the same again when they are written and read."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from peft_mlm.argument_fields import argument_fields
from peft_mlm.argument_rules import RANGES
from peft_mlm.config import SECRETS, read_arguments, write_arguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.quantization_rules import QUANTISATION
from tests.test_config import BASE, as_words, groups

NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda text: text.strip().lower() not in ("none", "null")
)


def values_of(field):
    """Values of an argument that lie in its range."""
    kind, allowed = field.type, RANGES.get(field.name)
    low, high = (allowed.low, allowed.high) if allowed else (-1e9, 1e9)
    numbers = st.floats(max(low, 1e-9), min(high, 1e9) - 1e-3)
    wholes = st.integers(int(max(low, -1)) + bool(allowed and allowed.open_low), int(min(high, 1e6)) - (high < 1e6))
    several = st.lists(wholes if kind.items and kind.items.whole else NAMES, min_size=1, max_size=3)
    options = []
    if kind.choices:
        options.append(st.sampled_from([choice for choice in kind.choices if isinstance(choice, str)] or [False]))
    options += [st.booleans()] * kind.boolean + [wholes] * kind.whole
    if kind.number:
        options.append(wholes.map(float) if field.name.endswith("_steps") else numbers)
    if kind.items:
        items = kind.items
        options.append(st.lists(st.sampled_from(items.choices), max_size=2) if items.choices else several)
    if kind.entries:
        inner = wholes if kind.entries.whole else numbers if kind.entries.number else st.booleans()
        options.append(st.dictionaries(NAMES, inner, max_size=2))
    if kind.text and not (kind.items or kind.entries or kind.boolean):
        options.append(NAMES)
    return st.one_of(options) if options else st.none()


VALUES = {name: values_of(field) for name, field in argument_fields().items()}
ALIASES = ("gradient_checkpointing", "gradient_checkpointing_kwargs")
OPTIONAL = [name for name in VALUES if name not in (*BASE, *ALIASES)]


@st.composite
def any_arguments(draw):
    names = draw(st.lists(st.sampled_from(OPTIONAL), max_size=12, unique=True))
    return {name: draw(VALUES[name]) for name in (*BASE, *names)}


def outcome(*args, **options):
    """The groups, or the number of faults."""
    try:
        return groups(read_arguments(*args, **options))
    except ArgumentsError as error:
        return len(error.faults)


def lora_or_none(values):
    """Remove what rules refuse, so that most examples are accepted."""
    peft = [name for name, field in argument_fields().items() if field.group == "peft"]
    wanted = {name: value for name, value in values.items() if name not in peft or values.get("use_lora")}
    refused = ("adapter_name_or_path", "streaming", "push_to_hub", "do_predict", "do_train", "do_eval", "fp16")
    refused += (
        "config_overrides",
        "config_name",
        "dataset_name",
        "dataset_config_name",
        "dataset_revision",
        "line_by_line",
    )
    refused += ("load_best_model_at_end", "early_stopping_patience", "lr_scheduler_type", "fp16_full_eval")
    refused += QUANTISATION
    refused += ("add_tokens", "add_special_tokens", "add_tokens_inside_words", "new_token_init")
    refused += ("peft_method", "peft_config", "init_lora_weights")
    refused += ("max_tokens_per_batch", "dataloader_prefetch_factor", "mask_replace_prob", "random_replace_prob")
    return {name: value for name, value in wanted.items() if name not in refused}


@settings(max_examples=60, deadline=None)
@given(values=st.one_of(any_arguments(), any_arguments().map(lora_or_none)))
def test_any_arguments_give_the_same_from_dict_json_yaml_and_flags(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "a.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    expected = outcome(values=values)
    assert outcome(folder / "a.json") == expected
    assert outcome(folder / "a.yaml") == expected
    assert outcome(flags=as_words(values)) == expected


@settings(max_examples=60, deadline=None)
@given(values=any_arguments().map(lora_or_none))
def test_what_is_written_reads_back_to_equal_groups(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("written") / "arguments.yaml"
    try:
        arguments = read_arguments(values=values)
    except ArgumentsError:
        reject()  # the tests of the rules look at what is refused
    write_arguments(arguments, path)
    again = read_arguments(path)
    secret = dict.fromkeys(SECRETS)
    assert again.model == dataclasses.replace(arguments.model, token=None)
    assert again.data == arguments.data
    assert again.peft == arguments.peft
    assert again.training == {name: value for name, value in arguments.training.items() if name not in secret}
    assert again.notices == []
    write_arguments(again, path.with_name("again.yaml"))
    assert path.with_name("again.yaml").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        {"adapter_name_or_path": "old", "use_lora": True},
        {"adapter_name_or_path": "old"},
        {"line_by_line": True},
        {"use_lora": True, "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        {"use_lora": True, "load_in_8bit": True, "llm_int8_threshold": 0},
        {"do_eval": False},
        {"early_stopping_patience": 2, "eval_steps": 10},
        {"resume_from_checkpoint": True},
        {"report_to": ["tensorboard", "wandb"], "lr_scheduler_kwargs": {"min_lr": 1e-6, "mode": "max"}},
        {"run_name": "a\x85b\u2028c: #d", "project": "Žluťoučký 漢字"},
    ],
)
def test_resolved_arguments_stand_the_rules_when_they_are_read_again(tmp_path, values):
    arguments = read_arguments(values=BASE | values)
    write_arguments(arguments, tmp_path / "a.yaml")
    assert groups(read_arguments(tmp_path / "a.yaml")) == groups(arguments)
