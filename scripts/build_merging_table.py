"""Make docs/merging.md: every method that merges, on every kind of base, with what else an adapter may train.

    .venv/bin/python scripts/build_merging_table.py [--speed_only]

It takes some minutes. Each figure of exactness is what `peft-mlm merge` reports of a tiny model of random weights whose
adapter is moved at random; what `--into original` costs is measured on the shipped antibody model. The figures of speed
and memory are those of `benchmarks/results/merge.json`, or, where that is not there, those the page has; with
`--speed_only` nothing else of the page changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft_mlm
from benchmarks.merge import markdown
from peft_mlm.commands.demo import SHIPPED, config_file
from peft_mlm.console import quiet_libraries
from peft_mlm.methods import METHODS, VARIANTS
from peft_mlm.run_folder import describe_environment
from tests.matrix_of_merges import CASES, KINDS, refusal, rows, run_merge, save_merge_base

ROOT = Path(__file__).resolve().parent.parent
PAGE_FILE = ROOT / "docs" / "merging.md"
RESULTS = ROOT / "benchmarks" / "results" / "merge.json"
TITLES = {"": "the method alone", "head": "with a trained head", "tokens": "with new tokens"}
LEAST_EFFECT = 1e-3
SPEED_TITLE = "## Speed and memory\n"
BITS = {"4 bits (nf4)": "--load_in_4bit", "8 bits": "--load_in_8bit"}


def number(value: float) -> str:
    """Write a difference with one digit."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def cell(base: Path, folder: Path, method: str, variant: str | None, kind: str, case: str) -> str:
    """Run a cell, and write what was seen."""
    reason = refusal(method, variant, kind, case)
    if reason:
        return f"refused: {reason}"
    seen = run_merge(base, folder, method, variant, kind, case)
    if seen.effect < LEAST_EFFECT:
        raise SystemExit(f"{method} {variant} {kind} {case} changes nothing: {seen}")
    text = number(seen.difference)
    if kind == "bfloat16":
        text += f" of {number(seen.allowed)}"
    if seen.quantised is not None:
        text += f", {number(seen.quantised)}"
    return text + (" *" if seen.file_by_file else "")


def table(place: Path, case: str) -> str:
    """Run the rows of a case."""
    lines = [f"| method | name | {' | '.join(KINDS)} |", "| --- | --- |" + " --- |" * len(KINDS)]
    for method, variant in rows():
        if all(refusal(method, variant, kind, case) for kind in KINDS):
            continue
        name = variant or method
        title = VARIANTS[variant].title if variant else METHODS[method].title
        cells = []
        for kind in KINDS:
            folder = place / f"{name}-{kind}-{case}"
            folder.mkdir()
            cells.append(cell(place / kind, folder, method, variant, kind, case))
        lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def cost_of_original(place: Path) -> str:
    """Train adapters on the shipped antibody model in 4 and 8 bits, merge each both ways, and write what that costs."""
    lines = ["| trained on the base in | merged into | largest difference of a logit | perplexity | masked accuracy |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for bits, flag in BITS.items():
        run = place / flag
        shipped = [word for name, path in SHIPPED.items() for word in (f"--{name}", str(path))]
        peft_mlm.train(config_file("demo.yaml"), flags=[*shipped, "--output_dir", str(run), flag])
        told = {
            into: peft_mlm.merge(str(run), place / f"{flag}{into}", into=into) for into in ("dequantised", "original")
        }
        lines.append(f"| {bits} | (the adapter as it ran) | | {figures(told['original']['text']['quantised'])} |")
        for into, report in told.items():
            apart = number(report["max_abs_logit_diff_quantised"])
            lines.append(f"| | {into} | {apart} | {figures(report['text']['merged'])} |")
        print("\n".join(lines[-3:]), file=sys.stderr, flush=True)
    return "\n".join(lines)


def figures(scores: dict[str, float]) -> str:
    """Write perplexity and accuracy as cells."""
    return f"{scores['perplexity']:.4f} | {scores['accuracy']:.4f}"


def speed() -> str:
    """Write what was measured, with its maker; without results, what the page says already."""
    if not RESULTS.is_file():
        page = PAGE_FILE.read_text(encoding="utf-8") if PAGE_FILE.is_file() else ""
        return page.partition(SPEED_TITLE)[2].strip()
    measured: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    made = measured["environment"]
    versions = ", ".join(
        f"{name} {made['versions'][name]}" for name in ("torch", "safetensors", "transformers", "peft")
    )
    return SPEED.format(
        table=markdown(measured),
        size=f"{measured['base_mb'] * 2**20 / 1e9:.1f} GB",
        processor=measured["processor"],
        cores=made["cpu_count"],
        versions=versions,
        commit=made["commit"],
        **{name: measured[name] for name in ("shards", "dtype", "layers", "hidden")},
        turns="One round" if measured["rounds"] == 1 else f"Medians of {measured['rounds']} rounds",
        largest=f"{measured['largest_shard_mb']:.0f}",
    )


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed_only", action="store_true", help="take over benchmarks/results/merge.json alone")
    if parser.parse_args().speed_only:
        page = PAGE_FILE.read_text(encoding="utf-8")
        PAGE_FILE.write_text(f"{page.partition(SPEED_TITLE)[0]}{SPEED_TITLE}\n{speed()}\n", encoding="utf-8")
        return
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for kind in KINDS:
            save_merge_base(place / kind, kind)
        tables = {case: table(place, case) for case in CASES}
        cost = cost_of_original(place)
    versions = describe_environment("cpu")["versions"]
    text = PAGE.format(
        made=", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")),
        tables="\n\n".join(f"### {TITLES[case].capitalize()}\n\n{tables[case]}" for case in CASES),
        not_merged="\n".join(f"* {row.title} ({name}): {row.merge}." for name, row in METHODS.items() if row.merge),
        cost=cost,
        speed=speed(),
    )
    PAGE_FILE.write_text(text, encoding="utf-8")


SPEED = """`make bench-merge`, a BERT of random weights: {size} in {shards} shards of at most {largest} MiB, {dtype},
{layers} layers of {hidden}; LoRA of rank 16 on all linear layers of the encoder. The whole command without its proof
(which loads the model twice, one after the other), with the checksums of what it writes; every way ends with its files
on the disk. {turns} in which the ways take turns (PEFT in the first alone); "times cp" is the median
of the ratios within a round. "Beyond the imports": peak memory less what the process held before it began.
{processor}, {cores} cores; {versions}; commit {commit}.

{table}"""

PAGE = """# Merging

```sh
peft-mlm merge RUN_OR_ADAPTER --output_dir FOLDER
```

adds an adapter to the weights of its base. The folder it makes is a plain transformers model, with tokenizer, config,
model card and checksums; nothing of PEFT is needed to load it. Heads, biases, norms and rows of new tokens that were
trained with the adapter are in it, and what was tied is tied.

## Which base

The one the adapter was trained on: by the name that run or adapter have, or `--base`; another one is told by its
fingerprint and refused (`--any_base` takes it where it is of the same make).

Where it was trained on a base in 4 or 8 bits, the default (`--into dequantised`) is the float model that these bits
stand for: the adapter has learned to correct that one. `--into original` adds it to the float weights that were
quantised: another model, which may be better or worse. The report always says how far the merged model is from the
adapter as it ran (`max_abs_logit_diff_quantised`), and gives perplexity and accuracy of both. On the shipped antibody
model, with the training of `peft-mlm demo`, on mouse genes that were not trained on:

{cost}

In 8 bits the inputs of each layer are rounded too while the adapter runs, which no float model repeats.

## Types

Sums are made in float64 (in float32 for models of more than 500 million parameters), and rounded once to `--dtype`:
float32 (default), bfloat16, float16, or `auto`, as the base's file has it. What float16 cannot hold is refused.

## The proof

The folder that was written is loaded afresh and compared with base + adapter:

* on rows of random tokens, a seventh of them masked, which hold every token whose row was trained. Both models compute
  in float64, so that nothing but what was written counts. Allowed are 1e-5 of the largest logit; in 16 bits, and where
  weights are so large that float32 rounds them visibly, also twice what it changes to move every merged weight by the
  unit of the type, up or down at random;
* on real text: that of `--validation_file`, or the run's own evaluation text, 64 rows of it or `--max_eval_samples`,
  made, read and masked as `peft-mlm evaluate` does it; computed in float32.

Over tolerance nothing is left, and the message says by how much. `merge_report.json` in the folder keeps it:

| key | |
| --- | --- |
| `proved` | whether it was compared (`--proof false` leaves it out) |
| `max_abs_logit_diff`, `tolerance`, `tolerance_because` | largest difference of a logit, what it may be, and why |
| `max_abs_logit_diff_as_run`, `max_abs_logit` | the same in the type of the weights; the largest logit |
| `top1_agreement`, `positions` | share of the places with the same most probable token |
| `text` | the same on text, with loss, perplexity and masked accuracy of `adapter`, `merged` and `quantised` |
| `tied`, `dtype`, `compared_in` | whether decoder and embeddings are one; types |
| `into`, `max_abs_logit_diff_quantised` | of a quantised base: which weights; how far from the adapter as it ran |
| `built_because` | why the model was built; null where it was merged file by file |
| `base`, `base_revision`, `base_fingerprint`, `versions` | what it was made from, and by what |

## File by file

LoRA (rsLoRA, DoRA, its biases, modules trained in full, rows of tokens) is merged without building the model: what it
does not change is copied, shards stay shards, and in memory is one matrix at a time, or a block of it. What that cannot
do rightly (another method, rows added for new tokens, a base that is dequantised, a checkpoint that transformers
converts while it loads it) is merged in the built model; the report says why.

## When it is interrupted

The folder appears under its name when it is proved and on the disk, and not before. A merge that is killed leaves at
most a hidden folder `.NAME.xxxxxxxx.unfinished` beside it, which the next merge to that name removes. A folder that
holds anything is never written into.

## Exactness

Made by `make merging`, which merges every cell on a tiny BERT of random weights ({made}; CPU). Each figure is the
largest difference of a logit between base + adapter and the merged model loaded afresh, computed in float64; logits
are of the size of 1 to 10. Weights merged to *float32* differ by their rounding to float32 alone. In *bfloat16* (base
and merged model) each weight is rounded by up to 2^-8 of it; "a of b": a was seen, b is allowed. *nf4* and *int8* are
merged into the dequantised weights; the second figure is the difference from the adapter on its quantised base as it
runs there (in 8 bits inputs are rounded too). A star: merged file by file.

{tables}

## Not merged

{not_merged}
* An adapter on a matrix that stands in two places (embeddings tied to the decoder), where the change would be in both
  while the adapter makes it in one: the proof finds the difference, and nothing is written.
* Weights put back into 4 or 8 bits: a sum that is rounded again is another model. Merge, and quantise what was merged.

## Speed and memory

{speed}
"""


if __name__ == "__main__":
    main()
