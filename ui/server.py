"""The web server around the pages: who may ask, and what an answer carries.

Gradio answers any Host and any Origin, so it is mounted in a FastAPI parent that refuses foreign ones:
without accounts, the guard below is what keeps another web site, or a DNS name pointed at 127.0.0.1, from
driving the dashboard through the visitor's browser.
"""

from __future__ import annotations

import ipaddress
import logging
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.errors import ConfigError, JobError
from backend.jobs import control
from backend.jobs.results import results_of
from backend.jobs.store import JobStore
from backend.paths import Home
from ui.chat_pair import ChatPair
from ui.site import build_site
from ui.theme import CSS_PATH, HEAD_PATH, theme

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
ANSWER_HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

log = logging.getLogger("quantdeck")


class OriginGuard:
    """ASGI middleware: a request that can change something must come from our own pages.

    Browsers send Origin (and Sec-Fetch-Site) with every such request; programs on this machine that send
    neither are let through, since they could open `jobs.db` as well.
    """

    def __init__(self, app: ASGIApp, own_origins: frozenset[str]) -> None:
        self.app = app
        self.own_origins = own_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a foreign request, or pass it on and add our headers to its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] not in SAFE_METHODS and not self._own(Headers(scope=scope)):
            refusal = PlainTextResponse("This request did not come from a page of this dashboard.", status_code=403)
            await refusal(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(ANSWER_HEADERS)
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _own(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            return origin in self.own_origins
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


def require_loopback(host: str) -> None:
    """Refuse to listen where other machines could connect: there are no accounts yet.

    Raises:
        ConfigError: If `host` is not a loopback address.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"found {host!r}; the dashboard has no accounts, so it only listens on this machine: use 127.0.0.1, "
            "and reach it from elsewhere through an SSH tunnel (ssh -L 7860:127.0.0.1:7860 this-machine)",
            key="--host",
            value=host,
        )


def create_app(home: Home, host: str = "127.0.0.1", port: int = 7860) -> FastAPI:
    """The guarded application with all pages of one home.

    Args:
        home: Where jobs.db and user_data are.
        host: Loopback address it will listen on.
        port: Port it will listen on; with `host` it makes the list of own origins.
    """
    require_loopback(host)
    pair = ChatPair(home)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        pair.unload()

    app = FastAPI(title="Quantdeck", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    names = sorted({*LOCAL_NAMES, host})
    own_origins = frozenset(f"http://{name}:{port}" for name in names)
    app.add_middleware(OriginGuard, own_origins=own_origins)
    app.add_middleware(CORSMiddleware, allow_origins=sorted(own_origins))  # its presence turns Gradio's own off
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[n.strip("[]") for n in names])

    @app.get("/download/{uid}.yaml")
    def download_yaml(uid: str) -> Response:
        """The job's YAML exactly as it was submitted."""
        try:
            job = JobStore(home).get(uid)
        except JobError as error:
            return PlainTextResponse(error.message, status_code=404)
        name = f'attachment; filename="{job.job_id}.yaml"'  # JOB_IDs have only letters, digits, '.', '_', '-'
        return Response(job.config_yaml, media_type="application/yaml", headers={"Content-Disposition": name})

    @app.get("/download/{uid}/{name}/{file}")
    def download_file(uid: str, name: str, file: str) -> Response:
        """One file of a quantized model; only what its manifest lists is handed out."""
        try:
            job = JobStore(home).get(uid)
            entry = next((e for e in results_of(job.result) if name == (e["name"] or "model")), None)
        except JobError as error:
            return PlainTextResponse(error.message, status_code=404)
        listed = (entry or {}).get("manifest", {}).get("files", {})
        path = Path(entry["artefact"]) / file if entry else None
        if path is None or file not in listed or not path.is_file():
            return PlainTextResponse(f"job {job.job_id} has no file {file!r} of {name!r}", status_code=404)
        return FileResponse(path, filename=file, media_type="application/octet-stream")

    # Gradio says so about every site of several pages, even when server-side rendering was never asked for.
    warnings.filterwarnings("ignore", message="SSR mode is not supported with multi-page apps")
    return gr.mount_gradio_app(
        app,
        build_site(home, pair),
        path="/",
        server_name=host,
        server_port=port,
        theme=theme(),
        css_paths=[CSS_PATH],
        head_paths=[HEAD_PATH],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        allowed_paths=[],
        blocked_paths=[str(home.user_data), str(home.jobs_db)],
        max_file_size="2mb",
        ssr_mode=False,
        mcp_server=False,
    )


def serve(home: Home, host: str, port: int) -> None:
    """Reconcile the job store, then answer requests until interrupted.

    Raises:
        ConfigError: If `host` is not a loopback address.
    """
    require_loopback(host)
    control.reconcile(home)
    app = create_app(home, host, port)
    shown = f"[{host}]" if ":" in host else host
    log.info("Quantdeck on http://%s:%d, home %s", shown, port, home.root)
    uvicorn.run(app, host=host, port=port, workers=1, log_level="warning")
