"""Hub name or local files -> text: one column, a training and a validation split, and the facts about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from peft_mlm.arguments import DataTrainingArguments
from peft_mlm.errors import DataError
from peft_mlm.text_files import choose_column, listing, read_text_files
from peft_mlm.text_formats import Column, Kind

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# A data set's test split is never evaluated on unasked.
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class TextData:
    """Text to train on, to evaluate on, or both.

    Attributes:
        splits: "train" and/or "validation", in this order; each with one column "text" (strings, none of them blank).
        facts: Per split: `source` (files, or data set, config, split, revision and commit), `text_column` (its name in
            the source), `texts`, `empty` (blank texts left out), `fingerprint` (hash of the texts in their order). For
            validation also `origin` ("given", or how it was split off) and `also_in_train` (validation texts that
            occur in the training text too; None if that was not loaded).
    """

    splits: DatasetDict
    facts: dict[str, dict[str, Any]]


class _Part(NamedTuple):
    """The texts of one split, their 64-bit hashes in the same order, and their facts."""

    dataset: Dataset
    digests: npt.NDArray[np.uint64]
    facts: dict[str, Any]


def load_text(
    data: DataTrainingArguments,
    *,
    cache_dir: str | None = None,
    token: str | None = None,
    splits: Sequence[str] = ("train", "validation"),
) -> TextData:
    """Load text from the hub or from local files.

    Validation text is `validation_file`, else the data set's own validation split, else texts drawn at random from the
    training text. The draw is over different texts, so that no text is on both sides, and depends on the texts and the
    seed alone: not on their order, their files or the cache. When only "train" is asked for, nothing is split off.

    Args:
        data: Names the data set or the files, the text column, and the size and seed of the split.
        cache_dir: Where to keep what was downloaded or read; `datasets`' own cache if None.
        token: Hub token for a private data set; the one of `hf auth login` if None.
        splits: Which of "train" and "validation" to return.

    Returns:
        The splits and what is known about them.

    Raises:
        DataError: If there is no such file, data set, config or column, if a file cannot be read as what its name says,
            if there is no text in it, or too little to split.
    """
    if data.dataset_name and data.train_file:
        raise DataError(
            f"Both a data set ({data.dataset_name}) and training files ({', '.join(data.train_file)}) are given: leave "
            "out --dataset_name or --train_file."
        )
    if not 0 < data.validation_split_percentage < 100:
        raise DataError(
            f"validation_split_percentage is {data.validation_split_percentage:g}: it must be more than 0 and less "
            "than 100."
        )
    hub = None
    if data.dataset_name and ("train" in splits or not data.validation_file):
        hub = _load_hub(data, cache_dir, token)
    validation = _given_validation(data, hub, cache_dir) if "validation" in splits else None
    train = None
    if "train" in splits or validation is None:
        train = _training_text(data, hub, cache_dir)
    if validation is not None:
        known = None if train is None else int(np.isin(validation.digests, train.digests).sum())
        validation.facts.update(origin="given", also_in_train=known)
    elif train is not None and "validation" in splits:
        train, validation = _split_off(train, data.validation_split_percentage, data.validation_split_seed)
    return _text_data({"train": train, "validation": validation}, splits)


def _text_data(parts: dict[str, _Part | None], splits: Sequence[str]) -> TextData:
    from datasets import DatasetDict

    asked = {name: part for name, part in parts.items() if part is not None and name in splits}
    return TextData(
        splits=DatasetDict({name: part.dataset for name, part in asked.items()}),
        facts={name: part.facts for name, part in asked.items()},
    )


def _training_text(data: DataTrainingArguments, hub: _Hub | None, cache_dir: str | None) -> _Part:
    if hub is not None:
        if "train" not in hub.splits:
            raise DataError(
                f"The data set {hub.name} has no training split, only {listing(hub.splits)}: choose another one, or "
                "another config with --dataset_config_name."
            )
        return _hub_part(data, hub, "train")
    if data.train_file:
        return _file_part(data.train_file, data.text_column, cache_dir)
    raise DataError("No text to learn from is given: name files with --train_file or a data set with --dataset_name.")


def _given_validation(data: DataTrainingArguments, hub: _Hub | None, cache_dir: str | None) -> _Part | None:
    if data.validation_file:
        return _file_part(data.validation_file, data.text_column, cache_dir)
    if hub is not None:
        for name in _VALIDATION_NAMES:
            if name in hub.splits:
                return _hub_part(data, hub, name)
    return None


def _split_off(train: _Part, percentage: float, seed: int) -> tuple[_Part, _Part]:
    """Move the given share of the different texts, at least one and never all, from training to validation."""
    distinct = np.unique(train.digests)
    if len(distinct) < 2:
        raise DataError(
            f"The training text ({_source_text(train.facts)}) holds {len(train.digests)} text(s), {len(distinct)} of "
            "them different: that is too few to split some off for validation. Give more, or a --validation_file."
        )
    count = min(max(round(percentage / 100 * len(distinct)), 1), len(distinct) - 1)
    # Whatever the order of the texts, and if more are added later: each keeps its place in this ranking.
    ranks = [xxhash.xxh3_64_intdigest(digest.tobytes(), seed % 2**64) for digest in distinct.astype("<u8")]
    drawn = np.isin(train.digests, distinct[np.argsort(np.array(ranks, dtype=np.uint64))[:count]])
    kept, validation = (_subset(train, np.flatnonzero(mask)) for mask in (~drawn, drawn))
    origin = f"split off: {percentage:g} % at random, seed {seed}"
    validation.facts.update(empty=0, origin=origin, also_in_train=0)
    return kept, validation


def _subset(part: _Part, rows: npt.NDArray[np.int64]) -> _Part:
    digests = part.digests[rows]
    facts = {**part.facts, "texts": len(rows), "fingerprint": _fingerprint(digests)}
    return _Part(part.dataset.select(rows), digests, facts)


def _part(dataset: Dataset, source: dict[str, Any], column: str) -> _Part:
    """Leave out blank texts, and hash the others."""
    texts = chain.from_iterable(chunk.to_pylist() for chunk in dataset.data.column("text").chunks)
    digests = np.fromiter((_digest(text) for text in texts), dtype=np.uint64, count=len(dataset))
    rows = np.flatnonzero(digests)
    facts = {"source": source, "text_column": column, "texts": len(digests), "empty": len(digests) - len(rows)}
    part = _Part(dataset, digests, {**facts, "fingerprint": _fingerprint(digests)})
    if len(rows) == len(digests) > 0:
        return part
    if not len(rows):
        raise DataError(f"There is no text in {_source_text(facts)}, column {column}: choose another text.")
    return _subset(part, rows)


def _digest(text: str | None) -> int:
    """Hash a text to 64 bits; 0 stands for a blank one."""
    return (xxhash.xxh3_64_intdigest(text.encode()) or 1) if text and not text.isspace() else 0


def _fingerprint(digests: npt.NDArray[np.uint64]) -> str:
    return xxhash.xxh3_128_hexdigest(digests.astype("<u8").tobytes())


def _source_text(facts: dict[str, Any]) -> str:
    source = facts["source"]
    return listing(source["files"]) if "files" in source else f"{source['dataset']}, split {source['split']}"


def _file_part(patterns: Sequence[str], text_column: str | None, cache_dir: str | None) -> _Part:
    read = read_text_files(patterns, text_column, cache_dir)
    return _part(read.dataset, {"files": [str(file) for file in read.files]}, read.column)


class _Hub(NamedTuple):
    """All splits of a data set, its full name, and the commit they are from (None for a folder)."""

    splits: DatasetDict
    name: str
    commit: str | None


def _load_hub(data: DataTrainingArguments, cache_dir: str | None, token: str | None) -> _Hub:
    """Load a data set from the hub, or from a folder laid out like one."""
    from datasets import load_dataset

    name, config, revision = str(data.dataset_name), data.dataset_config_name, data.dataset_revision
    path = Path(name).expanduser()
    if path.is_file():
        raise DataError(f"{name} is a file, not a data set: give it as --train_file.")
    try:
        if path.is_dir():
            return _Hub(load_dataset(str(path), config, cache_dir=cache_dir), name, None)
        name, commit = _find_on_hub(name, revision, cache_dir, token)
        splits = load_dataset(name, config, revision=commit or revision, cache_dir=cache_dir, token=token)
    # Five libraries take part, each with errors of its own; what is not known is told in its own words.
    except Exception as error:
        raise DataError(_hub_fault(name, config, revision, token, error)) from error
    if commit is None:
        # The folder of a data set in the cache is named after its commit; whatever the revision, the newest is taken.
        commit = Path(next(iter(splits.values())).cache_files[0]["filename"]).parent.name
        if revision not in (None, "main", commit):
            raise DataError(
                f"Revision {revision} of the data set {name} cannot be looked up while the hub is switched off "
                f"(HF_HUB_OFFLINE); commit {commit} is in the cache. Switch the hub on, or ask for that commit with "
                "--dataset_revision."
            )
    return _Hub(splits, name, commit)


def _find_on_hub(name: str, revision: str | None, cache_dir: str | None, token: str | None) -> tuple[str, str | None]:
    """Give the full name and the commit of a data set; without the hub, no commit, and a name found in the cache.

    Old names without a namespace (`glue`) lead to new ones (`nyu-mll/glue`), which `load_dataset` wants.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        found = HfApi(token=token).dataset_info(name, revision=revision)
        return found.id, found.sha
    except OfflineModeIsEnabled:
        root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
        cached = [folder.name.replace("___", "/") for folder in root.glob(f"*___{name}")]
        return (cached[0] if len(cached) == 1 else name), None


