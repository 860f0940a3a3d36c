from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peft_mlm import installed
from peft_mlm.installed import Package, extras, required_packages
from peft_mlm.library_probes import MODULES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_tests_run_with_the_versions_that_are_called_tested() -> None:
    tested = installed.tested_versions()
    for package in PROJECT["dependencies"]:
        name = Requirement(package).name
        assert tested[name] == importlib.metadata.version(name)


def test_a_wheel_carries_the_tested_versions_to_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["force-include"][installed.LOCK] == f"peft_mlm/{installed.LOCK}"
    assert installed.LOCK in build["sdist"]["include"]
    package = tmp_path / "peft_mlm"
    package.mkdir()
    monkeypatch.setattr(installed, "__file__", str(package / "installed.py"))
    assert installed.tested_versions() == {}
    (package / installed.LOCK).write_text(
        "numpy==1.2 ; python_version < '3'\nnumpy==3.4 ; python_version >= '3'\n# x\n"
    )
    assert installed.tested_versions() == {"numpy": "3.4"}


def test_what_is_needed_and_the_extras_are_those_of_the_metadata() -> None:
    needed = {package.name: package.wanted for package in required_packages()}
    declared = [Requirement(line) for line in importlib.metadata.requires("peft-mlm") or [] if "extra ==" not in line]
    assert needed == {one.name: str(one.specifier) for one in declared}
    assert set(extras()) == set(importlib.metadata.metadata("peft-mlm").get_all("Provides-Extra") or []) - {"dev"}
    assert {package.name for package in required_packages("onnx")} == {"onnx", "onnxscript", "onnxruntime"}


def test_every_needed_package_is_imported_by_the_name_that_is_tried() -> None:
    for package in required_packages():
        module = MODULES.get(package.name, package.name.replace("-", "_"))
        files = [str(file) for file in importlib.metadata.files(package.name) or []]
        assert any(file == f"{module}/__init__.py" for file in files), package.name


@pytest.mark.parametrize(
    ("wanted", "version", "tested", "fits", "newer"),
    [
        (">=2.6", "2.15.0", "2.15.0", True, False),
        (">=2.6", "2.15.3", "2.15.0", True, False),
        (">=2.6", "2.16.0.dev1", "2.15.0", True, True),
        (">=2.6", "2.15.0+cpu", "2.15.0", True, False),
        (">=2.6", "2.5.9", "2.15.0", False, False),
        (">=2.6", None, "2.15.0", False, False),
        ("", "3", None, True, False),
    ],
)
def test_a_version_fits_and_is_newer(wanted: str, version: str | None, tested: str, fits: bool, newer: bool) -> None:
    package = Package("torch", wanted, version, tested)
    assert (package.fits, package.is_newer) == (fits, newer)
