"""Which layers an adapter changes: found by what the prediction depends on, or named by the user.

Names are matched as PEFT matches them; what matches nothing is refused with the real names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError
from peft_mlm.heads import outermost, tied_parameters, untied_modules
from peft_mlm.probing import evaluating, probe_inputs
from peft_mlm.untying import decoder_reads_embeddings

ALL_LINEAR = "all-linear"


def encoder_linears(model: PreTrainedModel) -> list[str]:
    """List the linear layers of the encoder that the prediction depends on.

    A short forward and backward pass tells which ones a gradient reaches; layers that the masked LM never uses (such as
    a pooler, or the image encoder of a model that reads images too) and the head are left out, and so is every matrix
    that stands in more than one place. An encoder without such a layer (SqueezeBERT) has its linear layers written as
    convolutions over one position: these are taken then, if they are of one group (PEFT cannot merge those of several).

    Args:
        model: The masked LM.

    Returns:
        Full module names, in the order of the model.
    """
    tied = tied_parameters(model)
    of_encoder = {id(module) for module in model.base_model.modules()}
    output_layer = model.get_output_embeddings()
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Conv1d)
        and id(module) in of_encoder
        and id(module.weight) not in tied
        and module is not output_layer
    }
    convolutions = {name: layer for name, layer in candidates.items() if isinstance(layer, nn.Conv1d)}
    linears = {name: layer for name, layer in candidates.items() if name not in convolutions}
    pointwise = {name: layer for name, layer in convolutions.items() if layer.kernel_size == (1,) and layer.groups == 1}
    reached = _reached_by_gradient(model, linears) or _reached_by_gradient(model, pointwise)
    return [name for name in candidates if name in reached]


def encoder_norms(model: PreTrainedModel) -> list[str]:
    """List the norms of the encoder that the prediction depends on.

    Args:
        model: The masked LM.

    Returns:
        Full module names, in the order of the model.
    """
    of_encoder = {id(module) for module in model.base_model.modules()}
    norms = {
        name: module
        for name, module in model.named_modules()
        if id(module) in of_encoder
        and "norm" in type(module).__name__.lower()
        and not any(module.children())
        and any(True for _ in module.parameters())
    }
    reached = _reached_by_gradient(model, norms)
    return [name for name in norms if name in reached]


def resolve_targets(
    model: PreTrainedModel, arguments: PEFTArguments, without: Sequence[str], *, among: Sequence[str] | None = None
) -> list[str]:
    """Turn the names given, or the default, into the full names of the layers to adapt.

    Args:
        model: The masked LM.
        arguments: Names, exclusions, layer numbers.
        without: Modules that are trained in full, and so get no adapter.
        among: The layers that a method can change, where these are not linear layers: the names are looked up there.

    Returns:
        Full module names, in the order of the model.

    Raises:
        AdapterError: A name matches nothing, or a tied matrix; or nothing is left.
    """
    given = arguments.lora_target_modules
    if among is not None:
        wanted_names = [ALL_LINEAR] if given is None else given
        absent_names = [w for w in wanted_names if w != ALL_LINEAR and not any(_matches(n, w) for n in among)]
        if absent_names:
            raise AdapterError(
                f"lora_target_modules: {', '.join(absent_names)} names none of the layers that this method changes. "
                f"These are: {_choices(among)}."
            )
        targets = [n for n in among if any(w == ALL_LINEAR or _matches(n, w) for w in wanted_names)]
    elif given is None or given == [ALL_LINEAR]:
        targets = encoder_linears(model)
    else:
        targets = _named_layers(model, given, option="lora_target_modules")
    for name in arguments.lora_exclude_modules or []:
        left_out = [target for target in targets if _matches(target, name)]
        if not left_out:
            raise AdapterError(f"lora_exclude_modules: {name} is no target. Targets: {_choices(targets)}.")
        targets = [target for target in targets if target not in left_out]
    if arguments.layers_to_transform is not None:
        wanted = set(arguments.layers_to_transform)
        numbers = {target: _layer_number(target) for target in targets}
        absent = wanted - set(numbers.values())
        if absent:
            real = sorted({n for n in numbers.values() if n is not None})
            raise AdapterError(f"layers_to_transform: no layer {sorted(absent)}; there are {real[0]} to {real[-1]}.")
        targets = [target for target in targets if numbers[target] in wanted]
    targets = [t for t in targets if not any(t == w or t.startswith(w + ".") for w in without)]
    if not targets:
        raise AdapterError("No layer is left to adapt: check lora_target_modules, lora_exclude_modules.")
    return targets


def resolve_modules_to_save(model: PreTrainedModel, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Turn names of modules to train in full into their parts without a tied matrix.

    Args:
        model: The masked LM.
        names: As given by the user, or None.

    Returns:
        Full names of the parts to train, and sentences that say what stays frozen.

    Raises:
        AdapterError: A name matches nothing, or nothing but tied weights.
    """
    modules = dict(model.named_modules())
    tied = tied_parameters(model)
    trained: list[str] = []
    notices: list[str] = []
    for wanted in names or []:
        hits = [name for name in modules if name and _matches(name, wanted)]
        if not hits:
            last_parts = sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()})
            raise AdapterError(f"modules_to_save: no module is named {wanted}. Modules: {', '.join(last_parts)}.")
        for hit in hits:
            parts = [part for part in untied_modules(model, hit) if not _is_read_by_decoder(model, modules[part])]
            if not parts:
                raise AdapterError(
                    f"modules_to_save: {hit} holds nothing but weights that are tied to the embeddings; a trained copy "
                    "would cut the tie. Leave it out, give the decoder a matrix of its own (--untie_embeddings), or "
                    "train the whole model (without --use_lora)."
                )
            trained += parts
            if any(id(parameter) in tied for parameter in modules[hit].parameters()):
                notices.append(
                    f"modules_to_save: of {hit}, {', '.join(parts)} are trained; the tied decoder stays "
                    "(--untie_embeddings would give it a matrix of its own)."
                )
    return outermost(trained), notices


