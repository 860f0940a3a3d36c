"""The memory that a process really takes: of a CUDA GPU by PyTorch's own count, of the machine as Linux counts it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

MACHINE, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Give the memory of this process that is in the machine's memory, files that it has mapped included.

    Returns:
        Bytes; None where the system does not tell (other than Linux).
    """
    return _status("VmRSS")


def available_bytes() -> int | None:
    """Give the memory that processes can still get: of the machine, or of a container with a limit.

    Returns:
        Bytes; None where the system does not tell (other than Linux).
    """
    try:
        lines = MACHINE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:
        limit = int((GROUP / "memory.max").read_text()) - int((GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return limit if free is None else min(free, limit)


def forget_peak(device: Any) -> bool:
    """Let the peak start anew, free memory given back first.

    Args:
        device: Where the model is, a torch.device.

    Returns:
        Whether that can be done here.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: Any, held: int | None) -> int | None:
    """Give the largest memory since the peak started anew.

    Args:
        device: Where the model is, a torch.device.
        held: What the process took before the model was loaded; its libraries are no part of a run.

    Returns:
        Of a GPU what PyTorch's allocator has reserved; of a CPU the process's resident memory above `held`; None where
        the system does not tell.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved(device))
    peak = _status("VmHWM")
    return None if peak is None or held is None else max(0, peak - held)


def _status(field: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
