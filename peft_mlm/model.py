"""Base model and tokenizer: loaded from the hub or a folder, or made from scratch, and made to fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_mlm.arguments import ModelArguments
from peft_mlm.base_memory import describe_quantisation
from peft_mlm.checkpoint import (
    attention_option,
    check_model_type,
    hub_commit,
    hub_options,
    load_config,
    load_weights,
    loading_of,
    outline_weights,
    prepare_config,
)
from peft_mlm.console import quiet_transformers
from peft_mlm.errors import ModelError
from peft_mlm.fingerprint import base_fingerprint
from peft_mlm.live_memory import LiveBytes
from peft_mlm.model_checks import notices_of
from peft_mlm.token_lists import read_token_list
from peft_mlm.tokenizer import add_tokens
from peft_mlm.untying import keep_apart, untie_embeddings
from peft_mlm.vocabulary import fit_vocabulary, growth_code, vocabulary_rows, vocabulary_size

NAMES_SHOWN = 8


@dataclass(frozen=True)
class Base:
    """A masked language model with its tokenizer, and what is new about them.

    Attributes:
        model: The masked LM, in evaluation mode.
        tokenizer: The tokenizer whose ids the model takes.
        name_or_path: Hub name or folder it was loaded from; None when made from scratch.
        revision: Commit on the hub, where it came from there.
        fresh_parameters: Head parameters that the checkpoint does not hold, so that they start at random or zero.
        renamed_weights: Whether weights were found under other names than transformers looks for.
        new_token_ids: Ids that the checkpoint's vocabulary does not hold; their rows are new.
        growth_code: Lines of plain transformers that add the same rows to a fresh `base`; none where none was added.
        tokenizer_changed: Whether the tokenizer is another than the one that lies with the base model.
        fingerprint: What tells this base from others of the same shapes (`fingerprint.base_fingerprint`).
        notices: Sentences that the user should read.
        quantisation: What is quantised and what the base takes (`describe_quantisation`); None for a float base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str | None
    revision: str | None = None
    fresh_parameters: tuple[str, ...] = ()
    renamed_weights: bool = False
    new_token_ids: tuple[int, ...] = ()
    growth_code: tuple[str, ...] = ()
    tokenizer_changed: bool = False
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = field(default=())
    quantisation: dict[str, Any] | None = None


def load_base(arguments: ModelArguments, *, may_grow: bool = True) -> Base:
    """Load the tokenizer and the base model, or make the model from scratch, and fit its vocabulary.

    Args:
        arguments: Names, revision, token, dtype (default float32, whatever the file's own type).
        may_grow: Whether new rows may be added for a tokenizer that is longer than the vocabulary. False where nothing
            trains or loads them afterwards: their values would be random.

    Returns:
        The model, in evaluation mode, with its tokenizer.

    Raises:
        ModelError: There is no such model or tokenizer, it is no masked LM, its encoder's weights are incomplete, or
            its tokenizer does not fit.
    """
    if arguments.model_name_or_path is None:
        return _build_from_scratch(arguments)
    name = arguments.model_name_or_path
    config = prepare_config(load_config(name, arguments), name, arguments)
    revision = hub_commit(name, arguments)
    tokenizer = load_tokenizer(arguments)
    model, renaming, fresh, notices = load_weights(name, config, arguments)
    base = Base(
        model=model.eval(),
        tokenizer=tokenizer,
        name_or_path=name,
        revision=revision,
        fresh_parameters=fresh,
        renamed_weights=bool(renaming.names),
        tokenizer_changed=arguments.tokenizer_name not in (None, name),
        fingerprint=base_fingerprint(model, without=fresh),
        notices=(*notices_of(config.to_dict()), *notices),
    )
    base = _with_own_decoder(_with_new_tokens(base, arguments, may_grow=may_grow), arguments)
    return replace(base, quantisation=describe_quantisation(base.model))


