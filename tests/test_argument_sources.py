"""Files and flags, before any value has a type."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from peft_mlm.argument_sources import read_file, read_flags, ungroup
from peft_mlm.argument_types import parse_type

TYPES = {
    "use_lora": parse_type("bool"),
    "lora_r": parse_type("int"),
    "learning_rate": parse_type("float"),
    "no_cuda": parse_type("bool"),
    "lora_target_modules": parse_type("list[str] | None"),
    "rank_pattern": parse_type("dict[str, int] | None"),
    "run_name": parse_type("str | None"),
}


def flags(*words):
    return read_flags(words, TYPES.get)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lora_r", "16"], {"lora_r": "16"}),
        (["--lora_r=16"], {"lora_r": "16"}),
        (["--lora-r", "16"], {"lora_r": "16"}),
        (["--learning_rate", "-1e-3"], {"learning_rate": "-1e-3"}),
        (["--learning_rate", "-.5"], {"learning_rate": "-.5"}),
        (["--learning_rate", "-inf"], {"learning_rate": "-inf"}),
        (["--use_lora"], {"use_lora": True}),
        (["--use_lora", "--lora_r", "4"], {"use_lora": True, "lora_r": "4"}),
        (["--use_lora", "false"], {"use_lora": "false"}),
        (["--no_use_lora"], {"use_lora": False}),
        (["--no-use-lora"], {"use_lora": False}),
        (["--no_cuda"], {"no_cuda": True}),
        (["--no_no_cuda"], {"no_cuda": False}),
        (["--lora_target_modules", "query", "value"], {"lora_target_modules": ["query", "value"]}),
        (["--lora_target_modules", "query,", "value"], {"lora_target_modules": ["query", "value"]}),
        (["--lora_target_modules", "query,value"], {"lora_target_modules": "query,value"}),
        (["--rank_pattern", '{"query": 16}'], {"rank_pattern": '{"query": 16}'}),
        (["--run_name="], {"run_name": ""}),
        (["--run_name=--odd=name"], {"run_name": "--odd=name"}),
        (["--run_name", "two words"], {"run_name": "two words"}),
        ([], {}),
    ],
)
def test_flags_are_read(words, expected):
    assert flags(*words) == (expected, [], set())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config.yaml"], "'config.yaml' belongs to no flag"),
        (["-r", "8"], "'-r' belongs to no flag (flags are written with two dashes)"),
        (["--lora_r"], "--lora_r needs a value"),
        (["--lora_r", "--use_lora"], "--lora_r needs a value"),
        (["--lora_r", "8", "9"], "--lora_r takes one value, but has 2: '8 9'"),
        (["--lora_r", "8", "--lora-r", "8"], "--lora_r is given more than once"),
        (["--use_lora", "--no_use_lora"], "--use_lora is given more than once"),
        (["--no_use_lora", "true"], "--no_use_lora takes no value"),
        (["--use_lora=true", "x"], "'x' belongs to no flag"),
        (["--", "x"], "'--' belongs to no flag"),
    ],
)
def test_flags_that_cannot_be_meant_are_faults(words, said):
    _, faults, _ = flags(*words)
    assert any(said in fault for fault in faults)


def test_a_flag_is_never_completed():
    values, faults, _ = flags("--lora", "8", "--no_lora")
    assert set(values) == {"lora", "no_lora"}  # unknown names, for the caller to refuse
    assert faults == []


TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
NESTED = st.recursive(
    st.none() | st.booleans() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8
)
NAMES = TEXTS.filter(lambda name: name not in ("model", "data", "peft", "training"))


@given(values=st.dictionaries(NAMES, NESTED))
def test_json_gives_back_texts_booleans_lists_and_mappings(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert read_file(path) == values


def booleans_as_text(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return [booleans_as_text(item) for item in value]
    if isinstance(value, dict):
        return {name: booleans_as_text(item) for name, item in value.items()}
    return value


@given(values=st.dictionaries(NAMES, NESTED))
def test_yaml_gives_back_texts_lists_and_mappings(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("yaml") / "a.yml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert read_file(path) == booleans_as_text(values)


@pytest.mark.parametrize(
    "spelling", ["5e-5", "1.10", "0x10", "010", "1_000", "no", "on", "2024-01-01", "1:30", "1e400"]
)
def test_yaml_scalars_stay_as_they_are_spelled(tmp_path, spelling):
    path = tmp_path / "a.yaml"
    path.write_text(f"x: {spelling}\n")
    assert read_file(path) == {"x": spelling}


@pytest.mark.parametrize("spelling", ["5e-5", "1.10", "1e400", "NaN", "12345678901234567890123"])
def test_json_numbers_stay_as_they_are_spelled(tmp_path, spelling):
    path = tmp_path / "a.json"
    path.write_text(f'{{"x": {spelling}}}')
    assert read_file(path) == {"x": spelling}


@pytest.mark.parametrize("spelling", ["null", "~", ""])
def test_yaml_null_is_none(tmp_path, spelling):
    path = tmp_path / "a.yaml"
    path.write_text(f"x: {spelling}\n")
    assert read_file(path) == {"x": None}


def test_yaml_anchors_are_followed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &one [x, y]\nb: *one\n")
    assert read_file(path) == {"a": ["x", "y"], "b": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", "a: 1\na: 2\n", "a is given twice"),
        ("a.yaml", "x:\n  a: 1\n  a: 2\n", "in the mapping at line 2, a is given twice"),
        ("a.yaml", "a: [1\n", "is not YAML"),
        ("a.yaml", "- a\n", "holds a list, not a mapping"),
        ("a.yaml", "", "holds nothing, not a mapping"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "is not YAML"),
        ("a.yaml", "a: !!python/name:os.system x\n", "line 1: the tag tag:yaml.org,2002:python/name:os.system"),
        ("a.yaml", "a: !!python/object/apply:os.system [x]\n", "the tag tag:yaml.org,2002:python/object/apply"),
        ("a.yaml", "? [a, b]\n: 1\n", "a name must be text"),
        ("a.yaml", "a: &x [*x]\n", "a.yaml"),
        ("a.json", '{"a": 1, "a": 2}', "a is given twice"),
        ("a.json", '{"a": 1,}', "is not JSON"),
        ("a.json", "[1]", "holds a list, not a mapping"),
        ("a.json", "", "is not JSON"),
        ("a.txt", "a: 1", "must end in .json, .yaml or .yml"),
        ("a", "a: 1", "must end in .json, .yaml or .yml"),
    ],
)
def test_files_that_hold_something_else_are_refused_by_name(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^.*a(\.\w+)?\b") as caught:
        read_file(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"b\.yaml does not exist"):
        read_file(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").mkdir()
    with pytest.raises(ValueError, match=r"c\.yaml cannot be read"):
        read_file(tmp_path / "c.yaml")
    (tmp_path / "d.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"d\.json is not UTF-8 text \(byte 7\)"):
        read_file(tmp_path / "d.json")


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    for name, text in (("a.yaml", "a: b\n"), ("a.json", '{"a": "b"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_file(tmp_path / name) == {"a": "b"}


def test_groups_are_lifted():
    assert ungroup({"model": {"a": 1}, "peft": {"b": 2}, "c": 3, "training": {}}) == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(ValueError, match="a is given twice"):
        ungroup({"model": {"a": 1}, "a": 2})
    with pytest.raises(ValueError, match="the name 1 is not text"):
        ungroup({1: 2})
