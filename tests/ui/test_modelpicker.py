"""The model picker of New job, through the real handlers and the real Hub client, from a server on loopback."""

import re
import shutil
import subprocess
import sys

import pytest

from backend.demo import MODEL_DIR
from backend.paths import Home
from backend.sources import hub, hub_token
from tests.dashboard import IN_BROWSER, dashboard, watched_page
from tests.security.site import call, outcome, running
from tests.sources.hub_server import COMMIT, hub_server
from tests.sources.test_hub import ABOUT, changed, keep
from ui.draft import TEMPLATE, open_draft
from ui.format import size
from ui.review import review, review_html

HOSTILE = "<img src=x onerror=alert(1)>"
OFFLINE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", OFFLINE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(hub, "FAILURE_KEPT_S", 0.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running(Home.at(tmp_path_factory.mktemp("picker"))) as site:
        yield site


def ask(site, name, *values, event=None):
    """What a handler of the page answers."""
    index = next(i for i, fn in site.blocks.fns.items() if fn.name == name)
    with site.client() as client:
        assert call(client, index, list(values), name, event).status_code == 200
        last = outcome(client, name)[-1]
    assert last["success"], last
    return last["output"]["data"]


def test_a_search_lists_models_with_what_the_hub_tells(site, tmp_path, monkeypatch):
    about = {**ABOUT, "team/small-hostile": {"tags": [f"license:{HOSTILE}"], "config": {"architectures": [HOSTILE]}}}
    with hub_server(dict.fromkeys(about, tmp_path), about=about, gated=("team/small-closed",)) as (endpoint, asked):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        (typed,) = ask(site, "on_typed", "sm", "")
        assert "qd-hub-list" not in str(typed) and asked == []  # too short to ask for while somebody types
        (table,) = ask(site, "on_typed", "small", "")
    for part in ("1.20 thousand", "apache-2.0", "2026-03-01", "LlamaForCausalLM", "quantized already", "gated",
                 "mixture of experts", 'data-uid="team/small"'):  # fmt: skip
        assert part in table
    assert "<img" not in table and "&lt;img" in table


def test_use_takes_a_model_and_nothing_else(site):
    assert ask(site, "on_pick", event={"act": "use", "uid": "team/small"}) == ["team/small", ""]
    assert ask(site, "on_pick", event={"act": "use", "uid": f"team/small@{COMMIT}"}) == ["team/small", COMMIT]
    for act, uid in (("use", "../x"), ("use", "/etc"), ("use", "team/small@../x"), ("cancel", "team/small")):
        told = ask(site, "on_pick", event={"act": act, "uid": uid})
        assert "team" not in str(told) and "etc" not in str(told)


def test_a_hub_model_is_described_and_pinned(site, tmp_path, monkeypatch):
    odd = changed(shutil.copytree(MODEL_DIR, tmp_path / "odd"), num_local_experts=8)
    with hub_server({"team/small": MODEL_DIR, "team/odd": odd}, gated=("team/closed",)) as (endpoint, asked):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        before, pin = ask(site, "show_model", "team/small", "", "", "")
        assert "Asking the Hub" in before and not pin["visible"] and asked == []
        facts, pin = ask(site, "ask_model", "team/small", "", "", "")
        assert "LlamaForCausalLM" in facts and COMMIT[:12] in facts and "6.29 million" in facts and pin["visible"]
        asked.clear()
        assert ask(site, "show_model", "team/small", "", "", "")[0] == facts  # known for a while
        assert ask(site, "on_pin", "team/small", "", "", "") == [COMMIT] and asked == []
        assert "mixture of experts" in ask(site, "ask_model", "team/odd", "", "", "")[0]
        closed = ask(site, "ask_model", "team/closed", "", "", "")[0]
        assert "accept its licence" in closed and 'rel="noreferrer"' in closed
        assert "has no branch, tag or commit" in ask(site, "ask_model", "team/small", "", "v9", "")[0]
    assert "LlamaForCausalLM" in ask(site, "show_model", "quantdeck/demo", "", "", "")[0]


def test_the_review_uses_what_was_found_out_without_a_download(site, monkeypatch):
    draft = open_draft(TEMPLATE.replace("quantdeck/demo", "team/small", 1))
    assert "known after the download" in review_html(review(site.home, draft, draft.shown))
    with hub_server({"team/small": MODEL_DIR}) as (endpoint, asked):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        ask(site, "ask_model", "team/small", "", "", "")
        asked.clear()
        found = review_html(review(site.home, draft, draft.shown))
        assert asked == []
    here = open_draft(TEMPLATE)
    sizes = re.compile(r"[\d.]+ MB, \d+ % of [\d.]+ MB")
    assert sizes.findall(found) == sizes.findall(review_html(review(site.home, here, here.shown))) != []
    assert f"commit {COMMIT[:12]}, nothing downloaded" in found and "kept in the cache for later jobs" in found


