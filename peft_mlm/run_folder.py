"""The run folder: what a training run leaves behind, and how later commands find their way in it.

    arguments.yaml    all arguments, resolved; runs again
    sources.json      where each value came from
    environment.json  versions, commit, device
    dataset.json      per split: rows, tokens, dropped, truncated, unknown share, fingerprint
    metrics.jsonl     one record per log and evaluation
    summary.json      status, figures before and after, parameters, bytes, seconds
    checkpoints/      checkpoint-N, to resume from
    tensorboard/      with --report_to tensorboard
    adapter/          the adapter (or model/, where the whole model was trained)

Files are written to a temporary name and renamed, so that a reader sees an old or a new one, never half of one.
"""

from __future__ import annotations

import fcntl
import glob
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mlm.errors import RunFolderError

# Ends the names of folders that are being written.
STAGED = ".unfinished"
PACKAGES = ("peft-mlm", "torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """Names of the files in a run folder.

    Attributes:
        path: The folder, `output_dir`.
    """

    path: Path

    @property
    def arguments(self) -> Path:
        """All arguments, resolved."""
        return self.path / "arguments.yaml"

    @property
    def sources(self) -> Path:
        """Where each value came from."""
        return self.path / "sources.json"

    @property
    def environment(self) -> Path:
        """Versions, commit, device."""
        return self.path / "environment.json"

    @property
    def dataset(self) -> Path:
        """Facts about the rows of each split."""
        return self.path / "dataset.json"

    @property
    def metrics(self) -> Path:
        """One record per log and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Status and figures."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints to resume from."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """What TensorBoard shows, with `report_to`."""
        return self.path / "tensorboard"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, where no adapter was asked for."""
        return self.path / "model"


def is_run_folder(path: Path) -> bool:
    """Tell whether a path is a run folder.

    Args:
        path: Any path.

    Returns:
        True if it holds the arguments and the summary of a run.
    """
    run = RunFolder(path)
    return run.arguments.is_file() and run.summary.is_file()


def check_output_dir(path: Path, *, resume: bool) -> None:
    """Check, without writing, that a run (or a merge, which never resumes) may write here.

    Args:
        path: `output_dir`.
        resume: Whether a run goes on.

    Raises:
        RunFolderError: It is a file, is not empty although a new run starts, or holds no run to go on with.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"output_dir {path} is a file. Give a folder.")
    if resume:
        if not is_run_folder(path):
            raise RunFolderError(
                f"There is no run in {path} to resume. Leave out --resume_from_checkpoint to start one."
            )
    elif path.is_dir() and any(path.iterdir()):
        run = "; the run in it goes on by `train` with --resume_from_checkpoint true" if is_run_folder(path) else ""
        raise RunFolderError(
            f"output_dir {path} is not empty, and nothing in it is overwritten. Give another folder{run}."
        )
    parent = next(p for p in (path, *path.resolve().parents) if p.exists())
    if not parent.is_dir():
        raise RunFolderError(f"output_dir {path} cannot be made: {parent} is a file. Give another folder.")
    if not os.access(parent, os.W_OK):
        raise RunFolderError(f"output_dir {path}: no permission to write in {parent}. Give another folder.")


def check_new_folder(path: Path) -> None:
    """Check, without writing, that a folder can be made as a whole: written beside its place, then put there.

    Args:
        path: `output_dir`.

    Raises:
        RunFolderError: It is a file, is not empty, is the folder one is in, or there is no permission to make it.
    """
    check_output_dir(path, resume=False)
    if path.is_dir() and path.samefile(Path.cwd()):
        raise RunFolderError(f"output_dir {path} is the folder you are in. Give a new one.")
    beside = path.resolve().parent
    if beside.exists() and not os.access(beside, os.W_OK):
        raise RunFolderError(f"output_dir {path} cannot be made: no permission to write in {beside}.")


def find_checkpoint(run: RunFolder, wanted: str) -> Path:
    """Find the checkpoint to resume from.

    Args:
        run: The run folder.
        wanted: "true" for the newest one of the run, or the path of one.

    Returns:
        The folder of the checkpoint.

    Raises:
        RunFolderError: There is none, or it is not complete.
    """
    if wanted.lower() not in ("true", "last", "1", "yes"):
        chosen = Path(wanted).expanduser()
    else:
        found = [p for p in run.checkpoints.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
        complete = [p for p in found if (p / "trainer_state.json").is_file()]
        if not complete:
            raise RunFolderError(f"{run.checkpoints} holds no checkpoint. Start the run anew with another output_dir.")
        chosen = max(complete, key=lambda p: int(p.name.rpartition("-")[2]))
    if not (chosen / "trainer_state.json").is_file():
        raise RunFolderError(f"{chosen} is no checkpoint: it has no trainer_state.json.")
    return chosen


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON; nan and infinity become null, as JSON has neither.

    Args:
        path: The file.
        record: Dicts, lists, strings, numbers.
    """
    write_text(path, json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        RunFolderError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Args:
        path: The file.
        text: Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a file of JSON lines.

    Args:
        path: The file.
        record: Strings and numbers.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(record)) + "\n")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the records after a step, before a run goes on from there.

    Args:
        path: `metrics.jsonl`.
        step: The step of the checkpoint.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if json.loads(line).get("step", 0) <= step))


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Make a folder as a whole: what is written in the block appears under its name at the end, or not at all.

    It is on the disk before it has its name. What a process that was killed has left beside it is removed.

    Args:
        folder: Its final name; what stood there is replaced (the caller has checked that it may be).

    Yields:
        A temporary folder beside it to write into.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary, held = _staging_folder(folder)
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        open_to_umask(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def open_to_umask(folder: Path) -> None:
    """Give the files in a folder the permissions of any new file; safetensors writes its own for the owner alone.

    Args:
        folder: What was written.
    """
    ordinary = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o7777 | ordinary)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Args:
        path: The file or the folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(record: Any) -> Any:
    """Replace nan and infinity by None, in nested dicts and lists.

    Args:
        record: Dicts, lists, strings, numbers.

    Returns:
        The same without them.
    """
    if isinstance(record, dict):
        return {key: finite(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def describe_environment(device: str) -> dict[str, Any]:
    """Describe what a run ran on; no user, host or path.

    Args:
        device: The device's name, as torch gives it.

    Returns:
        Versions of Python and the libraries, the commit of this package where it runs from a checkout, the device.
    """
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "device": device,
        "versions": versions,
        "commit": _own_commit(),
    }


def folder_bytes(folder: Path) -> int:
    """Sum the sizes of the files in a folder.

    Args:
        folder: Any folder.

    Returns:
        Bytes.
    """
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _own_commit() -> str | None:
    """Give the commit of the checkout this package runs from; None when it is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of this name that no process works in any more."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????{STAGED}"):
        with suppress(OSError):
            held = _lock(left)
            try:
                shutil.rmtree(left)
            finally:
                os.close(held)


def _staging_folder(folder: Path) -> tuple[Path, int]:
    """Make a temporary folder beside a folder, and hold it; anew where a process took it for a leftover before that."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=STAGED, dir=folder.parent))
        with suppress(FileNotFoundError, BlockingIOError):
            held = _lock(temporary)
            if temporary.exists():
                return temporary, held
            os.close(held)


def _lock(folder: Path) -> int:
    """Hold a folder until the descriptor is closed; the system closes it when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
