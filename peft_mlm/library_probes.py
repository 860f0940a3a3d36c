"""Whether the libraries really work here, tried in a process that may die of it.

A library that is broken raises, aborts, hangs, or takes the interpreter down with it. So they are tried one after the
other in a process of their own; where that ends, the next one goes on with those that are left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The package is found where this one was, also where that is a folder that nobody installed; nothing else is put before
# what the interpreter finds by itself.
CHILD = """
import sys
root, *names = sys.argv[1:]
if root not in sys.path:
    sys.path.insert(0, root)
from peft_mlm.library_probes import main
main(names)
"""
# Names to import, where they are not the package's.
MODULES = {"pyyaml": "yaml"}
TIMEOUT = 180.0  # seconds; the first import from a slow disk takes a minute
HUB_TIMEOUT = 4.0
# Instructions of x86 and ARM.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def probe(names: Sequence[str], *, timeout: float = TIMEOUT) -> dict[str, dict[str, Any]]:
    """Try libraries, in processes of their own.

    Args:
        names: Packages, or names of `PROBES`; they are tried in this order.
        timeout: Seconds that a process may take.

    Returns:
        What was found, by name; `error` (one line) where a library does not work.
    """
    found: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left:
        answers, ending = _run_child(left, timeout)
        found |= answers
        left = [name for name in left if name not in answers]
        if left and ending is not None:
            found[left.pop(0)] = {"error": ending}
    return found


def _run_child(names: Sequence[str], timeout: float) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Run one process; give its answers, and how it ended before it had answered everything."""
    root = str(Path(__file__).resolve().parent.parent)
    words = [sys.executable, "-P", "-c", CHILD, root, *names]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        ending = f"no answer in {timeout:.0f} seconds"
    except BaseException:
        process.kill()
        raise
    else:
        ending = _ending(process.returncode, err)
    answers = {record["name"]: record["found"] for record in map(json.loads, out.splitlines())}
    return answers, ending


def _ending(code: int, said: str) -> str:
    if code < 0:
        return f"the interpreter was ended by {signal.Signals(-code).name}"
    lines = [line for line in said.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else f"the interpreter ended with code {code}"


def one_line(text: str, most: int = 200) -> str:
    """Bring a message to one line.

    Args:
        text: Any text.
        most: Characters at most. Default 200.

    Returns:
        Its first line that says something.
    """
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "")[:most]


def try_torch() -> dict[str, Any]:
    """Find out what torch was built for, and which GPUs it computes on.

    Returns:
        `build` ("CUDA 13.2", "ROCm 6.4" or "CPU"), `threads`, `why_not` (what torch says where it cannot use a GPU),
        `cpu_bfloat16` (the CPU has instructions for it), and per GPU `name`, `bytes`, `free_bytes`, `capability`,
        `bfloat16` (by itself, not emulated) and `error`.
    """
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "build": build,
        "threads": torch.get_num_threads(),
        "why_not": one_line(str(said[0].message)) if said and not count else None,
        "cpu_bfloat16": bool(_cpu_flags() & BFLOAT16_FLAGS),
        "cpu_error": _product_error(torch.device("cpu")),
        "gpus": [_gpu(torch.device("cuda", index)) for index in range(count)],
    }


def _cpu_flags() -> set[str]:
    """The instructions that Linux names for the first core; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def _gpu(device: Any) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
    try:
        with torch.cuda.device(device):
            free = torch.cuda.mem_get_info()[0]
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:
        return {**facts, "free_bytes": None, "bfloat16": False, "error": one_line(str(error))}
    return {**facts, "free_bytes": free, "bfloat16": bfloat16, "error": _product_error(device)}


def _product_error(device: Any) -> str | None:
    """Multiply two small matrices in float32 and bfloat16; say what is wrong, or None."""
    import torch

    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(32, 32, generator=generator) for _ in range(2))
    right = one.double() @ other.double()
    for dtype, most in ((torch.float32, 1e-2), (torch.bfloat16, 5e-2)):
        try:
            got = (one.to(device, dtype) @ other.to(device, dtype)).cpu().double()
        except RuntimeError as error:
            return one_line(str(error))
        if not (got - right).norm() < most * right.norm():
            return f"a product of {str(dtype).removeprefix('torch.')} matrices is wrong"
    return None


def try_bitsandbytes() -> dict[str, Any]:
    """Quantise a small matrix in 4 and 8 bits on the device that a run would use, and hold it against what it was.

    Returns:
        `device`, and `bits`: by "nf4", "fp4" and "int8" the largest error as a share of the largest number of its block
        (or row). `error` where a number is farther off than rounding to the nearest level can bring it.
    """
    import bitsandbytes.functional as functional
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).to(device)
    largest = values.reshape(-1, 64).abs().amax(1, keepdim=True)
    bits, faults = {}, []
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(values, blocksize=64, quant_type=kind)
        off = (functional.dequantize_4bit(packed, state) - values).reshape(-1, 64).abs() / largest
        bits[kind] = float(off.max())
        half_a_gap = float(state.code.sort().values.diff().max()) / 2
        if packed.element_size() * packed.numel() * 2 != values.numel() or not 0 < bits[kind] < half_a_gap + 1e-3:
            faults.append(f"{kind} is off by {bits[kind]:.3f}, at most {half_a_gap:.3f} is right")
    rows, scale, _ = functional.int8_vectorwise_quant(values.half())
    off = (functional.int8_vectorwise_dequant(rows, scale).float() - values).abs() / values.abs().amax(1, keepdim=True)
    bits["int8"] = float(off.max())
    if rows.dtype != torch.int8 or not 0 < bits["int8"] < 0.5 / 127 + 1e-3:
        faults.append(f"int8 is off by {bits['int8']:.4f}, at most {0.5 / 127:.4f} is right")
    return {"device": str(device), "bits": bits} | ({"error": "; ".join(faults)} if faults else {})


def try_hub_settings() -> dict[str, Any]:
    """Read how the hub is to be used.

    Returns:
        `endpoint`, `offline` (whether the hub is switched off), `cache` (folder), `token` (whether one is set).
    """
    from huggingface_hub import constants, get_token

    return {
        "endpoint": _without_login(constants.ENDPOINT),
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": str(constants.HF_HUB_CACHE),
        "token": get_token() is not None,
    }


def try_hub() -> dict[str, Any]:
    """Ask the hub for an answer, of whatever kind.

    Returns:
        `status` (HTTP), None where the hub is switched off, or `error`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return {"status": None}
    try:
        return {"status": get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT).status_code}
    except Exception as error:  # of the libraries below: there is no end to their kinds
        return {"error": one_line(f"{type(error).__name__}: {_without_login(str(error))}")}


def _without_login(text: str) -> str:
    """Take `user:password@` out of addresses."""
    return "".join(part if i == 0 else "://" + part.split("@")[-1] for i, part in enumerate(text.split("://")))


def try_import(name: str) -> dict[str, Any]:
    """Import a package.

    Args:
        name: Its name as pip has it.

    Returns:
        Nothing more.
    """
    __import__(MODULES.get(name, name.replace("-", "_")))
    return {}


PROBES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "torch": try_torch,
    "bitsandbytes": try_bitsandbytes,
    "hub settings": try_hub_settings,
    "hub": try_hub,
}


def main(names: Sequence[str]) -> None:
    """Try libraries in this process, and print a line of JSON after each.

    Args:
        names: What to try.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in names:
        started = time.perf_counter()
        try:
            found = PROBES[name]() if name in PROBES else try_import(name)
        except Exception as error:  # whatever a broken library raises, the others are to be tried
            found = {"error": one_line(f"{type(error).__name__}: {error}")}
        found["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps({"name": name, "found": found}), file=answers, flush=True)
