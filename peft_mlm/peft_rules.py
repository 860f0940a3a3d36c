"""The rules for the adapter: which method, which of its options, on which base; before anything heavy is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from peft_mlm.argument_types import show
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError
from peft_mlm.method_options import convert_options, method_options
from peft_mlm.methods import METHODS, VARIANTS, Base, usable_methods

# Arguments of ours that are options of LoRA's, by PEFT's names. Other methods take them where they have such an option.
LORA_FLAGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
LORA_OPTIMISERS = ("loraplus_lr_ratio", "use_lorafa")
# Arguments of ours that say for every method what it changes.
TARGET_FLAGS = {
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "modules_to_save": "modules_to_save",
}
# Options that are set here, or that mean nothing for masked language models, and what to give instead.
OWN_OPTIONS = {
    "peft_type": "give peft_method",
    "task_type": "PEFT has no task type for masked language models; leave it out",
    "inference_mode": "train trains, the other commands do not; leave it out",
    "base_model_name_or_path": "give model_name_or_path",
    "revision": "give model_revision",
    "auto_mapping": "PEFT fills it in; leave it out",
    "peft_version": "PEFT fills it in; leave it out",
    "trainable_token_indices": "give add_tokens or add_special_tokens, whose rows are trained by themselves",
    "ensure_weight_tying": "ties are kept by themselves; leave it out",
    "layers_pattern": "layers are found by their numbers in layers_to_transform; leave it out",
    "fan_in_fan_out": "it is found by looking at the layers; leave it out",
    "loftq_config": "the base stays what it is, so that there is one step of LoftQ, of the base's bits; leave it out",
    "runtime_config": "it has no effect on what is trained; leave it out",
    "megatron_core": "transformers' masked language models have no layers of Megatron's; leave it out",
}
# Options that a method has in PEFT but does not use.
UNUSED = {("adalora", "r"): "init_r and target_r"}


def settle_method(values: Mapping[str, Any], given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Check the method, its options and the base against the tables, and bring the options into one form.

    With LoRA, what is an argument of its own (such as lora_r) is moved out of peft_config; with any other method such
    arguments are moved into it. What says which layers are changed always stands in the arguments.

    Args:
        values: All values by name, defaults included.
        given: Names that the user gave a value.

    Returns:
        Arguments whose values change, and one sentence per fault.
    """
    asked = values.get("peft_method")
    if asked is None and not values["use_lora"]:
        return {}, []
    method = "lora" if asked is None else _as_key(asked)
    if method not in METHODS:
        return {}, [_unknown_method(str(asked))]
    changes: dict[str, Any] = {} if asked is None else {"peft_method": method}
    if values["use_lora"] and method != "lora":
        return changes, [f"use_lora and peft_method {method} are both given: leave one of the two out."]
    if METHODS[method].refused:
        return changes, why_refused(method, {}, base_kind(values))
    options, faults = _own_options(method, values.get("peft_config") or {})
    if method == "lora":
        names = {option: flag for flag, option in (LORA_FLAGS | TARGET_FLAGS).items()}
    else:
        names = {option: flag for flag, option in TARGET_FLAGS.items()}
        faults += take_flags(method, values, given, options)
    for option, flag in names.items():
        if option in options:
            changes[flag] = _as_flag(flag, options.pop(option))
            if flag in given and values[flag] != changes[flag]:
                faults.append(f"{flag} and peft_config say different things about {option}: leave one of them out.")
    changes["peft_config"] = options or None
    chosen = (
        {option: {**values, **changes}.get(flag) for flag, option in LORA_FLAGS.items()} if method == "lora" else {}
    )
    chosen |= {name: values.get(name) for name in LORA_OPTIMISERS} | options
    faults += why_refused(method, chosen, base_kind(values)) + _check_needs(method, {**values, **changes}, given)
    return changes, faults


def check_shape(given: Collection[str], peft_names: Collection[str], *, wanted: bool) -> list[str]:
    """Check that the options of an adapter are given where there is an adapter to shape.

    Args:
        given: Names that the user gave a value.
        peft_names: Names of the arguments of the adapter.
        wanted: Whether a new adapter is asked for.

    Returns:
        One sentence per fault.
    """
    asks = ["use_lora", "adapter_name_or_path"]
    asks += ["peft_method"] if wanted else []
    asks += ["base_dropout"] if "adapter_name_or_path" in given else []
    shape = [name for name in peft_names if name in given and name not in asks]
    if "adapter_name_or_path" in given and "peft_method" in given:
        shape = ["peft_method", *(name for name in shape if name != "peft_method")]
    if not shape:
        return []
    names = f"{', '.join(shape)} {'is' if len(shape) == 1 else 'are'} given"
    them = "it" if len(shape) == 1 else "them"
    if "adapter_name_or_path" in given:
        return [
            f"{names} together with adapter_name_or_path: the adapter brings its own shape. Leave {them} out, or start "
            "a new adapter without adapter_name_or_path."
        ]
    if not wanted:
        asked = "use_lora is false" if "use_lora" in given else "no adapter is asked for"
        return [f"{names}, but {asked}: add --use_lora (use_lora: true), or leave {them} out to train the whole model."]
    return []


def method_name(arguments: PEFTArguments) -> str:
    """Name the method of a new adapter.

    Args:
        arguments: The options of the adapter.

    Returns:
        A key of `METHODS`; LoRA's if no method is named.

    Raises:
        AdapterError: There is no such method.
    """
    name = _as_key(arguments.peft_method or "lora")
    if name not in METHODS:
        raise AdapterError(_unknown_method(str(arguments.peft_method)))
    return name


def base_kind(values: Mapping[str, Any]) -> Base:
    """Say what kind of base is asked for.

    Args:
        values: `load_in_8bit`, `load_in_4bit`, `bnb_4bit_quant_type`; all may be missing.

    Returns:
        The kind; a checkpoint that is stored in few bits is only seen when it is loaded.
    """
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return "fp4" if values.get("bnb_4bit_quant_type") == "fp4" else "nf4"
    return "float"


def active_variants(method: str, options: Mapping[str, Any]) -> list[str]:
    """Find the variants that some options ask for.

    Args:
        method: Name of the method.
        options: Its options by PEFT's names, and our arguments of LoRA's optimisers.

    Returns:
        Names of rows of `VARIANTS`.
    """

    def asks(value: Any, wanted: tuple[Any, ...]) -> bool:
        if not wanted:
            return value is not None and value is not False and value != []
        patterns = [str(item).partition("*") for item in wanted]
        return any(
            str(value) == head if not star else str(value).startswith(head) and str(value)[len(head) :].isdigit()
            for head, star, _ in patterns
        )

    return [
        name
        for name, row in VARIANTS.items()
        if row.method == method and row.option in options and asks(options[row.option], row.values)
    ]


def why_refused(method: str, options: Mapping[str, Any], base: Base) -> list[str]:
    """Say why a method, or a variant of it, is not trained on a base.

    Args:
        method: Name of the method, a key of `METHODS`.
        options: Its options by PEFT's names, and our arguments of LoRA's optimisers.
        base: The kind of base.

    Returns:
        One sentence per reason; empty where nothing is wrong.
    """
    row = METHODS[method]
    on = {"float": "a float base", "int8": "a base in 8 bits"}.get(base, f"a base in 4 bits ({base})")
    if row.refused:
        return [
            f"peft_method {method} cannot be used. {row.refused} Methods that can: {', '.join(usable_methods(base))}."
        ]
    if base in row.bases:
        return [
            f"peft_method {method} cannot be used on {on}: {row.bases[base]}. Use a float base, or one of: "
            f"{', '.join(usable_methods(base))}."
        ]
    reasons = []
    for name in active_variants(method, options):
        variant = VARIANTS[name]
        value = f" {str(options[variant.option]).lower()}" if variant.values else ""
        if variant.refused:
            reasons.append(f"{variant.option}{value} ({variant.title}) cannot be used. {variant.refused}")
        elif base in variant.bases:
            fine = [kind for kind in ("float", "nf4", "int8") if kind not in variant.bases]
            remedy = "a float base" if "float" in fine else "load_in_4bit"
            reasons.append(
                f"{variant.option}{value} ({variant.title}) cannot be used on {on}: {variant.bases[base]}. Leave it "
                f"out, or use {remedy}."
            )
    if method == "lora" and not reasons:
        reasons += _unknown_start(options.get("init_lora_weights", True))
    return reasons


def why_not_base(method: str, options: Mapping[str, Any]) -> str:
    """Say why a model is not the base before its adapter is trained.

    Args:
        method: Name of the method.
        options: Its options by PEFT's names.

    Returns:
        A sentence; empty where the model starts as the base.
    """
    row = METHODS[method]
    title, reason = row.title, ""
    given = options.get(row.start_option)
    if row.start:
        reason = row.start if given not in row.same_start else ""
    elif row.start_option in options and given not in row.same_start:
        reason = f"{row.start_option} is {str(given).lower()}"
    for name in active_variants(method, options):
        if VARIANTS[name].start:
            title, reason = VARIANTS[name].title, VARIANTS[name].start
    return f"{title} does not start as the base: {reason}." if reason else ""


