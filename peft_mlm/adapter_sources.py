"""Adapters that a user names -> read, and seen to be for one base, prepared alike, with one vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_mlm.adapter import ADAPTER_WEIGHTS, check_adapter_folder
from peft_mlm.arguments import ModelArguments
from peft_mlm.base_recipe import base_recipe, with_base_recipe
from peft_mlm.deltas import Parts, read_parts
from peft_mlm.errors import AdapterError
from peft_mlm.fingerprint import changed_weights, misfits, read_fingerprint
from peft_mlm.loading import find_adapter
from peft_mlm.model import brings_tokenizer, published_name
from peft_mlm.run_folder import is_run_folder


@dataclass(frozen=True)
class Source:
    """An adapter that another one is made from.

    Attributes:
        name: As it may stand in a shipped file: a hub name, or the last part of a local path.
        folder: Where it lies.
        config: Its `adapter_config.json`.
        fingerprint: Of its base; None where it was made by plain PEFT.
        recipe: Arguments that shape its base.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Any] | None
    recipe: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """Give what a record of the result says of it: name, method, rank, and a digest of its weights."""
        digest = xxhash.xxh3_128_hexdigest((self.folder / ADAPTER_WEIGHTS).read_bytes())
        method = str(self.config["peft_type"]).lower()
        return {"name": self.name, "method": method, "rank": self.config.get("r"), "weights_xxh3_128": digest}


def open_source(name_or_path: str) -> Source:
    """Find an adapter and read what it says of its base.

    Args:
        name_or_path: A run folder, or an adapter's folder or hub name.

    Returns:
        The adapter.

    Raises:
        AdapterError: There is none, or its files are damaged.
    """
    folder = find_adapter(name_or_path)
    path = Path(name_or_path).expanduser()
    shown = name_or_path
    if path.exists():
        # of RUN/adapter the run's name says more
        of_run = not is_run_folder(path) and is_run_folder(folder.resolve().parent)
        shown = folder.resolve().parent.name if of_run else path.resolve().name
    config = check_adapter_folder(folder)
    recipe = base_recipe(with_base_recipe(ModelArguments(), folder))
    return Source(shown, folder, config, read_fingerprint(folder), recipe)


def read_sources(sources: Sequence[Source]) -> list[Parts]:
    """Read what adapters hold.

    Args:
        sources: The adapters.

    Returns:
        The parts of each.

    Raises:
        AdapterError: One of them is not plain LoRA, or damaged.
    """
    return [read_parts(source.folder) for source in sources]


def check_one_base(sources: Sequence[Source], *, any_base: bool = False) -> None:
    """Refuse adapters that were trained on different bases, told by their files.

    Args:
        sources: The adapters.
        any_base: Let bases of one make pass, whatever their weights.

    Raises:
        AdapterError: Architecture, vocabulary, weights, or the way the base was prepared differ.
    """
    first = sources[0]
    for other in sources[1:]:
        if other.recipe != first.recipe:
            one, two = (_say(source.recipe) for source in (first, other))
            raise AdapterError(
                f"{first.name} was trained on a base with {one}, {other.name} on one with {two}: their changes are of "
                "different weights. Combine adapters that were trained on a base prepared alike."
            )
    known = [source for source in sources if source.fingerprint is not None]
    for other in known[1:]:
        assert known[0].fingerprint is not None
        assert other.fingerprint is not None
        told = misfits(known[0].fingerprint, other.fingerprint)
        changed = [] if told or any_base else changed_weights(known[0].fingerprint, other.fingerprint)
        if told or changed:
            remedy = "Combine adapters of one base" + (", or let them pass by --any_base." if changed else ".")
            raise AdapterError(
                f"{known[0].name} and {other.name} were trained on different bases: {'; '.join(told or changed)}. "
                + remedy
            )
    names = {str(s.config["base_model_name_or_path"]): s for s in sources if s.config.get("base_model_name_or_path")}
    if len(known) < len(sources) and len({Path(name).name for name in names}) > 1 and not any_base:
        raise AdapterError(
            f"The adapters name different bases ({', '.join(names)}), and not all have a fingerprint of theirs. If "
            "these are one model, say so by --any_base."
        )


def check_lora_bias(sources: Sequence[Source], parts: Sequence[Parts]) -> None:
    """Refuse adapters with `lora_bias` beside others for layers that have no bias: PEFT has it for all or for none.

    Args:
        sources: The adapters.
        parts: What they hold.

    Raises:
        AdapterError: The result could not be merged.
    """
    known = next((source.fingerprint for source in sources if source.fingerprint is not None), None)
    changes = {name: change for adapter in parts for name, change in adapter.changes.items()}
    if known is None or all(c.bias is None for adapter in parts for c in adapter.changes.values()):
        return
    bare = [name for name in changes if f"{name}.bias" not in known["weights"]]
    if bare:
        raise AdapterError(
            f"One adapter trains biases (lora_bias), another changes {', '.join(bare[:3])}, which has none: PEFT could "
            "not merge the result. Combine adapters that are alike in that."
        )


def common_tokenizer(sources: Sequence[Source]) -> PreTrainedTokenizerBase | None:
    """Find the tokenizer that has the added tokens of all adapters.

    Args:
        sources: The adapters.

    Returns:
        The longest of those they bring; None where all use the base's own.

    Raises:
        AdapterError: Two adapters give one id to different tokens.
    """
    bringing = [source for source in sources if brings_tokenizer(source.folder)]
    if not bringing:
        return None
    tokenizers = [AutoTokenizer.from_pretrained(str(source.folder)) for source in bringing]
    longest = max(range(len(bringing)), key=lambda place: len(tokenizers[place].get_vocab()))
    ids = tokenizers[longest].get_vocab()
    for source, tokenizer in zip(bringing, tokenizers, strict=True):
        wrong = sorted((i, token) for token, i in tokenizer.get_vocab().items() if ids.get(token) != i)
        if wrong:
            i, token = wrong[0]
            other = next((known for known, at in ids.items() if at == i), None)
            raise AdapterError(
                f"{source.name} and {bringing[longest].name} bring tokenizers that do not agree: id {i} is {token!r} "
                f"in the one and {other!r} in the other ({len(wrong)} differ). Their rows of new tokens would mean "
                "something else. Train both with the same list of added tokens, in the same order."
            )
    return tokenizers[longest]


def base_name(sources: Sequence[Source]) -> tuple[str | None, str | None]:
    """Give the name of the base that adapters were trained on, as it may be published.

    Args:
        sources: The adapters.

    Returns:
        Name and revision, as the first adapter that names its base says; of a local path the last part alone.
    """
    for source in sources:
        name = source.config.get("base_model_name_or_path")
        if name:
            local = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
            shown = name.replace("\\", "/").rstrip("/").rpartition("/")[2] if local else published_name(name)
            return shown, source.config.get("revision")
    return None, None


def loads_plainly(sources: Sequence[Source]) -> bool:
    """Tell whether plain PEFT loads an adapter of the same base right, as far as the adapters' files tell.

    Args:
        sources: The adapters.

    Returns:
        False where the base is prepared, tokens were added, or a card says that the base needs `peft_mlm.load`.
    """
    cards = [card.read_text(encoding="utf-8") for s in sources if (card := s.folder / "README.md").is_file()]
    ours = [card for card in cards if "peft_mlm.load" in card]
    return not (
        any(source.recipe or brings_tokenizer(source.folder) for source in sources)
        or any("PeftModel.from_pretrained" not in card for card in ours)
    )


def _say(recipe: Mapping[str, Any]) -> str:
    return json.dumps(dict(recipe)) if recipe else "no such preparation"
