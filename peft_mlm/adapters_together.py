"""Which adapters can share a base, and which can share a batch: told from their configs, and from the model.

Each refusal stands for a case that was run with PEFT 0.21.2 and gave other numbers than the adapter alone, mostly
without an error; `tests/test_adapters_together.py` runs them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open

from peft_mlm.adapter import ADAPTER_WEIGHTS, check_adapter_folder
from peft_mlm.errors import AdapterError
from peft_mlm.probing import probe_inputs

# Methods whose layers take a different adapter for each row; all others of PEFT's ignore `adapter_names`, or fail.
MIXING_METHODS = ("LORA", "GLORA", "ROAD")
# Starts of LoRA that change the base when PEFT puts the adapter on it. Ours are saved as plain LoRA.
EDITING_STARTS = ("pissa", "olora", "corda", "lora_ga")
ONE_BY_ONE = "Switch with use(name), and compute the rows of each adapter by themselves."


# What of a LoRA config says nothing about the kind and the sizes of its layers.
MAY_DIFFER = ("lora_alpha", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# What PEFT's hot-swap minds. With patterns of ranks or alphas, and with variants of LoRA, it gives other numbers.
SWAPPED_RIGHT = (
    *MAY_DIFFER, "peft_type", "task_type", "r", "use_rslora", "lora_bias", "lora_dropout", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What lies in an adapter's folder.

    Attributes:
        folder: The folder.
        config: Its `adapter_config.json`.
        shapes: Sizes of its weights, by name.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def read_contents(folder: Path) -> Contents:
    """Look into the folder of an adapter; no weight is read.

    Args:
        folder: The adapter's folder.

    Returns:
        Its config, and the names and sizes of its weights.

    Raises:
        AdapterError: Something is missing or damaged.
    """
    config = check_adapter_folder(folder)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}). Take it from its source.") from error
    return Contents(folder, config, shapes)


def check_together(adapters: Mapping[str, Contents]) -> None:
    """Refuse adapters that do not compute on one base what they compute alone.

    Args:
        adapters: What is in each, by name.

    Raises:
        AdapterError: Their methods differ, or PEFT would change the base, or one of them, under the others.
    """
    methods = {name: str(adapter.config["peft_type"]) for name, adapter in adapters.items()}
    first, method = next(iter(methods.items()))
    for name, adapter in adapters.items():
        if methods[name] != method:
            raise AdapterError(
                f"{first} is of the method {method}, {name} of {methods[name]}: PEFT holds adapters of one method on a "
                "base. Load them apart."
            )
        if why := _changes_base(adapter.config):
            raise AdapterError(f"{name} cannot share its base: {why}. Load it by itself, or merge it.")
    if method == "TRAINABLE_TOKENS" and len(adapters) > 1:
        raise AdapterError("PEFT holds one adapter of the method trainable_tokens on a base. Load them apart.")
    rows = {name: bool(adapter.config.get("trainable_token_indices")) for name, adapter in adapters.items()}
    if len(set(rows.values())) > 1:
        with_rows = ", ".join(name for name, has in rows.items() if has)
        raise AdapterError(
            f"{with_rows} trains rows of tokens and the others do not: PEFT cannot hold both on one base. Load them "
            "apart."
        )
    _check_nested(adapters)


def check_mixed(adapters: Mapping[str, Contents]) -> None:
    """Refuse adapters among which one batch cannot have a different one for each row.

    Args:
        adapters: What is in each, by name.

    Raises:
        AdapterError: PEFT would ignore which row has which adapter, without an error, or fails.
    """
    for name, adapter in adapters.items():
        config = adapter.config
        method = str(config["peft_type"])
        why = ""
        if method not in MIXING_METHODS:
            why = f"PEFT's layers of the method {method} take one adapter for the whole batch"
        elif config.get("use_dora"):
            why = "DoRA takes one adapter for the whole batch"
        elif config.get("modules_to_save"):
            why = f"it trains modules as a whole ({', '.join(config['modules_to_save'])}), which are not mixed"
        elif config.get("trainable_token_indices"):
            why = "it trains rows of tokens, and a decoder tied to them would be another model's"
        if why:
            raise AdapterError(f"{name} cannot be mixed with others in one batch: {why}. {ONE_BY_ONE}")


def _changes_base(config: Mapping[str, Any]) -> str:
    start = str(config.get("init_lora_weights"))
    if config.get("bias", "none") != "none":
        return f"its biases (bias {config['bias']}) are written over those of the base"
    if start.startswith(EDITING_STARTS):
        return f"PEFT changes the base for it (init_lora_weights {start})"
    if config.get("kasa_config") is not None:
        return "KaSA takes the smallest singular values out of the base"
    return ""


def _check_nested(adapters: Mapping[str, Contents]) -> None:
    """Refuse what one adapter changes within a module of which another has a copy of its own.

    PEFT puts it into that copy as well, or into it alone, and computes with another one: off by more than 1.
    """
    copies = {name: tuple(adapter.config.get("modules_to_save") or ()) for name, adapter in adapters.items()}
    for name, modules in copies.items():
        for other, adapter in adapters.items():
            foreign = [module for module in modules if module not in copies[other]]
            inside = [(m, tensor) for m in foreign for tensor in adapter.shapes if f".{m}." in f".{tensor}"]
            if inside:
                module, tensor = inside[0]
                raise AdapterError(
                    f"{name} trains the module {module} as a whole, and {other} changes a part of it ({tensor}): PEFT "
                    "would mix them up. Load them apart."
                )


def swappable(one: Contents, other: Contents) -> bool:
    """Tell whether the numbers of one LoRA adapter can be put in the place of another's, matrix by matrix.

    PEFT's hot-swap takes adapters of other ranks too, but fills the rest with zeros, so that sums are made in another
    order, and leaves the old config on them; variants of LoRA it swaps wrong, or not.

    Args:
        one: An adapter.
        other: Another.

    Returns:
        True for two LoRA adapters that differ in numbers and in `lora_alpha` alone.
    """
    told = [{k: v for k, v in c.config.items() if k not in MAY_DIFFER} for c in (one, other)]
    alike = told[0] == told[1] and one.shapes == other.shapes
    plain = told[0]["peft_type"] == "LORA" and not any(v for k, v in told[0].items() if k not in SWAPPED_RIGHT)
    return alike and plain


def takes_rows_first(model: PeftModel) -> bool:
    """Look whether every adapted layer gets as many rows as the batch has, at two sizes of it.

    PEFT picks the rows of an adapter by the first dimension of what a layer gets. That is not always the batch: DeBERTa
    projects a table of distances, Longformer turns rows and tokens around.

    Args:
        model: In evaluation mode.

    Returns:
        Whether PEFT would pick the right ones.
    """
    seen: list[bool] = []
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for rows in (2, 4):

        def note(module: Any, inputs: Any, rows: int = rows) -> None:
            seen.append(bool(inputs) and inputs[0].shape[0] == rows)

        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            with torch.no_grad():
                model(**probe_inputs(model, rows))
        finally:
            for handle in handles:
                handle.remove()
    return all(seen)


def layers_that_switch(model: PeftModel) -> list[BaseTunerLayer]:
    """List the adapted layers, where the name of the adapter in use on each of them is all there is to switch.

    PEFT's `set_adapter` also settles which weights take gradients, module by module through all adapters: 50 ms with 40
    adapters on a base of roberta-base's size. Adapters that are only used have none; to name another one takes 0.2 ms.

    Args:
        model: With adapters, none of which takes gradients.

    Returns:
        The layers; none where copies of modules, rows of tokens or a method's own way of switching ask for PEFT's.
    """
    layers = []
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return []
        if isinstance(module, BaseTunerLayer):
            own = (type(module).set_adapter, type(module).enable_adapters)
            if own != (BaseTunerLayer.set_adapter, BaseTunerLayer.enable_adapters):
                return []
            layers.append(module)
    return layers


def switch(model: PeftModel, layers: Sequence[BaseTunerLayer], inner: str | None) -> None:
    """Name the adapter in use on each adapted layer; what PEFT's own switch leaves, without the walk.

    Args:
        model: With adapters.
        layers: From `layers_that_switch`.
        inner: PEFT's name of the adapter, or None for the base alone.
    """
    for layer in layers:
        layer._disable_adapters = inner is None
        if inner is not None:
            layer._active_adapter = [inner]
    if inner is not None:
        model.active_adapter = model.base_model.active_adapter = inner
