from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from peft_mlm import collator
from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import AdapterError, ArgumentsError
from peft_mlm.optimizers import freeze_a
from peft_mlm.run_folder import RunFolder
from peft_mlm.saving import saver
from peft_mlm.trainer import MaskedLMTrainer
from peft_mlm.training_arguments import build_training_arguments
from tests.tiny import letter_texts, letter_tokenizer, tiny_model

QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def letter_rows(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"input_ids": letter_tokenizer()(letter_texts(count, seed=seed))["input_ids"]})


def adapted(*, new_tokens: tuple[int, ...] = (), **options: Any) -> PeftModel:
    model = tiny_model("roberta", **QUIET)
    torch.manual_seed(5)
    arguments = PEFTArguments(use_lora=True, lora_r=4, **{"lora_target_modules": ["query", "value"], **options})
    return wrap(model, plan_adapter(model, arguments, new_token_ids=new_tokens))


def make_trainer(folder: Path, model: PeftModel, *, rows: int = 32, **settings: Any) -> MaskedLMTrainer:
    own = {name: settings.pop(name) for name in ("loraplus_lr_ratio", "use_lorafa") if name in settings}
    folder.mkdir(parents=True, exist_ok=True)
    run, tokenizer = RunFolder(folder), letter_tokenizer()
    values = {
        "learning_rate": 1e-2,
        "use_cpu": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "weight_decay": 0.1,
        "logging_steps": 1,
        **settings,
    }
    if own.get("use_lorafa"):
        freeze_a(model)
    return MaskedLMTrainer(
        model=model,
        args=build_training_arguments(values, run.checkpoints),
        train_dataset=letter_rows(rows),
        processing_class=tokenizer,
        data_collator=collator.from_tokenizer(tokenizer, seed=3, fixed=True),
        eval_collator=collator.from_tokenizer(tokenizer, seed=0, fixed=True),
        save=saver(base_name="base", tokenizer=tokenizer, tokenizer_changed=False),
        run=run,
        **own,
    )


