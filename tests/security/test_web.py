"""The web server under attack: a real one on a loopback port, with and without accounts."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest

from backend import accounts
from backend.errors import ConfigError
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from backend.settings import WebSettings
from tests.conftest import demo_text
from tests.security.site import PASSWORD, Site, call, outcome, running
from ui.guard import ANSWER_HEADERS, is_local, own_hosts, own_origins
from ui.login import safe_next
from ui.server import create_app, require_safe_address
from ui.sessions import Lockout, Login, Sessions

ROOT = Path(__file__).parents[2]
PUBLIC = "https://quant.example.org"
EVIL = "https://evil.example"
CANARY = "canary-7f3a9c"
SECRETS = re.compile(rf"{CANARY}|root:x:0|Traceback|File \"/|site-packages|SQLite format")


@pytest.fixture(scope="module")
def open_site(tmp_path_factory):
    """A dashboard without accounts."""
    with running(Home.at(tmp_path_factory.mktemp("open"))) as site:
        yield site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A dashboard with two accounts, behind a public https origin."""
    home = Home.at(tmp_path_factory.mktemp("closed"))
    accounts.add(home, "ada", PASSWORD)
    accounts.add(home, "bob", PASSWORD)
    with running(home, origins=[PUBLIC], max_upload_bytes=100_000) as site:
        yield site


@pytest.fixture(scope="module")
def ada(site):
    with site.login() as client:
        yield client


def add_job(home: Home, name: str, **changes):
    text = demo_text(name, **changes)
    return JobStore(home).create(text, parse_yaml(text).config, device="cpu")


def finish(home: Home, job, result: dict) -> None:
    store = JobStore(home)
    assert store.grant(job.uid, 1, ["cpu:0"])
    assert store.move(job.uid, "running", actor="test", attempt=1)
    assert store.update(job.uid, 1, result=result)
    assert store.move(job.uid, "succeeded", actor="test", attempt=1)


# --- closed by default ------------------------------------------------------------------------------------------

PAGES = ["/", "/new", "/job?id=x", "/compare", "/chat"]


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
                assert status != 303 or path in ("/", "/new", "/job", "/compare", "/chat"), path


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


def test_no_handler_is_in_the_public_api(ada, site):
    assert ada.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert {fn.api_visibility for fn in site.blocks.fns.values()} == {"private"}


# --- accounts and addresses -------------------------------------------------------------------------------------


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


# --- sessions ---------------------------------------------------------------------------------------------------


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


# --- other web sites --------------------------------------------------------------------------------------------


def forms(site: Site):
    """Requests that a page of another site can make a browser send."""
    body = {"data": [""], "fn_index": 0, "session_hash": "forged"}
    yield "POST", "/gradio_api/queue/join", {"json": body}
    yield "POST", "/gradio_api/run/predict", {"json": body}
    yield (
        "POST",
        "/gradio_api/queue/join",
        {"content": '{"data":[""],"fn_index":0}', "headers": {"content-type": "text/plain"}},
    )
    yield "POST", "/gradio_api/cancel", {"data": {"session_hash": "s", "fn_index": "0", "event_id": "e"}}
    yield "POST", "/gradio_api/upload", {"files": {"files": ("a.yaml", b"x")}}
    yield "POST", "/login", {"data": {"name": "bob", "password": PASSWORD}}
    yield "POST", "/logout", {}


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "http://127.0.0.1:1", "http://quant.example.org", f"{PUBLIC}:444", ""]
)
def test_another_site_cannot_act_with_a_visitors_cookie(site, ada, origin):
    for method, path, rest in forms(site):
        headers = {**rest.pop("headers", {}), "origin": origin}
        answer = ada.request(method, path, headers=headers, **rest)
        assert answer.status_code == 403, (path, origin)
        assert "access-control-allow-origin" not in answer.headers and "set-cookie" not in answer.headers
    assert ada.get("/login/account").json() == {"account": "ada"}


