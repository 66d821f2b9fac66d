"""What other web sites, crafted paths and large requests get from a real server: nothing."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

from backend.jobs.store import JobStore
from tests.security.site import CANARY, PASSWORD, PUBLIC, SECRETS, Site, add_job, finish
from ui.guard import ANSWER_HEADERS

ROOT = Path(__file__).parents[2]
EVIL = "https://evil.example"


# -- other web sites


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


# -- files


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
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "secret").write_text(CANARY)
    below = {**away, "name": "below", "artefact": str(home.user_data / "linked" / "deep")}
    finish(home, job, {"results": [entry, away, linked, below]})
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
        for other in ("away", "linked", "below"):
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


# -- sizes


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
