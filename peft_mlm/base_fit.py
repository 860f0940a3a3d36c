"""Does an adapter belong to a base? Told from the files of both: names, shapes, and the fingerprint's values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_mlm.adapter_norms import split_name
from peft_mlm.errors import ModelError
from peft_mlm.fingerprint import changed_weights, misfits, read_fingerprint, sampled_places
from peft_mlm.inspection import read_table
from peft_mlm.safetensors_header import Header, TensorEntry, read_at, read_header, weight_files
from peft_mlm.shipped import MODEL_CONFIG, Shipped

# End of a tensor's name -> (its dimension, the dimension of the layer's weight of the same size).
SIZES: Mapping[str, tuple[int, int]] = {
    "lora_A.weight": (1, 1),
    "lora_B.weight": (0, 0),
    "lora_embedding_A": (1, 0),
    "lora_embedding_B": (0, 1),
}
FLOATS = ("F16", "BF16", "F32", "F64")
FAULTS_SHOWN = 5


def check_fit(shipped: Shipped, base: str) -> dict[str, Any]:
    """Hold an adapter against a base.

    Args:
        shipped: The adapter.
        base: Folder of the base.

    Returns:
        `base`, `fits` (None where it cannot be told), `compared` (how many layers were found in the base),
        `fingerprint` (how many tensors were compared with it), `differences` (sentences).

    Raises:
        ModelError: There is no base in that folder, or none in safetensors.
        DamagedFileError: A file of the base is damaged.
    """
    folder = Path(base).expanduser()
    if not (folder / MODEL_CONFIG).is_file():
        raise ModelError(f"--base {base} is no folder of a model: there is no {MODEL_CONFIG} in it.")
    files = weight_files(folder)
    if not files:
        raise ModelError(f"--base {base} holds no weights in safetensors; nothing else is opened here.")
    weights = {name: (header, entry) for header in map(read_header, files) for name, entry in header.tensors.items()}
    adapter = read_header(shipped.weights()[0])
    compared, wrong = _shapes(adapter, weights)
    recorded = read_fingerprint(shipped.folder)
    given = _fingerprint(read_table(folder / MODEL_CONFIG), weights, recorded) if recorded else None
    told = wrong + (misfits(recorded, given) or changed_weights(recorded, given) if recorded and given else [])
    known = compared or (given is not None and given["weights"])
    return {
        "base": base,
        "fits": None if not known else not told,
        "compared": compared,
        "fingerprint": len(given["weights"]) if given else 0,
        "differences": told if known else ["no layer of the adapter has a weight of the same name in the base"],
    }


Weights = Mapping[str, tuple[Header, TensorEntry]]


def _shapes(adapter: Header, weights: Weights) -> tuple[int, list[str]]:
    """Compare the sizes of low-rank matrices with the weights they are added to."""
    compared, wrong = set(), []
    for name, tensor in adapter.tensors.items():
        layer, ending = split_name(name)
        found = _find(f"{layer}.weight", weights)
        if found is None or ending not in SIZES:
            continue
        compared.add(layer)
        ours, theirs = SIZES[ending]
        shape = weights[found][1].shape
        if len(tensor.shape) <= ours or len(shape) <= theirs or tensor.shape[ours] != shape[theirs]:
            wrong.append(f"{layer}: {ending} has the shape {list(tensor.shape)}, the base's weight {list(shape)}")
    more = [f"and {len(wrong) - FAULTS_SHOWN} more tensors"] if len(wrong) > FAULTS_SHOWN else []
    return len(compared), wrong[:FAULTS_SHOWN] + more


def _find(name: str, weights: Weights) -> str | None:
    """Find a parameter in a file: under its own name, or that of a model without its head ("bert." left out)."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in weights:
            return candidate
    return None


def _fingerprint(config: Mapping[str, Any], weights: Weights, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the base as `base_fingerprint` does, from its files.

    What files do not tell is taken as recorded: the class where the config names another kind of model.
    """
    named = config.get("architectures")
    told = named[0] if isinstance(named, list) and named and str(named[0]).endswith("MaskedLM") else None
    values = {}
    for name in recorded["weights"]:
        found = _find(name, weights)
        if found is None or weights[found][1].dtype not in FLOATS or not weights[found][1].count:
            continue
        header, entry = weights[found]
        values[name] = {"shape": list(entry.shape), "values": read_at(header, found, sampled_places(entry.count))}
    return {
        "architecture": told or recorded["architecture"],
        "vocab_size": config.get("vocab_size", recorded["vocab_size"]),
        "weights": values,
    }