@pytest.mark.parametrize("fetch_site", ["cross-site", "same-site"])
def test_without_an_origin_the_fetch_metadata_decide(site, ada, fetch_site):
    for method, path, rest in forms(site):
        headers = {**rest.pop("headers", {}), "sec-fetch-site": fetch_site}
        assert ada.request(method, path, headers=headers, **rest).status_code == 403, path


def test_our_own_pages_can_act(site, ada):
    for origin in (site.origin, PUBLIC, f"http://localhost:{site.port}"):
        answer = ada.post("/gradio_api/reset", json={"event_id": "x"}, headers={"origin": origin})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("host", [None, "quant.example.org"])
def test_no_reader_of_another_site_is_permitted(site, ada, host):
    headers = {"origin": EVIL, **({"host": host} if host else {})}
    assert "access-control-allow-origin" not in ada.get("/config", headers=headers).headers
    asked = {**headers, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    answer = ada.options("/gradio_api/queue/join", headers=asked)
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "169.254.169.254", "127.0.0.1.evil.example", "",
                                  "localhost@evil.example", "quant.example.org.evil.example"])  # fmt: skip
def test_another_host_name_is_refused(site, open_site, host):
    for one in (site, open_site):
        with one.client() as client:
            assert client.get("/login", headers={"host": host}).status_code == 400
            assert client.post("/gradio_api/queue/join", json={}, headers={"host": host}).status_code == 400
            if host:
                assert client.get("/login", headers={"x-forwarded-host": host}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_our_own_names_are_not(open_site, host):
    with open_site.client() as client:
        assert client.get("/", headers={"host": f"{host}:{open_site.port}"}).status_code == 200


def test_every_answer_forbids_frames_sniffing_and_foreign_scripts(site, ada):
    with site.client() as stranger:
        answers = [ada.get("/"), ada.get("/config"), ada.get("/nothing"), ada.get("/download/x.yaml"),
                   stranger.get("/config"), stranger.get("/login"), stranger.get("/"),
                   stranger.get("/login", headers={"host": "evil.example"}),
                   ada.post("/logout", headers={"origin": EVIL})]  # fmt: skip
    for answer in answers:
        assert {name.lower() for name in ANSWER_HEADERS} <= set(answer.headers), answer.url
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "http:" not in policy and "*" not in policy
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
    assert "script-src-attr 'none'" in answers[0].headers["content-security-policy"]


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(open_site, tmp_path_factory):
    """Files that must stay where they are: in the home, beside it, and of the operator."""
    home = open_site.home
    JobStore(home)
    outside = tmp_path_factory.mktemp("outside")
    paths = [home.root / ".env", home.user_data / "logs" / "other" / "log.log", home.private / "accounts.json.bak",
             outside / "token", outside / "page.html"]  # fmt: skip
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY)
    link = home.user_data / "link.txt"
    link.symlink_to(outside / "token")
    wal = [home.jobs_db.with_name("jobs.db-wal"), home.jobs_db.with_name("jobs.db-journal")]
    return [*paths, link, home.jobs_db, *wal, Path("/etc/passwd"), Path("/proc/self/environ"), ROOT / "app.py",
            Path.home() / ".cache" / "huggingface" / "token"]  # fmt: skip


def test_no_file_of_the_machine_is_served(open_site, planted):
    up = "../" * 12
    for path in planted:
        for target in (
            f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file/{path}", f"/file/{path}",
            f"/gradio_api/file=/tmp/gradio/{up}{path}", f"/gradio_api/file=%2e%2e/{up}{path}",
            f"/gradio_api/file=file://{path}", f"/gradio_api/proxy=file://{path}", f"/gradio_api/proxy={path}",
            f"/assets/{up}{path}", f"/assets/{up.replace('..', '%2e%2e')}{path}", f"/assets//{path}",
            f"/static/{up.replace('/', '%2f')}{path}", f"/static//{path}", f"/svelte/{up}{path}",
            f"/static/..\\..{path}",
            f"/download/{up}{path}", f"/download/x/y/{str(path).replace('/', '%2f')}", f"/login/../{path}", f"/{path}",
            f"/gradio_api/custom_component/{path}/client/component/x",
        ):  # fmt: skip
            status, body = open_site.get_raw(target)
            assert status in (303, 400, 403, 404, 405), f"{target}: {status}"
            assert not SECRETS.search(body.decode("latin-1")), target
    served = re.search(r"assets/[^\"]+\.css", open_site.get_raw("/")[1].decode("latin-1"))[0]
    assert open_site.get_raw(f"/{served}")[0] == 200  # the paths above are refused, not the whole folder


