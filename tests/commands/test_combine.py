"""Combined adapters against sums of the changes that plain PEFT merges, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_mlm
from peft_mlm.arguments import ModelArguments
from peft_mlm.errors import AdapterError
from peft_mlm.fingerprint import write_fingerprint
from peft_mlm.model import load_base
from tests.adapters import adapted_logits, changes_of, logits_of, logits_of_base_plus, save_random_adapter
from tests.commands.conftest import Answer, train
from tests.tiny import letter_tokenizer, save_base

# Adapters that differ in all that LoRA's configuration can say of a sum.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["key", "value", "output.dense"]},
    "patterns": {
        "r": 2, "lora_alpha": 7, "target_modules": ["query", "key", "intermediate.dense"],
        "rank_pattern": {"layer.0.attention.self.query": 5}, "alpha_pattern": {r"layer.\d+.intermediate.dense": 9},
    },
    "embedding": {"r": 2, "target_modules": ["position_embeddings", "query"]},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["dense"]},
}  # fmt: skip


@pytest.fixture(scope="session")
def kinds(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_random_adapter(base_folder, folder / name, seed, **options)
        for seed, (name, options) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="session")
def pair(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the same layers and rank."""
    folder = tmp_path_factory.mktemp("pair")
    return [save_random_adapter(base_folder, folder / str(seed), seed, r=3, size=0.2) for seed in (11, 12)]


def combine(adapters: list[Path], output: Path, **options: Any) -> dict[str, Any]:
    return peft_mlm.combine([str(adapter) for adapter in adapters], output, **options)


