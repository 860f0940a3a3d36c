"""`peft-mlm demo`: a real antibody model learns mouse antibodies; train, evaluate, merge, fill a mask. No network.

The base is Sapiens VH, trained on human heavy chains. The text is mouse germline sequences; the genes it is measured on
are not among those it is trained on. Human sequences show what is forgotten. Everything runs through the ordinary
commands, with configs/demo.yaml.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_mlm.console import CommandParser, bytes_text, print_table
from peft_mlm.errors import ArgumentsError, RunFolderError

PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "demo_assets"
# Argument of the config -> where the package keeps that file; the config names them relative to a checkout.
SHIPPED = {
    "model_name_or_path": ASSETS / "sapiens_vh",
    "train_file": ASSETS / "germline" / "mouse_train.fasta",
    "validation_file": ASSETS / "germline" / "mouse_validation.fasta",
}
HUMAN = ASSETS / "germline" / "human_validation.fasta"
# In this sequence, lysine where human sequences have arginine.
MASKED_RESIDUE = 37


def demo(output_dir: str | Path | None = None, *, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo.

    Args:
        output_dir: Run folder; the first free one of runs/demo, runs/demo-2, ... if None.
        flags: Words of a command line that override configs/demo.yaml.

    Returns:
        `base` and `adapted` (each `perplexity`, `accuracy`; mouse, unseen genes), `human` (same two), `adapter_bytes`,
        `trainable_parameters`, `total_parameters`, `merge` (`max_abs_logit_diff`, `top1_agreement`, `tied`),
        `fill_mask` (`sequence`, `residue`, and of `base` and `merged` the predictions), `run_folder`, `merged_folder`,
        `seconds`.

    Raises:
        ArgumentsError: A flag is wrong, or names another model or text.
        RunFolderError: `output_dir` is not empty.
    """
    from peft_mlm.commands.evaluate import evaluate
    from peft_mlm.commands.fill_mask import fill_mask
    from peft_mlm.commands.merge import merge
    from peft_mlm.commands.train import train

    named = {word.partition("=")[0] for word in flags}
    if own := [f"--{name}" for name in SHIPPED if f"--{name}" in named]:
        raise ArgumentsError(f"{', '.join(own)}: the demo brings model and text. For your own: peft-mlm train.")
    started = time.perf_counter()
    run_folder = Path(output_dir) if output_dir is not None else _free_folder(Path("runs") / "demo")
    shipped = [word for name, path in SHIPPED.items() for word in (f"--{name}", str(path))]
    result = train(config_file("demo.yaml"), flags=[*shipped, "--output_dir", str(run_folder), *flags])
    merged_folder = run_folder / "merged"
    merged = merge(str(run_folder), merged_folder)
    on_human = {
        part: _figures(evaluate(str(run_folder), flags=["--validation_file", str(HUMAN)], use_base=part == "base"))
        for part in ("base", "adapted")
    }
    sequence, residue = _masked_sequence(SHIPPED["validation_file"])
    guesses = {
        "base": fill_mask(str(run_folder), sequence, use_base=True)[0],
        "merged": fill_mask(str(merged_folder), sequence)[0],
    }
    return {
        "base": _figures(result.metrics["base"]),
        "adapted": _figures(result.metrics["adapted"]),
        "human": on_human,
        "adapter_bytes": result.metrics["adapter_bytes"],
        "trainable_parameters": result.metrics["trainable_parameters"],
        "total_parameters": result.metrics["total_parameters"],
        "merge": {name: merged[name] for name in ("max_abs_logit_diff", "top1_agreement", "tied")},
        "fill_mask": {
            "sequence": sequence,
            "residue": residue,
            **{name: guess["masks"][0]["predictions"] for name, guess in guesses.items()},
        },
        "run_folder": str(run_folder),
        "merged_folder": str(merged_folder),
        "seconds": round(time.perf_counter() - started, 1),
    }


def config_file(name: str) -> Path:
    """Find a config that ships with the project: in the installed package, or in the checkout.

    Args:
        name: File name.

    Returns:
        Its path.

    Raises:
        RunFolderError: The installation is not complete.
    """
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise RunFolderError(f"configs/{name} is missing from this installation. Install peft-mlm again.")


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given, flags = _parser().parse_known_args(words)
    if flags and not flags[0].startswith("-"):
        raise ArgumentsError(f"demo takes flags alone, not {flags[0]!r}. The run folder is given by --output_dir.")
    return demo(given.output_dir, flags=flags)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [
        [text, part, scores["perplexity"], scores["accuracy"]]
        for text, parts in (("mouse, unseen genes", record), ("human", record["human"]))
        for part, scores in (("base", parts["base"]), ("adapted", parts["adapted"]))
    ]
    print_table("Sapiens VH learns mouse", ["text", "", "perplexity", "masked accuracy"], rows, stream=sys.stdout)
    share = record["trainable_parameters"] / record["total_parameters"]
    guesses = record["fill_mask"]
    facts = [
        [
            "adapter",
            f"{bytes_text(record['adapter_bytes'])}, {record['trainable_parameters']:,} parameters ({share:.1%})",
        ],
        ["merged = base + adapter", f"largest difference of a logit {record['merge']['max_abs_logit_diff']:.1e}"],
        [f"masked residue {MASKED_RESIDUE + 1} (it is {guesses['residue']})", ""],
        *(
            [f"  {part}", ", ".join(f"{p['token']} {p['probability']:.2f}" for p in guesses[part][:3])]
            for part in ("base", "merged")
        ),
        ["run folder", record["run_folder"]],
        ["seconds", record["seconds"]],
    ]
    print_table("", None, facts, stream=sys.stdout)


def help_text() -> str:
    """Give the text of `peft-mlm demo --help`."""
    return _parser().format_help()


def _figures(scores: dict[str, Any]) -> dict[str, float]:
    return {name: scores[name] for name in ("perplexity", "accuracy")}


def _masked_sequence(fasta: Path) -> tuple[str, str]:
    """Mask one residue of the first held-out sequence."""
    lines = fasta.read_text(encoding="utf-8").split(">")[1].splitlines()
    sequence = "".join(lines[1:])
    masked = sequence[:MASKED_RESIDUE] + "<mask>" + sequence[MASKED_RESIDUE + 1 :]
    return masked, sequence[MASKED_RESIDUE]


def _free_folder(wanted: Path) -> Path:
    candidates = (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


def _parser() -> CommandParser:
    parser = CommandParser("demo", f"{__doc__}\nAny argument of `peft-mlm train` may follow, such as --max_steps 100.")
    parser.add_argument("--output_dir", help="run folder (default: runs/demo, or the first free runs/demo-N)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
