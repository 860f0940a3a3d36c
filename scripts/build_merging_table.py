"""Make docs/merging.md: every method that merges, on every kind of base, with what else an adapter may train.

    .venv/bin/python scripts/build_merging_table.py

It takes some minutes. Each figure is what `peft-mlm merge` reports of a tiny model of random weights whose adapter is
moved at random; the figures of speed and memory are those of `benchmarks/results/merge.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.merge import markdown
from peft_mlm.console import quiet_libraries
from peft_mlm.methods import METHODS, VARIANTS
from peft_mlm.run_folder import describe_environment
from tests.matrix_of_merges import CASES, KINDS, refusal, rows, run_merge, save_merge_base

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "merge.json"
TITLES = {"": "the method alone", "head": "with a trained head", "tokens": "with new tokens"}
LEAST_EFFECT = 1e-3


def number(value: float) -> str:
    """Write a difference with one digit."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


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


def main() -> None:
    """Run everything and write the page."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for kind in KINDS:
            save_merge_base(place / kind, kind)
        tables = {case: table(place, case) for case in CASES}
    versions = describe_environment("cpu")["versions"]
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    not_merged = "\n".join(f"* {row.title} ({name}): {row.merge}." for name, row in METHODS.items() if row.merge)
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.format(
        made=made,
        tables="\n\n".join(f"### {TITLES[case].capitalize()}\n\n{tables[case]}" for case in CASES),
        not_merged=not_merged,
        speed=markdown(measured),
        what=f"{measured['base_mb'] / 953.674:.1f} GB in {measured['shards']} shards of at most "
        f"{measured['largest_shard_mb']:.0f} MiB, {measured['dtype']}, {measured['layers']} layers of "
        f"{measured['hidden']}, LoRA of rank 16 on all linear layers of the encoder; medians of {measured['rounds']} "
        f"rounds, {measured['environment']['cpu_count']} cores",
    )
    (ROOT / "docs" / "merging.md").write_text(text, encoding="utf-8")


PAGE = """# Merging

`peft-mlm merge RUN_OR_ADAPTER --output_dir FOLDER` adds an adapter to the weights of its base. The folder it makes is
a plain transformers model, with tokenizer and config; nothing of PEFT is needed to load it.

* The base is the one the adapter was trained on, by its fingerprint (`--any_base` takes another of the same shapes).
  Where it was quantised, that is the model its 4 or 8 bits stand for (`--into dequantised`). `--into original` merges
  into the float weights it was quantised from: another model, and the report says by how much, in logits and
  perplexity.
* Sums are made in float64, for models over 500 million parameters in float32, and rounded once to `--dtype` (`auto`:
  as the base's file has it).
* The proof: the merged folder is loaded afresh and compared with base + adapter, on rows of random tokens (which hold
  every token whose row was trained) and on text: that of `--validation_file`, or the run's own. Over tolerance
  nothing is written, and the message says by how much. `merge_report.json` in the folder has the figures, the
  tolerance and why it is that, the base's fingerprint and the versions. `--proof false` leaves it out; the report
  then says so.
* The folder appears under its name when it is proved and on the disk, and not before. A merge that is killed leaves
  at most a hidden folder `.NAME.xxxxxxxx.unfinished` beside it, which the next merge to that name removes.
* LoRA (rsLoRA, DoRA, its biases, modules trained in full, rows of tokens) is merged file by file, without building
  the model: what it does not change is copied, shards stay shards. What that cannot do rightly (another method, rows
  added for new tokens, a base that is dequantised) is merged in the built model; the report says why
  (`built_because`).

## Exactness

Made by `make merging`, which merges every cell on a tiny BERT of random weights ({made}; CPU). Each figure is the
largest difference of a logit between base + adapter and the merged model loaded afresh, computed in float64; logits
are of the size of 1 to 10. Weights merged to *float32* differ by their rounding to float32 alone. In *bfloat16* (base
and merged model) each weight is rounded by up to 2^-8 of it; "a of b": a was seen, b is allowed, which is 2 times
what it changes to move every merged weight by that unit, up or down at random. *nf4* and *int8* are merged into the
dequantised weights; the second figure is the difference from the adapter on its quantised base as it runs there (in 8
bits inputs are rounded too). A star: merged file by file.

{tables}

## Not merged

{not_merged}

## Speed and memory

`benchmarks/merge.py`, without the proof, which loads the model twice, one after the other: {what}. Every way ends
with its files on the disk. "Beyond the imports": less what the process held before it began.

{speed}
"""


if __name__ == "__main__":
    main()
