from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, PreTrainedModel

import peft_mlm
from peft_mlm import collator
from peft_mlm.adapter import Plan, load_adapter, plan_adapter, save_adapter
from peft_mlm.arguments import PEFTArguments
from peft_mlm.data_passes import DataPass
from peft_mlm.errors import AdapterError
from peft_mlm.initialization import initialise, rewrite_for_untouched_base
from peft_mlm.merging import merge_adapter
from peft_mlm.run_folder import RunFolder
from tests.tiny import difference, letter_texts, letter_tokenizer, logits_at, perturb, save_base, save_texts, tiny_model

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])
ROWS = Dataset.from_dict({"input_ids": letter_tokenizer()(letter_texts(64))["input_ids"]})
EDITING = ["pissa", "pissa_niter_4", "olora", "lora_ga", "corda"]


def data_pass(*, batches: int = 4, **options: Any) -> DataPass:
    masking = collator.from_tokenizer(letter_tokenizer(), seed=3, **options)
    return DataPass(ROWS, masking, 8, 0, torch.device("cpu"), batches)


def no_float_base() -> PreTrainedModel:
    raise AssertionError("only LoftQ reads the base a second time")


def planned(model: PreTrainedModel, start: str, **options: Any) -> Plan:
    tokens = options.pop("new_token_ids", ())
    # PEFT's own configuration wants scipy for LoftQ, which our start does not need
    init = "true" if start == "loftq" else start
    arguments = PEFTArguments(use_lora=True, init_lora_weights=init, **{"lora_r": 4, **options})
    plan = plan_adapter(model, arguments, new_token_ids=tokens)
    plan.config.init_lora_weights = start if start == "loftq" else plan.config.init_lora_weights
    return plan


def started(model: PreTrainedModel, start: str, data: DataPass | None = None, **options: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(3)
    plan = planned(model, start, **options)
    return initialise(model, plan, data=data or data_pass(), load_float_base=no_float_base)


def save(model: PeftModel, initial: Any, folder: Path) -> Path:
    save_adapter(model, folder, base_name="base")
    if initial:
        rewrite_for_untouched_base(folder, initial)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    return logits_at(model, IDS)


@pytest.mark.parametrize("start", [*EDITING, "eva", "mica"])
@pytest.mark.parametrize("model_type", ["bert", "albert", "deberta-v2", "modernbert"])
def test_an_adapter_starts_as_the_base_and_fits_the_untouched_one(start: str, model_type: str, tmp_path: Path) -> None:
    base = tiny_model(model_type)
    before, weights = logits(base), {name: p.detach().clone() for name, p in base.named_parameters()}
    model, initial = started(base, start)
    assert bool(initial) == (start in EDITING)
    edited = any(not torch.equal(base.get_submodule(n).base_layer.weight, weights[f"{n}.weight"]) for n in initial)
    assert edited == bool(initial)
    assert difference(logits(model), before) < 1e-5
    perturb(model)
    trained = logits(model)
    assert difference(trained, before) > 0.1
    folder = save(model, initial, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_model(model_type), folder)
    assert difference(logits(plain), trained) < 1e-5
    report = merge_adapter(plain, letter_tokenizer(), tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert report.max_abs_logit_diff < 1e-5
    assert difference(logits(merged), trained) < 1e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == (True if initial else start)
    assert config["r"] == (8 if initial else 4)


@pytest.mark.parametrize("start", ["pissa_niter_4", "lora_ga"])
def test_as_plain_peft_saves_it_such_an_adapter_is_another_on_the_untouched_base(start: str, tmp_path: Path) -> None:
    model, initial = started(tiny_model("bert"), start)
    perturb(model, scale=0.02)
    save(model, None, tmp_path / "plain")
    save(model, initial, tmp_path / "ours")
    torch.manual_seed(99)
    plain = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "plain")
    ours = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "ours")
    assert difference(logits(plain), logits(model)) > 1e-2
    assert difference(logits(ours), logits(model)) < 1e-5


