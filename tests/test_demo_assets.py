"""The demo's model and corpus, as shipped, read with plain transformers."""

import json
import math
import re
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import peft_mlm

ASSETS = Path(peft_mlm.__file__).parent / "demo_assets"
MODEL = ASSETS / "sapiens_vh"
GERMLINE = ASSETS / "germline"
FILES = ("mouse_train", "mouse_validation", "human_validation")

# What the README of the package sapiens 1.0.3 prints for this sequence (* is a masked residue): residues 0 to 4.
SEQUENCE = (
    "**QLV*SGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFK"
    "NRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"
)
SCORES = {
    "A": (0.003272, 0.012038, 0.003384, 0.004612, 0.005519),
    "C": (0.004147, 0.003854, 0.003895, 0.005325, 0.003664),
    "D": (0.004011, 0.006803, 0.003726, 0.004443, 0.003555),
    "E": (0.004590, 0.008174, 0.004068, 0.004641, 0.005269),
}
# The first residues of the same README's `predict_masked`.
FILLED = "QVQLVQSGVEV"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(MODEL).eval()


def read_records(name: str) -> list[tuple[str, str, str, str]]:
    """Return (V gene, J gene, species, sequence) of each record."""
    records = []
    lines = (GERMLINE / f"{name}.fasta").read_text(encoding="utf-8").splitlines()
    for header, sequence in zip(lines[::2], lines[1::2], strict=True):
        v_gene, j_gene, species = header.removeprefix(">").split(" ")
        records.append((v_gene, j_gene, species, sequence))
    return records


def common_suffix(texts: list[str]) -> str:
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*(text[::-1] for text in texts), strict=False))
    return "".join(column[0] for column in columns)[::-1]


