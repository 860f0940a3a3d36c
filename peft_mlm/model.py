"""Base model and tokenizer: loaded from the hub or a folder, or made from scratch.

What transformers does silently is looked at here: weights that the checkpoint does not hold are found and named, the
vocabulary is made to fit the tokenizer, and the positions that a model really holds are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from peft_mlm.arguments import ModelArguments
from peft_mlm.console import quiet_transformers
from peft_mlm.errors import ModelError
from peft_mlm.quantization import describe_quantisation, loading_options, prepare_quantised
from peft_mlm.vocabulary import fit_vocabulary, vocabulary_size

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
        new_token_ids: Ids that the checkpoint's vocabulary does not hold; their rows are new.
        tokenizer_changed: Whether the tokenizer is another than the one that lies with the base model.
        notices: Sentences that the user should read.
        quantisation: What is quantised and what the base takes (`describe_quantisation`); None for a float base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str | None
    revision: str | None = None
    fresh_parameters: tuple[str, ...] = ()
    new_token_ids: tuple[int, ...] = ()
    tokenizer_changed: bool = False
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
    config = _load_config(name, arguments)
    revision = _hub_commit(name, arguments)
    tokenizer = load_tokenizer(arguments)
    model, loading = _load_weights(name, config, arguments)
    missing = sorted(set(loading["missing_keys"]))
    encoder_missing, fresh = _split_missing(model, missing)
    if encoder_missing:
        raise ModelError(
            f"{name} lacks {len(encoder_missing)} weights of the encoder of a {config.model_type} model "
            f"({_list(encoder_missing)}): they would start at random. Give a complete checkpoint, or train from "
            f"scratch with --config_name {name} --tokenizer_name {name}."
        )
    base = Base(
        model=model.eval(),
        tokenizer=tokenizer,
        name_or_path=name,
        revision=revision,
        fresh_parameters=tuple(fresh),
        tokenizer_changed=arguments.tokenizer_name not in (None, name),
    )
    base = _with_rows_for_tokenizer(_check_own_tokenizer(base, arguments), may_grow=may_grow)
    return replace(base, quantisation=describe_quantisation(base.model))


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
    with _loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=arguments.use_fast_tokenizer, **_hub_options(arguments, revision)
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer where it finds no file
        raise ModelError(f"Cannot load the tokenizer {name}: it holds no tokens. Are its files (tokenizer.json) there?")
    for token in ("mask_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise ModelError(
                f"The tokenizer {name} has no {token}: a masked language model needs one. "
                "Give the tokenizer of a masked language model with --tokenizer_name."
            )
    return tokenizer


def _with_rows_for_tokenizer(base: Base, *, may_grow: bool) -> Base:
    rows = base.model.get_input_embeddings().weight.shape[0]
    new = fit_vocabulary(base.model, base.tokenizer, name=base.name_or_path, may_grow=may_grow)
    if not new:
        return base
    notice = f"The tokenizer has {len(new)} tokens more than the model's vocabulary of {rows}: rows were added."
    return replace(base, new_token_ids=new, notices=(*base.notices, notice))


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


def _hub_options(arguments: ModelArguments, revision: str | None) -> dict[str, Any]:
    return {
        "cache_dir": arguments.cache_dir,
        "revision": revision or "main",
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


@contextlib.contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Turn what from_pretrained raises for a wrong name or a broken folder into one sentence."""
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():
        raise ModelError(f"{name} is a file: give the folder it lies in, or a hub name.")
    if path.is_dir() and what == "model" and not (path / "config.json").is_file():
        raise ModelError(f"The folder {name} has no config.json: it holds no model. Give the folder of a saved model.")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelError(f"There is no folder {name}. Give an existing folder, or a hub name such as org/model.")
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "in that folder" if path.is_dir() else "on the hub or in the cache"
        raise ModelError(
            f"Cannot load the {what} {name} {where}: {reason.rstrip('.')}. "
            "Check the name; for a private model, log in with `hf auth login`."
        ) from error


def _load_config(name: str, arguments: ModelArguments) -> PreTrainedConfig:
    with _loading("model", name):
        config = AutoConfig.from_pretrained(name, **_hub_options(arguments, arguments.model_revision))
    _check_model_type(config.model_type, name, arguments)
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}). Give a masked LM with an encoder alone.")
    return config


def _check_model_type(model_type: str, name: str, arguments: ModelArguments) -> None:
    if model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not arguments.trust_remote_code:
        raise ModelError(
            f"{name} is of the type {model_type}, which transformers has no masked language model for. "
            f"Types with one: {', '.join(sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES))}."
        )


