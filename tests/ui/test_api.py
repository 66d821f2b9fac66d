"""The endpoints for programs, as `gradio_client` calls them on a real dashboard."""

from __future__ import annotations

import json
import os
import re

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from backend import accounts
from backend.jobs import launch
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.security.site import PASSWORD, SECRETS, add_job, running

BLOCKS = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
NAMES = {"/submit", "/status", "/cancel", "/result", "/list_jobs", "/export"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running(Home.at(tmp_path_factory.mktemp("api"))) as site:
        yield site


@pytest.fixture(scope="module")
def client(site):
    client = Client(site.origin, verbose=False, analytics_enabled=False)
    yield client
    client.close()


@pytest.fixture
def no_scheduler(monkeypatch):
    """Jobs that are submitted wait."""
    monkeypatch.setattr(launch, "ensure_scheduler", lambda _: None)


def run_block(text: str, origin: str) -> dict:
    """The names that a block of the docs leaves, run against a dashboard at another address."""
    assert "http://127.0.0.1:7860" in text
    names: dict = {}
    exec(compile(text.replace("http://127.0.0.1:7860", origin), "docs/api.md", "exec"), names)
    names["client"].close()
    return names


def test_a_job_file_in_json_is_queued_as_yaml(site, client, no_scheduler):
    values = parse_yaml(demo_text("from-json")).values
    job = client.predict(yaml=json.dumps(values, indent="\t"), api_name="/submit")
    text = JobStore(site.home).get(job["uid"]).config_yaml
    assert text.startswith('MODEL: "quantdeck/demo"') and parse_yaml(text).values == values
    with pytest.raises(AppError, match="not valid JSON: line 1, column 9"):
        client.predict(yaml='{"A": 1,, "B": 2}', api_name="/submit")


def test_the_docs_example_runs_a_job_to_its_numbers(tmp_path, capsys):
    with running(Home.at(tmp_path)) as site:
        names = run_block(BLOCKS[0], site.origin)
        job = names["job"]
        assert job["state"] == "succeeded", job["reason"]
        assert JobStore(site.home).history(job["uid"])[0]["actor"] == "api"
        rows = JobStore(site.home).get(job["uid"]).result["rows"]
    assert [row["name"] for row in names["result"]["rows"]] == [row["name"] for row in rows] != []
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(rows) and rows[0]["name"] in printed


def test_with_accounts_a_program_logs_in_and_is_named(tmp_path, no_scheduler):
    home = Home.at(tmp_path)
    accounts.add(home, "ada", PASSWORD)
    with running(home) as site:
        with pytest.raises(Exception, match="401|Log in|login"):
            Client(site.origin, verbose=False, analytics_enabled=False)
        client = run_block(BLOCKS[1], site.origin)["client"]
        job = client.predict(yaml=demo_text("hers"), api_name="/submit")
        client.predict(job_id="hers", api_name="/cancel")
    assert [(e["to_state"], e["actor"]) for e in JobStore(home).history(job["uid"])] == [
        ("queued", "api ada"),
        ("cancelled", "api ada"),
    ]


def test_only_the_six_endpoints_are_public_and_their_types_are_told(client, site):
    told = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert set(told) == NAMES
    assert {p["parameter_name"]: p["type"]["type"] for p in told["/list_jobs"]["parameters"]} == {
        "state": "string",
        "search": "string",
        "page": "integer",
    }
    public = {fn.api_name for fn in site.blocks.fns.values() if fn.api_visibility != "private"}
    assert {f"/{name}" for name in public} == NAMES


def test_jobs_are_listed_found_and_exported(client, site):
    made = [add_job(site.home, f"listed-{i}", MODEL="quantdeck/demo") for i in range(52)]
    first = client.predict(search="listed-", api_name="/list_jobs")
    assert [job["job_id"] for job in first] == [job.job_id for job in reversed(made[2:])]
    second = client.predict(search="listed-", page=2, api_name="/list_jobs")
    assert [job["job_id"] for job in second] == ["listed-1", "listed-0"]
    assert client.predict(search="listed-", page=3, api_name="/list_jobs") == []
    assert client.predict(state="failed", api_name="/list_jobs") == []
    assert client.predict(job_id="listed-0", api_name="/status") == second[1]
    assert client.predict(job_id=made[0].uid, api_name="/export") == made[0].config_yaml
    assert "python -m backend run" in client.predict(job_id="listed-0", target="command", api_name="/export")
    assert client.predict(job_id="listed-0", api_name="/result")["rows"] == []


def test_what_is_wrong_is_told_as_the_page_tells_it(client, site, no_scheduler, tmp_path):
    before = len(JobStore(site.home).jobs()) + 1

    def refusal(name, **values):
        with pytest.raises(AppError) as caught:
            client.predict(**values, api_name=name)
        assert not SECRETS.search(str(caught.value))
        return str(caught.value)

    assert "there is no job 'nowhere'" in refusal("/status", job_id="nowhere")
    add_job(site.home, "there")
    assert "target: found 'gguf'; it must be one of yaml" in refusal("/export", job_id="there", target="gguf")
    assert "state: found 'done'; it must be one of queued" in refusal("/list_jobs", state="done")
    assert "page: found 0" in refusal("/list_jobs", page=0)
    assert "job_id: found None" in refusal("/result", job_id=None)
    assert "ALGORITHM" in refusal("/submit", yaml=demo_text("wrong", ALGORITHM="magic"))
    outside = demo_text("outside", CUSTOM_MODEL_PATH=str(tmp_path / "elsewhere"))
    assert "CUSTOM_MODEL_PATH" in refusal("/submit", yaml=outside)
    assert len(JobStore(site.home).jobs()) == before
    job = add_job(site.home, "twice")
    assert client.predict(job_id=job.uid, api_name="/cancel")["state"] == "cancelled"
    assert "is already cancelled" in refusal("/cancel", job_id=job.uid)
