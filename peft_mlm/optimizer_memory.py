"""What an optimiser keeps of the trained parameters between steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

# Bytes per number that an optimiser keeps for each trained number, by the start of its name; the longest fits. What is
# kept in the parameter's own type counts as its size. Sources: torch.optim, transformers' Adafactor, bitsandbytes 0.50.
STATES: Mapping[str, int] = {
    "adamw": 2, "stable_adamw": 2, "grokadamw": 2, "schedule_free_adamw": 2, "schedule_free_radam": 2, "lion": 1,
    "adagrad": 1, "rmsprop": 1, "schedule_free_sgd": 1, "sgd": 0, "ademamix": 3, "lomo": 0, "adalomo": 0,
}  # fmt: skip
# bitsandbytes keeps parameters of fewer numbers in 32 bits, others in 8 with a scale for each block.
SMALL_8BIT, BLOCK_8BIT = 4096, 256


def optimizer_bytes(model: nn.Module, name: str) -> int:
    """Count what an optimiser keeps of the trained parameters between steps.

    Args:
        model: On any device.
        name: `optim`.

    Returns:
        Bytes; for an optimiser that is not in the table, those of AdamW, which few exceed.
    """
    plain = name.removeprefix("paged_")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if plain == "adafactor":
        return sum(
            4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel()) for p in trained
        )
    known = [start for start in STATES if plain.startswith(start)]
    count = STATES[max(known, key=len)] if known else STATES["adamw"]
    if plain.endswith("4bit") or plain.endswith("8bit"):
        return sum(count * _states_8bit(p, half=plain.endswith("4bit")) for p in trained)
    of_own_type = "bnb" not in plain and not plain.startswith(("lion", "ademamix"))
    return sum(count * p.numel() * (p.element_size() if of_own_type else 4) for p in trained)


def _states_8bit(parameter: nn.Parameter, *, half: bool) -> int:
    count = parameter.numel()
    if count < SMALL_8BIT:
        return 4 * count
    return (count // 2 if half else count) + 4 * math.ceil(count / BLOCK_8BIT)
