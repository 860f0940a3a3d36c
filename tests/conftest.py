from __future__ import annotations

import os
from pathlib import Path

import pytest

# The tests never go to the network; those of the hub start a server of their own, in a process of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from tests.checkpoints import convert_antiberty, minilm
from tests.tiny import save_base, save_texts

# Several test processes share the cores; more threads than cores make all of them slow.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 short texts, one a line."""
    return save_texts(tmp_path_factory.mktemp("text") / "letters.txt", 300)


@pytest.fixture(scope="session")
def antiberty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real AntiBERTy as a plain BertForMaskedLM."""
    return convert_antiberty(tmp_path_factory.mktemp("antiberty"))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The real MiniLM encoder, which has no masked LM head."""
    return minilm()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests' data sets out of the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets_cache"))