@pytest.mark.parametrize(
    "uid", ["../../etc", "%2e%2e%2f%2e%2e%2fetc", "%00", "a" * 300, "..%e2%88%95etc", "CON", "%0d%0aX-Y:%20z",
            "' OR 1=1--", "*", "%", "0" * 22, "0" * 23],
)  # fmt: skip
def test_odd_job_ids_find_nothing_and_make_nothing(open_site, uid):
    before = sorted(open_site.home.root.rglob("*"))
    for target in (f"/download/{uid}.yaml", f"/download/{uid}.log", f"/download/{uid}.csv", f"/download/{uid}/a/b"):
        status, body = open_site.get_raw(target.replace(" ", "%20"))
        assert status in (400, 404), target
        assert b"X-Y" not in body.split(b"\r\n\r\n")[0]
    assert sorted(open_site.home.root.rglob("*")) == before


def test_model_files_are_those_of_the_manifest_and_no_links(open_site, tmp_path):
    home = open_site.home
    job = add_job(home, "with-files")
    folder = home.root / job.folder
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text(CANARY)
    (folder / "model.safetensors").write_bytes(b"0123456789")
    (folder / "page.html").write_text("<script>alert(1)</script>")
    (folder / "private.txt").write_text(CANARY)
    (folder / "link.json").symlink_to(tmp_path / "secret")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    os.link(folder / "page.html", folder / 'odd" name.html')
    listed = [
        "model.safetensors",
        "page.html",
        "link.json",
        "gone.json",
        "sub",
        "pipe",
        "..",
        "../" + job.job_id,
        'odd" name.html',
    ]
    entry = {"name": "w4", "artefact": str(folder), "rows": [], "manifest": {"files": {name: {} for name in listed}}}
    away = {**entry, "name": "away", "artefact": str(tmp_path), "manifest": {"files": {"secret": {}}}}
    (home.user_data / "linked").symlink_to(tmp_path)
    linked = {**away, "name": "linked", "artefact": str(home.user_data / "linked")}
    finish(home, job, {"results": [entry, away, linked]})
    base = f"/download/{job.uid}/w4"
    with open_site.client() as client:
        answer = client.get(f"{base}/model.safetensors")
        assert answer.content == b"0123456789" and answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
        part = client.get(f"{base}/model.safetensors", headers={"range": "bytes=2-4"})
        assert part.status_code == 206 and part.content == b"234"
        page = client.get(f"{base}/page.html")
        assert (
            page.headers["content-disposition"].startswith("attachment")
            and "sandbox" in page.headers["content-security-policy"]
        )
        assert page.headers["content-type"] == "application/octet-stream"
        odd = client.get(f"{base}/odd%22%20name.html")
        assert odd.headers["content-disposition"] == 'attachment; filename="odd__name.html"'
        open_before = len(os.listdir("/proc/self/fd"))
        for name in (
            "private.txt",
            "link.json",
            "gone.json",
            "sub",
            "pipe",
            "..%2Fx",
            "%2e%2e",
            "secret",
            "model.safetensors%00",
        ):
            answer = client.get(f"{base}/{name}")
            assert answer.status_code in (404, 400) and CANARY not in answer.text, name
        for other in ("away", "linked"):
            assert client.get(f"/download/{job.uid}/{other}/secret").status_code == 404
        assert client.get(f"/download/{job.uid}/w3/model.safetensors").status_code == 404
        assert len(os.listdir("/proc/self/fd")) <= open_before + 3  # nothing refused stays open


