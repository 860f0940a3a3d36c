"""What a user points at (a run folder, an adapter, a model) -> model and tokenizer, ready to use.

A run folder knows its base; an adapter knows its base's hub name. The base's vocabulary is made as long as the
adapter's before the adapter is put on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from peft_mlm.adapter import ADAPTER_CONFIG, check_adapter_folder, load_adapter
from peft_mlm.arguments import ModelArguments
from peft_mlm.config import Arguments, read_arguments
from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.model import Base, load_base
from peft_mlm.run_folder import RunFolder, is_run_folder

Part = Literal["adapted", "base"]


@dataclass(frozen=True)
class Target:
    """What a user pointed at, resolved to files; nothing is loaded yet.

    Attributes:
        kind: "run", "adapter" or "model".
        base: How to load the base (or the model itself).
        adapter: Folder of the adapter, or None.
        arguments: Arguments of the run it belongs to, or None.
        run: That run's folder, or None.
    """

    kind: Literal["run", "adapter", "model"]
    base: ModelArguments
    adapter: Path | None
    arguments: Arguments | None
    run: Path | None


@dataclass(frozen=True)
class Loaded:
    """A model ready to use.

    Attributes:
        model: In evaluation mode; a PeftModel where there is an adapter.
        tokenizer: Its tokenizer.
        base: What loading the base told.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Base


def resolve_target(name_or_path: str, *, base: str | None = None, part: Part = "adapted") -> Target:
    """Find out what a name or path is, and which base belongs to it.

    Args:
        name_or_path: A run folder, the folder or hub name of an adapter, or the folder or hub name of a model.
        base: Base model to use instead of the recorded one.
        part: "base" leaves the adapter (or the training) out.

    Returns:
        Where to load base and adapter from.

    Raises:
        AdapterError: The adapter does not name its base, and none is given.
        ModelError: There is nothing at that name, or a run has not saved anything yet.
    """
    path = Path(name_or_path).expanduser()
    if is_run_folder(path):
        return _resolve_run(path, base, part)
    folder = _locate_adapter(name_or_path)
    if folder is None:
        return Target("model", ModelArguments(model_name_or_path=name_or_path), None, None, None)
    return _resolve_adapter(folder, base, part)


def find_adapter(name_or_path: str) -> Path:
    """Find the folder of an adapter, fetched from the hub if need be.

    Args:
        name_or_path: The folder of an adapter, a run folder, or a hub name.

    Returns:
        The folder.

    Raises:
        AdapterError: There is no adapter at that name.
    """
    path = Path(name_or_path).expanduser()
    folder = _locate_adapter(str(RunFolder(path).adapter) if is_run_folder(path) else name_or_path)
    if folder is None:
        raise AdapterError(f"{name_or_path} is no adapter: neither a folder with {ADAPTER_CONFIG} nor one on the hub.")
    return folder


def load_target(target: Target) -> Loaded:
    """Load what `resolve_target` found.

    Args:
        target: Where to load from.

    Returns:
        The model in evaluation mode, with its tokenizer.

    Raises:
        ModelError: The base cannot be loaded, or has no masked LM head of its own and no adapter brings one.
        AdapterError: The adapter does not fit.
    """
    if target.adapter is None:
        base = load_base(target.base, may_grow=False)
        if base.fresh_parameters:
            raise ModelError(
                f"{base.name_or_path} has no masked LM head of its own ({', '.join(base.fresh_parameters)} are not in "
                "it): its predictions would be random. Train an adapter on it first; that trains a head too."
            )
        return Loaded(base.model, base.tokenizer, base)
    check_adapter_folder(target.adapter)
    with_tokenizer = (target.adapter / "tokenizer_config.json").is_file()
    arguments = replace(target.base, tokenizer_name=str(target.adapter)) if with_tokenizer else target.base
    base = load_base(arguments, may_grow=with_tokenizer)
    adapted = load_adapter(base.model, target.adapter).eval()
    return Loaded(adapted, base.tokenizer, base)


def load(name_or_path: str, *, base: str | None = None) -> Loaded:
    """Load a run folder, an adapter with its base, or a model.

    Args:
        name_or_path: A folder or a hub name.
        base: Base model to use instead of the recorded one.

    Returns:
        The model in evaluation mode, with its tokenizer.
    """
    return load_target(resolve_target(name_or_path, base=base))


def _resolve_run(path: Path, base: str | None, part: Part) -> Target:
    run, arguments = RunFolder(path), read_arguments(RunFolder(path).arguments, for_training=False)
    model_arguments = _with_base(arguments.model, base)
    if part == "base":
        return Target("run", model_arguments, None, arguments, path)
    if (run.adapter / ADAPTER_CONFIG).is_file():
        return Target("run", model_arguments, run.adapter, arguments, path)
    if (run.model / "config.json").is_file():
        return Target("run", ModelArguments(model_name_or_path=str(run.model)), None, arguments, path)
    raise ModelError(
        f"The run {path} has saved neither adapter nor model yet. Let it finish, or give one of its checkpoints."
    )


def _resolve_adapter(folder: Path, base: str | None, part: Part) -> Target:
    config = check_adapter_folder(folder)
    adapter = None if part == "base" else folder
    # RUN/adapter, or RUN/checkpoints/checkpoint-N
    for path in (folder.resolve().parent, folder.resolve().parent.parent):
        if is_run_folder(path):
            arguments = read_arguments(RunFolder(path).arguments, for_training=False)
            return Target("adapter", _with_base(arguments.model, base), adapter, arguments, path)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"The adapter {folder} does not name its base model. Give it with --base.")
    revision = config.get("revision") if base is None else None
    return Target(
        "adapter", ModelArguments(model_name_or_path=name, model_revision=revision or "main"), adapter, None, None
    )


def _with_base(arguments: ModelArguments, base: str | None) -> ModelArguments:
    return arguments if base is None else replace(arguments, model_name_or_path=base, model_revision="main")


def _locate_adapter(name_or_path: str) -> Path | None:
    path = Path(name_or_path).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        return path
    return None if path.exists() else _adapter_on_hub(name_or_path)


def _adapter_on_hub(name: str) -> Path | None:
    """Fetch an adapter from the hub; None where that name is no adapter there (a model, or nothing)."""
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return None
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = [
            cached_file(name, file, **options)
            for file in (ADAPTER_CONFIG, "adapter_model.safetensors", "tokenizer_config.json", "tokenizer.json")
        ]
    except (OSError, ValueError):
        return None
    return Path(found[0]).parent if found[0] else None
