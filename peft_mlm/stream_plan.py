"""Can an adapter be merged file by file, and how: the base's tensors, its outline, and what the adapter changes of it.

Whatever is not known to be right that way is merged in the built model: another method, an option that does more than
add to a weight, a tie that would be cut, a checkpoint that transformers converts.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import cached_file

from peft_mlm.adapter import ADAPTER, ADAPTER_WEIGHTS, check_adapter_folder
from peft_mlm.arguments import ModelArguments
from peft_mlm.checkpoint import hub_commit, hub_options, loading_of
from peft_mlm.errors import ModelError
from peft_mlm.fingerprint import sampled_places, shortened
from peft_mlm.head_mapping import KINDS, WEIGHTS, WEIGHTS_INDEX, Checkpoint, open_checkpoint, rename_checkpoint
from peft_mlm.model import Base, load_tokenizer
from peft_mlm.tensor_files import TYPES, StoredTensor, read_values, same_bytes, stored_tensors
from peft_mlm.vocabulary import vocabulary_rows

# Methods whose layers merge by what lies in the adapter's file and the layer's own weight alone.
METHODS = ("LORA", "TRAINABLE_TOKENS")
# Options of theirs that are known to change nothing else; any other one that is set asks for the built model.
OPTIONS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "token_indices", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Starts that leave the base as it is; PEFT makes others again when it loads an adapter, from the base's weights.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _CannotStreamError(Exception):
    """Why a model must be built to be merged."""


@dataclass(frozen=True)
class StreamPlan:
    """How to merge file by file.

    Attributes:
        model: The base without weights, with the adapter's weights on it.
        base: The base without weights, with its tokenizer and fingerprint.
        files: The base's tensors, file by file.
        names: The model's names by those in the files; what is not in it has no place in the model, and is copied.
        layers: PEFT's layer by the name of a parameter that it changes.
        replaced: Parameters that the adapter holds whole.
    """

    model: PeftModel
    base: Base
    files: Mapping[Path, list[StoredTensor]]
    names: Mapping[str, str]
    layers: Mapping[str, BaseTunerLayer]
    replaced: Mapping[str, torch.Tensor]


def plan_stream(folder: Path, arguments: ModelArguments, outline: PreTrainedModel | None) -> StreamPlan | str:
    """Look whether an adapter can be merged file by file, and how.

    Args:
        folder: The adapter's folder.
        arguments: How to load its base.
        outline: That base without weights (`checkpoint.load_outline`); the adapter is put on it.

    Returns:
        The plan, or a sentence that says why the model must be built.
    """
    try:
        return _plan(folder, arguments, _check_case(folder, arguments, outline))
    except _CannotStreamError as reason:
        return str(reason)


def stored_type(arguments: ModelArguments) -> str:
    """Tell the type that most of a base's weights are stored in.

    Args:
        arguments: How to load it.

    Returns:
        float32, bfloat16 or float16; float32 where it is another or cannot be told.
    """
    sizes: Counter[str] = Counter()
    for file in _open(arguments).files:
        for tensor in stored_tensors(file):
            sizes[tensor.dtype] += tensor.size
    held = [name for name, _ in sizes.most_common() if name in FLOATS]
    return FLOATS[held[0]] if held else "float32"


def _check_case(folder: Path, arguments: ModelArguments, outline: PreTrainedModel | None) -> PreTrainedModel:
    """Refuse what needs the whole model, as far as it is told without looking at tensors."""
    config = check_adapter_folder(folder)
    if config["peft_type"] not in METHODS:
        raise _CannotStreamError(f"it is of the method {config['peft_type']}")
    if further := sorted(name for name, value in config.items() if value and name not in OPTIONS):
        raise _CannotStreamError(f"it has the option {further[0]}")
    if config.get("init_lora_weights", True) not in STARTS:
        raise _CannotStreamError(f"it starts by {config['init_lora_weights']}")
    if outline is None:
        raise _CannotStreamError("the model has code of its own")
    if arguments.load_in_4bit or arguments.load_in_8bit or getattr(outline.config, "quantization_config", None):
        raise _CannotStreamError("the base is dequantised first")
    if arguments.untie_embeddings:
        raise _CannotStreamError("the decoder gets a matrix of its own")
    if any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(outline)):
        raise _CannotStreamError(f"transformers converts the weights of {outline.config.model_type} checkpoints")
    return outline


def _plan(folder: Path, arguments: ModelArguments, outline: PreTrainedModel) -> StreamPlan:
    tokenizer = _own_tokenizer(arguments, outline)
    checkpoint = _open(arguments)
    if not checkpoint.files:
        raise _CannotStreamError("the base has no safetensors files")
    try:
        files = {file: stored_tensors(file) for file in checkpoint.files}
    except ModelError as error:
        raise _CannotStreamError(str(error)) from error
    stored = {tensor.name: tensor for tensors in files.values() for tensor in tensors}
    names = _names(outline, checkpoint)
    groups = _groups(outline)
    _check_stored(outline, names, stored, groups)
    by_name = {ours: stored[theirs] for theirs, ours in names.items()}
    name = arguments.model_name_or_path
    revision, fingerprint = hub_commit(str(name), arguments), _fingerprint(outline, by_name)
    base = Base(outline, tokenizer, name, revision=revision, fingerprint=fingerprint)
    parameters = {name for aliases in groups.values() for name in aliases}
    model = _with_adapter(outline, folder)
    layers, replaced = _changes(model, parameters)
    _check_changes(layers, replaced, by_name, groups)
    return StreamPlan(model, base, files, names, layers, replaced)


def _open(arguments: ModelArguments) -> Checkpoint:
    """Look at the base's files, fetched from the hub if need be."""
    name, options = str(arguments.model_name_or_path), hub_options(arguments, arguments.model_revision)
    del options["trust_remote_code"]
    if not Path(name).expanduser().is_dir():
        with loading_of("model", name):
            index = cached_file(name, WEIGHTS_INDEX, _raise_exceptions_for_missing_entries=False, **options)
            shards = [WEIGHTS] if index is None else json.loads(Path(index).read_text())["weight_map"].values()
            for file in set(shards):
                cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    return open_checkpoint(name, **options)


