"""Tiny real models, tokenizers and texts that the tests build for themselves."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LETTERS = "ABCDEFGHIJKLMNOPQRST"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# Every name under which a config of some model type keeps one of its sizes.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "embedding_size": 32,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "mask_token_id": 4,
}
# Where a model type needs more, or other sizes, to be tiny; and settings that its published models have.
SPECIAL_SIZES: dict[str, dict[str, object]] = {
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"conv_kernel_size": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8, "d_inner": 64, "initializer_std": 0.2},
    "layoutlm": {"max_2d_position_embeddings": 32},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "neomme": {"embedding_rank": 16, "head_dim": 16},
    "nystromformer": {"conv_kernel_size": 3},
    "perceiver": {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1},
    "reformer": {
        "attn_layers": ["lsh", "lsh"], "attention_head_size": 8, "feed_forward_size": 64, "num_buckets": 8,
        "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24], "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        "pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "ultrabert": {"prediction_head_size": 16, "head_dim": 8},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
}  # fmt: skip
# Types that read images too: the type of their text part.
TEXT_PART = {"modernvbert": "modernbert", "ultravbert": "ultrabert"}
TINY_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
# Model types whose masked LM heads differ in make and in names.
MODEL_TYPES = (
    "albert", "bert", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "esm", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta", "roberta-prelayernorm",
    "roformer", "xlm-roberta",
)  # fmt: skip


def letter_tokenizer(extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token per letter; `<s>` and `</s>` around a text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"\s"), "")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=62,
        model_input_names=["input_ids", "attention_mask"],
    )
    if extra:
        tokenizer.add_tokens(extra)
    return tokenizer


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """The config of a model of two narrow layers."""
    if model_type in TEXT_PART:
        text = tiny_config(TEXT_PART[model_type], **changes)
        vision = {"model_type": AutoConfig.for_model(model_type).vision_config.model_type, **TINY_VISION}
        return AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=vision)
    known = AutoConfig.for_model(model_type)
    wanted = {**SIZES, "vocab_size": len(SPECIAL) + len(LETTERS), **SPECIAL_SIZES.get(model_type, {}), **changes}
    if model_type == "funnel":
        del wanted["num_hidden_layers"]  # the sum of its block_sizes, which cannot be set
    special = SPECIAL_SIZES.get(model_type, {})
    real = {name: size for name, size in wanted.items() if hasattr(known, name) or name in special}
    return AutoConfig.for_model(model_type, **real)


def tiny_model(model_type: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A masked LM of two narrow layers with random weights, large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(tiny_config(model_type, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # a table of sines is no weight
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_base(folder: Path, model_type: str = "roberta", **changes: object) -> Path:
    """Save a tiny model with its tokenizer, as a user would have it in a folder."""
    tiny_model(model_type, **changes).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path, model_type: str = "bert") -> Path:
    """Save only the encoder of a tiny model: a checkpoint without a masked LM head."""
    tiny_model(model_type).base_model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def letter_texts(count: int, *, seed: int = 0, shortest: int = 8, longest: int = 40) -> list[str]:
    """Texts that can be learned: each runs through the alphabet by a step of its own."""
    chance = random.Random(seed)
    texts = []
    for _ in range(count):
        start, step = chance.randrange(len(LETTERS)), chance.choice((1, 3))
        length = chance.randint(shortest, longest)
        texts.append("".join(LETTERS[(start + step * i) % len(LETTERS)] for i in range(length)))
    return texts


def save_texts(path: Path, count: int, **options: int) -> Path:
    """Write such texts, one a line."""
    path.write_text("\n".join(letter_texts(count, **options)) + "\n", encoding="utf-8")
    return path


def logits_at(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of rows without padding, in evaluation mode."""
    with torch.no_grad():
        given: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return given


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of any number."""
    return (one - other).abs().max().item()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the logits of two models with equal weights agree.

    Not bit by bit: on some processors the order of a sum depends on where a tensor lies in memory.
    """
    return difference(one, other) < 1e-5


def perturb(model: torch.nn.Module, *, seed: int = 1, scale: float = 0.1) -> None:
    """Move every trainable parameter, as training would, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
