"""A small model server on loopback that speaks the OpenAI protocol, with an answer known in advance, and its failures.

The answer to a conversation are the words of its last message, reversed, one per event; to a plain prompt, `w0 w1 ...`
up to `max_tokens`. Its tokens are words.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "org/tiny"


class Handler(BaseHTTPRequestHandler):
    """What a `ModelServer` answers; `server.fault` names how it fails."""

    protocol_version = "HTTP/1.1"
    server: ModelServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if not self._failed("list"):
            self._json(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
            )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(self.path)
        self.server.requests.append(request)
        if self._failed("answer"):
            return
        chat = self.path.endswith("/chat/completions")
        text = request["messages"][-1]["content"] if chat else request["prompt"]
        most = request["max_tokens"]
        words = text.split()[::-1][:most] if chat else [f"w{i}" for i in range(most)]
        self._head(200, "text/event-stream")
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        fault = self.server.fault
        if fault == "one piece":
            words, count = [" ".join(words)], len(words)
        else:
            count = len(words)
        for i, word in enumerate(words):
            if fault == "dies" and i == 2:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault == "ends" and i == 2:
                self._chunk(b"")
                return
            if fault == "error event" and i == 2:
                self._event({"error": {"message": "CUDA out of memory"}})
                return
            if fault == "garbage" and i == 2:
                self._chunk(b"data: {not json\n\n")
                return
            if fault == "endless line" and i == 2:
                self._chunk(b"data: ")
                with contextlib.suppress(OSError):
                    for _ in range(200):
                        self._chunk(b"x" * 100_000)
                return
            if fault == "silent" and i == 2:
                self.server.released.wait(20)
                return
            piece = word if i == 0 else f" {word}"
            part = {"delta": {"content": piece}} if chat else {"text": piece}
            self._event({"choices": [{**part, "finish_reason": None}]})
            time.sleep(self.server.pause_s)
        end = {"delta": {}} if chat else {"text": ""}
        self._event({"choices": [{**end, "finish_reason": "length" if count == most else "stop"}]})
        if fault != "no usage" and request["stream_options"]["include_usage"]:
            usage = {"prompt_tokens": len(text.split()) + 1, "completion_tokens": count}
            self._event({"choices": [], "usage": usage})
        self._chunk(b": a comment\r\n\r\ndata: [DONE]\r\n\r\n")
        self._chunk(b"")

    def _failed(self, what: str) -> bool:
        fault = self.server.fault
        if fault == f"{what} hangs":
            self.server.released.wait(20)
        elif fault == f"{what} redirects":
            self.send_response(307)
            self.send_header("location", self.server.elsewhere)
            self.send_header("content-length", "0")
            self.end_headers()
        elif fault == f"{what} html":
            self._body(200, "text/html", b"<html>a router's login page</html>")
        elif fault == f"{what} other json":
            self._json(200, {"hello": "world"})
        elif fault == f"{what} large":
            self._body(200, "application/json", b'"' + b"x" * 5_000_000 + b'"')
        elif fault == f"{what} packed":
            self._body(200, "application/json", b"\x1f\x8b", {"content-encoding": "gzip"})
        elif fault.startswith(f"{what} status "):
            status = int(fault.split()[-1])
            self._json(status, {"error": {"message": f"reason of {status}", "type": "x"}})
        else:
            return False
        return True

    def _json(self, status: int, found: Any) -> None:
        self._body(status, "application/json", json.dumps(found).encode())

    def _body(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader may have had enough
            self.wfile.write(body)

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _event(self, event: Any) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            self.server.left.set()
            raise


class ModelServer(ThreadingHTTPServer):
    """Attributes: what fails (`fault`), what was asked, and whether somebody left in the middle (`left`)."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: list[Any] = [MODEL]
        self.fault = ""
        self.elsewhere = ""
        self.pause_s = 0.002
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.released = threading.Event()
        self.left = threading.Event()

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: connections that break are what is tested."""


@contextlib.contextmanager
def model_server() -> Iterator[ModelServer]:
    """A running server."""
    server = ModelServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
