"""Every PEFT method and every LoRA variant: whether it serves masked LMs, on which bases, and what it needs.

A row says what was seen by running it (peft 0.21.2); `tests/test_methods.py` runs every row again. A sentence in place
of "fine" is what the user reads when the row is refused. "Merges" means, on a quantised base: the base is dequantised,
then the adapter is put on it and merged. Nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Base = Literal["float", "nf4", "fp4", "int8"]
QUANTISED: tuple[Base, ...] = ("nf4", "fp4", "int8")
# What a method changes: linear layers, those of them that have a bias, norms, rows of the embeddings, or nothing of it.
Targets = Literal["linear", "biased", "norm", "tokens", "none"]


@dataclass(frozen=True)
class Method:
    """One method of PEFT.

    Attributes:
        title: Its name as its authors write it.
        config: Name of its class of options in PEFT.
        paper: Where it was published; PEFT's documentation where it was not.
        refused: Why it cannot serve masked language models; empty where it can.
        merge: Why it cannot be merged; empty where it can.
        bases: Why it is refused on a kind of base; the kinds that are not in it are fine.
        start: Why the model is not the base before training, and what to do about it; empty where it is.
        start_option: The option that decides how it starts.
        same_start: Values of that option with which the model starts as the base.
        needs: What it needs beside options.
        targets: What it changes.
        defaults: Options that are set where PEFT's own defaults don't serve.
        divides: Options that must divide the sizes of the layers (`in`, `out` or `both`), largest first choice.
    """

    title: str
    config: str
    paper: str
    refused: str = ""
    merge: str = ""
    bases: Mapping[Base, str] = field(default_factory=dict)
    start: str = ""
    start_option: str = "init_weights"
    same_start: tuple[Any, ...] = (True,)
    needs: str = ""
    targets: Targets = "linear"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    divides: Mapping[str, Literal["in", "out", "both"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One variant of a method: an option that makes it another one.

    Attributes:
        title: Its name as its authors write it.
        option: The option that asks for it, by PEFT's name, or an argument of ours.
        values: The values that ask for it; empty: any but none and false. A `*` stands for digits.
        paper: Where it was published; PEFT's documentation where it was not.
        method: The method it belongs to.
        refused: Why it cannot serve masked language models; empty where it can.
        bases: Why it is refused on a kind of base; the kinds that are not in it are fine.
        start: Why the model is not the base before training; empty where it is.
        needs: What it needs beside options.
        note: What to know about it.
    """

    title: str
    option: str
    values: tuple[Any, ...] = ()
    paper: str = ""
    method: str = "lora"
    refused: str = ""
    bases: Mapping[Base, str] = field(default_factory=dict)
    start: str = ""
    needs: str = ""
    note: str = ""


def _on(sentence: str, *kinds: Base) -> dict[Base, str]:
    """Refuse some kinds of bases for one reason; all quantised ones if none is named."""
    return dict.fromkeys(kinds or QUANTISED, sentence)


_DOCS = "https://github.com/huggingface/peft/tree/main/docs/source"
_PROMPTS = "It lengthens the rows by virtual tokens, so that outputs and labels no longer lie side by side."
_PREFIX = (
    "PEFT hands its prefix on as keys of the past, which few encoders take: ModernBERT ignores them, ESM and DeBERTa "
    "fail; and it cannot be merged."
)
_NEEDS_FLOAT = "it is computed from the weights of the layers, which PEFT does not read from a quantised layer"
_READS_4BIT = "it multiplies by the weights of the layers, which PEFT does not unpack from 4 bits"
_READS_8BIT = "it takes the 8-bit integers for weights: the logits are off by more than 1 without an error"
_IGNORED = "PEFT ignores it on a quantised layer without an error, and trains plain LoRA"
_EDITS = "it changes the weights of the base, which a quantised base cannot hold"

