"""The model card of a shipped adapter or model: what it is, what was measured, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_mlm.arguments import DataTrainingArguments

# Stands in the card's lines of code for where the files are; an upload puts the repository's name there.
FOLDER_IN_CARD = "THIS_FOLDER"


def render_card(facts: Mapping[str, Any]) -> str:
    """Write the card (README.md) of an adapter, or of a model trained in full.

    Args:
        facts: `kind` ("adapter" or "model"), `base_model` (a hub name, or the last part of a local path, or None),
            `base_revision` (its commit on the hub, or None), `base_on_hub` (bool), `method` (a text), `peft_type`
            (its name), `trained_modules`,
            `trainable_parameters`, `total_parameters`, `data` (one line, or None where nothing is known of it),
            `dataset` (its name on the hub; None or absent otherwise), `rows`, `steps`, `max_seq_length`,
            `mlm_probability`, `base` and `adapted` (records with perplexity, accuracy, masked_tokens; or None),
            `max_abs_logit_diff` (of a merge; None or absent otherwise),
            `renamed` (whether the base's weights have other names than transformers looks for), `new_tokens` (how many
            were added), `growth_code` (lines of plain transformers that add their rows to a fresh `base`), `untied`
            (whether the decoder was given a matrix of its own), `quantisation` (of the base, or None; as
            `describe_quantisation` gives it), `base_recipe` (the arguments that shape the base), `versions`.

    Returns:
        Markdown with the hub's metadata on top; no local path and no token in it.
    """
    return "\n".join([*_metadata(facts), "", *_body(facts), *_figures(facts), *_use(facts), *_made_with(facts)]) + "\n"


def name_data(data: DataTrainingArguments) -> str:
    """Name the data of a run without a local path.

    Args:
        data: Its arguments.

    Returns:
        The data set's name and config, or the names of the files.
    """
    if data.dataset_name is None:
        return ", ".join(Path(file).name for file in data.train_file or [])
    name = Path(data.dataset_name).name if Path(data.dataset_name).exists() else data.dataset_name
    return f"{name} {data.dataset_config_name}" if data.dataset_config_name else name


def _metadata(facts: Mapping[str, Any]) -> list[str]:
    lines = ["---", f"library_name: {'peft' if facts['kind'] == 'adapter' else 'transformers'}"]
    if facts["base_on_hub"]:
        lines.append(f"base_model: {facts['base_model']}")
    if facts.get("dataset"):
        lines += ["datasets:", f"- {facts['dataset']}"]
    tags = ["masked-lm", "peft-mlm", *([facts["peft_type"]] if facts["kind"] == "adapter" else [])]
    return [*lines, "pipeline_tag: fill-mask", "tags:", *(f"- {tag}" for tag in tags), "---"]


def _body(facts: Mapping[str, Any]) -> list[str]:
    base = facts["base_model"]
    what = f"# {facts['kind'].capitalize()} for masked language modelling"
    about = f"Base model: {base}." if base else "Trained from scratch."
    share = facts["trainable_parameters"] / max(1, facts["total_parameters"])
    lines = [
        what,
        "",
        f"{about} Method: {facts['method']}; {facts['trainable_parameters']:,} trained parameters "
        f"({share:.2%} of {facts['total_parameters']:,}).",
    ]
    if facts["quantisation"]:
        bits, kind = facts["quantisation"]["bits"], facts["quantisation"]["kind"]
        lines += [
            "",
            f"Trained on the base in {bits} bits ({kind}, bitsandbytes); it belongs on the base as quantised so.",
        ]
    if facts["trained_modules"]:
        lines += ["", f"Trained in full and shipped: {', '.join(facts['trained_modules'])}."]
    if facts.get("max_abs_logit_diff") is not None:
        lines += [
            "",
            "Merged into one plain transformers model, loaded afresh and compared with base + adapter: the largest "
            f"difference of a logit is {facts['max_abs_logit_diff']:.1e}.",
        ]
    if facts["data"] is None:
        return lines
    lines += [
        "",
        f"Data: {facts['data']}; {facts['rows']:,} rows of at most {facts['max_seq_length']} tokens, "
        f"{facts['mlm_probability']:.0%} masked; {facts['steps']:,} steps.",
    ]
    return lines


def _figures(facts: Mapping[str, Any]) -> list[str]:
    base, adapted = facts["base"], facts["adapted"]
    if adapted is None:
        return []
    rows = [("base", base)] if base is not None else []
    lines = ["", "| held-out text | perplexity | masked accuracy |", "| --- | --- | --- |"]
    for name, scores in [*rows, ("this " + facts["kind"], adapted)]:
        perplexity, accuracy = scores["perplexity"], scores["accuracy"]  # null in a record: no number
        told = ["-" if perplexity is None else f"{perplexity:.4g}", "-" if accuracy is None else f"{accuracy:.4f}"]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return [*lines, "", f"Over {adapted['masked_tokens']:,} masked tokens, the same ones for each line."]


def _use(facts: Mapping[str, Any]) -> list[str]:
    base, lines = facts["base_model"], ["", "## Use", ""]
    pinned = f', revision="{facts["base_revision"]}"' if facts["base_revision"] else ""
    if facts["kind"] == "model":
        code = ["from transformers import pipeline", "", 'fill = pipeline("fill-mask", model="THIS_FOLDER")']
    elif facts["renamed"] or (facts["new_tokens"] and facts["quantisation"]):
        why = "PEFT alone leaves the decoder's bias out where tokens were added, and cannot merge into fewer bits."
        if facts["renamed"]:
            why = "The base's weights have names that transformers does not know: alone it would start them at random."
        lines += [why, ""]
        given = "" if facts["base_on_hub"] else f', base="{base}"'
        code = ["import peft_mlm", "", f'model = peft_mlm.load("THIS_FOLDER"{given}).model']
    elif facts["new_tokens"]:
        lines += [
            f"It adds tokens ({facts['new_tokens']}) and brings its tokenizer. Merge it as below: PEFT leaves the "
            "decoder's bias out as long as it is not merged.",
            "",
        ]
        growth = facts["growth_code"]
        code = [
            *(["import torch"] if any("torch." in line for line in growth) else []),
            "from peft import PeftModel",
            "from transformers import AutoModelForMaskedLM",
            "",
            f'base = AutoModelForMaskedLM.from_pretrained("{base}"{pinned})',
            *growth,
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER").merge_and_unload().eval()',
        ]
        if facts["base_on_hub"] and len(growth) < 2:
            code = [
                "from peft import AutoPeftModel",
                "",
                'model = AutoPeftModel.from_pretrained("THIS_FOLDER").merge_and_unload().eval()',
            ]
    else:
        quantisation = _quantisation_config(facts["quantisation"], facts["base_recipe"])
        quantised = ', dtype="float32", quantization_config=quantization' if quantisation else ""
        code = [
            "from peft import PeftModel",
            f"from transformers import AutoModelForMaskedLM{', BitsAndBytesConfig' if quantisation else ''}",
            "",
            *quantisation,
            f'base = AutoModelForMaskedLM.from_pretrained("{base}"{pinned}{quantised})',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()',
        ]
    lines += ["```python", *code, "```", ""]
    if facts["kind"] == "adapter" and base and not facts["base_on_hub"]:
        lines += [f'The base was taken from a folder: put its place instead of "{base}", and give it by `--base`.', ""]
    if facts["kind"] == "adapter" and facts["untied"]:
        lines += [
            "The decoder was given a matrix of its own (`--untie_embeddings`). PEFT's `merge_and_unload` on the tied "
            "base would change both ends, or lose the decoder's bias: merge as below.",
            "",
        ]
    if facts["kind"] == "model":
        lines += ['Or `peft-mlm fill-mask THIS_FOLDER "..."`.', ""]
    if facts["kind"] == "adapter":
        lines += ['Or `peft-mlm fill-mask THIS_FOLDER "..."`, `peft-mlm merge THIS_FOLDER --output_dir merged`.', ""]
    return lines


def _quantisation_config(quantisation: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> list[str]:
    """Say in transformers' words how the base was quantised; nothing where its checkpoint says so itself."""
    if quantisation is None or not {"load_in_4bit", "load_in_8bit"} & recipe.keys():
        return []
    options = {name: value for name, value in recipe.items() if name.startswith(("load_in_", "bnb_4bit_", "llm_int8_"))}
    if quantisation["bits"] == 4:
        options["bnb_4bit_quant_type"] = quantisation["kind"]
        options["bnb_4bit_compute_dtype"] = quantisation["compute_dtype"]
    options["llm_int8_skip_modules"] = list(quantisation["kept_float"])
    lines = [
        f"    {name}={json.dumps(value) if not isinstance(value, bool) else value}," for name, value in options.items()
    ]
    return ["quantization = BitsAndBytesConfig(", *lines, ")"]


def _made_with(facts: Mapping[str, Any]) -> list[str]:
    shown = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return [f"Made with {shown}."]