def _own_tokenizer(arguments: ModelArguments, outline: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer, where it has no token that the base's own does not have."""
    tokenizer = load_tokenizer(arguments)
    known: set[int] = set(range(vocabulary_rows(outline)))
    if arguments.tokenizer_name not in (None, arguments.model_name_or_path):
        try:
            own = replace(arguments, tokenizer_name=None)
            known &= set(load_tokenizer(own).get_vocab().values())
        except ModelError:
            pass  # the base has no tokenizer
    if not set(tokenizer.get_vocab().values()) <= known:
        raise _CannotStreamError("rows are added for new tokens")
    return tokenizer


def _names(outline: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Find the model's name of each tensor in the files."""
    places, prefix = outline.state_dict().keys(), f"{outline.base_model_prefix}."
    names: dict[str, str] = {}
    for theirs in checkpoint.shapes:
        owner, dot, last = theirs.rpartition(".")
        modern = f"{owner}{dot}{KINDS.get(last, last)}"
        found = (theirs, modern, prefix + modern, modern.removeprefix(prefix))
        ours = next((name for name in found if name in places), None)
        if ours is not None:
            names[theirs] = ours
    missing = [name for name, _ in outline.named_parameters() if name not in names.values()]
    if missing:
        names |= rename_checkpoint(outline, missing, checkpoint).names
    if len(set(names.values())) < len(names):
        raise _CannotStreamError("the checkpoint holds a tensor under two names")
    if clash := (checkpoint.shapes.keys() - names.keys()) & set(names.values()):
        raise _CannotStreamError(f"the checkpoint has another use for the name {min(clash)}")
    return names


def _groups(outline: PreTrainedModel) -> dict[int, list[str]]:
    """Give the names of each parameter, the first one first."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in outline.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return groups


def _check_stored(
    outline: PreTrainedModel,
    names: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    groups: Mapping[int, list[str]],
) -> None:
    """Refuse files that do not hold the model as it is: types, shapes, and both ends of ties alike."""
    state = outline.state_dict()
    by_name = {ours: stored[theirs] for theirs, ours in names.items()}
    for name, tensor in stored.items():
        if tensor.dtype not in TYPES:
            raise _CannotStreamError(f"{name} is of the type {tensor.dtype}")
    for name, tensor in by_name.items():
        if tensor.shape != tuple(state[name].shape):
            raise _CannotStreamError(f"{name} has the shape {tensor.shape}, the model another")
    for aliases in groups.values():
        held = [by_name[name] for name in aliases if name in by_name]
        if held and aliases[0] not in by_name:
            raise _CannotStreamError(f"the checkpoint holds {aliases[0]} under the name of its other end")
        if any(not same_bytes(held[0], other) for other in held[1:]):
            raise _CannotStreamError(f"the checkpoint holds two different ends of {aliases[0]}")


def _fingerprint(outline: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Make the fingerprint that `fingerprint.base_fingerprint` makes of the loaded model."""
    weights = {}
    for name, parameter in outline.named_parameters():
        if name in stored and parameter.numel():
            values = read_values(stored[name], sampled_places(parameter.numel()))
            weights[name] = {"shape": list(parameter.shape), "values": [shortened(value) for value in values]}
    return {"architecture": type(outline).__name__, "vocab_size": vocabulary_rows(outline), "weights": weights}


def _with_adapter(outline: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter on a model without weights. PEFT moves its weights to where the model's are; they come back."""
    weights = load_file(folder / ADAPTER_WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(outline, str(folder), low_cpu_mem_usage=True).eval()
    unused = set(weights)
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        plain = name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", "")
        found = (plain, plain.removesuffix(".weight"), plain.replace(".base_layer", ""))
        key = next((key for key in found if key in weights), None)
        if key is None or ".original_module." in name:
            continue
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._parameters[last] = nn.Parameter(weights[key], requires_grad=False)
        unused.discard(key)
    if unused:
        raise _CannotStreamError(f"the adapter holds {min(unused)}")
    return model


def _changes(model: PeftModel, parameters: set[str]) -> tuple[dict[str, BaseTunerLayer], dict[str, torch.Tensor]]:
    """Tell which parameters of the base a layer of PEFT changes, and which ones the adapter holds whole."""
    layers: dict[str, BaseTunerLayer] = {}
    base = model.get_base_model()
    for name, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        owner = name.removesuffix(".token_adapter")
        if not isinstance(layer, LoraLayer | TrainableTokensLayer) or any(layer.get_base_layer().children()):
            raise _CannotStreamError(f"{owner} has a layer of the class {type(layer).__name__}")
        if any(p.is_meta for n, p in layer.named_parameters() if not n.startswith("base_layer.")):
            raise _CannotStreamError(f"the adapter does not hold all of its weights for {owner}")
        keys = ["weight"]
        if isinstance(layer, LoraLayer) and layer.lora_bias.get(ADAPTER):
            keys.append("bias")
        layers |= {f"{owner}.{key}": layer for key in keys}
    replaced = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer", "").replace(f".modules_to_save.{ADAPTER}", "")
        if not parameter.is_meta and plain in parameters:
            replaced[plain] = parameter
    return layers, replaced


def _check_changes(
    layers: Mapping[str, BaseTunerLayer],
    replaced: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
    groups: Mapping[int, list[str]],
) -> None:
    """Refuse changes that the files cannot take one by one."""
    for aliases in groups.values():
        kinds = [type(layers[name]) if name in layers else name in replaced for name in aliases]
        tokens = [kind is TrainableTokensLayer for kind in kinds]
        if len(aliases) > 1 and any(kinds) and not all(tokens):
            raise _CannotStreamError(f"the adapter changes {aliases[0]}, which stands in more than one place")
        if aliases[0] not in stored and aliases[0] not in replaced:
            raise _CannotStreamError(f"the checkpoint does not hold {aliases[0]}")
