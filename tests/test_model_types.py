from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, TapasTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from peft_mlm.arguments import ModelArguments
from peft_mlm.commands.train import train
from peft_mlm.errors import ModelError
from peft_mlm.heads import tied_parameters
from peft_mlm.merging import is_tied
from peft_mlm.model import load_base
from peft_mlm.model_checks import check_config, notices_of
from peft_mlm.model_types import EVERY_ATTENTION, MODEL_TYPES
from peft_mlm.positions import position_limit
from peft_mlm.targets import encoder_linears
from peft_mlm.tokenization import special_token_frame
from tests.matrix_of_types import ONLY_FLOAT32, run_type
from tests.tiny import letter_tokenizer, same, save_base, save_texts, tiny_config, tiny_model

USABLE = sorted(name for name, row in MODEL_TYPES.items() if row.refusal is None)
REFUSED = sorted(set(MODEL_TYPES) - set(USABLE))
IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2, 9, 8, 7, 24], [0, 6, 4, 8, 8, 17, 24, 2, 5, 5, 19, 21]])


@functools.cache
def tiny(model_type: str) -> PreTrainedModel:
    """One model per type for all tests here; none of them changes it."""
    return tiny_model(model_type)


def logits(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        given: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits
    return given


def random_row(length: int) -> torch.Tensor:
    return torch.randint(5, 25, (1, length), generator=torch.Generator().manual_seed(0))


def test_the_table_holds_the_types_that_transformers_has_a_masked_lm_for() -> None:
    assert set(MODEL_TYPES) == set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert len(MODEL_TYPES) == 51
    assert list(MODEL_TYPES) == sorted(MODEL_TYPES)


@pytest.mark.parametrize("model_type", USABLE)
def test_adapter_is_right_at_every_step_from_training_to_the_merged_model(model_type: str, tmp_path: Path) -> None:
    record = run_type(model_type, tmp_path)
    assert record.learned > 0.01
    assert record.gradient < (1e-6 if model_type in ONLY_FLOAT32 else 1e-9)
    # in float32 a few steps make more of the rounding of a sum
    assert record.train < (
        1e-4 if model_type in ONLY_FLOAT32 else 1e-12
    )  # the head runs on other rows at a time, which may change the order of a sum
    # not 0: where a tensor lies in memory may change the order of a sum
    assert record.reload < 1e-5
    assert record.reload_float64 < (1e-5 if model_type in ONLY_FLOAT32 else 1e-12)
    assert record.merge < 1e-5
    assert record.merge_float64 < 1e-5
    assert record.parameters == sum(p.numel() for p in tiny(model_type).parameters())


@pytest.mark.parametrize("model_type", USABLE)
def test_a_row_names_head_ties_and_targets_as_the_model_has_them(model_type: str) -> None:
    row, model = MODEL_TYPES[model_type], tiny(model_type)
    model.zero_grad()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.pow(2).sum().backward()

    def used(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool(torch.any(p.grad)) for p in module.parameters())

    outside = {name: module for name, module in model.named_children() if module is not model.base_model}
    assert row.head == tuple(name for name, module in outside.items() if used(module))
    assert model.get_submodule(row.decoder) is model.get_output_embeddings()

    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    assert {frozenset(pair) for pair in row.tied.items()} == {frozenset(n) for n in places.values() if len(n) > 1}
    assert row.decoder_tied == is_tied(model)

    targets, tied = encoder_linears(model), tied_parameters(model)
    language = getattr(model.config, "default_language", None)
    named = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)
        and any(matches(name, wanted.replace("{default_language}", str(language))) for wanted in row.targets)
    ]
    assert named == targets
    assert all(used(model.get_submodule(name)) for name in targets)
    for name, module in model.base_model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{model.base_model_prefix}.{name}" not in targets:
            assert id(module.weight) in tied or not used(module), f"{name} gets a gradient and is no target"


def matches(name: str, wanted: str) -> bool:
    """A last part of a name, or an expression for the whole name."""
    return name.endswith("." + wanted) if re.fullmatch(r"[\w.]+", wanted) else re.fullmatch(wanted, name) is not None


@pytest.mark.parametrize("model_type", USABLE)
def test_a_row_names_the_attention_code_that_the_class_has(model_type: str) -> None:
    row, model = MODEL_TYPES[model_type], tiny(model_type)
    flags = {
        "eager": True,
        "sdpa": model._supports_sdpa,
        "flash_attention_2": model._supports_flash_attn,
        "flex_attention": model._supports_flex_attn,
    }
    assert row.attention == tuple(name for name in EVERY_ATTENTION if flags[name])
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    given = []
    for attention in ("eager", "sdpa"):
        config = copy.deepcopy(model.config)
        if attention in row.attention:
            other = AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()
            other.load_state_dict(model.state_dict())
            given.append(logits(other, mask=mask)[mask.bool()])
        else:
            with pytest.raises(ValueError, match="does not support an attention implementation"):
                AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    assert torch.allclose(given[0], given[-1], atol=1e-5)


@pytest.mark.parametrize("model_type", USABLE)
def test_a_row_tells_whether_activations_can_be_recomputed(model_type: str) -> None:
    row, model = MODEL_TYPES[model_type], tiny_model(model_type).double()
    assert model.supports_gradient_checkpointing == row.checkpointing
    if not row.checkpointing:
        with pytest.raises(ValueError, match="does not support"):
            model.gradient_checkpointing_enable()
        return
    model.train()
    runs: Counter[str] = Counter()
    for name in encoder_linears(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.update([name]))

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the same dropout
        model.zero_grad()
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.pow(2).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept = gradients()
    once = runs.copy()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    assert any(runs[name] == 3 * once[name] for name in once)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("model_type", USABLE)
def test_a_row_tells_what_sets_the_longest_row(model_type: str) -> None:
    row, model = MODEL_TYPES[model_type], tiny(model_type)
    limit = position_limit(model)
    stated: Any = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if row.positions == "none":
        assert (limit, stated) == (None, None)
        assert logits(model, random_row(200)).shape == (1, 200, 25)
        return
    assert limit is not None
    assert limit == stated - (model.config.pad_token_id + 1 if row.positions == "table after padding" else 0)
    assert logits(model, random_row(limit)).shape == (1, limit, 25)
    if row.positions == "config":
        assert logits(model, random_row(limit + 1)).shape == (1, limit + 1, 25)
    else:
        with pytest.raises((IndexError, RuntimeError)):
            logits(model, random_row(limit + 1))


@pytest.mark.parametrize("model_type", USABLE)
def test_a_row_tells_whether_padding_shows_in_the_logits(model_type: str) -> None:
    model = tiny(model_type)
    alone = logits(model)
    padded = torch.cat([IDS, torch.full((2, 5), 1)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 5, dtype=torch.long)], dim=1)
    difference = float((logits(model, padded, mask)[:, : IDS.shape[1]] - alone).abs().max())
    assert (difference > 1e-2) == MODEL_TYPES[model_type].padding_shows, difference
    assert difference > 1e-2 or difference < 1e-5
    told = any("depend on the padding" in notice for notice in notices_of(model.config.to_dict()))
    assert told == MODEL_TYPES[model_type].padding_shows


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_type_that_cannot_serve_is_refused_before_weights_are_looked_for(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    checkpoint = ModelArguments(model_name_or_path=str(tmp_path))
    named = ModelArguments(model_type=model_type, tokenizer_name=str(tmp_path))
    from_config = ModelArguments(config_name=str(tmp_path), tokenizer_name=str(tmp_path))
    for arguments in (checkpoint, named, from_config):
        with pytest.raises(ModelError, match=f"of the type {model_type}, which cannot be adapted here: ") as caught:
            load_base(arguments)
        assert str(MODEL_TYPES[model_type].refusal) in str(caught.value)


def test_what_the_refusals_say_is_so() -> None:
    for model_type in ("bart", "mbart", "mvp"):
        assert AutoConfig.for_model(model_type).is_encoder_decoder
    assert encoder_linears(tiny_model("ibert")) == []

    mra = tiny_model("mra")
    logits_of_mra = mra(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    logits_of_mra.sum().backward()
    assert mra.mra.encoder.layer[0].attention.self.value.weight.grad is None

    assert logits(tiny_model("perceiver")).shape[1] == 64

    reformer, row = tiny_model("reformer"), random_row(64)
    assert not torch.allclose(logits(reformer, row), logits(reformer, row), atol=1e-3)
    with pytest.raises(ValueError, match="axial_pos_shape"):
        reformer.train()(input_ids=random_row(32))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert", "is_decoder": True}, "sees only those before it"),
        ({"model_type": "bert", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "xlm", "causal": True}, "it is causal"),
        ({"model_type": "flaubert", "asm": True}, "adaptive softmax"),
        ({"model_type": "nystromformer", "num_landmarks": 64, "segment_means_seq_len": 512}, "rows of exactly 512"),
        ({"model_type": "yoso", "use_expectation": False}, "random hashes"),
        ({"model_type": "xmod", "languages": ["en_XX", "de_DE"]}, "one of en_XX, de_DE"),
    ],
)
def test_a_setting_with_which_a_type_is_no_plain_masked_lm_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check_config(config, name="this model")
    check_config({"model_type": config["model_type"]}, name="this model")


def test_xmod_takes_its_only_language_and_says_which_it_could_have(tmp_path: Path) -> None:
    letter_tokenizer().save_pretrained(tmp_path)
    only = tiny_config("xmod", languages=["de_DE"], default_language=None)
    only.save_pretrained(tmp_path)
    base = load_base(ModelArguments(config_name=str(tmp_path), tokenizer_name=str(tmp_path)))
    assert base.model.config.default_language == "de_DE"
    assert logits(base.model).shape == (*IDS.shape, 25)
    tiny_config("xmod", default_language=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="one of en_XX, de_DE"):
        load_base(ModelArguments(config_name=str(tmp_path), tokenizer_name=str(tmp_path)))


def test_big_bird_gives_a_long_row_the_same_logits_whatever_came_before(tmp_path: Path) -> None:
    """Plain transformers changes the attention of all later rows at the first short one."""
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    folder = save_base(tmp_path, "big_bird", **sparse)
    plain = AutoModelForMaskedLM.from_pretrained(folder)
    before = logits(plain, random_row(60))
    logits(plain)
    assert not torch.allclose(logits(plain, random_row(60)), before, atol=1e-2)
    base = load_base(ModelArguments(model_name_or_path=str(folder)))
    assert any("full attention" in notice for notice in base.notices)
    before = logits(base.model, random_row(60))
    logits(base.model)
    assert same(logits(base.model, random_row(60)), before)


@pytest.mark.parametrize("model_type", ["modernvbert", "ultravbert"])
def test_the_text_part_of_a_model_from_scratch_takes_the_tokenizers_vocabulary(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type, vocab_size=40, pad_token_id=7).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    base = load_base(ModelArguments(config_name=str(tmp_path), tokenizer_name=str(tmp_path)))
    assert base.model.get_input_embeddings().weight.shape[0] == 25
    assert base.model.config.text_config.pad_token_id == 1
    assert any("images" in notice for notice in base.notices)


