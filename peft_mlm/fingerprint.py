"""Which base an adapter was trained on, told by its weights: an adapter loads on any base of the same shapes.

A few values of every tensor are kept beside the adapter. They are compared within the rounding of bfloat16, so that the
same base in another float type still fits, and one that was trained further does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from peft_mlm.console import few_names
from peft_mlm.errors import AdapterError
from peft_mlm.run_folder import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_FINGERPRINT = "base_fingerprint.json"
VALUES_PER_TENSOR = 4
# bfloat16 keeps 8 bits: a value and its rounding differ by at most 0.4 %.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 0.01, 1e-6
NAMES_SHOWN = 3


def base_fingerprint(model: PreTrainedModel, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Describe a base by its architecture and a few of its weights.

    Args:
        model: The masked LM as its checkpoint holds it: no adapter on it, no rows added.
        without: Names of parameters that the checkpoint did not bring.

    Returns:
        `architecture` (the class), `vocab_size`, and `weights`: by parameter the shape and four values, those of
        quantised parameters left out.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if name in without or not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        flat = parameter.detach().flatten()
        values = [flat[place].item() for place in sampled_places(parameter.numel())]
        weights[name] = {"shape": list(parameter.shape), "values": [shortened(value) for value in values]}
    return {
        "architecture": type(model).__name__,
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "weights": weights,
    }


def sampled_places(count: int) -> list[int]:
    """Choose the numbers of a tensor that are kept: spread over it, and never all in one column.

    Args:
        count: How many it has.

    Returns:
        Their places in the tensor, laid out flat.
    """
    return [int(count * (step * 0.618034 % 1)) for step in range(1, VALUES_PER_TENSOR + 1)]  # the golden ratio


def shortened(value: float) -> float:
    """Write a number as a fingerprint holds it: six digits."""
    return float(f"{value:.6g}")


def write_fingerprint(fingerprint: Mapping[str, Any], folder: Path) -> None:
    """Write a fingerprint beside an adapter.

    Args:
        fingerprint: From `base_fingerprint`.
        folder: The adapter's folder.
    """
    write_json(folder / BASE_FINGERPRINT, dict(fingerprint))


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """Read the fingerprint of the base that an adapter was trained on.

    Args:
        folder: The adapter's folder.

    Returns:
        The fingerprint, or None where there is none (an adapter made by plain PEFT).

    Raises:
        AdapterError: The file is damaged.
    """
    file = folder / BASE_FINGERPRINT
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("architecture", "vocab_size", "weights")}
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{file} is damaged: {error!r}. Take the adapter from its source again.") from error


def digest(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten a fingerprint to a line, for reports.

    Args:
        fingerprint: From `base_fingerprint`.

    Returns:
        `architecture`, `vocab_size`, `tensors` (how many are told), and `hash` of their shapes and values.
    """
    weights = json.dumps(fingerprint["weights"], sort_keys=True).encode()
    return {
        "architecture": fingerprint["architecture"],
        "vocab_size": fingerprint["vocab_size"],
        "tensors": len(fingerprint["weights"]),
        "hash": xxhash.xxh3_128_hexdigest(weights),
    }


def misfits(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Say in what a base is of another make, so that an adapter cannot be put on it.

    Args:
        recorded: Fingerprint of the base that the adapter was trained on.
        given: Fingerprint of the base that is there.

    Returns:
        Short sentences; empty where architecture, vocabulary and shapes agree.
    """
    told = []
    for name, what in (("architecture", "architecture"), ("vocab_size", "rows in the vocabulary")):
        if recorded[name] != given[name]:
            told.append(f"{what}: {recorded[name]} in training, {given[name]} here")
    pairs = _common(recorded, given)
    told += _tell("shapes", [name for name, (one, other) in pairs.items() if one["shape"] != other["shape"]], pairs)
    return told if pairs else [*told, "no weight has the same name"]


def changed_weights(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Say which weights differ between two bases of the same make.

    Args:
        recorded: Fingerprint of the base that the adapter was trained on.
        given: Fingerprint of the base that is there.

    Returns:
        One short sentence, or none. Parameters that only one of them tells (quantised in the other, or absent from
        its checkpoint) are not compared.
    """
    pairs = _common(recorded, given)
    return _tell("weights", [name for name, (one, other) in pairs.items() if not _alike(one, other)], pairs)


def _common(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (one, given["weights"][name]) for name, one in recorded["weights"].items() if name in given["weights"]
    }


def _tell(what: str, names: Sequence[str], of: Collection[str]) -> list[str]:
    if not names:
        return []
    return [f"{what} of {len(names)} of {len(of)} tensors ({few_names(names, NAMES_SHOWN)})"]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(
        math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
        for a, b in zip(one["values"], other["values"], strict=True)
    )
