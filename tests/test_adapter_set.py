"""One base with several adapters: loaded together, switched, replaced; what does not go together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import peft_mlm
from peft_mlm.adapter import plan_adapter, save_adapter, wrap
from peft_mlm.adapter_set import AdapterSet, load_adapters
from peft_mlm.arguments import ModelArguments, PEFTArguments
from peft_mlm.errors import AdapterError, DataError, ModelError
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.loading import load
from peft_mlm.model import load_base
from tests.tiny import logits_at, perturb, same, save_base

IDS = torch.tensor([[0, 5, 9, 4, 13, 4, 20, 2], [0, 6, 4, 8, 8, 17, 24, 2]])


def make(base: Path, folder: Path, seed: int, *, named: str | None = None, **options: Any) -> str:
    """A trained adapter as `train` saves it: with the base's fingerprint, and the tokenizer where it changed."""
    model_options = {name: options.pop(name) for name in ("add_tokens", "new_token_init") if name in options}
    torch.manual_seed(seed)
    loaded = load_base(ModelArguments(model_name_or_path=str(base), **model_options))
    arguments = PEFTArguments(**(options if "peft_method" in options else {"use_lora": True, "lora_r": 4, **options}))
    model = wrap(loaded.model, plan_adapter(loaded.model, arguments, new_token_ids=loaded.new_token_ids))
    perturb(model, seed=seed)
    tokenizer = loaded.tokenizer if loaded.tokenizer_changed else None
    save_adapter(model, folder, base_name=named or str(base), tokenizer=tokenizer)
    write_fingerprint(loaded.fingerprint, folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def paths(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "mouse": make(base_folder, folder / "mouse", 1),
        "human": make(base_folder, folder / "human", 2, lora_r=16),
        "query": make(base_folder, folder / "query", 3, lora_target_modules=["query"]),
    }


@pytest.fixture
def together(paths: dict[str, str], base_folder: Path) -> AdapterSet:
    made = peft_mlm.load(str(base_folder), adapters=paths)
    assert isinstance(made, AdapterSet)
    return made


def alone(path: str) -> torch.Tensor:
    return logits_at(load(path).model, IDS)


def test_the_first_is_in_use_and_each_is_what_it_is_alone(together: AdapterSet, paths: dict[str, str]) -> None:
    assert (together.names, together.active) == (["mouse", "human", "query"], "mouse")
    assert same(logits_at(together.model, IDS), alone(paths["mouse"]))
    for name in ("query", "human", "mouse", "human"):
        assert same(logits_at(together.use(name), IDS), alone(paths[name]))
    assert not any(p.requires_grad for p in together.model.parameters())


def test_none_is_the_base(together: AdapterSet, base_folder: Path) -> None:
    base = logits_at(load(str(base_folder)).model, IDS)
    assert same(logits_at(together.use(None), IDS), base)
    assert together.active is None
    mixed = together.logits(IDS, torch.ones_like(IDS), [None, None])
    assert torch.equal(mixed, base)
    assert together.active is None


def state_of_switch(model: Any) -> list[Any]:
    """All that PEFT sets when it switches."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    grads = [name for name, p in model.named_parameters() if p.requires_grad]
    told = [(layer.active_adapters, layer.disable_adapters, layer.merged) for layer in layers]
    return [model.active_adapter, model.active_adapters, model.base_model.active_adapter, told, grads]


@pytest.mark.parametrize("changed", [False, True])
def test_a_switch_leaves_what_pefts_own_leaves(
    together: AdapterSet, base_folder: Path, tmp_path: Path, changed: bool
) -> None:
    if changed:
        together.add("more", make(base_folder, tmp_path / "more", 11))
        together.remove("mouse")
    names = together.names
    for name in (*names, None, names[-1], names[0], None, names[0]):
        ours = state_of_switch(together.use(name))
        assert together._layers  # PEFT's was not asked
        if name is None:
            together.model.base_model.disable_adapter_layers()
        else:
            together.model.base_model.enable_adapter_layers()
            together.model.set_adapter(together._inner[name], inference_mode=True)
        assert ours == state_of_switch(together.model)


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["dense"]}, {"peft_method": "ln_tuning"}, {"peft_method": "unilora"}], ids=str
)
def test_where_there_is_more_to_switch_peft_does_it(base_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    paths = {str(seed): make(base_folder, tmp_path / str(seed), seed, **options) for seed in (1, 2)}
    both = load_adapters(paths, base=str(base_folder))
    base = logits_at(load(str(base_folder)).model, IDS)
    for name in ("2", "1", None, "2", None, "1"):
        expected = base if name is None else alone(paths[name])
        assert same(logits_at(both.use(name), IDS), expected)
    assert not both._layers


def test_the_base_is_in_memory_once(together: AdapterSet, base_folder: Path) -> None:
    base = sum(p.numel() for p in load(str(base_folder)).model.parameters())
    adapters = {n: p.numel() for n, p in together.model.named_parameters() if "lora_" in n}
    assert sum(p.numel() for p in together.model.parameters()) == base + sum(adapters.values())


def test_a_list_is_named_after_its_folders(paths: dict[str, str], trained_run_copy: Path) -> None:
    assert load_adapters(list(paths.values())).names == ["mouse", "human", "query"]
    assert load_adapters([str(trained_run_copy), paths["mouse"]]).names == ["notes", "mouse"]
    assert load_adapters([str(trained_run_copy / "adapter")]).names == ["notes"]
    with pytest.raises(AdapterError, match="would both be named mouse"):
        load_adapters([paths["mouse"], paths["mouse"]])


@pytest.fixture(scope="module")
def trained_run_copy(
    base_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    folder = tmp_path_factory.mktemp("run") / "notes"
    peft_mlm.train(
        {
            "model_name_or_path": str(base_folder), "train_file": str(text_file), "output_dir": str(folder),
            "use_lora": True, "max_steps": 3, "do_eval": False, "rows": "line",
        }
    )  # fmt: skip
    return folder


def test_one_is_replaced_by_one_of_another_rank_without_touching_base_or_others(
    together: AdapterSet, paths: dict[str, str], base_folder: Path, tmp_path: Path
) -> None:
    embeddings = together.model.get_input_embeddings().weight
    new = make(base_folder, tmp_path / "new", 9, lora_r=32)
    for in_use in ("human", "mouse", None):
        together.use(in_use)
        together.replace("human", new)
        assert together.active == in_use
    assert together.model.get_input_embeddings().weight is embeddings
    assert same(logits_at(together.use("human"), IDS), alone(new))
    assert same(logits_at(together.use("mouse"), IDS), alone(paths["mouse"]))
    assert len(together.model.peft_config) == 3


def test_one_is_replaced_by_one_of_its_kind_and_another_alpha(
    together: AdapterSet, paths: dict[str, str], base_folder: Path, tmp_path: Path
) -> None:
    new = make(base_folder, tmp_path / "new", 9, lora_r=16, lora_alpha=48)
    layers = set(together.model.peft_config)
    for in_use in ("human", "mouse", None):
        together.use(in_use)
        for path in (paths["human"], new):
            together.replace("human", path)
            assert together.active == in_use
    assert set(together.model.peft_config) == layers  # swapped in place
    assert same(logits_at(together.use("human"), IDS), alone(new))
    assert same(logits_at(together.use("mouse"), IDS), alone(paths["mouse"]))
    together.use("human")
    together.model.save_pretrained(str(tmp_path / "saved"), selected_adapters=[together.model.active_adapter])
    (saved,) = (tmp_path / "saved").glob("*/adapter_config.json")
    assert json.loads(saved.read_text())["lora_alpha"] == 48


@pytest.mark.parametrize(
    "options",
    [{"rank_pattern": {"query": 4}}, {"alpha_pattern": {"query": 64}}, {"use_dora": True}, {"use_rslora": True}],
    ids=str,
)
def test_one_of_its_kind_in_its_place_computes_what_it_computes_alone(
    base_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """PEFT's own swap gives other numbers with patterns, and fails with DoRA."""
    old, new = (make(base_folder, tmp_path / str(seed), seed, **options) for seed in (1, 2))
    together = load_adapters({"one": old}, base=str(base_folder))
    together.replace("one", new)
    assert same(logits_at(together.model, IDS), alone(new))


def test_a_refused_replacement_leaves_the_old_one(
    together: AdapterSet, paths: dict[str, str], base_folder: Path, other_base: Path, tmp_path: Path
) -> None:
    foreign = make(other_base, tmp_path / "foreign", 4)
    ia3 = make(base_folder, tmp_path / "ia3", 4, peft_method="ia3")
    for path, why in ((foreign, "is not the base"), (ia3, "one method"), (str(base_folder), "is no adapter")):
        for change in (together.replace, lambda name, given: together.add("more", given)):
            with pytest.raises(AdapterError, match=why):
                change("human", path)
    with pytest.raises(AdapterError, match=r"no adapter 'rat' here. Adapters: mouse, human, query"):
        together.replace("rat", paths["mouse"])
    assert together.names == ["mouse", "human", "query"]
    assert same(logits_at(together.use("human"), IDS), alone(paths["human"]))
    together.replace("human", foreign, any_base=True)
    assert not torch.equal(logits_at(together.use("human"), IDS), alone(paths["human"]))


def test_adapters_are_added_and_removed(together: AdapterSet, paths: dict[str, str]) -> None:
    together.add("again", paths["human"])
    assert together.active == "mouse"
    assert same(logits_at(together.use("again"), IDS), alone(paths["human"]))
    together.remove("again")
    assert together.active is None
    together.remove("mouse")
    assert same(logits_at(together.use("query"), IDS), alone(paths["query"]))
    together.remove("human")
    with pytest.raises(AdapterError, match="only adapter"):
        together.remove("query")
    with pytest.raises(AdapterError, match="already"):
        together.add("query", paths["human"])
    assert same(logits_at(together.model, IDS), alone(paths["query"]))


def test_as_many_names_as_rows_are_needed(together: AdapterSet) -> None:
    with pytest.raises(DataError, match="2 rows and 1 names"):
        together.logits(IDS, torch.ones_like(IDS), ["mouse"])
    with pytest.raises(AdapterError, match="no adapter 'rat'"):
        together.logits(IDS, torch.ones_like(IDS), ["mouse", "rat"])


def test_an_adapter_of_another_base_is_refused(
    paths: dict[str, str], base_folder: Path, other_base: Path, tmp_path: Path
) -> None:
    foreign = make(other_base, tmp_path / "foreign", 4)
    for given, base in (({"mouse": paths["mouse"], "foreign": foreign}, None), ({"foreign": foreign}, base_folder)):
        with pytest.raises(AdapterError, match=r"is not the base that the adapter .*foreign was trained on"):
            load_adapters(given, base=None if base is None else str(base))
    both = load_adapters({"mouse": paths["mouse"], "foreign": foreign}, any_base=True)
    assert same(logits_at(both.model, IDS), alone(paths["mouse"]))


def test_without_a_fingerprint_the_bases_must_have_one_name(
    paths: dict[str, str], base_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(base_folder, tmp_path / "copy"))
    told = make(copy, tmp_path / "told", 5)
    assert load_adapters({"mouse": paths["mouse"], "told": told}).names == ["mouse", "told"]
    (tmp_path / "told" / "base_fingerprint.json").unlink()
    with pytest.raises(AdapterError, match="no fingerprint"):
        load_adapters({"mouse": paths["mouse"], "told": told})
    assert load_adapters({"mouse": paths["mouse"], "told": told}, base=str(base_folder)).names == ["mouse", "told"]


def test_new_tokens_must_be_the_same_in_all(paths: dict[str, str], base_folder: Path, tmp_path: Path) -> None:
    one = make(base_folder, tmp_path / "one", 6, add_tokens=["xy", "yz"])
    alike = make(base_folder, tmp_path / "same", 7, add_tokens=["xy", "yz"])
    swapped = make(base_folder, tmp_path / "swapped", 8, add_tokens=["yz", "xy"])
    both = load_adapters({"one": one, "alike": alike})
    for name, path in (("alike", alike), ("one", one), ("alike", alike)):
        assert same(logits_at(both.use(name), IDS), alone(path))
    assert both.tokenizer("xy")["input_ids"] == [0, 25, 2]
    with pytest.raises(AdapterError, match=r"cannot be mixed .* rows of tokens"):
        both.logits(IDS, torch.ones_like(IDS), ["one", "alike"])
    with pytest.raises(AdapterError, match="swapped has another vocabulary"):
        load_adapters({"one": one, "swapped": swapped})
    for order in (("one", "mouse"), ("mouse", "one")):
        with pytest.raises(AdapterError, match="one trains rows of tokens and the others do not"):
            load_adapters({name: {"one": one, "mouse": paths["mouse"]}[name] for name in order})


def test_a_quantised_base_is_shared_by_adapters_trained_on_it(
    paths: dict[str, str], base_folder: Path, tmp_path: Path
) -> None:
    four = [make(base_folder, tmp_path / name, seed) for seed, name in enumerate(("x", "y"))]
    for path in four:
        (Path(path) / "base_recipe.json").write_text(json.dumps({"load_in_4bit": True}))
    both = load_adapters(four)
    for name, path in zip(("x", "y"), four, strict=True):
        assert same(logits_at(both.use(name), IDS), alone(path))
    with pytest.raises(AdapterError, match="prepared in different ways"):
        load_adapters({"x": four[0], "mouse": paths["mouse"]})
    with pytest.raises(AdapterError, match="prepared in another way"):
        both.add("mouse", paths["mouse"])


def test_the_base_is_a_base(paths: dict[str, str], base_folder: Path) -> None:
    with pytest.raises(ModelError, match="is no base model but an adapter"):
        load_adapters({"human": paths["human"]}, base=paths["mouse"])
    with pytest.raises(AdapterError, match="no adapter: give one"):
        load_adapters([])
    with pytest.raises(AdapterError, match="Give the base once"):
        peft_mlm.load(str(base_folder), adapters=paths, base=str(base_folder))  # type: ignore[call-overload]
    assert load_adapters(paths, base=str(base_folder)).names == list(paths)
