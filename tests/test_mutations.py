"""Scores of mutations equal a plain loop over masked sequences, on tiny models and on real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, EsmTokenizer

from peft_mlm.commands.demo import ASSETS
from peft_mlm.errors import DataError, ModelError
from peft_mlm.mutations import (
    MARGINALS,
    Substitution,
    check_mutations,
    encode_protein,
    mutation_scores,
    parse_mutation,
)
from tests.test_pseudo_likelihood import word_pieces
from tests.tiny import LETTERS, letter_tokenizer, tiny_model

SEQUENCE = "ABCDEFGHIJKL"
MUTATIONS = ["A1C", "C3D", "C3E", "A1C:C3D", "WT", "L12A", "C3C", "L12T:A1B:E5F"]
REAL = "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYYMHWVRQAPGQGLEWMG"


def by_hand(model: Any, tokenizer: Any, sequence: str, mutation: str, method: str, *, spaced: bool = False) -> float:
    """The definition, one mutation at a time; residue n is the token n of the row."""
    parts = [] if mutation == "WT" else [(p[0], int(p[1:-1]), p[-1]) for p in mutation.split(":")]
    ids = torch.tensor([tokenizer(" ".join(sequence) if spaced else sequence)["input_ids"]])
    assert ids.shape[1] == len(sequence) + 2
    if method == "masked_marginal":
        ids[0, [number for _, number, _ in parts]] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()[0].log_softmax(-1)
    token = tokenizer.convert_tokens_to_ids
    return sum(float(logits[number, token(new)] - logits[number, token(old)]) for old, number, new in parts)


@pytest.mark.parametrize("method", MARGINALS)
@pytest.mark.parametrize("model_type", ["esm", "bert", "modernbert"])
def test_scores_are_those_of_the_definition_at_any_batch_size(model_type: str, method: Any) -> None:
    model, tokenizer = tiny_model(model_type).double(), letter_tokenizer()
    expected = [by_hand(model, tokenizer, SEQUENCE, mutation, method) for mutation in MUTATIONS]
    for tokens in (1, 30, 4096):
        found = mutation_scores(
            model, tokenizer, SEQUENCE, MUTATIONS, method=method, max_tokens_per_batch=tokens, door="find"
        )
        assert found == pytest.approx(expected, abs=1e-9)
        assert found[MUTATIONS.index("WT")] == found[MUTATIONS.index("C3C")] == 0.0


def test_each_set_of_positions_is_asked_about_once_and_the_wild_type_once() -> None:
    model, tokenizer = tiny_model("bert"), letter_tokenizer()
    told: list[int] = []
    mutation_scores(model, tokenizer, SEQUENCE, MUTATIONS, advance=told.append)
    assert sum(told) == len({"1", "3", "1:3", "12", "1:5:12"})
    told.clear()
    mutation_scores(model, tokenizer, SEQUENCE, MUTATIONS, method="wild_type_marginal", advance=told.append)
    assert told == [1]
    assert mutation_scores(model, tokenizer, SEQUENCE, ["WT", "wt"]) == [0.0, 0.0]


def test_an_offset_moves_the_numbers_and_nothing_else() -> None:
    model, tokenizer = tiny_model("bert").double(), letter_tokenizer()
    plain = mutation_scores(model, tokenizer, SEQUENCE, ["A1C", "C3D:L12A"])
    assert mutation_scores(model, tokenizer, SEQUENCE, ["A101C", "C103D,L112A"], offset=100) == plain
    assert mutation_scores(model, tokenizer, " ABCDEF\nGHIJKL\n", ["A1C", "C3D:L12A"]) == plain


@pytest.mark.parametrize("text", ["A123V:D2N", "A123V,D2N", "A123V;D2N", "A123V/D2N", "A123V+D2N", " A123V D2N "])
def test_a_mutation_is_read_with_any_of_the_marks_between(text: str) -> None:
    assert parse_mutation(text) == (Substitution("A", 123, "V"), Substitution("D", 2, "N"))
    assert str(parse_mutation(text)[0]) == "A123V"


@pytest.mark.parametrize("text", ["", "A", "123", "A12", "12V", "a12v", "A12V:", "p.Ala12Val", "A-1V", "A1VV", "A1*"])
def test_what_is_no_mutation_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"is no mutation: write .*A123V"):
        parse_mutation(text)


def test_a_residue_that_changes_twice_is_refused() -> None:
    with pytest.raises(DataError, match="'A1V:A1G' changes a residue twice"):
        parse_mutation("A1V:A1G")


def test_a_mutation_of_another_sequence_is_refused_with_place_expected_and_found() -> None:
    wrong = [parse_mutation(text) for text in ("A1C", "C2D", "A13C", "A0C", "D5A", "F1A")]
    with pytest.raises(DataError) as caught:
        check_mutations(wrong, SEQUENCE, names=[f"row {n}" for n in range(1, 7)])
    said = str(caught.value)
    assert said.startswith("C2D (row 2): residue 2 of the sequence is B, not C; A13C (row 3): the sequence has the")
    assert "residues 1 to 12" in said
    assert "and 2 more" in said
    assert "--offset" in said


def test_a_sequence_is_read_with_or_without_spaces_as_the_tokenizer_wants(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<mask>"]))
    spaced = BertTokenizer(
        vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])},
        do_lower_case=False,
    )
    model = tiny_model("bert")
    for tokenizer in (EsmTokenizer(str(file)), spaced, letter_tokenizer()):
        row = encode_protein(tokenizer, SEQUENCE, model)
        assert row.places == list(range(1, 13))
        assert tokenizer.convert_ids_to_tokens(row.ids[row.places].tolist()) == list(SEQUENCE)


def test_a_tokenizer_of_words_is_refused_and_so_is_a_residue_without_a_token() -> None:
    model = tiny_model("bert")
    with pytest.raises(ModelError, match=r"does not give each residue .* a protein model"):
        encode_protein(word_pieces(), "SOUVENIR", model)
    with pytest.raises(DataError, match="no token for Z: "):
        encode_protein(letter_tokenizer(), SEQUENCE, model, letters="AZ")
    # As context, a residue that the model does not know is no fault.
    assert len(encode_protein(letter_tokenizer(), "ABZC", model, letters="AC").places) == 4


def test_a_sequence_that_is_too_long_is_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"has 102 tokens, the model holds 62. .*--offset"):
        mutation_scores(tiny_model("roberta"), letter_tokenizer(), "A" * 100, ["A1C"])


@pytest.mark.parametrize("method", MARGINALS)
def test_real_antibody_models_score_as_a_plain_loop(method: Any, antiberty: Path) -> None:
    mutations = ["Q1E", "V2A:Q3L", "G49A", "S17T", "WT"]
    for folder, spaced in ((ASSETS / "sapiens_vh", False), (antiberty, True)):
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        expected = [by_hand(model.eval(), tokenizer, REAL, m, method, spaced=spaced) for m in mutations]
        found = mutation_scores(model, tokenizer, REAL, mutations, method=method)
        assert found == pytest.approx(expected, abs=2e-4)
