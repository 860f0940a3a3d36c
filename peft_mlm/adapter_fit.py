"""Does an adapter belong to this base? Told from names and shapes alone, before any weight of the base is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from peft_mlm.errors import AdapterError

WRAPPED = "base_model.model."
TRANSFORMERS_MODELS = "transformers.models."
# Tensor of LoRA -> which of its dimensions is which dimension of the layer's weight.
LORA_DIMENSIONS = {
    "lora_A": (1, 1),
    "lora_B": (0, 0),
    "lora_embedding_A": (1, 0),
    "lora_embedding_B": (0, 1),
    "token_adapter": (1, 1),
}


def check_adapter_fits(
    folder: Path, weights: str, config: Mapping[str, Any], model: PreTrainedModel, *, rows: int | None
) -> None:
    """Refuse an adapter that was made for another architecture, another size or another vocabulary.

    Args:
        folder: The adapter's folder.
        weights: Name of the file with its weights there.
        config: Its `adapter_config.json`.
        model: The base; its parameters may be on the meta device.
        rows: Rows of its vocabulary; None where they are not known yet.

    Raises:
        AdapterError: The adapter does not fit.
    """
    misfit = _other_architecture(config, model) or _other_vocabulary(config, rows)
    if not misfit:
        try:
            with safe_open(folder / weights, framework="pt") as tensors:
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            misfit = f"{weights} cannot be read ({error})"
        else:
            misfit = _other_modules(shapes, config, model, rows)
    if misfit:
        raise AdapterError(
            f"The adapter {folder} does not fit the base model: {misfit}. Give the base that it was trained on."
        )


def _other_architecture(config: Mapping[str, Any], model: PreTrainedModel) -> str:
    """Compare the code that the adapter was trained with; PEFT writes it where there is no task type."""
    made_for = config.get("auto_mapping") or {}
    library, name = made_for.get("parent_library"), made_for.get("base_model_class")
    ours = type(model)
    if not (isinstance(library, str) and library.startswith(TRANSFORMERS_MODELS)):
        return ""
    if not ours.__module__.startswith(TRANSFORMERS_MODELS) or library == ours.__module__:
        return ""
    return f"it was trained on a {name}, the base is a {ours.__name__}"


def _other_vocabulary(config: Mapping[str, Any], rows: int | None) -> str:
    indices = config.get("trainable_token_indices") or config.get("token_indices") or []
    ids = [i for part in indices.values() for i in part] if isinstance(indices, dict) else indices
    if rows is None or not ids or max(ids) < rows:
        return ""
    return f"it trains the rows of tokens up to {max(ids)}, the base's vocabulary has {rows} rows"


def _other_modules(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], model: PreTrainedModel, rows: int | None
) -> str:
    if config.get("layer_replication") or config.get("use_bdlora"):
        return ""  # PEFT has other layers, or smaller matrices, than the base's own sizes tell
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType.__members__.get(str(config["peft_type"])), "lora_")
    modules = dict(model.named_modules())
    of_vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, shape in shapes.items():
        if not name.startswith(WRAPPED):
            continue  # what a method shares between all layers
        path, rest = _split(name.removeprefix(WRAPPED), modules)
        if "base_layer" in rest:  # the layer's own, such as a bias that is trained with all others
            rest = rest[rest.index("base_layer") + 1 :]
        module = modules[path]
        known = rest[0] in module._parameters or rest[0].startswith(prefix)
        if not known and any(module.children()):
            return f"it changes {name.removeprefix(WRAPPED)}, and the base has no such module"
        per_token = module in of_vocabulary or _is_lone_bias(module, of_vocabulary[0])
        wanted = _wanted(rest, module, rows if per_token else 0)
        wrong = [(i, size) for i, size in wanted.items() if size is not None and (i >= len(shape) or shape[i] != size)]
        if wrong:
            i, size = wrong[0]
            has = shape[i] if i < len(shape) else "none"
            return f"{name.removeprefix(WRAPPED)} is for a layer of size {has}, the base has {size}"
    return ""


def _is_lone_bias(module: nn.Module, embeddings: Any) -> bool:
    """Tell whether a module holds nothing of its own but a bias per token, beside the decoder."""
    bias = module._parameters.get("bias")
    return bias is not None and "weight" not in module._parameters and len(bias) == len(embeddings.weight)


def _split(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, list[str]]:
    """Split a name into the longest part that is a module of the base, and the rest."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:i]) in modules:
            return ".".join(parts[:i]), parts[i:]
    return "", parts


def _wanted(rest: list[str], module: nn.Module, rows: int | None) -> dict[int, int | None]:
    """Give the sizes that a tensor must have, by dimension; `rows` is 0 for a module without a row for each token."""
    parameter = module._parameters.get(rest[0])
    weight = module._parameters.get("weight")
    sizes = {}
    if parameter is not None:
        sizes = dict(enumerate(parameter.shape))
        return {i: (rows if i == 0 and rows != 0 else size) for i, size in sizes.items()}
    if rest[0] in LORA_DIMENSIONS and isinstance(module, nn.Linear | nn.Embedding) and weight is not None:
        i, of_weight = LORA_DIMENSIONS[rest[0]]
        sizes = {0: module.out_features, 1: module.in_features} if isinstance(module, nn.Linear) else sizes
        size = sizes[of_weight] if sizes else weight.shape[of_weight]
        return {i: rows if of_weight == 0 and rows != 0 else size}
    return {}
