"""The table of all arguments, read from source text, against the classes themselves."""

import dataclasses
import subprocess
import sys

import pytest

from peft_mlm.argument_fields import GROUPS, OWN_GROUPS, argument_fields, render_help
from peft_mlm.argument_types import convert, describe_type


def test_the_training_fields_equal_those_of_the_real_class():
    from transformers import TrainingArguments

    read = {name: field for name, field in argument_fields().items() if field.group == "training"}
    real = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    assert list(read) == list(real)
    for name, field in read.items():
        expected = real[name].default
        if expected is dataclasses.MISSING:
            expected = real[name].default_factory()
        if field.default is dataclasses.MISSING:
            assert name == "optim"
        else:
            assert field.default == expected
            assert type(field.default) is type(expected)
        assert field.help == real[name].metadata["help"].replace("%%", "%")


def test_the_choices_of_the_training_fields_are_those_of_transformers():
    from transformers import trainer_utils, training_args

    fields = argument_fields()
    for name, enumeration in {
        "optim": training_args.OptimizerNames,
        "lr_scheduler_type": trainer_utils.SchedulerType,
        "eval_strategy": trainer_utils.IntervalStrategy,
        "logging_strategy": trainer_utils.IntervalStrategy,
        "save_strategy": trainer_utils.SaveStrategy,
        "hub_strategy": trainer_utils.HubStrategy,
    }.items():
        assert fields[name].choices == tuple(member.value for member in enumeration)
    assert set(fields["log_level"].choices) == set(training_args.trainer_log_levels)
    assert set(fields["log_level_replica"].choices) == set(training_args.trainer_log_levels)


def test_flags_that_transformers_lets_stand_alone_may_be_booleans():
    from transformers import TrainingArguments

    alone = {field.name for field in dataclasses.fields(TrainingArguments) if field.metadata.get("const") is True}
    assert "fsdp" in alone
    assert all(argument_fields()[name].type.boolean for name in alone)


def test_our_own_fields_equal_those_of_the_dataclasses():
    for group, cls in OWN_GROUPS.items():
        read = {name: field.default for name, field in argument_fields().items() if field.group == group}
        assert read == dataclasses.asdict(cls())


def test_no_name_belongs_to_two_groups():
    from transformers import TrainingArguments

    names = [field.name for cls in (*OWN_GROUPS.values(), TrainingArguments) for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("field", argument_fields().values(), ids=lambda field: field.name)
def test_every_argument_has_a_type_a_help_and_a_default_of_that_type(field):
    assert field.help
    assert describe_type(field.type)
    if field.default is not dataclasses.MISSING:
        assert convert(field.default, field.type) == field.default


def test_none_means_the_default_wherever_it_is_allowed():
    # So that arguments which are None need not be written down.
    assert [field.name for field in argument_fields().values() if field.type.none and field.default is not None] == []


@pytest.mark.parametrize("group", GROUPS)
def test_the_help_of_a_group_names_each_of_its_arguments_once_and_no_other(group):
    lines = render_help([group], {}).splitlines()
    named = [line.split()[0][2:] for line in lines if line.startswith("  --")]
    assert named == [name for name, field in argument_fields().items() if field.group == group]
    assert all(len(line) <= 100 for line in lines if not line.startswith("  --"))


def test_help_prefers_the_defaults_it_is_told():
    assert "--eval_steps NUMBER  (default: a fifth)" in render_help(["training"], {"eval_steps": "a fifth"})


def test_reading_the_fields_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from peft_mlm.argument_fields import *; argument_fields(); render_help(GROUPS, {});"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