def test_the_log_is_downloaded_whole_and_not_through_a_link(open_site, tmp_path):
    home = open_site.home
    job = add_job(home, "with-log")
    log = home.user_data / "logs" / "with-log" / "log.log"
    log.parent.mkdir(parents=True)
    with open_site.client() as client:
        assert client.get(f"/download/{job.uid}.log").status_code == 404
        log.write_text("one\n<script>two</script>\n")
        answer = client.get(f"/download/{job.uid}.log")
        assert answer.text == "one\n<script>two</script>\n" and answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["content-disposition"] == 'attachment; filename="with-log.log"'
        (tmp_path / "secret").write_text(CANARY)
        log.unlink()
        log.symlink_to(tmp_path / "secret")
        answer = client.get(f"/download/{job.uid}.log")
        assert answer.status_code == 404 and CANARY not in answer.text


def test_cells_that_a_spreadsheet_would_run_are_inert(open_site):
    job = add_job(open_site.home, "with-formula")
    row = {"metric": "perplexity", "name": "=cmd|' /C calc'!A0", "unit": "@SUM(A1)", "protocol": "+1+1",
           "baseline": 1.0, "quantized": 2.0, "impact": -1.0, "interval": None, "higher_is_better": False}  # fmt: skip
    entry = {"name": "-2+3", "label": "x", "artefact": None, "rows": [row], "manifest": {"files": {}}}
    finish(open_site.home, job, {"results": [entry]})
    with open_site.client() as client:
        answer = client.get(f"/download/{job.uid}.csv")
        assert answer.status_code == 200 and answer.headers["content-disposition"].startswith("attachment")
        names, cells = list(csv.reader(answer.text.splitlines()))
        found = dict(zip(names, cells, strict=True))
        assert found["name"].startswith("'=") and found["unit"].startswith("'@")
        assert found["protocol"].startswith("'+") and found["configuration"].startswith("'-")
        assert float(found["impact"]) == -1.0  # numbers stay numbers
        assert client.get(f"/download/{job.uid}.json").json()[0]["impact"] == -1.0
        assert client.get(f"/download/{job.uid}.exe").status_code == 404


# --- sizes ------------------------------------------------------------------------------------------------------


def test_large_requests_are_refused(site, ada):
    assert ada.post("/gradio_api/upload", files={"files": ("a.yaml", b"x" * 50_000)}).status_code == 200
    assert ada.post("/gradio_api/upload", files={"files": ("a.yaml", b"x" * 120_000)}).status_code == 413
    assert ada.post("/gradio_api/upload", files={"files": ("a.yaml", b"x" * 500_000)}).status_code == 413
    body = {"data": ["x" * 500_000], "fn_index": 0, "session_hash": "large"}
    assert ada.post("/gradio_api/queue/join", json=body).status_code == 413

    def pieces():
        for _ in range(500):
            yield b'"' + b"x" * 1000

    headers = {"content-type": "application/json"}
    assert ada.post("/gradio_api/queue/join", content=pieces(), headers=headers).status_code == 413


def test_an_uploaded_name_cannot_leave_its_folder(site, ada, tmp_path):
    for name in (
        "../../../../../../tmp/qd-escaped.yaml",
        "/etc/qd-escaped.yaml",
        "..\\..\\qd-escaped.yaml",
        "a\x00b.yaml",
    ):
        answer = ada.post("/gradio_api/upload", files={"files": (name, b"x")})
        assert answer.status_code in (200, 400)
        for path in answer.json() if answer.status_code == 200 else []:
            assert Path(path).resolve().is_relative_to(Path(os.environ.get("GRADIO_TEMP_DIR", "/tmp/gradio")).resolve())
    assert not Path("/tmp/qd-escaped.yaml").exists() and not Path("/etc/qd-escaped.yaml").exists()