METHODS: dict[str, Method] = {
    "adalora": Method(
        "AdaLoRA", "AdaLoraConfig", "https://openreview.net/forum?id=lq62uWRJjiY", start_option="init_lora_weights",
        needs="total_step (set to the steps of the run) and a call after each step",
    ),
    "adamss": Method(
        "AdaMSS", "AdamssConfig", "https://openreview.net/forum?id=8ZdWmpYxT0", bases=_on(_NEEDS_FLOAT),
        same_start=("orthogonal",),
    ),
    "adaption_prompt": Method(
        "Adaption prompt", "AdaptionPromptConfig", "https://arxiv.org/abs/2303.16199", targets="none",
        refused="It is made for the decoders Llama, Mistral and GPT-2; PEFT has it for no encoder.",
    ),
    "beft": Method("BEFT", "BeftConfig", "https://arxiv.org/abs/2509.15974", targets="biased"),
    "boft": Method(
        "BOFT", "BOFTConfig", "https://arxiv.org/abs/2311.06243", divides={"boft_block_size": "in"},
    ),
    "c3a": Method(
        "C3A", "C3AConfig", "https://arxiv.org/abs/2407.19342", divides={"block_size": "both"},
        start='its kernels start at random; --peft_config \'{"init_weights": true}\' starts as the base',
    ),
    "cartridge": Method(
        "Cartridges", "CartridgeConfig", "https://arxiv.org/abs/2506.06266", refused=_PREFIX, targets="none",
    ),
    "cpt": Method(
        "Context-aware prompt tuning", "CPTConfig", "https://arxiv.org/abs/2410.17222", targets="none",
        refused="PEFT has it for causal language models alone.",
    ),
    "deft": Method(
        "DEFT", "DeftConfig",
        "https://proceedings.neurips.cc/paper_files/paper/2025/hash/93a34a7138bdad95e874018d5f491cc6-Abstract-Conference.html",
        bases=_on(_READS_4BIT, "nf4", "fp4") | _on(_READS_8BIT, "int8"),
    ),
    "delora": Method("DeLoRA", "DeloraConfig", "https://arxiv.org/abs/2503.18225", bases=_on(_NEEDS_FLOAT)),
    "fourierft": Method(
        "FourierFT", "FourierFTConfig", "https://arxiv.org/abs/2405.03003",
        start='its spectra start at random; --peft_config \'{"init_weights": true}\' starts as the base',
    ),
    "frod": Method(
        "FRoD", "FrodConfig", "https://doi.org/10.1609/aaai.v40i31.39813", bases=_on(_NEEDS_FLOAT),
        defaults={"progressbar": False},
    ),
    "glora": Method(
        "GLoRA", "GloraConfig", "https://arxiv.org/abs/2306.07967",
        bases=_on("PEFT has it for float linear layers alone"),
    ),
    "gralora": Method(
        "GraLoRA", "GraloraConfig", "https://arxiv.org/abs/2505.20355", divides={"gralora_k": "both"},
    ),
    "hira": Method("HiRA", "HiraConfig", "https://openreview.net/forum?id=TwJrTz9cRS"),
    "hra": Method(
        "HRA", "HRAConfig", "https://arxiv.org/abs/2405.17484",
        bases=_on(_READS_4BIT, "nf4", "fp4") | _on(_READS_8BIT, "int8"),
    ),
    "ia3": Method(
        "(IA)³", "IA3Config", "https://arxiv.org/abs/2205.05638", start_option="init_ia3_weights",
        needs="feedforward_modules (set to the targets that are narrower than their input)",
    ),
    "lily": Method(
        "LiLY", "LilyConfig", "https://arxiv.org/abs/2407.09946", bases=_on(_READS_4BIT, "nf4", "fp4"),
        merge="its matrices are mixed anew for each token, so that no weight equals them",
    ),
    "ln_tuning": Method(
        "LN tuning", "LNTuningConfig", "https://arxiv.org/abs/2312.11420", targets="norm", start_option="",
    ),
    "loha": Method(
        "LoHa", "LoHaConfig", "https://arxiv.org/abs/2108.06098", bases=_on(_READS_4BIT, "nf4", "fp4"),
    ),
    "lokr": Method(
        "LoKr", "LoKrConfig", "https://arxiv.org/abs/2309.14859", bases=_on(_READS_4BIT, "nf4", "fp4"),
    ),
    "lora": Method(
        "LoRA", "LoraConfig", "https://arxiv.org/abs/2106.09685", start_option="",
    ),
    "miss": Method(
        "MiSS", "MissConfig", "https://arxiv.org/abs/2409.15371", same_start=(True, "bat", "mini"),
    ),
    "multitask_prompt_tuning": Method(
        "Multitask prompt tuning", "MultitaskPromptTuningConfig", "https://arxiv.org/abs/2303.02861", refused=_PROMPTS,
        targets="none",
    ),
    "oft": Method("OFT", "OFTConfig", "https://arxiv.org/abs/2306.07280", divides={"oft_block_size": "in"}),
    "osf": Method("OSF", "OSFConfig", "https://arxiv.org/abs/2504.07097", bases=_on(_NEEDS_FLOAT)),
    "p_tuning": Method(
        "P-tuning", "PromptEncoderConfig", "https://arxiv.org/abs/2103.10385", refused=_PROMPTS, targets="none",
    ),
    "peanut": Method(
        "PEANuT", "PeanutConfig", "https://arxiv.org/abs/2410.01870",
        bases=_on(_READS_4BIT, "nf4", "fp4") | _on(_READS_8BIT, "int8"),
    ),
    "poly": Method(
        "Polytropon", "PolyConfig", "https://arxiv.org/abs/2202.13914",
        refused="Each row needs the id of its task, which the batches of a masked language model do not have.",
    ),
    "prefix_tuning": Method(
        "Prefix tuning", "PrefixTuningConfig", "https://arxiv.org/abs/2101.00190", refused=_PREFIX, targets="none",
    ),
    "prompt_tuning": Method(
        "Prompt tuning", "PromptTuningConfig", "https://arxiv.org/abs/2104.08691", refused=_PROMPTS, targets="none",
    ),
    "psoft": Method("PSOFT", "PsoftConfig", "https://arxiv.org/abs/2505.11235", bases=_on(_NEEDS_FLOAT)),
    "pvera": Method("PVeRA", "PveraConfig", "https://arxiv.org/abs/2512.07703"),
    "randlora": Method("RandLoRA", "RandLoraConfig", "https://arxiv.org/abs/2502.00987"),
    "road": Method("RoAd", "RoadConfig", "https://arxiv.org/abs/2409.00119", divides={"group_size": "out"}),
    "shadow": Method(
        "ShadowPEFT", "ShadowConfig", _DOCS, targets="none",
        refused="It is made for decoders: a part of it learns only from a loss of its own that is not added here, and "
        "it cannot be merged.",
    ),
    "shira": Method("SHiRA", "ShiraConfig", "https://arxiv.org/abs/2406.13175"),
    "supertuning": Method(
        "Supertuning", "SupertuningConfig", "https://arxiv.org/abs/2607.09287", bases=_on(_NEEDS_FLOAT),
    ),
    "tinylora": Method("TinyLoRA", "TinyLoraConfig", "https://arxiv.org/abs/2602.04118", bases=_on(_NEEDS_FLOAT)),
    "trainable_tokens": Method(
        "Trainable tokens", "TrainableTokensConfig", f"{_DOCS}/package_reference/trainable_tokens.md", targets="tokens",
        needs="token_indices, or new tokens",
    ),
    "unilora": Method(
        "Uni-LoRA", "UniLoraConfig", "https://arxiv.org/abs/2506.00799", same_start=(),
        bases=_on("PEFT's layer does nothing on a quantised layer, without an error: no gradient, no effect"),
        start="its vector starts at small random values",
    ),
    "vblora": Method(
        "VB-LoRA", "VBLoRAConfig", "https://arxiv.org/abs/2405.15179", divides={"vector_length": "both"},
        start="its bank of vectors starts at small random values", start_option="", same_start=(),
    ),
    "vera": Method("VeRA", "VeraConfig", "https://arxiv.org/abs/2310.11454"),
    "waveft": Method("WaveFT", "WaveFTConfig", "https://arxiv.org/abs/2505.12532"),
    "xlora": Method(
        "X-LoRA", "XLoraConfig", "https://arxiv.org/abs/2402.07148", targets="none",
        refused="It mixes adapters that are trained already, and PEFT's router does not run on encoders.",
    ),
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "rslora": Variant("rsLoRA", "use_rslora", paper="https://arxiv.org/abs/2312.03732"),
    "dora": Variant(
        "DoRA", "use_dora", paper="https://arxiv.org/abs/2402.09353",
        bases=_on("it needs the norms of the weights, which PEFT does not get from an 8-bit layer", "int8"),
    ),
    "lora_bias": Variant("LoRA with a bias", "lora_bias", paper=f"{_DOCS}/developer_guides/lora.md"),
    "bias": Variant(
        "Trained biases", "bias", ("all", "lora_only"), paper=f"{_DOCS}/developer_guides/lora.md",
        note="the base's biases are changed in place: with the adapter switched off the model is not the base",
    ),
    "gaussian": Variant("Gaussian start", "init_lora_weights", ("gaussian",), paper="https://arxiv.org/abs/2106.09685"),
    "orthogonal": Variant(
        "Orthogonal start", "init_lora_weights", ("orthogonal",),
        paper="https://datta0.github.io/posts/rethink-lora-init/",
        bases=_on("PEFT makes its matrices in the type of the weights, which on a quantised base is one of integers"),
    ),
    "random": Variant(
        "Random start", "init_lora_weights", (False, "false"), paper=f"{_DOCS}/developer_guides/lora.md",
        start="both of its matrices start at random; init_lora_weights true starts as the base",
    ),
    "pissa": Variant(
        "PiSSA", "init_lora_weights", ("pissa",), paper="https://arxiv.org/abs/2404.02948", bases=_on(_EDITS),
        needs="saving the difference to its start",
    ),
    "pissa_niter": Variant(
        "PiSSA, fast SVD", "init_lora_weights", ("pissa_niter_*",), paper="https://arxiv.org/abs/2404.02948",
        bases=_on(_EDITS), needs="saving the difference to its start",
    ),
    "olora": Variant(
        "OLoRA", "init_lora_weights", ("olora",), paper="https://arxiv.org/abs/2406.01775", bases=_on(_EDITS),
        needs="saving the difference to its start",
    ),
    "corda": Variant(
        "CorDA", "init_lora_weights", ("corda",), paper="https://arxiv.org/abs/2406.05223", bases=_on(_EDITS),
        needs="a pass over data; saving the difference to its start",
    ),
    "lora_ga": Variant(
        "LoRA-GA", "init_lora_weights", ("lora_ga",), paper="https://arxiv.org/abs/2407.05000", bases=_on(_EDITS),
        needs="a pass over data; saving the difference to its start",
    ),
    "eva": Variant("EVA", "init_lora_weights", ("eva",), paper="https://arxiv.org/abs/2410.07170",
        needs="a pass over data",
    ),
    "loftq": Variant(
        "LoftQ", "init_lora_weights", ("loftq",), paper="https://arxiv.org/abs/2310.08659",
        bases=_on("it starts at what a 4-bit base has lost, and this base has lost nothing", "float")
        | _on("it starts at what a 4-bit base has lost; this one has 8 bits", "int8"),
        start="it adds what quantising has taken from the base", needs="the base's float weights",
    ),
    "mica": Variant(
        "MiCA", "init_lora_weights", ("mica",), paper="https://arxiv.org/abs/2604.01694", bases=_on(_NEEDS_FLOAT),
    ),
    "kasa": Variant(
        "KaSA", "kasa_config", paper="https://arxiv.org/abs/2412.06071", bases=_on(_IGNORED),
        start="it leaves the smallest singular values of the weights out",
    ),
    "velora": Variant(
        "VeLoRA", "velora_config", paper="https://arxiv.org/abs/2405.17991",
        bases=_on("PEFT has it for float linear layers alone"),
    ),
    "monteclora": Variant(
        "MonteCLoRA", "monteclora_config", paper="https://arxiv.org/abs/2411.04358", bases=_on(_IGNORED),
        refused="A part of it learns only from a loss of its own, which is not added here.",
    ),
    "bdlora": Variant(
        "BD-LoRA", "use_bdlora", paper="https://arxiv.org/abs/2510.23346", bases=_on(_IGNORED),
    ),
    "qalora": Variant(
        "QA-LoRA", "use_qalora", paper="https://arxiv.org/abs/2309.14717",
        refused="PEFT has it for GPTQ layers alone; on any other layer it trains plain LoRA without an error.",
    ),
    "alora": Variant(
        "aLoRA", "alora_invocation_tokens", paper="https://arxiv.org/abs/2504.12397",
        refused="It is made for prompts of causal language models: in a masked one it is never switched on, and trains "
        "nothing without an error.",
    ),
    "arrow": Variant(
        "Arrow", "arrow_config", paper="https://arxiv.org/abs/2405.11157",
        refused="It mixes adapters that are trained already.",
    ),
    "layer_replication": Variant(
        "Layer replication", "layer_replication", paper="https://arxiv.org/abs/2312.15166",
        refused="Copies of a layer share its weights, so that a merge adds one copy's adapter to all of them.",
    ),
    "target_parameters": Variant(
        "Target parameters", "target_parameters", paper=f"{_DOCS}/developer_guides/lora.md",
        refused="It is for weights that are no layer of their own, as in mixtures of experts; name layers by "
        "lora_target_modules.",
    ),
    "megatron": Variant(
        "Megatron layers", "megatron_config", paper=f"{_DOCS}/developer_guides/lora.md",
        refused="transformers' masked language models have no layers of Megatron's.",
    ),
    "rank_pattern": Variant("Ranks by layer", "rank_pattern", paper=f"{_DOCS}/developer_guides/lora.md"),
    "alpha_pattern": Variant("Alphas by layer", "alpha_pattern", paper=f"{_DOCS}/developer_guides/lora.md"),
    "loraplus": Variant("LoRA+", "loraplus_lr_ratio", paper="https://arxiv.org/abs/2402.12354"),
    "lorafa": Variant("LoRA-FA", "use_lorafa", paper="https://arxiv.org/abs/2308.03303"),
    "no_start": Variant(
        "TinyLoRA without a start", "init_weights", (False, "false"), paper="https://arxiv.org/abs/2602.04118",
        method="tinylora",
        refused="PEFT then leaves its vectors as the memory happens to be: numbers of any size, or no numbers at all.",
    ),
    "asa": Variant(
        "AdaMSS with adaptive subspaces", "use_asa", paper="https://openreview.net/forum?id=8ZdWmpYxT0",
        method="adamss", needs="a call after each step",
    ),
}  # fmt: skip


def usable_methods(base: Base = "float") -> list[str]:
    """List the methods that serve masked language models on a kind of base.

    Args:
        base: The kind of base.

    Returns:
        Names, in the order of the table.
    """
    return [name for name, row in METHODS.items() if not row.refused and base not in row.bases]
