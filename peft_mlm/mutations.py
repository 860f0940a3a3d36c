"""Scores of protein mutations: how much more probable a masked LM finds the new residues than those of the wild type.

Two of the scores of Meier et al. 2021 (https://doi.org/10.1101/2021.07.09.450648), for a mutation that changes the
residues at the positions T of a wild type x:

    masked_marginal        sum over t in T of  ln p(x_t = mutant | x without T) - ln p(x_t = wild type | x without T)
    wild_type_marginal     sum over t in T of  ln p(x_t = mutant | x)           - ln p(x_t = wild type | x)

For the first, all positions of T hold the mask token at once; each set of positions is asked about once, however many
mutations it has. For the second, the wild type is read once, unmasked. Scores are in nats; that of the wild type is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_mlm.collator import special_ids_of
from peft_mlm.console import few_names
from peft_mlm.errors import DataError, ModelError
from peft_mlm.gathered_head import Door, base_of
from peft_mlm.masked_rows import Ids, MaskedRow, Numbers, log_probabilities, mask_id_of
from peft_mlm.positions import position_limit

Marginal = Literal["masked_marginal", "wild_type_marginal"]
MARGINALS = ("masked_marginal", "wild_type_marginal")
SUBSTITUTION = re.compile(r"([A-Z])([0-9]+)([A-Z])")
# What stands between several of them: a colon in ProteinGym's tables, other marks elsewhere.
JOINTS = re.compile(r"[:,;/+\s]+")
# Names of the wild type in tables of mutations.
WILD_TYPE = ("WT", "_WT", "WILDTYPE", "WILD_TYPE")
SHOWN = 3


class Substitution(NamedTuple):
    """One residue in place of another.

    Attributes:
        wild_type: The residue that is there.
        number: Its number in the list of mutations.
        mutant: The residue that comes in its place.
    """

    wild_type: str
    number: int
    mutant: str

    def __str__(self) -> str:
        return f"{self.wild_type}{self.number}{self.mutant}"


class ProteinTokens(NamedTuple):
    """A wild type as a row of the model.

    Attributes:
        ids: All tokens, special ones included, (T,).
        places: Where in the row each residue is, (residues,).
        residue_ids: The token of each letter that occurs in the sequence or in a mutation of it.
    """

    ids: Ids
    places: list[int]
    residue_ids: dict[str, int]


def parse_mutation(text: str) -> tuple[Substitution, ...]:
    """Read a mutation.

    Example:
        >>> parse_mutation("A123V:D200N")
        (Substitution(wild_type='A', number=123, mutant='V'), Substitution(wild_type='D', number=200, mutant='N'))

    Args:
        text: Substitutions such as A123V, several joined by `:`, `,`, `;`, `/`, `+` or space; or WT.

    Returns:
        The substitutions; none for the wild type.

    Raises:
        DataError: It is none of these, or changes a residue twice.
    """
    if text.strip().upper() in WILD_TYPE:
        return ()
    parts = [SUBSTITUTION.fullmatch(part) for part in JOINTS.split(text.strip())]
    found = [Substitution(part[1], int(part[2]), part[3]) for part in parts if part]
    if len(found) < len(parts):
        raise DataError(
            f"{text!r} is no mutation: write the residue that is there, its number and the new residue, such as "
            "A123V; several joined by colons, such as A123V:D200N; or WT for the wild type."
        )
    numbers = [one.number for one in found]
    if len(set(numbers)) < len(numbers):
        raise DataError(f"{text!r} changes a residue twice.")
    return tuple(found)


def check_mutations(
    mutations: Sequence[tuple[Substitution, ...]], sequence: str, *, offset: int = 0, names: Sequence[str] = ()
) -> None:
    """See that mutations are those of a sequence.

    Args:
        mutations: From `parse_mutation`.
        sequence: The wild type.
        offset: What is added to a residue's place in the sequence (1 for the first) to give its number in a mutation.
        names: What to call each mutation in a message, such as its line; by its own name where there are none.

    Raises:
        DataError: A residue is not in the sequence, or is another one there.
    """
    faults = []
    for index, mutation in enumerate(mutations):
        for one in mutation:
            place = one.number - offset - 1
            if not 0 <= place < len(sequence):
                fault = f"the sequence has the residues {offset + 1} to {offset + len(sequence)}"
            elif sequence[place] != one.wild_type:
                fault = f"residue {one.number} of the sequence is {sequence[place]}, not {one.wild_type}"
            else:
                continue
            faults.append(f"{one}{f' ({names[index]})' if names else ''}: {fault}")
    if faults:
        raise DataError(
            f"{'; '.join(faults[:SHOWN])}{f'; and {len(faults) - SHOWN} more' if len(faults) > SHOWN else ''}. Give "
            "the wild type that the mutations were named after; if they count from another residue, say by how many "
            "with --offset."
        )


def encode_protein(
    tokenizer: PreTrainedTokenizerBase, sequence: str, model: PreTrainedModel, *, letters: str = ""
) -> ProteinTokens:
    """Turn a sequence into a row, one token for each residue.

    Vocabularies of BERT's make (ProtBERT, AntiBERTy) know residues with spaces between them, others without: both are
    tried.

    Args:
        tokenizer: The model's tokenizer.
        sequence: Residues, one letter each.
        model: The masked LM, whose positions are the limit.
        letters: Residues that must have a token of their own, as those that come in place of others.

    Returns:
        The row, and where the residues are in it.

    Raises:
        ModelError: The tokenizer does not give each residue a token.
        DataError: The sequence is longer than the model holds, or a letter has no token.
    """
    unknown = [tokenizer.unk_token_id]
    special = set(special_ids_of(tokenizer)).difference(unknown)
    single = {letter: _plain_ids(tokenizer, letter, special) for letter in {*sequence, *letters}}
    for spelt in (sequence, " ".join(sequence)):
        ids = np.array(tokenizer(spelt, return_attention_mask=False)["input_ids"], np.int64)
        places = [place for place, token in enumerate(ids.tolist()) if token not in special]
        if [[token] for token in ids[places].tolist()] == [single[letter] for letter in sequence]:
            break
    else:
        raise ModelError(
            f"This tokenizer ({type(tokenizer).__name__}) does not give each residue of a sequence a token of its own, "
            "with or without spaces between them: mutations want a protein model."
        )
    strange = [letter for letter in sorted(set(letters)) if len(single[letter]) != 1 or single[letter] == unknown]
    if strange:
        raise DataError(f"The tokenizer has no token for {few_names(strange)}: such residues cannot be scored.")
    limit = position_limit(base_of(model))
    if limit is not None and len(ids) > limit:
        raise DataError(
            f"The sequence has {len(ids)} tokens, the model holds {limit}. Give the part around the mutations, and say "
            "by --offset how many residues before it were left out."
        )
    return ProteinTokens(ids, places, {letter: some[0] for letter, some in single.items() if some})


def mutation_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequence: str,
    mutations: Sequence[str],
    *,
    method: Marginal = "masked_marginal",
    offset: int = 0,
    max_tokens_per_batch: int | None = None,
    door: Door | Literal["find"] | None = "find",
    advance: Callable[[int], Any] = lambda rows: None,
) -> list[float]:
    """Score mutations of a protein.

    Args:
        model: A masked LM of proteins, with or without an adapter; it is run where it is, in evaluation mode.
        tokenizer: Its tokenizer.
        sequence: The wild type, one letter a residue; white space in it is left out.
        mutations: Such as A123V or A123V:D200N; WT is the wild type.
        method: "masked_marginal" or "wild_type_marginal".
        offset: As in `check_mutations`. Default 0.
        max_tokens_per_batch: As in `masked_rows.log_probabilities`.
        door: As there.
        advance: As there.

    Returns:
        A score for each mutation, in nats: above 0 where the model prefers the mutant.

    Raises:
        DataError: A mutation cannot be read, or is not one of this sequence; or the sequence is too long.
        ModelError: The tokenizer is not one of proteins, or has no mask token.
    """
    sequence = "".join(sequence.split())
    parsed = [parse_mutation(text) for text in mutations]
    check_mutations(parsed, sequence, offset=offset)
    letters = sorted({letter for mutation in parsed for one in mutation for letter in (one.wild_type, one.mutant)})
    protein = encode_protein(tokenizer, sequence, model, letters="".join(letters))
    wanted = [tuple(sorted(protein.places[one.number - offset - 1] for one in mutation)) for mutation in parsed]
    sets = position_sets(wanted, method)
    rows = [MaskedRow(protein.ids, places if method == "masked_marginal" else (), places) for places in sets]
    found = log_probabilities(
        model,
        rows,
        mask_id_of(tokenizer),
        candidates=[protein.residue_ids[letter] for letter in letters],
        max_tokens_per_batch=max_tokens_per_batch,
        door=door,
        advance=advance,
    )
    columns = {letter: column for column, letter in enumerate(letters)}
    by_set = dict(zip(sets, found, strict=True))
    scores = []
    for mutation, places in zip(parsed, wanted, strict=True):
        key = places if method == "masked_marginal" else (sets[0] if sets else ())
        differences = [
            _difference(by_set[key], key.index(protein.places[one.number - offset - 1]), one, columns)
            for one in mutation
        ]
        scores.append(math.fsum(differences))
    return scores


def position_sets(wanted: Sequence[tuple[int, ...]], method: Marginal) -> list[tuple[int, ...]]:
    """List the rows that a model is asked about.

    Args:
        wanted: The positions of each mutation.
        method: The score.

    Returns:
        Each set of positions once, in the order of their first mutation; for the wild type's marginals all in one.
    """
    if method == "masked_marginal":
        return list(dict.fromkeys(places for places in wanted if places))
    together = sorted({place for places in wanted for place in places})
    return [tuple(together)] if together else []


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, special: set[int]) -> list[int]:
    return [token for token in tokenizer(text, return_attention_mask=False)["input_ids"] if token not in special]


def _difference(found: Numbers, row: int, one: Substitution, columns: dict[str, int]) -> float:
    return float(found[row, columns[one.mutant]] - found[row, columns[one.wild_type]])
