"""A hub on the loopback address: serves the files of one model repository as the Hugging Face hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT, OLD_COMMIT = "c" * 40, "0" * 40


class Hub(ThreadingHTTPServer):
    """Two revisions of a repository: `files` is main, `old_files` are those of the tag v1. Name -> content."""

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes], old_files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.commits = {COMMIT: files, OLD_COMMIT: old_files}
        self.revisions = {"main": COMMIT, "v1": OLD_COMMIT, COMMIT: COMMIT, OLD_COMMIT: OLD_COMMIT}
        self.asked: list[str] = []  # method, path and range of every request
        self.fails = False  # whether all but the bare address answers 500
        self.cuts = (
            ""  # a file whose first download breaks off halfway and whose others fail, until this is empty again
        )
        self.open = threading.Event()  # answers wait for it
        self.open.set()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        hub.open.wait(30)
        if path == "/":
            return self.send(200, b"")
        if hub.fails:
            return self.send(500, b"")
        api = f"/api/models/{hub.repository}"
        for prefix in (f"{api}/revision/", f"{api}/tree/", f"/{hub.repository}/resolve/", api):
            if path.startswith(prefix):
                revision, _, name = path.removeprefix(prefix).partition("/")
                commit = hub.revisions.get(revision or "main")
                if commit is None:
                    return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                files = hub.commits[commit]
                if prefix.endswith("/tree/"):
                    entries = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
                    return self.send(200, json.dumps(entries).encode())
                if prefix.endswith("/resolve/"):
                    return self.send_file(name, files[name], commit)
                siblings = [{"rfilename": name} for name in files]
                return self.send(200, json.dumps({"id": hub.repository, "sha": commit, "siblings": siblings}).encode())
        return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str, content: bytes, commit: str) -> None:
        facts = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            facts["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name == self.server.cuts:
            first = sum(line.startswith("GET") and name in line for line in self.server.asked) == 1
            return self.send(200, content, facts, sent=len(content) // 2) if first else self.send(500, b"")
        return self.send(206 if begin else 200, content[begin:], facts)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(repository: str, files: dict[str, bytes], old_files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(repository, files, old_files) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.open.set()
            hub.shutdown()
