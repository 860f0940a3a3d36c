"""Values of every type, from every spelling."""

import enum
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_mlm.argument_types import ArgumentType, convert, describe_type, parse_type, split_list

NAMES = st.from_regex(r"[a-z][a-z_.]{0,12}", fullmatch=True).filter(lambda name: name not in ("none", "null"))
# A value of the type of an annotation, as Python code would give it.
VALUES = {
    "bool": st.booleans(),
    "int": st.integers(-(2**60), 2**60),
    "float": st.floats(allow_nan=False),
    "str": st.text(),
    "bool | None": st.none() | st.booleans(),
    "int | None": st.none() | st.integers(-(2**60), 2**60),
    "float | None": st.none() | st.floats(allow_nan=False),
    "str | None": st.none() | NAMES,
    "list[str] | None": st.none() | st.lists(st.text()),
    "list[int] | None": st.none() | st.lists(st.integers(-(2**60), 2**60)),
    "dict[str, int] | None": st.none() | st.dictionaries(st.text(), st.integers(-(2**60), 2**60)),
    "dict[str, float] | None": st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False)),
    "None | str | list[str]": st.none() | NAMES | st.lists(st.text()),
    "str | bool": st.booleans() | NAMES.filter(lambda name: name not in ("true", "false")),
    'Literal["auto", "float32"]': st.sampled_from(["auto", "float32"]),
    "dict | str | None": st.none()
    | NAMES
    | st.dictionaries(
        NAMES, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES
    ),
}


@pytest.mark.parametrize("annotation", VALUES)
@given(data=st.data())
def test_a_value_of_its_type_stays_as_it_is(annotation, data):
    value = data.draw(VALUES[annotation])
    converted = convert(value, parse_type(annotation))
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize("annotation", VALUES)
@given(data=st.data())
def test_text_that_json_would_write_gives_the_same_value(annotation, data):
    value = data.draw(VALUES[annotation])
    text = value if isinstance(value, str) else json.dumps(value)
    assert convert(text, parse_type(annotation)) == value


@pytest.mark.parametrize("annotation", VALUES)
@given(text=st.text() | st.sampled_from(["", "a,b", "[1]", "{}", "none", "5e-5", "true", "3.0", ".inf", "1_000", "[a"]))
def test_converting_twice_is_converting_once(annotation, text):
    kind = parse_type(annotation)
    try:
        once = convert(text, kind)
    except ValueError:
        return
    assert convert(once, kind) == once


