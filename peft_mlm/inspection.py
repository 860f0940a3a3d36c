"""What an adapter or a model is, told from its files alone: no library that computes is loaded, no pickle is opened."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_mlm.adapter_norms import LayerNorms, layer_norms, split_name
from peft_mlm.checksums import CHECKSUMS
from peft_mlm.console import few_names
from peft_mlm.errors import DamagedFileError, PeftMlmError
from peft_mlm.fingerprint import read_fingerprint
from peft_mlm.leaks import find_leaks
from peft_mlm.method_options import method_options
from peft_mlm.methods import METHODS
from peft_mlm.run_folder import RunFolder, folder_bytes
from peft_mlm.safetensors_header import Header, count_no_numbers, read_header
from peft_mlm.shipped import PICKLES, Shipped, files_in, is_pickle

# Values are read up to this many bytes of weights, which takes less than a second; `verify` reads all.
READ_BYTES = 256 * 2**20
LARGEST_JSON, LARGEST_CARD = 20_000_000, 1_000_000
# Keys that PEFT writes beside the options of a method.
ALWAYS = (
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
)
OF_TRAINING = ("tokenizer", "masking", "data")


def inspect_shipped(shipped: Shipped) -> dict[str, Any]:
    """Describe what lies in a folder.

    Args:
        shipped: What lies there.

    Returns:
        `path`, `place`, `kind`, `method`, `rank`, `scaling`, `targets`, `parameters`, `tensors`, `dtypes`,
        `weight_bytes`, `folder_bytes`, `layers`, `base`, `training`, `licence`, `new_tokens`, `trained_modules`,
        `warnings`; None or empty where the files do not tell.

    Raises:
        DamagedFileError: The configuration or the weights are damaged.
    """
    config = read_table(shipped.config)
    headers = [read_header(file) for file in shipped.weights()]
    if not headers:
        raise DamagedFileError(
            f"{shipped.given} holds no weights in safetensors{_pickle_remark(shipped.folder)}. Give an adapter or a "
            "model that was saved as safetensors."
        )
    weight_bytes = sum(header.path.stat().st_size for header in headers)
    dtypes: Counter[str] = Counter()
    for header in headers:
        for tensor in header.tensors.values():
            dtypes[tensor.dtype] += tensor.count
    told = _adapter(config, headers[0], weight_bytes) if shipped.kind == "adapter" else _model(shipped, config)
    record = {
        "path": shipped.given,
        "place": shipped.place,
        "kind": shipped.kind,
        **told,
        "parameters": sum(header.count for header in headers),
        "tensors": sum(len(header.tensors) for header in headers),
        "dtypes": dict(dtypes),
        "weight_bytes": weight_bytes,
        "folder_bytes": folder_bytes(shipped.folder),
        "training": _training(shipped),
        "licence": _licence(shipped.folder),
    }
    return {**record, "warnings": _warnings(shipped, config, headers, record)}


def read_table(file: Path) -> dict[str, Any]:
    """Read a table of JSON that a stranger may have written.

    Args:
        file: The file.

    Returns:
        Its content.

    Raises:
        DamagedFileError: It is missing, too long, or no table.
    """
    try:
        if not file.is_file():
            raise DamagedFileError(f"{file} is missing.")
        if file.stat().st_size > LARGEST_JSON:
            raise DamagedFileError(f"{file} has more than {LARGEST_JSON:,} bytes: it is no configuration.")
        record = json.loads(file.read_text(encoding="utf-8"))
    except DamagedFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{file} is damaged: it is no JSON ({type(error).__name__}).") from error
    if not isinstance(record, dict):
        raise DamagedFileError(f"{file} is damaged: it is a {type(record).__name__}, not a table.")
    return record


def _adapter(config: Mapping[str, Any], header: Header, weight_bytes: int) -> dict[str, Any]:
    layers = layer_norms(header, config) if weight_bytes <= READ_BYTES and _readable(header) else []
    changed = [layer for layer in layers if layer.rank is not None]
    names = [layer.name for layer in changed] or sorted({split_name(name)[0] for name in header.tensors} - {""})
    method = str(config.get("peft_type", "")).lower()
    trained = config.get("modules_to_save") or []
    whole = _whole_modules(names, trained if isinstance(trained, list) else [])
    targets = [name for name in names if name not in whole]
    ranks = sorted({layer.rank for layer in changed if layer.rank is not None})
    return {
        "method": method or None,
        "title": _title(method, config),
        "rank": _one_or_all(ranks) if ranks else config.get("r"),
        "alpha": config.get("lora_alpha"),
        "scaling": _one_or_all(sorted({layer.scaling for layer in changed if layer.scaling is not None})),
        "targets": dict(Counter(_kind_of_layer(name) for name in targets)),
        "target_layers": len(targets),
        "layers": [_describe(layer) for layer in layers],
        "base": _base(config, header.path.parent),
        "new_tokens": _new_tokens(config),
        "trained_modules": sorted(trained)
        if isinstance(trained, list) and all(isinstance(m, str) for m in trained)
        else [],
        "peft_version": config.get("peft_version"),
    }


def _model(shipped: Shipped, config: Mapping[str, Any]) -> dict[str, Any]:
    architectures = config.get("architectures")
    report = _optional(shipped.folder / "merge_report.json")
    return {
        "method": "merged" if report else None,
        "title": "merged from an adapter and its base" if report else "a whole model",
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": config.get("model_type"),
        "vocab_size": config.get("vocab_size"),
        "layers": [],
        "base": None,
        "merge": report,
        "new_tokens": 0,
        "trained_modules": [],
    }


def _describe(layer: LayerNorms) -> dict[str, Any]:
    return {"name": layer.name, "rank": layer.rank, "scaling": layer.scaling, "norms": dict(layer.norms),
            "delta_norm": layer.delta_norm}  # fmt: skip


def _title(method: str, config: Mapping[str, Any]) -> str | None:
    if method not in METHODS:
        return None
    variants = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if config.get(key)]
    return METHODS[method].title + (f" ({', '.join(variants)})" if variants else "")


def _base(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    made_for = config.get("auto_mapping")
    try:
        fingerprint = read_fingerprint(folder)
    except PeftMlmError:
        fingerprint = None
    recipe, facts = _optional(folder / "base_recipe.json"), _optional(folder / "training_facts.json") or {}
    return {
        "name": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "architecture": fingerprint["architecture"] if fingerprint else (made_for or {}).get("base_model_class")
        if isinstance(made_for, dict | None) else None,
        "vocab_size": fingerprint["vocab_size"] if fingerprint else None,
        "fingerprint_tensors": len(fingerprint["weights"]) if fingerprint else 0,
        "recipe": recipe or {},
        **{name: facts[name] if isinstance(facts.get(name), dict) else None for name in OF_TRAINING},
    }  # fmt: skip


def _new_tokens(config: Mapping[str, Any]) -> int:
    indices = config.get("trainable_token_indices") or config.get("token_indices") or []
    parts = list(indices.values()) if isinstance(indices, dict) else [indices]
    return max((len(part) for part in parts if isinstance(part, list)), default=0)


def _training(shipped: Shipped) -> dict[str, Any] | None:
    """Sum up the run that the files belong to."""
    state = _optional(shipped.folder / "trainer_state.json") or {}
    if shipped.run is None:
        beside = (_optional(shipped.folder / "training_facts.json") or {}).get("figures")
        figures = {name: beside.get(name) for name in ("steps", "base", "adapted")} if isinstance(beside, dict) else {}
        return {**figures, **({"step": state.get("global_step")} if state else {})} or None
    run = RunFolder(shipped.run)
    summary, facts = _optional(run.summary) or {}, _optional(run.dataset) or {}
    train = facts.get("train") if isinstance(facts.get("train"), dict) else {}
    told = {name: summary.get(name) for name in ("status", "steps", "epochs", "train_seconds", "base", "adapted")}
    rows = {name: (train or {}).get(name) for name in ("texts", "rows_used", "tokens", "max_seq_length")}
    return {**told, **rows, **({"step": state.get("global_step")} if state else {})}


def _licence(folder: Path) -> str | None:
    """Find the licence: in the metadata of the card, or a file of that name."""
    import yaml

    card = folder / "README.md"
    if card.is_file() and card.stat().st_size <= LARGEST_CARD:
        _, mark, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
        front, end, _ = rest.partition("\n---")
        try:
            record = yaml.safe_load(front) if mark and end else None
        except (yaml.YAMLError, RecursionError, ValueError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("license"), str):
            return record["license"]
    return next(
        (file.name for file in files_in(folder) if file.stem.upper() in ("LICENSE", "LICENCE", "COPYING")), None
    )


def _warnings(
    shipped: Shipped, config: Mapping[str, Any], headers: list[Header], record: Mapping[str, Any]
) -> list[str]:
    told = []
    pickles = [file.relative_to(shipped.folder).as_posix() for file in files_in(shipped.folder) if is_pickle(file)]
    if pickles:
        told.append(f"pickles, which can run code when they are opened and were not read: {few_names(pickles)}")
    told += [str(leak) for leak in find_leaks(shipped.folder)]
    if config.get("auto_map") or any(file.suffix == ".py" for file in files_in(shipped.folder)):
        told.append("it brings code of its own, which is run only with --trust_remote_code")
    told += _config_warnings(config, record) if shipped.kind == "adapter" else []
    told += _value_warnings(headers, record)
    training = record["training"] or {}
    if training.get("status") not in (None, "finished"):
        told.append(f"the run it belongs to is {training['status']}, not finished")
    if shipped.place != "checkpoint" and not (shipped.folder / CHECKSUMS).is_file():
        told.append(f"there is no {CHECKSUMS}: whether a file was changed cannot be told")
    return told


def _config_warnings(config: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    method, told = str(record["method"]), []
    if method not in METHODS:
        return [f"peft_type is {ascii(config.get('peft_type'))[:60]}, which is no method of PEFT"]
    known = {*method_options(method), *ALWAYS}
    unknown = [ascii(key)[1:-1][:60] for key in config if key not in known]
    if unknown:
        told.append(f"adapter_config.json has keys that the installed PEFT does not know: {few_names(unknown)}")
    if not record["base"]["name"]:
        told.append("adapter_config.json does not name the base")
    if not record["base"]["fingerprint_tensors"]:
        told.append("there is no fingerprint of the base: another base of the same shapes is not found out")
    return told


def _value_warnings(headers: list[Header], record: Mapping[str, Any]) -> list[str]:
    if record["weight_bytes"] > READ_BYTES:
        return [f"values were not read (more than {READ_BYTES // 2**20} MB): peft-mlm verify reads them all"]
    bad = sum(count_no_numbers(header, name) for header in headers for name in header.tensors)
    if bad:
        return [f"{bad:,} values are NaN or infinite"]
    if record["kind"] == "adapter" and record["layers"]:
        deltas = [layer["delta_norm"] for layer in record["layers"] if layer["delta_norm"] is not None]
        others = [norm for layer in record["layers"] if layer["delta_norm"] is None for norm in layer["norms"].values()]
        if not any(deltas) and not any(others):
            return ["every change it makes is zero: it leaves the base as it is"]
        if unknown := [layer["name"] for layer in record["layers"] if layer["rank"] and layer["scaling"] is None]:
            return [f"the scaling of {len(unknown)} layers is not known ({few_names(unknown)}): see alpha_pattern"]
    return []


def _whole_modules(names: list[str], trained: list[Any]) -> set[str]:
    """Which names lie in modules that are trained and shipped whole."""
    return {name for name in names for part in trained if f".{part}." in f".{name}."}


def _readable(header: Header) -> bool:
    return all(tensor.dtype in ("F16", "BF16", "F32", "F64") for tensor in header.tensors.values())


def _kind_of_layer(name: str) -> str:
    """The last parts of a name behind the number of its layer, or its last one."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(parts) else name


def _one_or_all(values: list[Any]) -> Any:
    return None if not values else values[0] if len(values) == 1 else values


def _optional(file: Path) -> dict[str, Any] | None:
    try:
        return read_table(file) if file.is_file() else None
    except DamagedFileError:
        return None


def _pickle_remark(folder: Path) -> str:
    found = [file.name for file in files_in(folder) if file.suffix.lower() in PICKLES]
    return f" ({found[0]} is a pickle, which can run code when it is opened)" if found else ""


def largest_changes(record: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Pick the layers that are changed most.

    Args:
        record: From `inspect_shipped`.
        count: How many.

    Returns:
        Their records, the largest change first; layers whose change is not known are left out.
    """
    known = [
        layer for layer in record["layers"] if layer["delta_norm"] is not None and math.isfinite(layer["delta_norm"])
    ]
    return sorted(known, key=lambda layer: -layer["delta_norm"])[:count]
