from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, AdamssConfig, PeftModel, get_peft_model

from peft_mlm import collator
from peft_mlm.adapter import load_adapter
from peft_mlm.errors import AdapterError
from peft_mlm.merging import merge_adapter
from peft_mlm.rank_schedule import (
    check_rank_schedule,
    describe_ranks,
    has_rank_schedule,
    orthogonal_penalty,
    planned_steps,
    settle_ranks,
)
from peft_mlm.run_folder import RunFolder
from peft_mlm.saving import saver
from peft_mlm.trainer import MaskedLMTrainer
from peft_mlm.training_arguments import build_training_arguments
from tests.tiny import difference, letter_texts, letter_tokenizer, logits_at, same, tiny_model

TARGETS = r".*\.(query|value)"
LAYERS = 4
QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])


def letter_rows(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"input_ids": letter_tokenizer()(letter_texts(count, seed=seed))["input_ids"]})


def adalora(*, seed: int = 5, dropout: float = 0.0, **options: Any) -> PeftModel:
    base = tiny_model("roberta", **QUIET)
    torch.manual_seed(seed)
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2, "total_step": 100, **options}
    return get_peft_model(base, AdaLoraConfig(target_modules=TARGETS, lora_alpha=8, lora_dropout=dropout, **schedule))


def adamss(**options: Any) -> PeftModel:
    base = tiny_model("roberta", **QUIET)
    torch.manual_seed(5)
    schedule = {"asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 6, "mask_interval": 2, **options}
    return get_peft_model(
        base, AdamssConfig(target_modules=TARGETS, r=8, num_subspaces=3, subspace_rank=1, use_asa=True, **schedule)
    )


def make_trainer(folder: Path, model: PeftModel, rows: Dataset, **settings: Any) -> MaskedLMTrainer:
    folder.mkdir(parents=True, exist_ok=True)
    run, tokenizer = RunFolder(folder), letter_tokenizer()
    values = {
        "learning_rate": 1e-2,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_steps": 10,
        **settings,
    }
    return MaskedLMTrainer(
        model=model,
        args=build_training_arguments(values, run.checkpoints),
        train_dataset=rows,
        eval_dataset=letter_rows(16, seed=9),
        processing_class=tokenizer,
        data_collator=collator.from_tokenizer(tokenizer, seed=3, fixed=True),
        eval_collator=collator.from_tokenizer(tokenizer, seed=0, fixed=True),
        save=saver(base_name="base", tokenizer=tokenizer, tokenizer_changed=False),
        run=run,
    )


def logged(folder: Path, key: str) -> list[Any]:
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def logits(model: torch.nn.Module) -> torch.Tensor:
    return logits_at(model, IDS)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_adalora_equals_a_plain_loop_on_plain_peft(accumulated: int, tmp_path: Path) -> None:
    """Trainer alone never allocates, and PEFT's penalty never reaches a loss that Trainer computes."""
    rows = letter_rows(40)
    model, twin = adalora().double(), adalora().double()
    twin.load_state_dict(model.state_dict())
    sizes = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    make_trainer(tmp_path, model, rows, **sizes).train()

    masking = collator.from_tokenizer(letter_tokenizer(), seed=3, fixed=True)
    twin.peft_config["default"].total_step = 10
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    twin.train()
    losses = []
    for step in range(1, 11):
        first = 8 * ((step - 1) % 5)
        batch = masking([rows[i] for i in range(first, first + 8)])
        loss = twin.base_model(**batch).loss  # AdaLoraModel.forward adds the penalty; PeftModel.forward goes past it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        twin.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert logged(tmp_path, "loss") == pytest.approx(losses, rel=1e-5)
    assert all(0 < penalty < loss for penalty, loss in zip(logged(tmp_path, "orthogonal_penalty"), losses, strict=True))
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-8), name
    assert model.peft_config["default"].rank_pattern == twin.peft_config["default"].rank_pattern