def outline_base(arguments: ModelArguments) -> Base:
    """Build what `load_base` gives without reading weights: its parameters are on the meta device.

    Args:
        arguments: As for `load_base`; a quantised base is built in `dtype`.

    Returns:
        The model's outline with its tokenizer. Of the weights only names and shapes are looked at.

    Raises:
        ModelError: There is no such model or tokenizer, or it cannot serve.
    """
    if arguments.model_name_or_path is None:
        with torch.device("meta"):
            return _build_from_scratch(arguments)
    name = arguments.model_name_or_path
    config = prepare_config(load_config(name, arguments), name, arguments)
    tokenizer = load_tokenizer(arguments)
    model, fresh = outline_weights(name, config, arguments)
    base = Base(
        model=model.eval(),
        tokenizer=tokenizer,
        name_or_path=name,
        fresh_parameters=fresh,
        tokenizer_changed=arguments.tokenizer_name not in (None, name),
    )
    with torch.device("meta"), LiveBytes(masked=0):
        return _with_own_decoder(_with_new_tokens(base, arguments, may_grow=True), arguments)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `tokenizer_name`, or else the base model's own.

    Args:
        arguments: Names, revision, token.

    Returns:
        The tokenizer; it has a mask token and a token for padding.

    Raises:
        ModelError: There is none, or it has no mask or padding token.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is None:
        raise ModelError("No tokenizer: give --tokenizer_name (a hub name or a folder).")
    revision = arguments.model_revision if name == arguments.model_name_or_path else None
    with loading_of("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=arguments.use_fast_tokenizer, **hub_options(arguments, revision)
        )
    special = set(tokenizer.all_special_tokens)
    if len(tokenizer) <= len(special) and not set(tokenizer.get_vocab()) - special:
        # transformers makes an empty tokenizer where it finds no file
        raise ModelError(f"Cannot load the tokenizer {name}: it holds no tokens. Are its files (tokenizer.json) there?")
    for token in ("mask_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise ModelError(
                f"The tokenizer {name} has no {token}: a masked language model needs one. "
                "Give the tokenizer of a masked language model with --tokenizer_name."
            )
    return tokenizer


def _with_new_tokens(base: Base, arguments: ModelArguments, *, may_grow: bool) -> Base:
    """Add the tokens that are asked for, and the rows for all tokens that the base's own tokenizer does not have."""
    own = _own_tokenizer(base, arguments)
    notices = _add_tokens(base.tokenizer, arguments)
    rows = vocabulary_rows(base.model)
    new = fit_vocabulary(
        base.model,
        base.tokenizer,
        name=base.name_or_path,
        may_grow=may_grow,
        old_tokenizer=own,
        start=arguments.new_token_init,
    )
    added = vocabulary_rows(base.model) - rows
    if new:
        spare = len(new) - added
        where = [f"{added} rows were added"] if added else []
        where += [f"{spare} spare rows are used"] if spare else []
        have = f"{len(new)} token{'s' if len(new) > 1 else ''} more than the model's vocabulary of {rows}"
        if spare:
            have = f"{len(new)} token{'s' if len(new) > 1 else ''} that the base's own does not have"
        notices.append(f"The tokenizer has {have}: {', '.join(where)}.")
    return replace(
        base,
        new_token_ids=new,
        growth_code=tuple(growth_code(base.model, added)),
        tokenizer_changed=base.tokenizer_changed if own is None else _differ(base.tokenizer, own),
        notices=(*base.notices, *notices),
    )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments) -> list[str]:
    tokens = read_token_list("add_tokens", arguments.add_tokens)
    special = read_token_list("add_special_tokens", arguments.add_special_tokens)
    if not tokens and not special:
        return []
    return add_tokens(tokenizer, tokens, special, inside_words=arguments.add_tokens_inside_words)


