"""Nobody comes in without an account: routes, addresses, logins, sessions. A real server on a loopback port."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from backend import accounts
from backend.errors import ConfigError
from backend.paths import Home
from backend.settings import WebSettings
from tests.security.site import PASSWORD, PUBLIC, Site, running
from ui.guard import own_hosts, own_origins
from ui.login import safe_next
from ui.server import require_safe_address
from ui.sessions import Lockout, Login, Sessions

ROOT = Path(__file__).parents[2]


# -- closed by default


PAGES = ["/", "/new", "/job?id=x", "/compare", "/chat", "/engines"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_leads_to_the_login_and_back(site, path):
    with site.client() as stranger:
        answer = stranger.get(path)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/login?next=%2F")
        form = stranger.get(answer.headers["location"])
        assert form.status_code == 200
        then = re.search(r'name="next" value="([^"]*)"', form.text)[1]
        assert then == path
        entered = stranger.post("/login", data={"name": "ada", "password": PASSWORD, "next": then})
        assert entered.headers["location"] == path
        assert stranger.get(path).status_code == 200


def routes_of(site: Site) -> set[str]:
    """Every path of our application and of Gradio's, with something in place of its parameters."""
    found = set()
    for router in (site.app, site.app.routes[-1].app):
        routes = list(router.routes)
        for route in routes:
            routes += getattr(getattr(route, "original_router", None), "routes", [])
            if getattr(route, "path", ""):
                found.add(re.sub(r"\{[^}]*\}", "x", route.path))
    return found


def test_no_route_answers_a_stranger_but_the_login(site):
    paths = routes_of(site)
    assert len(paths) > 60
    with site.client(**{"x-forwarded-for": "203.0.113.9"}) as stranger:  # a program on this machine may see /health
        for path in sorted(paths):
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"):
                status = stranger.request(method, path).status_code
                if path in ("/login", "/login/style.css"):
                    continue
                assert status in (303, 401, 404, 405), f"{method} {path}: {status}"
                assert status != 303 or path in ("/", "/new", "/job", "/compare", "/chat", "/engines"), path


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/gradio_api/cancel"), ("POST", "/gradio_api/reset"), ("GET", "/gradio_api/heartbeat/abc"),
     ("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/queue/data?session_hash=s"), ("GET", "/config"),
     ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/component_server"), ("POST", "/gradio_api/upload"),
     ("GET", "/gradio_api/info"), ("GET", "/health"), ("GET", "/download/x.yaml"), ("GET", "/login/account")],
)  # fmt: skip
def test_what_the_pages_ask_for_needs_a_session(site, ada, method, path):
    # Through a proxy, as other people come: a program on this machine may see /health.
    far = {"x-forwarded-for": "203.0.113.9"}
    with site.client(**far) as stranger:
        assert stranger.request(method, path, json={}).status_code == 401
    with contextlib.suppress(httpx.ReadTimeout), ada.stream(method, path, json={}, timeout=2) as answer:
        assert answer.status_code != 401  # and streams last


def test_a_session_of_another_kind_opens_nothing(site):
    for cookie in ("x", "", "../../etc/passwd", "a" * 5000, "\x7f"):
        with site.client(cookie=f"quantdeck-{site.port}={cookie}") as stranger:
            assert stranger.get("/config").status_code == 401


def test_gradios_other_doors_are_not_there_even_for_accounts(ada):
    for path in ("/monitoring", "/monitoring/summary", "/gradio_api/runs", "/gradio_api/openapi.json", "/logout",
                 "/gradio_api/vibe-code", "/gradio_api/deep_link", "/gradio_api/dev/reload", "/gradio_api/token",
                 "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/call/x/y", "/docs"):  # fmt: skip
        assert ada.get(path).status_code in (404, 405), path
    for path in ("/gradio_api/vibe-code", "/gradio_api/vibe-edit", "/gradio_api/process_recording",
                 "/gradio_api/call/on_start", "/gradio_api/run/on_start", "/gradio_api/run-history/x"):  # fmt: skip
        assert ada.post(path, json={"code": "x"}).status_code in (404, 405), path


