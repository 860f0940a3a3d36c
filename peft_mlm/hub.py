"""An adapter or a model -> a repository on the hub: checked first, sent whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_mlm.card import FOLDER_IN_CARD
from peft_mlm.errors import ArgumentsError, DamagedFileError, HubError
from peft_mlm.leaks import TOKENS, find_leaks
from peft_mlm.safetensors_header import read_header
from peft_mlm.shipped import Shipped, files_in, is_pickle
from peft_mlm.verification import verify_shipped

CARD = "README.md"
# What goes up; whatever else lies in the folder stays where it is.
ALLOWED = {
    "adapter": r"adapter_config\.json|adapter_model\.safetensors|base_fingerprint\.json|base_recipe\.json",
    "model": r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|merge_report\.json",
}
ALLOWED_ALWAYS = (
    r"README\.md|checksums\.json|training_facts\.json|LICEN[SC]E(\.\w+)?|NOTICE(\.\w+)?|tokenizer\.json"
    r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt"
    r"|[\w.-]*\.model|chat_template\.jinja"
)
MAIN = "main"
FAULTS_SHOWN = 5


@dataclass(frozen=True)
class Upload:
    """What would go up.

    Attributes:
        shipped: Where it lies.
        files: The files.
        left_out: Names of those that stay.
    """

    shipped: Shipped
    files: tuple[Path, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Destination:
    """Where an upload goes.

    Attributes:
        repo_id: The repository, such as "org/name".
        private: Whether it must be private.
        revision: Branch to write to; the main one if None.
        token: The token, or None for the one of the environment or of `hf auth login`.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    token: str | None = field(default=None, repr=False)


def destination_of(training: Mapping[str, Any], token: str | None) -> Destination | None:
    """Find out where a run is to be uploaded.

    Args:
        training: Its training arguments.
        token: The token of its model arguments; `hub_token` goes before it.

    Returns:
        The destination, or None without `push_to_hub`.

    Raises:
        ArgumentsError: The name, or the branch, cannot be.
    """
    if not training.get("push_to_hub"):
        return None
    repo_id, revision = str(training.get("hub_model_id") or ""), training.get("hub_revision")
    check_destination(repo_id, revision)
    return Destination(repo_id, bool(training.get("hub_private_repo")), revision, training.get("hub_token") or token)


def plan_upload(shipped: Shipped) -> Upload:
    """Choose the files to upload, and refuse what should not leave the machine.

    Args:
        shipped: An adapter or a model.

    Returns:
        The files.

    Raises:
        HubError: A checkpoint is given; or there are pickles, local paths or tokens in what would go up.
        DamagedFileError: What lies there is damaged, or is not what was written.
    """
    folder = shipped.folder
    if shipped.place == "checkpoint":
        raise HubError(f"{shipped.given} is a checkpoint, made to go on from. Give the run, or its adapter or model.")
    pickles = [file.relative_to(folder).as_posix() for file in files_in(folder) if is_pickle(file)]
    if pickles:
        raise HubError(
            f"{pickles[0]} in {folder} is a pickle, or can hold one: it can run code on the machines of those who open "
            "it. Take it out of the folder."
        )
    verdict = verify_shipped(shipped)
    if verdict.faults:
        raise DamagedFileError(f"{shipped.given} is not sound: " + " ".join(verdict.faults[:FAULTS_SHOWN]))
    allowed = re.compile(f"{ALLOWED[shipped.kind]}|{ALLOWED_ALWAYS}")
    files = {file.relative_to(folder).as_posix(): file for file in files_in(folder)}
    chosen = {name: file for name, file in files.items() if allowed.fullmatch(name)}
    leaks = [str(leak) for leak in find_leaks(folder) if leak.file in chosen]
    for file in shipped.weights():
        if any(TOKENS.search(text) or text.startswith("/") for text in read_header(file).metadata.values()):
            leaks.append(f"{file.name} holds a token or a local path in its metadata")
    if leaks:
        raise HubError(f"{'; '.join(leaks[:FAULTS_SHOWN])} in {folder}. Take it out; nothing was uploaded.")
    return Upload(shipped, tuple(chosen.values()), tuple(name for name in files if name not in chosen))


def check_destination(repo_id: str, revision: str | None) -> None:
    """Refuse a name that no repository can have, before anything is done.

    Args:
        repo_id: Such as "org/name".
        revision: A branch, or None for the main one.

    Raises:
        ArgumentsError: The name, or the branch, cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", repo_id) or re.search(r"--|\.\.|[.-]$", repo_id):
        raise ArgumentsError(
            f"{repo_id!r} is no name of a repository. Give OWNER/NAME, each of letters, digits, '-', '_' and '.'."
        )
    if revision is not None and not re.fullmatch(r"[A-Za-z0-9][\w./-]{0,200}", revision):
        raise ArgumentsError(f"revision {revision!r} is no name of a branch. Give letters, digits, '-', '_', '.', '/'.")


def check_connection(token: str | None) -> str:
    """Refuse to upload offline or without a token, before anything is done.

    Args:
        token: The token, or None for the one of the environment or of `hf auth login`.

    Returns:
        The token.

    Raises:
        HubError: The offline mode is on, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        raise HubError(f"Nothing can be uploaded: the offline mode is on ({name}). Unset it.")
    found = token or get_token()
    if not found:
        raise HubError("There is no token to upload with. Log in by `hf auth login`, or set HF_TOKEN.")
    return found


