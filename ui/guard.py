"""What stands between the network and the pages: each class here is one ASGI middleware with one rule.

Gradio answers any Host and any Origin, and has many more routes than these pages use. So nothing of it is
reachable unless it is named here: `RouteGuard` lists the routes, `LoginGuard` asks who is there, `OriginGuard`
keeps other web sites from acting through a visitor's browser, `BodyLimit` keeps requests small.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection
from urllib.parse import quote, urlsplit

import psutil
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
ACCOUNT = "quantdeck.account"  # who asks, as LoginGuard leaves it in the scope
NO_LOGIN = "-"  # who asks where no accounts are needed; no account can have this name
LOGIN_PATHS = frozenset({"/login", "/login/style.css"})
MULTIPART_ROOM = 65_536  # what a form adds around the file in it

# Gradio's page configuration is an inline script, and it makes functions from text (js_on_load), hence the two
# 'unsafe' words. Handlers in attributes (onerror=...) are what injected HTML would need: those are forbidden.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "script-src-attr 'none'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
INERT_POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
ANSWER_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}

# What a page fetches besides itself. Not here, and so not answered: Gradio's file serving and proxy, its own login,
# named API calls, deep links, monitoring, run history, streams, recordings, and the code editor.
GRADIO_GETS = re.compile(
    r"/(?:config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)"
    r"|/(?:assets|static|svelte)/[^\\]+"
    r"|/gradio_api/(?:info|app_id|startup-events|theme\.css|upload_progress|queue/data|heartbeat/[A-Za-z0-9_-]{1,64})"
)
POSTS = frozenset(
    f"/gradio_api/{name}"
    for name in ("queue/join", "run/predict", "cancel", "reset", "upload", "component_server", "component_server/")
) | {"/login", "/logout"}
LASTING = re.compile(r"/(?:assets|static|svelte)/")  # the same for everybody, and named by content


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    """Answer with a plain sentence; a websocket is closed."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await PlainTextResponse(text, status_code=status)(scope, receive, send)


