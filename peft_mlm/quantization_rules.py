"""The rules for a base in 4 or 8 bits: what goes with what, and what only an adapter can do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Options that mean something for one number of bits only.
NEEDS = {
    "bnb_4bit_quant_type": "load_in_4bit",
    "bnb_4bit_compute_dtype": "load_in_4bit",
    "bnb_4bit_use_double_quant": "load_in_4bit",
    "llm_int8_threshold": "load_in_8bit",
}
QUANTISATION = ("load_in_4bit", "load_in_8bit", *NEEDS)


def check_quantization(values: Mapping[str, Any], given: Collection[str], *, for_training: bool) -> list[str]:
    """Check what is asked for about a quantised base.

    Args:
        values: All values by name, defaults included.
        given: Names that the user gave a value.
        for_training: Whether a model is to be trained.

    Returns:
        One sentence per fault.
    """
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if values[name]]
    if len(asked) == 2:
        return ["load_in_4bit and load_in_8bit are both true: choose one."]
    faults = _check_options(values, given)
    if not asked:
        return faults
    bits = asked[0]
    if values.get("model_name_or_path") is None and (values.get("model_type") or values.get("config_name")):
        made_by = "model_type" if values.get("model_type") else "config_name"
        return [
            *faults,
            f"{bits} is given, but {made_by} makes a model of random weights, which are trained in full and so in "
            f"float: leave out {bits}, or name a base model by model_name_or_path.",
        ]
    if not for_training:
        return faults
    if not any(values.get(name) for name in ("use_lora", "peft_method", "adapter_name_or_path")):
        faults.append(
            f"{bits} is given without an adapter, but quantised weights cannot be trained: add --use_lora "
            f"(use_lora: true) to train an adapter beside them, or leave out {bits}."
        )
    if bits == "load_in_4bit" and values["bnb_4bit_compute_dtype"] == "float16" and not values.get("fp16"):
        faults.append(
            "bnb_4bit_compute_dtype is float16 without fp16: gradients in float16 vanish without the loss scaling that "
            "fp16 brings. Add --fp16, or leave out bnb_4bit_compute_dtype (auto)."
        )
    return faults


def idle_options(values: Mapping[str, Any]) -> set[str]:
    """Name the options that change nothing, since the bits they belong to are not asked for."""
    return {name for name, bits in NEEDS.items() if not values[bits]}


def _check_options(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    faults = []
    for bits in ("load_in_4bit", "load_in_8bit"):
        idle = [name for name in NEEDS if name in given and name in idle_options(values) and NEEDS[name] == bits]
        if idle:
            names = f"{' and '.join(idle)} {'is' if len(idle) == 1 else 'are'} given"
            faults.append(f"{names} without {bits}: add --{bits}, or leave {'it' if len(idle) == 1 else 'them'} out.")
    return faults
