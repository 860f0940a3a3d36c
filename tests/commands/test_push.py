"""`peft-mlm push` against a hub on loopback: what goes up, what is refused, and what happens when the hub fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_mlm
from tests.commands.conftest import Answer
from tests.commands.test_inspect import Bomb
from tests.hub_server import Fault, Hub

pytest_plugins = ["tests.hub_fixture"]

Command = Callable[..., Answer]
# The clients wait between their attempts; here nobody has to.
PUSH = """
import sys, time
time.sleep = lambda seconds: None
from peft_mlm.cli import main
sys.exit(main(sys.argv[1:]))
"""
PUSH_AT_THE_END = """
import sys, time
from pathlib import Path
from peft_mlm.commands.train import Destination, RunFolder, _push
from peft_mlm.errors import HubError
time.sleep = lambda seconds: None
try:
    _push(RunFolder(Path(sys.argv[1])), Destination(sys.argv[2]), {"status": "finished"})
except HubError as error:
    print(error)
"""
LOAD = """
import sys, torch
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForMaskedLM
import peft_mlm
base, name, revision = sys.argv[1:]
ids = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
with torch.no_grad():
    plain = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), name, revision=revision).eval()
    ours = peft_mlm.load(name, base=base).model if revision == "main" else plain
    print(float(plain(input_ids=ids).logits.sum()), float(ours(input_ids=ids).logits.sum()))
"""


def push(hub: Hub, *words: object, token: str | None = "hf_writer", **environment: str) -> Answer:
    return run(hub, "push", *words, token=token, **environment)


def run(hub: Hub, *words: object, token: str | None = "hf_writer", **environment: str) -> Answer:
    env = {**hub.env, "PYTHONPATH": str(Path(peft_mlm.__file__).parent.parent), "OMP_NUM_THREADS": "1", **environment}
    env |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, *map(str, words)], env=env, capture_output=True, text=True, timeout=100
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def open_hub(hub: Hub) -> Hub:
    """A hub with a token that may write, and one that may only read."""
    hub.writers.add("hf_writer")
    hub.tokens.add("hf_reader")
    return hub


@pytest.fixture
def adapter(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained adapter, to be spoilt."""
    return shutil.copytree(trained_run / "adapter", tmp_path / "adapter")


