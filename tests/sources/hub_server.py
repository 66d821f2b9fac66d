"""A small server on loopback that speaks as much of the Hub's API as downloads need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(
    repos: dict[str, Path], *, gated: tuple[str, ...] = (), faults: list[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as model repositories.

    Args:
        repos: Repository id to folder.
        gated: Ids that answer as gated repositories do.
        faults: What goes wrong with the next requests for a weight file, in turn: `cut` (the connection ends half
            way), `wrong` (other bytes of the same number), `503`, `429`.

    Yields:
        The endpoint, and a growing list of the requested paths.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0].strip("/")
            asked.append(path)
            if path.startswith("api/models/"):
                return self.info(path.removeprefix("api/models/"))
            repo, _, rest = path.partition("/resolve/")
            file = repos.get(repo, Path("/nonexistent")) / rest.partition("/")[2]
            if repo in gated:
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
                return self.send(403, headers, b"", body)
            if not file.is_file():
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            fault = faults.pop(0) if faults and body and file.suffix == ".safetensors" else ""
            if fault.isdigit():
                return self.send(int(fault), {"Retry-After": "1"}, b"", body)
            if fault == "wrong":
                data = bytes(byte ^ 1 for byte in data)
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if "Range" in self.headers:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.send(206 if "Range" in self.headers else 200, headers, data[start:], body, cut=fault == "cut")

        def info(self, rest: str) -> None:
            repo = rest.partition("/revision/")[0].partition("/tree/")[0]
            if repo not in repos and repo not in gated:
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", True)
            folder = repos.get(repo)
            sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())} if folder else {"config.json": 2}
            if "/tree/" in rest:
                tree = [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()]
                return self.send(200, {}, json.dumps(tree).encode(), True)
            files = [{"rfilename": n} for n in sizes]
            answer = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": files}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), True)

        def send(self, status: int, headers: dict[str, str], data: bytes, body: bool, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