def _differ(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() != other.get_vocab() or set(one.all_special_tokens) != set(other.all_special_tokens)


def brings_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer lies in the folder of an adapter or a model."""
    return (folder / "tokenizer_config.json").is_file()


def with_tokenizer_of(arguments: ModelArguments, folder: Path) -> ModelArguments:
    """Use the tokenizer that lies in a folder, which has all added tokens; nothing changes where there is none.

    Args:
        arguments: Which base and tokenizer to load.
        folder: Of an adapter or a model.

    Returns:
        The arguments.
    """
    if not brings_tokenizer(folder):
        return arguments
    return replace(arguments, tokenizer_name=str(folder), add_tokens=None, add_special_tokens=None)


def _with_own_decoder(base: Base, arguments: ModelArguments) -> Base:
    """Cut the tie between embeddings and decoder if asked to; keep apart what a growing vocabulary tied anew."""
    if arguments.untie_embeddings and untie_embeddings(base.model):
        return base
    if not getattr(base.model.config, "tie_word_embeddings", False):
        keep_apart(base.model)
    if not arguments.untie_embeddings:
        return base
    notice = "--untie_embeddings changes nothing: the decoder of this model is not tied to its embeddings."
    return replace(base, notices=(*base.notices, notice))


def published_name(name_or_path: str | None) -> str | None:
    """Give the name of a base that may stand in a shipped file: a hub name as it is, of a local path the last part.

    Args:
        name_or_path: A hub name, or the path of a folder.

    Returns:
        The name, or None for None.
    """
    if name_or_path is None:
        return None
    return Path(name_or_path).expanduser().resolve().name if Path(name_or_path).expanduser().exists() else name_or_path


def _own_tokenizer(base: Base, arguments: ModelArguments) -> PreTrainedTokenizerBase | None:
    """Load the base's own tokenizer, where another one is used or tokens are added to it.

    A tokenizer that gives the base's ids to other tokens is refused: its embeddings would mean something else.
    """
    if not base.tokenizer_changed and not arguments.add_tokens and not arguments.add_special_tokens:
        return None
    try:
        own = load_tokenizer(replace(arguments, tokenizer_name=None))
    except ModelError:
        return None  # the base has no tokenizer of its own to compare with
    theirs = {i: token for token, i in base.tokenizer.get_vocab().items()}
    wrong = [(i, token, theirs.get(i)) for token, i in own.get_vocab().items() if theirs.get(i) != token]
    if wrong:
        i, token, other = min(wrong)
        raise ModelError(
            f"The tokenizer {arguments.tokenizer_name} is not the one of {base.name_or_path}, nor an extension of it: "
            f"id {i} is {token!r} for the base and {other!r} for the tokenizer ({len(wrong)} ids differ). Use the "
            "base's own tokenizer, one with tokens added to it, or train from scratch."
        )
    return own


def _build_from_scratch(arguments: ModelArguments) -> Base:
    tokenizer = load_tokenizer(arguments)
    notices = _add_tokens(tokenizer, arguments)
    if arguments.config_name is not None:
        config = load_config(arguments.config_name, arguments)
    else:
        assert arguments.model_type is not None  # config.py refuses arguments that name no model
        check_model_type(arguments.model_type, "--model_type", arguments)
        config = AutoConfig.for_model(arguments.model_type)
    _take_from_tokenizer(config, tokenizer)
    if arguments.config_overrides is not None:
        try:
            config.update_from_string(arguments.config_overrides)
        except ValueError as error:
            raise ModelError(f"--config_overrides {arguments.config_overrides}: {error}.") from error
    prepare_config(config, arguments.config_name or f"--model_type {arguments.model_type}", arguments)
    try:
        with quiet_transformers():
            model = AutoModelForMaskedLM.from_config(config, **attention_option(arguments))
    except (ValueError, RuntimeError, TypeError, AssertionError, ImportError) as error:
        raise ModelError(f"Cannot make a {config.model_type} model of this config: {error}") from error
    fit_vocabulary(model, tokenizer, name=None, may_grow=True)  # the config may ask for fewer rows
    base = Base(
        model=model.eval(),
        tokenizer=tokenizer,
        name_or_path=None,
        tokenizer_changed=True,
        notices=(*notices_of(config.to_dict()), *notices),
    )
    return _with_own_decoder(base, arguments)


def _take_from_tokenizer(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a new model the tokenizer's vocabulary and special ids, not the ones its type was published with."""
    text = config.get_text_config()  # the part for text, where a model reads images too; else the config itself
    text.vocab_size = vocabulary_size(tokenizer)
    for part in (config, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
            if getattr(part, name, None) is not None:
                setattr(part, name, getattr(tokenizer, name))
