"""The argument groups: what to adapt, on which text, and how.

Three plain dataclasses; the fourth group is transformers' own `TrainingArguments`, whose names are unchanged.
Names are those of HuggingFace's `run_mlm.py`, of transformers and of PEFT wherever these have one.
This module imports nothing heavy: `--help` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Rows = Literal["chunked", "packed", "line", "run_mlm"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
NewTokenInit = Literal["mean", "pieces"]
QuantType = Literal["nf4", "fp4"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class ModelArguments:
    """Which base model and tokenizer to adapt, or what to train from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model: a hub name or a folder. Leave it out to train from scratch."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "From scratch: the model type, such as bert, roberta, modernbert, esm."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "From scratch: a hub name or a folder whose config.json to use."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "From scratch: changes to the config, such as hidden_size=128,num_hidden_layers=2."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer: a hub name or a folder, if it is not the base model's own."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where models and data sets from the hub are kept."})
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Prefer the tokenizer of the tokenizers library (Rust)."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the base model on the hub."}
    )
    token: str | None = field(
        default=None, metadata={"help": "Hub token for private models; the one of `hf auth login` if not given."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a checkpoint. It can do anything you can do."}
    )
    dtype: Dtype = field(
        default="float32",
        metadata={
            "help": "Type the base model's weights are held in; auto: as in the checkpoint. With an adapter on a GPU "
            "that has bfloat16: bfloat16, with bf16, where none of dtype, bf16 and fp16 is given."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention code: eager, sdpa, flash_attention_2 or flex_attention, where the model type has it; "
            "transformers chooses if not given."
        },
    )
    add_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens to add to the tokenizer: a list, or a text file with one a line. With an adapter their "
            "rows alone are trained, and shipped with it."
        },
    )
    add_special_tokens: list[str] | None = field(
        default=None, metadata={"help": "The same for special tokens, which are never masked nor split."}
    )
    add_tokens_inside_words: bool = field(
        default=False,
        metadata={"help": "Find added tokens inside longer words too (SMILES); else cat is not found in catalog."},
    )
    new_token_init: NewTokenInit = field(
        default="mean",
        metadata={"help": "How new rows start: mean of all old rows, or of the rows of the pieces a token was."},
    )
    untie_embeddings: bool = field(
        default=False,
        metadata={"help": "Give the decoder a matrix of its own, so that embeddings or decoder can be adapted."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the encoder's linear layers in 4 bits (bitsandbytes); needs an adapter."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the encoder's linear layers in 8 bits (bitsandbytes); needs an adapter."}
    )
    bnb_4bit_quant_type: QuantType = field(default="nf4", metadata={"help": "Kind of 4-bit numbers."})
    bnb_4bit_compute_dtype: ComputeDtype = field(
        default="auto",
        metadata={"help": "Type that quantised layers compute in; auto: bfloat16 where the GPU has it, else float32."},
    )
    bnb_4bit_use_double_quant: bool = field(
        default=False, metadata={"help": "Quantise the constants of the 4-bit blocks too: 0.4 bit less per weight."}
    )
    llm_int8_threshold: float = field(
        default=6.0, metadata={"help": "8 bit: inputs with values beyond this are multiplied in higher precision."}
    )


@dataclass
class DataTrainingArguments:
    """Which text to learn from, how to cut it into rows, and how to mask it."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub, such as glue."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, such as cola."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the hub."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: one file, several (comma-separated), or a glob; txt, csv, tsv, json, jsonl, "
            "parquet or FASTA, plain or compressed (gz, bz2, xz, zst, zip)."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Text to evaluate on, in the same formats; else a part of the training text."}
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the text; else `text`, or the only text column; in a csv or tsv without a "
            "header its number, 1 for the first."
        },
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Per cent of the training texts, drawn at random, to evaluate on when no other are given."},
    )
    validation_split_seed: int = field(default=42, metadata={"help": "Seed of that draw."})
    streaming: bool = field(
        default=False, metadata={"help": "Refused: the text is memory-mapped, so that it need not fit into memory."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again although a cached result exists."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise. If not given: one; one per core for much text."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation rows."})
    rows: Rows = field(
        default="chunked",
        metadata={
            "help": "chunked: texts side by side, cut to max_seq_length, nothing lost; packed: whole texts side by "
            "side, each read as if it stood alone; line: one row per text; run_mlm: exactly the rows of HuggingFace's "
            "run_mlm.py."
        },
    )
    line_by_line: bool = field(default=False, metadata={"help": "The same as --rows line."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per row, special tokens included; else what the model holds, at most 1024."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per training batch at most, padding included, in place of a number of rows: short rows "
            "then come in larger batches."
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every row to max_seq_length, not to the longest of its batch."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict."})
    mask_replace_prob: float = field(default=0.8, metadata={"help": "Of those, the share replaced by the mask token."})
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Of those, the share replaced by a random token; the rest is left as it is."}
    )
    eval_mask_seed: int = field(
        default=0, metadata={"help": "Seed of the evaluation masks, which are the same at every evaluation."}
    )
    eval_mask_draws: int = field(
        default=1,
        metadata={
            "help": "Mask the evaluation text this many times and score all of them; while training runs, the first "
            "alone."
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better one."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better an evaluation must be to count."}
    )


@dataclass
class PEFTArguments:
    """The adapter. Without this group the whole model is trained."""

    use_lora: bool = field(
        default=False,
        metadata={"help": "Train a LoRA adapter; the base model stays as it is. The same as --peft_method lora."},
    )
    peft_method: str | None = field(
        default=None,
        metadata={
            "help": "Train an adapter of this method of PEFT, such as lora, adalora, vera, boft, oft, ia3, miss, road, "
            "ln_tuning; another word lists all."
        },
    )
    peft_config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Options of that method by PEFT's own names, such as '{\"r\": 16}'; another name lists all. Which "
            "layers are adapted is said by lora_target_modules and the like, whatever the method."
        },
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on from this adapter (a folder or a hub name)."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter's matrices (LoRA)."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scaling is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter's first matrix."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the linear layers to adapt, such as query,value; else (or all-linear) every linear layer "
            "of the encoder."
        },
    )
    lora_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to leave out of the targets."}
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Adapt only the layers with these numbers (the first is 0)."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Learn magnitude and direction apart (DoRA)."})
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "How LoRA's matrices start: true (as the base), gaussian, orthogonal, pissa, pissa_niter_16, "
            "olora, mica, loftq (4 bits); by a pass over the training text: eva, corda, lora_ga; false (at random)."
        },
    )
    base_dropout: bool = field(
        default=False,
        metadata={
            "help": "Keep the base's own dropout while the adapter trains. Off, a step is faster; lora_dropout is the "
            "adapter's own."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the learning rate of the B matrices as a multiple of learning_rate."}
    )
    use_lorafa: bool = field(default=False, metadata={"help": "LoRA-FA: train the B matrices only, by its optimiser."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules to train in full and ship with the adapter."}
    )
    rank_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": 'Other ranks by layer name, such as {"query": 16}.'}
    )
    alpha_pattern: dict[str, float] | None = field(
        default=None, metadata={"help": 'Other values of lora_alpha by layer name, such as {"query": 32}.'}
    )