class AnswerHeaders:
    """Adds `ANSWER_HEADERS` to every answer; a route may have stricter ones of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in ANSWER_HEADERS.items():
                    if name != "Cache-Control" or not LASTING.match(scope["path"]):
                        headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class ForwardedHostGuard:
    """A forwarded host must be one of ours: Gradio builds the addresses in its pages from it.

    Args:
        app: What is guarded.
        hosts: Host names without ports.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = frozenset(host.strip("[]").lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a foreign name, or pass the request on."""
        if scope["type"] != "lifespan":
            for value in Headers(scope=scope).getlist("x-forwarded-host"):
                for part in value.split(","):
                    if host_name(part) not in self.hosts:
                        await refuse(scope, receive, send, 400, "Invalid host header")
                        return
        await self.app(scope, receive, send)


class OriginGuard:
    """A request that can change something must come from our own pages.

    Browsers send Origin (and Sec-Fetch-Site) with every such request; programs that send neither are let
    through: they act for nobody but themselves.

    Args:
        app: What is guarded.
        own_origins: The origins of our own pages.
    """

    def __init__(self, app: ASGIApp, own_origins: Collection[str]) -> None:
        self.app = app
        self.own_origins = frozenset(own_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a foreign request, or pass it on."""
        if scope["type"] != "lifespan":
            safe = scope["type"] == "http" and scope["method"] in SAFE_METHODS
            if not safe and not self._own(Headers(scope=scope)):
                await refuse(scope, receive, send, 403, "This request did not come from a page of this dashboard.")
                return
        await self.app(scope, receive, send)

    def _own(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            return origin.lower() in self.own_origins
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


class BodyLimit:
    """No request may be larger than an upload may be.

    Args:
        app: What is guarded.
        most: Bytes of a body.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a body that says that it is too large, and end one that turns out to be."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "0")
        text = f"This request is too large: at most {self.most} bytes are taken."
        if not told.isascii() or not told.isdigit() or int(told[:20]) > self.most:
            await refuse(scope, receive, send, 413, text)
            return
        seen, started = 0, False

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, text)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive_counted, send_noted)
        except HTTPException as error:
            if started:
                raise
            await refuse(scope, receive, send, error.status_code, text)


class RouteGuard:
    """Only what is listed is answered; everything else, and every websocket, is not there.

    Args:
        app: What is guarded.
        pages: Paths of the pages, e.g. `/new`.
        own: Pattern of what else of our own can be asked for.
    """

    def __init__(self, app: ASGIApp, pages: Collection[str], own: re.Pattern[str]) -> None:
        self.app = app
        self.pages = frozenset(pages)
        self.own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what is not listed, or pass it on."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._known(scope)):
            await self.app(scope, receive, send)
            return
        await refuse(scope, receive, send, 404, "There is nothing at this address.")

    def _known(self, scope: Scope) -> bool:
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            known = self.own.fullmatch(path) or GRADIO_GETS.fullmatch(path)
            return path in self.pages or bool(known and ".." not in path)
        return method == "POST" and path in POSTS


class LoginGuard:
    """Closed by default: where accounts are needed, only the login page answers a request without a session.

    Args:
        app: What is guarded.
        account_of: The account a request's session belongs to; None without a valid one.
        needed: Whether accounts are needed now.
        pages: Paths that a person opens; they lead to the login page, everything else answers 401.
        local: Paths that a program on this machine may ask for without a session.
    """

    def __init__(
        self,
        app: ASGIApp,
        account_of: Callable[[HTTPConnection], str | None],
        needed: Callable[[], bool],
        pages: Collection[str],
        local: Collection[str] = (),
    ) -> None:
        self.app = app
        self.account_of = account_of
        self.needed = needed
        self.pages = frozenset(pages)
        self.local = frozenset(local)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a stranger, or note who asks and pass the request on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        needed = self.needed()
        account = self.account_of(connection) if needed else NO_LOGIN
        scope[ACCOUNT] = account
        open_to_all = scope["path"] in LOGIN_PATHS or (scope["path"] in self.local and is_local(connection))
        if account is None and not open_to_all:
            await self._turn_away(scope, receive, send)
        elif account is None or not needed:
            await self.app(scope, receive, send)
        else:
            await self._while_logged_in(connection, receive, send)

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in self.pages:
            query = scope["query_string"].decode("latin-1")
            wanted = scope["path"] + (f"?{query}" if query else "")
            answer: Response = RedirectResponse(f"/login?next={quote(wanted, safe='')}", status_code=303)
            await answer(scope, receive, send)
            return
        await refuse(scope, receive, send, 401, "Log in first: /login")

    async def _while_logged_in(self, connection: HTTPConnection, receive: Receive, send: Send) -> None:
        """Passes the request on; an answer that is still being sent when the session ends is cut off."""
        ended = False

        async def send_until_end(message: Message) -> None:
            nonlocal ended
            if ended:
                return
            if message["type"] == "http.response.body" and message.get("more_body"):
                ended = self.account_of(connection) is None
                if ended:
                    message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self.app(connection.scope, receive, send_until_end)


def host_name(host: str) -> str:
    """A Host header's name without its port, in lower case and without brackets; empty if it is none."""
    try:
        return (urlsplit(f"//{host.strip()}").hostname or "").lower()
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(connection: HTTPConnection) -> bool:
    """Whether a program on this machine asks, and not somebody behind a proxy on this machine."""
    client, headers = connection.client, connection.headers
    forwarded = any(name in headers for name in ("x-forwarded-for", "x-forwarded-host", "forwarded", "via"))
    direct = client is not None and is_loopback(client.host) and not forwarded
    return direct and is_loopback(host_name(headers.get("host", "")))


def own_hosts(host: str, origins: Collection[str]) -> list[str]:
    """The host names under which the pages may be asked for, IPv6 in brackets.

    Of an address that stands for all interfaces these are the interfaces' addresses, and no name: whoever owns a name
    can point it at this machine.
    """
    names = {*LOCAL_NAMES, *(_bracketed(urlsplit(origin).hostname or "") for origin in origins)}
    if host.strip("[]") in ("0.0.0.0", "::"):
        for addresses in psutil.net_if_addrs().values():
            names |= {_bracketed(a.address.partition("%")[0]) for a in addresses if _is_address(a.address)}
    elif host:
        names.add(_bracketed(host.lower()))
    return sorted(name for name in names if name)


def own_origins(host: str, port: int, origins: Collection[str]) -> list[str]:
    """The origins that our own pages have: every own host at our port, and the public ones."""
    return sorted({*(f"http://{name}:{port}" for name in own_hosts(host, ())), *(o.lower() for o in origins)})


def _bracketed(host: str) -> str:
    host = host.strip("[]")
    return f"[{host}]" if ":" in host else host


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True
