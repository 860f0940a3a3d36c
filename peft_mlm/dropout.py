"""Dropout of the base while an adapter is trained on it."""

from __future__ import annotations

from torch import nn

# What dropout layers and attention code of transformers call their probability.
NAMES = ("dropout", "drop_prob")


def turn_off_dropout(model: nn.Module) -> int:
    """Set every dropout probability of a base to 0; its config keeps the published ones.

    Frozen weights cannot overfit, and drawing the masks costs a good part of a step; an adapter is regularised by its
    own `lora_dropout`.

    Args:
        model: The masked LM, without an adapter; changed in place.

    Returns:
        How many probabilities were above 0.
    """
    changed = 0
    for module in model.modules():
        for name, value in vars(module).items():
            is_probability = isinstance(value, float) and any(part in name for part in NAMES)
            if value and (is_probability or (isinstance(module, nn.Dropout) and name == "p")):
                setattr(module, name, 0.0)
                changed += 1
    return changed
