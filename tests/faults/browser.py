"""What a browser asks of the dashboard, without a browser: the calls behind the list of jobs and a job's log."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx

from backend.paths import PROJECT, Home

PREDICT = "/gradio_api/run/predict"
SERVER_FUNCTION = "/gradio_api/component_server"


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_app(home: Home, port: int, environment: dict[str, str], *, timeout_s: float = 120.0) -> subprocess.Popen:
    """The real `app.py`, once it answers."""
    with open(home.root / "app.out", "ab") as out:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port), "--home", str(home.root)],
            cwd=PROJECT, stdout=out, stderr=out, env=environment, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/config", timeout=10).status_code == 200:
                return process
        except httpx.HTTPError:
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the dashboard does not answer:\n{(home.root / 'app.out').read_text()[-4000:]}")


@dataclass(frozen=True)
class Calls:
    """Requests of one tab: path and JSON body of each.

    Attributes:
        config: What `/config` answers.
        session: The tab's id.
    """

    config: dict[str, Any]
    session: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> Calls:
        """A new tab."""
        return cls(config, secrets.token_hex(8))

    def load_jobs(self) -> tuple[str, dict[str, Any]]:
        """The list of jobs as it is loaded with its page."""
        return self._event(lambda target: target[1] == "load")

    def refresh_jobs(self) -> tuple[str, dict[str, Any]]:
        """Its refresh by the page's timer; a session's state stays on the server."""
        return self._event(lambda target: target[1] == "tick")

    def log(self, uid: str, cursor: str | None) -> tuple[str, dict[str, Any]]:
        """The lines of a job's log after a cursor."""
        box = next(c for c in self.config["components"] if c["props"].get("elem_id") == "log")
        body = {"session_hash": self.session, "component_id": box["id"], "fn_name": "read_log"}
        return SERVER_FUNCTION, {**body, "data": {"uid": uid, "cursor": cursor}}

    def _event(self, wanted: Any) -> tuple[str, dict[str, Any]]:
        first = set(self.config["page"][""]["dependencies"])
        event = next(
            d for d in self.config["dependencies"] if d["id"] in first and any(wanted(t) for t in d["targets"])
        )
        body = {"data": [None] * len(event["inputs"]), "fn_index": event["id"], "session_hash": self.session}
        return PREDICT, {**body, "trigger_id": event["targets"][0][0], "event_data": None}


def listed(answer: httpx.Response) -> str:
    """The HTML that an answer to `load_jobs` or `refresh_jobs` brings."""
    answer.raise_for_status()
    return " ".join(_texts(answer.json()["data"]))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inner for text in _texts(one)]
