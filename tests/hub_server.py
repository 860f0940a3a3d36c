"""A model hub on this machine's loopback, for tests: what the hub's clients read, answered from memory.

Enough of the protocol for `from_pretrained(name)`, `snapshot_download` and `load_dataset(name, config)`: repositories
with several revisions, private ones, names that have moved, and refused tokens; and enough of it to make a repository,
write branches and upload in commits, large files beside them. It fails where a test asks it to. Nothing is written to
disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]

_NAME = r"[\w.-]+(?:/[\w.-]+)?"
_API = re.compile(rf"/api/(models|datasets)/({_NAME}?)(?:/(revision|tree|paths-info|refs)(?:/(.*))?)?")
_WRITE = re.compile(rf"/api/(models|datasets)/({_NAME}?)/(preupload|commit|branch)/(.+)")
_LARGE = re.compile(rf"/(datasets/)?({_NAME}?)\.git/info/lfs/objects/batch")
_STORE = re.compile(r"/large/([0-9a-f]{64})")
_RESOLVE = re.compile(rf"/(datasets/)?({_NAME}?)/resolve/([^/]+)/(.+)")
_RESOLVE_CACHE = re.compile(rf"/api/resolve-cache/(models|datasets)/({_NAME}?)/([^/]+)/(.+)")


@dataclass
class Repo:
    """One repository: its revisions, each with its files, its branches, and the token that may read it."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def find(self, revision: str) -> str | None:
        """Give the commit that a branch or commit name stands for; None if there is none."""
        return self.branches.get(revision, revision if revision in self.revisions else None)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a revision at the end of a branch, and give its name."""
        state = repr((len(self.revisions), [(path, _blob(body)) for path, body in sorted(files.items())]))
        commit = hashlib.sha1(state.encode()).hexdigest()
        self.revisions[commit] = dict(sorted(files.items()))
        self.branches[branch] = commit
        return commit


@dataclass
class Fault:
    """A request that the hub fails at: by status, or by hanging up in the middle (0), so many times."""

    path: str
    status: int
    times: int = 10**9
    method: str = "POST"


class Hub:
    """The hub: publish to it from the test, and run a client in a process with its environment.

    Args:
        home: Folder for the client's caches.

    Attributes:
        env: Environment for a subprocess; the clients read it when they are imported.
        requests: Method, path and answered status of each request, in order.
        writers: Tokens that may write; `tokens` may read.
        faults: What goes wrong.
        large: Contents of large files by SHA-256, as far as they have arrived.
    """

    def __init__(self, home: Path) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.tokens: set[str] = set()
        self.writers: set[str] = set()
        self.faults: list[Fault] = []
        self.large: dict[str, bytes] = {}
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
        content = {path: body.encode() if isinstance(body, str) else body for path, body in files.items()}
        repo = self.repos.setdefault((kind, name), Repo())
        repo.token, repo.private = token, token is not None
        if token is not None:
            self.tokens.add(token)
        return repo.commit(content)

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

    def do_PUT(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean; `Hub.requests` is the log."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return self._fail(fault.status)
        self.content = self._read()
        if (
            self.command == "PUT"
            or path in ("/api/repos/create", "/api/validate-yaml")
            or (self.command == "POST" and (_WRITE.fullmatch(path) or _LARGE.fullmatch(path)))
        ):
            self._write(path)
        elif match := _RESOLVE.fullmatch(path) or _RESOLVE_CACHE.fullmatch(path):
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

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, status: int) -> None:
        """Refuse a request, or hang up when a part of it has been read."""
        if status:
            self._read()
            return self._refuse(status, None, "asked to fail")
        self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
        self.hub.requests.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def _write(self, path: str) -> None:
        if match := _STORE.fullmatch(path):  # the address is the permission
            whole = hashlib.sha256(self.content).hexdigest() == match[1]
            self.hub.large |= {match[1]: self.content} if whole else {}
            return self._answer(200 if whole else 400, b"", {})
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if given not in self.hub.writers:
            known = given in self.hub.tokens
            return self._refuse(403 if known else 401, None, "Forbidden" if known else "Invalid credentials")
        if path == "/api/repos/create":
            return self._create(json.loads(self.content))
        if match := _LARGE.fullmatch(path):
            return self._large_files(json.loads(self.content))
        kind, name, action, branch = _WRITE.fullmatch(path).groups()  # type: ignore[union-attr]
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        return {"preupload": self._ways, "commit": self._commit, "branch": self._branch}[action](repo, name, branch)

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        known = ("models", name) in self.hub.repos
        if not known:
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            repo = Repo(token=next(iter(self.hub.writers)) if private else None, private=private)
            repo.commit({".gitattributes": b""})
            self.hub.repos["models", name] = repo
        body = json.dumps({"url": f"{self.hub.env['HF_ENDPOINT']}/{name}", "name": name, "id": "0" * 24}).encode()
        self._answer(409 if known else 200, body, {"Content-Type": "application/json"})

    def _ways(self, repo: Repo, name: str, branch: str) -> None:
        """Say of each file whether it goes beside the commit, and what is there under its name."""
        there = repo.revisions[repo.branches.get(branch, repo.branches["main"])]
        answers = []
        for file in json.loads(self.content)["files"]:
            large, body = file["path"].endswith(".safetensors"), there.get(file["path"])
            oid = None if body is None else hashlib.sha256(body).hexdigest() if large else _blob(body)
            way = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**way, "oid": oid})
        self._json({"files": answers})

    def _large_files(self, asked: dict[str, Any]) -> None:
        answers = []
        for item in asked["objects"]:
            href = f"{self.hub.env['HF_ENDPOINT']}/large/{item['oid']}"
            actions = {} if item["oid"] in self.hub.large else {"actions": {"upload": {"href": href}}}
            answers.append({"oid": item["oid"], "size": item["size"], **actions})
        body = json.dumps({"transfer": "basic", "objects": answers}).encode()
        self._answer(200, body, {"Content-Type": "application/vnd.git-lfs+json"})

    def _commit(self, repo: Repo, name: str, branch: str) -> None:
        if branch not in repo.branches:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repo.revisions[repo.branches[branch]])
        for line in self.content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
        commit = repo.commit(files, branch)
        url = f"{self.hub.env['HF_ENDPOINT']}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _branch(self, repo: Repo, name: str, branch: str) -> None:
        known = branch in repo.branches
        repo.branches.setdefault(branch, repo.branches["main"])
        self._answer(409 if known else 200, b"{}", {"Content-Type": "application/json"})

    def _repo(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Find a revision's commit and files, or answer why not."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.hub.repos.get((kind, name))
        if given and given not in self.hub.tokens | self.hub.writers:
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
        self, kind: Kind, name: str, action: str | None, commit: str, files: dict[str, bytes], folder: str
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
        facts = {
            "private": self.hub.repos[kind, name].private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }
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