def check_pattern(option: str, pattern: dict[str, Any] | None, targets: Sequence[str]) -> dict[str, Any]:
    """Check that each name of a rank or alpha pattern is a target and each value a positive number.

    Args:
        option: `rank_pattern` or `alpha_pattern`.
        pattern: Values by name or expression, or None.
        targets: Full names of the layers that are adapted.

    Returns:
        The pattern.

    Raises:
        AdapterError: A name matches no target, or a value is no positive number.
    """
    for name, value in (pattern or {}).items():
        # PEFT's own rule for these keys
        if not any(re.match(rf"(.*\.)?({name})$", target) for target in targets):
            raise AdapterError(f"{option}: {name} matches no target. Targets: {_choices(targets)}.")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (option == "alpha_pattern" and isinstance(value, float))) or value <= 0:
            raise AdapterError(f"{option}: {name} is {value!r}; it must be a positive number.")
    return dict(pattern or {})


def as_pattern(model: nn.Module, targets: Sequence[str]) -> str | list[str]:
    """Say a list of layers as one short expression, layer numbers left open, if that means exactly these layers.

    Args:
        model: The masked LM.
        targets: Full names of its layers.

    Returns:
        A regular expression that PEFT matches against full names; else the list itself.
    """
    open_names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", re.escape(t).replace(r"\.", ".")) for t in targets)
    pattern = "|".join(name.replace(".", r"\.") for name in open_names)
    matched = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    return pattern if matched == list(targets) else list(targets)


def _reached_by_gradient(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> set[str]:
    """Name the layers whose output the logits depend on, without keeping a gradient for any weight."""
    if model.device.type == "meta":  # an outline, which cannot be run
        return set(layers)
    reached: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            # X-MOD runs the parts of its other languages too, on no rows at all
            leaf.register_hook(lambda gradient: reached.add(name) if gradient.numel() else None)
            return leaf.clone()  # some models change a layer's output in place, which a leaf does not allow

        return hook

    needed = {p: p.requires_grad for p in model.parameters()}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        model.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            logits = model(**probe_inputs(model)).logits
            if logits.requires_grad:
                logits.float().pow(2).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in needed.items():
            parameter.requires_grad_(requires_grad)
    return reached


def _named_layers(model: PreTrainedModel, names: Sequence[str], option: str) -> list[str]:
    """Find the layers with these names, or that match this one regular expression, as PEFT reads them."""
    tied = tied_parameters(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.Conv1d | nn.Conv2d)
    }
    found: list[str] = []
    for wanted in names:
        hits = [name for name in layers if _matches(name, wanted)]
        if not hits:
            linears = [name for name, module in layers.items() if isinstance(module, nn.Linear | Conv1D)]
            raise AdapterError(f"{option}: no layer is named {wanted}. Layers of this model: {_choices(linears)}.")
        shared = [n for n in hits if id(layers[n].weight) in tied or _is_read_by_decoder(model, layers[n])]
        if shared:
            raise AdapterError(
                f"{option}: {', '.join(shared)} is the embedding and the decoder at once (tied); an adapter on one "
                "side would be lost or doubled by a merge. Leave it out, or give each a matrix of its own: "
                "--untie_embeddings."
            )
        used = _reached_by_gradient(model, {name: layers[name] for name in hits})
        if not used:
            raise AdapterError(
                f"{option}: no prediction depends on the output of {', '.join(hits)}; an adapter there would do "
                "nothing. Leave it out."
            )
        found += [name for name in hits if name in used and name not in found]
    return [name for name in layers if name in found]


def _is_read_by_decoder(model: PreTrainedModel, module: nn.Module) -> bool:
    """Tell whether a module is the embeddings of a model that computes its logits from their matrix."""
    runs = model.device.type != "meta"  # else it is an outline, and this is asked again of the model itself
    return runs and module is model.get_input_embeddings() and decoder_reads_embeddings(model)


def _matches(name: str, wanted: str) -> bool:
    """Match as PEFT does: the whole name, its last parts, or, where it can't be a name, a regular expression."""
    if re.fullmatch(r"[\w.]+", wanted):
        return name == wanted or name.endswith("." + wanted)
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as error:
        raise AdapterError(f"{wanted!r} is neither a module's name nor a regular expression: {error}.") from error


def _layer_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _choices(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names))