def plain_loop(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The rows and masks of `make_trainer`; learning rate falling to zero in a line, as Trainer's default does."""
    rows, masking = letter_rows(32), collator.from_tokenizer(letter_tokenizer(), seed=3, fixed=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        batch = masking([rows[i] for i in range(8 * step, 8 * step + 8)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()


def assert_equal_parameters(one: PeftModel, other: PeftModel, atol: float) -> None:
    for (name, mine), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=atol, rtol=0), name


def rates(trainer: MaskedLMTrainer, model: PeftModel) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    given = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(dict(given)) == len(given)  # none twice
    return dict(given)


def test_loraplus_equals_pefts_own_optimiser_in_a_plain_loop(tmp_path: Path) -> None:
    model, twin = adapted().double(), adapted().double()
    make_trainer(tmp_path, model, loraplus_lr_ratio=8.0, optim="adamw_torch").train()
    optimizer = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, eps=1e-8
    )
    plain_loop(twin, optimizer, steps=4)
    assert_equal_parameters(model, twin, atol=1e-10)


def test_loraplus_raises_the_rate_of_b_alone_and_trains_all_else_as_before(tmp_path: Path) -> None:
    """PEFT's own helper gives the norms and biases of a trained head the rate of B, too."""
    model = adapted(modules_to_save=["lm_head"], use_dora=True, new_tokens=(23, 24))
    given = rates(make_trainer(tmp_path, model, loraplus_lr_ratio=16.0), model)
    assert set(given) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, (rate, decay) in given.items():
        assert rate == pytest.approx(0.16 if "lora_B" in name else 0.01), name
        plain = name.endswith("bias") or "layer_norm" in name
        assert decay == (0.0 if plain else 0.1), name
    assert any("lm_head.layer_norm" in name for name in given)
    assert any("trainable_tokens" in name for name in given)
    assert any("magnitude" in name for name in given)


def test_the_logged_rate_of_loraplus_is_the_plain_one(tmp_path: Path) -> None:
    model = adapted()
    trainer = make_trainer(tmp_path, model, loraplus_lr_ratio=16.0, lr_scheduler_type="constant")
    trainer.train()
    assert {log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log} == {0.01}


def test_lorafa_equals_pefts_own_optimiser_in_a_plain_loop(tmp_path: Path) -> None:
    model, twin = (adapted(rank_pattern={"query": 2}).double() for _ in range(2))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(tmp_path, model, use_lorafa=True, weight_decay=0.0).train()
    optimizer = create_lorafa_optimizer(twin, r=4, lora_alpha=16, lr=1e-2)
    optimizer.param_groups[0]["eps"] = 1e-8  # transformers' adam_epsilon
    plain_loop(twin, optimizer, steps=4)
    assert_equal_parameters(model, twin, atol=1e-10)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "lora_B" in name}


def test_lorafa_trains_the_head_and_new_rows_by_adamw(tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["lm_head"], "new_tokens": (23, 24)}
    model, twin = adapted(**options).double(), adapted(**options).double()
    # one step only: what moves B in LoRA-FA moves the head's gradient from the second step on
    # LoRA-FA's AdamW adds epsilon before the correction of the bias: a tiny one makes both forms equal
    settings: dict[str, Any] = {"max_steps": 1, "lr_scheduler_type": "constant", "adam_epsilon": 1e-14}
    make_trainer(tmp_path, model, use_lorafa=True, **settings).train()
    freeze_a(twin)
    others = [(n, p) for n, p in twin.named_parameters() if p.requires_grad and "lora_" not in n]
    plain = {n for n, _ in others if n.endswith("bias") or "layer_norm" in n}
    groups = [
        {"params": [p for n, p in others if n not in plain], "weight_decay": 0.1},
        {"params": [p for n, p in others if n in plain], "weight_decay": 0.0},
    ]
    plain_loop(twin, torch.optim.AdamW(groups, lr=1e-2, eps=1e-14), steps=1)
    after = dict(model.named_parameters())
    assert {n.split(".default")[0].rsplit(".", 1)[-1] for n, _ in others} >= {"trainable_tokens_delta"}
    for name, parameter in others:
        # LoRA-FA's AdamW decays after its step, torch's before it: they differ by rate^2 * decay
        assert torch.allclose(after[name], parameter, atol=2e-5), name


@pytest.mark.parametrize("kind", ["loraplus_lr_ratio", "use_lorafa"])
def test_a_resumed_run_ends_exactly_as_one_that_was_never_stopped(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["lm_head"], "lora_dropout": 0.1}
    settings: dict[str, Any] = {
        kind: 4.0 if kind == "loraplus_lr_ratio" else True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    settings["max_grad_norm"] = 0.01  # every gradient that is wrongly taken shows in the others
    whole = adapted(**options)
    make_trainer(tmp_path, whole, **settings).train()
    resumed = adapted(**options)
    trained = {name for name, p in resumed.named_parameters() if p.requires_grad}
    trainer = make_trainer(tmp_path, resumed, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert_equal_parameters(resumed, whole, atol=0)
    frozen = {name for name in trained if "lora_A" in name} if kind == "use_lorafa" else set()
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == trained - frozen


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"use_dora": True}, {"use_lorafa": True}, "plain LoRA"),
        ({"init_lora_weights": "mica"}, {"use_lorafa": True}, "mica"),
        ({"init_lora_weights": "mica"}, {"loraplus_lr_ratio": 4.0}, "trains none"),
    ],
)
def test_an_adapter_that_does_not_go_with_the_optimiser_is_refused(
    options: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=said):
        make_trainer(tmp_path, adapted(**options), **settings)


def test_other_methods_and_embeddings_are_refused(tmp_path: Path) -> None:
    config = AdaLoraConfig(target_modules=["query"], total_step=10)
    other = get_peft_model(tiny_model("roberta"), config)
    for settings in ({"use_lorafa": True}, {"loraplus_lr_ratio": 4.0}):
        with pytest.raises(AdapterError, match="adalora"):
            make_trainer(tmp_path, other, **settings)
    # A of an embedding starts at zero: frozen, the adapter would stay zero
    embedding = get_peft_model(tiny_model("roberta"), LoraConfig(target_modules=["query", "position_embeddings"]))
    with pytest.raises(AdapterError, match="linear layers"):
        make_trainer(tmp_path, embedding, use_lorafa=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_lorafa": True, "optim": "sgd"}, "optimiser of its own"),
        ({"use_lorafa": True, "loraplus_lr_ratio": 4.0}, "one of them"),
        ({"loraplus_lr_ratio": 0.0}, "above 0"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match=said):
        make_trainer(tmp_path, adapted(), **settings)


def test_loraplus_goes_with_other_optimisers(tmp_path: Path) -> None:
    for optim in ("adafactor", "adamw_bnb_8bit", "sgd"):
        model = adapted()
        trainer = make_trainer(tmp_path / optim, model, loraplus_lr_ratio=4.0, optim=optim, max_steps=1)
        given = rates(trainer, model)
        assert [rate for name, (rate, _) in given.items() if "lora_B" in name] == [pytest.approx(0.04)] * 4, optim
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
        if optim != "adamw_bnb_8bit":  # its steps run on a GPU
            trainer.train()
            assert all(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in before), optim
