"""The guides on shipping and using run as they stand: commands and code, in their order, against a hub on loopback.

They are tried on the shipped Sapiens model and adapters of two steps; what they print is another test's matter.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_mlm
from peft_mlm.cli import COMMANDS
from tests.hub_server import Hub

ROOT = Path(__file__).parent.parent
ASSETS = Path(peft_mlm.__file__).parent / "demo_assets"
GUIDES = ("shipping.md", "using.md")
TRAIN = """
import peft_mlm, sys
for species in ("mouse", "human"):
    text = f"{sys.argv[1]}/germline/{species}_validation.fasta"
    peft_mlm.train({
        "model_name_or_path": "org/sapiens-vh", "train_file": text, "rows": "line", "use_lora": True, "max_steps": 2,
        "learning_rate": 1e-2, "do_eval": False, "output_dir": f"runs/{species}",
    })
"""
# All blocks of a guide in one process, the Python ones in one namespace.
RUN = """
import json, shlex, sys
from peft_mlm.cli import main
names = {}
for language, text in json.loads(sys.argv[1]):
    if language == "python":
        exec(text, names)
        continue
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "peft-mlm", line
        code = main(words[1:])
        assert code == 0, (line, code)
exec(sys.argv[2], names)
"""
# What must hold when the blocks have run.
AFTERWARDS = {
    "shipping.md": """
import torch
ids = torch.tensor([[0, 7, 24, 9, 10, 11, 2]])
alone = peft_mlm.load("runs/mouse").model(input_ids=ids).logits
assert torch.equal(loaded.model(input_ids=ids).logits, alone)
assert both.names == ["mouse-vh", "mouse-vh@v1"]
assert both.base.name_or_path == "org/sapiens-vh"
""",
    "using.md": """
weights = AutoModel.from_pretrained("merged").state_dict()
fresh = AutoModelForSequenceClassification.from_pretrained("merged", num_labels=5).base_model.state_dict()
other = AutoModel.from_pretrained("encoder").state_dict()
for part in (fresh, tagger.base_model.state_dict(), other):
    for name in part:
        assert name.startswith("pooler.") or torch.equal(part[name], weights[name]), name
with torch.no_grad():
    from transformers import AutoModelForMaskedLM
    expected = AutoModelForMaskedLM.from_pretrained("merged").eval()(**batch).logits
    assert abs(expected - torch.from_numpy(globals()["session"].run(None, feed)[0])).max() < 1e-3
    means = encoder.eval()(**batch).last_hidden_state.mean(1)  # nothing is padded
    assert abs(means - torch.from_numpy(vectors)).max() < 1e-4
    assert half.dtype == torch.bfloat16
    mouse = adapters.use("mouse")(input_ids=batch["input_ids"][:1]).logits
    base = adapters.use(None)(input_ids=batch["input_ids"][1:]).logits
    assert abs(mixed - torch.cat([mouse, base])).max() < 1e-4
    assert adapters.names == ["mouse", "human"]
""",
}


def blocks_of(guide: str) -> list[tuple[str, str]]:
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(script: str, *arguments: str, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with two runs, and the environment of a hub that has their base."""
    folder = tmp_path_factory.mktemp("guides")
    with Hub(folder / "hf_home") as hub:
        hub.writers.add("hf_writer")
        hub.publish("models", "org/sapiens-vh", ASSETS / "sapiens_vh")
        env = {**hub.env, "HF_TOKEN": "hf_writer", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run(TRAIN, str(ASSETS), folder=folder, env=env)
        yield folder, env


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_as_it_stands(guide: str, world: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, env = world
    (tmp_path / "runs").symlink_to(folder / "runs")
    blocks = blocks_of(guide)
    assert {language for language, _ in blocks} == {"sh", "python"}
    run(RUN, json.dumps(blocks), AFTERWARDS[guide], folder=tmp_path, env=env)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_flag_and_link_in_it_exists(guide: str) -> None:
    from peft_mlm.argument_fields import argument_fields

    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    assert set(re.findall(r"peft-mlm ([a-z-]+)", text)) <= set(COMMANDS)
    modules = [importlib.import_module(f"peft_mlm.commands.{module}") for module, _ in COMMANDS.values()]
    known = set(re.findall(r"--(\w+)", " ".join(module.help_text() for module in modules))) | set(argument_fields())
    known |= {"seed"}  # of the example
    named = set(re.findall(r"(?<![\w-])--(\w+)(?!-)\b", text.replace("--local-dir", "")))
    assert named <= known, named - known
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / "docs" / link).is_file(), link
