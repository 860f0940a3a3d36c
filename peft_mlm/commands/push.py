"""`peft-mlm push`: upload an adapter or a model to the hub, after a check of all that would go up."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_mlm.console import CommandParser, bytes_text, print_table


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> dict[str, Any]:
    """Upload an adapter or a model in one commit.

    Only files that belong to an adapter or a model go up; pickles, local paths and tokens are refused.

    Args:
        path: A run folder, or the folder of an adapter or a model.
        repo_id: The repository, such as "org/name"; it is made if need be.
        private: Whether the repository must be private.
        revision: Branch to write to, made if need be; the main one if None.
        commit_message: What stands in its history.
        dry_run: Check everything, and upload nothing; needs no network.
        token: The token, or None for the one of the environment or of `hf auth login`.

    Returns:
        `path`, `kind`, `repo_id`, `revision`, `private`, `dry_run`, `files` (bytes by name), `bytes`, `left_out`
        (names), `notices` (sentences on what those who load it will miss), and of the upload `commit`, `url` and
        `changed` (False where all was there already); None in a dry run.

    Raises:
        ArgumentsError: The name of the repository or the branch cannot be.
        RunFolderError: There is neither adapter nor model.
        DamagedFileError: What lies there is damaged, or is not what was written.
        HubError: Something in it should not leave the machine, or the hub is not reached, or refuses.
    """
    from peft_mlm.hub import (
        Destination,
        check_connection,
        check_destination,
        missing_for_others,
        open_repository,
        plan_upload,
        upload,
    )
    from peft_mlm.shipped import find_shipped

    check_destination(repo_id, revision)
    shipped = find_shipped(path)
    if not dry_run:
        check_connection(token)
    plan = plan_upload(shipped)
    files = {file.relative_to(shipped.folder).as_posix(): file.stat().st_size for file in plan.files}
    record: dict[str, Any] = {
        "path": str(path),
        "kind": shipped.kind,
        "repo_id": repo_id,
        "revision": revision or "main",
        "private": private,
        "dry_run": dry_run,
        "files": files,
        "bytes": sum(files.values()),
        "left_out": list(plan.left_out),
        "notices": missing_for_others(shipped),
        "commit": None,
        "url": None,
        "changed": None,
    }
    if dry_run:
        return record
    destination = Destination(repo_id, private, revision, token)
    open_repository(destination)
    return record | upload(plan, destination, commit_message)


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    return push(
        given.path,
        given.repo_id,
        private=given.private,
        revision=given.revision,
        commit_message=given.commit_message,
        dry_run=given.dry_run,
    )


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = [(name, bytes_text(size)) for name, size in record["files"].items()]
    rows.append(("together", bytes_text(record["bytes"])))
    rows += [(name, "left out") for name in record["left_out"]]
    rows.append(("commit", "none: a dry run" if record["dry_run"] else record["commit"]))
    where = f"{record['repo_id']}, branch {record['revision']}"
    done = {None: "would push to", True: "pushed to", False: "nothing new: all of it was there already, in"}
    print_table(f"{done[record['changed']]} {where}", None, rows, stream=sys.stdout)
    for notice in record["notices"]:
        print(f"  notice: {notice}")
    if record["url"]:
        print(f"  {record['url']}")


def help_text() -> str:
    """Give the text of `peft-mlm push --help`."""
    return _parser().format_help()


def _parser() -> CommandParser:
    parser = CommandParser("push", __doc__)
    parser.add_argument("path", help="run folder, or the folder of an adapter or a model")
    parser.add_argument("repo_id", help="repository on the hub, OWNER/NAME; made if need be")
    parser.add_argument("--private", action="store_true", help="into a private repository")
    parser.add_argument("--revision", help="branch to write to, made if need be (default main)")
    parser.add_argument("--commit_message", help="what stands in the history")
    parser.add_argument("--dry_run", action="store_true", help="check everything, upload nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
