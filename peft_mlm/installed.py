"""Which packages are installed, which are asked for, and with which versions this one was tested.

What is asked for stands in the package's metadata; the tested versions are those of `requirements-dev.lock`, which the
tests run with and which a wheel carries as it is.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGE = "peft-mlm"
LOCK = "requirements-dev.lock"
# Extras for those who change this package, not for those who use it.
NOT_FOR_USERS = ("dev",)


@dataclass(frozen=True)
class Package:
    """A package that is asked for.

    Attributes:
        name: As pip has it.
        wanted: Versions that are asked for, such as ">=2.6"; "" for any.
        installed: The version that is there, or None.
        tested: The version of the tests, or None where it is not among them.
    """

    name: str
    wanted: str
    installed: str | None
    tested: str | None

    @property
    def fits(self) -> bool:
        """Whether it is there, in a version that is asked for."""
        return self.installed is not None and self._asks().specifier.contains(self.installed, prereleases=True)

    @property
    def is_newer(self) -> bool:
        """Whether it is of a later release than the tested one; later fixes of that release do not count."""
        if self.installed is None or self.tested is None:
            return False
        return Version(self.installed).release[:2] > Version(self.tested).release[:2]

    def _asks(self) -> Requirement:
        return Requirement(self.name + self.wanted)


def required_packages(extra: str | None = None) -> list[Package]:
    """List the packages that this one needs here.

    Args:
        extra: What an extra adds; None for what is always needed.

    Returns:
        The packages by name, with what is installed of them; those for other systems or Pythons are not among them.

    Raises:
        PackageNotFoundError: This package itself is not installed.
    """
    tested = tested_versions()
    packages = []
    for line in importlib.metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        always, asked = (_holds(requirement, name) for name in ("", extra or ""))
        if asked and always == (extra is None):
            name = canonicalize_name(requirement.name)
            packages.append(Package(name, str(requirement.specifier), version_of(name), tested.get(name)))
    return sorted(packages, key=lambda package: package.name)


def extras() -> list[str]:
    """List the extras that users may ask for, by name.

    Returns:
        Such as ["onnx"].

    Raises:
        PackageNotFoundError: This package itself is not installed.
    """
    given = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    return sorted(name for name in given if name not in NOT_FOR_USERS)


def version_of(name: str) -> str | None:
    """Give the version of a package.

    Args:
        name: As pip has it.

    Returns:
        The version, or None where it is not installed.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def wanted_python() -> str:
    """Give the versions of Python that are asked for.

    Returns:
        Such as ">=3.11".

    Raises:
        PackageNotFoundError: This package itself is not installed.
    """
    return str(importlib.metadata.metadata(PACKAGE)["Requires-Python"])


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def tested_versions() -> dict[str, str]:
    """Read the versions that the tests run with, of the packages for this system and Python.

    Returns:
        Versions by name; empty where the file did not come along.
    """
    own = Path(__file__).resolve().parent
    file = next((place / LOCK for place in (own, own.parent) if (place / LOCK).is_file()), None)
    if file is None:
        return {}
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    asked = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {
        canonicalize_name(one.name): next(iter(one.specifier)).version
        for one in asked
        if one.marker is None or one.marker.evaluate()
    }
