"""What is said of machines that the tests do not run on: facts as the probes give them -> checks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from peft_mlm import diagnosis
from peft_mlm.diagnosis import CHECKS, Check, Facts, State, diagnose, system_gpus
from peft_mlm.installed import Package

GPU = {
    "name": "NVIDIA GeForce RTX 3060",
    "bytes": 12 * 10**9,
    "free_bytes": 11 * 10**9,
    "capability": "8.6",
    "bfloat16": True,
    "error": None,
}
TORCH = {
    "build": "CUDA 13.2",
    "threads": 1,
    "why_not": None,
    "cpu_bfloat16": True,
    "cpu_error": None,
    "gpus": [],
}
SEEN = "NVIDIA GeForce RTX 3060, driver 470.1"
BROKEN = {"error": "OSError: libcudart.so.13: cannot open shared object file"}


def facts(torch: dict[str, Any] = TORCH, nvidia: str | None = None, **probed: Any) -> Facts:
    return Facts([], {"torch": torch, **{name.replace("_", " "): found for name, found in probed.items()}}, nvidia)


@pytest.mark.parametrize(
    ("name", "given", "state", "said"),
    [
        ("gpu", facts(), "note", "none; runs go to the CPU"),
        ("gpu", facts(TORCH | {"build": "CPU"}), "note", "none; runs go to the CPU"),
        (
            "gpu",
            facts(TORCH | {"build": "CPU"}, SEEN),
            "problem",
            "RTX 3060, driver 470.1, but torch is a build for CPUs",
        ),
        ("gpu", facts(TORCH | {"why_not": "The driver is too old"}, SEEN), "problem", "The driver is too old"),
        ("gpu", facts(BROKEN, SEEN), "note", "torch does not work; the system has NVIDIA GeForce"),
        ("gpu", facts(TORCH | {"gpus": [GPU]}, SEEN), "ok", "12 GB, 11 GB of it free, compute capability 8.6"),
        ("gpu", facts(TORCH | {"gpus": [GPU | {"free_bytes": 10**9}]}), "note", "1 GB of it free"),
        ("gpu", facts(TORCH | {"gpus": [GPU | {"error": "no kernel image"}]}), "problem", "no kernel image"),
        ("bf16", facts(), "ok", "the CPU has instructions for it"),
        ("bf16", facts(TORCH | {"cpu_bfloat16": False}), "note", "no instructions"),
        ("bf16", facts(TORCH | {"cpu_error": "wrong"}), "problem", "does not compute: wrong"),
        ("bf16", facts(TORCH | {"gpus": [GPU]}), "ok", "on the GPU"),
        ("bf16", facts(TORCH | {"gpus": [GPU, GPU | {"bfloat16": False}]}), "note", "not on NVIDIA GeForce RTX 3060"),
        ("bf16", facts(BROKEN), "note", "not known"),
        ("4 and 8 bits", facts(bitsandbytes=BROKEN), "problem", "libcudart.so.13"),
        ("flash attention", facts(), "ok", "of no use here"),
        ("flash attention", facts(TORCH | {"gpus": [GPU]}), "note", "not installed; sdpa is used"),
        ("flash attention", Facts([], {"flash-attn": BROKEN}, None), "note", "does not work: OSError"),
        ("flash attention", Facts([], {"flash-attn": {}}, None), "ok", "flash_attention_2"),
        ("cores", facts(TORCH | {"threads": 4096}), "note", "4096 threads"),
        ("cores", facts(), "ok", "1 threads"),
    ],
)
def test_a_machine_is_told_with_what_to_do(name: str, given: Facts, state: State, said: str) -> None:
    (check,) = CHECKS[name](given)
    assert (check.state, said in check.found) == (state, True), check
    no_remedy = {
        "none; runs go to the CPU",
        "no instructions",
        "not known",
        "torch does not work; the system has NVIDIA GeForce",
    }
    assert bool(check.remedy) == (state != "ok" and said not in no_remedy)


def test_a_gpu_that_is_hidden_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (check,) = CHECKS["gpu"](facts(nvidia=SEEN))
    assert (check.state, check.remedy) == ("note", "unset CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("package", "probed", "state", "remedy"),
    [
        (Package("peft", ">=0.19", "0.21.2", "0.21.2"), {}, "ok", ""),
        (Package("peft", ">=0.19", "0.18", "0.21.2"), {}, "problem", "pip install 'peft>=0.19'"),
        (Package("peft", ">=0.19", None, "0.21.2"), {}, "problem", "pip install 'peft>=0.19'"),
        (Package("peft", ">=0.19", "0.22.0", "0.21.2"), {}, "note", "If something fails: pip install 'peft==0.21.2'"),
        (
            Package("peft", ">=0.19", "0.21.2", "0.21.2"),
            {"peft": BROKEN},
            "problem",
            "pip install --force-reinstall 'peft==0.21.2'",
        ),
    ],
)
def test_a_library_is_told_with_what_to_do(package: Package, probed: dict[str, Any], state: State, remedy: str) -> None:
    (check,) = CHECKS["libraries"](Facts([package], probed, None))
    assert (check.name, check.state, check.remedy) == ("peft", state, remedy)


@pytest.mark.parametrize(
    ("settings", "answer", "state", "said"),
    [
        ({}, {"status": 200}, "ok", "https://hub.example answers; a token is not set"),
        ({"token": True}, {"status": 401}, "ok", "answers; a token is set"),
        ({}, {"status": 503}, "note", "is not reached: it answers 503"),
        ({}, {"error": "no answer in 20 seconds"}, "note", "is not reached: no answer in 20 seconds"),
        ({"offline": True}, {"status": None}, "note", "switched off by HF_HUB_OFFLINE"),
    ],
)
def test_a_hub_that_is_not_reached_is_no_problem(
    settings: dict[str, Any], answer: dict[str, Any], state: State, said: str
) -> None:
    known = {"endpoint": "https://hub.example", "offline": False, "cache": "/c", "token": False, **settings}
    (check,) = CHECKS["hub"](Facts([], {"hub settings": known, "hub": answer}, None))
    assert (check.state, said in check.found) == (state, True), check


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache, folder = CHECKS["disk"](Facts([], {"hub settings": {"cache": "/proc/none"}}, None))
    assert (cache.state, folder.state) == ("problem", "ok")
    assert "HF_HOME" in cache.remedy
    monkeypatch.setattr(diagnosis, "free_disk", lambda place: 10**8)
    assert [check.state for check in CHECKS["disk"](facts())] == ["problem", "problem"]


def test_the_systems_gpus_are_those_that_nvidia_smi_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 80GB, 570.86'\necho 'NVIDIA H200, 570.86'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert system_gpus() == "NVIDIA H100, 80GB, NVIDIA H200, driver 570.86"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert system_gpus() == ("an NVIDIA GPU" if list(Path("/dev").glob("nvidia[0-9]*")) else None)


def test_a_check_that_fails_is_a_note_and_keeps_none_of_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(facts: Facts) -> list[Check]:
        raise ValueError("odd\nmachine")

    monkeypatch.setattr(diagnosis, "gather_facts", facts)
    monkeypatch.setattr(diagnosis, "CHECKS", {"odd": fails, "gpu": CHECKS["gpu"]})
    odd, gpu = diagnose()
    assert odd == Check("odd", "note", "could not be looked at: ValueError: odd")
    assert gpu.name == "gpu"
