"""The guides on shipping and using run as they stand: commands and code, in their order, against a hub on loopback.

They are tried on the shipped Sapiens model and adapters of two steps; what they print is another test's matter.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_mlm
from peft_mlm.cli import COMMANDS
from tests.hub_server import Hub

ROOT = Path(__file__).parent.parent
ASSETS = Path(peft_mlm.__file__).parent / "demo_assets"
GUIDES = ("shipping.md", "using.md")
# All in one process, since importing the libraries is what takes long: two runs, then each guide in a folder of its
# own, the Python blocks of a guide in one namespace.
RUN = """
import json, os, shlex, sys
import peft_mlm
from peft_mlm.cli import main
assets, guides = sys.argv[1], json.loads(sys.argv[2])
for species in ("mouse", "human"):
    peft_mlm.train({
        "model_name_or_path": "org/sapiens-vh", "train_file": f"{assets}/germline/{species}_validation.fasta",
        "rows": "line", "use_lora": True, "max_steps": 2, "learning_rate": 1e-2, "do_eval": False,
        "output_dir": f"runs/{species}",
    })
root = os.getcwd()
for guide, (blocks, afterwards) in guides.items():
    os.mkdir(f"{root}/{guide}")
    os.chdir(f"{root}/{guide}")
    os.symlink("../runs", "runs")
    names = {}
    for language, text in [*blocks, ["python", afterwards]]:
        if language == "python":
            exec(compile(text, guide, "exec"), names)
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "peft-mlm", line
            code = main(words[1:])
            assert code == 0, (guide, line, code)
"""
# What must hold when the blocks have run.
AFTERWARDS = {
    "shipping.md": """
import torch
ids = torch.tensor([[0, 7, 24, 9, 10, 11, 2]])
alone = peft_mlm.load("runs/mouse").model(input_ids=ids).logits
assert abs(loaded.model(input_ids=ids).logits - alone).max() < 1e-5
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
    assert abs(expected - torch.from_numpy(session.run(None, feed)[0])).max() < 1e-3
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


def test_the_guides_run_as_they_stand(tmp_path: Path) -> None:
    guides = {guide: (blocks_of(guide), AFTERWARDS[guide]) for guide in GUIDES}
    for blocks, _ in guides.values():
        assert {language for language, _ in blocks} == {"sh", "python"}
    with Hub(tmp_path / "hf_home") as hub:
        hub.writers.add("hf_writer")
        hub.publish("models", "org/sapiens-vh", ASSETS / "sapiens_vh")
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(ASSETS), json.dumps(guides)],
            cwd=tmp_path, env={**hub.env, "HF_TOKEN": "hf_writer", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


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
