"""What lies in a folder that is shipped: an adapter or a model, alone or in its run; told from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft_mlm.errors import RunFolderError
from peft_mlm.run_folder import RunFolder, is_run_folder
from peft_mlm.safetensors_header import weight_files

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
TRAINER_STATE = "trainer_state.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Formats that run code when they are opened, or can hold some that do.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".msgpack", ".h5")


@dataclass(frozen=True)
class Shipped:
    """What a user pointed at.

    Attributes:
        given: The path as it was given.
        place: What it is: "run", "checkpoint" or "folder".
        kind: What lies there: "adapter" or "model".
        folder: Where that lies.
        run: The run it belongs to, or None.
    """

    given: str
    place: Literal["run", "checkpoint", "folder"]
    kind: Literal["adapter", "model"]
    folder: Path
    run: Path | None

    @property
    def config(self) -> Path:
        """The configuration: of PEFT for an adapter, of transformers for a model."""
        return self.folder / (ADAPTER_CONFIG if self.kind == "adapter" else MODEL_CONFIG)

    def weights(self) -> list[Path]:
        """Give its files of weights, the shards of a model one by one; empty where there are none in safetensors.

        Returns:
            The files.

        Raises:
            DamagedFileError: The index of the shards is damaged.
        """
        if self.kind == "adapter":
            file = self.folder / ADAPTER_WEIGHTS
            return [file] if file.exists() else []
        return weight_files(self.folder)


def find_shipped(name_or_path: str | Path) -> Shipped:
    """Find out what a path is.

    Args:
        name_or_path: A run folder, the folder of an adapter or a model, or a checkpoint.

    Returns:
        What lies there; no file has been opened.

    Raises:
        RunFolderError: There is no such folder, or neither adapter nor model in it.
    """
    given, path = str(name_or_path), Path(name_or_path).expanduser()
    if not path.is_dir():
        why = "is a file" if path.exists() else "does not exist"
        fetch = ""
        if HUB_NAME.fullmatch(given) and not path.exists():
            fetch = f" One on the hub is fetched by `hf download {given} --local-dir {path.name}`."
        raise RunFolderError(
            f"{given} {why}. Give a run folder, or the folder of an adapter, a model or a checkpoint.{fetch}"
        )
    if is_run_folder(path):
        return _in_run(given, path)
    kind = kind_of(path)
    if kind is None:
        pickles = [file.name for file in sorted(path.iterdir()) if is_pickle(file)]
        only = f" ({pickles[0]} in it is a pickle, which is never opened here)" if pickles else ""
        raise RunFolderError(
            f"{given} holds neither a run, nor an adapter ({ADAPTER_CONFIG}), nor a model ({MODEL_CONFIG}){only}."
        )
    return Shipped(given, "checkpoint" if (path / TRAINER_STATE).is_file() else "folder", kind, path, _run_around(path))


def kind_of(folder: Path) -> Literal["adapter", "model"] | None:
    """Tell what lies in a folder.

    Args:
        folder: Any folder.

    Returns:
        "adapter", "model", or None for neither.
    """
    if (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_WEIGHTS).is_file():
        return "adapter"
    return "model" if (folder / MODEL_CONFIG).is_file() or weight_files(folder) else None


def is_pickle(file: Path) -> bool:
    """Tell whether a file may run code when it is opened.

    Args:
        file: Its path; it is not opened.

    Returns:
        True for the endings of pickles and of formats that can hold one.
    """
    return file.suffix.lower() in PICKLES


def files_in(folder: Path) -> Iterator[Path]:
    """List the files of a folder and the folders in it, without hidden ones, as they are shipped.

    Args:
        folder: Any folder.

    Yields:
        Files, links to files among them; links to folders are not followed.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from files_in(entry)
        elif not entry.is_dir():
            yield entry


def _in_run(given: str, path: Path) -> Shipped:
    run = RunFolder(path)
    if (run.adapter / ADAPTER_CONFIG).is_file():
        return Shipped(given, "run", "adapter", run.adapter, path)
    if (run.model / MODEL_CONFIG).is_file():
        return Shipped(given, "run", "model", run.model, path)
    raise RunFolderError(
        f"The run {given} has saved neither adapter nor model yet. Let it finish, or give one of its checkpoints."
    )


def _run_around(folder: Path) -> Path | None:
    """Find the run that a folder lies in: RUN/adapter, RUN/merged, RUN/checkpoints/checkpoint-N."""
    parents = (folder.resolve().parent, folder.resolve().parent.parent)
    return next((path for path in parents if is_run_folder(path)), None)