@pytest.mark.parametrize(
    ("annotation", "given_value", "expected"),
    [
        ("float", "5e-5", 5e-5),
        ("float", "0.1", 0.1),
        ("float", " 1 ", 1.0),
        ("float", 1, 1.0),
        ("float", ".inf", math.inf),
        ("float", "1_000", 1000.0),
        ("float", np.float32(0.5), 0.5),
        ("int", "512", 512),
        ("int", "-3", -3),
        ("int", 3.0, 3),
        ("int", "3.0", 3),
        ("int", "1e3", 1000),
        ("int", "1_000", 1000),
        ("int", np.int64(7), 7),
        ("bool", "yes", True),
        ("bool", "Off", False),
        ("bool", "1", True),
        ("bool", 0, False),
        ("str", 5, "5"),
        ("str", True, "true"),
        ("str", Path("a/b"), "a/b"),
        ("str | None", "None", None),
        ("str | None", "null", None),
        ("ParallelismConfig | None", "None", None),
        ("list[str] | None", "query", ["query"]),
        ("list[str] | None", "query, value", ["query", "value"]),
        ("list[str] | None", "query,value,", ["query", "value"]),
        ("list[str] | None", '["a,b", "c"]', ["a,b", "c"]),
        ("list[str] | None", "[ab]*.txt", ["[ab]*.txt"]),
        ("list[str] | None", "layer.{1,2},head", ["layer.{1,2}", "head"]),
        ("list[str] | None", Path("a,b.txt"), ["a,b.txt"]),
        ("list[str] | None", [Path("a"), "b"], ["a", "b"]),
        ("list[str] | None", ("a", "b"), ["a", "b"]),
        ("list[int] | None", "0,1", [0, 1]),
        ("list[int] | None", 3, [3]),
        ("dict[str, int] | None", '{"query": "16"}', {"query": 16}),
        ("dict[str, int] | None", {"query": 16.0}, {"query": 16}),
        ("dict | str | None", "config.json", "config.json"),
        ("dict | str | None", '{"min_lr": "1e-6", "power": 2}', {"min_lr": 1e-6, "power": 2}),
        ("str | bool", "no", "no"),
        ("str | bool", "True", True),
        ("str | None | Literal[False]", "false", False),
        ("None | str | list[str]", "a,b", ["a", "b"]),
        ("None | str | list[str]", "a", "a"),
        ('Literal["no", "steps"]', False, "no"),
        ('Literal["no", "steps"]', "STEPS", "steps"),
        ('Literal["true", "gaussian"]', True, "true"),
    ],
)
def test_spellings(annotation, given_value, expected):
    converted = convert(given_value, parse_type(annotation))
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "given_value", "said"),
    [
        ("int", 3.5, "3.5 is not a whole number"),
        ("int", "3.5", "'3.5' is not a whole number"),
        ("int", "abc", "'abc' is not a whole number"),
        ("int", True, "true is not a whole number"),
        ("int", None, "none (null) is not a whole number"),
        ("int", "none", "'none' is not a whole number"),
        ("int", "inf", "'inf' is not a whole number"),
        ("int", [1], "[1] is not a whole number"),
        ("float", "nan", "'nan' is not a number"),
        ("float", math.nan, "nan is not a number"),
        ("float", "", "'' is not a number"),
        ("float", 10**400, "too large a number"),
        ("bool", "maybe", "'maybe' is not true or false"),
        ("bool", 2, "2 is not true or false"),
        ("bool | None", "x", "'x' is not true or false or none"),
        ("str", ["a"], "['a'] is not text"),
        ("str", b"a", "is a bytes"),
        ("list[int] | None", "1,x", "'x' is not a whole number"),
        ("list[str] | None", {"a": 1}, "is not a list"),
        ("dict[str, int] | None", '{"a": ', "is not JSON"),
        ("dict[str, int] | None", '{"a": "x"}', "the value of a, 'x' is not a whole number"),
        ("dict[str, int] | None", {1: 2}, "has the name 1, which is not text"),
        ("dict[str, int] | None", "query", "'query' is not a mapping"),
        ('Literal["no", "steps"]', "step", "'step' is not one of no, steps"),
        ('Literal["no", "steps"]', True, "true is not one of no, steps"),
        ("ParallelismConfig | None", "x", "a ParallelismConfig cannot be written as an argument"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_it_is_and_what_it_should_be(annotation, given_value, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        convert(given_value, parse_type(annotation))


def test_a_member_of_an_enumeration_counts_as_its_value():
    class Strategy(enum.Enum):
        NO = "no"

    assert convert(Strategy.NO, parse_type("IntervalStrategy | str", {"IntervalStrategy": ("no", "steps")})) == "no"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Optional[int]", "int | None"),
        ("typing.Optional[typing.List[str]]", "list[str] | None"),
        ("Union[str, Dict[str, Any], None]", "str | dict[str, Any] | None"),
        ("'float'", "float"),
        ("dict", "dict[str, Any]"),
    ],
)
def test_older_annotations_mean_the_same(one, other):
    assert parse_type(one) == parse_type(other)


def test_an_enumeration_beside_text_allows_its_values_only():
    kind = parse_type("SchedulerType | str", {"SchedulerType": ("linear", "cosine")})
    assert kind == ArgumentType(choices=("linear", "cosine"))
    assert describe_type(kind) == "one of linear, cosine"


@given(st.lists(st.from_regex(r"[a-z.]{1,6}(\{[0-9],[0-9]\})?", fullmatch=True)))
def test_a_joined_list_splits_into_its_parts(parts):
    assert split_list(", ".join(parts)) == parts
