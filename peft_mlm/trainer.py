"""transformers' Trainer with the loss, the evaluation and the checkpoints that masked language models need.

Trainer leaves the division by accumulation steps to models whose forward takes `**kwargs`; most masked LM heads do not
divide, so that loss and gradients come out multiplied. It also averages batches, draws new evaluation masks at every
pass, keeps all logits of an evaluation in memory, and puts a pickle with the hub token beside every checkpoint. None of
this happens here.
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import is_liger_kernel_available

from peft_mlm.batch_finder import train_in_what_fits, use_batch
from peft_mlm.batching import LengthBatches, clusters_of, row_lengths
from peft_mlm.callbacks import EpochOf, EvaluationLines, MetricsFile, show_progress
from peft_mlm.collator import MaskingCollator
from peft_mlm.compiling import compile_layers
from peft_mlm.document_packing import DOCUMENT_NUMBERS
from peft_mlm.errors import ArgumentsError
from peft_mlm.fused_lora import fused_lora
from peft_mlm.gathered_head import Door, base_of, find_door
from peft_mlm.initialization import Matrices
from peft_mlm.live_table import LiveTable, can_draw
from peft_mlm.metrics import MaskedScores, MaskedTokens, evaluate_masked_lm, masked_lm_loss
from peft_mlm.optimizers import check_lorafa, check_loraplus, lorafa_optimizer, loraplus_optimizer
from peft_mlm.out_of_memory import DoesNotFitError, is_out_of_memory
from peft_mlm.rank_schedule import (
    RankSchedule,
    describe_ranks,
    has_rank_schedule,
    load_schedule_state,
    orthogonal_penalty,
)
from peft_mlm.reporting import reports_in
from peft_mlm.resuming import has_training_state, load_training_state, read_schedule_state, write_training_state
from peft_mlm.run_folder import RunFolder, open_to_umask
from peft_mlm.throughput import Throughput


def scores_of(
    model: torch.nn.Module,
    rows: Dataset,
    collator: MaskingCollator,
    arguments: TrainingArguments,
    *,
    label: str,
    door: Door | None = None,
    draws: int = 1,
    keep: Callable[[MaskedTokens], None] | None = None,
    watch: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> MaskedScores:
    """Evaluate a model on rows, longest first, so that batches hold little padding.

    Masks depend on a row's content alone; the order is free.

    Args:
        model: A masked LM on `arguments.device`.
        rows: With `input_ids`.
        collator: Makes batches, with fixed masks.
        arguments: Batch size, device, precision, workers.
        label: What the progress bar says.
        door: From `find_door`; None (default) runs the head at every position.
        draws: How often the rows are masked; the sums are over all draws. Default 1.
        keep: Is given the masked tokens of each batch (of this process).
        watch: Passes the batches on and shows how far it is, by the label; None (default) is a progress bar.

    Returns:
        Sums over all rows (over all processes, where several run), by cluster: by document where rows are cut from
        documents and tell which, else by row.
    """
    order = np.argsort(-row_lengths(rows), kind="stable")
    own = order[arguments.process_index :: arguments.world_size]
    clusters, count = clusters_of(rows, own)
    if DOCUMENT_NUMBERS in rows.column_names:
        rows = rows.remove_columns(DOCUMENT_NUMBERS)
    hidden = watch is not None or not show_progress(arguments)

    def masked(draw: int) -> MaskedScores:
        batches = DataLoader(
            Subset(rows, own.tolist()),
            batch_size=arguments.per_device_eval_batch_size,
            collate_fn=collator.drawn(draw),
            num_workers=arguments.dataloader_num_workers,
        )
        shown = label if draws == 1 else f"{label}, masks {draw + 1}/{draws}"
        # The bar begins an iteration of its own, which draws a random number: a run is the same watched and unwatched.
        bar = tqdm(batches, desc=shown, file=sys.stderr, leave=False, disable=hidden, unit="batch")
        seen = bar if watch is None else watch(bar, shown)
        where = {"device": arguments.device, "autocast": _autocast(arguments), "door": door}
        return evaluate_masked_lm(model, seen, **where, clusters=clusters, count=count, keep=keep)

    return reduce(operator.add, map(masked, range(draws)))


def device_name(device: torch.device) -> str:
    """Name a device as a record of results should.

    Args:
        device: Where a model runs.

    Returns:
        Such as "cpu", or "cuda:0 (NVIDIA GeForce RTX 3060)".
    """
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


class MaskedLMTrainer(Trainer):
    """Trainer for masked language models.

    Args:
        eval_collator: Makes evaluation batches, with fixed masks.
        save: Writes the model (or its adapter) into a folder.
        run: The run folder whose metrics.jsonl gets every log.
        early_stopping: Patience in evaluations and threshold, or None.
        loraplus_lr_ratio: Learning rate of LoRA's B matrices as a multiple of the others' (LoRA+), or None.
        use_lorafa: Whether to train by LoRA-FA's optimiser.
        initial: (A0, B0) by layer, where their product was taken out of the base; `save` must have the same.
        max_tokens: Tokens per training batch at most, in place of a number of rows.
        eval_mask_draws: How often the text is masked where base and trained model are measured; the evaluations of a
            running training are on the first masks alone. Default 1.
        **options: Trainer's own arguments; `data_collator` makes the training batches.

    Raises:
        ArgumentsError: An argument needs a package that is not installed.
        AdapterError: The adapter does not go with LoRA+ or LoRA-FA.
    """

    def __init__(
        self,
        *,
        eval_collator: MaskingCollator,
        save: Callable[[torch.nn.Module, Path], None],
        run: RunFolder,
        early_stopping: tuple[int, float] | None = None,
        loraplus_lr_ratio: float | None = None,
        use_lorafa: bool = False,
        initial: Mapping[str, Matrices] | None = None,
        max_tokens: int | None = None,
        eval_mask_draws: int = 1,
        **options: Any,
    ) -> None:
        try:
            if options["args"].use_liger_kernel and not is_liger_kernel_available():
                raise ImportError("use_liger_kernel needs liger-kernel: pip install liger-kernel")
            super().__init__(**options)
            optimizer = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, ValueError, RuntimeError) as error:
            # a package that --report_to, --optim or --use_liger_kernel needs is missing
            raise ArgumentsError(f"transformers refuses these training arguments: {error}") from error
        if loraplus_lr_ratio is not None and use_lorafa:
            raise ArgumentsError("loraplus_lr_ratio and use_lorafa are two optimisers: leave one of them out.")
        if loraplus_lr_ratio is not None:
            check_loraplus(self.model, loraplus_lr_ratio, *optimizer)
        if use_lorafa:
            check_lorafa(self.model, self.args)
        self.loraplus_lr_ratio, self.use_lorafa = loraplus_lr_ratio, use_lorafa
        self.initial = dict(initial or {})
        self.eval_collator, self.eval_mask_draws = eval_collator, eval_mask_draws
        self.save_into = save
        self.max_tokens = max_tokens
        self.run = run
        # Where it is depends on the layers alone: found once, it serves every evaluation too.
        self.door = find_door(self.model)
        self.scores_at: dict[int, MaskedScores] = {}
        if self.args.torch_compile:
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # it would compile the head as well
            how = {"backend": str(self.args.torch_compile_backend), "mode": self.args.torch_compile_mode}
            compile_layers(base_of(self.model), self.door, device=self.args.device.type, **how)
        # Trainer then counts the masked tokens of all micro-batches of a step, which `compute_loss` divides by.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(EpochOf(self.data_collator))
        self.throughput = Throughput()
        self.live_table = LiveTable(self.throughput)
        for callback in (self.throughput, MetricsFile(run), EvaluationLines(), self.live_table):
            self.add_callback(callback)
        self.schedule = RankSchedule() if has_rank_schedule(self.model) else None
        if (self.initial or self.schedule) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ArgumentsError(
                "A start that takes a part out of the base (init_lora_weights) and ranks that move (adalora, adamss) "
                "need the whole model in each process: leave fsdp and deepspeed out, or use another method or start."
            )
        if self.schedule is not None:
            self.add_callback(self.schedule)
        if early_stopping is not None:
            self.add_callback(EarlyStoppingCallback(*early_stopping))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of rows of like length where asked for (`train_sampling_strategy` group_by_length), else Trainer's.

        Several processes need batches of one size, which Trainer's own sampler gives.
        """
        arguments = self.args
        if self.max_tokens is not None and arguments.world_size > 1:
            raise ArgumentsError(
                "max_tokens_per_batch makes batches of different sizes, which several processes cannot share evenly: "
                "leave it out, or train with one process."
            )
        if arguments.train_sampling_strategy != "group_by_length" or arguments.world_size > 1:
            return super().get_train_dataloader()
        batches = LengthBatches(
            row_lengths(self.train_dataset),
            batch_size=self._train_batch_size,
            max_tokens=self.max_tokens,
            drop_last=arguments.dataloader_drop_last,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        )
        self.add_callback(EpochOf(batches))
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            prefetch_factor=arguments.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, with plain LoRA layers fused where one process holds the whole model."""
        self.scores_at = {}
        whole = not (self.args.torch_compile or self.is_fsdp_enabled or self.is_deepspeed_enabled)
        train = partial(super().train, *args, **options)
        drawn = show_progress(self.args) and can_draw()
        with (
            reports_in(self.run, self.callback_handler.callbacks),
            self.live_table if drawn else nullcontext(),
            fused_lora(self.model) if whole else nullcontext(),
        ):
            return train_in_what_fits(self, train) if self.args.auto_find_batch_size else train()

    def _inner_training_loop(self, batch_size: int | None = None, **options: Any) -> Any:
        """Train; a full memory gets past transformers' own search, which makes steps of fewer rows."""
        arguments = self.args
        if arguments.auto_find_batch_size and batch_size and batch_size < arguments.train_batch_size:
            use_batch(arguments, batch_size)  # the one that fitted before the run was resumed
        if arguments.activation_checkpointing and not (arguments.activation_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            # transformers lets gradients flow down to the embeddings for it, which this kind does not need.
            base_of(self.model).disable_input_require_grads()
        try:
            return super()._inner_training_loop(batch_size, **options)
        except RuntimeError as error:
            if not (arguments.auto_find_batch_size and is_out_of_memory(error)):
                raise
            reason = str(error)
        raise DoesNotFitError(reason)  # not from the error, which holds on to all that the step had made

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the cross-entropies / masked tokens of the whole accumulated batch (of all processes)."""
        labels = inputs.pop("labels")
        if model.training:
            self.throughput.count(inputs["attention_mask"])
        smoothing = self.args.label_smoothing_factor
        loss = masked_lm_loss(model, inputs, labels, num_items_in_batch, label_smoothing=smoothing, door=self.door)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Processes average their gradients; dividing by the count of all of them asks for the sum.
            loss = loss * self.accelerator.num_processes
        if model.training and self.accelerator.sync_gradients:  # once per optimiser step, in its last micro-batch
            penalty = orthogonal_penalty(self.model)
            loss = loss if penalty is None else loss + penalty
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser: Trainer's, or that of LoRA+ or LoRA-FA."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None and self.loraplus_lr_ratio is not None:
            self.optimizer = loraplus_optimizer(
                self.model,
                *self.get_optimizer_cls_and_kwargs(self.args, self.model),
                ratio=self.loraplus_lr_ratio,
                weight_decay=self.args.weight_decay,
                decayed=self.get_decay_parameter_names(self.model),
            )
        if self.optimizer is None and self.use_lorafa:
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = lorafa_optimizer(self.model, self.args, decayed=decayed)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with speed and memory, the ranks that a schedule has left, and the penalty that the loss contains."""
        more: dict[str, float] = dict(describe_ranks(self.model, self.state.global_step))
        more |= self.throughput.read(self.accelerator).describe() if "loss" in logs else {}
        penalty = orthogonal_penalty(self.model) if "loss" in logs else None
        more |= {} if penalty is None else {"orthogonal_penalty": penalty.item()}
        super().log({**logs, **more}, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on fixed masks: loss, accuracy and perplexity over masked tokens, in the memory of one batch."""
        started = time.perf_counter()
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        scores = self.measure(rows, label="evaluating")
        if rows is self.eval_dataset:
            self.scores_at[self.state.global_step] = scores
        metrics: dict[str, float] = {
            f"{metric_key_prefix}_{name}": value for name, value in scores.describe().items() if name != "masked_tokens"
        }
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, rows: Dataset, *, label: str) -> MaskedScores:
        """Evaluate the model as it is, on the first masks alone, and log nothing."""
        return self._scores(rows, label, draws=1)

    def measure_base(self, *, label: str) -> MaskedScores:
        """Evaluate the model before training, on all draws of masks."""
        return self._scores(self.eval_dataset, label, draws=self.eval_mask_draws)

    def measure_trained(self, *, label: str) -> MaskedScores:
        """Evaluate the model that training left; where it was evaluated as it is, give those figures."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        step = self.state.global_step if best is None else int(Path(best).name.rpartition("-")[2])
        # a schedule changes the ranks at the end
        if step in self.scores_at and self.schedule is None and self.eval_mask_draws == 1:
            return self.scores_at[step]
        return self._scores(self.eval_dataset, label, draws=self.eval_mask_draws)

    def _scores(self, rows: Dataset, label: str, *, draws: int) -> MaskedScores:
        started = time.perf_counter()
        watch = self.live_table.watch if self.live_table.is_shown else None
        how: dict[str, Any] = {"label": label, "door": self.door, "draws": draws, "watch": watch}
        scores = scores_of(self.model, rows, self.eval_collator, self.args, **how)
        self.throughput.evaluation_seconds = time.perf_counter() - started
        return scores

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, or the model where there is none; no pickled arguments beside it."""
        folder = Path(output_dir or self.args.output_dir)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            (folder / "training_args.bin").unlink(missing_ok=True)
        elif self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            self.save_into(model, folder)
            if isinstance(model, PeftModel):
                write_training_state(model, folder, self.initial)
        if self.args.should_save:
            open_to_umask(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Set what was trained; PEFT would take up training of parameters that a method keeps frozen."""
        trained = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        checkpoint = Path(resume_from_checkpoint)
        if has_training_state(checkpoint):
            load_training_state(self.model, checkpoint)
            if self.schedule is not None:
                self.schedule.checkpoint = read_schedule_state(checkpoint), checkpoint
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained[name])

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if not has_training_state(best):
            super()._load_best_model()
            return
        load_training_state(self.model, best)
        load_schedule_state(self.model, read_schedule_state(best), best)


def _autocast(arguments: TrainingArguments) -> Callable[[], Any]:
    """The precision of evaluation: that of training, before the first step as after the last."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(arguments.device.type, dtype=dtype)
