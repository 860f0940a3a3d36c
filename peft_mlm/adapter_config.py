"""The configuration of any PEFT method, made for a model: what it changes, and options that fit its layers.

Which methods there are, and what each needs, stands in `methods.py`.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import peft
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError
from peft_mlm.method_options import convert_options, method_options
from peft_mlm.methods import METHODS, VARIANTS, Base
from peft_mlm.peft_rules import (
    LORA_FLAGS,
    LORA_OPTIMISERS,
    active_variants,
    method_name,
    take_flags,
    why_not_base,
    why_refused,
)
from peft_mlm.targets import as_pattern, check_pattern, encoder_norms, resolve_targets

# Two ways to say one thing, of which PEFT takes one: the second is 0 where the first is given.
ALTERNATIVES = {"oft": ("r", "oft_block_size"), "boft": ("boft_block_num", "boft_block_size")}
PATTERNS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern", "block_size_pattern")


def find_targets(model: PreTrainedModel, arguments: PEFTArguments, without: Sequence[str]) -> list[str]:
    """Find what a method changes: linear layers, those with a bias, norms, or nothing but rows of the embeddings.

    Args:
        model: The masked LM.
        arguments: The method; names, exclusions, layer numbers.
        without: Modules that are trained in full.

    Returns:
        Full module names, in the order of the model.

    Raises:
        AdapterError: A name matches nothing that the method can change.
    """
    kind = METHODS[method_name(arguments)].targets
    if kind == "tokens":
        return []
    if kind == "norm":
        return resolve_targets(model, arguments, without, among=encoder_norms(model))
    targets = resolve_targets(model, arguments, without)
    with_bias = (arguments.peft_config or {}).get("lora_bias")
    if kind != "biased" and not with_bias:
        return targets
    bare = [name for name in targets if getattr(model.get_submodule(name), "bias", None) is None]
    named = arguments.lora_target_modules not in (None, ["all-linear"])
    if bare and (named or with_bias or len(bare) == len(targets)):
        what = "lora_bias" if with_bias else f"peft_method {method_name(arguments)}"
        raise AdapterError(
            f"{what} trains biases, which could not be merged into {', '.join(bare)}: they have none. Name layers that "
            "have one by lora_target_modules, or leave it out."
        )
    return [name for name in targets if name not in bare]


def build_config(
    model: PreTrainedModel,
    arguments: PEFTArguments,
    *,
    targets: Sequence[str],
    trained: Sequence[str],
    token_rows: Mapping[str, Sequence[int]] | None,
    total_steps: int | None,
) -> tuple[PeftConfig, list[str]]:
    """Build PEFT's configuration of a method.

    Args:
        model: The masked LM.
        arguments: The method and its options.
        targets: From `find_targets`.
        trained: Full names of the modules to train in full.
        token_rows: Rows of new tokens to train, by the name of their module; None without new tokens.
        total_steps: Optimiser steps of the run, for methods with a schedule.

    Returns:
        The configuration, and sentences that the user should read.

    Raises:
        AdapterError: An option is unknown, of the wrong type, or does not fit the layers; the method does not serve
            masked LMs or this base; or it cannot train what has to be trained.
    """
    method = method_name(arguments)
    row = METHODS[method]
    options, notices = _fit_sizes(model, method, _checked_options(model, method, arguments, targets), targets)
    notices += [sentence] if (sentence := why_not_base(method, options)) else []
    notices += [f"An adapter of {row.title} cannot be merged into its base: {row.merge}."] if row.merge else []
    options |= _whole_modules(method, trained)
    if row.targets == "tokens":
        options |= _token_options(model, options, token_rows)
    else:
        options["target_modules"] = as_pattern(model, targets)
        options |= _row_options(method, token_rows)
    known = method_options(method)
    if "feedforward_modules" in known:
        options["feedforward_modules"] = _feedforward(model, options.get("feedforward_modules"), targets)
    if "total_step" in known and options.get("total_step") is None:
        options["total_step"] = total_steps
    return _make(row.config, method, options), notices


def loaded_kind(model: nn.Module) -> Base:
    """Tell what kind of base a model is, by its layers.

    Args:
        model: The base.

    Returns:
        The kind; of several, that of the first quantised layer.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            return "int8"
        if type(module).__name__ == "Linear4bit":
            weight: Any = module.weight
            return "fp4" if weight.quant_type == "fp4" else "nf4"
    return "float"


