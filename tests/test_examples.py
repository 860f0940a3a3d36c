"""The examples run as they stand, only shorter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples import adapt_then_classify as example


def test_adapt_then_classify_measures_base_and_adapted_with_the_same_labels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = example.read_labelled
    monkeypatch.setattr(example, "read_labelled", lambda file: tuple(part[::4] for part in every(file)))
    record: Any = example.main(["--steps", "5", "--draws", "4", "--labels", "2", "16"])
    assert record["perplexity"]["adapted"] < record["perplexity"]["base"]
    few, many = record["accuracy"]
    for row in (few, many):
        assert row["gain"]["mean"] == pytest.approx(row["adapted"]["mean"] - row["base"]["mean"])
        assert row["adapted"]["mean"] != row["base"]["mean"]
    assert many["base"]["mean"] > few["base"]["mean"]
    assert many["base"]["mean"] > 0.5  # chance is 0.2
    out = capsys.readouterr().out
    assert f"{many['base']['mean']:.3f} ± {many['base']['standard_error']:.3f}" in out


def test_its_labels_are_of_five_genes_and_no_v_gene_is_on_both_sides() -> None:
    def v_genes(file: Path) -> set[str]:
        return {line.split()[0] for line in file.read_text().splitlines() if line.startswith(">")}

    train, held_out = (example.ASSETS / "germline" / f"mouse_{part}.fasta" for part in ("train", "validation"))
    assert not v_genes(train) & v_genes(held_out)
    sequences, names = example.read_labelled(held_out)
    assert len(sequences) == len(names) == 185
    assert len(set(names)) == 5
    assert all(set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY") for sequence in sequences)


def test_its_classifier_finds_the_least_of_its_loss() -> None:
    """Against scikit-learn, which states the same loss with C = 1 / (2 penalty)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 8, generator=generator)
    classes = (vectors[:, :3] + 0.7 * torch.randn(60, 3, generator=generator)).argmax(1)
    held_out = torch.randn(200, 8, generator=generator)
    truth = held_out[:, :3].argmax(1)
    scaler = StandardScaler().fit(vectors.numpy())
    reference = LogisticRegression(C=1 / (2 * example.WEIGHT_PENALTY), max_iter=1000, tol=1e-8)
    reference.fit(scaler.transform(vectors.numpy()), classes.numpy())
    expected = (reference.predict(scaler.transform(held_out.numpy())) == truth.numpy()).mean()
    assert example.accuracy_of_probe(vectors, classes, held_out, truth) == pytest.approx(expected, abs=0.006)
