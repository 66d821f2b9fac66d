"""The pages to log in and out, and what they answer."""

from __future__ import annotations

import asyncio
import html
import logging
import math
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from backend.errors import ConfigError
from ui.guard import ACCOUNT, INERT_POLICY
from ui.sessions import Login

HERE = Path(__file__).parent
STYLE_PATH = HERE / "login.css"
SCRIPT_PATH = HERE / "account.js"
FORM_BYTES = 8192

log = logging.getLogger("quantdeck")


def safe_next(address: str | None) -> str:
    """Where to go after the login: a path of this site, else the first page."""
    if not address or not re.fullmatch(r"/[A-Za-z0-9_-]*(?:\?[A-Za-z0-9_.~%&=,+:/-]*)?", address):
        return "/"
    parts = urlsplit(address)
    return address if not parts.scheme and not parts.netloc and len(address) < 2000 else "/"


def add_login(app: FastAPI, login: Login) -> None:
    """Adds `/login`, `/logout` and what they need."""

    @app.get("/login/style.css")
    def style() -> Response:
        return FileResponse(STYLE_PATH, media_type="text/css")

    @app.get("/login/account.js")
    def script() -> Response:
        """Puts the account and a button to log out into the pages' header; read by `account.html`."""
        return FileResponse(SCRIPT_PATH, media_type="text/javascript")

    @app.get("/login/account")
    def account(request: Request) -> Response:
        """The account that is logged in; null where none is needed."""
        return JSONResponse({"account": request.scope[ACCOUNT] if login.needed() else None})

    @app.get("/login")
    def page(request: Request, next: str = "") -> Response:
        if not login.needed():
            return RedirectResponse("/", status_code=303)
        name = request.scope[ACCOUNT]
        return _page(_logged_in(name) if name else _form(safe_next(next)))

    @app.post("/login")
    async def enter(request: Request) -> Response:
        if not login.needed():
            return RedirectResponse("/", status_code=303)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            return PlainTextResponse("Send the form of /login.", status_code=415)
        if int(request.headers.get("content-length", FORM_BYTES + 1)) > FORM_BYTES:
            return PlainTextResponse("That is too long for a name and a password.", status_code=413)
        form = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=10, keep_blank_values=True)
        name, password, then = (form.get(key, [""])[-1] for key in ("name", "password", "next"))
        address = request.client.host if request.client else ""
        try:
            found, wait = await asyncio.to_thread(login.check, name, password, address)
        except ConfigError as error:
            log.error("login: %s", error.message)
            text = "The accounts of this dashboard cannot be read; its log says why."
            return _page(_form(safe_next(then), text), status=503)
        if found is None:
            # The typed name is not logged: people type passwords into the wrong field.
            known = name if name in login.known.now() else "an unknown name"
            log.warning("login refused for %s from %s%s", known, address, " (locked out)" if wait else "")
            if not wait:
                return _page(_form(safe_next(then), "Name or password is wrong."), status=401)
            seconds = math.ceil(wait)
            answer = _page(_form(safe_next(then), f"Too many tries. Try again in {_in_words(seconds)}."), status=429)
            answer.headers["Retry-After"] = str(seconds)
            return answer
        cookie, secure = login.cookie_name(request), login.is_https(request)
        login.sessions.end(request.cookies.get(cookie))
        done = RedirectResponse(safe_next(then), status_code=303)
        done.set_cookie(
            cookie, login.sessions.start(found), max_age=int(login.sessions.seconds), path="/", httponly=True,
            samesite="lax", secure=secure,
        )  # fmt: skip
        log.info("login of %s from %s", found.name, address)
        return done

    @app.post("/logout")
    def leave(request: Request) -> Response:
        cookie = login.cookie_name(request)
        login.sessions.end(request.cookies.get(cookie))
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(cookie, path="/", httponly=True, samesite="lax", secure=login.is_https(request))
        return answer


def _in_words(seconds: int) -> str:
    if seconds < 90:
        return f"{seconds} second{'' if seconds == 1 else 's'}"
    return f"{math.ceil(seconds / 60)} minutes"


def _form(then: str, problem: str = "") -> str:
    told = f'<p class="problem" role="alert">{html.escape(problem)}</p>' if problem else ""
    return (
        f'{told}<form method="post" action="/login"><input type="hidden" name="next" value="{html.escape(then)}">'
        '<label>Name<input name="name" autocomplete="username" autocapitalize="none" maxlength="64" required '
        "autofocus></label>"
        '<label>Password<input name="password" type="password" autocomplete="current-password" maxlength="1024" '
        "required></label>"
        '<button type="submit">Log in</button></form>'
    )


def _logged_in(name: str) -> str:
    return (
        f"<p>You are logged in as <strong>{html.escape(name)}</strong>.</p>"
        '<p><a href="/">To the jobs</a></p>'
        '<form method="post" action="/logout"><button type="submit">Log out</button></form>'
    )


def _page(body: str, status: int = 200) -> HTMLResponse:
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Quantdeck: log in</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="/login/style.css"></head>'
        f"<body><main><h1>Quantdeck</h1>{body}</main></body></html>"
    )
    return HTMLResponse(text, status_code=status, headers={"Content-Security-Policy": INERT_POLICY})
