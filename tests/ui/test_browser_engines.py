"""In a real browser: an environment is installed from its page, watched by two tabs, one of them narrow."""

from __future__ import annotations

import os

import pytest

from backend.engines import environments
from backend.paths import Home
from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS, dashboard, watched_page
from tests.engines.toy_environment import make_toy, only_the_toys_packages
from tests.ui.test_engines_page import CODE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

pytestmark = IN_BROWSER
# The real dashboard, which knows the toy instead of the project's own environments.
DASHBOARD = f"""
import sys
from pathlib import Path
folder = Path(sys.argv.pop(1))
from backend.engines import environments, installing
environments.DEFINITIONS = folder
installing.command = lambda name: [sys.executable, "-c", {CODE!r}, str(folder), name]
import app
sys.exit(app.main())
"""


@pytest.fixture
def definitions(tmp_path, monkeypatch):
    only_the_toys_packages(tmp_path, monkeypatch)
    monkeypatch.setenv("QUANTDECK_ENVIRONMENTS", str(tmp_path / "installed"))
    make_toy(tmp_path)
    folder = tmp_path / "definitions"
    (folder / "autoawq").symlink_to(environments.DEFINITIONS / "autoawq")  # an engine of the registry needs it
    return folder


def overflow(page) -> int:
    """Pixels by which the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_an_environment_is_installed_from_the_page(tmp_path, definitions):
    hold = tmp_path / "hold"
    hold.touch()
    environment = {**os.environ, "TOY_HOLD": str(hold)}
    with (
        dashboard(Home(tmp_path / "home"), environment=environment, program=["-c", DASHBOARD, str(definitions)]) as url,
        watched_page(url) as (page, faults),
    ):
        page.goto(f"{url}/engines")
        card = page.locator("#environment-toy")
        expect(card).to_contain_text("Not installed", timeout=STEP_MS)
        expect(page.locator("#engines")).to_contain_text("AutoAWQ")
        expect(page.locator("#machine")).to_contain_text("NVIDIA driver", timeout=STEP_MS)
        card.get_by_role("button", name="Install").click()
        expect(card).to_contain_text("Installing", timeout=STEP_MS)
        expect(page.locator("#log-toy")).to_contain_text("Building toy-engine", timeout=STEP_MS)

        # A second tab, on a phone, shows the same and offers no second installation; a reload ends nothing.
        phone = page.context.browser.new_page(viewport={"width": 390, "height": 844})
        phone.goto(f"{url}/engines")
        expect(phone.locator("#environment-toy")).to_contain_text("Installing", timeout=STEP_MS)
        expect(phone.locator("#environment-toy").get_by_role("button")).to_have_count(0)
        expect(phone.locator("#log-toy")).to_contain_text("Building toy-engine", timeout=STEP_MS)
        assert overflow(phone) == 0
        page.reload()
        expect(card).to_contain_text("Installing", timeout=STEP_MS)

        hold.unlink()
        for tab in (page, phone):
            expect(tab.locator("#environment-toy")).to_contain_text("Installed", timeout=STEP_MS)
            expect(tab.locator("#environment-toy")).to_contain_text("toy-torch==2.0")
            expect(tab.locator("#log-toy pre")).to_have_count(0)
        assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []
