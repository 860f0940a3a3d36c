"""Whether faster training learns the same: the loss on unseen text, ours against the baseline, over several seeds.

Sapiens VH, the antibody model that the package ships, learns mouse sequences by LoRA, with the dropout of its original
(0.1). Baseline and ours see the same rows and take the same steps; both are measured by one plain loop on fixed masks.

    .venv/bin/python benchmarks/loss_curves.py [--seeds 4] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.works import VARIANTS, baseline_trainer, our_rows, our_trainer  # noqa: E402

ASSETS = ROOT / "peft_mlm" / "demo_assets"
POINTS = 4


def sequences(name: str) -> Any:
    """The sequences of one of the shipped FASTA files."""
    from datasets import Dataset

    records = (ASSETS / "germline" / f"{name}.fasta").read_text().split(">")[1:]
    return Dataset.from_dict({"text": ["".join(record.splitlines()[1:]) for record in records]})


def plain_loss(model: Any, rows: Any, collator: Any) -> float:
    """Nats per masked token, by the library's cross-entropy on whole logits."""
    import torch

    total, masked = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = collator([rows[i] for i in range(start, min(start + 64, len(rows)))])
            labels = batch.pop("labels")
            logits = model(**batch).logits.flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"))
            masked += int((labels != -100).sum())
    return total / masked


def curve(variant: str, seed: int, steps: int, folder: Path) -> list[float]:
    """The loss on unseen genes at some points of one run."""
    import transformers
    from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

    from peft_mlm import collator

    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "sapiens_vh")
    chances = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = AutoModelForMaskedLM.from_pretrained(ASSETS / "sapiens_vh", **chances)
    rows, unseen = (
        our_rows(sequences(name), tokenizer, line_by_line=True) for name in ("mouse_train", "mouse_validation")
    )
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": steps,
        "learning_rate": 3e-3,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if variant == VARIANTS[0]:
        trainer = baseline_trainer(model, tokenizer, rows, values)
    else:
        keep = variant == VARIANTS[2]
        trainer = our_trainer(model, tokenizer, rows, values, dropout=keep, by_length=True)
    fixed, losses = collator.from_tokenizer(tokenizer, fixed=True), []

    class Measure(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % (steps // POINTS) == 0:
                losses.append(plain_loss(trainer.model, unseen, fixed))
                trainer.model.train()

    trainer.add_callback(Measure())
    trainer.train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    import datasets
    import transformers

    from peft_mlm.run_folder import describe_environment

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    out, sys.stdout = sys.stdout, sys.stderr
    rows = []
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            curves = [curve(variant, seed, given.steps, Path(folder)) for seed in range(given.seeds)]
        points = list(zip(*curves, strict=True))
        rows.append(
            {
                "name": variant,
                "steps": [given.steps // POINTS * (i + 1) for i in range(POINTS)],
                "mean": [statistics.mean(point) for point in points],
                "sd": [statistics.stdev(point) for point in points],
            }
        )
    record = {"environment": describe_environment("cpu"), "seeds": given.seeds, "rows": rows}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "loss_curves.json").write_text(json.dumps(record, indent=2) + "\n")
    print("| loss on unseen genes | " + " | ".join(f"step {step}" for step in rows[0]["steps"]) + " |", file=out)
    print("| --- |" + " --- |" * POINTS, file=out)
    for row in rows:
        cells = [f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(row["mean"], row["sd"], strict=True)]
        print(f"| {row['name']} | " + " | ".join(cells) + " |", file=out)


if __name__ == "__main__":
    main()
