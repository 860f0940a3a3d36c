"""A base and what was made of it, side by side: the base is loaded once, with its adapters on it.

Adapters that cannot be switched off (their biases lie in the base's), and models that were trained whole, stand beside
a base that is loaded by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peft_mlm.adapter_set import load_adapters
from peft_mlm.adapters_together import check_together, read_contents
from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.loading import Loaded, Target, load_target, resolve_target


@dataclass(frozen=True)
class Sides:
    """Models that share a tokenizer.

    Attributes:
        sides: By name what gives the model, ready to use until another is asked for; the base's name is None.
        tokenizer: Theirs.
        base: Name or path of the base.
        notices: Sentences that the user should read.
    """

    sides: Mapping[str | None, Callable[[], Loaded]]
    tokenizer: PreTrainedTokenizerBase
    base: str
    notices: list[str] = field(default_factory=list)

    def loaded(self, name: str | None) -> Loaded:
        """Switch to one of them.

        Args:
            name: Its name; None for the base.

        Returns:
            Model and tokenizer; the model may follow later switches.
        """
        return self.sides[name]()


def load_sides(given: Mapping[str, str] | Sequence[str], *, base: str | None = None, any_base: bool = False) -> Sides:
    """Load a base and what was made of it.

    Args:
        given: Runs or adapters by name, or a list of them, which are named after their folders. Among several in a
            list one may be a model: it is their base. A model alone stands alone; a run that trained the whole model
            stands beside its base.
        base: The base, if it is not the recorded one.
        any_base: Also adapters that were trained on a base with other weights.

    Returns:
        The base first, where it has a masked LM head of its own, and the others.

    Raises:
        AdapterError: The adapters do not go together, or do not fit the base.
        ModelError: Something cannot be loaded, or there are models that are no base of the others.
    """
    paths = list(given.values()) if isinstance(given, Mapping) else list(given)
    if len(paths) == 1:
        name = next(iter(given)) if isinstance(given, Mapping) else _name_of(paths[0])
        return _beside_its_base(name, paths[0], base, any_base=any_base)
    whole = [path for path in paths if resolve_target(path).adapter is None]
    if whole and (base is not None or isinstance(given, Mapping) or len(whole) > 1):
        raise ModelError(
            f"{whole[-1]} is a whole model. Side by side there can be adapters on one base, and that base: look at "
            "other models each by itself."
        )
    adapters = given if isinstance(given, Mapping) else [path for path in paths if path not in whole]
    return _on_one_base(adapters, base=whole[0] if whole else base, any_base=any_base)


def _on_one_base(adapters: Mapping[str, str] | Sequence[str], *, base: str | None, any_base: bool) -> Sides:
    together = load_adapters(adapters, base=base, any_base=any_base)

    def switched(name: str | None) -> Callable[[], Loaded]:
        return lambda: together.loaded(name)

    sides: dict[str | None, Callable[[], Loaded]] = {name: switched(name) for name in together.names}
    name = str(together.base.name_or_path)
    if together.base.fresh_parameters:
        return Sides(sides, together.tokenizer, name, [_headless(name)])
    return Sides({None: switched(None), **sides}, together.tokenizer, name)


def _beside_its_base(name: str, path: str, base: str | None, *, any_base: bool) -> Sides:
    target = resolve_target(path, base=base)
    if target.adapter is not None and _can_be_switched_off(name, target):
        return _on_one_base({name: path}, base=base, any_base=any_base)
    loaded = load_target(target, any_base=any_base)
    itself: dict[str | None, Callable[[], Loaded]] = {name: lambda: loaded}
    if target.kind == "model" and target.run is None:
        return Sides(itself, loaded.tokenizer, path)
    try:
        alone = load_target(resolve_target(path, base=base, part="base"))
    except ModelError as error:  # trained from scratch, or without a head
        return Sides(itself, loaded.tokenizer, path, [f"{name} is shown without a base. {error}"])
    if alone.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        return Sides(
            itself, loaded.tokenizer, path, [f"{name} is shown without its base: that has another vocabulary."]
        )
    return Sides({None: lambda: alone, **itself}, loaded.tokenizer, str(alone.base.name_or_path))


def _can_be_switched_off(name: str, target: Target) -> bool:
    assert target.adapter is not None
    try:
        check_together({name: read_contents(target.adapter)})
    except AdapterError:
        return False
    return True


def _headless(base: str) -> str:
    return f"{base} has no masked LM head of its own: what it would predict is random, and is left out."


def _name_of(path: str) -> str:
    folder = Path(path).expanduser()
    return folder.resolve().parent.name if folder.name in ("adapter", "model") and folder.exists() else folder.name
