"""The 51 model types that transformers has a masked language model for: one row each, and why some cannot serve here.

The rows are a record of what was seen, not a switch: head, ties, targets and row length of a model are found by looking
at the model itself, and a test builds every type and holds its row against what is found. What the rows decide is which
types are refused before their weights are loaded, which attention code may be asked for, and what a user is told.

Names are those of transformers' classes; `MODEL_FOR_MASKED_LM_MAPPING_NAMES` lists the types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EVERY_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
EAGER = ("eager",)
_BERT_LINEARS = ("query", "key", "value", "intermediate.dense", "output.dense")
_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_XLM_LINEARS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")

Positions = Literal["table", "table after padding", "config", "none"]
Documents = Literal["none", "mask", "masks by kind of layer", "mask of the encoder"]


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
        documents: What keeps documents side by side in a row apart, exact to rounding (`document_attention`): one mask,
            one for each kind of layer (windows), or one that only the encoder behind the embeddings may see. Where a
            mask passes over a window, the type serves for rows that the window spans.
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
    documents: Documents = "none"
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
        documents="mask",
    ),
    "bart": _refused(_ENCODER_DECODER),
    "bert": _cls("bert", documents="mask"),
    "big_bird": _cls(
        "bert",
        attention=EAGER,
        settings={"attention_type": "original_full"},
        notice="BigBird runs with full attention (attention_type original_full): transformers gives its block-sparse "
        "attention up for good at the first short row, so that results would depend on the order of rows.",
        documents="mask",
    ),
    "camembert": _lm_head("roberta", documents="mask"),
    "convbert": ModelType(
        ("generator_predictions", "generator_lm_head"),
        "generator_lm_head",
        {"generator_lm_head.weight": "convbert.embeddings.word_embeddings.weight"},
        (*_BERT_LINEARS, "conv_kernel_layer", "conv_out_layer"),
        attention=EAGER,
        padding_shows=True,
    ),
    "data2vec-text": _lm_head("data2vec_text", documents="mask"),
    "deberta": _cls(
        "deberta", ("in_proj", "pos_proj", "pos_q_proj", *_BERT_LINEARS[3:]), attention=EAGER, mixed_precision=False,
        documents="mask of the encoder",
    ),
    "deberta-v2": _cls(
        "deberta", ("query_proj", "key_proj", "value_proj", *_BERT_LINEARS[3:]), attention=EAGER,
        documents="mask of the encoder",
    ),
    "distilbert": ModelType(
        ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        "vocab_projector",
        {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        _XLM_LINEARS,
        documents="mask",
    ),
    "electra": ModelType(
        ("generator_predictions", "generator_lm_head"),
        "generator_lm_head",
        {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
        _BERT_LINEARS,
        documents="mask",
    ),
    "ernie": _cls("ernie", documents="mask"),
    "esm": ModelType(
        ("lm_head",),
        "lm_head.decoder",
        {"lm_head.decoder.weight": "esm.embeddings.word_embeddings.weight"},
        _BERT_LINEARS,
        positions="table after padding",  # ESM-2 has rotary positions instead: "config"
        documents="mask of the encoder",
    ),
    "esmc": ModelType(("lm_head",), "lm_head.decoder", {}, _LLAMA_LINEARS, positions="config", documents="mask"),
    "eurobert": ModelType(("lm_head",), "lm_head", {}, _LLAMA_LINEARS, positions="config", documents="mask"),
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
        documents="mask",
    ),
    "ibert": _refused(
        "its layers are of a class of its own (QuantLinear), which PEFT has no adapter for. Its weights are a "
        "RoBERTa's: adapt that checkpoint, of the type roberta."
    ),
    "jina_embeddings_v3": _lm_head(
        "roberta", ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), positions="config",
        documents="mask",
    ),
    "layoutlm": _cls(
        "layoutlm",
        attention=("eager", "sdpa"),
        notice="LayoutLM reads the places of words on a page too; text alone has none, and every word gets place 0.",
        documents="mask of the encoder",
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
        documents="mask",
    ),
    "mbart": _refused(_ENCODER_DECODER),
    "megatron-bert": _cls("bert", attention=EAGER, documents="mask"),
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
        documents="masks by kind of layer",
    ),
    "modernvbert": ModelType(
        ("projection_head", "lm_head"),
        "lm_head",
        {},
        ("Wqkv", "Wo", "Wi"),
        positions="config",
        notice=_IMAGES,
        documents="masks by kind of layer",
    ),
    "mpnet": _lm_head(
        "mpnet", ("q", "k", "v", "o", *_BERT_LINEARS[3:]), attention=EAGER, checkpointing=False,
        documents="mask",
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
    "nomic_bert": _cls("nomic_bert", _LLAMA_LINEARS, positions="config", documents="mask"),
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
        documents="mask",
    ),
    "roberta": _lm_head("roberta", documents="mask"),
    "roberta-prelayernorm": _lm_head("roberta_prelayernorm", documents="mask"),
    "roc_bert": _cls(
        "roc_bert",
        (*_BERT_LINEARS, "map_inputs_layer"),
        notice="RoCBert reads shapes and pronunciations of characters too; rows hold tokens alone here, and the model "
        "sees the same shape and pronunciation (number 0) everywhere.",
        documents="mask",
    ),
    "roformer": _cls("roformer", attention=EAGER, documents="mask"),
    "squeezebert": _cls(
        "transformer",
        ("post_attention.conv1d",),
        attention=EAGER,
        checkpointing=False,
        notice="SqueezeBERT's layers are convolutions in groups, which PEFT can train and cannot merge, but for those "
        "after the attention: by default these alone are adapted.",
        documents="mask",
    ),
    "tapas": _cls(
        "tapas",
        attention=EAGER,
        positions="config",  # its numbers stop at the last row of the table
        notice="TAPAS reads tables and questions about them; text alone is read as a question without a table.",
        documents="mask",
    ),
    "ultrabert": ModelType(("head",), "head.decoder", {}, _LLAMA_LINEARS, positions="config", documents="mask"),
    "ultravbert": ModelType(
        ("projection_head", "lm_head"),
        "lm_head",
        {},
        (r"model\.text_model\..*\.(q|k|v|o|gate|up|down)_proj",),
        positions="config",
        notice=_IMAGES,
        documents="mask",
    ),
    "xlm": ModelType(
        ("pred_layer",),
        "pred_layer.proj",
        {"pred_layer.proj.weight": "transformer.embeddings.weight"},
        _XLM_LINEARS,
        attention=EAGER,
        checkpointing=False,
    ),
    "xlm-roberta": _lm_head("roberta", documents="mask"),
    "xlm-roberta-xl": _lm_head("roberta", documents="mask"),
    "xmod": _lm_head(
        "roberta",
        (*_BERT_LINEARS, "adapter_modules.{default_language}.dense1", "adapter_modules.{default_language}.dense2"),
        mixed_precision=False,
        documents="mask",
    ),
    "yoso": _cls("yoso", attention=EAGER, padding_shows=True),
}  # fmt: skip