# --- handlers ---------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>"
JUNK = [
    None, "", HOSTILE, "../../etc/passwd", -1, 10**30, 1e308, True, [], ["x", None, {}], {}, {"__type__": "update"},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [{"path": "/etc/passwd"}], "\x00", "\ud800",
    "x" * 20_000,
]  # fmt: skip
EVENTS = [None, {}, {"act": "__class__", "uid": {"$": 1}}, {"act": "cancel", "uid": "../../x"},
          {"act": "resume", "uid": HOSTILE}, {"act": ["cancel"], "uid": None}, "x"]  # fmt: skip


def state_of(home: Home) -> tuple:
    """Everything that a handler could have changed."""
    jobs = [(job.uid, job.state, job.attempt) for job in JobStore(home).jobs()]
    files = {
        str(path): path.stat().st_size for path in home.root.rglob("*") if path.is_file() and "lock" not in path.name
    }
    files.pop(str(home.jobs_db), None)
    return jobs, files


def test_no_handler_can_be_called_without_a_login(site):
    before = state_of(site.home)
    with site.client() as stranger:
        for index, fn in site.blocks.fns.items():
            for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
                body = {"data": [None] * len(fn.inputs), "fn_index": index, "session_hash": "stranger"}
                assert stranger.post(path, json=body).status_code == 401, (index, fn.name)
    assert state_of(site.home) == before


def test_every_handler_takes_junk_without_effect_or_secrets(open_site):
    home = open_site.home
    for word in ("done", "waiting"):
        add_job(home, f"junk-{word}")
    before = state_of(home)
    with open_site.client() as client:
        for index, fn in open_site.blocks.fns.items():
            tries = [([value] * len(fn.inputs), None) for value in JUNK if fn.inputs] + [
                ([], None),
                ([None] * 200, None),
            ]
            if any(event == "click" for _, event in fn.targets):
                tries += [([None] * len(fn.inputs), event) for event in EVENTS]
            for data, event in tries:
                session = f"junk{index}"
                answer = call(client, index, data, session, event)
                assert not SECRETS.search(answer.text), (index, fn.name, data, answer.text)
                if answer.status_code != 200:
                    assert answer.status_code in (400, 422), (index, fn.name, data, answer.text)
                    continue
                for message in outcome(client, session):
                    assert not SECRETS.search(str(message)), (index, fn.name, data, message)
                    told = (message.get("output") or {}).get("data")  # what goes into the page
                    assert "<img src=x" not in str(told), (index, fn.name, data, told)
    assert state_of(home) == before


def test_any_account_may_cancel_a_job_and_its_name_is_kept(site):
    """Single-tenant: accounts are not kept apart, but who did what is told."""
    cancels = [(i, fn) for i, fn in site.blocks.fns.items() if fn.name == "on_action"]
    assert len(cancels) >= 2
    with site.login("bob") as bob:
        jobs = [add_job(site.home, f"to-cancel-{index}") for index, _ in cancels]
        index, fn = cancels[0]
        event = {"act": "cancel", "uid": jobs[0].uid}
        assert call(bob, index, [None] * len(fn.inputs), "cancel", event).status_code == 200
        assert outcome(bob, "cancel")[-1]["success"] is True
    store = JobStore(site.home)
    assert store.get(jobs[0].uid).state == "cancelled"
    assert store.history(jobs[0].uid)[-1]["actor"] == "user bob"
    assert [store.get(job.uid).state for job in jobs[1:]] == ["queued"] * (len(jobs) - 1)