@pytest.mark.parametrize("start", [*EDITING, "eva"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"query": 6}, "alpha_pattern": {"value": 3.0}},
        {"use_dora": True, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]},
        {"new_token_ids": (23, 24), "lora_target_modules": ["query", "dense"], "lora_alpha": 5.0},
    ],
    ids=["rslora-patterns", "dora-dropout-head", "token-rows"],
)
def test_what_else_an_adapter_holds_is_saved_with_it(start: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's own conversion refuses rsLoRA with patterns, and loses magnitudes, trained modules and token rows."""
    model, initial = started(tiny_model("roberta"), start, **options)
    assert difference(logits(model), logits(tiny_model("roberta"))) < 1e-5
    perturb(model)
    again = load_adapter(tiny_model("roberta"), save(model, initial, tmp_path / "adapter"))
    assert difference(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize("start", ["eva", "lora_ga", "corda"])
def test_a_pass_over_data_ignores_padding_and_dropout_and_leaves_generators_alone(start: str) -> None:
    results = []
    for options in ({}, {"pad_to": 60}):
        base = tiny_model("roberta", hidden_dropout_prob=0.5)
        base.train()
        random.seed(1)
        np.random.seed(1)
        model, _ = started(base, start, data_pass(**options))
        assert model.training
        results.append({n: p.detach() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n})
        assert random.random() == random.Random(1).random()
        assert np.random.random() == np.random.RandomState(1).random()
    for name, tensor in results[0].items():
        # directions, whose sign is free
        assert torch.allclose(tensor.abs(), results[1][name].abs(), atol=2e-3), name


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_how_long_a_pass_is_has_no_effect_on_what_is_drawn_after_it(start: str) -> None:
    states = []
    for batches in (3, 5):
        started(tiny_model("roberta"), start, data_pass(batches=batches), lora_r=2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def layer_inputs(model: PreTrainedModel, name: str, data: DataPass) -> torch.Tensor:
    """The inputs (N, H) of a layer at all real tokens of a pass, in float64."""
    kept: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    rows = []
    with torch.no_grad():
        for batch in data.load():
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            rows.append(kept.pop()[batch["attention_mask"].bool()])
    handle.remove()
    return torch.cat(rows).double()


NAME = "roberta.encoder.layer.1.attention.self.query"


def matrices(model: PeftModel, name: str = NAME) -> tuple[torch.Tensor, torch.Tensor, float]:
    layer = model.get_base_model().get_submodule(name)
    pair = (layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double())
    return *pair, layer.scaling["default"]


def test_eva_finds_the_principal_directions_and_moves_rank_between_layers(tmp_path: Path) -> None:
    inputs = layer_inputs(tiny_model("roberta"), NAME, data_pass())
    model, _ = started(tiny_model("roberta"), "eva")
    a, b, _ = matrices(model)
    assert torch.count_nonzero(b) == 0
    centred = inputs - inputs.mean(dim=0)
    best = torch.linalg.svdvals(centred)[: len(a)].square().sum()
    basis = torch.linalg.qr(a.T).Q
    assert (centred @ basis).square().sum() > 0.97 * best
    config = model.peft_config["default"]
    assert config.rank_pattern
    ranks = [p.shape[0] for name, p in model.named_parameters() if "lora_A" in name]
    assert sum(ranks) == 4 * 12
    assert len(set(ranks)) > 1


def test_lora_ga_takes_its_directions_from_the_gradient_of_the_loss_without_dropout() -> None:
    base = tiny_model("roberta", hidden_dropout_prob=0.5)
    twin = tiny_model("roberta", hidden_dropout_prob=0.5).double().eval()
    layer = twin.get_submodule(NAME)
    for batch in data_pass().load():
        labels = batch.pop("labels")
        chosen = labels != -100
        torch.autograd.backward(functional.cross_entropy(twin(**batch).logits[chosen], labels[chosen]))
    _, _, vh = torch.linalg.svd(layer.weight.grad)
    model, _ = started(base, "lora_ga")
    a, _, _ = matrices(model)
    within = a @ vh[:8].T @ vh[:8]
    assert (a - within).norm() < 1e-3 * a.norm()


def test_lora_ga_serves_a_model_that_changes_outputs_in_place() -> None:
    """PEFT's own preprocessing fails on it."""
    base = tiny_model("longformer", attention_window=8)
    before = logits(base)
    model, initial = started(base, "lora_ga")
    assert initial
    assert difference(logits(model), before) < 1e-5


@pytest.mark.parametrize("kind", ["ipm", "kpm"])
def test_corda_splits_the_weight_by_its_inputs(kind: str) -> None:
    base = tiny_model("roberta")
    inputs = layer_inputs(base, NAME, data_pass())
    covariance = inputs.T @ inputs / len(inputs)
    covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
    weight = base.get_submodule(NAME).weight.detach().double()
    u, s, vh = torch.linalg.svd(weight @ covariance)
    part = slice(0, 4) if kind == "ipm" else slice(-4, None)
    expected = u[:, part] * s[part] @ vh[part] @ torch.linalg.inv(covariance)
    plan = planned(base, "corda")
    plan.config.corda_config = {"corda_method": kind}
    plan.config.__post_init__()  # makes PEFT's own record of the dict, as its constructor does
    model, _ = initialise(base, plan, data=data_pass(), load_float_base=no_float_base)
    a, b, scaling = matrices(model)
    assert torch.allclose(scaling * b @ a, expected, atol=1e-5 * expected.abs().max().item() + 1e-6)


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("float"))


def quantised(folder: Path, kind: str = "nf4") -> PreTrainedModel:
    recipe = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=recipe, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # which would pack and round the weights at an evaluation
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loftq_starts_at_what_the_base_has_lost(kind: str, float_folder: Path, tmp_path: Path) -> None:
    whole, base = AutoModelForMaskedLM.from_pretrained(float_folder).eval(), quantised(float_folder, kind)
    packed = base.get_submodule(NAME).weight.data.clone()
    expected, lost = logits(whole), difference(logits(base), logits(whole))
    plan = planned(base, "loftq", lora_r=8, lora_alpha=4.0)
    model, initial = initialise(base, plan, data=data_pass(), load_float_base=lambda: whole)
    assert not initial
    assert torch.equal(base.get_submodule(NAME).base_layer.weight.data, packed)
    assert (logits(model) - expected).norm() < 0.9 * (logits(quantised(float_folder, kind)) - expected).norm()
    assert lost > 1e-3

    from peft.utils.integrations import dequantize_module_weight

    held = dequantize_module_weight(base.get_submodule(NAME).base_layer).double()
    residual = whole.get_submodule(NAME).weight.detach().double() - held
    a, b, scaling = matrices(model)
    left = (residual - scaling * b @ a).norm().item()
    assert left == pytest.approx(torch.linalg.svdvals(residual)[8:].square().sum().sqrt().item(), rel=1e-4)

    perturb(model)
    again = load_adapter(quantised(float_folder, kind), save(model, initial, tmp_path / "adapter"))
    assert difference(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("start", "base", "said"),
    [
        ("pissa", "bfloat16", "--dtype float32"),
        ("lora_ga", "bfloat16", "--dtype float32"),
        ("olora", "nf4", "no quantised base"),
        ("corda", "nf4", "no quantised base"),
        ("pissa", "embedding", "is for linear layers"),
        ("eva", "embedding", "is for linear layers"),
        ("loftq", "float", "--load_in_4bit"),
        ("loftq", "nf4", "the checkpoint itself is quantised"),
    ],
)
def test_a_start_that_would_be_wrong_on_this_base_is_refused(
    start: str, base: str, said: str, float_folder: Path
) -> None:
    plan = planned(tiny_model("roberta"), start)
    model = quantised(float_folder) if base == "nf4" else tiny_model("roberta")
    if base == "embedding":
        plan = replace(plan, target_modules=("roberta.embeddings.position_embeddings",))
    model = model.to(torch.bfloat16) if base == "bfloat16" else model
    with pytest.raises(AdapterError, match=said):
        initialise(model, plan, data=data_pass(), load_float_base=lambda: quantised(float_folder))


@pytest.mark.parametrize("start", EDITING)
def test_a_rank_beyond_the_weights_is_refused(start: str) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights {start}"):
        started(tiny_model("roberta"), start, lora_r=40)


def test_eva_that_does_not_settle_is_refused_with_a_remedy() -> None:
    base = tiny_model("roberta")
    plan = planned(base, "eva")
    plan.config.eva_config.tau = 1.5  # no cosine is above 1
    with pytest.raises(AdapterError, match=r"lower tau than 1\.5"):
        initialise(base, plan, data=data_pass(batches=1), load_float_base=no_float_base)


def run_arguments(base: Path, text: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(base),
        "train_file": str(text),
        "validation_split_percentage": 20,
        "rows": "line",
        "output_dir": str(folder),
        "use_lora": True,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "use_cpu": True,
        **more,
    }


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_texts(tmp_path_factory.mktemp("short") / "letters.txt", 80)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "rank_pattern": {"query": 6}},
        {"init_lora_weights": "lora_ga", "modules_to_save": ["lm_head"], "use_lorafa": True},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "corda", "use_dora": True, "loraplus_lr_ratio": 4.0},
    ],
    ids=lambda options: options["init_lora_weights"],
)
def test_a_resumed_run_ends_exactly_as_one_that_was_never_stopped(
    options: dict[str, Any], float_folder: Path, short_text: Path, tmp_path: Path
) -> None:
    whole = peft_mlm.train(run_arguments(float_folder, short_text, tmp_path / "run", **options))
    run = RunFolder(whole.run_folder)
    kept, losses = whole.model.state_dict(), run.metrics.read_text()
    for place in (run.adapter, run.checkpoints / "checkpoint-6"):
        loaded = peft_mlm.load(str(place)).model
        assert difference(logits(loaded), logits(whole.model)) < 1e-5, place
    assert peft_mlm.evaluate(str(run.path))["loss"] == pytest.approx(whole.metrics["adapted"]["loss"], rel=1e-5)
    assert peft_mlm.merge(str(run.path), tmp_path / "merged")["max_abs_logit_diff"] < 1e-5

    shutil.rmtree(run.checkpoints / "checkpoint-6")  # as if it had been killed after step 3
    resumed = peft_mlm.train(run.arguments, flags=["--resume_from_checkpoint", "true"])
    assert [json.loads(line).get("loss") for line in run.metrics.read_text().splitlines()] == [
        json.loads(line).get("loss") for line in losses.splitlines()
    ]
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_the_best_checkpoint_is_taken_back_and_gone_on_from(
    float_folder: Path, short_text: Path, tmp_path: Path
) -> None:
    options = run_arguments(
        float_folder,
        short_text,
        tmp_path / "run",
        init_lora_weights="pissa_niter_4",
        learning_rate=0.02,
        lr_scheduler_type="constant",
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        eval_steps=2,
        save_steps=2,
    )
    result = peft_mlm.train(options)
    run = RunFolder(result.run_folder)
    best = result.metrics["best_checkpoint_step"]
    assert best < 6
    expected = logits(peft_mlm.load(str(run.checkpoints / f"checkpoint-{best}")).model)
    assert difference(logits(result.model), expected) < 1e-5
    assert difference(logits(peft_mlm.load(str(run.path)).model), expected) < 1e-5

    more = {name: value for name, value in options.items() if name not in ("lora_r", "lora_dropout", "use_lora")}
    more |= {"adapter_name_or_path": str(run.adapter), "output_dir": str(tmp_path / "more"), "learning_rate": 1e-3}
    del more["init_lora_weights"]
    second = peft_mlm.train(more)
    assert second.metrics["base"]["loss"] == pytest.approx(result.metrics["adapted"]["loss"], rel=1e-5)


