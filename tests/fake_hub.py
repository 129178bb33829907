"""A model hub on loopback: what huggingface_hub asks of one, and no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by path, of one revision."""

    files: Mapping[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    is_private: bool = False
    is_gated: bool = False
    status: int = 200
    fetched: list[str] = field(default_factory=list)
    """Paths whose contents were sent."""

    @property
    def sha(self) -> str:
        names = repr(sorted((k, len(v)) for k, v in self.files.items()))
        return hashlib.sha1(names.encode()).hexdigest()


class FakeHub:
    """Serves repositories by ``owner/name`` while it is open."""

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        class Handler(_Handler):
            hub = repositories

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class _Handler(BaseHTTPRequestHandler):
    hub: Mapping[str, Repository]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, has_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository = self.hub.get("/".join(parts[:2]))
        if repository is None or repository.is_private:
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"{}", has_body)
            return
        if repository.status != 200:
            # Of a 401, what tells a bad token from a repository that is not there.
            message = "Invalid credentials in Authorization header"
            headers = {"X-Error-Message": message}
            self._send(repository.status, headers, b"{}", has_body)
            return
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in (*repository.revisions, repository.sha):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", has_body)
        elif is_api:
            body = json.dumps(_listing(repository, is_tree=parts[2:3] == ["tree"]))
            self._send(
                200, {"Content-Type": "application/json"}, body.encode(), has_body
            )
        else:
            self._file(repository, "/".join(parts[4:]), has_body)

    def _file(self, repository: Repository, path: str, has_body: bool) -> None:
        headers = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            self._send(404, headers | {"X-Error-Code": "EntryNotFound"}, b"", has_body)
        elif repository.is_gated:
            self._send(403, headers | {"X-Error-Code": "GatedRepo"}, b"", has_body)
        else:
            content = repository.files[path]
            if has_body:
                repository.fetched.append(path)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, headers | {"ETag": etag}, content, has_body)

    def _send(
        self, code: int, headers: Mapping[str, str], body: bytes, has_body: bool
    ) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)


def _listing(repository: Repository, *, is_tree: bool) -> Any:
    if not is_tree:
        siblings = [{"rfilename": path} for path in repository.files]
        return {"id": "x/x", "sha": repository.sha, "siblings": siblings}
    return [
        {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for path, content in repository.files.items()
    ]
