"""Several adapters on one base: switched, mixed within a batch, added and replaced without loading the base again.

The base's weights are in memory once. Each adapter computes what it computes alone, bit by bit; kinds of
adapters with which PEFT would give other numbers are refused (`adapters_together.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import PreTrainedTokenizerBase

from peft_mlm import loading
from peft_mlm.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from peft_mlm.adapter_fit import check_adapter_fits
from peft_mlm.adapters_together import (
    ONE_BY_ONE,
    Contents,
    check_mixed,
    check_together,
    layers_that_switch,
    read_contents,
    swappable,
    switch,
    takes_rows_first,
)
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import base_recipe, with_base_recipe
from peft_mlm.checkpoint import load_outline
from peft_mlm.errors import AdapterError, DataError, ModelError
from peft_mlm.fingerprint import BASE_FINGERPRINT
from peft_mlm.loading import Loaded, Target, check_base, of_base, resolve_target
from peft_mlm.model import Base, brings_tokenizer, load_base, load_tokenizer, with_tokenizer_of
from peft_mlm.run_folder import is_run_folder

# PEFT's word for a row of a batch that gets no adapter.
NO_ADAPTER = "__base__"
# How a base may be prepared for an adapter, for messages.
_RECIPE = "quantised, or untied"


class AdapterSet:
    """One base with several adapters; made by `load_adapters`.

    `base` is what loading the base told, `tokenizer` its tokenizer, or that of the adapters where they have new tokens.

    Args:
        base: The base, without adapter.
        outline: The same model without weights, to hold new adapters against; None where it has code of its own.
    """

    def __init__(self, base: Base, outline: Any) -> None:
        self.tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self.base = base
        self._outline = outline
        self._model: PeftModel | None = None
        # Name for the user -> PEFT's name. PEFT looks for its names within names of weights, and an adapter that is
        # replaced stays until the new one is there: so PEFT's are of our making, and none is part of another.
        self._inner: dict[str, str] = {}
        self._contents: dict[str, Contents] = {}
        self._count = 0
        self._active: str | None = None
        self._batch_first: bool | None = None
        # Layers on which the adapter in use is named; none where PEFT has to switch, as after each change.
        self._layers: list[Any] = []

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order they came."""
        return list(self._inner)

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; None for the base alone."""
        return self._active

    @property
    def model(self) -> PeftModel:
        """The model, computing with the adapter in use."""
        assert self._model is not None  # `load_adapters` puts one adapter on at least
        return self._model

    def use(self, name: str | None) -> PeftModel:
        """Switch to one adapter.

        Args:
            name: Its name, or None for the base alone.

        Returns:
            The model; it is the same object each time.

        Raises:
            AdapterError: There is no adapter of that name.
        """
        inner = None if name is None else self._known(name)
        if self._layers:
            switch(self.model, self._layers, inner)
        elif inner is None:
            self.model.base_model.disable_adapter_layers()
        else:
            if self._active is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(inner, inference_mode=True)
            self._layers = layers_that_switch(self.model)
        self._active = name
        return self.model

    def loaded(self, name: str | None) -> Loaded:
        """Switch to one adapter, and give what `peft_mlm.load` gives for it alone.

        Args:
            name: Its name, or None for the base alone.

        Returns:
            Model and tokenizer; the model follows later switches.
        """
        return Loaded(self.use(name), self.tokenizer, self.base)

    @torch.no_grad()
    def logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, names: Sequence[str | None]
    ) -> torch.Tensor:
        """Compute one batch with an adapter of its own for each row, in one pass.

        Args:
            input_ids: (rows, tokens).
            attention_mask: (rows, tokens).
            names: Per row the name of its adapter, or None for the base.

        Returns:
            Logits, (rows, tokens, vocabulary); those of a row are the ones of its adapter alone, up to the order of
            sums.

        Raises:
            AdapterError: There is no such adapter, or these adapters cannot be mixed in a batch.
            DataError: There are not as many names as rows.
        """
        if len(names) != len(input_ids):
            raise DataError(f"There are {len(input_ids)} rows and {len(names)} names of adapters: give one per row.")
        inner = [NO_ADAPTER if name is None else self._known(name) for name in names]
        self._check_mixed()
        before = self._active
        if before is None:  # else PEFT passes over its layers
            self.use(self.names[0])
        try:
            output: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=attention_mask, adapter_names=inner
            ).logits
        finally:
            if before is None:
                self.use(None)
        return output

    def add(self, name: str, name_or_path: str, *, any_base: bool = False) -> None:
        """Put one more adapter on the base; it is not switched on.

        Args:
            name: A new name for it.
            name_or_path: A run folder, or an adapter (a folder or a hub name).
            any_base: Also one that was trained on a base with other weights.

        Raises:
            AdapterError: The name is taken, or the adapter does not fit the base or the other adapters.
        """
        if not name or name in self._inner:
            raise AdapterError(f"There is an adapter named {name!r} already: take another name, or replace it.")
        self._put_on(name, self._check_new(name, name_or_path, any_base=any_base, beside=self._contents))

    def replace(self, name: str, name_or_path: str, *, any_base: bool = False) -> None:
        """Put another adapter in the place of one; the base stays, and a mistake leaves the old one there.

        Args:
            name: Name of the one that goes, and of the one that comes.
            name_or_path: A run folder, or an adapter (a folder or a hub name).
            any_base: Also one that was trained on a base with other weights.

        Raises:
            AdapterError: There is no adapter of that name, or the new one does not fit.
        """
        old, was_active = self._known(name), self._active
        beside = {other: contents for other, contents in self._contents.items() if other != name}
        new = self._check_new(name, name_or_path, any_base=any_base, beside=beside)
        if swappable(self._contents[name], new):
            self.use(name)  # PEFT compares the new config with that of the adapter in use
            hotswap_adapter(self.model, str(new.folder), old, torch_device=str(self.model.device))
            self.model.peft_config[old].lora_alpha = new.config["lora_alpha"]
            self._contents[name] = new
        else:
            self._put_on(name, new)
            self.use(name)  # PEFT wants another one active where the active one goes
            self.model.delete_adapter(old)
            self._layers = []
        self.use(was_active)

    def remove(self, name: str) -> None:
        """Take one adapter off; where it was in use, the base alone is from then on.

        Args:
            name: Its name.

        Raises:
            AdapterError: There is no adapter of that name, or it is the last one.
        """
        inner = self._known(name)
        if len(self._inner) == 1:
            raise AdapterError(f"{name!r} is the only adapter. Use None for the base alone, or replace it.")
        active = None if self._active == name else self._active
        if self._active in (name, None):  # PEFT wants another one active where the active one goes
            self.use(next(other for other in self._inner if other != name))
        self.model.delete_adapter(inner)
        del self._inner[name], self._contents[name]
        self._batch_first, self._layers = None, []
        self.use(active)

    def _known(self, name: str) -> str:
        if name not in self._inner:
            raise AdapterError(f"There is no adapter {name!r} here. Adapters: {', '.join(self._inner)}.")
        return self._inner[name]

    def _check_new(self, name: str, path: str, *, any_base: bool, beside: Mapping[str, Contents]) -> Contents:
        target = _target_of(path, None)
        new = read_contents(_folder_of(target))
        named = target.base.model_name_or_path
        if named != self.base.name_or_path and not any_base:
            _check_told(name, new.folder, named, self.base.name_or_path)
        check_together({**beside, name: new})
        others = with_base_recipe(ModelArguments(), next(iter(self._contents.values())).folder)
        if base_recipe(_arguments_of(target)) != base_recipe(others):
            raise AdapterError(f"The base of {name} was prepared in another way ({_RECIPE}) than that of the others.")
        _check_vocabulary(name, new.folder, self.tokenizer, self.base)
        check_base(new.folder, self.base, any_base=any_base)
        if self._outline is not None:
            rows = self.base.model.get_input_embeddings().weight.shape[0]
            check_adapter_fits(new.folder, ADAPTER_WEIGHTS, new.config, self._outline, rows=rows)
        return new

    def _put_on(self, name: str, new: Contents) -> None:
        inner = f"adapter_{self._count:06d}"
        self._count += 1
        self._layers = []
        start: Any = self.base.model if self._model is None else self._model
        try:
            self._model = load_adapter(start, new.folder, name=inner, outline=self._outline).eval()
        except AdapterError:
            if self._model is not None and inner in self._model.peft_config:
                self._model.delete_adapter(inner)
            raise
        self._inner[name], self._contents[name] = inner, new
        self._batch_first = None
        self.use(self._active)

    def _check_mixed(self) -> None:
        check_mixed(self._contents)
        if self._batch_first is None:
            self._batch_first = takes_rows_first(self.model)
        if not self._batch_first:
            raise AdapterError(
                f"A layer of this {self.model.config.model_type} that an adapter changes does not get the rows of a "
                f"batch one by one, so that PEFT would give them the adapters of other rows. {ONE_BY_ONE}"
            )


@overload
def load(  # type: ignore[overload-overlap]
    name_or_path: str, *, base: str | None = None, any_base: bool = False
) -> Loaded: ...


@overload
def load(name_or_path: str, *, adapters: Mapping[str, str] | Sequence[str], any_base: bool = False) -> AdapterSet: ...


@overload
def load(name_or_path: Sequence[str], *, base: str | None = None, any_base: bool = False) -> AdapterSet: ...


def load(
    name_or_path: str | Sequence[str],
    *,
    base: str | None = None,
    any_base: bool = False,
    adapters: Mapping[str, str] | Sequence[str] | None = None,
) -> Loaded | AdapterSet:
    """Load a run folder, an adapter with its base, or a model; or one base with several adapters.

    Args:
        name_or_path: A folder or a hub name: of a run, an adapter or a model; with `adapters` that of their base. Or
            several runs or adapters, which then are named after their folders.
        base: Base model to use instead of the recorded one.
        any_base: Put adapters on a base with other weights than they were trained on.
        adapters: Runs or adapters by name, or a list of them.

    Returns:
        The model in evaluation mode, with its tokenizer; with several adapters an `AdapterSet`, in which the first one
        is in use.

    Raises:
        AdapterError: The adapters do not fit the base, or do not go together.
    """
    if adapters is not None:
        if not isinstance(name_or_path, str) or base is not None:
            raise AdapterError("Give the base once: load(base, adapters=...).")
        return load_adapters(adapters, base=name_or_path, any_base=any_base)
    if isinstance(name_or_path, str):
        return loading.load(name_or_path, base=base, any_base=any_base)
    return load_adapters(name_or_path, base=base, any_base=any_base)


def load_adapters(
    adapters: Mapping[str, str] | Sequence[str], *, base: str | None = None, any_base: bool = False
) -> AdapterSet:
    """Load one base and put several adapters on it; the first one is in use.

    Args:
        adapters: Runs or adapters (folders or hub names) by name; those of a list are named after their folders.
        base: The base; the one that the first adapter records if None.
        any_base: Also adapters that were trained on a base with other weights.

    Returns:
        The base with its adapters.

    Raises:
        AdapterError: There is none, one does not fit the base, or they do not go together.
        ModelError: The base is a run or an adapter itself, or cannot be loaded.
    """
    given = dict(adapters) if isinstance(adapters, Mapping) else _named(adapters)
    if not given:
        raise AdapterError("There is no adapter: give one or more.")
    if base is not None and (is_run_folder(Path(base)) or (Path(base) / ADAPTER_CONFIG).is_file()):
        kind = "a run" if is_run_folder(Path(base)) else "an adapter"
        raise ModelError(f"{base} is no base model but {kind}. Give the base itself, or the adapters alone.")
    targets = {name: _target_of(path, base) for name, path in given.items()}
    contents = {name: read_contents(_folder_of(target)) for name, target in targets.items()}
    check_together(contents)
    folders = {name: adapter.folder for name, adapter in contents.items()}
    first = next(iter(targets))
    arguments = _arguments_of(targets[first])
    for name, target in targets.items():
        if base_recipe(_arguments_of(target)) != base_recipe(arguments):
            raise AdapterError(
                f"The bases of {first} and {name} were prepared in different ways ({_RECIPE}): load them apart."
            )
        named = target.base.model_name_or_path
        if named != arguments.model_name_or_path and not any_base:
            _check_told(name, folders[name], named, arguments.model_name_or_path)
    with_tokenizer = [name for name, folder in folders.items() if brings_tokenizer(folder)]
    if with_tokenizer:
        arguments = with_tokenizer_of(arguments, folders[with_tokenizer[0]])
    outline = of_base(targets[first], arguments, load_outline)
    loaded = of_base(targets[first], arguments, lambda named: load_base(named, may_grow=bool(with_tokenizer)))
    made = AdapterSet(loaded, outline)
    for name, folder in folders.items():
        _check_vocabulary(name, folder, loaded.tokenizer, loaded)
        check_base(folder, loaded, any_base=any_base)
    for name, adapter in contents.items():
        made._put_on(name, adapter)
    made.use(first)
    return made


def _check_told(name: str, folder: Path, recorded: str | None, used: str | None) -> None:
    """Where bases have different names, only a fingerprint can tell that they are one."""
    if not (folder / BASE_FINGERPRINT).is_file():
        raise AdapterError(
            f"{name} names {recorded} as its base, the others {used}, and it has no fingerprint to tell whether they "
            "are the same. Give the base, or any_base."
        )


def _check_vocabulary(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    if brings_tokenizer(folder):
        own = load_tokenizer(ModelArguments(tokenizer_name=str(folder)))
        same = own.get_vocab() == tokenizer.get_vocab() and set(own.all_special_tokens) == set(
            tokenizer.all_special_tokens
        )
    else:
        same = not base.tokenizer_changed
    if not same:
        raise AdapterError(
            f"{name} has another vocabulary than the adapters before it: its ids mean other tokens. Load it apart, or "
            "merge each."
        )


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Name adapters after their folders; RUN/adapter after the run."""
    named: dict[str, str] = {}
    for path in paths:
        folder = Path(path).expanduser()
        name = folder.resolve().parent.name if folder.name == "adapter" and folder.exists() else folder.name
        if name in named:
            raise AdapterError(f"{named[name]} and {path} would both be named {name}: give names, {{'...': {path!r}}}.")
        named[name] = path
    return named


def _target_of(name_or_path: str, base: str | None) -> Target:
    target = resolve_target(name_or_path, base=base)
    if target.adapter is None:
        raise AdapterError(f"{name_or_path} is no adapter, and no run with one. Give one that holds {ADAPTER_CONFIG}.")
    return target


def _folder_of(target: Target) -> Path:
    assert target.adapter is not None  # `_target_of` has seen to it
    return target.adapter


def _arguments_of(target: Target) -> ModelArguments:
    """How to load the base, with its own tokenizer."""
    arguments = with_base_recipe(target.base, _folder_of(target))
    return replace(arguments, tokenizer_name=None, add_tokens=None, add_special_tokens=None)
