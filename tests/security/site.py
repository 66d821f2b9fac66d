"""A real dashboard server on a loopback port, in a thread of the test, and ways to talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import httpx
import uvicorn
from gradio import Blocks

from backend.jobs import launch
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from backend.settings import Settings
from tests.conftest import demo_text
from ui.server import create_app, server_config

PASSWORD = "correct horse battery"
PUBLIC = "https://quant.example.org"
CANARY = "canary-7f3a9c"
SECRETS = re.compile(rf"{CANARY}|root:x:0|Traceback|File \"/|site-packages|SQLite format")


class Site:
    """A running dashboard."""

    def __init__(self, home: Home, port: int, app: Any) -> None:
        self.home, self.port, self.app = home, port, app
        self.origin = f"http://127.0.0.1:{port}"

    @property
    def blocks(self) -> Blocks:
        return self.app.routes[-1].app.get_blocks()

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.origin, headers=headers, timeout=60)

    @contextlib.contextmanager
    def login(self, name: str = "ada", password: str = PASSWORD) -> Iterator[httpx.Client]:
        """A client with a session."""
        with self.client() as client:
            answer = client.post("/login", data={"name": name, "password": password})
            assert answer.status_code == 303, answer.text
            yield client

    def raw(self, request: bytes) -> tuple[int, bytes]:
        """Send bytes as they are; the status and everything that came back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request)
            connection.settimeout(30)
            found = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    found += part
        return int(found.split(b" ", 2)[1]), found

    def get_raw(self, target: str, client: httpx.Client | None = None) -> tuple[int, bytes]:
        """GET a target that no client may clean up before it is sent."""
        cookies = "; ".join(f"{k}={v}" for k, v in client.cookies.items()) if client else ""
        lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Cookie: {cookies}", "Connection: close"]
        return self.raw("\r\n".join([*lines, "", ""]).encode())


@contextlib.contextmanager
def running(home: Home, *, watch: Callable[[Home], Any] = lambda _: None, **settings: Any) -> Iterator[Site]:
    """A dashboard of `home`; `settings` are those of `[web]`.

    It does not start a scheduler for the jobs that tests put into the store, unless `watch` does.
    """
    if settings:
        home.root.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        (home.root / "quantdeck.toml").write_text(f"[web]\n{lines}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(launch, "watch", watch))
    app = create_app(home, "127.0.0.1", port)
    server = uvicorn.Server(server_config(app, "127.0.0.1", port, Settings.load(home).web))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        yield Site(home, port, app)
    finally:
        server.should_exit = True
        thread.join(30)
        stack.close()


def call(client: httpx.Client, fn_index: int, data: Any, session: str = "s", event_data: Any = None) -> httpx.Response:
    """Ask for an event handler as the page does."""
    body = {"data": data, "fn_index": fn_index, "session_hash": session, "event_data": event_data, "trigger_id": None}
    # Written with escapes, so that half characters can be sent as well.
    headers = {"content-type": "application/json"}
    return client.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers)


def outcome(client: httpx.Client, session: str) -> list[dict[str, Any]]:
    """The messages of a session's events, until the last of them has ended."""
    found = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                found.append(json.loads(line[5:]))
                if found[-1]["msg"] in ("process_completed", "unexpected_error", "close_stream"):
                    break
    return found


def add_job(home: Home, name: str, **changes: Any) -> Job:
    """A queued job that nobody starts."""
    text = demo_text(name, **changes)
    return JobStore(home).create(text, parse_yaml(text).config, device="cpu")


def finish(home: Home, job: Job, result: dict[str, Any]) -> None:
    """Let a queued job succeed with a result."""
    store = JobStore(home)
    assert store.grant(job.uid, 1, ["cpu:0"])
    assert store.move(job.uid, "running", actor="test", attempt=1)
    assert store.update(job.uid, 1, result=result)
    assert store.move(job.uid, "succeeded", actor="test", attempt=1)
