"""What the libraries do by default, silently, and what happens here instead: one test per fault.

Each test first shows the library's own result to be wrong, so that it fails, and can go, once a later version is right.
Faults of heads and ties, quantised bases, methods, initialisations and new tokens stand in the tests of these parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

import peft_mlm
from peft_mlm import collator
from peft_mlm.adapter import plan_adapter, wrap
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.config import read_arguments
from peft_mlm.metrics import masked_lm_loss
from peft_mlm.model import load_base
from peft_mlm.packing import make_rows
from peft_mlm.run_folder import RunFolder
from peft_mlm.saving import saver
from peft_mlm.trainer import MaskedLMTrainer
from peft_mlm.training_arguments import build_training_arguments
from tests.tiny import letter_texts, letter_tokenizer, save_base, save_encoder, tiny_model

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def letter_rows(count: int) -> Dataset:
    return Dataset.from_dict({"input_ids": letter_tokenizer()(letter_texts(count))["input_ids"]})


def plain_trainer(folder: Path, model: Any, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", label_names=["labels"], **settings
    )
    masking = DataCollatorForLanguageModeling(letter_tokenizer(), seed=0)
    rows = letter_rows(32)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=masking)
    trainer.remove_callback(PrinterCallback)
    return trainer


def our_trainer(folder: Path, model: Any, **settings: Any) -> MaskedLMTrainer:
    tokenizer, rows, run = letter_tokenizer(), letter_rows(32), RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return MaskedLMTrainer(
        model=model,
        args=build_training_arguments({"use_cpu": True, "report_to": "none", **settings}, run.checkpoints),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator.from_tokenizer(tokenizer, seed=0),
        eval_collator=collator.from_tokenizer(tokenizer, seed=0, fixed=True),
        save=saver(base_name="base", tokenizer=tokenizer, tokenizer_changed=False),
        run=run,
    )


def first_loss(trainer: Trainer) -> float:
    trainer.train()
    return float(next(log["loss"] for log in trainer.state.log_history if "loss" in log))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "albert", "mpnet"])
def test_trainer_multiplies_the_loss_by_the_accumulation_steps(model_type: str, tmp_path: Path) -> None:
    one_step = {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    sizes = ({"per_device_train_batch_size": 16}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4})
    plain, ours = [], []
    for number, size in enumerate(sizes):
        model = tiny_model(model_type, **NO_DROPOUT)
        plain.append(first_loss(plain_trainer(tmp_path / f"p{number}", model, save_strategy="no", **size, **one_step)))
        model = tiny_model(model_type, **NO_DROPOUT)
        ours.append(first_loss(our_trainer(tmp_path / f"o{number}", model, save_strategy="no", **size, **one_step)))
    assert plain[1] > 3 * plain[0]
    assert ours[1] == pytest.approx(ours[0], rel=0.15)  # other masks, since they depend on the place in a batch


def test_trainer_evaluates_the_same_weights_differently_each_time(tmp_path: Path) -> None:
    plain = plain_trainer(tmp_path / "plain", tiny_model("roberta"))
    assert plain.evaluate()["eval_loss"] != pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    ours = our_trainer(tmp_path / "ours", tiny_model("roberta"))
    assert ours.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]


def test_a_batch_without_a_masked_token_is_nan_in_transformers() -> None:
    model, ids = tiny_model("bert"), torch.tensor([[0, 5, 6, 2]])
    labels = torch.full_like(ids, -100)
    assert torch.isnan(model(input_ids=ids, labels=labels).loss)
    assert masked_lm_loss(model, {"input_ids": ids}, labels).item() == 0


def test_peft_ships_no_head_and_a_reload_under_another_seed_is_another_model(tmp_path: Path) -> None:
    encoder, ids = save_encoder(tmp_path / "encoder"), torch.tensor([[0, 5, 6, 4, 8, 2]])

    def loaded(seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModelForMaskedLM.from_pretrained(encoder).eval()

    plain = get_peft_model(loaded(0), LoraConfig(target_modules=["query", "value"])).eval()
    plain.save_pretrained(tmp_path / "plain")
    again = PeftModel.from_pretrained(loaded(1), tmp_path / "plain").eval()
    assert (again(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 1e-2

    torch.manual_seed(0)
    base = load_base(ModelArguments(model_name_or_path=str(encoder)))
    adapted = wrap(base.model, plan_adapter(base.model, PEFTArguments(), fresh_parameters=base.fresh_parameters)).eval()
    saver(base_name=None, tokenizer=base.tokenizer, tokenizer_changed=False)(adapted, tmp_path / "ours")
    torch.manual_seed(1)
    ours = peft_mlm.load(str(tmp_path / "ours"), base=str(encoder)).model
    assert torch.equal(ours(input_ids=ids).logits, adapted(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "esm", "electra", "modernbert", "distilbert"])
def test_all_linear_of_peft_adapts_the_head_and_not_the_decoder(model_type: str) -> None:
    def outside_the_encoder(adapted: Any) -> list[str]:
        base = adapted.get_base_model()
        encoder = {id(module) for module in base.base_model.modules()}
        return [n for n, m in base.named_modules() if n.endswith("lora_A.default") and id(m) not in encoder]

    plain = get_peft_model(tiny_model(model_type), LoraConfig(target_modules="all-linear"))
    assert outside_the_encoder(plain)
    model = tiny_model(model_type)
    ours = wrap(model, plan_adapter(model, PEFTArguments(lora_target_modules=["all-linear"])))
    assert outside_the_encoder(ours) == []


def test_trainer_and_peft_write_the_token_and_the_local_path_beside_the_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "private" / "base")
    one_step = {"max_steps": 1, "save_steps": 1, "hub_token": "hf_secret"}

    def written(folder: Path) -> bytes:
        return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())

    model = get_peft_model(AutoModelForMaskedLM.from_pretrained(base), LoraConfig(target_modules=["query"]))
    plain_trainer(tmp_path / "plain", model, **one_step).train()
    assert b"hf_secret" in written(tmp_path / "plain")
    assert str(base).encode() in written(tmp_path / "plain")

    text = tmp_path / "text.txt"
    text.write_text("\n".join(letter_texts(40)))
    values = {"model_name_or_path": str(base), "train_file": str(text), "output_dir": str(tmp_path / "ours")}
    peft_mlm.train({**values, **one_step, "use_lora": True})
    assert b"hf_secret" not in written(tmp_path / "ours")
    for shipped in ("adapter", "checkpoints"):
        assert str(tmp_path).encode() not in written(tmp_path / "ours" / shipped)


def test_run_mlms_chunks_lack_the_special_tokens_and_lose_a_remainder_and_ours_do_not() -> None:
    tokenizer, texts = letter_tokenizer(), letter_texts(50)

    def framed(rows: list[list[int]]) -> float:
        return sum(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows) / len(rows)

    stream = [token for ids in tokenizer(texts)["input_ids"] for token in ids]  # as group_texts makes its rows
    plain = [stream[start : start + 32] for start in range(0, len(stream) // 32 * 32, 32)]
    assert framed(plain) < 0.2
    assert len(stream) % 32 > 0

    content = Dataset.from_dict({"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]})
    ours, _ = make_rows(content, max_seq_length=32, prefix=[0], suffix=[2], separator_id=None)
    assert framed(ours["input_ids"]) == 1
    assert sum(len(row) - 2 for row in ours["input_ids"]) == sum(len(ids) for ids in content["input_ids"])


@pytest.mark.parametrize("written", ["5e-5", "1e-4"])
def test_numbers_written_as_text_stay_text_in_transformers_parser(written: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"output_dir: x\nlearning_rate: {written}\n")
    (plain,) = HfArgumentParser((TrainingArguments,)).parse_yaml_file(str(tmp_path / "a.yaml"))
    assert plain.learning_rate == written
    ours = read_arguments(tmp_path / "a.yaml", ["--model_name_or_path", "m", "--train_file", "t.txt"])
    assert ours.training["learning_rate"] == float(written)


def test_a_bfloat16_file_trains_in_bfloat16_in_a_plain_script(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    AutoModelForMaskedLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForMaskedLM.from_pretrained(base).dtype == torch.bfloat16
    assert load_base(ModelArguments(model_name_or_path=str(base))).model.dtype == torch.float32
