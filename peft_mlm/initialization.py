"""How a LoRA adapter's matrices start, and how one whose start changes the base is saved for the untouched base.

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948), OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775),
LoRA-GA (Wang et al. 2024, https://arxiv.org/abs/2407.05000) and CorDA (Yang et al. 2024,
https://arxiv.org/abs/2406.05223) start at matrices B0 and A0 that are not zero, and take their product out of the base:
training goes on from W - s B0 A0. What was learned is s (B A - B0 A0): plain LoRA of twice the rank, on W itself. That
is what is saved. EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170) sets A by the principal directions of the
layers' inputs and shifts rank between layers; LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659) starts at what a
quantised base has lost. Both leave the base as it is.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mlm.adapter import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, Plan, wrap
from peft_mlm.data_passes import DataPass, eva_directions, leave_covariances, leave_gradients
from peft_mlm.errors import AdapterError
from peft_mlm.quantization import dequantised_weight, is_quantised

PREFIX = "base_model.model."
# Rounding of W - s B0 A0, as a share of the largest weight.
EDIT_TOLERANCE = 1e-4
# Starts that take a product out of the base, by the first letters of their names.
EDITING = ("pissa", "olora", "lora_ga", "corda")

Matrices = tuple[torch.Tensor, torch.Tensor]


def start_of(plan: Plan) -> str:
    """Name the way in which a planned adapter starts.

    Args:
        plan: What the adapter will consist of.

    Returns:
        The value of `init_lora_weights`; "true" where the method has none.
    """
    return str(getattr(plan.config, "init_lora_weights", True)).lower()


def edits_base(start: str) -> bool:
    """Tell whether a start takes a product out of the base.

    Args:
        start: A value of `init_lora_weights`.

    Returns:
        True for PiSSA, OLoRA, LoRA-GA and CorDA.
    """
    return start.startswith(EDITING)


def initialise(
    model: PreTrainedModel,
    plan: Plan,
    *,
    data: DataPass,
    load_float_base: Callable[[], PreTrainedModel],
) -> tuple[PeftModel, dict[str, Matrices]]:
    """Put a new adapter on the model, started as its configuration says.

    Random numbers that a pass over data draws have no effect on later ones.

    Args:
        model: The masked LM; it is changed in place.
        plan: What the adapter consists of.
        data: Batches for the starts that need data.
        load_float_base: Loads the base with its weights before quantisation, for LoftQ.

    Returns:
        The model with its adapter, and for each layer whose base weight was changed (A0, B0): the base weight is now
        W - s B0 A0. The dict is empty where the base is untouched.

    Raises:
        AdapterError: The start does not go with the base, its type, or the rank.
    """
    start = start_of(plan)
    if plan.config.peft_type != PeftType.LORA or not (edits_base(start) or start in ("eva", "loftq")):
        return wrap(model, plan), {}
    check_start(start, model, plan)
    plan = replace(plan, config=copy.deepcopy(plan.config))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about conversions that PEFT cannot make, and sub-configurations by default
            if start == "eva":
                directions = eva_directions(model, plan.config, data)
                adapted = wrap(model, plan)
                rows = {PREFIX + name: tensor for name, tensor in directions.items()}
                with torch.random.fork_rng():  # layers of another rank than planned are made anew
                    initialize_lora_eva_weights(adapted, eva_state_dict=rows)
                return adapted, {}
            if start == "loftq":
                return _start_loftq(model, plan, load_float_base()), {}
            originals = {n: m.weight.detach().clone() for n, m in model.named_modules() if n in plan.target_modules}
            if start == "lora_ga":
                leave_gradients(model, plan.config, data)
            if start == "corda":
                leave_covariances(model, plan.config, data)
            adapted = wrap(model, plan)
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"init_lora_weights {start} cannot be made on this model: {error}") from error
    return adapted, _take_edits(adapted, originals, start)


def reopen(model: PreTrainedModel, plan: Plan, checkpoint: Path, initial: Mapping[str, Matrices]) -> PeftModel:
    """Wrap a base again for a run that is resumed: without data, and with the same product taken out of the base.

    The adapter's own matrices are read later, with the rest of the checkpoint.

    Args:
        model: The untouched base; it is changed in place.
        plan: What the adapter consisted of when the run began.
        checkpoint: Folder of the checkpoint.
        initial: (A0, B0) by layer, from the checkpoint.

    Returns:
        The model with its adapter.

    Raises:
        AdapterError: The checkpoint holds another adapter.
    """
    start = start_of(plan)
    config = copy.deepcopy(plan.config)
    if plan.config.peft_type == PeftType.LORA and (edits_base(start) or start in ("eva", "loftq")):
        config.init_lora_weights = True
        config.eva_config = config.lora_ga_config = config.corda_config = None
    if plan.config.peft_type == PeftType.LORA and start == "eva":
        saved = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config.target_modules = saved["target_modules"]
        config.rank_pattern, config.alpha_pattern = saved["rank_pattern"], saved["alpha_pattern"]
    adapted = wrap(model, replace(plan, config=config))
    layers = _lora_layers(adapted)
    if set(initial) - set(layers):
        raise AdapterError(f"{checkpoint} holds another adapter than the one of this run: its layers do not fit.")
    for name, matrices in initial.items():
        weight = layers[name].get_base_layer().weight
        weight.data = _without(layers[name], weight.data, matrices)
    return adapted


def rewrite_for_untouched_base(folder: Path, initial: Mapping[str, Matrices]) -> None:
    """Turn a saved adapter for an edited base into plain LoRA of twice the rank for the base as it was.

    s (B A - B0 A0) = s [B, -B0] [A; A0]. Scaling stays the same in each layer, by twice the alpha (with rsLoRA, by the
    root of two). DoRA's magnitudes, trained modules and token rows stay as they are: the sum of base and product, on
    which they stand, is the same.

    Args:
        folder: Holds the adapter as PEFT saves it; it is rewritten.
        initial: (A0, B0) by layer.
    """
    state = load_file(folder / ADAPTER_WEIGHTS)
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        name, other = key.removesuffix(".lora_A.weight").removeprefix(PREFIX), key.replace(".lora_A.", ".lora_B.")
        a, b = state[key], state[other]
        # a layer that no gradient reached was left as it was
        first_a, first_b = initial.get(name, (torch.zeros_like(a), torch.zeros_like(b)))
        state[key] = torch.cat([a, first_a.to(a)], dim=0)
        state[other] = torch.cat([b, -first_b.to(b)], dim=1)
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    factor = math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["lora_alpha"] *= factor
    config["rank_pattern"] = {name: 2 * rank for name, rank in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {name: factor * alpha for name, alpha in (config["alpha_pattern"] or {}).items()}
    config |= {"init_lora_weights": True, "lora_ga_config": None, "corda_config": None}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_start(start: str, model: PreTrainedModel, plan: Plan) -> None:
    """Refuse a start that would be silently wrong on this base.

    Args:
        start: A value of `init_lora_weights`.
        model: The base.
        plan: What the adapter will consist of.

    Raises:
        AdapterError: A layer is not linear; the base is quantised, or of 16 bits, where its weights would have to be
            changed; it is not quantised where the start needs that; or the rank is higher than that of a weight.
    """
    layers = {name: module for name, module in model.named_modules() if name in plan.target_modules}
    for name, module in layers.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise AdapterError(
                f"init_lora_weights {start} is for linear layers, and {name} is {type(module).__name__}. Leave it out "
                "by lora_exclude_modules, or use init_lora_weights true."
            )
    quantised = [name for name, module in layers.items() if is_quantised(module)]
    if start == "loftq":
        if len(quantised) < len(layers):
            raise AdapterError(
                "init_lora_weights loftq makes up for what a 4-bit base has lost. Add --load_in_4bit, or leave it out."
            )
        if plan.config.use_dora:
            raise AdapterError("init_lora_weights loftq does not go with use_dora: leave one of them out.")
    if not edits_base(start):
        return
    for name, module in layers.items():
        if module.weight.dtype != torch.float32:
            raise AdapterError(
                f"init_lora_weights {start} takes a part of the base's weights out and keeps the rest, which is exact "
                f"in float32 alone; {name} is {str(module.weight.dtype).removeprefix('torch.')}. Use --dtype float32 "
                "(with --bf16 or --fp16 for the computing) and no quantised base, or another init_lora_weights."
            )
        pattern = plan.config.rank_pattern
        rank = pattern.get(get_pattern_key(pattern, name), plan.config.r)
        # LoRA-GA gives A and B directions of their own
        if (2 * rank if start == "lora_ga" else rank) > min(module.weight.shape):
            raise AdapterError(
                f"init_lora_weights {start} finds no {rank} directions in {name}, whose weight is "
                f"{' x '.join(map(str, module.weight.shape))}. Use a smaller lora_r or rank_pattern."
            )


@torch.no_grad()
def _start_loftq(model: PreTrainedModel, plan: Plan, float_base: PreTrainedModel) -> PeftModel:
    """Start at the best approximation of rank r of W - Q(W), where Q(W) is what the 4-bit base holds.

    It is one step of LoftQ's alternation: more of them would change Q(W), which is the base itself.
    """
    plan.config.init_lora_weights, plan.config.loftq_config = True, {}
    adapted = wrap(model, plan)
    for name, layer in _lora_layers(adapted).items():
        held, whole = dequantised_weight(layer.get_base_layer()), float_base.get_submodule(name)
        if is_quantised(whole):
            raise AdapterError(
                "init_lora_weights loftq needs the weights before quantisation, but the checkpoint itself is "
                "quantised. Give the checkpoint it was made from, with --load_in_4bit, or leave it out."
            )
        residual = whole.weight.to(held) - held
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        rank = layer.r[ADAPTER]
        root = (s[:rank] / layer.scaling[ADAPTER]).sqrt()
        _set_matrices(layer, (root.unsqueeze(1) * vh[:rank], u[:, :rank] * root))
    return adapted


def _take_edits(model: PeftModel, originals: Mapping[str, torch.Tensor], start: str) -> dict[str, Matrices]:
    """Find the layers whose base weight has changed, and see to it that what is gone is exactly s B0 A0.

    The weight is computed again by `_without`, on the CPU, as a resumed run will do it.
    """
    initial: dict[str, Matrices] = {}
    for name, layer in _lora_layers(model).items():
        weight, original = layer.get_base_layer().weight, originals[name]
        a, b = (layer.__getattr__(which)[ADAPTER].weight.detach() for which in ("lora_A", "lora_B"))
        if torch.equal(weight, original.to(weight.device)):
            continue
        matrices = a.cpu().clone(), b.cpu().clone()
        edited = _without(layer, original, matrices)
        if not (edited.to(weight.device) - weight).abs().max() <= EDIT_TOLERANCE * original.abs().max():
            raise AdapterError(
                f"init_lora_weights {start} changes {name} by something else than the product of its matrices: the "
                "adapter could not be saved for the untouched base. Use another init_lora_weights."
            )
        weight.data = edited.to(weight.device)
        initial[name] = matrices
    return initial


def _without(layer: LoraLayer, weight: torch.Tensor, matrices: Matrices) -> torch.Tensor:
    """W - s B0 A0, computed on the CPU in float32: the same bits at each time."""
    a, b = matrices
    product = layer.scaling[ADAPTER] * (b.float() @ a.float())
    product = product.T if getattr(layer, "fan_in_fan_out", False) else product
    return (weight.cpu().float() - product).to(weight.dtype).to(weight.device)


def _set_matrices(layer: LoraLayer, matrices: Matrices) -> None:
    for parameter, value in zip((layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight), matrices, strict=True):
        parameter.copy_(value)


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Give the adapted linear layers by their names in the base."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
