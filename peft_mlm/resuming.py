"""What a checkpoint must hold beside its adapter for a run to go on exactly.

A checkpoint's adapter is made for use on the untouched base. Where that is another form than the one in training (a
product taken out of the base, ranks that may come back), the parameters as they are trained, the product and the
schedule's running means lie beside it in a second file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file

from peft_mlm.adapter import ADAPTER
from peft_mlm.errors import RunFolderError
from peft_mlm.initialization import Matrices
from peft_mlm.rank_schedule import schedule_state

TRAINING_STATE = "training_state.safetensors"


def write_training_state(model: PeftModel, folder: Path, initial: Mapping[str, Matrices]) -> None:
    """Write the second file of a checkpoint; nothing where the adapter alone is enough.

    Args:
        model: The model in training.
        folder: The checkpoint.
        initial: (A0, B0) by layer, where their product was taken out of the base.
    """
    if not initial and model.peft_config[ADAPTER].peft_type not in (PeftType.ADALORA, PeftType.ADAMSS):
        return
    state = {f"parameter/{name}": parameter.detach() for name, parameter in _adapter_parameters(model).items()}
    state |= {f"schedule/{name}": tensor for name, tensor in schedule_state(model).items()}
    for name, (a, b) in initial.items():
        state |= {f"initial/{name}/A": a, f"initial/{name}/B": b}
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / TRAINING_STATE)


def has_training_state(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has the second file.

    Args:
        checkpoint: Its folder.

    Returns:
        True if the adapter's own file does not hold what was in training.
    """
    return (checkpoint / TRAINING_STATE).is_file()


def read_initial(checkpoint: Path | None) -> dict[str, Matrices]:
    """Read the matrices whose product is missing in the base.

    Args:
        checkpoint: Folder of the checkpoint that a run goes on from, or None.

    Returns:
        (A0, B0) by layer; empty where the base is untouched.
    """
    if checkpoint is None or not has_training_state(checkpoint):
        return {}
    state = load_file(checkpoint / TRAINING_STATE)
    names = [key.removeprefix("initial/").removesuffix("/A") for key in state if key.startswith("initial/")]
    return {n: (state[f"initial/{n}/A"], state[f"initial/{n}/B"]) for n in names if not n.endswith("/B")}


@torch.no_grad()
def load_training_state(model: PeftModel, checkpoint: Path) -> None:
    """Set every parameter of the adapter to what it was when the checkpoint was written.

    Args:
        model: The model, wrapped as it was when the run began.
        checkpoint: Folder with the second file.

    Raises:
        RunFolderError: The file holds other parameters.
    """
    state = load_file(checkpoint / TRAINING_STATE)
    parameters = _adapter_parameters(model)
    saved = {key.removeprefix("parameter/"): t for key, t in state.items() if key.startswith("parameter/")}
    wrong = [n for n in {*saved, *parameters} if n not in saved or n not in parameters]
    wrong += [n for n in {*saved} & {*parameters} if saved[n].shape != parameters[n].shape]
    if wrong:
        raise RunFolderError(
            f"{checkpoint / TRAINING_STATE} belongs to another adapter ({sorted(wrong)[0]} does not fit). Resume with "
            "the arguments that the run began with."
        )
    for name, tensor in saved.items():
        parameters[name].copy_(tensor)


def read_schedule_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read what a rank schedule had gathered.

    Args:
        checkpoint: Folder with the second file.

    Returns:
        As `rank_schedule.schedule_state` gave it.
    """
    state = load_file(checkpoint / TRAINING_STATE)
    return {key.removeprefix("schedule/"): t for key, t in state.items() if key.startswith("schedule/")}


def _adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{ADAPTER}." in f"{name}."}
