"""Logging in and out in a real browser, and the pages under their content policy."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from backend import accounts
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS, dashboard, watched_page
from tests.security.site import PASSWORD
from tests.ui.test_browser import JOB_FILE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

pytestmark = IN_BROWSER


@pytest.fixture
def address(tmp_path):
    """A dashboard with one account and one finished job."""
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    text, store = demo_text("done"), JobStore(home)
    job = store.create(text, parse_yaml(text).config, device="cpu")
    row = {"metric": "perplexity", "name": "Perplexity", "unit": "", "protocol": "p", "baseline": 1.0, "quantized": 2.0,
           "impact": 1.0, "interval": [0.5, 1.5], "interval_method": "m", "higher_is_better": False}  # fmt: skip
    entry = {"name": "w4", "label": "w4", "artefact": None, "rows": [row], "manifest": {"files": {}}, "notes": []}
    assert store.grant(job.uid, 1, ["cpu:0"]) and store.move(job.uid, "running", actor="test", attempt=1)
    store.update(job.uid, 1, result={"results": [entry]})
    store.move(job.uid, "succeeded", actor="test", attempt=1)
    with dashboard(home) as url:
        yield url


@pytest.fixture
def other_site():
    """The address of another web server, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_login_pages_and_logout(address, other_site):
    elsewhere, asked = other_site
    with watched_page(address) as (page, faults):
        # A page leads to the login; a wrong password is told.
        page.goto(f"{address}/new")
        assert page.url == f"{address}/login?next=%2Fnew"
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill("not the password")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_contain_text("Name or password is wrong")

        # A right one leads on.
        faults.clear()  # the browser tells of the refusal, too
        page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(f"{address}/new")
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{address}/new")

        # Everything of the pages works under the content policy: events, an upload, charts of scripts of our own.
        expect(page.locator("#review")).to_contain_text("What this job will do", timeout=STEP_MS)
        page.get_by_text("Open a YAML file").click()
        file = {"name": "mine.yaml", "mimeType": "application/yaml", "buffer": JOB_FILE.encode()}
        page.locator("#yaml-file input[type=file]").set_input_files(file)
        expect(page.get_by_text("mine.yaml is in the form")).to_be_visible(timeout=STEP_MS)
        page.get_by_role("button", name="Switch between light and dark").click()
        expect(page.locator("body.dark")).to_be_visible()
        for path in ("/chat", "/job?id=x", "/"):
            page.goto(address + path)
            expect(page.get_by_role("button", name="Log out")).to_be_visible(timeout=STEP_MS)
        expect(page.locator("#jobs")).to_contain_text("Succeeded", timeout=STEP_MS)
        page.goto(f"{address}/compare")
        bars = page.locator("#chart-perplexity .js-plotly-plot .bars .point > path")
        expect(bars).to_have_count(2, timeout=STEP_MS)
        cookies = page.context.cookies()
        assert [(c["httpOnly"], c["sameSite"]) for c in cookies if c["name"].startswith("quantdeck")] == [(True, "Lax")]
        assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []

        # HTML that got into a page all the same cannot run anything, and talks to nobody.
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/x onerror=\"window.ran = 1\">')")
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b id=bait onclick=\"window.ran = 1\">bait</b>')")
        page.locator("#bait").dispatch_event("click")
        page.evaluate("a => document.body.insertAdjacentHTML('beforeend', `<img src=${a}/image>`)", elsewhere)
        sent = page.evaluate("a => fetch(`${a}/fetch`, {mode: 'no-cors'}).then(() => 1, () => 0)", elsewhere)
        page.wait_for_timeout(500)
        assert page.evaluate("window.ran") is None and sent == 0 and asked == []

        # A session that ends elsewhere is told, and what stands in the page stays.
        page.goto(f"{address}/new")
        expect(page.locator("#review")).to_contain_text("What this job will do", timeout=STEP_MS)
        cookies = page.context.cookies()
        page.context.clear_cookies()
        page.locator("#f-JOB_ID input").fill("kept")
        page.locator("#f-JOB_ID input").blur()
        expect(page.locator("#session-ended")).to_contain_text("Your session has ended", timeout=STEP_MS)
        expect(page.locator("#f-JOB_ID input")).to_have_value("kept")
        page.context.add_cookies(cookies)
        page.locator("#f-JOB_ID input").fill("kept-2")
        page.locator("#f-JOB_ID input").blur()
        expect(page.locator("#session-ended")).to_have_count(0, timeout=STEP_MS)
        expect(page.locator("#yaml")).to_contain_text("kept-2", timeout=STEP_MS)

        # After logging out there is nothing to see.
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url(f"{address}/login")
        page.goto(f"{address}/")
        assert page.url == f"{address}/login?next=%2F"
