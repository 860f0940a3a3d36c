"""The adapter: which layers it changes, made anew or loaded, and saved so that it fits on the untouched base.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353; for all methods see `methods.py`. The layers come from PEFT.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.adapter_config import build_config, find_targets
from peft_mlm.adapter_fit import check_adapter_fits
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError
from peft_mlm.further_tokens import with_rows_for
from peft_mlm.heads import outermost, plan_fresh_head
from peft_mlm.quantization import parameter_count, trained_in_float32
from peft_mlm.targets import resolve_modules_to_save
from peft_mlm.vocabulary import token_rows

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Name that PEFT gives an adapter within its model.
ADAPTER = "default"


@dataclass(frozen=True)
class Plan:
    """What an adapter will consist of.

    Attributes:
        config: PEFT's configuration.
        target_modules: Full names of the layers that the method changes.
        trained_modules: Full names of the modules trained and shipped whole.
        notices: Sentences that the user should read.
    """

    config: PeftConfig
    target_modules: tuple[str, ...]
    trained_modules: tuple[str, ...]
    notices: tuple[str, ...]


def plan_adapter(
    model: PreTrainedModel,
    arguments: PEFTArguments,
    *,
    fresh_parameters: Iterable[str] = (),
    new_token_ids: Sequence[int] = (),
    total_steps: int | None = None,
) -> Plan:
    """Decide what a new adapter consists of.

    Args:
        model: The masked LM.
        arguments: The method and its options; LoRA if none is named.
        fresh_parameters: Head parameters that the checkpoint did not bring: their modules are trained and shipped.
        new_token_ids: Ids whose embedding rows are new: these rows are trained and shipped.
        total_steps: Optimiser steps of the run, for methods with a schedule (AdaLoRA).

    Returns:
        PEFT's configuration with what it will adapt.

    Raises:
        AdapterError: An option names no layer of the model, or a layer that cannot be adapted; or the method does not
            serve this base.
    """
    head = plan_fresh_head(model, fresh_parameters)
    asked, notices = resolve_modules_to_save(model, arguments.modules_to_save)
    trained = outermost([*head.modules, *asked])
    targets = find_targets(model, arguments, without=trained)
    if head.modules:
        notices.append(
            f"The checkpoint has no masked LM head of its own, or not all of it: {', '.join(head.modules)} are trained "
            "in full and shipped with the adapter."
        )
    if head.left_at_zero:
        notices.append(f"{', '.join(head.left_at_zero)} (bound to the decoder's matrix) stays at zero.")
    config, more = build_config(
        model,
        arguments,
        targets=targets,
        trained=trained,
        token_rows=token_rows(model, new_token_ids),
        total_steps=total_steps,
    )
    return Plan(config, tuple(targets), tuple(trained), tuple(notices + more))


def wrap(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """Put a new adapter on the model: the base is frozen, the adapter's parameters are float32.

    Args:
        model: The masked LM; it is changed in place.
        plan: From `plan_adapter`.

    Returns:
        The model with its adapter; before training it computes what the base computes, unless a notice of the plan says
        otherwise.

    Raises:
        AdapterError: PEFT does not accept the combination.
    """
    try:
        adapted = get_peft_model(model, plan.config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot build this adapter: {error}") from error
    trained_in_float32(adapted)
    return _keep_decoder_bias(adapted)


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    name: str = ADAPTER,
    outline: PreTrainedModel | None = None,
    is_trainable: bool = False,
    new_token_ids: Sequence[int] = (),
) -> PeftModel:
    """Put a saved adapter on the base model it was trained on.

    Args:
        model: The masked LM, its vocabulary already as long as it was in training, with or without other adapters; it
            is changed in place. An adapter beside others is not switched on.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        name: PEFT's name for it within the model.
        outline: The model without adapters (its weights do not matter), where `model` has some.
        is_trainable: Whether training goes on.
        new_token_ids: Where training goes on: ids of all tokens that the base does not have; rows that the adapter
            does not have yet are added to it.

    Returns:
        The model with its adapter.

    Raises:
        AdapterError: The folder holds no adapter in safetensors, or one for another model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    check_adapter_fits(folder, ADAPTER_WEIGHTS, check_adapter_folder(folder), outline or model, rows=rows)
    try:
        beside = isinstance(model, PeftModel)
        rows_added = contextlib.nullcontext(folder) if beside else with_rows_for(model, folder, new_token_ids)
        with warnings.catch_warnings(record=True) as caught, rows_added as source:
            warnings.simplefilter("always")
            if beside:
                model.load_adapter(str(source), name, is_trainable=is_trainable)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(source), name, is_trainable=is_trainable)
            if trained_in_float32(adapted):  # what PEFT has put into them was rounded
                weights = load_peft_weights(str(source), device=str(adapted.device))
                set_peft_model_state_dict(adapted, weights, adapter_name=name)
    except AdapterError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"The adapter {folder} does not fit the base model: {reason}") from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise AdapterError(f"The adapter {folder} does not fit the base model: {' '.join(missing[0].split())[:300]}")
    return _keep_decoder_bias(adapted)


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    base_name: str | None,
    base_revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the adapter alone: its matrices, trained modules and new token rows; never the base's embeddings.

    Args:
        model: The model with its adapter.
        folder: Where to write; made if need be.
        base_name: The base's name as it may be published: a hub name, never a local path.
        base_revision: Its commit on the hub.
        tokenizer: Given only where it is not the base's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # PEFT's "auto" would store the whole embedding, twice, once the vocabulary has grown.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card names the local path of the base; ours comes later
    config_file = folder / ADAPTER_CONFIG
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    config["revision"] = base_revision
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Look whether a folder holds an adapter that can be loaded safely.

    Args:
        folder: A local folder.

    Returns:
        Its `adapter_config.json`.

    Raises:
        AdapterError: Something is missing, damaged, or a pickle.
    """
    config_file = folder / ADAPTER_CONFIG
    if not config_file.is_file():
        raise AdapterError(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG} in it.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickle = " (only a pickle, which can run code when it is opened)" if any(folder.glob("*.bin")) else ""
        raise AdapterError(f"{folder} holds no {ADAPTER_WEIGHTS}{pickle}. Give an adapter saved as safetensors.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        return {"peft_type": config["peft_type"], **config}
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{config_file} is damaged: {error!r}. Take the adapter from its source again.") from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and all.

    Args:
        model: With or without an adapter.

    Returns:
        (trainable, total), a tied parameter counted once.
    """
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(parameter_count(p) for p in parameters)