def weighted_sum(base: Path, adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    every = [changes_of(base, adapter) for adapter in adapters]
    return {name: sum(w * c[name] for w, c in zip(weights, every, strict=True)) for name in every[0]}  # type: ignore[misc]


def assert_changes(base: Path, adapter: Path, expected: dict[str, torch.Tensor], tolerance: float = 2e-7) -> None:
    given = changes_of(base, adapter)
    for name, change in expected.items():
        assert (given[name] - change).abs().max() <= tolerance * max(1.0, float(change.abs().max())), name


def test_the_exact_sum_of_unlike_adapters_is_the_sum_of_what_peft_merges(
    kinds: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    weights = [0.5, -0.3, 0.8, 1.0, -1.2]
    record = combine(list(kinds.values()), tmp_path / "out", weights=weights)
    expected = weighted_sum(base_folder, list(kinds.values()), weights)
    assert_changes(base_folder, tmp_path / "out", expected)
    through_peft, ours = adapted_logits(base_folder, tmp_path / "out"), logits_of_base_plus(base_folder, expected)
    assert (through_peft - ours).abs().max() < 1e-6 * ours.abs().max()
    loaded = peft_mlm.load(str(tmp_path / "out"), base=str(base_folder)).model
    assert (logits_of(loaded) - ours).abs().max() < 1e-6 * ours.abs().max()
    assert record["ranks"] == [2, 10]
    assert record["relative_error"] == 0


def test_the_sum_is_not_the_one_of_peft_that_adds_the_matrices_apart(
    pair: list[Path], base_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base_folder).double(), str(pair[0]), "a")
    model.load_adapter(str(pair[1]), "b")
    model.double().add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    merged = dict(model.merge_and_unload().named_parameters())
    plain = dict(AutoModelForMaskedLM.from_pretrained(base_folder).double().named_parameters())
    theirs = {name: merged[name].detach() - plain[name].detach() for name in plain}
    expected = weighted_sum(base_folder, pair, [0.5, 0.5])
    combine(pair, tmp_path / "linear", method="linear")
    assert_changes(base_folder, tmp_path / "linear", expected)

    def norm(changes: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([change.norm() for change in changes.values()]).norm())

    off = {name: theirs[name] - expected[name] for name in expected}
    assert norm(off) / norm(expected) > 0.5


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_one_adapter_of_weight_one_is_itself(
    method: str, kinds: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    for name in ("rslora", "patterns", "embedding"):
        options = {"rank": 9} if method == "svd" else {}
        combine([kinds[name]], tmp_path / name, weights=[1], method=method, **options)
        assert_changes(base_folder, tmp_path / name, changes_of(base_folder, kinds[name]))


def test_an_adapter_less_itself_is_the_base(kinds: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    same = [kinds["patterns"], kinds["patterns"]]
    for method in ("cat", "linear"):
        combine(same, tmp_path / method, weights=[1, -1], method=method)
        assert_changes(base_folder, tmp_path / method, weighted_sum(base_folder, same, [1, -1]), 1e-9)
    assert (
        adapted_logits(base_folder, tmp_path / "cat") - adapted_logits(base_folder, tmp_path / "linear")
    ).abs().max() < 1e-6


def test_a_negative_weight_takes_a_change_away(pair: list[Path], base_folder: Path, tmp_path: Path) -> None:
    combine([pair[0]], tmp_path / "less", weights=[-0.7])
    expected = {name: -0.7 * change for name, change in changes_of(base_folder, pair[0]).items()}
    assert_changes(base_folder, tmp_path / "less", expected)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_the_order_of_the_adapters_makes_no_difference(
    method: str, kinds: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    names, weights = ["plain", "rslora", "patterns"], [0.5, 0.3, 0.9]
    options: dict[str, Any] = {"method": method} | ({"rank": 3} if method not in ("cat", "linear") else {})
    one = combine([kinds[name] for name in names], tmp_path / "one", weights=weights, **options)
    other = combine([kinds[name] for name in names[::-1]], tmp_path / "other", weights=weights[::-1], **options)
    assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-9)
    assert_changes(base_folder, tmp_path / "one", changes_of(base_folder, tmp_path / "other"))
    again = combine([kinds[name] for name in names], tmp_path / "again", weights=weights, **options)
    assert {k: v for k, v in again.items() if k != "output_dir"} == {k: v for k, v in one.items() if k != "output_dir"}
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "one" / "adapter_model.safetensors"
    ).read_bytes()


def test_combining_in_two_steps_is_combining_at_once(pair: list[Path], base_folder: Path, tmp_path: Path) -> None:
    combine(pair, tmp_path / "both", weights=[0.5, 0.25])
    combine([tmp_path / "both", pair[0]], tmp_path / "more", weights=[2, -1])
    assert_changes(base_folder, tmp_path / "more", weighted_sum(base_folder, pair, [0, 0.5]))


def test_svd_is_the_best_approximation_and_tells_what_it_loses(
    kinds: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    adapters, weights = list(kinds.values()), [0.5, -0.3, 0.8, 1.0, -1.2]
    record = combine(adapters, tmp_path / "out", weights=weights, rank=2)
    assert record["method"] == "svd"
    assert record["ranks"] == [2, 2]
    expected, given = weighted_sum(base_folder, adapters, weights), changes_of(base_folder, tmp_path / "out")
    lost = whole = 0.0
    for name, share in record["matrices"].items():
        exact = expected[f"{name}.weight"].numpy()
        u, s, vh = np.linalg.svd(exact)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        np.testing.assert_allclose(given[f"{name}.weight"].numpy(), best, atol=1e-6)
        assert share == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), abs=1e-6)
        lost, whole = lost + float((s[2:] ** 2).sum()), whole + float((s**2).sum())
    assert record["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert record["relative_error"] > 0.1


def sparse_by_the_papers(
    method: str, changes: list[dict[str, np.ndarray]], weights: list[float], density: float
) -> dict[str, np.ndarray]:
    """TIES (Yadav et al. 2023, algorithm 1) and magnitude pruning on whole task vectors, in numpy."""
    names = sorted({name for change in changes for name in change})
    shapes = {name: c[name].shape for c in changes for name in c}
    trimmed = []
    for change, weight in zip(changes, weights, strict=True):
        own = [name for name in names if name in change]
        vector = np.concatenate([change[name].ravel() for name in own])
        kept = np.argsort(-np.abs(vector))[: round(density * len(vector))]
        sparse = np.zeros_like(vector)
        sparse[kept] = vector[kept]
        pieces = dict(zip(own, np.split(sparse, np.cumsum([change[n].size for n in own])[:-1]), strict=True))
        trimmed.append(np.concatenate([weight * pieces.get(n, np.zeros(np.prod(shapes[n]))) for n in names]))
    stack = np.stack(trimmed)
    if method == "magnitude_prune":
        merged = stack.sum(0)
    else:
        elected = np.sign(stack.sum(0))
        agree = (np.sign(stack) == elected) & (stack != 0)
        merged = np.where(agree, stack, 0).sum(0) / np.maximum(agree.sum(0), 1)
    sizes = [int(np.prod(shapes[name])) for name in names]
    return {n: p.reshape(shapes[n]) for n, p in zip(names, np.split(merged, np.cumsum(sizes)[:-1]), strict=True)}


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_trimmed_sums_are_those_of_the_paper(
    method: str, kinds: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    adapters, weights, density = [kinds["plain"], kinds["rslora"], kinds["patterns"]], [0.5, 1.0, 0.8], 0.3
    record = combine(adapters, tmp_path / "out", weights=weights, method=method, density=density, rank=32)
    dense = [
        {name: c.numpy() for name, c in changes_of(base_folder, adapter).items() if c.any()} for adapter in adapters
    ]
    expected = sparse_by_the_papers(method, dense, weights, density)
    given = changes_of(base_folder, tmp_path / "out")
    for name, change in expected.items():
        np.testing.assert_allclose(given[name].numpy(), change, atol=2e-7)
    assert record["relative_error"] < 1e-6  # rank 32 is the whole matrix
    cut = combine(adapters, tmp_path / "cut", weights=weights, method=method, density=density, rank=2)
    assert cut["relative_error"] > 0.2


def test_ties_of_density_one_on_changes_that_agree_is_their_mean(
    pair: list[Path], base_folder: Path, tmp_path: Path
) -> None:
    combine([pair[0], pair[0]], tmp_path / "out", method="ties", density=1.0, weights=[1, 3], rank=32)
    expected = {name: 2 * change for name, change in changes_of(base_folder, pair[0]).items()}
    assert_changes(base_folder, tmp_path / "out", expected)


def test_dare_sums_what_it_has_dropped_and_scaled(pair: list[Path], base_folder: Path, tmp_path: Path) -> None:
    combine([pair[0]], tmp_path / "a", method="dare_linear", density=0.4, weights=[1], rank=32, seed=5)
    combine([pair[1]], tmp_path / "b", method="dare_linear", density=0.4, weights=[1], rank=32, seed=5)
    whole, dropped = changes_of(base_folder, pair[0]), changes_of(base_folder, tmp_path / "a")
    kept_shares = []
    for name, change in whole.items():
        if change.any():
            kept = dropped[name].abs() > 1e-6
            kept_shares.append(float(kept.double().mean()))
            assert (dropped[name] - torch.where(kept, change / 0.4, 0.0)).abs().max() < 3e-6
    assert np.mean(kept_shares) == pytest.approx(0.4, abs=0.03)
    combine(pair, tmp_path / "sum", method="dare_linear", density=0.4, weights=[0.5, 2], rank=32, seed=5)
    expected = weighted_sum(base_folder, [tmp_path / "a", tmp_path / "b"], [0.5, 2])
    assert_changes(base_folder, tmp_path / "sum", expected, 2e-6)
    combine(pair, tmp_path / "other", method="dare_linear", density=0.4, weights=[0.5, 2], rank=32, seed=6)
    other = changes_of(base_folder, tmp_path / "other")
    assert max(float((other[name] - expected[name]).abs().max()) for name in expected) > 0.01


def test_biases_and_trained_modules_are_summed_as_differences_from_the_base(base_folder: Path, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"bias": "lora_only"},
        {"bias": "all", "target_modules": ["key"]},
        {"modules_to_save": ["lm_head.dense", "attention.output.LayerNorm"]},
    ]
    adapters = [save_random_adapter(base_folder, tmp_path / str(i), i, **o) for i, o in enumerate(options)]
    weights = [0.5, 0.3, -0.4]
    combine(adapters, tmp_path / "out", weights=weights, base=str(base_folder))
    # peft 0.21.2 loses a tied decoder's bias in a merge, so that the parameters are compared as they run
    expected = weighted_sum(base_folder, adapters, weights)
    ours = logits_of_base_plus(base_folder, expected)
    loaded = peft_mlm.load(str(tmp_path / "out"), base=str(base_folder)).model
    assert (logits_of(loaded) - ours).abs().max() < 1e-6 * ours.abs().max()


def test_lora_biases_are_summed(base_folder: Path, tmp_path: Path) -> None:
    one = save_random_adapter(base_folder, tmp_path / "one", 1, lora_bias=True, lora_alpha=3)
    other = save_random_adapter(base_folder, tmp_path / "other", 2, target_modules=["key", "query"])
    combine([one, other], tmp_path / "out", weights=[0.5, 2])
    assert_changes(base_folder, tmp_path / "out", weighted_sum(base_folder, [one, other], [0.5, 2]))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is True


def token_adapter(base: Path, folder: Path, tokens: list[str], seed: int) -> Path:
    """An adapter with rows of new tokens and its tokenizer, as our own training ships it."""
    tokenizer = letter_tokenizer(tokens)
    ids = list(range(25, 25 + len(tokens)))
    grown = save_base(folder.with_name(f"{folder.name}_grown"), vocab_size=25 + len(tokens))
    save_random_adapter(grown, folder, seed, trainable_token_indices={"roberta.embeddings.word_embeddings": ids})
    plain = load_base(ModelArguments(model_name_or_path=str(base)))
    write_fingerprint(plain.fingerprint, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_of_new_tokens_are_averaged_over_the_adapters_that_have_them(base_folder: Path, tmp_path: Path) -> None:
    one = token_adapter(base_folder, tmp_path / "one", ["xx", "yy"], 1)
    other = token_adapter(base_folder, tmp_path / "other", ["xx"], 2)
    plain = save_random_adapter(base_folder, tmp_path / "plain", 3)
    combine([one, other, plain], tmp_path / "out", weights=[0.6, 0.2, -1])
    key = "base_model.model.roberta.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"
    rows = [load_file(folder / "adapter_model.safetensors")[key] for folder in (one, other, tmp_path / "out")]
    assert torch.allclose(rows[2][0], (0.6 * rows[0][0] + 0.2 * rows[1][0]) / 0.8, atol=1e-6)
    assert torch.allclose(rows[2][1], rows[0][1], atol=1e-6)
    loaded = peft_mlm.load(str(tmp_path / "out"), base=str(base_folder))
    assert loaded.tokenizer.convert_tokens_to_ids("yy") == 26
    embeddings = loaded.model.merge_and_unload().get_input_embeddings().weight
    assert torch.allclose(embeddings[25:], rows[2], atol=1e-6)
    alone = combine([one], tmp_path / "alone", weights=[1])
    assert alone["token_rows"] == 2
    assert torch.equal(load_file(tmp_path / "alone" / "adapter_model.safetensors")[key], rows[0])


def test_tokens_that_cannot_be_brought_together_are_refused(base_folder: Path, tmp_path: Path) -> None:
    one = token_adapter(base_folder, tmp_path / "one", ["xx", "yy"], 1)
    other = token_adapter(base_folder, tmp_path / "other", ["zz"], 2)
    with pytest.raises(AdapterError, match="id 25 is 'zz' in the one and 'xx' in the other"):
        combine([one, other], tmp_path / "out")
    with pytest.raises(AdapterError, match="weights above zero"):
        combine([one, one], tmp_path / "out", weights=[1, -1])
    assert not (tmp_path / "out").exists()


def test_heads_trained_from_starts_of_their_own_are_combined_only_as_asked(
    encoder: Path, text_file: Path, held_out: Path, tmp_path: Path
) -> None:
    runs = [train(encoder, text_file, held_out, tmp_path / str(seed), max_steps=2, seed=seed) for seed in (1, 2)]
    with pytest.raises(AdapterError, match=r"no cls.predictions.*--trained_modules: average .*, first "):
        combine(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    heads = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    key = "base_model.model.cls.predictions.transform.dense.weight"
    combine(runs, tmp_path / "average", weights=[1, 3], trained_modules="average")
    combine(runs, tmp_path / "first", trained_modules="first")
    average, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("average", "first"))
    assert torch.allclose(average[key], (heads[0][key] + 3 * heads[1][key]) / 4, atol=1e-7)
    assert torch.equal(first[key], heads[0][key])
    assert torch.equal(peft_mlm.combine([str(runs[0])], tmp_path / "one", weights=[1]) and heads[0][key], first[key])
    assert torch.isfinite(logits_of(peft_mlm.load(str(tmp_path / "average"), base=str(encoder)).model)).all()


def test_adapters_of_a_quantised_base_stay_for_that_base(
    base_folder: Path, text_file: Path, held_out: Path, trained_run: Path, tmp_path: Path
) -> None:
    runs = [
        train(base_folder, text_file, held_out, tmp_path / f"run{seed}", max_steps=2, load_in_4bit=True, seed=seed)
        for seed in (1, 2)
    ]
    combine(runs, tmp_path / "out", weights=[1, 0])
    one, other = (peft_mlm.load(str(p), base=str(base_folder)).model for p in (runs[0] / "adapter", tmp_path / "out"))
    ids = torch.tensor([[0, 7, 4, 9, 10, 2]])
    with torch.no_grad():
        assert (one(ids).logits - other(ids).logits).abs().max() < 1e-5
    with pytest.raises(AdapterError, match="prepared alike"):
        combine([runs[0], trained_run], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_what_has_no_sum_is_refused_with_what_to_do(base_folder: Path, other_base: Path, tmp_path: Path) -> None:
    good = save_random_adapter(base_folder, tmp_path / "good", 1)
    out = tmp_path / "out"
    for name, config, options, told in [
        ("dora", "LoraConfig", {"use_dora": True}, "DoRA.*peft-mlm convert --rank"),
        ("loha", "LoHaConfig", {}, "an adapter of LoHa, not LoRA.*peft-mlm convert"),
        ("pissa", "LoraConfig", {"init_lora_weights": "pissa"}, "PiSSA as PEFT saves it.*peft-mlm convert"),
    ]:
        bad = save_random_adapter(base_folder, tmp_path / name, 2, config=config, **options)
        with pytest.raises(AdapterError, match=told):
            combine([good, bad], out)
    strange = save_random_adapter(other_base, tmp_path / "strange", 3)
    with pytest.raises(AdapterError, match=r"different bases: weights of .*--any_base"):
        combine([good, strange], out)
    wider = save_random_adapter(save_base(tmp_path / "wide", intermediate_size=96), tmp_path / "wider", 3)
    with pytest.raises(AdapterError, match="different bases: shapes"):
        combine([good, wider], out, any_base=True)
    whole = save_random_adapter(base_folder, tmp_path / "whole", 4, target_modules=["key"], modules_to_save=["query"])
    with pytest.raises(AdapterError, match="another has trained it in full"):
        combine([good, whole], out, base=str(base_folder))
    assert not out.exists()
    combine([good, strange], out, any_base=True, weights=[1, 0])
    assert_changes(base_folder, out, changes_of(base_folder, good))


def test_damaged_files_are_refused(base_folder: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(base_folder, tmp_path / "adapter", 1)
    weights = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(weights))
    for told, changed in [
        ("not finite", weights | {first: weights[first] * float("nan")}),
        ("one of the two matrices", {key: value for key, value in weights.items() if key != first}),
        ("no part of plain LoRA", weights | {"base_model.model.lm_head.lora_X": torch.ones(2)}),
        ("ranks that do not agree", weights | {first: weights[first][:-1].contiguous()}),
    ]:
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=told):
            combine([adapter], tmp_path / "out")
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterError, match="cannot be read"):
        combine([adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line_end_in_one_sentence(
    pair: list[Path], tmp_path: Path, command: Callable[..., Answer]
) -> None:
    words = (*pair, "--output_dir", tmp_path / "out")
    text = ("--validation_file", tmp_path / "no.txt")
    assert "1 numbers for 2 adapters" in command("combine", *words, "--weights", "1").fault
    assert "0.7,0.3" in command("combine", *words, "--weights", "a,b").fault
    assert "choose cat, svd" in command("combine", *words, "--method", "slerp").fault
    assert "use --method svd with --rank 3" in command("combine", *words, "--method", "cat", "--rank", "3").fault
    assert "needs --rank" in command("combine", *words, "--method", "svd").fault
    assert "takes no density" in command("combine", *words, "--density", "0.5").fault
    assert "at most 1" in command("combine", *words, "--method", "ties", "--density", "1.5").fault
    assert "choose delta, average, first" in command("combine", *words, "--trained_modules", "x").fault
    assert "without --search" in command("combine", *words, "--validation_file", "x.txt").fault
    assert "No text to evaluate on" in command("combine", *words, "--search").fault
    assert "there is no such argument" in command("combine", *words, "--search", *text, "--wieghts", "1").fault
    assert "takes none here" in command("combine", *words, "--search", *text, "--config_name", "x").fault
    assert "is not empty" in command("combine", *pair, "--output_dir", pair[0]).fault
    assert "no adapter" in command("combine", tmp_path, "--output_dir", tmp_path / "out").fault
    assert not (tmp_path / "out").exists()


def test_the_record_and_the_card_name_no_path(
    trained_run: Path, pair: list[Path], base_folder: Path, tmp_path: Path, command: Callable[..., Answer]
) -> None:
    out = tmp_path / "out"
    record = command("combine", trained_run, pair[0], "--weights", "1,-0.5", "--output_dir", out, "--json").record
    written = json.loads((out / "combination.json").read_text())
    assert written.items() >= {k: v for k, v in record.items() if k not in ("output_dir", "bytes")}.items()
    assert [adapter["name"] for adapter in written["adapters"]] == [trained_run.name, pair[0].name]
    assert record["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    for file in out.glob("*"):
        for secret in (str(tmp_path), str(base_folder.parent), str(trained_run.parent)):
            assert secret.encode() not in file.read_bytes(), file
    assert f"{trained_run.name} with weight 1; {pair[0].name} with weight -0.5" in (out / "README.md").read_text()


def test_the_search_finds_weights_that_are_no_worse_than_all_it_began_with(
    trained_run: Path,
    base_folder: Path,
    text_file: Path,
    held_out: Path,
    tmp_path: Path,
    command: Callable[..., Answer],
) -> None:
    other = train(base_folder, text_file, held_out, tmp_path / "other", max_steps=8, lora_r=4, seed=3)
    flags = ["--validation_file", str(held_out), "--rows", "line"]
    words = ["combine", trained_run, other, "--search", "--base", base_folder, *flags, "--search_evaluations", "20"]
    record = command(*words, "--output_dir", tmp_path / "out", "--json").record
    search = record["search"]
    points = search["points"]
    assert set(points) == {"base", trained_run.name, "other", "equal", "found"}
    assert points["found"]["loss"] == min(point["loss"] for point in points.values())
    assert points["found"]["weights"] == record["weights"] == search["weights"]
    assert search["text"] == [held_out.name]
    # what it reports is what the written adapter, and each one alone, measure
    for name, adapter in [("found", tmp_path / "out"), ("other", other), (trained_run.name, trained_run)]:
        alone = peft_mlm.evaluate(str(adapter), flags=flags, base=str(base_folder))
        assert alone["loss"] == pytest.approx(points[name]["loss"], rel=1e-5), name
    base = peft_mlm.evaluate(str(trained_run), flags=flags, use_base=True)
    assert base["loss"] == pytest.approx(points["base"]["loss"], rel=1e-5)
    again = command(*words, "--output_dir", tmp_path / "again", "--json").record
    assert again["search"] == search


def test_lora_biases_beside_a_layer_without_bias_are_refused(base_folder: Path, tmp_path: Path) -> None:
    one = save_random_adapter(base_folder, tmp_path / "one", 1, lora_bias=True)
    other = save_random_adapter(base_folder, tmp_path / "other", 2, target_modules=["position_embeddings"])
    with pytest.raises(AdapterError, match="position_embeddings, which has none"):
        combine([one, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
