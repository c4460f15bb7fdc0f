"""A hub of one's own on this machine, spoken to by the real client: what it gives, and what was asked of it."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789" * 4


class Hub:
    """repos: id -> folder; commits: id -> commit, where it is another than COMMIT; downloads: how often each file was
    given whole; refused: names of files that are answered with 403.
    """

    def __init__(self):
        self.repos: dict[str, Path] = {}
        self.commits: dict[str, str] = {}
        self.downloads: Counter[str] = Counter()
        self.refused: set[str] = set()
        self.url = ""

    def commit(self, repo: str) -> str:
        return self.commits.get(repo, COMMIT)


@contextmanager
def served() -> Iterator[Hub]:
    """Yields a hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self.api(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*found.groups(), body)
        else:
            self.give(404, b"")

    def api(self, repo: str, what: str, revision: str) -> None:
        if repo not in self.hub.repos:
            self.give(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(self.hub.repos[repo].iterdir())
        if what == "revision":
            said: object = {
                "id": repo,
                "sha": self.hub.commit(repo),
                "siblings": [{"rfilename": f.name} for f in files],
            }
        else:
            said = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
        self.give(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, revision: str, name: str, body: bool) -> None:
        folder = self.hub.repos.get(repo)
        if folder is None or not (folder / name).is_file():
            self.give(404, b"", {"X-Error-Code": "EntryNotFound" if folder else "RepoNotFound"})
            return
        data, headers, code = (folder / name).read_bytes(), {"ETag": f'"{name}"'}, 200
        headers["X-Repo-Commit"] = self.hub.commit(repo)
        whole = True
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(span[1]), min(int(span[2] or len(data)), len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, code, whole = data[start:stop], 206, start == 0 and stop == len(data)
        if whole and name in self.hub.refused:
            self.give(403, b"", {"X-Error-Message": "not today"})
            return
        if body and whole:
            self.hub.downloads[name] += 1
        self.give(code, data, headers, body)

    def give(self, code: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass
