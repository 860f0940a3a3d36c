"""Where a run's figures go beside metrics.jsonl (`report_to`): what each place needs, and where it writes.

Nothing heavy is imported here: what is missing is said before a model is loaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft_mlm.errors import ArgumentsError
from peft_mlm.run_folder import RunFolder


class Reporter(NamedTuple):
    """A place that transformers reports to.

    Attributes:
        modules: What must be there to be imported, one of them; none where no package is needed.
        package: What pip installs.
    """

    modules: tuple[str, ...]
    package: str


# Arguments whose values nobody else may see.
SECRET = ("--token", "--hub_token")
# transformers' INTEGRATION_TO_CALLBACK, with what its callbacks ask for.
REPORTERS = {
    "azure_ml": Reporter(("azureml.core",), "azureml-sdk"),
    "clearml": Reporter(("clearml",), "clearml"),
    "codecarbon": Reporter(("codecarbon",), "codecarbon"),
    "comet_ml": Reporter(("comet_ml",), "comet-ml"),
    "dagshub": Reporter(("dagshub",), "dagshub"),
    "dvclive": Reporter(("dvclive",), "dvclive"),
    "flyte": Reporter(("flytekit",), "flytekit"),
    "kubeflow": Reporter((), ""),
    "mlflow": Reporter(("mlflow", "mlflow_skinny"), "mlflow"),
    "neptune": Reporter(("neptune",), "neptune"),
    "swanlab": Reporter(("swanlab",), "swanlab"),
    "tensorboard": Reporter(("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": Reporter(("trackio",), "trackio"),
    "wandb": Reporter(("wandb",), "wandb"),
}


def asked_reporters(training: Mapping[str, Any]) -> list[str]:
    """List the places that a run reports to.

    Args:
        training: Training arguments by name.

    Returns:
        Names; for "all" those whose packages are installed.
    """
    given = training.get("report_to") or []
    names = [given] if isinstance(given, str) else list(given)
    if names == ["all"]:
        return [name for name in REPORTERS if REPORTERS[name].modules and _is_installed(REPORTERS[name])]
    return [name for name in names if names != ["none"]]


def check_reporters(names: Iterable[str]) -> None:
    """Check that there are such places, and that their packages are installed.

    Args:
        names: From `asked_reporters`.

    Raises:
        ArgumentsError: A name is unknown, or its package is missing.
    """
    faults = []
    for name in names:
        row = REPORTERS.get(name)
        if row is None:
            faults.append(f"report_to {name!r} is no place to report to. There are: all, none, {', '.join(REPORTERS)}.")
        elif not _is_installed(row):
            faults.append(f"report_to {name} needs the package {row.package}: pip install {row.package}")
    if faults:
        raise ArgumentsError(faults)


@contextmanager
def reports_in(run: RunFolder, callbacks: Iterable[Any]) -> Iterator[None]:
    """Let those that write files write them into the run folder, unless the user has said where; tell them no token.

    TensorBoard's would lie among the checkpoints, under the machine's name; Weights & Biases' where the command was
    started. The other places keep what they have where they keep everything. Several note the command line, as it
    stands in `sys.argv`, and send it away: tokens are taken out of it meanwhile.

    Args:
        run: The run folder.
        callbacks: Those of the trainer.

    Yields:
        Nothing.
    """
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(run.tensorboard)
    chosen, words = os.environ.get("WANDB_DIR"), sys.argv[:]
    if chosen is None:
        os.environ["WANDB_DIR"] = str(run.path.absolute())
    sys.argv[:] = without_tokens(words)
    try:
        yield
    finally:
        sys.argv[:] = words
        if chosen is None:
            del os.environ["WANDB_DIR"]


def without_tokens(words: Sequence[str]) -> list[str]:
    """Take the values of secret arguments out of a command line.

    Args:
        words: Of the command line.

    Returns:
        The same words, with *** for each token.
    """
    kept = []
    for before, word in zip(("", *words), words, strict=False):
        flag, equals, _ = word.partition("=")
        kept.append("***" if before in SECRET else f"{flag}=***" if equals and flag in SECRET else word)
    return kept


def _is_installed(row: Reporter) -> bool:
    return not row.modules or any(_can_import(module) for module in row.modules)


def _can_import(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that it is in
        return False
    return spec is not None and spec.origin is not None  # a folder of that name (`wandb/`) is no package