def genes_of(species: str) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Take the sequences apart: proteins of each V gene and of each J gene, from headers and sequences alone."""
    records = [record for name in FILES if name.startswith(species) for record in read_records(name)]
    by_j = defaultdict(list)
    for _, j_gene, _, sequence in records:
        by_j[j_gene].append(sequence)
    j_genes = {j_gene: common_suffix(sequences) for j_gene, sequences in by_j.items()}
    v_genes = defaultdict(set)
    for v_gene, j_gene, _, sequence in records:
        v_genes[v_gene].add(sequence.removesuffix(j_genes[j_gene]))
    return v_genes, j_genes


def test_the_scores_that_the_package_readme_prints_come_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        logits = model(**tokenizer(SEQUENCE.replace("*", "<mask>"), return_tensors="pt")).logits[0, 1:-1]
    scores = logits.softmax(-1)
    for letter, expected in SCORES.items():
        found = scores[:5, tokenizer.convert_tokens_to_ids(letter)].tolist()
        assert found == pytest.approx(expected, abs=2e-6), letter
    best = tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
    filled = "".join(guess if given == "*" else given for guess, given in zip(best, SEQUENCE, strict=True))
    assert filled.startswith(FILLED)


def test_decoder_and_embeddings_are_one_matrix(model: PreTrainedModel) -> None:
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_one_token_per_residue_and_spaces_do_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, spaced = tokenizer("QVQ<mask>V")["input_ids"], tokenizer(" Q V Q <mask>  V\n")["input_ids"]
    assert plain == spaced
    assert tokenizer.convert_ids_to_tokens(plain) == ["<s>", "Q", "V", "Q", "<mask>", "V", "</s>"]
    assert tokenizer.decode(plain, skip_special_tokens=True) == "QVQV"


def test_only_the_twenty_residues_are_known(tokenizer: PreTrainedTokenizerBase) -> None:
    known = {letter for letter in map(chr, range(33, 127)) if tokenizer(letter)["input_ids"][1] != 3}
    assert known == set("ACDEFGHIKLMNPQRSTVWY")


def test_model_max_length_is_what_the_positions_hold(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.model_max_length == 144
    with torch.no_grad():
        logits = model(**tokenizer("A" * 142, return_tensors="pt")).logits
        assert torch.isfinite(logits).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(**tokenizer("A" * 143, return_tensors="pt"))


@pytest.mark.parametrize(("species", "joins", "v_count", "j_count"), [("mouse", 1220, 244, 5), ("human", 1008, 144, 7)])
def test_every_v_is_joined_to_every_j_once(species: str, joins: int, v_count: int, j_count: int) -> None:
    records = [record for name in FILES if name.startswith(species) for record in read_records(name)]
    v_genes, j_genes = genes_of(species)
    assert {record[2] for record in records} == {species}
    assert len(records) == len({sequence for *_, sequence in records}) == joins
    assert (len(v_genes), len(j_genes)) == (v_count, j_count)
    assert {len(proteins) for proteins in v_genes.values()} == {1}
    assert len(set().union(*v_genes.values())) == v_count
    # Each J holds W-G-x-G and ends as the framework does; each V has its second cysteine near the end.
    assert all(re.fullmatch(r"[A-Z]{4,9}WG[A-Z]GT[A-Z][LV]TVS[AS]", j) for j in j_genes.values())
    assert all("C" in v[-7:] for proteins in v_genes.values() for v in proteins)


def test_no_v_gene_that_is_validated_on_and_no_near_one_is_trained_on() -> None:
    v_genes, _ = genes_of("mouse")
    train, held_out = (
        {protein for v_gene, *_ in read_records(name) for protein in v_genes[v_gene]}
        for name in ("mouse_train", "mouse_validation")
    )
    assert (len(train), len(held_out)) == (207, 37)
    assert not train & held_out
    distances = [
        sum(map(str.__ne__, seen, unseen)) for seen in train for unseen in held_out if len(seen) == len(unseen)
    ]
    assert min(distances) > 4


def test_every_sequence_fits_and_every_letter_is_known(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    positions = model.config.max_position_embeddings - model.config.pad_token_id - 1
    for name in FILES:
        rows = tokenizer([sequence for *_, sequence in read_records(name)])["input_ids"]
        assert max(map(len, rows)) <= min(positions, tokenizer.model_max_length)
        assert not any(tokenizer.unk_token_id in row for row in rows), name


# All masked positions replaced by <mask>; with 80/10/10 the figures are about 0.695 / 3.42 and 0.953 / 1.35.
@pytest.mark.parametrize(("species", "accuracy", "perplexity"), [("mouse", 0.685, 3.62), ("human", 0.957, 1.33)])
def test_figures_before_training(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, species: str, accuracy: float, perplexity: float
) -> None:
    sequences = [sequence for name in FILES if name.startswith(species) for *_, sequence in read_records(name)]
    rows = [{"input_ids": ids} for ids in tokenizer(sequences)["input_ids"]]
    collate = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0, seed=0
    )
    count, right, loss = 0, 0, 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = collate(rows[start : start + 64])
            masked = batch["labels"] != -100
            logits, labels = model(**batch).logits[masked], batch["labels"][masked]
            count += len(labels)
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert right / count == pytest.approx(accuracy, abs=0.01)
    assert math.exp(loss / count) == pytest.approx(perplexity, abs=0.1)


def test_no_shipped_text_holds_a_local_path() -> None:
    texts = [path for path in ASSETS.rglob("*") if path.suffix in {".json", ".md", ".fasta"} or path.name == "LICENSE"]
    assert len(texts) == 9
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:^|[\s\"'(=])/\w|[A-Za-z]:\\\\|name_or_path", text), path.name


def test_the_weights_file_holds_nothing_but_float32_weights() -> None:
    with (MODEL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F32"}


def test_licences_ship_with_what_they_cover() -> None:
    assert "Merck Sharp & Dohme" in (MODEL / "LICENSE").read_text(encoding="utf-8")
    assert "brineylab @ scripps" in (GERMLINE / "LICENSE").read_text(encoding="utf-8")
    source = (GERMLINE / "SOURCE.md").read_text(encoding="utf-8")
    for name in FILES:
        records = read_records(name)
        v_count, residues = len({record[0] for record in records}), sum(len(record[3]) for record in records)
        assert f"| {name}.fasta | {len(records)} | {v_count} | {residues} |" in source
