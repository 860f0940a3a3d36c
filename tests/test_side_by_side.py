"""A base and its adapters, loaded once, answer as each does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from peft_mlm.errors import AdapterError, ModelError
from peft_mlm.loading import Loaded, load
from peft_mlm.side_by_side import Sides, load_sides
from tests.adapters import IDS, save_random_adapter
from tests.tiny import difference, letter_tokenizer, logits_at, save_base, save_encoder, tiny_model


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(base_folder, folder / name, seed) for seed, name in enumerate(("one", "two"), 1)]


def logits(loaded: Loaded) -> torch.Tensor:
    return logits_at(loaded.model, IDS)


def of_base(folder: Path) -> torch.Tensor:
    return logits_at(AutoModelForMaskedLM.from_pretrained(folder), IDS)


def weights(sides: Sides) -> set[int]:
    """Where the embeddings of each side lie in memory."""
    return {sides.loaded(name).model.get_input_embeddings().weight.data_ptr() for name in sides.sides}


def test_a_base_loaded_once_and_each_adapter_answer_as_alone_in_any_order(
    base_folder: Path, adapters: list[Path]
) -> None:
    sides = load_sides([str(path) for path in adapters])
    assert list(sides.sides) == [None, "one", "two"]
    assert (sides.base, sides.notices) == (str(base_folder), [])
    assert len(weights(sides)) == 1
    alone = {None: of_base(base_folder), **{path.name: logits(load(str(path))) for path in adapters}}
    for name in ("two", None, "one", "one", None, "two"):
        assert torch.equal(logits(sides.loaded(name)), alone[name])


def test_one_adapter_stands_beside_its_base_under_any_name(base_folder: Path, adapters: list[Path]) -> None:
    sides = load_sides({"mine": str(adapters[0])})
    assert list(sides.sides) == [None, "mine"]
    assert len(weights(sides)) == 1
    assert torch.equal(logits(sides.loaded("mine")), logits(load(str(adapters[0]))))
    assert torch.equal(logits(sides.loaded(None)), of_base(base_folder))
    assert list(load_sides([str(adapters[0])]).sides) == [None, "one"]


def test_a_base_may_be_among_the_adapters_or_be_given(base_folder: Path, adapters: list[Path]) -> None:
    paths = [str(path) for path in adapters]
    for sides in (load_sides([paths[0], str(base_folder), paths[1]]), load_sides(paths, base=str(base_folder))):
        assert list(sides.sides) == [None, "one", "two"]
        assert torch.equal(logits(sides.loaded(None)), of_base(base_folder))


def test_an_adapter_that_cannot_be_switched_off_gets_a_base_beside_it(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "biased", 3, bias="all")
    sides = load_sides([str(adapter)])
    assert list(sides.sides) == [None, "biased"]
    assert len(weights(sides)) == 2
    for _ in range(2):
        assert torch.equal(logits(sides.loaded("biased")), logits(load(str(adapter))))
        assert torch.equal(logits(sides.loaded(None)), of_base(base_folder))
    assert difference(logits(sides.loaded("biased")), of_base(base_folder)) > 0.1


def test_a_model_stands_alone(base_folder: Path) -> None:
    sides = load_sides([str(base_folder)])
    assert list(sides.sides) == [base_folder.name]
    assert torch.equal(logits(sides.loaded(base_folder.name)), of_base(base_folder))


def test_a_base_without_a_head_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    adapter = save_random_adapter(encoder, tmp_path / "adapter_of_encoder", 1, modules_to_save=["transform", "decoder"])
    sides = load_sides([str(adapter)])
    assert list(sides.sides) == ["adapter_of_encoder"]
    (notice,) = sides.notices
    assert "no masked LM head of its own" in notice


def test_several_whole_models_are_refused(base_folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="is a whole model"):
        load_sides([str(base_folder), str(other)])
    with pytest.raises(ModelError, match="is a whole model"):
        load_sides([str(adapters[0]), str(other)], base=str(base_folder))


def test_adapters_of_different_bases_are_refused_by_name(adapters: list[Path], tmp_path: Path) -> None:
    tiny_model("roberta", seed=5).save_pretrained(tmp_path / "other")
    letter_tokenizer().save_pretrained(tmp_path / "other")
    foreign = save_random_adapter(tmp_path / "other", tmp_path / "foreign", 1)
    with pytest.raises(AdapterError, match="foreign"):
        load_sides([str(adapters[0]), str(foreign)])
