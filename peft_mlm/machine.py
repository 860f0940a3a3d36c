"""What the machine has for a process: cores, memory and disk, as far as containers and schedulers let it have them."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Version 1 says "no limit" by a number near 2^63.
NO_LIMIT = 1 << 60


def usable_cores() -> float:
    """Count the cores that this process may use at once.

    Returns:
        Those it may run on, or less where a container has a quota of their time (1.5 is one and a half).
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _groups("cpu"):
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                cores = min(cores, int(quota) / int(period))
        elif (group / "cpu.cfs_quota_us").is_file():
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if int(quota) > 0:
                cores = min(cores, int(quota) / int(period))
    return cores


def memory() -> tuple[int, int]:
    """Measure the memory that this process may use.

    Returns:
        Bytes in all and bytes free now, of the machine or of the container where that has less.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    facts = Path("/proc/meminfo")
    if facts.is_file():
        values = dict(line.split(":") for line in facts.read_text().splitlines())
        free = int(values["MemAvailable"].split()[0]) * 1024
    for group in _groups("memory"):
        for limit_file, use_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            if (group / limit_file).is_file():
                limit = (group / limit_file).read_text().strip()
                if limit != "max" and int(limit) < NO_LIMIT:
                    used = int((group / use_file).read_text()) - _cached(group)
                    total, free = min(total, int(limit)), min(free, int(limit) - used)
    return total, max(free, 0)


def free_disk(folder: Path) -> int:
    """Measure what is free where a folder lies, or will lie.

    Args:
        folder: Any path.

    Returns:
        Bytes.
    """
    return shutil.disk_usage(nearest(folder)).free


def nearest(path: Path) -> Path:
    """Give the nearest folder above a path (or itself) that is there.

    Args:
        path: Any path.

    Returns:
        A path that exists.
    """
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def can_write(folder: Path) -> bool:
    """Try to write a file into a folder, or where the folder would be made; it is gone at once.

    Args:
        folder: Any path.

    Returns:
        True if so.
    """
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(b"peft-mlm")
            file.flush()
    except OSError:
        return False
    return True


def size_of(folder: Path, seconds: float = 3.0) -> tuple[int, bool]:
    """Sum the sizes of the files below a folder; links are not followed.

    Args:
        folder: Any path; one that is not there has nothing.
        seconds: How long to go on at most.

    Returns:
        Bytes, and whether all files were reached.
    """
    until, total = time.monotonic() + seconds, 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                file = os.lstat(os.path.join(place, name))  # noqa: PTH118 - ten times as fast as Path, in large caches
            except OSError:
                continue  # gone meanwhile
            total += file.st_size
        if time.monotonic() > until:
            return total, False
    return total, True


def _groups(controller: str) -> Iterator[Path]:
    """The control groups that this process is in, from its own up to the root, in either version."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = CGROUPS if not controllers else CGROUPS / controller
            own = root / path.lstrip("/")
            # Inside a container the path may be that of the host: the root is then the container's own group.
            yield from (group for group in (own, *own.parents) if group.is_dir() and group.is_relative_to(root))


def _cached(group: Path) -> int:
    """Bytes of files that the kernel would give back at once."""
    try:
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(facts.get("inactive_file", facts.get("total_inactive_file", 0)))


def peak_memory() -> int:
    """Measure the most memory that this process has held at once.

    Returns:
        Bytes in memory (resident), files that it has mapped included.
    """
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would give the peak of a larger process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
