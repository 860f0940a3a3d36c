"""What a model's type or config already tells: refused, or said to the user, before anything heavy is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_mlm.errors import ModelError
from peft_mlm.model_types import MODEL_TYPES, ModelType


def check_config(config: Mapping[str, Any], *, name: str) -> None:
    """Refuse a model that cannot serve as a plain masked LM, by its config alone.

    Args:
        config: The contents of its config.json, or a config's `to_dict()`; a type that is not in the table passes.
        name: What the user gave, for the message.

    Raises:
        ModelError: Its type, or a setting of it, does not fit; the sentence says why and what to do.
    """
    model_type = str(config.get("model_type"))
    row = MODEL_TYPES.get(model_type)
    if row is not None and row.refusal is not None:
        raise ModelError(f"{name} is of the type {model_type}, which cannot be adapted here: {row.refusal}")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder-decoder ({model_type}). Give a masked LM with an encoder alone.")
    for fault in _faults_of(model_type, config):
        raise ModelError(f"{name} ({model_type}) cannot be adapted here: {fault}")


def check_attention(model_type: str, attention: str | None) -> None:
    """Check that a model type runs with the attention code that was asked for.

    Args:
        model_type: Its type; one that is not in the table passes.
        attention: `attn_implementation`, or None where transformers chooses.

    Raises:
        ModelError: It does not; the real choices are listed.
    """
    row = MODEL_TYPES.get(model_type)
    if row is not None and attention is not None and attention not in row.attention:
        raise ModelError(
            f"attn_implementation is {attention}, which {model_type} models do not have. Choose "
            f"{' or '.join(row.attention)}, or leave it out: transformers then takes what fits."
        )


def check_dtype(model_type: str, dtype: str) -> None:
    """Check that the weights of a model type can be held in this type.

    Args:
        model_type: Its type; one that is not in the table passes.
        dtype: Such as float32, bfloat16.

    Raises:
        ModelError: They cannot.
    """
    if model_type in MODEL_TYPES and not MODEL_TYPES[model_type].half and dtype in ("bfloat16", "float16"):
        raise ModelError(
            f"dtype is {dtype}, which {model_type} models cannot compute in: their Fourier transform has no 16-bit "
            "form. Use --dtype float32; with --bf16 the other layers compute in 16 bits."
        )


def check_training(model_type: str, *, checkpointing: bool, mixed_precision: bool) -> None:
    """Check that a model type can be trained as asked.

    Args:
        model_type: Its type; one that is not in the table passes.
        checkpointing: Whether activation checkpointing is asked for.
        mixed_precision: Whether bf16 or fp16 is.

    Raises:
        ModelError: It cannot.
    """
    row = MODEL_TYPES.get(model_type, ModelType())
    if checkpointing and not row.checkpointing:
        raise ModelError(
            f"activation_checkpointing: {model_type} models have none in transformers. Leave it out, and use a smaller "
            "per_device_train_batch_size with gradient_accumulation_steps if memory is short."
        )
    if mixed_precision and not row.mixed_precision:
        raise ModelError(
            f"bf16 or fp16: {model_type} models fail under mixed precision in transformers. Train in float32, or hold "
            "the frozen weights in 16 bits (--dtype bfloat16) without --bf16 or --fp16."
        )


def check_path(name: str) -> None:
    """Refuse a path at which nothing lies; a name on the hub passes.

    Args:
        name: What the user gave.

    Raises:
        ModelError: It is written as a path, and there is nothing.
    """
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelError(f"There is no folder {name}. Give an existing folder, or a hub name such as org/model.")


def check_before_loading(
    *,
    name_or_path: str | None,
    model_type: str | None,
    attention: str | None,
    checkpointing: bool,
    mixed_precision: bool,
) -> None:
    """Find what a config.json in a local folder, or a model type, already tells; nothing heavy is imported for it.

    Args:
        name_or_path: The base model or config: a local folder is looked into, a hub name is left for later.
        model_type: From scratch: the type.
        attention: `attn_implementation`.
        checkpointing: Whether activation checkpointing is asked for.
        mixed_precision: Whether bf16 or fp16 is.

    Raises:
        ModelError: There is no such folder, or the type cannot serve, or does not have what was asked for.
    """
    if name_or_path is not None:
        check_path(name_or_path)
    config = _local_config(name_or_path) if name_or_path is not None else {"model_type": model_type}
    if "model_type" not in config:
        return  # on the hub, or broken: loading will tell
    check_config(config, name=name_or_path or f"--model_type {model_type}")
    kind = str(config["model_type"])
    check_attention(kind, attention)
    check_training(kind, checkpointing=checkpointing, mixed_precision=mixed_precision)


def notices_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a user of such a model should know.

    Args:
        config: A config's `to_dict()`.

    Returns:
        Sentences; most types have none.
    """
    model_type = str(config.get("model_type"))
    row = MODEL_TYPES.get(model_type, ModelType())
    said = [] if row.notice is None else [row.notice]
    if row.padding_shows:
        said.append(
            f"The predictions of {model_type} models depend on the padding of a batch: with --pad_to_max_length a row "
            "gives the same figures in any batch."
        )
    if model_type in ("xlm", "flaubert") and (config.get("n_langs") or 1) > 1 and config.get("use_lang_emb"):
        said.append("This model can be told the language of a text; rows hold tokens alone here, and it is not told.")
    return tuple(said)


def _faults_of(model_type: str, config: Mapping[str, Any]) -> list[str]:
    """Name the settings with which a usable type is no plain masked LM."""
    faults = []
    if config.get("is_decoder"):
        faults.append("is_decoder is true: each token sees only those before it. Give an encoder.")
    if model_type in ("xlm", "flaubert"):
        if config.get("causal") or config.get("is_encoder") is False:
            faults.append("it is causal: each token sees only those before it. Give a masked LM.")
        if config.get("asm"):
            faults.append("it has an adaptive softmax (asm), which gives no logits. Give a model without.")
    landmarks, means = config.get("num_landmarks"), config.get("segment_means_seq_len")
    if model_type == "nystromformer" and landmarks is not None and means is not None and landmarks != means:
        faults.append(
            f"with num_landmarks {landmarks} and segment_means_seq_len {means} it takes rows of exactly {means} "
            "tokens, padding included. Set num_landmarks to segment_means_seq_len (plain attention)."
        )
    if model_type == "yoso" and config.get("use_expectation") is False:
        faults.append(
            "use_expectation is false: its attention then draws random hashes at each pass, by a CUDA kernel. Set "
            "use_expectation to true in its config.json."
        )
    if model_type == "xmod" and config.get("default_language") is None:
        languages = config.get("languages") or ("en_XX",)
        if len(languages) > 1:
            faults.append(
                'it has a part for each language, and is not told which to use. Set "default_language" in its '
                f"config.json to one of {', '.join(languages)}."
            )
    return faults


def _local_config(name_or_path: str) -> dict[str, Any]:
    """Read the config.json of a local folder; empty where there is none, or none that can be read."""
    try:
        config = json.loads((Path(name_or_path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
