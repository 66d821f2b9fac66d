"""A small server on loopback that speaks as much of the Hub's API as searches and downloads need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1.0", COMMIT)
WEIGHTS_OR_DATA = (".safetensors", ".parquet", ".jsonl")


@contextmanager
def hub_server(
    repos: dict[str, Path],
    *,
    gated: tuple[str, ...] = (),
    faults: list[str] | None = None,
    token: str | None = None,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    datasets: Mapping[str, Path] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as model repositories.

    Args:
        repos: Repository id to folder.
        gated: Ids that answer as gated repositories do.
        faults: What goes wrong with the next requests for a weight file, or of the API (`api-...`), in turn: `cut`
            (the connection ends half way), `wrong` (other bytes of the same number), `503`, `429`; `api-429`,
            `api-junk` (a page that is no JSON), `api-cut`, `api-hang` (no answer until the server ends).
        token: Opens the gated repositories; any other token is refused with 401.
        about: What the API tells of a repository besides: downloads, likes, tags, config, ...
        datasets: Id to folder of dataset repositories, with folders below; faults, gates and token count for them too.

    Yields:
        The endpoint, and a growing list of the requested paths.
    """
    asked: list[str] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        wanted = ""  # what was posted

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            self.wanted = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = urlsplit(self.path).path.strip("/")
            asked.append(path + self.headers.get("Range", "").replace("bytes=", "#"))
            given = self.headers.get("Authorization")
            if token is not None and given not in (None, f"Bearer {token}"):
                headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
                return self.send(401, headers, b'{"error": "Invalid credentials"}', body)
            if path.startswith("api/") and faults and faults[0].startswith("api-"):
                return self.fail(faults.pop(0).removeprefix("api-"), body)
            if path == "api/models":
                return self.found()
            if path.startswith("api/models/"):
                return self.info(path.removeprefix("api/models/"))
            if path.startswith("api/datasets/"):
                return self.dataset(path.removeprefix("api/datasets/"), given, body)
            repo, _, rest = path.partition("/resolve/")
            every = repos
            if repo.startswith("datasets/"):
                repo, every = repo.removeprefix("datasets/"), dict(datasets or {})
            file = every.get(repo, Path("/nonexistent")) / unquote(rest.partition("/")[2])
            if repo in gated and (token is None or given is None):
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
                return self.send(403 if token is None else 401, headers, b"", body)
            if not file.is_file():
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            fault = faults.pop(0) if faults and body and file.suffix in WEIGHTS_OR_DATA else ""
            if fault.isdigit():
                return self.send(int(fault), {"Retry-After": "1"}, b"", body)
            if fault == "wrong":
                data = bytes(byte ^ 1 for byte in data)
            if "Range" not in self.headers:
                return self.send(200, headers, data, body, cut=fault == "cut")
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            return self.send(206, headers, part, body, cut=fault == "cut")

        def fail(self, fault: str, body: bool) -> None:
            if fault == "hang":
                ended.wait(60)
                return None
            if fault == "junk":
                return self.send(200, {"Content-Type": "text/html"}, b"<html>Log in to this network</html>", body)
            if fault == "cut":
                return self.send(200, {"Content-Type": "application/json"}, b'[{"id": "team/sm' * 9, body, cut=True)
            return self.send(int(fault), {"Retry-After": "1"}, b"", body)

        def found(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            word, limit = query.get("search", [""])[0].lower(), int(query.get("limit", ["1000"])[0])
            rows = [self.facts(repo) for repo in {**repos, **dict.fromkeys(gated)} if word in repo.lower()]
            rows.sort(key=lambda row: -n if isinstance(n := row.get("downloads"), int) else 0)
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(rows[:limit]).encode(), True)

        def facts(self, repo: str) -> dict[str, Any]:
            told = (about or {}).get(repo, {})
            return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False,
                    "gated": "manual" if repo in gated else False, **told}  # fmt: skip

        def info(self, rest: str) -> None:
            repo, _, revision = rest.partition("/tree/")[0].partition("/revision/")
            if repo not in repos and repo not in gated:
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", True)
            if revision and revision not in REVISIONS:
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", True)
            folder = repos.get(repo)
            sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())} if folder else {"config.json": 2}
            if "/tree/" in rest:
                tree = [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()]
                return self.send(200, {}, json.dumps(tree).encode(), True)
            told = parse_qs(urlsplit(self.path).query).get("blobs")
            siblings = [{"rfilename": n, **({"size": size} if told else {})} for n, size in sizes.items()]
            answer = {**self.facts(repo), "siblings": siblings}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), True)

        def dataset(self, rest: str, given: str | None, body: bool) -> None:
            """What the API tells of a dataset, and of its files."""
            words = re.fullmatch(r"([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", unquote(rest))
            repo, what, revision, below = words.groups() if words else ("", None, None, None)
            if repo in gated and (token is None or given is None):
                return self.send(401 if given is None else 403, {"X-Error-Code": "GatedRepo"}, b"{}", body)
            folder = (datasets or {}).get(repo)
            if folder is None:
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
            if revision not in (None, *REVISIONS):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
            entries = [self.entry(folder, path) for path in sorted(folder.rglob("*"))]
            if what == "tree":
                if below and not (folder / below).exists():
                    return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
                answer: Any = [e for e in entries if not below or e["path"].startswith(below.strip("/") + "/")]
            elif what == "paths-info":
                paths = parse_qs(self.wanted).get("paths") or json.loads(self.wanted or "{}").get("paths", [])
                answer = [e for e in entries if e["path"] in paths]
            else:
                files = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
                answer = {**self.facts(repo), "id": repo, "siblings": files, "tags": []}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

        def entry(self, folder: Path, path: Path) -> dict[str, Any]:
            kind = "directory" if path.is_dir() else "file"
            size = 0 if path.is_dir() else path.stat().st_size
            return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": "0" * 40}

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
        ended.set()
        server.shutdown()
        server.server_close()


@contextmanager
def hubs(patch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts Hubs, as `hub_server` does; each is the one that everything asks from then on, and what it was asked."""
    with ExitStack() as stack:

        def start(repos: dict[str, Path], **options: Any) -> Any:
            endpoint, asked = stack.enter_context(hub_server(repos, **options))
            patch.setenv("HF_ENDPOINT", endpoint)
            return asked

        yield start
