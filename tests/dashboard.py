"""The real dashboard for tests: started as users start it, and looked at with a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from backend.paths import PROJECT, Home

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# What Gradio itself writes when a page with an open stream is left.
OWN_NOISE = re.compile(r"AbortError|Connection errored out")
STEP_MS = 60_000
IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium"),
]
"""Marks of a test module that needs a browser."""


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_app(
    home: Home,
    port: int,
    environment: dict[str, str] | None = None,
    *,
    timeout_s: float = 120.0,
    program: Sequence[str] = ("app.py",),
) -> subprocess.Popen[bytes]:
    """The real `app.py`, once it answers (where there are accounts: that one has to log in).

    Args:
        home: Its home.
        port: Its port.
        environment: Its environment; None for ours.
        timeout_s: How long it may take to answer.
        program: What Python runs; another one than `app.py` calls its `main` after changes of its own.
    """
    home.root.mkdir(parents=True, exist_ok=True)
    with open(home.root / "app.out", "ab") as out:
        process = subprocess.Popen(
            [sys.executable, *program, "--port", str(port), "--home", str(home.root)],
            cwd=PROJECT, stdout=out, stderr=out, env=environment or dict(os.environ), start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/config", timeout=10).status_code in (200, 401):
                return process
        except httpx.HTTPError:
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the dashboard does not answer:\n{(home.root / 'app.out').read_text()[-4000:]}")


@contextlib.contextmanager
def dashboard(home: Home, **options: Any) -> Iterator[str]:
    """The address of a dashboard of this home, which ends with the block; options as for `start_app`."""
    port = free_port()
    app = start_app(home, port, **options)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(30)


def foreign(url: str, address: str) -> bool:
    """Whether a page asked another host than its own for something."""
    return not url.startswith((address, "data:", "blob:"))


@contextlib.contextmanager
def watched_page(address: str, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page of a new browser, and what it complained of or asked of other hosts."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900}, **options)
        page.set_default_timeout(STEP_MS)
        page.on("request", lambda r: faults.append(f"request {r.url}") if foreign(r.url, address) else None)
        page.on("console", lambda m: faults.append(f"console {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: faults.append(f"error {e}"))
        yield page, faults
        browser.close()
