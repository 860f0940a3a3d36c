"""A base in 4 or 8 bits: which layers are quantised, how they load, what they take, and their float weights again.

Only linear layers of the encoder are quantised; the head, the embeddings and every tied matrix stay float. Weights are
always quantised from float32, whatever `--dtype` says, so that the same flags give the same numbers everywhere.

LLM.int8(): Dettmers et al. 2022, https://arxiv.org/abs/2208.07339. NF4, double quantisation: Dettmers et al. 2023
(QLoRA), https://arxiv.org/abs/2305.14314. The layers come from bitsandbytes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.state import PartialState
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from peft_mlm.arguments import ModelArguments
from peft_mlm.console import quiet_transformers
from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.heads import tied_parameters

METHOD = "bitsandbytes"
# Where PEFT keeps modules that are trained in full: those asked for, and the norms of LN tuning.
TRAINED_IN_FULL = (".modules_to_save.", ".ln_tuning_layers.")


def loading_options(config: PreTrainedConfig, arguments: ModelArguments, name: str) -> dict[str, Any]:
    """Say how `from_pretrained` is to load a quantised base.

    Args:
        config: The base's config.
        arguments: Which bits, of which kind.
        name: Hub name or folder of the base, for messages.

    Returns:
        Arguments of `from_pretrained`; empty for a float base.

    Raises:
        ModelError: The checkpoint is quantised in another way than asked for or than can be trained on, or no layer
            of this model type can be quantised.
    """
    stored = _stored_quantisation(config, name)
    if stored is None and not (arguments.load_in_4bit or arguments.load_in_8bit):
        return {}
    device = _device_to_load_on()
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": device}}
    if stored is not None:
        _check_agreement(stored, arguments, name)
        return options
    skipped = modules_kept_float(_empty_model(config, arguments), name)
    return {**options, "quantization_config": _bitsandbytes_config(arguments, skipped, device)}


def prepare_quantised(model: PreTrainedModel, arguments: ModelArguments, own_dtype: torch.dtype | None) -> None:
    """Make a base that was just loaded ready to train on and to evaluate; a float base stays as it is.

    What is not quantised is held in `--dtype`, the norms in float32. On CPUs with bfloat16 instructions bitsandbytes
    rounds scales and inputs to bfloat16 in evaluation, and layers once used so no longer pass gradients on
    (bitsandbytes 0.50): they compute in evaluation as they do in training here.

    Args:
        model: The model; it is changed in place.
        arguments: dtype, and the type to compute in.
        own_dtype: Type of the checkpoint, for dtype "auto".
    """
    layers = quantised_layers(model)
    if not layers:
        return
    for layer in layers.values():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = resolve_compute_dtype(arguments.bnb_4bit_compute_dtype, layer.weight.device)
            layer.compute_type_is_set = True
            layer.support_avx512bf16_for_cpu = False
        else:
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_word_of_casting)
    dtype = own_dtype or torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    _hold(model, dtype)
    model.config.dtype = dtype


def resolve_compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Choose the type that 4-bit layers compute in.

    Args:
        wanted: `bnb_4bit_compute_dtype`; "auto" lets the hardware choose.
        device: Where the layers lie.

    Returns:
        For "auto" bfloat16 on a GPU that has it, else float32.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def modules_kept_float(model: PreTrainedModel, name: str) -> list[str]:
    """List the modules that are not quantised: all of the head, and linear layers with a tied matrix.

    `from_pretrained` by itself keeps only the decoder float, and quantises the head's dense layer.

    Args:
        model: The masked LM, also on the meta device.
        name: Hub name or folder, for the message.

    Returns:
        Full module names, for `llm_int8_skip_modules`.

    Raises:
        ModelError: The model type has no linear layers of the encoder that bitsandbytes can quantise.
    """
    encoder = {id(module) for module in model.base_model.modules()} if model.base_model is not model else set()
    tied = tied_parameters(model)
    linears = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = [n for n, module in linears.items() if id(module) not in encoder or id(module.weight) in tied]
    # a pooler is no part of a masked LM
    if not any(type(module) is nn.Linear and "pooler" not in n for n, module in linears.items() if n not in kept):
        raise ModelError(
            f"{name} is of the type {model.config.model_type}, whose encoder has no linear layer that bitsandbytes can "
            "quantise. Leave out load_in_4bit and load_in_8bit."
        )
    return _shortened(kept, [n for n in linears if n not in kept])


def quantised_layers(model: nn.Module) -> dict[str, Linear4bit | Linear8bitLt]:
    """Give the quantised layers by name, also below an adapter; empty for a float model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def is_quantised(model: nn.Module) -> bool:
    """Tell whether any layer is quantised, also below an adapter."""
    return any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules())


def check_trainable(model: nn.Module, trained: Iterable[str]) -> None:
    """Refuse to train quantised layers in full.

    Args:
        model: The base.
        trained: Full names of the modules to train in full.

    Raises:
        AdapterError: One of them is quantised; only a checkpoint that was quantised with its head has such ones.
    """
    layers = quantised_layers(model)
    frozen = [name for name in trained if any(layer == name or layer.startswith(f"{name}.") for layer in layers)]
    if frozen:
        raise AdapterError(
            f"modules_to_save: {', '.join(frozen)} cannot be trained in full: the checkpoint holds "
            f"{'it' if len(frozen) == 1 else 'them'} quantised. Leave {'it' if len(frozen) == 1 else 'them'} out, or "
            "start from the float checkpoint with load_in_4bit, which leaves the head float."
        )