def test_the_budget_falls_to_its_target_and_stands_in_every_log(tmp_path: Path) -> None:
    model = adalora()
    make_trainer(tmp_path, model, letter_rows(40), per_device_train_batch_size=8, eval_steps=5).train()
    budgets = logged(tmp_path, "rank_budget")
    assert len(budgets) == len(RunFolder(tmp_path).metrics.read_text().splitlines())
    by_step = dict(
        zip(logged(tmp_path, "step"), zip(budgets, logged(tmp_path, "rank_total"), strict=True), strict=True)
    )
    assert by_step[1] == by_step[2] == (4 * LAYERS, 4 * LAYERS)
    assert by_step[8] == by_step[10] == (2 * LAYERS, 2 * LAYERS)
    steps = sorted(by_step)
    assert all(by_step[one] >= by_step[next_] for one, next_ in itertools.pairwise(steps))
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 2 * LAYERS


def test_any_checkpoint_of_adalora_reloads_and_merges_as_the_model_was_then(tmp_path: Path) -> None:
    """With plain PEFT, directions that learn on between two allocations are lost when it saves."""
    model = adalora(deltaT=3)
    trainer = make_trainer(tmp_path, model, letter_rows(40), save_strategy="steps", save_steps=1)
    then: dict[int, torch.Tensor] = {}
    write = trainer.save_into

    def save(current: torch.nn.Module, folder: Path) -> None:
        write(current, folder)
        then[trainer.state.global_step] = logits(current)
        current.train()

    trainer.save_into = save
    trainer.train()
    ranks = {}
    for step, expected in then.items():
        again = load_adapter(tiny_model("roberta", **QUIET), tmp_path / "checkpoints" / f"checkpoint-{step}")
        assert difference(logits(again), expected) < 1e-6, step
        ranks[step] = sum(p.shape[0] for n, p in again.named_parameters() if "lora_E" in n)
    assert ranks[10] == 2 * LAYERS < ranks[1]
    report = merge_adapter(again, letter_tokenizer(), tmp_path / "merged")
    assert report.max_abs_logit_diff < 1e-5


