"""What a user points at (a run folder, an adapter, a model) -> model and tokenizer, ready to use.

A run folder knows its base; an adapter knows its base's hub name. What lies in a run folder (adapter, checkpoints, a
merged model) belongs to that run. The base's vocabulary is made as long as the adapter's before the adapter is put on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder, load_adapter
from peft_mlm.adapter_fit import check_adapter_fits
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import with_base_recipe
from peft_mlm.checkpoint import load_outline
from peft_mlm.config import Arguments, read_arguments
from peft_mlm.errors import AdapterError, ArgumentsError, ModelError
from peft_mlm.fingerprint import changed_weights, misfits, read_fingerprint
from peft_mlm.hub_names import adapter_on_hub, parted
from peft_mlm.model import Base, brings_tokenizer, load_base, with_tokenizer_of
from peft_mlm.quantization import dequantise
from peft_mlm.run_folder import RunFolder, is_run_folder
from peft_mlm.training_facts import changed_tokenizer

Part = Literal["adapted", "base"]
Loads = TypeVar("Loads")


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


@dataclass(frozen=True)
class Prepared:
    """An adapter that was looked at: what its base is, and that it fits there by names and shapes.

    Attributes:
        arguments: How to load the base it was trained on.
        outline: That base without weights; None where it has code of its own.
        with_tokenizer: Whether the adapter brings a tokenizer.
    """

    arguments: ModelArguments
    outline: PreTrainedModel | None
    with_tokenizer: bool

    @property
    def quantised(self) -> bool:
        """Whether the base is quantised: as it is loaded, or in its file."""
        stored = None if self.outline is None else getattr(self.outline.config, "quantization_config", None)
        return self.arguments.load_in_4bit or self.arguments.load_in_8bit or stored is not None


def resolve_target(name_or_path: str, *, base: str | None = None, part: Part = "adapted") -> Target:
    """Find out what a name or path is, and which base belongs to it.

    Args:
        name_or_path: A run folder, the folder or hub name of an adapter, or the folder or hub name of a model; behind a
            hub name a revision may follow (org/name@v1).
        base: Base model to use instead of the recorded one; the same.
        part: "base" leaves the adapter (or the training) out.

    Returns:
        Where to load base and adapter from.

    Raises:
        AdapterError: The adapter does not name its base, and none is given.
        ModelError: A run has not saved anything yet, or another base (or the base alone) is asked for where there is
            only a whole model.
    """
    path = Path(name_or_path).expanduser()
    if is_run_folder(path):
        return _resolve_run(path, base, part)
    folder = _locate_adapter(name_or_path)
    if folder is None:
        return _resolve_model(name_or_path, base, part)
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


def with_quantisation(target: Target, wanted: Mapping[str, Any]) -> Target:
    """Load a base, or a whole model, in other bits than recorded.

    Args:
        target: Where to load from.
        wanted: Arguments of quantisation by name; empty to leave all as it is.

    Returns:
        The target with these arguments.

    Raises:
        ArgumentsError: There is an adapter: it fits only the base as it was trained on; or both bits are asked for.
    """
    asked = [f"--{name}" for name, value in wanted.items() if value is True]
    if wanted.get("load_in_4bit") and wanted.get("load_in_8bit"):
        raise ArgumentsError("load_in_4bit and load_in_8bit are both true: choose one.")
    if wanted and target.adapter is not None:
        raise ArgumentsError(
            f"{', '.join(asked) or 'Quantisation'}: an adapter is loaded on its base as that was in training. Leave it "
            "out, or merge the adapter first and load the merged model in fewer bits."
        )
    return replace(target, base=replace(target.base, **wanted))


def prepare_adapter(target: Target, *, original: bool = False) -> Prepared:
    """Look at an adapter and its base, before any weight is loaded.

    Args:
        target: Where to load from; it has an adapter.
        original: Whether the base is to be the float one that was quantised for training.

    Returns:
        How to load the base, and its outline.

    Raises:
        ModelError: There is no such base.
        AdapterError: The adapter does not fit it.
    """
    assert target.adapter is not None
    config = check_adapter_folder(target.adapter)
    with_tokenizer = brings_tokenizer(target.adapter)
    arguments = with_base_recipe(target.base, target.adapter)
    if original:
        arguments = replace(arguments, load_in_4bit=False, load_in_8bit=False)
    arguments = with_tokenizer_of(arguments, target.adapter)
    outline = of_base(target, arguments, load_outline)
    if outline is not None:
        rows = None if with_tokenizer else outline.get_input_embeddings().weight.shape[0]
        check_adapter_fits(target.adapter, ADAPTER_WEIGHTS, config, outline, rows=rows)
    return Prepared(arguments, outline, with_tokenizer)


def load_target(target: Target, *, any_base: bool = False, dequantised: bool = False, original: bool = False) -> Loaded:
    """Load what `resolve_target` found.

    Args:
        target: Where to load from.
        any_base: Put the adapter on a base with other weights than it was trained on.
        dequantised: Whether a quantised base is turned into the float32 model it computes as, on the CPU, before the
            adapter is put on it; its `dtype` must be float32.
        original: Whether the adapter is put on the float base that was quantised for training.

    Returns:
        The model in evaluation mode, with its tokenizer.

    Raises:
        ModelError: The base cannot be loaded, or has no masked LM head of its own and no adapter brings one.
        AdapterError: The adapter does not fit, or was trained on another base.
    """
    if target.adapter is None:
        # Rows added for a run's own tokenizer start the same each time: the base is the one that the run measured.
        base = _load_base(target, target.base, may_grow=target.base.tokenizer_name is not None)
        if base.fresh_parameters:
            raise ModelError(
                f"{base.name_or_path} has no masked LM head of its own ({', '.join(base.fresh_parameters)} are not in "
                "it): its predictions would be random. Train an adapter on it first; that trains a head too. "
                + " ".join(base.notices)
            )
        return Loaded(base.model, base.tokenizer, base)
    prepared = prepare_adapter(target, original=original)
    base = _load_base(target, prepared.arguments, may_grow=prepared.with_tokenizer)
    check_base(target.adapter, base, any_base=any_base)
    if dequantised:
        dequantise(base.model).cpu()
    adapted = load_adapter(base.model, target.adapter).eval()
    return Loaded(adapted, base.tokenizer, base)


def check_base(
    adapter: Path,
    base: Base,
    *,
    any_base: bool = False,
    same_tokenizer: bool = True,
    remedy: str = "Give the right one with --base, or go on with this one by --any_base.",
) -> None:
    """Refuse a base that the adapter was not trained on, even if its shapes fit.

    Args:
        adapter: The adapter's folder.
        base: What was loaded.
        any_base: Let a base of the same make pass, whatever its weights and its tokenizer.
        same_tokenizer: Whether its tokenizer must be that of the adapter's training.
        remedy: What to do about another base; a sentence.

    Raises:
        AdapterError: The fingerprint beside the adapter is another; adapters without one pass.
    """
    recorded = read_fingerprint(adapter)
    if recorded is None:
        return
    told = misfits(recorded, base.fingerprint)
    if told:
        raise AdapterError(
            f"The adapter {adapter} does not fit the base model {base.name_or_path}: {'; '.join(told)}. Give the base "
            "that it was trained on."
        )
    told = changed_weights(recorded, base.fingerprint)
    told += changed_tokenizer(adapter, base.tokenizer) if same_tokenizer else []
    if told and not any_base:
        raise AdapterError(
            f"{base.name_or_path} is not the base that the adapter {adapter} was trained on: {'; '.join(told)}. "
            + remedy
        )


def load(name_or_path: str, *, base: str | None = None, any_base: bool = False) -> Loaded:
    """Load a run folder, an adapter with its base, or a model.

    Args:
        name_or_path: A folder or a hub name.
        base: Base model to use instead of the recorded one.
        any_base: Put the adapter on a base with other weights than it was trained on.

    Returns:
        The model in evaluation mode, with its tokenizer.
    """
    return load_target(resolve_target(name_or_path, base=base), any_base=any_base)


def _load_base(target: Target, arguments: ModelArguments, *, may_grow: bool) -> Base:
    return of_base(target, arguments, lambda named: load_base(named, may_grow=may_grow))


def of_base(target: Target, arguments: ModelArguments, load: Callable[[ModelArguments], Loads]) -> Loads:
    """Load something of the base; where it is not found, say who named it.

    Args:
        target: Which run or adapter names the base.
        arguments: How to load it.
        load: Loads it.

    Returns:
        What `load` gives.

    Raises:
        ModelError: There is no such base.
    """
    name = arguments.model_name_or_path
    if name is not None and name.startswith("~"):
        name = str(Path(name).expanduser())
    try:
        return load(replace(arguments, model_name_or_path=name))
    except ModelError as error:
        if target.kind == "model" or (name is not None and Path(name).exists()):
            raise
        recorded = f"{name} is the base that the {target.kind} names; if it lies elsewhere, say where by --base."
        raise ModelError(f"{error} {recorded}") from error


def _resolve_run(path: Path, base: str | None, part: Part) -> Target:
    run, arguments = RunFolder(path), read_arguments(RunFolder(path).arguments, for_training=False)
    if part == "base":
        return Target("run", _base_of_run(path, arguments, base), None, arguments, path)
    if (run.adapter / ADAPTER_CONFIG).is_file():
        return Target("run", _with_base(arguments.model, base), run.adapter, arguments, path)
    if (run.model / "config.json").is_file():
        _refuse_base(path, base)
        return Target("run", ModelArguments(model_name_or_path=str(run.model)), None, arguments, path)
    raise ModelError(
        f"The run {path} has saved neither adapter nor model yet. Let it finish, or give one of its checkpoints."
    )


def _resolve_adapter(folder: Path, base: str | None, part: Part) -> Target:
    config = check_adapter_folder(folder)
    adapter = None if part == "base" else folder
    run = _run_around(folder)
    if run is not None:
        arguments = read_arguments(RunFolder(run).arguments, for_training=False)
        model = with_tokenizer_of(arguments.model, folder)
        return Target("adapter", _with_base(model, base), adapter, arguments, run)
    name = config.get("base_model_name_or_path")
    if base is None and not name:
        raise AdapterError(f"The adapter {folder} does not name its base model. Give it with --base.")
    recorded = _with_base(
        ModelArguments(model_name_or_path=name, model_revision=config.get("revision") or "main"), base
    )
    if part == "base":  # in the bits, and with the tokens, that it had below the adapter
        recorded = with_tokenizer_of(with_base_recipe(recorded, folder), folder)
    return Target("adapter", recorded, adapter, None, None)


def _resolve_model(name_or_path: str, base: str | None, part: Part) -> Target:
    path = Path(name_or_path).expanduser()
    run = _run_around(path) if path.exists() else None
    if run is None:
        if part == "base":
            raise ModelError(f"{name_or_path} is a model without adapter: the base itself. Leave --use_base out.")
        _refuse_base(name_or_path, base)
        return Target("model", _model_named(name_or_path), None, None, None)
    arguments = read_arguments(RunFolder(run).arguments, for_training=False)
    if part == "base":
        return Target("model", _base_of_run(run, arguments, base), None, arguments, run)
    _refuse_base(name_or_path, base)
    return Target("model", ModelArguments(model_name_or_path=name_or_path), None, arguments, run)


def _run_around(folder: Path) -> Path | None:
    """Find the run that a folder lies in: RUN/adapter, RUN/merged, RUN/checkpoints/checkpoint-N."""
    parents = (folder.resolve().parent, folder.resolve().parent.parent)
    return next((path for path in parents if is_run_folder(path)), None)


def _base_of_run(run: Path, arguments: Arguments, base: str | None) -> ModelArguments:
    if base is None and arguments.model.model_name_or_path is None:
        raise ModelError(f"The run {run} trained a model from scratch: it has no base. Leave --use_base out.")
    shipped = RunFolder(run).adapter if RunFolder(run).adapter.is_dir() else RunFolder(run).model
    return _with_base(with_tokenizer_of(arguments.model, shipped), base)


def _refuse_base(name_or_path: str | Path, base: str | None) -> None:
    if base is not None:
        raise ModelError(f"{name_or_path} is a whole model, and needs no base. Leave --base out ({base}).")


def _with_base(arguments: ModelArguments, base: str | None) -> ModelArguments:
    if base is None:
        return arguments
    named = _model_named(base)
    return replace(arguments, model_name_or_path=named.model_name_or_path, model_revision=named.model_revision)


def _locate_adapter(name_or_path: str) -> Path | None:
    path = Path(name_or_path).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        return path
    return None if path.exists() else adapter_on_hub(name_or_path)


def _model_named(name: str) -> ModelArguments:
    named, revision = parted(name)
    return ModelArguments(model_name_or_path=named, model_revision=revision)