def describe_method(config: PeftConfig) -> str:
    """Name a method with what was chosen for it, for the card of an adapter.

    Args:
        config: PEFT's configuration.

    Returns:
        Such as `LoRA (DoRA), rank 8, alpha 16` or `BOFT, boft_block_size 8`.
    """
    method = str(config.peft_type.value).lower()
    row = METHODS[method]
    options = {name: value for name in method_options(method) if (value := getattr(config, name, None)) is not None}
    if method == "lora":
        active = [VARIANTS[name].title for name in active_variants(method, options) if "pattern" not in name]
        names = f"{row.title} ({', '.join(active)})" if active else row.title
        return f"{names}, rank {config.r}, alpha {config.lora_alpha:g}"
    not_said = ("target_modules", "modules_to_save", "feedforward_modules", "trainable_token_indices", *row.defaults)
    changed = [
        f"{name} {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
        if name not in not_said
        and value != method_options(method)[name].default
        and isinstance(value, int | float | str)
    ]
    return ", ".join([row.title, *changed])


def _checked_options(model: nn.Module, method: str, arguments: PEFTArguments, targets: Sequence[str]) -> dict[str, Any]:
    """Collect the options of a method from all arguments, and refuse what cannot be."""
    options, faults = convert_options(method, arguments.peft_config or {})
    optimisers = {}
    if method == "lora":
        flags = {option: getattr(arguments, flag) for flag, option in LORA_FLAGS.items()}
        options = {option: value for option, value in flags.items() if value is not None} | options
        start = options["init_lora_weights"]
        options["init_lora_weights"] = {"true": True, "false": False}.get(str(start).lower(), start)
        optimisers = {name: getattr(arguments, name) for name in LORA_OPTIMISERS}
    else:
        defaults = vars(PEFTArguments())
        given = [name for name, value in vars(arguments).items() if value != defaults[name]]
        faults += take_flags(method, vars(arguments), given, options)
    faults += why_refused(method, optimisers | options, loaded_kind(model))
    if faults:
        raise AdapterError(" ".join(faults))
    for name in PATTERNS:
        if options.get(name) is not None and method != "osf":  # whose ranks may be fractions
            options[name] = check_pattern(name, options[name], targets)
    return dict(METHODS[method].defaults) | options


def _whole_modules(method: str, trained: Sequence[str]) -> dict[str, Any]:
    if not trained:
        return {}
    if "modules_to_save" not in method_options(method):
        raise AdapterError(
            f"peft_method {method} cannot train {', '.join(trained)} beside it. Use another method, such as lora."
        )
    return {"modules_to_save": list(trained)}


def _row_options(method: str, token_rows: Mapping[str, Sequence[int]] | None) -> dict[str, Any]:
    if not token_rows:
        return {}
    if "trainable_token_indices" not in method_options(method):
        raise AdapterError(
            f"peft_method {method} cannot train the rows of new tokens. Use lora, adalora or trainable_tokens, or "
            "leave the new tokens out."
        )
    return {"trainable_token_indices": {name: list(ids) for name, ids in token_rows.items()}}


