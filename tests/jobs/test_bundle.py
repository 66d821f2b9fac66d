"""A job's bundle: what is in it, that it is always the same, and the ways to get it."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

from backend import cli
from backend.errors import JobError
from backend.jobs.bundle import bundle, commit
from backend.jobs.store import JobStore
from backend.paths import Home
from tests.security.site import add_job, finish, running

ROW = {"metric": "perplexity", "name": "Perplexity", "unit": "", "baseline": 2.0, "quantized": 2.5, "impact": 0.5}
FILES = {"model.safetensors": {"bytes": 3, "sha256": "ab" * 32}, "config.json": {"bytes": 2, "sha256": "cd" * 32}}
MANIFEST = {
    "model_commit": "f" * 40, "device": "CPU, 2 cores",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "aqlm": "absent", "datasets": "5.2"},
    "calibration": {"sequences": 8, "tokens": 1024}, "files": FILES,
}  # fmt: skip
ENTRY = {"name": "awq-w4-g128", "label": "AWQ", "artefact": None, "rows": [ROW], "table": "| a table |", "layers": [],
         "manifest": MANIFEST}  # fmt: skip


def finished(home, name):
    job = add_job(home, name, CALIBRATION={"SEED": 77})
    finish(home, job, {"results": [ENTRY], "rows": [ROW], "peak_rss_bytes": 630_000_000})
    return JobStore(home).get(job.uid)


def unpacked(content: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_a_bundle_has_all_that_makes_the_result_again_and_no_weights(home):
    job = finished(home, "made")
    found = unpacked(bundle(job))
    assert {name.partition("/")[0] for name in found} == {"made"}
    assert found["made/made.yaml"] == job.config_yaml
    assert found["made/versions.txt"] == "# python 3.11.7\n# aqlm was not installed\ndatasets==5.2\ntorch==2.13.0+cpu\n"
    assert found["made/command.sh"] == "python -m backend run made.yaml\n"
    facts = json.loads(found["made/facts.json"])
    assert facts["seed"] == 77 and facts["model_commit"] == "f" * 40 and facts["data"]["DATASET_NAME"]
    assert facts["peak_memory_bytes"] == 630_000_000
    assert facts["data"]["taken"] == {"sequences": 8, "tokens": 1024} and facts["quantdeck_commit_now"] == commit()
    assert json.loads(found["made/results.json"]) == [{"name": "awq-w4-g128", "label": "AWQ", "rows": [ROW]}]
    assert found["made/results.md"] == "| a table |\n"
    assert f"{'ab' * 32}  awq-w4-g128/model.safetensors\n" in found["made/SHA256SUMS"]
    assert not any(name.endswith(".safetensors") for name in found)


def test_it_is_the_same_each_time(home):
    job = finished(home, "same")
    assert bundle(job) == bundle(JobStore(home).get("same"))


def test_a_job_that_has_not_ended_has_none(home):
    with pytest.raises(JobError, match="queued"):
        bundle(add_job(home, "waits"))


def test_the_command_writes_a_new_file_only(home, tmp_path, capsys):
    job = finished(home, "written")
    target = tmp_path / "x.zip"
    words = ["export", "written", "--to", "bundle", "--home", str(home.root)]
    assert cli.main([*words, "-o", str(target)]) == 0
    assert target.read_bytes() == bundle(job)
    assert cli.main([*words, "-o", str(target)]) == 1 and "cannot be written" in capsys.readouterr().err
    assert cli.main(words) == 2 and "go together" in capsys.readouterr().err


def test_the_page_hands_it_out(tmp_path):
    home = Home.at(tmp_path)
    job, waits = finished(home, "asked"), add_job(home, "waits")
    with running(home) as site, site.client() as client:
        answer = client.get(f"/download/{job.uid}.zip")
        assert answer.content == bundle(job) and "asked.zip" in answer.headers["content-disposition"]
        assert client.get(f"/download/{waits.uid}.zip").status_code == 404
        assert client.get("/download/..%2f.zip").status_code == 404
