from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModelForMaskedLM

import peft_mlm
from peft_mlm import collator
from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import PEFTArguments
from peft_mlm.errors import ArgumentsError
from peft_mlm.run_folder import RunFolder
from peft_mlm.saving import saver
from peft_mlm.trainer import MaskedLMTrainer, scores_of
from peft_mlm.training_arguments import build_training_arguments
from tests.tiny import letter_texts, letter_tokenizer, save_texts, tiny_model


def letter_rows(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"input_ids": letter_tokenizer()(letter_texts(count, seed=seed))["input_ids"]})


def make_trainer(folder: Path, model: torch.nn.Module, rows: Dataset, **settings: Any) -> MaskedLMTrainer:
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = letter_tokenizer()
    values = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "save_strategy": "no", **settings}
    return MaskedLMTrainer(
        model=model,
        args=build_training_arguments(values, run.checkpoints),
        train_dataset=rows,
        eval_dataset=letter_rows(24, seed=9),
        processing_class=tokenizer,
        data_collator=collator.from_tokenizer(tokenizer, seed=3),
        eval_collator=collator.from_tokenizer(tokenizer, seed=0, fixed=True),
        save=saver(base_name="base", tokenizer=tokenizer, tokenizer_changed=False),
        run=run,
    )


# Every name under which a config keeps a dropout probability.
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}


def adapted(model_type: str = "roberta", **changes: object) -> torch.nn.Module:
    model = tiny_model(model_type, **changes)
    torch.manual_seed(5)
    return wrap(model, plan_adapter(model, PEFTArguments(use_lora=True, lora_r=4)))


def logs(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("model_type", ["roberta", "bert", "modernbert", "esm", "distilbert", "electra", "deberta-v2"])
def test_loss_and_gradient_norm_do_not_depend_on_accumulation(model_type: str, tmp_path: Path) -> None:
    """Plain Trainer logs them multiplied by the accumulation steps, for most model types."""
    same = {"max_steps": 3, "logging_steps": 1, "max_grad_norm": 1.0, "train_sampling_strategy": "sequential"}
    model = adapted(model_type, **NO_DROPOUT)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    figures = []
    for batch, accumulated in ((16, 1), (4, 4)):
        model.load_state_dict(start)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        folder = tmp_path / f"{model_type}-{accumulated}"
        # masks depend on a row's place in its batch: fixed ones are the same for both
        trainer = make_trainer(folder, model, letter_rows(48), **sizes, **same)
        trainer.data_collator = trainer.eval_collator
        trainer.train()
        figures.append((logs(folder, "loss"), logs(folder, "grad_norm")))
    assert figures[1][0] == pytest.approx(figures[0][0], rel=1e-4)
    assert figures[1][1] == pytest.approx(figures[0][1], rel=1e-3)


def test_training_equals_a_plain_loop(tmp_path: Path) -> None:
    """The same rows, masks and optimiser, written out by hand in float64."""
    rows = letter_rows(32)
    model, twin = (adapted(**NO_DROPOUT).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
    }
    make_trainer(tmp_path, model, rows, **settings).train()

    masking = collator.from_tokenizer(letter_tokenizer(), seed=3)
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    twin.train()
    losses = []
    for epoch in range(2):
        masking.set_epoch(epoch)
        for first in range(0, 32, 8):
            batches = [masking([rows[i] for i in range(start, start + 4)]) for start in (first, first + 4)]
            count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
            optimizer.zero_grad()
            step_loss = 0.0
            for batch in batches:
                labels = batch.pop("labels")
                logits = twin(**batch).logits
                loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
                loss.backward()
                step_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(step_loss)
    assert logs(tmp_path, "loss") == pytest.approx(losses, rel=1e-6)  # Trainer sums them in float32
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9), name


