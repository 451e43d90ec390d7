"""A hub of models and data sets on this machine: what the Hugging Face libraries ask over HTTP, uploads, and failures.

Environment variables name it (`LoopbackHub.environment`), and libraries read these when they are imported: use it from
a process of its own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HEAL, CONTENTS, LFS = "/heal", "/contents/", "info/lfs/objects/batch"
"""Whoever asks for this path ends all faults."""
LARGE = 20_000
"""Bytes from which a file is kept outside of Git."""
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repository:
    """A model or a data set.

    Attributes:
        files: contents by path.
        revisions: names of its only commit: branches and tags.
        gated: whether a token is needed.
        private: whether it is there only for who has a token.
        commit: 40 hexadecimal digits; the contents decide, unless it is given.
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    commit: str = ""
    private: bool = False

    def __post_init__(self) -> None:
        self.commit = self.commit or self.digest()

    def digest(self) -> str:
        """A commit for the contents."""
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(f"{path} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def has(self, revision: str) -> bool:
        return revision in (*self.revisions, self.commit)


@dataclass
class Fault:
    """What goes wrong with a request, some times.

    Attributes:
        what: `drop` closes the connection within the body, `429` and `500` are answers.
        path: of the requests concerned, a part.
        times: so often; -1 for ever.
        after: bytes of the body before a drop.
    """

    what: str
    path: str
    times: int = 1
    after: int = 1000


@dataclass
class LoopbackHub:
    """The server.

    Attributes:
        repositories: by (`models` or `datasets`, id).
        faults: still to happen.
        requests: method and path (with the range asked for) of each.
        sent: bytes of files that were sent, by path in the repository.
        corrupt: bodies sent in place of the contents, by path in the repository.
        uploaded: contents that wait for their commit, by SHA-256.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    corrupt: dict[str, bytes] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def add(self, kind: str, name: str, files: Mapping[str, bytes] | Path, **options: Any) -> Repository:
        """A repository with these files, or with those of a folder."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        self.repositories[kind, name] = Repository(dict(files), **options)
        return self.repositories[kind, name]

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to take this for the hub, with its caches in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fault(self, path: str, *kinds: str) -> Fault | None:
        """The next of these faults that concerns a path, which is then counted."""
        for fault in self.faults:
            if fault.what in kinds and fault.path in path and fault.times:
                fault.times -= 1
                return fault
        return None


@contextlib.contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A hub that answers while the context is open."""
    hub = LoopbackHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    body = b""
    timeout = 30

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self._read_body()
        self._answer()

    def do_PUT(self) -> None:
        self.body = self._read_body()
        self._answer()

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None: ...

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path == HEAL:
            self.hub.faults.clear()
            self._json({})
            return
        if fault := self.hub.fault(path, "429", "500"):
            self._send(int(fault.what), b"{}", {"Retry-After": "1"})
            return
        if path in ("/api/repos/create", "/api/validate-yaml") or path.startswith(CONTENTS):
            self._accept(path)
            return
        kind, name, rest = self._repository(path.replace(".git/info/lfs/", "/info/lfs/"))
        repository = self.hub.repositories.get((kind, name))
        has_token = "Authorization" in self.headers
        if repository is None or (repository.private and not has_token):
            self._refuse(404, "RepoNotFound")
        elif repository.gated and not has_token:
            self._refuse(403, "GatedRepo")
        elif self.command == "POST" and not has_token and not rest.startswith("paths-info"):
            self._refuse(401, "")
        elif rest == LFS:
            self._lfs()
        elif path.startswith("/api/"):
            self._api(repository, name, rest)
        else:
            revision, _, file = rest.removeprefix("resolve/").partition("/")
            self._file(repository, revision, file)

    def _repository(self, path: str) -> tuple[str, str, str]:
        """Kind, id and the rest of a path, of the longest id that is there."""
        is_api, place = path.startswith("/api/"), path.removeprefix("/api").removeprefix("/")
        kind = "datasets" if place.startswith("datasets/") else "models"
        place = place.removeprefix(f"{kind}/") if is_api or kind == "datasets" else place
        for of, name in sorted(self.hub.repositories, key=lambda key: -len(key[1])):
            if of == kind and (place == name or place.startswith(f"{name}/")):
                return kind, name, place.removeprefix(name).removeprefix("/")
        return kind, "", place

    def _api(self, repository: Repository, name: str, rest: str) -> None:
        verb, _, where = rest.partition("/")
        revision, _, folder = where.partition("/")
        if verb in ("revision", "tree", "paths-info") and not repository.has(revision):
            self._refuse(404, "RevisionNotFound")
        elif verb in ("", "revision"):
            files = [{"rfilename": path} for path in sorted(repository.files)]
            self._json(
                {"id": name, "sha": repository.commit, "siblings": files, "private": repository.private, "tags": []}
            )
        elif verb == "tree":
            recursive = "recursive=true" in self.path.lower()
            entries = _tree(repository, folder, recursive)
            if folder and not entries:
                self._refuse(404, "EntryNotFound")
            else:
                self._json(entries)
        elif verb == "preupload":
            self._preupload()
        elif verb == "commit":
            self._commit(repository, name)
        elif verb == "paths-info":
            self._json(_tree(repository, "", recursive=True))
        else:
            self._refuse(404, "EntryNotFound")

    def _accept(self, path: str) -> None:
        """A new repository, the header of a page, or the content of a large file."""
        if path.startswith(CONTENTS):
            self.hub.uploaded[path.removeprefix(CONTENTS)] = self.body
            self._json({})
            return
        content = json.loads(self.body)
        if path.endswith("validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif "Authorization" not in self.headers:
            self._refuse(401, "")
        else:
            name = "/".join(part for part in (content.get("organization"), content["name"]) if part)
            private = bool(content.get("private")) or content.get("visibility") == "private"
            is_new = ("models", name) not in self.hub.repositories
            if is_new:
                self.hub.add("models", name, {}, private=private)
            body = json.dumps({"url": f"{self.hub.url}/{name}", "id": name}).encode()
            self._send(200 if is_new else 409, body, {"Content-Type": "application/json"})

    def _preupload(self) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _lfs(self) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}{CONTENTS}{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, name: str) -> None:
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                repository.files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif kind == "deletedFile":
                del repository.files[value["path"]]
        repository.commit = repository.digest()
        url = f"{self.hub.url}/{name}/commit/{repository.commit}"
        self._json({"commitUrl": url, "commitOid": repository.commit})

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        if not repository.has(revision):
            self._refuse(404, "RevisionNotFound")
        elif path not in repository.files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        else:
            content = repository.files[path]
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag_of(content)}"', "Accept-Ranges": "bytes"}
            content = self.hub.corrupt.get(path, content)
            wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
            if wanted is None:
                self._send(200, content, headers, can_drop=True)
                return
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            self._send(206, content[start:stop], headers, can_drop=True)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, can_drop: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.hub.fault(unquote(urlsplit(self.path).path), "drop") if can_drop and body else None
        sent = body if fault is None else body[: fault.after]
        if can_drop:
            path = unquote(urlsplit(self.path).path).rpartition("/resolve/")[2].partition("/")[2]
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(sent)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(sent)
        if fault is not None:
            self.close_connection = True


def git_oid(content: bytes) -> str:
    """The name that Git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag_of(content: bytes) -> str:
    """The hub's: Git's name, or the SHA-256 of a file that is kept outside of Git."""
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else git_oid(content)


def _tree(repository: Repository, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries of a folder, as the hub lists them."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(repository.files.items()):
        if not path.startswith(prefix):
            continue
        inner, slash, _ = path.removeprefix(prefix).partition("/")
        if slash and not recursive:
            entries[prefix + inner] = {"type": "directory", "path": prefix + inner, "oid": "0" * 40, "size": 0}
        else:
            oid = git_oid(content)
            entries[path] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
    return list(entries.values())