def parameter_count(parameter: nn.Parameter) -> int:
    """Count the numbers that a parameter stands for: a packed 4-bit weight holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def dequantised_weight(layer: Linear4bit | Linear8bitLt) -> torch.Tensor:
    """Give the float32 weights that a quantised layer computes with.

    Args:
        layer: A layer of bitsandbytes.

    Returns:
        (out, in), float32: for 4 bits scale * code, for 8 bits scale / 127 * integer.
    """
    if isinstance(layer, Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data, scales).float()
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32  # that of the weights before; a half one would round scale * code once more
    return dequantize_4bit(layer.weight.data, state)


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every quantised layer by a float32 one with the weights it computes with.

    transformers' own `dequantize` rounds to the type the weights had before quantising.

    Args:
        model: A base, without adapter, loaded with dtype float32; it is changed in place.

    Returns:
        The same model: all float32, frozen as it was, its config no longer quantised.
    """
    for name, layer in quantised_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(dequantised_weight(layer), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain.train(layer.training))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
            module.is_loaded_in_4bit = module.is_loaded_in_8bit = False
    model.config.dtype = torch.float32
    return model.float()


def trained_in_float32(model: nn.Module) -> bool:
    """Hold modules that are trained in full in float32 in a half-precision base; their inputs and outputs are cast.

    PEFT does so for an adapter's matrices only: small steps would be lost in the rounding of a half type.

    Args:
        model: With its adapter; it is changed in place.

    Returns:
        Whether anything was cast.
    """
    changed = False
    for name, module in model.named_modules():
        half = [p.dtype for p in module.parameters(recurse=False) if p.dtype in (torch.float16, torch.bfloat16)]
        if half and any(part in name for part in TRAINED_IN_FULL):
            _compute_in_float32(module, half[0])
            changed = True
    return changed


def _no_word_of_casting(record: logging.LogRecord) -> bool:
    """Drop what bitsandbytes says at every use of every 8-bit layer: that it rounds its inputs."""
    return "inputs will be cast" not in record.getMessage()


def _stored_quantisation(config: PreTrainedConfig, name: str) -> dict[str, Any] | None:
    """Give what a checkpoint's config says about its quantisation; None for a float checkpoint."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    record: dict[str, Any] = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    bits = record.get("load_in_4bit") or record.get("_load_in_4bit"), record.get("load_in_8bit")
    method = record.get("quant_method", METHOD if any(bits) else "unknown")
    method = str(getattr(method, "value", method))
    if method != METHOD:
        raise ModelError(
            f"{name} is quantised by {method}, which adapters of masked LMs are not trained on here. Give its float "
            "checkpoint, with load_in_4bit if memory is short, or one that bitsandbytes quantised."
        )
    return record


def _check_agreement(stored: dict[str, Any], arguments: ModelArguments, name: str) -> None:
    """Refuse flags that say something else than the checkpoint that is quantised already."""
    four = bool(stored.get("load_in_4bit") or stored.get("_load_in_4bit"))
    wrong = []
    if arguments.load_in_4bit and not four:
        wrong.append("load_in_4bit (it is in 8 bits)")
    if arguments.load_in_8bit and four:
        wrong.append("load_in_8bit (it is in 4 bits)")
    if arguments.load_in_4bit and four:
        for option, default in (("bnb_4bit_quant_type", "fp4"), ("bnb_4bit_use_double_quant", False)):
            given, real = getattr(arguments, option), stored.get(option, default)
            if given != real:
                wrong.append(f"{option} {given} (it is {real})")
    if wrong:
        raise ModelError(
            f"{name} is quantised already, in another way than {' and '.join(wrong)}: leave out load_in_4bit, "
            "load_in_8bit and what belongs to them, and it loads as it is."
        )


def _device_to_load_on() -> torch.device:
    """Give this process's device: quantised weights are placed as they are loaded, and not moved or cast later."""
    if PartialState._shared_state:  # set up by the training arguments, which know of use_cpu and of other processes
        return torch.device(PartialState().device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _empty_model(config: PreTrainedConfig, arguments: ModelArguments) -> PreTrainedModel:
    with torch.device("meta"), quiet_transformers():
        return AutoModelForMaskedLM.from_config(copy.deepcopy(config), trust_remote_code=arguments.trust_remote_code)


def _bitsandbytes_config(arguments: ModelArguments, skipped: list[str], device: torch.device) -> BitsAndBytesConfig:
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=arguments.llm_int8_threshold, llm_int8_skip_modules=skipped
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=resolve_compute_dtype(arguments.bnb_4bit_compute_dtype, device),
        bnb_4bit_use_double_quant=arguments.bnb_4bit_use_double_quant,
        llm_int8_skip_modules=skipped,
    )


def _shortened(names: list[str], others: list[str]) -> list[str]:
    """Name whole modules where all linear layers in them are meant."""

    def short(name: str) -> str:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts)))
        # transformers takes a name for a module above, and for the end of any other layer's name
        return next((n for n in above if not any(o.startswith(f"{n}.") or o.endswith(n) for o in others)), name)

    return list(dict.fromkeys(short(name) for name in names))


def _hold(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is not quantised; beside a half type norms are float32 and cast their inputs and outputs.

    transformers leaves some weights of a quantised checkpoint in their own type, whatever `dtype` says (5.24).
    """
    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            continue  # the bias stays exact; the layer casts it to the type it computes in
        own = list(module.parameters(recurse=False))
        if own and type(module).__name__.endswith("Norm"):
            _compute_in_float32(module, dtype)
            continue
        for parameter in own:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def _compute_in_float32(module: nn.Module, outside: torch.dtype) -> None:
    """Hold a module in float32 amid others of another type."""
    module.float()
    if outside != torch.float32 and not any(hook is _cast_inputs for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_cast_inputs)
        module.register_forward_hook(lambda module, inputs, output: output.to(outside))


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