def test_the_forms_handler_checks_choices_again(open_site):
    """Values that no control of the page offers reach the schema, and start nothing."""
    from ui.draft import FIELDS, TEMPLATE, open_draft

    index, fn = next((i, fn) for i, fn in open_site.blocks.fns.items() if fn.name == "on_start")
    values = {field.key: value for field, value in zip(FIELDS, open_draft(TEMPLATE).shown, strict=True)}
    before = state_of(open_site.home)
    with open_site.client() as client:
        for number, (key, value) in enumerate(
            [("JOB_ID", "../../x"), ("MODEL", "/etc"), ("CUSTOM_MODEL_PATH", "/etc"), ("USER_FOLDER", "/etc"),
             ("ALGORITHM", "os.system"), ("LOGGING_PATH", "../../../tmp"), ("CACHE_PATH", "/etc"), ("CUDA_ID", "0;id")]
        ):  # fmt: skip
            data = [None, *({**values, key: value}[field.key] for field in FIELDS)]
            answer = call(client, index, data, f"form{number}")
            assert answer.status_code in (200, 422)
            text = str(outcome(client, f"form{number}"))
            assert "not started" in text or "'success': False" in text, (key, text)
            assert not SECRETS.search(text)
    assert state_of(open_site.home) == before


def test_what_a_browser_calls_besides_events_are_our_log_readers_only(open_site):
    """Components bring server functions of their own: none may be reachable but those that read a log."""
    found = {
        (block._id, name)
        for block in open_site.blocks.blocks.values()
        for name in dir(block)
        if not name.startswith("__") and getattr(getattr(block, name, None), "_is_server_fn", False)
    }
    assert {name for _, name in found} <= {"read_log", "find_in_log"}
    with open_site.client(connection="close") as client:  # a handler that fails ends its connection
        for component, name in [*found, (1, "__init__"), (10**9, "read_log"), ("x", "value"), (1, "postprocess")]:
            for data in JUNK:
                body = {"data": data, "component_id": component, "fn_name": name, "session_hash": "s"}
                headers = {"content-type": "application/json"}
                answer = client.post("/gradio_api/component_server", content=json.dumps(body), headers=headers)
                assert not SECRETS.search(answer.text), (component, name, data)
                assert answer.status_code != 200 or (component, name) in found