def _hub_fault(name: str, config: str | None, revision: str | None, token: str | None, error: Exception) -> str:
    """Say in a sentence why a data set cannot be loaded, and what to do."""
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"The data set {name} is gated: ask for access on its page on the hub, and give --token."
    if isinstance(error, errors.RepositoryNotFoundError):
        reader = "with this token" if token else "without a token"
        return (
            f"The hub has no data set {name}, or it is private and cannot be read {reader}: mend --dataset_name, or "
            "give --token (or run `hf auth login`)."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The data set {name} has no revision {revision}: mend --dataset_revision, or leave it out."
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return "The hub refuses the token: give a valid --token, or leave it out and run `hf auth login`."
    if isinstance(error, ConnectionError):
        return (
            f"The data set {name} is not in the cache, and the hub is switched off (HF_HUB_OFFLINE) or out of reach: "
            "load it once with the hub in reach, or give files with --train_file."
        )
    configs = _config_names(name, revision, token) if isinstance(error, ValueError) else []
    if (config and configs and config not in configs) or (not config and len(configs) > 1):
        lacking = f"no config {config!r}" if config else "several configs"
        return f"The data set {name} has {lacking}: choose one with --dataset_config_name: {listing(configs)}."
    # `datasets` wraps what went wrong with a file in "An error occurred while generating the dataset".
    inner = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    reason = next(iter(str(inner).splitlines()), type(inner).__name__).rstrip(".")
    return (
        f"The data set {name} cannot be loaded: {reason}. Look at its name, its files, and the connection to the hub."
    )


def _config_names(name: str, revision: str | None, token: str | None) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return list(get_dataset_config_names(name, revision=revision, token=token))
    except Exception:  # Whatever hinders it hindered the loading first, and that is told.
        return []


def _hub_part(data: DataTrainingArguments, hub: _Hub, split: str) -> _Part:
    from datasets import Features, Value

    dataset = hub.splits[split]
    columns: list[Column] = [(name, _feature_kind(feature)) for name, feature in dataset.features.items()]
    column = choose_column(columns, data.text_column, f"the data set {hub.name}")
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    if dataset.features != Features({"text": Value("string")}):
        dataset = dataset.cast(Features({"text": Value("string")}))
    source = {
        "dataset": hub.name,
        "config": data.dataset_config_name,
        "split": split,
        "revision": data.dataset_revision,
        "commit": hub.commit,
    }
    return _part(dataset, source, column)


def _feature_kind(feature: Any) -> Kind:
    kind = getattr(feature, "dtype", None)
    return "text" if kind in ("string", "large_string", "string_view") else "blank" if kind == "null" else "other"
