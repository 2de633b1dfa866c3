"""A small server that speaks as the hub does, on the loopback, and fails when it is told to.

Source: the routes that huggingface_hub calls: /api/models/{id}/revision/{revision} and
/{id}/resolve/{revision}/{file}, with the headers that it reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE_BYTES = 4096  # what Git LFS keeps


@dataclass
class Hub:
    """What the server has, and what it was asked. cut: file -> bytes to send before the connection
    is cut, one for each of the next answers to who asks for all of it or the rest; status: path's
    end -> (status, error code)."""

    id: str = "owner/model"
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    commit: Any = COMMIT
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    answer: Any = None  # instead of the repository's description
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    agents: set[str] = field(default_factory=set)
    endpoint: str = ""
    digests: dict[str, str] = field(default_factory=dict)  # stated instead of the true ones

    def add(self, folder: Path) -> Hub:
        """Everything that lies in a folder."""
        self.files |= {path.name: path.read_bytes() for path in folder.iterdir()}
        return self

    def downloaded(self) -> set[str]:
        """The files of which any byte but a header was asked for."""
        got = {(path, part) for method, path, part in self.requests if method == "GET"}
        return {path.rpartition("/")[2] for path, part in got if "resolve" in path}

    def sent(self, name: str) -> list[str]:
        """The ranges that were asked of a file, in order."""
        return [part for method, path, part in self.requests
                if method == "GET" and path.endswith(f"/{name}")]  # fmt: skip

    def digest(self, name: str) -> tuple[str, bool]:
        """Of a file, as the hub states it, and is it a large one?"""
        data = self.files[name]
        large = len(data) > _LARGE_BYTES
        true = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        return self.digests.get(name, true.hexdigest()), large

    def description(self) -> Any:
        if self.answer is not None:
            return self.answer
        siblings = []
        for name, data in self.files.items():
            digest, large = self.digest(name)
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": digest[:40]}
            if large:
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.id, "modelId": self.id, "sha": self.commit, "siblings": siblings,
                "tags": [], "private": False, "downloads": 0, "likes": 0}  # fmt: skip


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Not to the terminal."""

        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, *, head: bool) -> None:
            path, part = self.path.partition("?")[0], self.headers.get("Range", "")
            hub.requests.append((self.command, path, part))
            hub.agents.add(self.headers.get("User-Agent", ""))
            for end, (status, code) in hub.status.items():
                if path.endswith(end):
                    return self._refuse(status, code)
            if found := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
                if found[1] != hub.id:
                    return self._refuse(404, "RepoNotFound")
                if found[2] not in hub.revisions:
                    return self._refuse(404, "RevisionNotFound")
                return self._send(200, json.dumps(hub.description()).encode(), {}, head)
            found = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
            if found is None or found[1] != hub.id or found[3] not in hub.files:
                return self._refuse(404, "EntryNotFound")
            return self._file(found[3], part, head)

        def _file(self, name: str, part: str, head: bool) -> None:
            data, (digest, large) = hub.files[name], hub.digest(name)
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            status, limit = 200, None
            if not head and part:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", part).groups()  # type: ignore[union-attr]
                stop = min(int(last) + 1, len(data)) if last else len(data)
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
                data, status = data[int(first) : stop], 206
            if not head and not re.fullmatch(r"bytes=\d+-\d+", part) and hub.cut.get(name):
                limit = hub.cut[name].pop(0)
            self._send(status, data, headers, head, limit)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code}, False)

        def _send(
            self, status: int, data: bytes, headers: dict[str, str], head: bool,
            limit: int | None = None,
        ) -> None:  # fmt: skip
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not head:
                self.wfile.write(data if limit is None else data[:limit])
            if limit is not None:
                self.wfile.flush()
                self.close_connection = True

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.endpoint` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