def _as_key(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _unknown_method(asked: str) -> str:
    word = _as_key(asked)
    if word in VARIANTS and not VARIANTS[word].refused:
        row = VARIANTS[word]
        value = f" {str(row.values[0]).lower()}" if row.values else ""
        where = (
            f"--{row.option}{value}" if row.option in (*LORA_FLAGS, *LORA_OPTIMISERS) else f"peft_config {row.option}"
        )
        return f"peft_method {show(asked)}: it is a variant of {row.method}; give peft_method {row.method} and {where}."
    titles = {row.title.lower(): name for name, row in METHODS.items()}
    near = difflib.get_close_matches(word, [*METHODS, *titles], n=3, cutoff=0.6)
    names = dict.fromkeys(titles.get(name, name) for name in near)
    hint = f" Nearest: {', '.join(names)}." if names else ""
    return f"peft_method {show(asked)}: there is no such method.{hint} Methods: {', '.join(usable_methods())}."


def _unknown_start(start: Any) -> list[str]:
    if start in (True, "true") or active_variants("lora", {"init_lora_weights": start}):
        return []
    words = [str(word).lower() for row in VARIANTS.values() if row.option == "init_lora_weights" for word in row.values]
    return [
        f"init_lora_weights is {show(start)}: it must be one of true, {', '.join(dict.fromkeys(words))} (*: digits)."
    ]


def _own_options(method: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert the options in peft_config, and refuse those that are not the user's to set."""
    faults = [f"peft_config: {name} is not set there: {OWN_OPTIONS[name]}." for name in given if name in OWN_OPTIONS]
    faults += [
        f"peft_config: {method} does not use {name}: give {UNUSED[method, name]}."
        for name in given
        if (method, name) in UNUSED
    ]
    mine = {name: value for name, value in given.items() if name not in OWN_OPTIONS and (method, name) not in UNUSED}
    options, wrong = convert_options(method, mine)
    return options, faults + wrong


def take_flags(
    method: str,
    values: Mapping[str, Any],
    given: Collection[str],
    options: dict[str, Any],
) -> list[str]:
    """Move the arguments of LoRA's that another method has too into its options; refuse the others.

    Args:
        method: Name of the method; not LoRA.
        values: Our arguments by name.
        given: Names of those that were given.
        options: Options of the method by PEFT's names; they are added to.

    Returns:
        One sentence per fault.
    """
    faults = []
    known = method_options(method)
    for flag, option in LORA_FLAGS.items():
        if flag not in given:
            continue
        if option not in known or (method, option) in UNUSED:
            own = UNUSED.get((method, option)) or ", ".join(
                name for name in known if name not in OWN_OPTIONS and name not in TARGET_FLAGS.values()
            )
            faults.append(
                f"{flag} is given, but peft_method {method} has no such option: leave it out, or give its own by "
                f"peft_config: {own}."
            )
            continue
        if option in options:
            faults.append(f"{flag} and {option} in peft_config are both given: leave one of them out.")
            continue
        taken, wrong = convert_options(method, {option: values[flag]})
        options |= taken
        faults += [f"{flag}: {text}" for text in wrong]
    faults += [
        f"{flag} is given, but it is for LoRA's matrices, which peft_method {method} does not have: leave it out."
        for flag in LORA_OPTIMISERS
        if flag in given
    ]
    faults += [
        f"{flag} is given, but peft_method {method} has no such option: leave it out."
        for flag, option in TARGET_FLAGS.items()
        if flag in given
        and (METHODS[method].targets == "tokens" or (flag == "modules_to_save" and option not in known))
    ]
    return faults


def _as_flag(flag: str, value: Any) -> Any:
    """Give an option of PEFT's the type of our argument."""
    if flag in ("lora_target_modules", "lora_exclude_modules", "layers_to_transform", "modules_to_save"):
        return value if isinstance(value, list) or value is None else [value]
    return str(value).lower() if flag == "init_lora_weights" else value


def _check_needs(method: str, values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    sources = ("add_tokens", "add_special_tokens", "tokenizer_name")
    indices = (values.get("peft_config") or {}).get("token_indices")
    if METHODS[method].targets == "tokens" and not indices and not any(name in given for name in sources):
        return [
            f"peft_method {method} trains rows of the embeddings, but none is named: add tokens by add_tokens, or give "
            "their ids: --peft_config '{\"token_indices\": [5, 6]}'."
        ]
    return []