def cast_with_adapter(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model and its adapter.

    Some layers of PEFT (AdaMSS) hold the type of their weights once more, where PyTorch's `to` does not reach it.

    Args:
        model: With or without an adapter; it is changed in place.
        dtype: The type of its weights from now on.

    Returns:
        The same model.
    """
    for module in model.to(dtype).modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):
            vars(module)["dtype"] = dtype
    return model


def _keep_decoder_bias(model: PeftModel) -> PeftModel:
    """Give the decoder its bias back where new token rows are trained on both ends of a tie.

    PEFT's layer for such rows multiplies by the decoder's matrix and leaves its bias out (seen in peft 0.21.2), which
    every BERT-like head has: the logits would be another model's, and a merge, which is right, would not equal them.
    """

    def add_bias(layer: TrainableTokensLayer, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        plain = layer.disable_adapters or layer.merged or not layer.active_adapters
        return logits if plain else logits + layer.base_layer.bias

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and getattr(layer.base_layer, "bias", None) is not None:
            bias = layer.base_layer.bias
            nothing = torch.zeros(1, layer.base_layer.in_features, dtype=bias.dtype, device=bias.device)
            with torch.no_grad():
                if not torch.equal(layer(nothing)[0], bias):
                    layer.register_forward_hook(add_bias)
    for wrapper in model.modules():
        # MobileBERT's head does not call its decoder but takes weight and bias from it; PEFT hands on the weight only.
        if isinstance(wrapper, TrainableTokensWrapper) and getattr(wrapper.original_module, "bias", None) is not None:
            wrapper.__dict__["bias"] = wrapper.original_module.bias
    return model