def test_attention_code_is_passed_on_and_checked_against_what_the_type_has(tmp_path: Path) -> None:
    folder = str(save_base(tmp_path / "base", "bert"))
    arguments = ModelArguments(model_name_or_path=folder)
    scratch = ModelArguments(config_name=folder, tokenizer_name=folder)
    for way in (arguments, scratch):
        for attention, expected in ((None, "sdpa"), ("eager", "eager"), ("sdpa", "sdpa")):
            model = load_base(replace(way, attn_implementation=attention)).model
            assert model.config._attn_implementation == expected
        with pytest.raises(ModelError, match="eager or sdpa or flash_attention_2 or flex_attention, or leave it out"):
            load_base(replace(way, attn_implementation="sdpaa"))
    folder = str(save_base(tmp_path / "mpnet", "mpnet"))
    with pytest.raises(ModelError, match=r"sdpa, which mpnet models do not have\. Choose eager, or leave it out"):
        load_base(ModelArguments(model_name_or_path=folder, attn_implementation="sdpa"))


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"model_type": "bart"}, {}, "of the type bart, which cannot be adapted here: it is an encoder-decoder"),
        ({"model_type": "deberta-v2"}, {"attn_implementation": "sdpa"}, "Choose eager, or leave it out"),
        ({"model_type": "albert"}, {"activation_checkpointing": True}, "activation_checkpointing: albert models"),
        ({"model_type": "bert", "is_decoder": True}, {}, "sees only those before it"),
        ({"model_type": "deberta"}, {"bf16": True}, "deberta models fail under mixed precision"),
    ],
)
def test_a_local_folder_is_refused_before_torch_is_imported(
    config: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = [f"--{name}={value}" for name, value in options.items()]
    arguments = [f"--model_name_or_path={tmp_path}", "--train_file=x.txt", f"--output_dir={tmp_path}/run", "--use_lora"]
    program = (
        "import sys; from peft_mlm.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *arguments, *words], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert said in done.stderr


def test_recomputing_activations_is_refused_where_only_the_loaded_model_tells(
    tmp_path: Path, base_folder: Path
) -> None:
    text = save_texts(tmp_path / "text.txt", 40)
    arguments: dict[str, Any] = {
        "model_type": "mpnet",
        "config_overrides": "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,intermediate_size=64",
        "tokenizer_name": base_folder,
        "train_file": text,
        "output_dir": tmp_path / "run",
        "activation_checkpointing": True,
    }
    with pytest.raises(ModelError, match="mpnet models have none"):
        train(arguments)


def test_recomputed_activations_train_the_same_adapter(tmp_path: Path, base_folder: Path) -> None:
    text = save_texts(tmp_path / "text.txt", 60)
    arguments: dict[str, Any] = {
        "model_name_or_path": base_folder,
        "train_file": text,
        "use_lora": True,
        "max_steps": 3,
        "do_eval": False,
        "learning_rate": 1e-2,
    }
    models = [
        train({**arguments, "output_dir": tmp_path / str(on), "activation_checkpointing": on}).model
        for on in (False, True)
    ]
    assert torch.allclose(logits(models[0]), logits(models[1]), atol=1e-5)


def test_tapas_tokenizer_gives_rows_of_plain_text(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EMPTY]", "one", "two"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert special_token_frame(TapasTokenizer(str(tmp_path / "vocab.txt"))) == ([2], [3])


@pytest.mark.parametrize("model_type", USABLE)
def test_a_row_tells_in_which_precision_a_type_computes(model_type: str) -> None:
    row, model = MODEL_TYPES[model_type], tiny_model(model_type)
    full = logits(model)

    def tried(model: Any, **autocast: Any) -> bool:
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
                given = logits(model)
        except (RuntimeError, NotImplementedError):
            return False
        assert float((given - full).abs().max()) < 0.3  # bfloat16 keeps three digits
        return True

    assert tried(model) == row.mixed_precision
    assert tried(model.bfloat16(), enabled=False) == row.half


def test_weights_in_16_bits_are_refused_where_a_type_cannot_compute_in_them(tmp_path: Path) -> None:
    folder = save_base(tmp_path, "fnet")
    with pytest.raises(ModelError, match=r"dtype is bfloat16, which fnet models cannot compute in"):
        load_base(ModelArguments(model_name_or_path=str(folder), dtype="bfloat16"))
    half = AutoModelForMaskedLM.from_pretrained(folder).half()
    half.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"dtype is float16, which fnet models cannot compute in"):
        load_base(ModelArguments(model_name_or_path=str(folder), dtype="auto"))
    assert load_base(ModelArguments(model_name_or_path=str(folder))).model.dtype == torch.float32
