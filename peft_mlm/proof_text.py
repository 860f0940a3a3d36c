"""The rows that a merged model is proved on: random tokens, and real text where it is given or the run has some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_mlm.config import Arguments, read_arguments
from peft_mlm.corpus import build_collators, build_corpus
from peft_mlm.data import load_text
from peft_mlm.errors import DataError
from peft_mlm.loading import Loaded
from peft_mlm.merge_proof import Batch, ProofRows, probe_rows
from peft_mlm.run_folder import RunFolder

# Rows of text that are compared, where --max_eval_samples asks for no other number.
TEXT_ROWS, BATCH_ROWS = 64, 8


def proof_rows(loaded: Loaded, run: Path | None, flags: Sequence[str]) -> ProofRows:
    """Choose the rows to compare two models on.

    Args:
        loaded: Base with adapter.
        run: Folder of the run that the adapter is from, if it is known: its evaluation text is used.
        flags: Words that name another text, such as `["--validation_file", "other.txt"]`; they override the run's.

    Returns:
        Random rows, which hold the tokens whose rows were trained; and the first rows of the text.

    Raises:
        DataError: The text that is asked for is missing or empty. The run's own may be gone: then there is none.
        ArgumentsError: The flags are wrong.
    """
    assert isinstance(loaded.model, PeftModel)
    probe = probe_rows(loaded.model.get_base_model(), loaded.tokenizer, _trained_ids(loaded.model))
    if run is None and not flags:
        return ProofRows(probe)
    arguments = read_arguments(None if run is None else RunFolder(run).arguments, flags, for_training=False)
    try:
        return ProofRows(probe, *_text(loaded, arguments))
    except DataError:
        if flags:
            raise
        return ProofRows(probe)


def _text(loaded: Loaded, arguments: Arguments) -> tuple[list[Batch], dict[str, Any]]:
    """Make batches of the first rows, and say which text that is."""
    data, model = arguments.data, arguments.model
    data = replace(data, max_eval_samples=data.max_eval_samples or TEXT_ROWS)
    text = load_text(data, cache_dir=model.cache_dir, token=model.token, splits=("validation",))
    corpus = build_corpus(text, data, loaded.base.model, loaded.tokenizer)
    _, masking = build_collators(corpus, data, loaded.tokenizer, seed=0, half_precision=False)
    listed: list[Any] = list(corpus.rows["validation"])  # with the lengths of documents that share a row
    batches: list[Batch] = [masking(listed[start : start + BATCH_ROWS]) for start in range(0, len(listed), BATCH_ROWS)]
    return batches, {"rows": len(listed), "fingerprint": corpus.facts["validation"]["fingerprint"]}


def _trained_ids(model: PeftModel) -> list[int]:
    """List the tokens whose rows the adapter trains."""
    config = model.active_peft_config
    held = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = held.values() if isinstance(held, dict) else [held]
    return sorted({i for ids in lists for i in ids})
