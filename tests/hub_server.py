"""A model hub on this machine's loopback, for tests: what the hub's clients read, answered from memory.

Enough of the protocol for `from_pretrained(name)`, `snapshot_download` and `load_dataset(name, config)`: repositories
with several revisions, private ones, names that have moved, and refused tokens. Nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]

_NAME = r"[\w.-]+(?:/[\w.-]+)?"
_API = re.compile(rf"/api/(models|datasets)/({_NAME}?)(?:/(revision|tree|paths-info|refs)(?:/(.*))?)?")
_RESOLVE = re.compile(rf"/(datasets/)?({_NAME}?)/resolve/([^/]+)/(.+)")
_RESOLVE_CACHE = re.compile(rf"/api/resolve-cache/(models|datasets)/({_NAME}?)/([^/]+)/(.+)")


@dataclass
class Repo:
    """One repository: its revisions from old to new, each with its files, and the token that may read it."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None

    def find(self, revision: str) -> str | None:
        """Give the commit that a branch or commit name stands for; None if there is none."""
        if revision == "main":
            return list(self.revisions)[-1]
        return revision if revision in self.revisions else None


class Hub:
    """The hub: publish to it from the test, and run a client in a process with its environment.

    Args:
        home: Folder for the client's caches.

    Attributes:
        env: Environment for a subprocess; the clients read it when they are imported.
        requests: Method, path and answered status of each request, in order.
    """

    def __init__(self, home: Path) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.tokens: set[str] = set()
        self.requests: list[tuple[str, str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        own = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(own)} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # datasets would have each load counted by a server on the internet.
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, kind: Kind, name: str, files: Path | dict[str, bytes | str], *, token: str | None = None) -> str:
        """Add a revision to a repository, which is made if there is none.

        Args:
            kind: "models" or "datasets".
            name: Such as "org/name".
            files: A folder, or path in the repository -> content: all files of the revision.
            token: The token that may read the repository; anybody may if None.

        Returns:
            The commit, 40 hexadecimal digits.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        content = {path: body.encode() if isinstance(body, str) else body for path, body in sorted(files.items())}
        repo = self.repos.setdefault((kind, name), Repo())
        repo.token = token
        if token is not None:
            self.tokens.add(token)
        state = repr((len(repo.revisions), [(path, _blob(body)) for path, body in content.items()]))
        commit = hashlib.sha1(state.encode()).hexdigest()
        repo.revisions[commit] = content
        return commit

    def move(self, kind: Kind, old: str, new: str) -> None:
        """Let an old name lead to a repository's new one."""
        self.moved[kind, old] = new


def _blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """List the files and the folders they lie in, as the tree endpoint does."""
    folders = {str(f) for path in files for f in Path(path).parents if str(f) != "."}
    return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + [
        {"type": "file", "path": path, "oid": _blob(body), "size": len(body)} for path, body in files.items()
    ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean; `Hub.requests` is the log."""

    def _route(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if match := _RESOLVE.fullmatch(path) or _RESOLVE_CACHE.fullmatch(path):
            kind, name, revision, file = match.groups()
            kind = "models" if kind == "models" or kind is None else "datasets"
            if found := self._repo(kind, name, revision):
                self._file(*found, file)
        elif match := _API.fullmatch(path):
            kind, name, action, rest = match.groups()
            revision, _, folder = (rest or "main").partition("/")
            if found := self._repo(kind, name, revision):
                self._describe(kind, name, action, *found, folder)
        else:
            self._refuse(404, "EntryNotFound", f"nothing at {path}")

    def _repo(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Find a revision's commit and files, or answer why not."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.hub.repos.get((kind, name))
        if given and given not in self.hub.tokens:
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif (kind, name) in self.hub.moved:
            new = self.path.replace(f"/{name}", f"/{self.hub.moved[kind, name]}", 1)
            self._answer(307, b"", {"Location": new})
        elif repo is None or repo.token not in (None, given):
            # A private repository looks like one that does not exist.
            self._refuse(404 if given else 401, "RepoNotFound", "Repository not found")
        elif (commit := repo.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return commit, repo.revisions[commit]
        return None

    def _describe(
        self, kind: str, name: str, action: str | None, commit: str, files: dict[str, bytes], folder: str
    ) -> None:
        entries = _entries(files)
        if action == "tree":
            query = parse_qs(urlsplit(self.path).query)
            inside = [e for e in entries if not folder or e["path"].startswith(f"{folder}/")]
            if query.get("recursive", [""])[0].lower() not in ("true", "1"):
                inside = [e for e in inside if "/" not in e["path"][len(folder) :].strip("/")]
            if folder and not inside:
                return self._refuse(404, "EntryNotFound", f"no folder {folder}")
            return self._json(inside)
        if action == "paths-info":
            form = self.headers.get("Content-Type", "").startswith("application/x-www-form")
            asked = parse_qs(self.content.decode()) if form else json.loads(self.content)
            return self._json([e for e in entries if e["path"] in asked["paths"]])
        if action == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
            return self._json({"branches": [branch], "tags": [], "converts": []})
        siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries if e["type"] == "file"]
        facts = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return self._json({"_id": "0" * 24, "id": name, "sha": commit, "siblings": siblings, **facts})

    def _file(self, commit: str, files: dict[str, bytes], file: str) -> None:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file not in files:
            return self._refuse(404, "EntryNotFound", f"no file {file}", headers)
        body = files[file]
        headers |= {"ETag": f'"{_blob(body)}"', "X-Linked-Size": str(len(body))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self._answer(200, body, headers)
        start, stop = int(span[1]), min(int(span[2] or len(body)) + 1, len(body))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return self._answer(206, body[start:stop], headers)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
