from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_mlm.commands import doctor
from peft_mlm.installed import extras, required_packages

ROOT = Path(__file__).parents[2]
STATES = {"ok", "note", "problem"}
TOKEN = "hf_" + "x" * 34


def run_doctor(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with folders in front of the installed packages."""
    path = os.pathsep.join([environment.pop("first", ""), str(ROOT)]).strip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-m", "peft_mlm", "doctor", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    folder = tmp_path_factory.mktemp("doctor")
    done = run_doctor("--json", folder=folder, HF_TOKEN=TOKEN, HF_HUB_CACHE=str(folder / "cache"))
    assert list(folder.iterdir()) == []
    return done


def checks_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert record["ok"] == all(check["state"] != "problem" for check in record["checks"])
    return {check["name"]: check for check in record["checks"]}


def test_this_environment_serves(healthy: subprocess.CompletedProcess[str]) -> None:
    assert (healthy.returncode, healthy.stderr) == (0, "")
    checks = checks_of(healthy)
    expected = {package.name for package in required_packages()} | {f"extra {extra}" for extra in extras()}
    others = {"python", "bf16", "4 and 8 bits", "flash attention", "cores", "memory", "cache", "folder", "hub"}
    assert expected | others <= set(checks)
    assert "gpu" in checks or "gpu 0" in checks
    for check in checks.values():
        assert check["state"] in STATES
        assert check["found"]
    for package in required_packages():
        assert checks[package.name]["found"].startswith(str(importlib.metadata.version(package.name)))
    assert checks["4 and 8 bits"]["state"] == "ok"
    assert "nf4" in checks["4 and 8 bits"]["found"]


def test_offline_is_a_note_and_a_token_is_never_shown(healthy: subprocess.CompletedProcess[str]) -> None:
    hub = checks_of(healthy)["hub"]
    assert (hub["state"], hub["found"]) == ("note", "switched off by HF_HUB_OFFLINE; a token is set")
    assert TOKEN not in healthy.stdout


def test_people_read_every_check_with_its_remedy(
    healthy: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(healthy.stdout)
    doctor.show(record)
    shown = " ".join(capsys.readouterr().out.split())
    for check in record["checks"]:
        assert f"{check['state']} {check['name']} {check['found']}" in shown
        assert check["remedy"] in shown
    assert shown.endswith(f"no problems, {sum(c['state'] == 'note' for c in record['checks'])} notes")


def test_broken_libraries_are_problems_and_the_rest_is_told(tmp_path: Path) -> None:
    """torch raises, bitsandbytes takes its process down, rich and tqdm are not to be imported."""
    first = tmp_path / "first"
    code = {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "bitsandbytes": "import os; os.abort()",
        "rich": "raise ImportError('rich is broken')",
        "datasets": "raise ImportError('left out, to be quick')",
    }
    for name, text in code.items():
        (first / name).mkdir(parents=True)
        (first / name / "__init__.py").write_text(text)
    done = run_doctor(folder=tmp_path, first=str(first))
    assert (done.returncode, done.stderr) == (1, "")
    said = {
        line.split()[1]: line for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in STATES
    }
    for name in ("torch", "rich", "datasets"):
        assert said[name].startswith("problem")
    assert said["numpy"].startswith("ok")
    text = " ".join(done.stdout.split())
    assert "does not work: OSError: libcudart.so.13" in text
    assert "bitsandbytes does not work: the interpreter was ended by SIGABRT" in text
    assert "pip install --force-reinstall 'torch==" in text
    assert "Traceback" not in text
