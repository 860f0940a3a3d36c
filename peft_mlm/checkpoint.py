"""A checkpoint on the hub or in a folder -> config and weights, with all that loading did not find.

What transformers does silently is looked at here: a type that cannot serve is refused before its weights are read,
weights under other names are found, and those that the checkpoint does not hold are named.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from peft_mlm.arguments import ModelArguments
from peft_mlm.console import quiet_transformers
from peft_mlm.errors import ModelError
from peft_mlm.head_mapping import Checkpoint, Renaming, describe_unused, open_checkpoint, rename_checkpoint
from peft_mlm.heads import encoder_parameters
from peft_mlm.model_checks import check_attention, check_config, check_dtype, check_path
from peft_mlm.model_types import MODEL_TYPES
from peft_mlm.quantization import loading_options, prepare_quantised
from peft_mlm.untying import keep_ties_of_checkpoint

NAMES_SHOWN = 8


def hub_options(arguments: ModelArguments, revision: str | None) -> dict[str, Any]:
    """Give what every `from_pretrained` gets.

    Args:
        arguments: Cache, token, trust in remote code.
        revision: Branch, tag or commit; main if None.

    Returns:
        Keyword arguments.
    """
    return {
        "cache_dir": arguments.cache_dir,
        "revision": revision or "main",
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


@contextlib.contextmanager
def loading_of(what: str, name: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises for a wrong name or a broken folder into one sentence.

    Args:
        what: "model" or "tokenizer".
        name: Hub name or folder.

    Yields:
        Nothing; what is loaded within is watched.

    Raises:
        ModelError: It cannot be loaded.
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():
        raise ModelError(f"{name} is a file: give the folder it lies in, or a hub name.")
    if path.is_dir() and what == "model" and not (path / "config.json").is_file():
        raise ModelError(f"The folder {name} has no config.json: it holds no model. Give the folder of a saved model.")
    check_path(name)
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


def load_config(name: str, arguments: ModelArguments) -> PreTrainedConfig:
    """Load the config of a checkpoint.

    Args:
        name: Hub name or folder.
        arguments: Revision, token.

    Returns:
        The config, as it was published.
    """
    with loading_of("model", name):
        return AutoConfig.from_pretrained(name, **hub_options(arguments, arguments.model_revision))


def prepare_config(config: PreTrainedConfig, name: str, arguments: ModelArguments) -> PreTrainedConfig:
    """Refuse what cannot serve, before weights are loaded, and set what its type needs.

    Args:
        config: Changed in place.
        name: Where it comes from, for the message.
        arguments: Attention, dtype, trust in remote code.

    Returns:
        The same config.

    Raises:
        ModelError: The type, or what is asked of it, cannot serve.
    """
    check_model_type(config.model_type, name, arguments)
    check_config(config.to_dict(), name=name)
    check_attention(config.model_type, arguments.attn_implementation)
    check_dtype(
        config.model_type, str(config.dtype).removeprefix("torch.") if arguments.dtype == "auto" else arguments.dtype
    )
    if config.model_type in MODEL_TYPES:
        config.update(dict(MODEL_TYPES[config.model_type].settings))
    if config.model_type == "xmod" and config.default_language is None:
        config.default_language = config.languages[0]  # the only one
    return config


def check_model_type(model_type: str, name: str, arguments: ModelArguments) -> None:
    """Refuse a type that transformers has no masked LM for.

    Args:
        model_type: As the config says it.
        name: Where it comes from, for the message.
        arguments: With `trust_remote_code`, any type passes.

    Raises:
        ModelError: There is none.
    """
    if model_type not in MODEL_TYPES and not arguments.trust_remote_code:
        usable = [name for name, row in MODEL_TYPES.items() if row.refusal is None]
        raise ModelError(
            f"{name} is of the type {model_type}, which transformers has no masked language model for. "
            f"Types that can be adapted: {', '.join(usable)}."
        )


def attention_option(arguments: ModelArguments) -> dict[str, str]:
    """Name the attention code only where it was asked for: transformers chooses by itself.

    Args:
        arguments: `attn_implementation`.

    Returns:
        Keyword arguments.
    """
    return {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}


def hub_commit(name: str, arguments: ModelArguments) -> str | None:
    """Give the commit that a name on the hub stood for.

    Args:
        name: Hub name or folder.
        arguments: Revision, token.

    Returns:
        The commit; None for a folder.
    """
    if Path(name).expanduser().exists():
        return None
    revision, options = arguments.model_revision, {"cache_dir": arguments.cache_dir, "token": arguments.token}
    file = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False, **options)
    return extract_commit_hash(file, None)


def load_weights(
    name: str, config: PreTrainedConfig, arguments: ModelArguments
) -> tuple[PreTrainedModel, Renaming, tuple[str, ...], tuple[str, ...]]:
    """Load the weights, in a second pass those that stand under other names, and look at what is not there.

    Args:
        name: Hub name or folder.
        config: From `prepare_config`.
        arguments: Dtype, quantisation, attention, revision, token.

    Returns:
        The model; what was renamed; the head parameters that the checkpoint does not hold; sentences for the user.

    Raises:
        ModelError: It cannot be loaded, does not fit its own config, or lacks weights of the encoder.
    """
    model, loading = _load_weights(name, config, arguments)
    renaming = Renaming({})
    if loading["missing_keys"]:
        options = hub_options(arguments, arguments.model_revision)
        del options["trust_remote_code"]
        renaming = rename_checkpoint(model, loading["missing_keys"], open_checkpoint(name, **options))
        if renaming.names:
            model, loading = _load_weights(name, config, arguments, renaming.patterns())
            vars(model).pop("_weight_conversions", None)  # else transformers would save under the checkpoint's names
    encoder_missing, fresh = _split_missing(model, sorted(set(loading["missing_keys"])))
    unused = describe_unused(loading["unexpected_keys"], all_of_them=bool(encoder_missing or fresh))
    if encoder_missing:
        instead = f" It holds instead: {unused}." if unused else ""
        raise ModelError(
            f"{name} lacks {len(encoder_missing)} weights of the encoder of a {config.model_type} model "
            f"({_list(encoder_missing)}): they would start at random.{instead} Give a complete checkpoint, or train "
            f"from scratch with --config_name {name} --tokenizer_name {name}."
        )
    with torch.no_grad():
        for parameter in map(model.get_parameter, fresh):
            if parameter.dim() == 1 and parameter.count_nonzero() and _is_bias(model, parameter):
                parameter.zero_()  # for some types transformers leaves what the memory held before
    notices = [
        renaming.notice,
        f"{name} holds weights that a {config.model_type} masked LM has no place for: {unused}." if unused else "",
        f"{name} does not hold {_list(fresh)}: they start fresh." if fresh else "",
        keep_ties_of_checkpoint(model) or "",
    ]
    return model, renaming, tuple(fresh), tuple(filter(None, notices))


def _is_bias(model: PreTrainedModel, parameter: torch.nn.Parameter) -> bool:
    return any(p is parameter and n.endswith("bias") for n, p in model.named_parameters(remove_duplicate=False))


def _load_weights(
    name: str, config: PreTrainedConfig, arguments: ModelArguments, names: dict[str, str] | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    with loading_of("model", name):
        options = {"dtype": arguments.dtype, **loading_options(config, arguments, name)}
        own_dtype = config.dtype  # of the checkpoint; loading writes its own there
        model, loading = AutoModelForMaskedLM.from_pretrained(
            name,
            config=config,
            use_safetensors=_has_safetensors(name),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            key_mapping=names,
            **options,
            **attention_option(arguments),
            **hub_options(arguments, arguments.model_revision),
        )
    if loading["mismatched_keys"]:
        key, theirs, ours = min(loading["mismatched_keys"])
        raise ModelError(
            f"{name} does not fit its own config.json: {key} has the shape {tuple(theirs)}, the config asks for "
            f"{tuple(ours)} ({len(loading['mismatched_keys'])} such weights). Give the config that belongs to it."
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
    encoder = encoder_parameters(model)
    names = {first_name[id(every_name[key])] for key in missing if key in every_name}
    of_encoder = sorted(name for name in names if id(every_name[name]) in encoder)
    return of_encoder, sorted(names - set(of_encoder))


def load_outline(arguments: ModelArguments) -> PreTrainedModel | None:
    """Build the base model without weights, to look at its modules and their shapes.

    Args:
        arguments: Names, revision, token.

    Returns:
        The model, its parameters on the meta device; None where it has code of its own.

    Raises:
        ModelError: There is no such model, or it is no masked LM.
    """
    if arguments.model_name_or_path is None or arguments.trust_remote_code:
        return None
    name = arguments.model_name_or_path
    config = prepare_config(load_config(name, arguments), name, arguments)
    with loading_of("model", name), torch.device("meta"):
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(config)
    return model


def outline_weights(
    name: str, config: PreTrainedConfig, arguments: ModelArguments
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Build the masked LM of a checkpoint on the meta device, and find what of its head the checkpoint does not hold.

    The headers of its files tell; on the hub they are read without the values behind them.

    Args:
        name: Hub name or folder.
        config: From `prepare_config`; that of a quantised checkpoint is built as a float model.
        arguments: Dtype, attention, revision, token.

    Returns:
        The model; names of the head parameters that start fresh, none where no header can be read.

    Raises:
        ModelError: It is no masked LM.
    """
    config = copy.deepcopy(config)
    quantised = config.__dict__.pop("quantization_config", None) is not None
    dtype = config.dtype or torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    options = {"dtype": dtype, **attention_option(arguments)}
    with loading_of("model", name), torch.device("meta"):
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(
            config, trust_remote_code=arguments.trust_remote_code, **options
        )
    checkpoint = None if quantised else _headers(name, arguments)
    if checkpoint is None:
        return model, ()
    with loading_of("model", name):
        _, loading = type(model).from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict={key: torch.empty(shape, device="meta") for key, shape in checkpoint.shapes.items()},
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    found = set(rename_checkpoint(model, loading["missing_keys"], checkpoint).names.values())
    # Under another name of a tied parameter it was found as well.
    every = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(every[key]) for key in found if key in every}
    missing = [key for key in loading["missing_keys"] if key in every and id(every[key]) not in filled]
    return model, tuple(_split_missing(model, missing)[1])


def _headers(name: str, arguments: ModelArguments) -> Checkpoint | None:
    """Read names and shapes of a checkpoint's tensors; None where it has no safetensors within reach."""
    options = hub_options(arguments, arguments.model_revision)
    del options["trust_remote_code"]
    checkpoint = open_checkpoint(name, **options)
    if checkpoint.shapes or Path(name).expanduser().is_dir():
        return checkpoint if checkpoint.shapes else None
    try:
        read = HfApi(token=arguments.token).get_safetensors_metadata(name, revision=arguments.model_revision)
    except (OSError, NotASafetensorsRepoError, SafetensorsParsingError, HfHubHTTPError):
        return None
    shapes = {key: tuple(one.shape) for file in read.files_metadata.values() for key, one in file.tensors.items()}
    return Checkpoint(shapes, lambda key: torch.zeros(()))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, and {len(names) - NAMES_SHOWN} more"