def _hub_commit(name: str, arguments: ModelArguments) -> str | None:
    """Give the commit that a name on the hub stood for; None for a folder."""
    if Path(name).expanduser().exists():
        return None
    revision, options = arguments.model_revision, {"cache_dir": arguments.cache_dir, "token": arguments.token}
    file = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False, **options)
    return extract_commit_hash(file, None)


def _load_weights(
    name: str, config: PreTrainedConfig, arguments: ModelArguments
) -> tuple[PreTrainedModel, dict[str, Any]]:
    with _loading("model", name):
        options = {"dtype": arguments.dtype, **loading_options(config, arguments, name)}
        own_dtype = config.dtype  # of the checkpoint; loading writes its own there
        model, loading = AutoModelForMaskedLM.from_pretrained(
            name,
            config=config,
            use_safetensors=_has_safetensors(name),
            output_loading_info=True,
            **options,
            **_hub_options(arguments, arguments.model_revision),
        )
        prepare_quantised(model, arguments, own_dtype)
        return model, loading


def _has_safetensors(name: str) -> bool | None:
    """Refuse a folder that holds only pickled weights; on the hub, let transformers look (None)."""
    path = Path(name).expanduser()
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return True
    if any(path.glob("*.bin")):
        raise ModelError(
            f"{name} holds its weights as a pickle (.bin), which can run code when it is opened. "
            "Convert a file that you trust to safetensors first."
        )
    raise ModelError(f"The folder {name} holds no weights (*.safetensors). Give the folder of a saved model.")


def _split_missing(model: PreTrainedModel, missing: list[str]) -> tuple[list[str], list[str]]:
    """Split the missing keys into the encoder's and the head's parameters, an alias under its first name."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    every_name = dict(model.named_parameters(remove_duplicate=False))
    encoder = {id(parameter) for parameter in model.base_model.parameters()} if model.base_model is not model else set()
    names = {first_name[id(every_name[key])] for key in missing if key in every_name}
    of_encoder = sorted(name for name in names if id(every_name[name]) in encoder)
    return of_encoder, sorted(names - set(of_encoder))


def _check_own_tokenizer(base: Base, arguments: ModelArguments) -> Base:
    """Refuse a tokenizer that gives the base's ids to other tokens: its embeddings would mean something else."""
    if not base.tokenizer_changed:
        return base
    own_arguments = replace(arguments, tokenizer_name=None)
    try:
        own = load_tokenizer(own_arguments)
    except ModelError:
        return base  # the base has no tokenizer of its own to compare with
    theirs = {i: token for token, i in base.tokenizer.get_vocab().items()}
    wrong = [(i, token, theirs.get(i)) for token, i in own.get_vocab().items() if theirs.get(i) != token]
    if wrong:
        i, token, other = min(wrong)
        raise ModelError(
            f"The tokenizer {arguments.tokenizer_name} is not the one of {base.name_or_path}, nor an extension of it: "
            f"id {i} is {token!r} for the base and {other!r} for the tokenizer ({len(wrong)} ids differ). Use the "
            "base's own tokenizer, one with tokens added to it, or train from scratch."
        )
    return replace(base, tokenizer_changed=len(theirs) != len(own.get_vocab()))


def _build_from_scratch(arguments: ModelArguments) -> Base:
    tokenizer = load_tokenizer(arguments)
    if arguments.config_name is not None:
        config = _load_config(arguments.config_name, arguments)
    else:
        assert arguments.model_type is not None  # config.py refuses arguments that name no model
        _check_model_type(arguments.model_type, "--model_type", arguments)
        config = AutoConfig.for_model(arguments.model_type)
    _take_from_tokenizer(config, tokenizer)
    if arguments.config_overrides is not None:
        try:
            config.update_from_string(arguments.config_overrides)
        except ValueError as error:
            raise ModelError(f"--config_overrides {arguments.config_overrides}: {error}.") from error
    try:
        with quiet_transformers():
            model = AutoModelForMaskedLM.from_config(config)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise ModelError(f"Cannot make a {config.model_type} model of this config: {error}") from error
    base = Base(model=model.eval(), tokenizer=tokenizer, name_or_path=None, tokenizer_changed=True)
    return replace(_with_rows_for_tokenizer(base, may_grow=True), new_token_ids=())


def _take_from_tokenizer(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a new model the tokenizer's vocabulary and special ids, not the ones its type was published with."""
    config.vocab_size = vocabulary_size(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(tokenizer, name))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, and {len(names) - NAMES_SHOWN} more"