def open_repository(destination: Destination) -> None:
    """Make the repository and the branch if need be: a hub that refuses is found out before there is much to lose.

    Args:
        destination: Where to upload to.

    Raises:
        HubError: The hub is not reached, or refuses; or the repository is public and should be private.
    """
    from huggingface_hub import HfApi

    repo_id, revision = destination.repo_id, destination.revision
    api = HfApi(token=check_connection(destination.token))
    with _told(repo_id):
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
        if destination.private and not api.repo_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public; nothing was uploaded. Leave --private out, or make it private."
            )
        if revision not in (None, MAIN):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)


def upload(plan: Upload, destination: Destination, commit_message: str | None = None) -> dict[str, Any]:
    """Upload in one commit: the repository holds all of it afterwards, or what it held before.

    What an interrupted upload has sent already is not sent again by the next one.

    Args:
        plan: From `plan_upload`.
        destination: Where to; `open_repository` has made it.
        commit_message: What stands in the history.

    Returns:
        `commit` and `url` of it, and `changed`: False where all of it was there already, and no commit was made.

    Raises:
        HubError: The hub is not reached, or refuses; the message says why, and never holds the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    repo_id, folder = destination.repo_id, plan.shipped.folder
    api = HfApi(token=check_connection(destination.token))
    message = commit_message or f"Upload {plan.shipped.kind} with peft-mlm"
    with _told(repo_id, sent=True):
        operations = [
            CommitOperationAdd(file.relative_to(folder).as_posix(), _content(file, repo_id)) for file in plan.files
        ]
        before = api.repo_info(repo_id, revision=destination.revision).sha
        done = api.create_commit(repo_id, operations, commit_message=message, revision=destination.revision)
    return {"commit": done.oid, "url": str(done.commit_url), "changed": done.oid != before}


def missing_for_others(shipped: Shipped) -> list[str]:
    """Find what those who load an upload will not have.

    Args:
        shipped: An adapter or a model.

    Returns:
        Sentences; none where all is on the hub.
    """
    card = shipped.folder / CARD
    if shipped.kind == "model":
        return []
    if not card.is_file():
        return [f"There is no card ({CARD}): the hub will not know what it is, nor its base."]
    metadata = card.read_text(encoding="utf-8", errors="replace").split("---\n")[1:2]
    if metadata and not re.search(r"^base_model:", metadata[0], re.MULTILINE):
        return [
            "The card names no base on the hub: whoever loads the adapter must have its base, and give it by --base. "
            f"If that is there too, say so: write `base_model: OWNER/NAME` between the lines `---` of {CARD}."
        ]
    return []


def _content(file: Path, repo_id: str) -> str | bytes:
    """Give the file, or the card with the repository's name in its lines of code."""
    if file.name != CARD:
        return str(file)
    return file.read_text(encoding="utf-8").replace(FOLDER_IN_CARD, repo_id).encode()


@contextmanager
def _told(repo_id: str, *, sent: bool = False) -> Iterator[None]:
    """Say in one sentence what went wrong on the way to the hub, and whether anything was on its way."""
    from huggingface_hub.errors import HfHubHTTPError

    transport = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, by huggingface_hub's version
    try:
        yield
    except HubError:
        raise
    except (HfHubHTTPError, transport, OSError, ValueError, RuntimeError) as error:
        kept = "; files that have arrived there are not sent again" if sent else ""
        raise HubError(f"{_reason(repo_id, error)} Nothing was published{kept}.") from error


def _reason(repo_id: str, error: BaseException) -> str:
    while not hasattr(error, "response") and error.__cause__ is not None:  # what failed in a thread comes wrapped
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        remedy = "Log in anew by `hf auth login`, or set HF_TOKEN."
        if os.environ.get("HF_TOKEN"):  # it goes before the one of a login
            remedy = "It is that of HF_TOKEN: set another one, or unset it and log in by `hf auth login`."
        return f"The hub does not accept the token for {repo_id} (401). {remedy}"
    if status == 403:
        owner, _, name = repo_id.partition("/")
        return (
            f"The token has no right to write to {repo_id} (403). Take one with write access to {owner}, or push to a "
            f"name of your own: YOU/{name}."
        )
    if status == 404:
        return (
            f"The hub knows no {repo_id} that this token may write to (404). Look at the name, and at what the token "
            "may do."
        )
    if status == 412:
        return f"Somebody else has written to {repo_id} in between (412). Look at what is there, and push again."
    if status == 429:
        return "The hub asks to wait (429: too many requests). Push again later."
    if status is not None and status >= 500:
        return f"The hub failed ({status}). Push again later."
    if status is not None:
        said = " ".join(str(getattr(error, "server_message", None) or "").split())[:200]
        return f"The hub refused the upload to {repo_id} ({status}{': ' + said if said else ''})."
    where = " and HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else ""
    return f"The connection to the hub failed ({type(error).__name__}). Look at the network{where}, and push again."