def _make(name: str, method: str, options: dict[str, Any]) -> PeftConfig:
    """Make the configuration; what PEFT says against it becomes one sentence."""
    # PEFT wants scipy and a configuration for LoftQ, neither of which our own start needs.
    loftq = method == "lora" and options["init_lora_weights"] == "loftq"
    given = options | {"init_lora_weights": True} if loftq else options
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about sub-configurations by default
            # PEFT has no task type for masked LMs; any other would change how the model is called.
            config = getattr(peft, name)(task_type=None, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise AdapterError(f"peft_config: PEFT does not accept these options of {method}: {error}") from error
    if loftq:
        config.init_lora_weights = "loftq"
    return config


def _fit_sizes(
    model: PreTrainedModel, method: str, options: dict[str, Any], targets: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Choose options that must divide the sizes of the layers, or refuse those that don't."""
    fitted, notices = dict(options), list[str]()
    one, other = ALTERNATIVES.get(method, ("", ""))
    if fitted.get(one):
        fitted.setdefault(other, 0)
    for option, side in METHODS[method].divides.items():
        sizes = [size for name in targets for size in _sizes(model.get_submodule(name), side)]
        common = math.gcd(*sizes)
        step = 2 if method == "road" else 1  # RoAd turns pairs
        fine = [n for n in range(step, common + 1, step) if common % n == 0]
        given = fitted.get(option)
        if given == 0 or not sizes:
            continue
        if given is not None and given not in fine:
            raise AdapterError(
                f"peft_config: {option} is {given}, which does not divide the sizes of all layers to adapt "
                f"({', '.join(str(size) for size in sorted(set(sizes)))}). It can be one of: "
                f"{', '.join(map(str, fine)) or 'none, so that this method does not fit'}."
            )
        default = method_options(method)[option].default
        if given is None and default not in fine:
            smaller = [n for n in fine if n <= default]
            if not smaller:
                raise AdapterError(
                    f"peft_method {method} needs layers whose sizes {step} divides, but they are "
                    f"{', '.join(str(size) for size in sorted(set(sizes)))}. Use another method."
                )
            fitted[option] = smaller[-1]
            notices.append(
                f"{option} is {smaller[-1]}, since PEFT's default of {default} does not divide the sizes of the layers."
            )
    return fitted, notices


def _sizes(module: nn.Module, side: str) -> list[int]:
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
    elif isinstance(module, nn.Linear):
        inputs, outputs = module.in_features, module.out_features
    else:
        return []
    return {"in": [inputs], "out": [outputs], "both": [inputs, outputs]}[side]


def _feedforward(model: PreTrainedModel, given: Any, targets: Sequence[str]) -> str | list[str]:
    """Name the targets whose inputs, not outputs, (IA)³ scales: the feed-forward layers that lead back."""
    if given is None:
        sizes = {name: _sizes(model.get_submodule(name), "both") for name in targets}
        return as_pattern(model, [name for name, size in sizes.items() if size and size[0] > size[1]])
    names = given if isinstance(given, list) else [given]
    found = resolve_targets(model, PEFTArguments(lora_target_modules=names), without=(), among=targets)
    return as_pattern(model, found)


def _token_options(
    model: PreTrainedModel, options: Mapping[str, Any], token_rows: Mapping[str, Sequence[int]] | None
) -> dict[str, Any]:
    """Say which rows of which embeddings are trained: those named, and those of new tokens."""
    embeddings = model.get_input_embeddings()
    names = list(token_rows or {}) or [name for name, module in model.named_modules() if module is embeddings]
    ids = {i for rows in (token_rows or {}).values() for i in rows} | set(options.get("token_indices") or [])
    rows = embeddings.weight.shape[0]
    wrong = sorted(i for i in ids if not 0 <= i < rows)
    if wrong or not ids:
        said = (
            f"token_indices holds {wrong}, but the ids of this vocabulary are 0 to {rows - 1}"
            if wrong
            else ("no token is named: add tokens by add_tokens, or give token_indices")
        )
        raise AdapterError(f"peft_method trainable_tokens: {said}.")
    return {"target_modules": names, "token_indices": sorted(ids)}