def test_without_network_the_cache_is_offered(site, tmp_path, monkeypatch):
    monkeypatch.setattr("backend.sources.hub_cache.KEPT_S", 0.0)
    assert "not in the cache" in ask(site, "ask_model", "team/small", "", "", "")[0]
    assert "No Hub model is in the cache" in ask(site, "on_open", "")[0]
    with hub_server({"team/small": MODEL_DIR}) as (endpoint, _):
        code = (
            "import sys; from huggingface_hub import snapshot_download as get; get('team/small', cache_dir=sys.argv[1])"
        )
        cache = site.home.user_data / ".cache" / "hub"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        subprocess.run([sys.executable, "-c", code, cache], check=True, capture_output=True)
    monkeypatch.setenv("HF_ENDPOINT", OFFLINE)
    (found,) = ask(site, "on_search", "small", "")
    assert "cannot be searched" in found and 'data-uid="team/small"' in found and str(site.home.root) not in found
    facts, pin = ask(site, "ask_model", "team/small", "", "", "")
    assert "is in the cache" in facts and "LlamaForCausalLM" in facts and not pin["visible"]


def test_the_inventory_tells_size_commit_use_and_what_is_in_the_way(site, tmp_path, monkeypatch):
    monkeypatch.setattr("backend.sources.hub_cache.KEPT_S", 0.0)
    own = site.home.root / "elsewhere" / "hub"
    keep(own, "team/kept", MODEL_DIR)
    keep(own, "team/awq", changed(shutil.copytree(MODEL_DIR, tmp_path / "awq"), quantization_config={"bits": 4}))
    (keep(own, "team/part", MODEL_DIR) / "model.safetensors").unlink()
    (own / "models--team--gone").mkdir()
    table, _ = ask(site, "on_open", "elsewhere")
    whole = size(sum(path.stat().st_size for path in MODEL_DIR.iterdir()))
    for part in (f"commit {COMMIT[:12]}, the newest when downloaded", "last used 20", whole, "quantized already",
                 "a job downloads what is missing", "downloaded anew by the next job: team/gone"):  # fmt: skip
        assert part in table, part
    assert str(site.home.root) not in table and "team/kept" not in ask(site, "on_open", "../..")[0]
    assert "is in the cache" in ask(site, "ask_model", "team/kept", "", "", "elsewhere")[0]


def test_a_token_is_taken_and_never_shown(site):
    token = "hf_an_example_of_a_token_1234"
    status, box = ask(site, "on_token", token)
    assert "is stored since" in status and box == "" and hub_token.read(hub_token.token_file(site.home))[0] == token
    assert token not in str(ask(site, "on_open", ""))
    refused, _ = ask(site, "on_token", "<b>no token</b>")
    assert "was not stored" in refused and "<b>no" not in refused
    assert "No token" in ask(site, "on_forget")[0] and not hub_token.token_file(site.home).exists()


def _in_browser(function):
    for mark in IN_BROWSER:
        function = mark(function)
    return function


@_in_browser
def test_a_model_is_found_used_and_pinned_in_the_page(tmp_path, monkeypatch):
    repos = dict.fromkeys(ABOUT, MODEL_DIR)
    with hub_server(repos, about=ABOUT) as (endpoint, asked):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with dashboard(Home.at(tmp_path / "home")) as address, watched_page(address) as (page, faults):
            page.goto(f"{address}/new")
            page.locator("#model-facts", has_text="6.29 million").wait_for()
            assert asked == []  # nobody has searched yet
            page.get_by_text("Find on the Hub").click()
            page.fill("#hub-text :is(input, textarea)", "small")
            page.get_by_role("button", name="Use").nth(1).click()
            page.locator("#model-facts", has_text=COMMIT[:12]).wait_for()
            page.locator("#review", has_text="nothing downloaded").wait_for()  # by itself
            page.get_by_role("button", name="Pin this commit").click()
            page.locator("#yaml", has_text=COMMIT).wait_for()
            assert 'MODEL: "team/small"' in page.locator("#yaml").inner_text()
            assert faults == []
