"""An adapter merged into the files of its base, tensor by tensor: the model is never built, whatever its size.

What the adapter does not change is copied from file to file. What it changes is read, merged by PEFT's own layer, which
hangs in an outline of the model without weights, and written. In memory is one layer at a time.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

from peft_mlm.adapter import ADAPTER, ADAPTER_WEIGHTS, cast_with_adapter, check_adapter_folder
from peft_mlm.arguments import ModelArguments
from peft_mlm.checkpoint import hub_commit, hub_options, loading_of
from peft_mlm.errors import MergeError, ModelError
from peft_mlm.fingerprint import sampled_places, shortened
from peft_mlm.head_mapping import KINDS, WEIGHTS, WEIGHTS_INDEX, Checkpoint, open_checkpoint, rename_checkpoint
from peft_mlm.merge_proof import precise_type
from peft_mlm.model import Base, load_tokenizer
from peft_mlm.tensor_files import (
    TYPES,
    Part,
    StoredTensor,
    read_tensor,
    read_values,
    same_bytes,
    stored_tensors,
    write_tensors,
)
from peft_mlm.vocabulary import vocabulary_rows

# Methods whose layers merge by what lies in the adapter's file and the layer's own weight alone.
METHODS = ("LORA", "TRAINABLE_TOKENS")
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


def streamed_merge(plan: StreamPlan, dtype: str) -> Callable[[Path], None]:
    """Merge file by file.

    Args:
        plan: From `plan_stream`.
        dtype: Type of the merged weights. Sums are made in float64, for models over 500 million parameters in float32.

    Returns:
        Writes the weights, in files like the base's, and the config into an empty folder. It raises MergeError where a
        sum is not finite.
    """
    kind = getattr(torch, dtype)

    def write(folder: Path) -> None:
        stored = {plan.names.get(t.name, t.name): t for tensors in plan.files.values() for t in tensors}
        merge = _Merger(plan, stored)
        written: dict[str, list[Part]] = {}
        for file, tensors in plan.files.items():
            written[file.name] = [_part(merge, plan.names.get(t.name, t.name), t, kind) for t in tensors]
        *_, last = written.values()
        for name in sorted(plan.replaced.keys() - stored.keys()):
            last.append(Part(name, kind, tuple(plan.replaced[name].shape), _whole(plan.replaced[name])))
        for file_name, parts in written.items():
            write_tensors(folder / file_name, parts)
        if len(written) > 1:
            _write_index(folder, written)
        config = plan.base.model.config
        config.architectures, config.dtype = [type(plan.base.model).__name__], kind
        config.save_pretrained(str(folder))

    return write


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


class _Merger:
    """Makes merged tensors one after the other; of the layer in hand all are kept, since they are made together."""

    def __init__(self, plan: StreamPlan, stored: Mapping[str, StoredTensor]) -> None:
        self.plan, self.stored = plan, stored
        self.precise = precise_type(plan.model.get_base_model())
        cast_with_adapter(plan.model, self.precise)
        self.made: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self.made:
            self.made = {}  # let the last layer go before the next one is read
            self.made = self._merge(self.plan.layers[name], name.rpartition(".")[0])
        return self.made.pop(name)

    def _merge(self, layer: BaseTunerLayer, owner: str) -> dict[str, torch.Tensor]:
        inner = layer.get_base_layer()
        empty = dict(inner._parameters)
        changed = [key for key in empty if f"{owner}.{key}" in self.plan.layers]
        try:
            for key in changed:
                inner._parameters[key] = nn.Parameter(self._value(f"{owner}.{key}"), requires_grad=False)
            layer.merge(safe_merge=True)
            merged = {f"{owner}.{key}": inner._parameters[key].data for key in changed}
        except (NotImplementedError, ValueError) as error:
            raise MergeError(f"This adapter cannot be merged into its base: {error}") from error
        finally:
            inner._parameters.update(empty)
            layer.merged_adapters.clear()
        return merged

    def _value(self, name: str) -> torch.Tensor:
        if name in self.plan.replaced:
            return self.plan.replaced[name].detach().to(self.precise)
        return read_tensor(self.stored[name]).to(self.precise)


def _part(merge: _Merger, name: str, tensor: StoredTensor, dtype: torch.dtype) -> Part:
    """Say what becomes of a tensor of the base."""
    kind = TYPES[tensor.dtype]
    if name in merge.plan.layers:
        return Part(name, dtype, tensor.shape, lambda: merge(name))
    if name in merge.plan.replaced:
        return Part(name, dtype, tensor.shape, _whole(merge.plan.replaced[name]))
    if kind.is_floating_point and kind != dtype:
        return Part(name, dtype, tensor.shape, lambda: read_tensor(tensor))
    return Part(name, kind, tensor.shape, tensor)


def _whole(value: torch.Tensor) -> Any:
    return lambda: value.detach()


def _write_index(folder: Path, written: Mapping[str, list[Part]]) -> None:
    placed = {part.name: file for file, parts in written.items() for part in parts}
    sizes = [(torch.Size(p.shape).numel(), p.dtype.itemsize) for parts in written.values() for p in parts]
    metadata = {"total_parameters": sum(n for n, _ in sizes), "total_size": sum(n * size for n, size in sizes)}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(placed.items()))}, indent=2)
    (folder / WEIGHTS_INDEX).write_text(text + "\n", encoding="utf-8")


def _check_case(folder: Path, arguments: ModelArguments, outline: PreTrainedModel | None) -> PreTrainedModel:
    """Refuse what needs the whole model, as far as it is told without looking at tensors."""
    method = check_adapter_folder(folder)["peft_type"]
    if method not in METHODS:
        raise _CannotStreamError(f"the method {method} is merged in the built model")
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
            own = ModelArguments(**{**vars(arguments), "tokenizer_name": None})
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
