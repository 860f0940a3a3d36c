"""A merge that is killed leaves no model, or the right one; what else it leaves goes with the next merge."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft_mlm
from peft_mlm.cli import main
from peft_mlm.run_folder import STAGED

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = 10


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(STAGED)]


def start(words: list[str]) -> int:
    """Run the command in a process of its own, which has the libraries already."""
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main(words))
        finally:
            os._exit(1)
    return child


def killed_after(words: list[str], seconds: float) -> bool:
    """Kill the command after some time; whether it was still running then."""
    child = start(words)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_whatever_moment_it_is_killed_there_is_no_folder_or_a_whole_one(
    dtype: str, trained_run: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected"
    peft_mlm.merge(str(trained_run), expected, dtype=dtype)
    place = tmp_path / "place"
    place.mkdir()
    words = ["merge", str(trained_run), "--output_dir", str(place / "merged"), "--dtype", dtype]
    begun = time.perf_counter()
    child = start([*words[:3], str(tmp_path / "timed"), *words[4:]])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    usual = time.perf_counter() - begun
    chance, killed = random.Random(0), 0
    for moment in range(MOMENTS):
        killed += killed_after(words, usual * (moment + chance.random()) / MOMENTS)
        if not (place / "merged").exists():
            continue
        assert {file.name for file in (place / "merged").iterdir()} == {file.name for file in expected.iterdir()}
        assert json.loads((place / "merged" / "merge_report.json").read_text())["proved"]
        one, other = (load_file(folder / "model.safetensors") for folder in (place / "merged", expected))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        (place / "merged").rename(tmp_path / f"whole{moment}")
    assert killed
    peft_mlm.merge(str(trained_run), place / "merged", dtype=dtype)
    assert [path.name for path in place.iterdir()] == ["merged"]


def test_what_is_being_written_has_another_name_and_is_removed_once_its_process_is_gone(
    trained_run: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    words = [sys.executable, "-m", "peft_mlm", "merge", str(trained_run), "--output_dir", str(place / "merged")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not any(list(path.glob("*.safetensors")) for path in leftovers(place)):
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # in the middle of its work
    assert not (place / "merged").exists()
    (busy,) = leftovers(place)
    peft_mlm.merge(str(trained_run), place / "merged")
    assert busy.is_dir()  # it is still at work there
    process.kill()
    process.wait()
    (place / "merged").rename(tmp_path / "first")
    assert leftovers(place) == [busy]
    peft_mlm.merge(str(trained_run), place / "merged")
    assert [path.name for path in place.iterdir()] == ["merged"]
