"""The 51 model types that transformers has a masked language model for: one row each, and why some cannot serve here.

The rows are a record of what was seen, not a switch: head, ties, targets and row length of a model are found by looking
at the model itself, and a test builds every type and holds its row against what is found. What the rows decide is which
types are refused before their weights are loaded, which attention code may be asked for, and what a user is told.

Names are those of transformers' classes; `MODEL_FOR_MASKED_LM_MAPPING_NAMES` lists the types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft_mlm.errors import ModelError

EVERY_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
EAGER = ("eager",)
_BERT_LINEARS = ("query", "key", "value", "intermediate.dense", "output.dense")
_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_XLM_LINEARS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")

Positions = Literal["table", "table after padding", "config", "none"]


@dataclass(frozen=True)
class ModelType:
    """What is known of a model type, in its default configuration.

    Attributes:
        head: Names of the modules that make up the MLM head.
        decoder: Name of the module that gives the logits.
        tied: Parameters that are the same tensor: name -> name of the other place.
        targets: Encoder layers that get an adapter by default: last parts of names, or one expression for whole names;
            `{default_language}` stands for that field of the config.
        attention: What `attn_implementation` may be.
        checkpointing: Whether activations can be recomputed instead of kept.
        mixed_precision: Whether it runs under autocast (`bf16`, `fp16`).
        half: Whether its weights can be held in 16 bits (`dtype`).
        positions: What sets the longest row: a table of position embeddings ("table"), one whose rows up to that of the
            padding are not used ("table after padding"), `max_position_embeddings` of the config ("config": longer rows
            would run, beyond what the model has seen), or nothing ("none").
        padding_shows: Whether the logits of a row change with the padding behind it, in spite of the attention mask.
        settings: Fields of the config that are set when the model is loaded.
        notice: What a user of this type should know.
        refusal: Why this type cannot serve as a plain masked LM; None if it can.
    """

    head: tuple[str, ...] = ()
    decoder: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    attention: tuple[str, ...] = EVERY_ATTENTION
    checkpointing: bool = True
    mixed_precision: bool = True
    half: bool = True
    positions: Positions = "table"
    padding_shows: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    notice: str | None = None
    refusal: str | None = None

    @property
    def decoder_tied(self) -> bool:
        """Whether the decoder's matrix is the embedding matrix."""
        return f"{self.decoder}.weight" in self.tied