def test_a_run_says_what_its_start_means(
    float_folder: Path, short_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="peft_mlm"):
        peft_mlm.train(
            run_arguments(float_folder, short_text, tmp_path / "run", init_lora_weights="pissa", max_steps=1)
        )
    assert "plain LoRA of twice the rank, for the base as it was" in caplog.text
    assert "does not start as the base" not in caplog.text


def test_a_layer_that_no_gradient_reaches_keeps_its_weight_and_is_saved_at_the_same_rank(tmp_path: Path) -> None:
    base = tiny_model("bert")
    plan = planned(base, "lora_ga", lora_target_modules=["query"])
    plan = replace(plan, target_modules=(*plan.target_modules, "cls.predictions.transform.dense"))
    plan.config.target_modules = list(plan.target_modules)
    frozen = base.cls.predictions.transform.dense.weight.detach().clone()
    before = logits(base)
    torch.manual_seed(3)
    handle = base.cls.predictions.transform.dense.register_forward_pre_hook(lambda *_: None)
    model, initial = initialise(base, plan, data=data_pass(), load_float_base=no_float_base)
    handle.remove()
    initial.pop("cls.predictions.transform.dense")  # as if no gradient had reached it
    layer = model.get_base_model().cls.predictions.transform.dense
    layer.base_layer.weight.data = frozen.clone()
    torch.nn.init.zeros_(layer.lora_B["default"].weight)
    assert difference(logits(model), before) < 1e-5
    perturb(model)
    again = PeftModel.from_pretrained(tiny_model("bert"), save(model, initial, tmp_path / "adapter"))
    assert difference(logits(again), logits(model)) < 1e-5


def test_plain_starts_need_no_pass_and_no_second_base() -> None:
    base = tiny_model("roberta")
    plan = planned(base, "true")
    torch.manual_seed(5)
    model, initial = initialise(base, plan, data=data_pass(), load_float_base=no_float_base)
    other = tiny_model("roberta")
    torch.manual_seed(5)
    twin = get_peft_model(other, plan.config)
    assert not initial
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, other), name
