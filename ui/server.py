"""The web server: the pages of one home behind their guards.

Gradio is mounted in a FastAPI parent, and each request passes, from the outside in: the headers of every answer, the
names we answer to, the origins that may change something, the size of a request, the list of routes, the login.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from backend import accounts
from backend.errors import ConfigError
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.settings import FILE_NAME, Settings, WebSettings
from ui.chat_pair import ChatPair
from ui.downloads import add_downloads
from ui.guard import (
    ACCOUNT,
    ANSWER_HEADERS,
    MULTIPART_ROOM,
    AnswerHeaders,
    BodyLimit,
    ForwardedHostGuard,
    LoginGuard,
    OriginGuard,
    RouteGuard,
    is_loopback,
    own_hosts,
    own_origins,
)
from ui.health import Watcher, health
from ui.login import HERE, add_login
from ui.sessions import Login
from ui.site import build_site
from ui.theme import CSS_PATH, HEAD_PATH, theme

OWN_ROUTES = re.compile(r"/download/.+|/login|/login/(?:style\.css|account\.js|account)|/health")
ACCOUNT_PATH = HERE / "account.html"

log = logging.getLogger("quantdeck")


def require_safe_address(home: Home, host: str, web: WebSettings) -> None:
    """Refuse to be reachable from other machines as long as there are no accounts.

    Raises:
        ConfigError: If `host` is not a loopback address, or a proxy is to stand in front, and there are no accounts.
    """
    if accounts.names(home):
        return
    how = "add one with `python -m backend accounts add NAME`"
    if not is_loopback(host):
        raise ConfigError(
            f"found {host!r}, which other machines can reach, and there are no accounts: {how}; or use 127.0.0.1, and "
            "reach it from elsewhere through an SSH tunnel (ssh -L 7860:127.0.0.1:7860 this-machine)",
            key="--host",
            value=host,
        )
    if web.origins:
        raise ConfigError(
            f"found {list(web.origins)}, where others can reach the page, and there are no accounts: {how}",
            key="web.origins",
            value=web.origins,
        )


def create_app(home: Home, host: str = "127.0.0.1", port: int = 7860) -> FastAPI:
    """The guarded application with all pages of one home.

    Args:
        home: Where jobs.db and user_data are.
        host: Address it will listen on.
        port: Port it will listen on; with `host` and the settings it makes the list of own origins.

    Raises:
        ConfigError: If the settings or accounts cannot be read, or others could reach it without an account.
    """
    web = Settings.load(home).web
    require_safe_address(home, host, web)
    JobStore(home)  # an old or broken store is told now, not to the first visitor
    https_hosts = frozenset(urlsplit(o).hostname or "" for o in web.origins if o.startswith("https:"))
    reachable = not is_loopback(host) or bool(web.origins)
    login = Login(home, web.session_hours, always=reachable, https_hosts=https_hosts, port=port)
    pair, watcher = ChatPair(home), Watcher(home)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher.start()
        yield
        watcher.stop()
        pair.unload()

    app = FastAPI(title="Quantdeck", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    site = build_site(home, pair)
    pages = {f"/{name}" for name, *_ in site.pages}
    hosts, origins = own_hosts(host, web.origins), own_origins(host, port, web.origins)
    # From the inside out.
    app.add_middleware(LoginGuard, account_of=login.account_of, needed=login.needed, pages=pages, local={"/health"})
    app.add_middleware(RouteGuard, pages=pages, own=OWN_ROUTES)
    app.add_middleware(BodyLimit, most=web.max_upload_bytes + MULTIPART_ROOM)
    app.add_middleware(OriginGuard, own_origins=origins)
    app.add_middleware(CORSMiddleware, allow_origins=origins)  # its presence turns Gradio's own off
    app.add_middleware(ForwardedHostGuard, hosts=hosts)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(AnswerHeaders)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        """An error that nobody met: Starlette answers it outside of all middlewares, so it needs its headers here."""
        return PlainTextResponse("Internal Server Error", status_code=500, headers=ANSWER_HEADERS)

    add_login(app, login)
    add_downloads(app, home)

    @app.get("/health")
    def show_health() -> Response:
        """What an operator asks first; for programs of this machine and people who are logged in."""
        return JSONResponse(health(home))

    def who(request: Request) -> str | None:
        """The account that LoginGuard found; Gradio answers 401 to None."""
        return request.scope.get(ACCOUNT)

    # Gradio says so about every site of several pages, even when server-side rendering was never asked for.
    warnings.filterwarnings("ignore", message="SSR mode is not supported with multi-page apps")
    return gr.mount_gradio_app(
        app,
        site,
        path="/",
        server_name=host,
        server_port=port,
        auth_dependency=who,
        theme=theme(),
        css_paths=[CSS_PATH],
        head_paths=[HEAD_PATH, ACCOUNT_PATH],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        allowed_paths=[],
        blocked_paths=[str(home.user_data), str(home.jobs_db), str(home.root / FILE_NAME)],
        max_file_size=web.max_upload_bytes,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


def serve(home: Home, host: str, port: int) -> None:
    """Answer requests until interrupted.

    Raises:
        ConfigError: If the settings or accounts cannot be read, or others could reach it without an account.
        JobError: If the job store cannot be used.
    """
    web = Settings.load(home).web
    app = create_app(home, host, port)
    shown = f"[{host}]" if ":" in host else host
    log.info("Quantdeck on http://%s:%d, home %s", shown, port, home.root)
    if not is_loopback(host):
        log.warning(
            "WARNING: %s can be reached by other machines, and this server speaks plain HTTP: passwords and sessions "
            "can be read on the way. Put a proxy with TLS in front of it, and its address into [web] origins.",
            shown,
        )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(server_config(app, host, port, web)).run()


def server_config(app: FastAPI, host: str, port: int, web: WebSettings) -> uvicorn.Config:
    """How the HTTP server listens."""
    return uvicorn.Config(
        app, host=host, port=port, workers=1, log_level="warning", server_header=False, ws="none",
        # The lock-out after wrong passwords goes by the client's address: only a proxy on this machine may tell it.
        proxy_headers=bool(web.origins), forwarded_allow_ips="127.0.0.1,::1",
        timeout_graceful_shutdown=5,  # open pages have streams that never end by themselves
    )  # fmt: skip