def test_an_error_inside_a_handler_is_not_told(open_site, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(f"a secret: {CANARY}")

    index, fn = next((i, fn) for i, fn in open_site.blocks.fns.items() if not fn.inputs and fn.name == "on_load")
    monkeypatch.setattr(JobStore, "__init__", fail)
    with open_site.client() as client:
        assert call(client, index, [], "failing").status_code == 200
        message = outcome(client, "failing")[-1]
        assert message["success"] is False and CANARY not in str(message)
        direct = client.post("/gradio_api/run/predict", json={"data": [], "fn_index": index, "session_hash": "failing"})
        assert direct.status_code == 500 and CANARY not in direct.text
        assert client.get("/download/" + "0" * 22 + ".yaml").text == "Internal Server Error"


def test_hostile_texts_of_a_job_are_inert_in_every_page(open_site):
    home = open_site.home
    job = add_job(home, "hostile")
    store = JobStore(home)
    assert store.grant(job.uid, 1, ["cpu:0"]) and store.move(job.uid, "running", actor="test", attempt=1)
    store.update(
        job.uid, 1, progress={"stage": "quantize", "message": HOSTILE, "configuration": HOSTILE, "step": 1, "total": 2}
    )
    (home.user_data / "logs" / "hostile").mkdir(parents=True)
    (home.user_data / "logs" / "hostile" / "log.log").write_text(f"{HOSTILE}\x1b[31m\u202e\n")
    row = {"metric": "perplexity", "name": HOSTILE, "unit": HOSTILE, "protocol": HOSTILE, "baseline": 1.0,
           "quantized": 2.0, "impact": 1.0, "interval": [0.5, 1.5], "interval_method": HOSTILE,
           "higher_is_better": False}  # fmt: skip
    entry = {"name": HOSTILE, "label": HOSTILE, "artefact": None, "rows": [row], "manifest": {"files": {HOSTILE: {}}},
             "notes": [HOSTILE], "skipped": {HOSTILE: HOSTILE}, "reason": HOSTILE, "layers": []}  # fmt: skip
    second = {**entry, "name": f"{HOSTILE}2"}

    def shown() -> str:
        """The HTML that every page gets when it is opened, as one text."""
        found = []
        with open_site.client() as client:
            for path in (
                "/",
                f"/job?id={job.uid}",
                f"/compare?jobs={job.uid}",
                f"/chat?job={job.uid}",
                f"/new?clone={job.uid}",
            ):
                found.append(client.get(path).text)
                for index, fn in open_site.blocks.fns.items():
                    if fn.inputs or not any(event == "load" for _, event in fn.targets):
                        continue
                    body = {"data": [], "fn_index": index, "session_hash": f"hostile{index}"}
                    address = "/gradio_api/queue/join?" + path.partition("?")[2]
                    assert client.post(address, json=body).status_code == 200
                    for message in outcome(client, body["session_hash"]):
                        values = (message.get("output") or {}).get("data") or []
                        found += [
                            str(v) for v, block in zip(values, fn.outputs, strict=False) if isinstance(block, gr.HTML)
                        ]
        return "\n".join(found)

    running_job = shown()
    store.update(job.uid, 1, result={"results": [entry, second], "rows": [row], "device": HOSTILE, "timings": {}})
    store.move(job.uid, "failed", actor="test", attempt=1, reason=f"{HOSTILE} reason")
    failed_job = shown()
    for text in (running_job, failed_job):
        assert "&lt;img src=x" in text and "<img src=x" not in text


# --- health -----------------------------------------------------------------------------------------------------


def test_health_is_for_this_machine_and_for_accounts(site, ada, open_site):
    with site.client() as near, site.client(**{"x-forwarded-for": "203.0.113.9"}) as far:
        facts = near.get("/health").json()
        assert facts["status"] == "ok" and facts["dashboard"] == os.getpid() and facts["journal"] in ("wal", "delete")
        assert {"quantdeck", "gradio", "sqlite", "scheduler"} <= set(facts)
        assert far.get("/health").status_code == 401
        assert near.get("/health", headers={"host": "quant.example.org"}).status_code == 401
        assert str(site.home.root) not in near.get("/health").text
    assert ada.get("/health", headers={"host": "quant.example.org"}).status_code == 401  # the cookie is another host's
    assert ada.get("/health").status_code == 200


def test_only_a_direct_request_is_local():
    def asks(client, **headers):
        return is_local(SimpleNamespace(client=SimpleNamespace(host=client), headers=headers))

    assert asks("127.0.0.1", host="127.0.0.1:7860") and asks("::1", host="[::1]:7860")
    assert not asks("203.0.113.9", host="127.0.0.1")
    assert not asks("127.0.0.1", host="quant.example.org")
    assert not asks("127.0.0.1", host="127.0.0.1", via="1.1 proxy")


def test_an_open_dashboard_is_noted_and_watches_the_jobs(tmp_path, monkeypatch):
    from ui import health

    seen = threading.Event()
    looks = []

    def watch(home):
        looks.append(home)
        if len(looks) == 1:
            raise OSError("the disk is full")
        seen.set()  # it went on after the error

    monkeypatch.setattr(health, "WATCH_S", 0.05)
    home = Home.at(tmp_path)
    with running(home, watch=watch):
        assert seen.wait(30)
        assert [(one.kind, one.pid) for one in JobStore(home).instances()] == [("dashboard", os.getpid())]
    assert JobStore(home).instances() == []


def test_a_newer_store_is_told_at_the_start(tmp_path):
    home = Home.at(tmp_path)
    home.jobs_db.write_bytes(b"not a database at all" * 100)
    with pytest.raises(Exception) as caught:
        create_app(home)
    assert "jobs.db" in str(caught.value)


def test_a_port_is_free_again_after_an_end(tmp_path):
    with running(Home.at(tmp_path)) as site:
        port = site.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
