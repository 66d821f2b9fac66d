"""Who the server answers without accounts: its own pages and programs of this machine, nobody else.

What an attacker tries is in `tests/security/test_web_*.py`, against a real server.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
from fastapi.testclient import TestClient

from backend.errors import ConfigError
from backend.jobs import launch
from backend.jobs.export import export_text
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from backend.settings import WebSettings
from ui.draft import TEMPLATE
from ui.server import create_app, require_safe_address

OWN = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home.at(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def client(home):
    with (
        patch.object(launch, "watch", lambda _: None),  # the jobs of these tests are not to be run
        TestClient(create_app(home), base_url=OWN) as client,
    ):
        yield client


def call(client, **headers):
    body = {"data": [], "fn_index": 0, "session_hash": "s"}
    return client.post("/gradio_api/queue/join", json=body, headers=headers)


@pytest.mark.parametrize("path", ["/", "/new", "/job?id=x", "/compare?jobs=x", "/chat?job=x"])
def test_every_page_answers(client, path):
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:9999", "null", "https://127.0.0.1:7860"])
def test_a_foreign_origin_cannot_post(client, origin):
    assert call(client, origin=origin).status_code == 403


def test_a_cross_site_post_without_origin_is_refused(client):
    assert call(client, **{"sec-fetch-site": "cross-site"}).status_code == 403


def test_the_own_page_can_post(client):
    answer = call(client, origin=OWN)
    assert answer.status_code != 403
    assert answer.headers["access-control-allow-origin"] == OWN


def test_a_foreign_reader_gets_no_permission(client):
    answer = client.get("/config", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["evil.example", "quantdeck.example:7860", "169.254.169.254"])
def test_a_foreign_host_name_is_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 400


def test_answers_forbid_frames_and_sniffing(client):
    headers = client.get("/").headers
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"


def test_files_of_the_home_are_not_served(client, home):
    JobStore(home)
    (home.user_data / "secret.txt").write_text("secret")
    for path in (home.jobs_db, home.user_data / "secret.txt", home.root / ".." / "x"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_monitoring_and_run_history_are_closed(client):
    assert client.get("/monitoring").status_code in (403, 404)
    assert client.get("/gradio_api/runs").status_code in (403, 404)


def test_the_yaml_of_a_job_is_downloaded_as_submitted(client, home):
    text = TEMPLATE.replace("my-first-job", "download-me")
    job = JobStore(home).create(text, parse_yaml(text).config, device="cpu")
    answer = client.get(f"/download/{job.uid}.yaml")
    assert answer.text == text
    assert answer.headers["content-disposition"] == 'attachment; filename="download-me.yaml"'
    assert client.get("/download/nothing.yaml").status_code == 404


def test_files_of_a_model_are_downloaded_by_name_and_nothing_else(client, home):
    text = TEMPLATE.replace("my-first-job", "two-models")
    store = JobStore(home)
    job = store.create(text, parse_yaml(text).config, device="cuda:7")
    folder = home.root / job.folder / "w4"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "private.txt").write_bytes(b"not listed")
    entry = {"name": "w4", "artefact": str(folder), "manifest": {"files": {"model.safetensors": {}, "gone.json": {}}}}
    assert store.grant(job.uid, 1, ["cpu:0"]) and store.move(job.uid, "running", actor="runner", attempt=1)
    store.update(job.uid, 1, result={"results": [entry]})
    answer = client.get(f"/download/{job.uid}/w4/model.safetensors")
    assert answer.content == b"weights"
    assert answer.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    for path in ("w4/private.txt", "w4/gone.json", "w3/model.safetensors", "w4/..%2Fw4%2Fmodel.safetensors"):
        assert client.get(f"/download/{job.uid}/{path}").status_code == 404, path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_other_machines_are_not_let_in(home, host):
    with pytest.raises(ConfigError, match="no accounts"):
        require_safe_address(home, host, WebSettings())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_is(home, host):
    require_safe_address(home, host, WebSettings())


def test_without_accounts_there_is_no_login(client):
    assert client.get("/login", follow_redirects=False).headers["location"] == "/"
    assert client.get("/login/account").json() == {"account": None}


def test_a_job_is_handed_out_for_other_programs(client, home):
    text = TEMPLATE.replace("my-first-job", "for-others")
    job = JobStore(home).create(text, parse_yaml(text).config, device="cpu")
    answer = client.get(f"/download/{job.uid}/nyuntam.yaml")
    assert answer.status_code == 200 and answer.text == export_text(text, "nyuntam")
    assert answer.headers["content-disposition"] == 'attachment; filename="for-others.nyuntam.yaml"'
    recipe = client.get(f"/download/{job.uid}/llmcompressor.yaml")
    assert recipe.status_code == 200 and "quant_modifiers" in recipe.text
    for path in (f"{job.uid}/command.yaml", f"{job.uid}/x.yaml", f"{'0' * 22}/nyuntam.yaml", "x/nyuntam.yaml"):
        assert client.get(f"/download/{path}").status_code == 404
    odd = TEMPLATE.replace("W_BIT: 4", "W_BIT: 3")
    job = JobStore(home).create(odd, parse_yaml(odd).config, device="cpu")
    answer = client.get(f"/download/{job.uid}/nyuntam.yaml")
    assert answer.status_code == 404 and "set it to 4" in answer.text