def test_a_websocket_is_refused(site, open_site):
    for one in (site, open_site):
        status, _ = one.raw(
            f"GET /gradio_api/queue/data HTTP/1.1\r\nHost: 127.0.0.1:{one.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade, close\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert status in (400, 401, 404, 422)


def test_no_handler_of_a_page_is_in_the_public_api(ada, site):
    told = ada.get("/gradio_api/info").json()
    endpoints = {"submit", "status", "cancel", "result", "list_jobs", "export"}
    assert set(told["named_endpoints"]) == {f"/{name}" for name in endpoints} and not told["unnamed_endpoints"]
    assert {fn.api_name for fn in site.blocks.fns.values() if fn.api_visibility != "private"} == endpoints
    with site.client() as stranger:
        assert stranger.get("/gradio_api/info").status_code == 401


# -- accounts and addresses


def test_the_first_account_closes_a_running_dashboard_and_the_last_one_opens_it(tmp_path):
    home = Home.at(tmp_path)
    with running(home) as site, site.client() as stranger:
        assert stranger.get("/config").status_code == 200
        accounts.add(home, "ada", PASSWORD)
        assert stranger.get("/config").status_code == 401
        accounts.remove(home, "ada")
        assert stranger.get("/config").status_code == 200


def test_a_broken_list_of_accounts_lets_nobody_in(tmp_path):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    with running(home) as site, site.login() as client:
        assert client.get("/config").status_code == 200
        accounts.accounts_file(home).write_text("{")
        assert client.get("/config").status_code == 401
        answer = client.post("/login", data={"name": "ada", "password": PASSWORD})
        assert answer.status_code == 503 and str(home.root) not in answer.text


def test_where_others_can_come_in_it_stays_closed_without_accounts(tmp_path):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    with running(home, origins=[PUBLIC]) as site, site.client() as stranger:
        accounts.remove(home, "ada")
        assert stranger.get("/config").status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_other_machines_need_accounts(tmp_path, host):
    home = Home.at(tmp_path)
    with pytest.raises(ConfigError, match="accounts add"):
        require_safe_address(home, host, WebSettings())
    accounts.add(home, "ada", PASSWORD)
    require_safe_address(home, host, WebSettings())


def test_a_public_origin_needs_accounts(tmp_path):
    with pytest.raises(ConfigError, match="web.origins"):
        require_safe_address(Home.at(tmp_path), "127.0.0.1", WebSettings(origins=(PUBLIC,)))


def test_the_program_does_not_start_for_others_without_accounts_and_warns_with_them(tmp_path):
    command = [sys.executable, "app.py", "--host", "0.0.0.0", "--port", "0", "--home", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "accounts add" in done.stderr
    accounts.add(Home.at(tmp_path), "ada", PASSWORD)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as program:
        try:
            for line in program.stderr:
                if "plain HTTP" in line:
                    break
            else:
                pytest.fail("there was no warning")
        finally:
            program.terminate()


def test_own_names_of_all_interfaces_are_addresses_only():
    names = own_hosts("0.0.0.0", ())
    assert "127.0.0.1" in names and "0.0.0.0" not in names
    assert all(name == "localhost" or re.fullmatch(r"[0-9.]+|\[[0-9a-f:.]+\]", name) for name in names)
    assert own_origins("127.0.0.1", 7860, [PUBLIC]) == sorted(
        [PUBLIC, "http://127.0.0.1:7860", "http://[::1]:7860", "http://localhost:7860"]
    )


# -- sessions


def test_the_cookie_is_for_the_browser_only(site):
    with site.client() as client:
        cookie = client.post("/login", data={"name": "ada", "password": PASSWORD}).headers["set-cookie"]
        assert cookie.startswith(f"quantdeck-{site.port}=") and "HttpOnly" in cookie and "SameSite=lax" in cookie
        assert "Secure" not in cookie  # http on this machine
        form = {"name": "ada", "password": PASSWORD}
        cookie = client.post("/login", data=form, headers={"host": "quant.example.org"}).headers["set-cookie"]
        assert cookie.startswith("__Host-quantdeck=")
        assert all(word in cookie for word in ("HttpOnly", "SameSite=lax", "Secure", "Path=/")), cookie
        assert "Domain" not in cookie
        forwarded = {"x-forwarded-host": "quant.example.org", "x-forwarded-proto": "https"}
        assert "Secure" in client.post("/login", data=form, headers=forwarded).headers["set-cookie"]


def test_only_the_hash_of_a_token_is_kept(tmp_path):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    login = Login(home, 1.0)
    token = login.sessions.start(accounts.load(home)["ada"])
    assert len(token) >= 40
    assert token.encode() not in repr(vars(login.sessions)).encode()
    assert login.sessions.name_of(token) == "ada" and login.sessions.name_of(token + "x") is None


def test_a_session_ends_by_time_and_by_a_new_password(tmp_path):
    home, now = Home.at(tmp_path), [1000.0]
    accounts.add(home, "ada", PASSWORD)
    sessions = Sessions(Login(home, 1.0).known, 2.0, clock=lambda: now[0])
    token = sessions.start(accounts.load(home)["ada"])
    now[0] += 2 * 3600 - 1
    assert sessions.name_of(token) == "ada"
    now[0] += 1
    assert sessions.name_of(token) is None
    token = sessions.start(accounts.load(home)["ada"])
    accounts.remove(home, "ada")
    accounts.add(home, "ada", "a new password of ada")
    assert sessions.name_of(token) is None


def test_logging_out_kills_the_session_and_its_streams(site):
    with site.login() as client, site.client(cookie="; ".join(f"{k}={v}" for k, v in client.cookies.items())) as thief:
        assert thief.get("/config").status_code == 200
        with thief.stream("GET", "/gradio_api/heartbeat/abc", timeout=60) as stream:
            lines = stream.iter_lines()
            assert "ALIVE" in next(lines)
            answer = client.post("/logout")
            assert answer.status_code == 303 and answer.headers["location"] == "/login"
            assert "Max-Age=0" in answer.headers["set-cookie"]
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "ALIVE" not in "".join(lines)  # it ends
        assert thief.get("/config").status_code == 401
        assert client.get("/").status_code == 303


def test_a_removed_accounts_session_ends(tmp_path):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    accounts.add(home, "bob", PASSWORD)
    with running(home) as site, site.login("bob") as bob, site.login("ada") as ada:
        accounts.remove(home, "bob")
        assert bob.get("/config").status_code == 401
        assert ada.get("/config").status_code == 200
        accounts.add(home, "bob", PASSWORD)
        assert bob.get("/config").status_code == 401  # another account of the same name


def test_a_login_makes_a_new_session_and_ends_the_old_one(site):
    with site.login() as client:
        before = dict(client.cookies)
        client.post("/login", data={"name": "bob", "password": PASSWORD})
        assert dict(client.cookies) != before
        assert client.get("/login/account").json() == {"account": "bob"}
    with httpx.Client(base_url=site.origin, cookies=before) as old:
        assert old.get("/config").status_code == 401


@pytest.mark.parametrize(
    "address",
    ["//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil.example", "/%0d%0aSet-Cookie:x",
     "/\r\nx: y", "javascript:alert(1)", "/new//evil.example", " /new", "/new?a=\"><script>", "",
     "/" + "a" * 3000 + "?"],
)  # fmt: skip
def test_the_login_leads_to_no_other_site(site, address):
    assert safe_next(address) == "/"
    with site.client() as client:
        answer = client.post("/login", data={"name": "ada", "password": PASSWORD, "next": address})
        assert answer.headers["location"] == "/"


def test_wrong_names_and_wrong_passwords_look_the_same(tmp_path):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    with running(home) as site, site.client() as client:
        found = [client.post("/login", data={"name": n, "password": "a wrong one"}) for n in ("ada", "eve")]
        assert [a.status_code for a in found] == [401, 401]
        assert found[0].text == found[1].text and "set-cookie" not in found[0].headers


def test_a_thousand_logins_are_mostly_refused_unseen(tmp_path, monkeypatch):
    home, checked = Home.at(tmp_path), []
    accounts.add(home, "ada", PASSWORD)
    real = accounts.verify
    monkeypatch.setattr(accounts, "verify", lambda *a: checked.append(a[1]) or real(*a))
    with running(home) as site, site.client() as client:
        statuses = [client.post("/login", data={"name": "ada", "password": "wrong"}).status_code for _ in range(1000)]
        refused = client.post("/login", data={"name": "ada", "password": PASSWORD})
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 900
        assert set(statuses) == {401, 429} and statuses[:5] == [401] * 5
        assert len(checked) <= 20
        # Other names from the same address do not get further, and a forged address is not believed.
        for number in range(60):
            forged = {"x-forwarded-for": f"203.0.113.{number}"}
            client.post("/login", data={"name": f"user{number}", "password": "wrong"}, headers=forged)
        assert len(checked) <= 60
        assert client.post("/login", data={"name": "eve", "password": "wrong"}).status_code == 429


def test_many_tries_at_once_gain_nothing(tmp_path, monkeypatch):
    home, checked = Home.at(tmp_path), []
    accounts.add(home, "ada", PASSWORD)
    monkeypatch.setattr(accounts, "verify", lambda *a: checked.append(a) or time.sleep(0.05))
    login = Login(home, 1.0)
    threads = [threading.Thread(target=login.check, args=("ada", "wrong", "203.0.113.1")) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 1 <= len(checked) <= 6


def test_the_lock_out_grows_and_ends():
    now = [0.0]
    lockout = Lockout(free=3, longest_s=60.0, clock=lambda: now[0])
    assert [lockout.take("ada") for _ in range(4)] == [True, True, True, False]
    waits = []
    for _ in range(8):
        waits.append(lockout.wait_s("ada"))
        assert not lockout.take("ada")
        now[0] += waits[-1]
        assert lockout.take("ada")
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert lockout.take("bob")
    lockout.give_back("ada", all_of_them=True)
    assert lockout.wait_s("ada") == 0


def test_a_right_password_takes_its_own_try_back_only(tmp_path):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    login = Login(home, 1.0)
    for _ in range(4):
        assert login.check("ada", "wrong", "203.0.113.1") == (None, 0.0)
    assert login.check("ada", PASSWORD, "203.0.113.1")[0].name == "ada"
    assert login.by_account.wait_s("ada") == 0 and login.by_address._failures["203.0.113.1"][0] == 4
    assert login.check("eve", "wrong", "2001:db8::1") == (None, 0.0)
    assert "2001:db8::/64" in login.by_address._failures


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "multipart/form-data; boundary=x", ""])
def test_a_login_is_a_form(site, kind):
    with site.client() as client:
        body = f"name=ada&password={PASSWORD}"
        assert client.post("/login", content=body, headers={"content-type": kind}).status_code == 415
        large = {"name": "ada", "password": "x" * 10_000}
        assert client.post("/login", data=large).status_code == 413
