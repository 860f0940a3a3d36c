from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import peft_mlm
from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.loading import find_adapter, load, load_target, resolve_target
from tests.hub_server import Hub
from tests.tiny import same, save_base

pytest_plugins = ["tests.hub_fixture"]

IDS = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
ON_THE_HUB = """
import json, sys
import torch
import peft_mlm
from peft_mlm.errors import PeftMlmError
torch.set_num_threads(1)  # as here, so that sums are made in the same order
ids = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
results = []
for call in json.loads(sys.argv[1]):
    try:
        results.append(peft_mlm.load(**call).model(input_ids=ids).logits.tolist())
    except PeftMlmError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS).logits)


def train(base: Path | str, text: Path | str, output_dir: Path | str, **changes: Any) -> Path:
    arguments = {
        "model_name_or_path": base,
        "train_file": text,
        "output_dir": output_dir,
        "use_lora": True,
        "max_steps": 6,
        "eval_steps": 3,
        "learning_rate": 1e-2,
        **changes,
    }
    return peft_mlm.train(arguments).run_folder


@pytest.fixture(scope="module")
def run(base_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base_folder, text_file, tmp_path_factory.mktemp("loading") / "run")


@pytest.fixture(scope="module")
def full_run(base_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base_folder, text_file, tmp_path_factory.mktemp("loading") / "full", use_lora=False)


@pytest.fixture(scope="module")
def expected(run: Path, base_folder: Path) -> torch.Tensor:
    """The logits of base and adapter, put together by PEFT alone."""
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    return logits(PeftModel.from_pretrained(base, str(run / "adapter")))


def copy_adapter(run: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(run / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_run_its_adapter_and_its_last_checkpoint_are_the_same_model(
    run: Path, base_folder: Path, expected: torch.Tensor
) -> None:
    for place in (run, run / "adapter", run / "checkpoints" / "checkpoint-6"):
        loaded = load(str(place))
        assert same(logits(loaded.model), expected), place
        assert not loaded.model.training
        assert loaded.tokenizer.mask_token == "<mask>"
    assert not torch.equal(logits(load(str(run / "checkpoints" / "checkpoint-3")).model), expected)
    base = AutoModelForMaskedLM.from_pretrained(base_folder)
    for place in (run, run / "adapter", run / "checkpoints" / "checkpoint-3"):
        assert same(logits(load_target(resolve_target(str(place), part="base")).model), logits(base)), place


def test_a_target_tells_what_it_is_and_which_run_it_belongs_to(run: Path, full_run: Path, base_folder: Path) -> None:
    for place, kind, adapter, of_run in (
        (run, "run", run / "adapter", run),
        (run / "adapter", "adapter", run / "adapter", run),
        (run / "checkpoints" / "checkpoint-3", "adapter", run / "checkpoints" / "checkpoint-3", run),
        (full_run, "run", None, full_run),
        (full_run / "model", "model", None, full_run),
        (full_run / "checkpoints" / "checkpoint-3", "model", None, full_run),
        (base_folder, "model", None, None),
    ):
        target = resolve_target(str(place))
        assert (target.kind, target.adapter, target.run) == (kind, adapter, of_run), place
        assert (target.arguments is None) == (of_run is None)


def test_a_fully_trained_model_is_loaded_from_the_run(full_run: Path, base_folder: Path) -> None:
    trained = load_file(full_run / "model" / "model.safetensors")
    for place in (full_run, full_run / "model", full_run / "checkpoints" / "checkpoint-6"):
        weights = load(str(place)).model.state_dict()
        assert all(torch.equal(weights[name], trained[name]) for name in trained), place
    base = logits(AutoModelForMaskedLM.from_pretrained(base_folder))
    assert same(logits(load_target(resolve_target(str(full_run), part="base")).model), base)


def test_a_run_that_was_started_with_relative_paths_is_found_from_anywhere(
    base_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "away").mkdir()
    shutil.copytree(base_folder, tmp_path / "project" / "base")
    shutil.copy(text_file, tmp_path / "project" / "text.txt")
    monkeypatch.chdir(tmp_path / "project")
    train("base", "text.txt", "runs/one")
    here = logits(load("runs/one").model)
    figures = peft_mlm.evaluate("runs/one")
    monkeypatch.chdir(tmp_path / "away")
    for place in (
        tmp_path / "project" / "runs" / "one",
        Path("../project/runs/one"),
        Path("../project/runs/one/adapter"),
    ):
        assert same(logits(load(str(place)).model), here), place
    assert peft_mlm.evaluate("../project/runs/one")["loss"] == figures["loss"]
    monkeypatch.chdir(tmp_path / "project" / "runs" / "one")
    for name in ("adapter", "checkpoints/checkpoint-6", "."):
        assert same(logits(load(name).model), here), name
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    for name in ("~/runs/one", "~/runs/one/adapter"):
        assert same(logits(load(name).model), here), name
    assert same(logits(load("~/base").model), logits(AutoModelForMaskedLM.from_pretrained(base_folder)))


def test_a_name_on_the_hub_is_not_taken_for_a_folder_of_the_run_one_stands_in(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert resolve_target("org/model").run is None
    assert resolve_target("model").run is None


def test_a_moved_adapter_is_loaded_with_the_base_that_is_named(
    run: Path, base_folder: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    for name in ("base", "no_such_base", None):
        adapter = copy_adapter(run, tmp_path / f"{name}", base_model_name_or_path=name)
        assert same(logits(load(str(adapter), base=str(base_folder)).model), expected)
    adapter = copy_adapter(run, tmp_path / "recorded", base_model_name_or_path=str(base_folder))
    assert same(logits(load(str(adapter)).model), expected)
    with pytest.raises(ModelError, match=r"no_such_base is the base that the adapter names.* --base"):
        load(str(tmp_path / "no_such_base"))
    with pytest.raises(AdapterError, match=r"does not name its base model\. Give it with --base"):
        load(str(tmp_path / "None"))


def test_a_run_whose_base_has_moved_says_where_it_looked(
    base_folder: Path, text_file: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    train(base, text_file, tmp_path / "run")
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=rf"no folder {tmp_path}/base.*is the base that the run names.* --base"):
        load(str(tmp_path / "run"))
    moved = load(str(tmp_path / "run"), base=str(tmp_path / "moved"))
    assert same(logits(moved.model), expected)


def test_a_run_that_has_saved_nothing_yet_is_told_apart(run: Path, tmp_path: Path, expected: torch.Tensor) -> None:
    early = shutil.copytree(run, tmp_path / "early")
    shutil.rmtree(early / "adapter")
    with pytest.raises(ModelError, match="neither adapter nor model yet"):
        load(str(early))
    assert same(logits(load(str(early / "checkpoints" / "checkpoint-6")).model), expected)


def test_weights_are_held_in_float32_whatever_the_file_holds(base_folder: Path, tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for file in base_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert {p.dtype for p in load(str(tmp_path)).model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", b"{", "damaged"),
        ("adapter_config.json", b"{}", "damaged"),
        ("adapter_config.json", b"[1]", "damaged"),
        ("adapter_model.safetensors", b"", "does not fit"),
        ("adapter_model.safetensors", b"x" * 100, "does not fit"),
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors"),
    ],
)
def test_a_damaged_adapter_is_refused(
    file: str, content: bytes | None, said: str, run: Path, base_folder: Path, tmp_path: Path
) -> None:
    adapter = copy_adapter(run, tmp_path / "adapter")
    (adapter / file).unlink()
    if content is not None:
        (adapter / file).write_bytes(content)
    with pytest.raises(AdapterError, match=said):
        load(str(adapter), base=str(base_folder))


def test_a_base_of_other_sizes_is_refused(run: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "wide", hidden_size=48)
    with pytest.raises(AdapterError, match="does not fit the base model"):
        load(str(run), base=str(base))


def test_a_whole_model_takes_no_base(full_run: Path, base_folder: Path) -> None:
    for place in (base_folder, full_run, full_run / "model"):
        with pytest.raises(ModelError, match="Leave --base out"):
            resolve_target(str(place), base=str(base_folder))
    with pytest.raises(ModelError, match="Leave --use_base out"):
        resolve_target(str(base_folder), part="base")


def test_an_adapter_is_found_in_its_folder_or_its_run(run: Path, base_folder: Path) -> None:
    assert find_adapter(str(run)) == run / "adapter"
    assert find_adapter(str(run / "adapter")) == run / "adapter"
    for place in (str(base_folder), "/no/such/folder", "nobody/nothing"):
        with pytest.raises(AdapterError, match="is no adapter"):
            find_adapter(place)


def test_adapter_and_base_are_fetched_from_the_hub_at_the_recorded_commit(
    hub: Hub, run: Path, base_folder: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    commit = hub.publish("models", "org/base", base_folder)
    hub.publish("models", "org/base", save_base(tmp_path / "newer", seed=7))
    named = {"base_model_name_or_path": "org/base", "revision": commit}
    hub.publish("models", "me/adapter", copy_adapter(run, tmp_path / "adapter", **named))
    calls = [
        {"name_or_path": "me/adapter"},
        {"name_or_path": str(tmp_path / "adapter")},
        {"name_or_path": "org/base"},
        {"name_or_path": "me/adapter", "base": "org/base"},
        {"name_or_path": "me/nothing"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_HUB, json.dumps(calls)], env=hub.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    by_name, by_folder, newest, other_base, nothing = json.loads(done.stdout)
    assert torch.allclose(torch.tensor(by_name), expected, rtol=0, atol=1e-5)
    assert by_folder == by_name
    assert torch.equal(torch.tensor(newest), logits(AutoModelForMaskedLM.from_pretrained(tmp_path / "newer")))
    assert other_base not in (by_name, newest)
    assert "me/nothing" in nothing
    # A name that is no adapter's is not asked for the adapter's other files.
    assert not [path for _, path, _ in hub.requests if path.startswith("/org/base/") and "adapter_model" in path]
    assert not [path for _, path, _ in hub.requests if path.startswith("/me/nothing/") and "adapter_model" in path]


def test_a_revision_behind_a_hub_name_is_parted_from_it_but_not_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, parted in (("org/a@v1", ("org/a", "v1")), ("bert@refs/pr/3", ("bert", "refs/pr/3")), ("org/a", None)):
        target = resolve_target(name)
        named = (target.base.model_name_or_path, target.base.model_revision)
        assert named == (parted or (name, "main"))
    save_base(tmp_path / "org" / "a@v1")
    assert resolve_target("org/a@v1").base.model_name_or_path == "org/a@v1"
    assert resolve_target("./org/a@v1").base.model_name_or_path == "./org/a@v1"
