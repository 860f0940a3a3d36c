"""What the model card of a run tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peft_mlm.adapter_config import describe_method
from peft_mlm.base_recipe import base_recipe
from peft_mlm.card import name_data
from peft_mlm.config import Arguments
from peft_mlm.corpus import Corpus
from peft_mlm.model import Base, published_name
from peft_mlm.run_folder import describe_environment


def card_facts(
    arguments: Arguments,
    base: Base,
    model: PreTrainedModel,
    corpus: Corpus,
    summary: Mapping[str, Any],
    *,
    trained_modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Gather what a card tells of a run.

    Args:
        arguments: All groups.
        base: What loading the base told.
        model: The trained model, with its adapter.
        corpus: Its rows.
        summary: As in `summary.json`.
        trained_modules: Modules that were trained whole.

    Returns:
        The facts that `card.render_card` reads; no local path among them.
    """
    train_facts, name = corpus.facts["train"], published_name(base.name_or_path)
    method = "all parameters trained"
    if arguments.peft is not None:
        method = describe_method(model.peft_config["default"])
    return {
        **summary,
        "kind": "model" if arguments.peft is None else "adapter",
        "base_model": name,
        "base_revision": base.revision,
        "base_on_hub": name is not None and not Path(base.name_or_path or "").expanduser().exists(),
        "method": method,
        "base_recipe": base_recipe(arguments.model),
        "peft_type": summary["method"],
        "trained_modules": trained_modules,
        "new_tokens": len(base.new_token_ids),
        "renamed": base.renamed_weights,
        "untied": arguments.model.untie_embeddings,
        "growth_code": base.growth_code,
        "data": name_data(arguments.data),
        "dataset": None if Path(str(arguments.data.dataset_name)).exists() else arguments.data.dataset_name,
        "rows": train_facts["rows_used"],
        "max_seq_length": corpus.max_seq_length,
        "mlm_probability": arguments.data.mlm_probability,
        "versions": describe_environment("")["versions"],
    }