def files_of(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos["models", name]
    return repo.revisions[repo.branches[branch]]


def test_a_run_is_pushed_and_loaded_by_its_name(trained_run: Path, base_folder: Path, open_hub: Hub) -> None:
    record = push(open_hub, trained_run, "org/notes", "--json").record
    folder = trained_run / "adapter"
    there = files_of(open_hub, "org/notes")
    assert set(there) - {".gitattributes"} == set(record["files"]) == {file.name for file in folder.iterdir()}
    for name in set(record["files"]) - {"README.md"}:
        assert there[name] == (folder / name).read_bytes()
    assert there["README.md"].decode() == (folder / "README.md").read_text().replace("THIS_FOLDER", "org/notes")
    assert record["commit"] == open_hub.repos["models", "org/notes"].branches["main"]
    assert record["left_out"] == []
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(base_folder), "org/notes", "main"],
        env={**open_hub.env, "PYTHONPATH": str(Path(peft_mlm.__file__).parent.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids = torch.tensor([[0, 7, 4, 9, 10, 4, 12, 13, 2]])
    with torch.no_grad():
        expected = float(peft_mlm.load(str(trained_run)).model(input_ids=ids).logits.sum())
    assert [float(word) for word in done.stdout.split()] == [pytest.approx(expected, rel=1e-5)] * 2


def test_a_private_repository_a_branch_and_a_message(full_run: Path, open_hub: Hub) -> None:
    words = ["--private", "--revision", "v1", "--commit_message", "first try"]
    shown = push(open_hub, full_run, "org/model", *words)
    assert shown.code == 0, shown.err
    assert "pushed to org/model, branch v1" in shown.out
    repo = open_hub.repos["models", "org/model"]
    assert repo.private
    assert "model.safetensors" in files_of(open_hub, "org/model", "v1")
    assert "model.safetensors" not in files_of(open_hub, "org/model")
    open_hub.publish("models", "org/public", {"README.md": "x"})
    assert "exists and is public" in push(open_hub, full_run, "org/public", "--private").fault
    assert set(files_of(open_hub, "org/public")) == {"README.md"}


def test_adapters_and_bases_are_loaded_by_name_and_revision_and_again_offline(
    trained_run: Path, base_folder: Path, other_base: Path, open_hub: Hub
) -> None:
    commit = open_hub.publish("models", "org/base", base_folder)
    open_hub.publish("models", "org/base", other_base)
    assert push(open_hub, trained_run, "org/a", "--revision", "v1").code == 0
    expected = peft_mlm.fill_mask(str(trained_run), "ABC<mask>EF")
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        words = ["fill-mask", "org/a@v1", "ABC<mask>EF", "--base", f"org/base@{commit}", "--json"]
        (given,) = run(open_hub, *words, token=None, **environment).record["results"]
        assert given["filled"] == expected[0]["filled"]
        probabilities = [[p["probability"] for p in r["masks"][0]["predictions"]] for r in (given, expected[0])]
        assert probabilities[0] == pytest.approx(probabilities[1], rel=1e-5)
    newest = run(open_hub, "fill-mask", "org/a@v1", "ABC<mask>EF", "--base", "org/base", token=None)
    assert "org/base is not the base" in newest.fault
    assert "hf download org/a --local-dir a" in run(open_hub, "inspect", "org/a", token=None).fault


def test_pushed_again_it_stays_as_it_is(adapter: Path, open_hub: Hub) -> None:
    first = push(open_hub, adapter, "org/a", "--json").record
    again = push(open_hub, adapter, "org/a", "--json").record
    assert (first["commit"], first["changed"], again["changed"]) == (again["commit"], True, False)
    assert "nothing new" in push(open_hub, adapter, "org/a").out


def test_a_base_that_others_do_not_have_is_told(adapter: Path, command: Command) -> None:
    assert "The base was taken from a folder" in (adapter / "README.md").read_text()
    (notice,) = command("push", adapter, "org/a", "--dry_run", "--json").record["notices"]
    assert "The card names no base on the hub" in notice
    assert notice in command("push", adapter, "org/a", "--dry_run").out
    card = (adapter / "README.md").read_text().replace("---\n", "---\nbase_model: org/base\n", 1)
    (adapter / "README.md").write_text(card)
    assert command("push", adapter, "org/a", "--dry_run", "--json").record["notices"] == []
    (adapter / "README.md").unlink()
    assert "no card" in command("push", adapter, "org/a", "--dry_run", "--json").record["notices"][0]


def test_a_dry_run_needs_no_network_and_tells_what_would_go_up(adapter: Path, command: Command) -> None:
    (adapter / "checksums.json").unlink()
    (adapter / "notes.txt").write_text("mine")
    record = command("push", adapter, "org/a", "--dry_run", "--json").record
    assert record["left_out"] == ["notes.txt"]
    assert record["commit"] is None
    assert record["bytes"] == sum((adapter / name).stat().st_size for name in record["files"])
    assert "would push to org/a" in command("push", adapter, "org/a", "--dry_run").out


def test_what_should_not_leave_the_machine_is_refused(adapter: Path, tmp_path: Path, command: Command) -> None:
    config = adapter / "adapter_config.json"
    (adapter / "checksums.json").unlink()
    whole = config.read_text()

    def fault() -> str:
        return command("push", adapter, "org/a", "--dry_run").fault

    config.write_text(json.dumps({**json.loads(whole), "base_model_name_or_path": "/home/ann/base"}))
    assert "adapter_config.json holds a local path (/home/ann/base)" in fault()
    config.write_text(json.dumps({**json.loads(whole), "task_type": "hf_abcdefghijABCDEFGHIJ12345"}))
    assert "adapter_config.json holds a token (hf_abc...)" in fault()
    assert "ABCDEFGHIJ12345" not in fault()
    config.write_text(whole)
    (adapter / "adapter_model.bin").write_bytes(b"x")
    assert "adapter_model.bin" in fault()
    assert "is a pickle" in fault()
    (adapter / "adapter_model.bin").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 50)
    assert "is not sound" in fault()


@pytest.mark.usefixtures("untouched")
def test_mistakes_are_found_before_anything_is_sent(
    trained_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("notes", "org/", "org/a/b", "org/a b", "../x", "org/a--b"):
        assert "is no name of a repository" in command("push", trained_run, name).fault
    assert "is no name of a branch" in command("push", trained_run, "org/a", "--revision", "a b").fault
    assert "does not exist" in command("push", tmp_path / "none", "org/a").fault
    assert "is a checkpoint" in command("push", trained_run / "checkpoints/checkpoint-15", "org/a", "--dry_run").fault
    assert "the offline mode is on (HF_HUB_OFFLINE)" in command("push", trained_run, "org/a").fault


def test_offline_and_without_a_token_nothing_is_asked(trained_run: Path, open_hub: Hub) -> None:
    assert "the offline mode is on" in push(open_hub, trained_run, "org/a", HF_HUB_OFFLINE="1").fault
    assert "There is no token" in push(open_hub, trained_run, "org/a", token=None).fault
    assert open_hub.requests == []


@pytest.mark.parametrize(
    ("token", "faults", "said"),
    [
        ("hf_wrong", [], "does not accept the token for org/a (401). It is that of HF_TOKEN: set another one"),
        ("hf_reader", [], "has no right to write to org/a (403). Take one with write access to org, or push to"),
        ("hf_writer", [Fault("commit", 403)], "has no right to write to org/a (403)"),
        ("hf_writer", [Fault("preupload", 404)], "knows no org/a that this token may write to (404). Look at the name"),
        ("hf_writer", [Fault("large", 412, method="PUT")], "Somebody else has written to org/a in between (412)"),
        ("hf_writer", [Fault("repos/create", 500)], "The hub failed (500)"),
        ("hf_writer", [Fault("commit", 500)], "The hub failed (500)"),
        ("hf_writer", [Fault("preupload", 429)], "asks to wait (429"),
        ("hf_writer", [Fault("commit", 400)], "refused the upload to org/a (400"),
        ("hf_writer", [Fault("large", 403, method="PUT")], "(403)"),
        ("hf_writer", [Fault("large", 0, method="PUT")], "The connection to the hub failed"),
        ("hf_writer", [Fault("commit", 0)], "The connection to the hub failed"),
    ],
)
def test_a_refusing_or_failing_hub_is_one_sentence_and_a_later_push_completes(
    token: str, faults: list[Fault], said: str, trained_run: Path, open_hub: Hub
) -> None:
    open_hub.faults += faults
    fault = push(open_hub, trained_run, "org/a", token=token).fault
    assert said in fault
    assert "Nothing was published" in fault
    assert ("are not sent again" in fault) is any("/preupload/" in path for _, path, _ in open_hub.requests)
    assert token not in fault
    assert all(set(repo.revisions[c]) <= {".gitattributes"} for repo in open_hub.repos.values() for c in repo.revisions)
    open_hub.faults.clear()
    open_hub.requests.clear()
    sent = bool(open_hub.large)
    assert push(open_hub, trained_run, "org/a").code == 0
    assert "adapter_model.safetensors" in files_of(open_hub, "org/a")
    assert sent is not any(method == "PUT" for method, _, _ in open_hub.requests)  # what has arrived is not sent again


def test_a_connection_that_breaks_once_is_tried_again(trained_run: Path, open_hub: Hub) -> None:
    open_hub.faults += [Fault("large", 0, times=1, method="PUT"), Fault("large", 503, times=1, method="PUT")]
    assert push(open_hub, trained_run, "org/a").code == 0
    assert [status for method, _, status in open_hub.requests if method == "PUT"] == [0, 503, 200]


def test_no_hub_at_all_is_one_sentence(trained_run: Path, hub: Hub) -> None:
    hub.__exit__()
    assert "The connection to the hub failed" in push(hub, trained_run, "org/a").fault


def test_a_pickle_is_refused_unopened(adapter: Path, tmp_path: Path, command: Command) -> None:
    import pickle

    (adapter / "x.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    assert "x.pkl" in command("push", adapter, "org/a", "--dry_run").fault
    assert not os.path.exists(tmp_path / "opened")  # noqa: PTH110


def test_push_is_a_function_too(adapter: Path) -> None:
    record: dict[str, Any] = peft_mlm.push(adapter, "org/a", dry_run=True)
    assert record["dry_run"] is True


def test_a_run_with_push_to_hub_is_uploaded_when_it_is_finished(
    base_folder: Path, text_file: Path, tmp_path: Path, open_hub: Hub
) -> None:
    words = ["train", "--model_name_or_path", base_folder, "--train_file", text_file, "--use_lora", "--max_steps", "2"]
    words += ["--rows", "line", "--push_to_hub", "--hub_model_id"]
    refused = run(open_hub, *words, "org/run", "--output_dir", tmp_path / "refused", token="hf_reader")
    assert "has no right to write to org/run (403)" in refused.fault
    assert not (tmp_path / "refused").exists()  # found before anything was trained
    assert "is no name of a repository" in run(open_hub, *words, "run", "--output_dir", tmp_path / "refused").fault

    record = run(open_hub, *words, "org/run", "--output_dir", tmp_path / "run", "--json").record
    assert record["pushed"]["repo_id"] == "org/run"
    assert record["pushed"]["commit"] == open_hub.repos["models", "org/run"].branches["main"]
    there, folder = files_of(open_hub, "org/run"), tmp_path / "run" / "adapter"
    assert set(there) - {".gitattributes"} == {file.name for file in folder.iterdir()}
    assert there["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert "hf_writer" not in "".join(
        file.read_text(errors="replace") for file in (tmp_path / "run").rglob("*") if file.is_file()
    )


def test_a_run_that_cannot_be_uploaded_is_finished_and_pushed_later(
    trained_run: Path, tmp_path: Path, open_hub: Hub
) -> None:
    copy = shutil.copytree(trained_run, tmp_path / "run")
    open_hub.publish("models", "org/later", {})
    open_hub.faults.append(Fault("commit", 500))
    failed = subprocess.run(
        [sys.executable, "-c", PUSH_AT_THE_END, str(copy), "org/later"],
        env={**open_hub.env, "HF_TOKEN": "hf_writer", "PYTHONPATH": str(Path(peft_mlm.__file__).parent.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "The hub failed (500)" in failed.stdout
    open_hub.faults.clear()
    assert json.loads((copy / "summary.json").read_text())["status"] == "finished"
    assert run(open_hub, *failed.stdout.rpartition("peft-mlm ")[2].split()).code == 0
    assert "adapter_model.safetensors" in files_of(open_hub, "org/later")
