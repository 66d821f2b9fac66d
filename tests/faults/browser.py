"""What a browser asks of the dashboard, without a browser: the calls behind the list of jobs and a job's log."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import httpx

PREDICT = "/gradio_api/run/predict"
SERVER_FUNCTION = "/gradio_api/component_server"


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
