"""How a command uses the CPU's threads and memory, where the defaults waste a good part of a training step."""

from __future__ import annotations

import ctypes
import os
import sys

# Turns that a thread spins before it sleeps until there is work: some tens of microseconds. Measured on two cores with
# rows of 12 tokens, in seconds per step, alone and with a second run on the same cores: 0.20 and 0.29 without spinning
# (OMP_WAIT_POLICY=PASSIVE), 0.16 and 0.36 with 5,000 turns, 0.15 and 0.56 with 20,000, 0.15 and 0.70 with OpenMP's own
# 300,000. Shorter steps gain more by it: 0.13 with 5,000, 0.09 with 20,000.
SPIN_TURNS = "20000"
# mallopt's names for "allocate by mmap from this size" and "give free memory back from this size" (malloc.h of glibc).
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
NEVER = 2**31 - 1


def tune_processor() -> None:
    """Set what OpenMP reads when torch is imported, and let glibc keep what a step frees for the next step.

    For commands, not for library use: it is a matter of the whole process. A user's own settings stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_TURNS)
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            # Blocks of megabytes are mapped afresh otherwise, and each page of them is cleared by the kernel each time.
            mallopt(M_MMAP_THRESHOLD, NEVER)
            mallopt(M_TRIM_THRESHOLD, NEVER)
