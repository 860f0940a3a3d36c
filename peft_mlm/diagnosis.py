"""What stands in the way of a run on this machine: one check after the other, each with its remedy.

Libraries are tried in processes of their own (`library_probes`), so that a broken one is found out and ends nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

from peft_mlm.console import bytes_text
from peft_mlm.installed import PACKAGE, Package, extras, required_packages, version_of, wanted_python
from peft_mlm.library_probes import PROBES, one_line, probe
from peft_mlm.machine import can_write, free_disk, memory, size_of, usable_cores

State = Literal["ok", "note", "problem"]
FLASH = "flash-attn"
HUB_PATIENCE = 20.0  # seconds, with the interpreter's start
GB = 10**9
# A base of 300 M parameters with what a step keeps; the base's files, and a run's checkpoints beside them.
LITTLE_MEMORY, NO_MEMORY = 4 * GB, 1 * GB
LITTLE_DISK, NO_DISK = 5 * GB, GB // 2
CUDA_TORCH = (
    "Take torch out (pip uninstall torch) and put the build for CUDA in, by the command that PyTorch's page "
    '"Start Locally" gives for this system.'
)


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: What was looked at.
        state: "ok"; "note" for what is missing or slow and does no harm; "problem" for what will stop a run.
        found: What is there.
        remedy: A command or a sentence; "" where nothing is to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""

    def describe(self) -> dict[str, str]:
        """Give it as a record."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What the checks look at.

    Attributes:
        packages: What this package needs; None where it is not installed itself.
        probed: What `library_probes.probe` found.
        nvidia: NVIDIA GPUs and driver as the system, not torch, sees them (`system_gpus`).
    """

    packages: list[Package] | None
    probed: Mapping[str, Mapping[str, Any]]
    nvidia: str | None


def diagnose() -> list[Check]:
    """Look at Python, libraries, devices, disk and network.

    Returns:
        The checks in the order of a table.
    """
    facts = gather_facts()
    checks: list[Check] = []
    for name, check in CHECKS.items():
        try:
            checks += check(facts)
        except Exception as error:  # a machine of a kind that was not thought of must not keep the rest back
            said = one_line(f"{type(error).__name__}: {error}")
            checks.append(Check(name, "note", f"could not be looked at: {said}"))
    return checks


def gather_facts() -> Facts:
    """Ask the package's metadata, the libraries and the system.

    Returns:
        What the checks look at.
    """
    try:
        packages: list[Package] | None = required_packages()
    except PackageNotFoundError:
        packages = None
    names = [package.name for package in packages or () if package.installed is not None]
    flash = [FLASH] if importlib.util.find_spec("flash_attn") else []
    here = dict.fromkeys([*(name for name in PROBES if name != "hub"), *names, *flash])
    with ThreadPoolExecutor(1) as beside:  # names are looked up without a time limit: that ends with the process
        hub = beside.submit(probe, ["hub"], timeout=HUB_PATIENCE)
        probed = probe(list(here)) | hub.result()
    return Facts(packages, probed, system_gpus())


def system_gpus() -> str | None:
    """Ask NVIDIA's driver, without torch, for GPUs.

    Returns:
        Such as "NVIDIA GeForce RTX 3060, driver 570.86"; "an NVIDIA GPU" where nothing tells which; None without one.
    """
    program = shutil.which("nvidia-smi")
    if program is not None:
        words = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            rows = [line.rpartition(", ") for line in done.stdout.strip().splitlines()]
            return f"{', '.join(name for name, _, _ in rows)}, driver {rows[0][2]}"
    return "an NVIDIA GPU" if any(Path("/dev").glob("nvidia[0-9]*")) else None


def check_python(facts: Facts) -> list[Check]:
    """Check the version of Python, and whether an environment of its own is in use."""
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    own = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    where = "an environment of its own" if own else "the system's own environment"
    if facts.packages is None:
        remedy = "pip install . in its folder"
        return [Check("python", "note", f"{here}; {PACKAGE} runs from a folder, its versions are not known", remedy)]
    if not SpecifierSet(wanted_python()).contains(platform.python_version(), prereleases=True):
        return [Check("python", "problem", f"{here}; {wanted_python()} is needed", "Make an environment with another.")]
    return [Check("python", "ok", f"{here} ({wanted_python()}), {where}")]


def check_libraries(facts: Facts) -> list[Check]:
    """Check that each library is there, in a version that serves, and can be imported."""
    return [_check_library(package, facts.probed.get(package.name, {})) for package in facts.packages or ()]


def _check_library(package: Package, probed: Mapping[str, Any]) -> Check:
    known = ", ".join([package.wanted or "any", *([f"tested {package.tested}"] if package.tested else [])])
    install = f"pip install '{package.name}{package.wanted}'"
    found = f"{package.installed} ({known})"
    if package.installed is None:
        return Check(package.name, "problem", f"not installed ({known})", install)
    if not package.fits:
        return Check(package.name, "problem", found, install)
    if "error" in probed and package.name != "bitsandbytes":  # which has a check of its own
        again = f"pip install --force-reinstall '{package.name}=={package.tested or package.installed}'"
        return Check(package.name, "problem", f"{found}; does not work: {probed['error']}", again)
    if package.is_newer:
        remedy = f"If something fails: pip install '{package.name}=={package.tested}'"
        return Check(package.name, "note", f"{found}, newer than tested", remedy)
    return Check(package.name, "ok", found)


def check_extras(facts: Facts) -> list[Check]:
    """Check which extras are installed."""
    if facts.packages is None:
        return []
    checks = []
    for extra in extras():
        missing = [package for package in required_packages(extra) if not package.fits]
        lacks = ", ".join(f"{p.name}{p.wanted}" + (f" (has {p.installed})" if p.installed else "") for p in missing)
        install = f"pip install '{PACKAGE}[{extra}]'"
        row = Check(f"extra {extra}", "note", f"lacks {lacks}", install)
        checks.append(row if missing else Check(f"extra {extra}", "ok", "installed"))
    return checks


def check_gpu(facts: Facts) -> list[Check]:
    """Check that torch sees the GPU that the system has, and computes on it."""
    torch = facts.probed.get("torch", {"error": "not tried"})
    if "error" in torch:
        return [Check("gpu", "note", f"not known, as torch does not work; the system has {facts.nvidia or 'none'}")]
    if torch["gpus"]:
        return [_check_one_gpu(index, gpu, torch["build"]) for index, gpu in enumerate(torch["gpus"])]
    if facts.nvidia is None:
        return [Check("gpu", "note", f"none; runs go to the CPU (torch is built for {torch['build']})")]
    if torch["build"] == "CPU":
        return [Check("gpu", "problem", f"{facts.nvidia}, but torch is a build for CPUs alone", CUDA_TORCH)]
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return [Check("gpu", "note", f"{facts.nvidia}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")]
    return [
        Check(
            "gpu",
            "problem",
            f"{facts.nvidia}, which torch (for {torch['build']}) cannot use: {torch['why_not'] or 'it says no reason'}",
            f"Bring NVIDIA's driver to one for {torch['build']} or newer, or use a build of torch for the driver there "
            "is; in a container, start it with its GPUs.",
        )
    ]


def _check_one_gpu(index: int, gpu: Mapping[str, Any], build: str) -> Check:
    name = f"gpu {index}"
    free = "" if gpu["free_bytes"] is None else f", {bytes_text(gpu['free_bytes'])} of it free"
    found = (
        f"{gpu['name']}, {bytes_text(gpu['bytes'])}{free}, compute capability {gpu['capability']}, torch for {build}"
    )
    if gpu["error"]:
        return Check(name, "problem", f"{found}; does not compute: {gpu['error']}", CUDA_TORCH)
    if gpu["free_bytes"] is not None and gpu["free_bytes"] < gpu["bytes"] / 2:
        return Check(name, "note", found, "Others use the most of it: see nvidia-smi.")
    return Check(name, "ok", found)


def check_bfloat16(facts: Facts) -> list[Check]:
    """Check who computes in bfloat16 by itself."""
    torch = facts.probed.get("torch", {"error": "not tried"})
    if "error" in torch:
        return [Check("bf16", "note", "not known, as torch does not work")]
    if torch["gpus"]:
        without = [gpu["name"] for gpu in torch["gpus"] if not gpu["bfloat16"]]
        if without:
            remedy = "--fp16 computes in 16 bits there; without it runs are float32."
            return [Check("bf16", "note", f"not on {', '.join(without)}", remedy)]
        return [Check("bf16", "ok", "on the GPU; the default for adapters")]
    if torch["cpu_error"]:
        again = "pip install --force-reinstall torch"
        return [Check("bf16", "problem", f"the CPU does not compute: {torch['cpu_error']}", again)]
    if torch["cpu_bfloat16"]:
        return [Check("bf16", "ok", "the CPU has instructions for it; runs on it are float32 unless --bf16 is given")]
    return [Check("bf16", "note", "the CPU has no instructions for it: --bf16 would be slower than float32")]


def check_bitsandbytes(facts: Facts) -> list[Check]:
    """Check that matrices come back right from 4 and 8 bits."""
    found = facts.probed.get("bitsandbytes", {"error": "not tried"})
    if "error" in found:
        again = (
            "pip install --force-reinstall bitsandbytes; without it leave out --load_in_4bit, --load_in_8bit and 8-bit "
            "--optim."
        )
        return [Check("4 and 8 bits", "problem", f"bitsandbytes does not work: {found['error']}", again)]
    off = ", ".join(f"{kind} {share:.1%}" for kind, share in found["bits"].items())
    return [Check("4 and 8 bits", "ok", f"a matrix on {found['device']} comes back within rounding (largest: {off})")]


def check_flash_attention(facts: Facts) -> list[Check]:
    """Check flash attention, which only some GPUs have."""
    gpus = facts.probed.get("torch", {}).get("gpus", [])
    fit = [gpu for gpu in gpus if float(gpu["capability"]) >= 8]
    version, found = version_of(FLASH), facts.probed.get(FLASH)
    if found is not None and "error" not in found:
        return [Check("flash attention", "ok", f"{version or 'installed'}: --attn_implementation flash_attention_2")]
    if found is not None:
        remedy = (
            f"pip install --force-reinstall --no-build-isolation {FLASH}, built for this torch; sdpa serves without it."
        )
        return [Check("flash attention", "note", f"{version or 'installed'}; does not work: {found['error']}", remedy)]
    if not fit:
        return [Check("flash attention", "ok", "not installed, and of no use here; sdpa is used")]
    remedy = f"pip install --no-build-isolation {FLASH}, for rows of 1,000 tokens and more; sdpa serves without it."
    return [Check("flash attention", "note", "not installed; sdpa is used", remedy)]


def check_cores(facts: Facts) -> list[Check]:
    """Check how many threads compute on how many cores."""
    cores, there = usable_cores(), os.cpu_count() or 1
    threads = facts.probed.get("torch", {}).get("threads")
    found = f"{cores:g} of {there}" + ("" if threads is None else f", {threads} threads")
    if threads is not None and threads > math.ceil(cores):
        remedy = f"export OMP_NUM_THREADS={math.ceil(cores)}; more threads than cores wait for each other."
        return [Check("cores", "note", found, remedy)]
    return [Check("cores", "ok", found)]


def check_memory(facts: Facts) -> list[Check]:
    """Check the memory that the machine or the container has."""
    total, free = memory()
    found = f"{bytes_text(free)} free of {bytes_text(total)}"
    if free < LITTLE_MEMORY:
        state: State = "problem" if free < NO_MEMORY else "note"
        return [
            Check("memory", state, found, "End other programs, or give the container more; small models still fit.")
        ]
    return [Check("memory", "ok", found)]


def check_disk(facts: Facts) -> list[Check]:
    """Check the cache of models and the folder where a run would be written."""
    hub = facts.probed.get("hub settings", {})
    cache = Path(hub.get("cache") or os.environ.get("HF_HUB_CACHE") or "~/.cache/huggingface/hub").expanduser()
    used, whole = size_of(cache)
    holds = f"holds {'' if whole else 'more than '}{bytes_text(used)}"
    places = (
        ("cache", cache, f"{_short(cache)} {holds}", "Give another folder: export HF_HOME=FOLDER"),
        ("folder", Path.cwd(), "where you are", "Change to another folder, or give an --output_dir elsewhere."),
    )
    checks = []
    for name, place, what, elsewhere in places:
        free = free_disk(place)
        found = f"{what}, {bytes_text(free)} free"
        if not can_write(place):
            checks.append(Check(name, "problem", f"{found}; no permission to write", elsewhere))
        elif free < LITTLE_DISK:
            clear = "`hf cache prune` clears what is not in use. " if name == "cache" else ""
            checks.append(Check(name, "problem" if free < NO_DISK else "note", found, clear + elsewhere))
        else:
            checks.append(Check(name, "ok", found))
    return checks


def check_hub(facts: Facts) -> list[Check]:
    """Check whether the hub answers; without it, what lies in folders and in the cache serves."""
    hub = {"status": None, **facts.probed.get("hub", {}), **facts.probed.get("hub settings", {"error": "not tried"})}
    if "endpoint" not in hub:
        return [Check("hub", "note", f"not known: {hub['error']}")]
    token = f"a token is {'' if hub['token'] else 'not '}set"
    if hub["offline"]:
        return [Check("hub", "note", f"switched off by HF_HUB_OFFLINE; {token}", "unset HF_HUB_OFFLINE to use it.")]
    if "error" in hub or hub["status"] >= 500:
        said = hub.get("error") or f"it answers {hub['status']}"
        remedy = (
            "Folders and the cache serve without it; export HF_HUB_OFFLINE=1 saves the waiting. Behind a proxy: export "
            "HTTPS_PROXY=ADDRESS"
        )
        return [Check("hub", "note", f"{hub['endpoint']} is not reached: {said}; {token}", remedy)]
    return [Check("hub", "ok", f"{hub['endpoint']} answers; {token}")]


def _short(path: Path) -> str:
    """A path without the user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


CHECKS: Mapping[str, Callable[[Facts], list[Check]]] = {
    "python": check_python,
    "libraries": check_libraries,
    "extras": check_extras,
    "gpu": check_gpu,
    "bf16": check_bfloat16,
    "4 and 8 bits": check_bitsandbytes,
    "flash attention": check_flash_attention,
    "cores": check_cores,
    "memory": check_memory,
    "disk": check_disk,
    "hub": check_hub,
}