@pytest.mark.parametrize("stop", [4, 7, 9])
@pytest.mark.parametrize("method", ["adalora", "adamss"])
def test_a_resumed_schedule_ends_exactly_as_one_that_was_never_stopped(method: str, stop: int, tmp_path: Path) -> None:
    def fresh(seed: int) -> PeftModel:
        return adalora(dropout=0.1, seed=seed) if method == "adalora" else adamss()

    settings = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    whole = fresh(5)
    make_trainer(tmp_path, whole, letter_rows(40), **settings).train()
    figures = logged(tmp_path, "rank_total" if method == "adalora" else "active_subspaces")
    for step in range(stop + 1, 11):
        shutil.rmtree(tmp_path / "checkpoints" / f"checkpoint-{step}")
    RunFolder(tmp_path).metrics.unlink()
    resumed = fresh(6)
    trainer = make_trainer(tmp_path, resumed, letter_rows(40), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{stop}"))
    assert logged(tmp_path, "rank_total" if method == "adalora" else "active_subspaces") == figures[stop:]
    kept = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_adamss_equals_a_plain_loop_on_plain_peft(tmp_path: Path) -> None:
    rows = letter_rows(40)
    model, twin = adamss(), adamss()
    start = describe_ranks(model, 0)["active_subspaces"]
    make_trainer(tmp_path, model, rows, per_device_train_batch_size=8).train()

    masking = collator.from_tokenizer(letter_tokenizer(), seed=3, fixed=True)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    twin.train()
    for step in range(1, 11):
        first = 8 * ((step - 1) % 5)
        twin(**masking([rows[i] for i in range(first, first + 8)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        twin.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name  # AdaMSS computes in float32
        assert one.requires_grad == other.requires_grad, name
    assert logged(tmp_path, "active_subspaces")[-1] <= 3 < start


def test_the_best_checkpoint_of_adalora_is_taken_back(tmp_path: Path) -> None:
    model = adalora()
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 0.5,  # far too high: it gets worse soon
        "load_best_model_at_end": True,
        "metric_for_best_model": "perplexity",
    }
    trainer = make_trainer(tmp_path, model, letter_rows(40), **settings)
    trainer.train()
    assert trainer.state.best_global_step < 10
    best = load_adapter(tiny_model("roberta", **QUIET), Path(trainer.state.best_model_checkpoint))
    assert difference(logits(model), logits(best)) < 1e-6
    trainer.save_into(model, tmp_path / "adapter")
    again = load_adapter(tiny_model("roberta", **QUIET), tmp_path / "adapter")
    assert difference(logits(again), logits(best)) < 1e-6


def test_training_goes_on_from_a_saved_adalora_adapter_with_the_ranks_it_has(tmp_path: Path) -> None:
    model = adalora()
    trainer = make_trainer(tmp_path / "one", model, letter_rows(40))
    trainer.train()
    trainer.save_into(model, tmp_path / "adapter")
    more = load_adapter(tiny_model("roberta", **QUIET), tmp_path / "adapter", is_trainable=True)
    assert difference(logits(more), logits(model)) < 1e-6
    assert not has_rank_schedule(more)
    assert has_rank_schedule(adalora())
    before = {name: p.detach().clone() for name, p in more.named_parameters() if "lora_" in name}
    assert all(p.requires_grad for name, p in more.named_parameters() if "lora_" in name)
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    trainer = make_trainer(tmp_path / "two", more, letter_rows(40), **settings)
    trainer.train()
    assert sum(p.shape[0] for n, p in more.named_parameters() if "lora_E" in n) == 2 * LAYERS
    moved = [name for name, p in more.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(moved) == len([name for name in before if before[name].numel()])

    resumed = load_adapter(tiny_model("roberta", **QUIET), tmp_path / "adapter", is_trainable=True)
    trainer = make_trainer(tmp_path / "two", resumed, letter_rows(40), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoints" / "checkpoint-5"))
    assert same(logits(resumed), logits(more))
    trainer.save_into(resumed, tmp_path / "again")
    reloaded = load_adapter(tiny_model("roberta", **QUIET), tmp_path / "again")
    assert difference(logits(reloaded), logits(more)) < 1e-6


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"target_r": 4}, 10, "smaller target_r"),
        ({"tinit": 6, "tfinal": 4}, 10, "no time to cut"),
        ({"tinit": 0, "tfinal": 2}, 3, "no time to cut"),
    ],
)
def test_a_schedule_without_time_or_target_is_refused(options: dict[str, int], steps: int, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        check_rank_schedule(adalora(**options).peft_config["default"], steps)


def test_a_run_that_ends_before_adamss_has_paused_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="10 steps"):
        make_trainer(tmp_path, adamss(final_warmup=20), letter_rows(40)).train()


def test_the_penalty_is_for_adalora_alone() -> None:
    assert orthogonal_penalty(tiny_model("roberta")) is None
    assert orthogonal_penalty(adamss()) is None
    penalty = orthogonal_penalty(adalora(orth_reg_weight=0.25))
    twice = orthogonal_penalty(adalora(orth_reg_weight=0.5))
    assert penalty is not None
    assert twice is not None
    assert twice.item() == pytest.approx(2 * penalty.item())
    settle_ranks(adalora())  # nothing has been cut yet: nothing to settle


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (37, {"num_train_epochs": 3}),
        (37, {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2}),
        (37, {"num_train_epochs": 2, "dataloader_drop_last": True}),
        (37, {"max_steps": 4, "num_train_epochs": 9}),
        (3, {"num_train_epochs": 2, "gradient_accumulation_steps": 4}),
    ],
)
def test_planned_steps_are_those_that_trainer_makes(count: int, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = letter_rows(count)
    trainer = make_trainer(tmp_path, adalora(), rows, **{"max_steps": -1, "per_device_train_batch_size": 8, **settings})
    expected = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert planned_steps(count, trainer.args) == expected