def _cls(encoder: str, targets: tuple[str, ...] = _BERT_LINEARS, **others: Any) -> ModelType:
    """A row with BERT's head, `cls.predictions`."""
    tied = {
        "cls.predictions.decoder.weight": f"{encoder}.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    return ModelType(("cls",), "cls.predictions.decoder", tied, targets, **others)


def _lm_head(encoder: str, targets: tuple[str, ...] = _BERT_LINEARS, **others: Any) -> ModelType:
    """A row with RoBERTa's head, `lm_head`; positions are numbered from the padding's on."""
    tied = {
        "lm_head.decoder.weight": f"{encoder}.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    return ModelType(("lm_head",), "lm_head.decoder", tied, targets, **{"positions": "table after padding", **others})


def _refused(reason: str) -> ModelType:
    return ModelType(refusal=reason)


_ENCODER_DECODER = "it is an encoder-decoder. Give a masked LM with an encoder alone."
_IMAGES = "This model reads images too; it is trained on text alone here, and its image part stays as it is."

MODEL_TYPES: Mapping[str, ModelType] = {
    "albert": ModelType(
        ("predictions",),
        "predictions.decoder",
        {
            "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        },
        ("embedding_hidden_mapping_in", "query", "key", "value", "attention.dense", "ffn", "ffn_output"),
        checkpointing=False,
    ),
    "bart": _refused(_ENCODER_DECODER),
    "bert": _cls("bert"),
    "big_bird": _cls(
        "bert",
        attention=EAGER,
        settings={"attention_type": "original_full"},
        notice="BigBird runs with full attention (attention_type original_full): transformers gives its block-sparse "
        "attention up for good at the first short row, so that results would depend on the order of rows.",
    ),
    "camembert": _lm_head("roberta"),
    "convbert": ModelType(
        ("generator_predictions", "generator_lm_head"),
        "generator_lm_head",
        {"generator_lm_head.weight": "convbert.embeddings.word_embeddings.weight"},
        (*_BERT_LINEARS, "conv_kernel_layer", "conv_out_layer"),
        attention=EAGER,
        padding_shows=True,
    ),
    "data2vec-text": _lm_head("data2vec_text"),
    "deberta": _cls(
        "deberta", ("in_proj", "pos_proj", "pos_q_proj", *_BERT_LINEARS[3:]), attention=EAGER, mixed_precision=False
    ),
    "deberta-v2": _cls(
        "deberta", ("query_proj", "key_proj", "value_proj", *_BERT_LINEARS[3:]), attention=EAGER
    ),
    "distilbert": ModelType(
        ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        "vocab_projector",
        {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        _XLM_LINEARS,
    ),
    "electra": ModelType(
        ("generator_predictions", "generator_lm_head"),
        "generator_lm_head",
        {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
        _BERT_LINEARS,
    ),
    "ernie": _cls("ernie"),
    "esm": ModelType(
        ("lm_head",),
        "lm_head.decoder",
        {"lm_head.decoder.weight": "esm.embeddings.word_embeddings.weight"},
        _BERT_LINEARS,
        positions="table after padding",  # ESM-2 has rotary positions instead: "config"
    ),
    "esmc": ModelType(("lm_head",), "lm_head.decoder", {}, _LLAMA_LINEARS, positions="config"),
    "eurobert": ModelType(("lm_head",), "lm_head", {}, _LLAMA_LINEARS, positions="config"),
    "flaubert": ModelType(
        ("pred_layer",),
        "pred_layer.proj",
        {"pred_layer.proj.weight": "transformer.embeddings.weight"},
        _XLM_LINEARS,
        attention=EAGER,
        checkpointing=False,
    ),
    "fnet": _cls(
        "fnet", ("embeddings.projection", *_BERT_LINEARS[3:]), attention=EAGER, half=False, padding_shows=True
    ),
    "funnel": ModelType(
        ("lm_head",),
        "lm_head",
        {"lm_head.weight": "funnel.embeddings.word_embeddings.weight"},
        ("q_head", "k_head", "v_head", "post_proj", "linear_1", "linear_2"),
        attention=EAGER,
        checkpointing=False,
        positions="none",
        padding_shows=True,
    ),
    "gte": ModelType(
        ("lm_head",),
        "lm_head.decoder",
        {"lm_head.decoder.weight": "gte.embeddings.word_embeddings.weight"},
        _LLAMA_LINEARS,
        positions="config",
    ),
    "ibert": _refused(
        "its layers are of a class of its own (QuantLinear), which PEFT has no adapter for. Its weights are a "
        "RoBERTa's: adapt that checkpoint, of the type roberta."
    ),
    "jina_embeddings_v3": _lm_head(
        "roberta", ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), positions="config"
    ),
    "layoutlm": _cls(
        "layoutlm",
        attention=("eager", "sdpa"),
        notice="LayoutLM reads the places of words on a page too; text alone has none, and every word gets place 0.",
    ),
    "longformer": _lm_head("longformer", attention=EAGER),
    "luke": ModelType(
        ("lm_head",),
        "lm_head.decoder",
        {
            "lm_head.bias": "lm_head.decoder.bias",
            "entity_predictions.decoder.weight": "luke.entity_embeddings.entity_embeddings.weight",
        },
        _BERT_LINEARS,
        attention=EAGER,
        positions="table after padding",
    ),
    "mbart": _refused(_ENCODER_DECODER),
    "megatron-bert": _cls("bert", attention=EAGER),
    "mobilebert": _cls(
        "mobilebert",
        (*_BERT_LINEARS, "embedding_transformation", "bottleneck.dense", "input.dense", "bottleneck.attention.dense"),
        padding_shows=True,
    ),
    "modernbert": ModelType(
        ("head", "decoder"),
        "decoder",
        {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        ("Wqkv", "Wo", "Wi"),
        positions="config",
    ),
    "modernvbert": ModelType(
        ("projection_head", "lm_head"),
        "lm_head",
        {},
        ("Wqkv", "Wo", "Wi"),
        positions="config",
        notice=_IMAGES,
    ),
    "mpnet": _lm_head(
        "mpnet", ("q", "k", "v", "o", *_BERT_LINEARS[3:]), attention=EAGER, checkpointing=False
    ),
    "mra": _refused(
        "its attention exists as a CUDA kernel only, and where that is missing transformers puts zeros in its place "
        "without an error. Give a model of another type."
    ),
    "mvp": _refused(_ENCODER_DECODER),
    "neomme": ModelType(
        ("unembedding_projection", "lm_head"),
        "lm_head",
        {
            "lm_head.weight": "model.embed_tokens.word_embeddings.weight",
            "unembedding_projection.weight": "model.embed_tokens.embedding_projection.weight",
        },
        ("q_proj", "k_proj", "v_proj", "output_projection.gate_proj", "o_proj", "mlp.up_proj", "mlp.down_proj"),
        positions="config",
        notice=_IMAGES,
    ),
    "nomic_bert": _cls("nomic_bert", _LLAMA_LINEARS, positions="config"),
    "nystromformer": _cls("nystromformer", attention=EAGER, padding_shows=True),
    "perceiver": _refused(
        "it predicts all of its positions whatever the length of the row, and uses its embedding matrix as decoder in "
        "a way that no adapter sees. Give a model of another type."
    ),
    "reformer": _refused(
        "its attention draws new random hashes at each pass, so that the same row never gives the same prediction "
        "twice, and it trains only on rows of exactly the product of axial_pos_shape. Give a model of another type."
    ),
    "rembert": ModelType(
        ("cls",),
        "cls.predictions.decoder",
        {},
        (*_BERT_LINEARS, "embedding_hidden_mapping_in"),
        attention=EAGER,
    ),
    "roberta": _lm_head("roberta"),
    "roberta-prelayernorm": _lm_head("roberta_prelayernorm"),
    "roc_bert": _cls(
        "roc_bert",
        (*_BERT_LINEARS, "map_inputs_layer"),
        notice="RoCBert reads shapes and pronunciations of characters too; rows hold tokens alone here, and the model "
        "sees the same shape and pronunciation (number 0) everywhere.",
    ),
    "roformer": _cls("roformer", attention=EAGER),
    "squeezebert": _cls(
        "transformer",
        ("post_attention.conv1d",),
        attention=EAGER,
        checkpointing=False,
        notice="SqueezeBERT's layers are convolutions in groups, which PEFT can train and cannot merge, but for those "
        "after the attention: by default these alone are adapted.",
    ),
    "tapas": _cls(
        "tapas",
        attention=EAGER,
        positions="config",  # its numbers stop at the last row of the table
        notice="TAPAS reads tables and questions about them; text alone is read as a question without a table.",
    ),
    "ultrabert": ModelType(("head",), "head.decoder", {}, _LLAMA_LINEARS, positions="config"),
    "ultravbert": ModelType(
        ("projection_head", "lm_head"),
        "lm_head",
        {},
        (r"model\.text_model\..*\.(q|k|v|o|gate|up|down)_proj",),
        positions="config",
        notice=_IMAGES,
    ),
    "xlm": ModelType(
        ("pred_layer",),
        "pred_layer.proj",
        {"pred_layer.proj.weight": "transformer.embeddings.weight"},
        _XLM_LINEARS,
        attention=EAGER,
        checkpointing=False,
    ),
    "xlm-roberta": _lm_head("roberta"),
    "xlm-roberta-xl": _lm_head("roberta"),
    "xmod": _lm_head(
        "roberta",
        (*_BERT_LINEARS, "adapter_modules.{default_language}.dense1", "adapter_modules.{default_language}.dense2"),
        mixed_precision=False,
    ),
    "yoso": _cls("yoso", attention=EAGER, padding_shows=True),
}  # fmt: skip


def check_config(config: Mapping[str, Any], *, name: str) -> None:
    """Refuse a model that cannot serve as a plain masked LM, by its config alone.

    Args:
        config: The contents of its config.json, or a config's `to_dict()`; a type that is not in the table passes.
        name: What the user gave, for the message.

    Raises:
        ModelError: Its type, or a setting of it, does not fit; the sentence says why and what to do.
    """
    model_type = str(config.get("model_type"))
    row = MODEL_TYPES.get(model_type)
    if row is not None and row.refusal is not None:
        raise ModelError(f"{name} is of the type {model_type}, which cannot be adapted here: {row.refusal}")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder-decoder ({model_type}). Give a masked LM with an encoder alone.")
    for fault in _faults_of(model_type, config):
        raise ModelError(f"{name} ({model_type}) cannot be adapted here: {fault}")


def check_attention(model_type: str, attention: str | None) -> None:
    """Check that a model type runs with the attention code that was asked for.

    Args:
        model_type: Its type; one that is not in the table passes.
        attention: `attn_implementation`, or None where transformers chooses.

    Raises:
        ModelError: It does not; the real choices are listed.
    """
    row = MODEL_TYPES.get(model_type)
    if row is not None and attention is not None and attention not in row.attention:
        raise ModelError(
            f"attn_implementation is {attention}, which {model_type} models do not have. Choose "
            f"{' or '.join(row.attention)}, or leave it out: transformers then takes what fits."
        )


def check_dtype(model_type: str, dtype: str) -> None:
    """Check that the weights of a model type can be held in this type.

    Args:
        model_type: Its type; one that is not in the table passes.
        dtype: Such as float32, bfloat16.

    Raises:
        ModelError: They cannot.
    """
    if model_type in MODEL_TYPES and not MODEL_TYPES[model_type].half and dtype in ("bfloat16", "float16"):
        raise ModelError(
            f"dtype is {dtype}, which {model_type} models cannot compute in: their Fourier transform has no 16-bit "
            "form. Use --dtype float32; with --bf16 the other layers compute in 16 bits."
        )


def check_training(model_type: str, *, checkpointing: bool, mixed_precision: bool) -> None:
    """Check that a model type can be trained as asked.

    Args:
        model_type: Its type; one that is not in the table passes.
        checkpointing: Whether activation checkpointing is asked for.
        mixed_precision: Whether bf16 or fp16 is.

    Raises:
        ModelError: It cannot.
    """
    row = MODEL_TYPES.get(model_type, ModelType())
    if checkpointing and not row.checkpointing:
        raise ModelError(
            f"activation_checkpointing: {model_type} models have none in transformers. Leave it out, and use a smaller "
            "per_device_train_batch_size with gradient_accumulation_steps if memory is short."
        )
    if mixed_precision and not row.mixed_precision:
        raise ModelError(
            f"bf16 or fp16: {model_type} models fail under mixed precision in transformers. Train in float32, or hold "
            "the frozen weights in 16 bits (--dtype bfloat16) without --bf16 or --fp16."
        )


def check_before_loading(
    *,
    name_or_path: str | None,
    model_type: str | None,
    attention: str | None,
    checkpointing: bool,
    mixed_precision: bool,
) -> None:
    """Find what a config.json in a local folder, or a model type, already tells; nothing heavy is imported for it.

    Args:
        name_or_path: The base model or config: a local folder is looked into, a hub name is left for later.
        model_type: From scratch: the type.
        attention: `attn_implementation`.
        checkpointing: Whether activation checkpointing is asked for.
        mixed_precision: Whether bf16 or fp16 is.

    Raises:
        ModelError: The type cannot serve, or does not have what was asked for.
    """
    config = _local_config(name_or_path) if name_or_path is not None else {"model_type": model_type}
    if "model_type" not in config:
        return  # on the hub, or broken: loading will tell
    check_config(config, name=name_or_path or f"--model_type {model_type}")
    kind = str(config["model_type"])
    check_attention(kind, attention)
    check_training(kind, checkpointing=checkpointing, mixed_precision=mixed_precision)


def notices_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a user of such a model should know.

    Args:
        config: A config's `to_dict()`.

    Returns:
        Sentences; most types have none.
    """
    model_type = str(config.get("model_type"))
    row = MODEL_TYPES.get(model_type, ModelType())
    said = [] if row.notice is None else [row.notice]
    if row.padding_shows:
        said.append(
            f"The predictions of {model_type} models depend on the padding of a batch: with --pad_to_max_length a row "
            "gives the same figures in any batch."
        )
    if model_type in ("xlm", "flaubert") and (config.get("n_langs") or 1) > 1 and config.get("use_lang_emb"):
        said.append("This model can be told the language of a text; rows hold tokens alone here, and it is not told.")
    return tuple(said)


def _faults_of(model_type: str, config: Mapping[str, Any]) -> list[str]:
    """Name the settings with which a usable type is no plain masked LM."""
    faults = []
    if config.get("is_decoder"):
        faults.append("is_decoder is true: each token sees only those before it. Give an encoder.")
    if model_type in ("xlm", "flaubert"):
        if config.get("causal") or config.get("is_encoder") is False:
            faults.append("it is causal: each token sees only those before it. Give a masked LM.")
        if config.get("asm"):
            faults.append("it has an adaptive softmax (asm), which gives no logits. Give a model without.")
    landmarks, means = config.get("num_landmarks"), config.get("segment_means_seq_len")
    if model_type == "nystromformer" and landmarks is not None and means is not None and landmarks != means:
        faults.append(
            f"with num_landmarks {landmarks} and segment_means_seq_len {means} it takes rows of exactly {means} "
            "tokens, padding included. Set num_landmarks to segment_means_seq_len (plain attention)."
        )
    if model_type == "yoso" and config.get("use_expectation") is False:
        faults.append(
            "use_expectation is false: its attention then draws random hashes at each pass, by a CUDA kernel. Set "
            "use_expectation to true in its config.json."
        )
    if model_type == "xmod" and config.get("default_language") is None:
        languages = config.get("languages") or ("en_XX",)
        if len(languages) > 1:
            faults.append(
                'it has a part for each language, and is not told which to use. Set "default_language" in its '
                f"config.json to one of {', '.join(languages)}."
            )
    return faults


def _local_config(name_or_path: str) -> dict[str, Any]:
    """Read the config.json of a local folder; empty where there is none, or none that can be read."""
    try:
        config = json.loads((Path(name_or_path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