def test_evaluation_is_the_same_for_any_batch_size_and_at_any_time(tmp_path: Path) -> None:
    model, rows = adapted(), letter_rows(50)
    masking = collator.from_tokenizer(letter_tokenizer(), seed=0, fixed=True)
    results = []
    for size in (1, 7, 64):
        arguments = build_training_arguments({"per_device_eval_batch_size": size, "use_cpu": True}, tmp_path)
        results.append(scores_of(model, rows, masking, arguments, label=""))
        torch.rand(5)
    assert len({(r.correct, r.masked) for r in results}) == 1
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)
    assert results[2].loss == pytest.approx(results[0].loss, rel=1e-6)
    selected = rows.select(range(49, -1, -1))  # another order, through an index
    arguments = build_training_arguments({"use_cpu": True}, tmp_path)
    assert scores_of(model, selected, masking, arguments, label="").loss == pytest.approx(results[0].loss, rel=1e-6)


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
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        **more,
    }


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("peft", [True, False])
def test_a_resumed_run_ends_exactly_as_one_that_was_never_stopped(
    peft: bool, workers: int, base_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch: order of the rows, masks, dropout, optimiser and schedule go on."""
    adapter = {} if peft else {"use_lora": False, "lora_r": None, "lora_dropout": None}
    more = {"dataloader_num_workers": workers, "num_train_epochs": 3, **adapter}
    options = {
        k: v for k, v in run_arguments(base_folder, text_file, tmp_path / "whole", **more).items() if v is not None
    }
    whole = peft_mlm.train(options)
    options["output_dir"] = str(tmp_path / "stopped")

    stopped = peft_mlm.train(options)
    run = RunFolder(stopped.run_folder)
    for step in (12, 8):  # as if it had been killed after step 7
        for file in sorted((run.checkpoints / f"checkpoint-{step}").iterdir()):
            file.unlink()
        (run.checkpoints / f"checkpoint-{step}").rmdir()
    resumed = peft_mlm.train(run.arguments, flags=["--resume_from_checkpoint", "true"])
    assert resumed.metrics["adapted"] == whole.metrics["adapted"]
    assert resumed.metrics["base"] == whole.metrics["base"]
    assert logs(run.path, "loss") == logs(whole.run_folder, "loss")
    kept = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_the_best_model_is_kept_and_training_stops_early(base_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = run_arguments(
        base_folder,
        text_file,
        tmp_path / "run",
        max_steps=200,
        learning_rate=0.3,  # far too high: it gets worse soon
        lr_scheduler_type="constant",
        early_stopping_patience=2,
        metric_for_best_model="perplexity",
        eval_steps=2,
        save_steps=2,
    )
    result = peft_mlm.train(options)
    perplexities = logs(result.run_folder, "eval_perplexity")
    assert result.metrics["steps"] < 200
    assert result.metrics["adapted"]["perplexity"] == pytest.approx(min(perplexities), rel=1e-6)
    assert result.metrics["best_checkpoint_step"] == 2 * (1 + perplexities.index(min(perplexities)))


def test_checkpoints_hold_the_adapter_and_no_pickled_arguments(
    base_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    result = peft_mlm.train(run_arguments(base_folder, text_file, tmp_path / "run", max_steps=4))
    files = {file.name for file in (tmp_path / "run" / "checkpoints" / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json"} <= files
    assert not {"training_args.bin", "model.safetensors"} & files
    assert adapter_weights(result.run_folder / "adapter").keys()


def test_full_fine_tuning_saves_a_model_that_plain_transformers_loads(
    base_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = run_arguments(base_folder, text_file, tmp_path / "run", max_steps=4)
    for name in ("use_lora", "lora_r", "lora_dropout"):
        del options[name]
    result = peft_mlm.train(options)
    assert result.metrics["trainable_parameters"] == result.metrics["total_parameters"]
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").eval()
    ids = torch.tensor([[0, 6, 4, 9, 2]])
    assert torch.equal(plain(input_ids=ids).logits, result.model(input_ids=ids).logits)


def test_transformers_own_refusals_are_arguments_errors(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="transformers refuses"):
        build_training_arguments({"optim": "no_such_optimizer"}, tmp_path)


@pytest.mark.parametrize("settings", [{"optim": "galore_adamw"}, {"use_liger_kernel": True}, {"report_to": "swanlab"}])
def test_a_package_that_an_argument_needs_is_named_before_training(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="install"):
        make_trainer(tmp_path, adapted(), letter_rows(4), **settings)


def test_perplexity_as_the_metric_of_the_best_model_counts_down(tmp_path: Path) -> None:
    settings = {"metric_for_best_model": "perplexity", "load_best_model_at_end": True, "eval_strategy": "steps"}
    assert build_training_arguments({**settings, "eval_steps": 500}, tmp_path).greater_is_better is False


def test_a_longer_run_learns(base_folder: Path, tmp_path: Path) -> None:
    """All parameters, from scratch: the letters follow a rule, and it is found."""
    result = peft_mlm.train(
        {
            "model_type": "bert",
            "config_overrides": "hidden_size=64,num_hidden_layers=2,num_attention_heads=4,intermediate_size=128",
            "tokenizer_name": str(base_folder),
            "train_file": str(save_texts(tmp_path / "t.txt", 600, shortest=20)),
            "rows": "line",
            "output_dir": str(tmp_path / "run"),
            "max_steps": 250,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "use_cpu": True,
        }
    )
    before, after = result.metrics["base"], result.metrics["adapted"]
    assert before["accuracy"] < 0.15
    assert after["accuracy"] > 0.25
    assert after["perplexity"] < before["perplexity"] / 1.5
