"""Every handler of the pages can be called by anybody who is let in: junk, hostile texts, errors, health."""

from __future__ import annotations

import json
import os
import socket
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from backend.jobs.store import JobStore
from backend.paths import Home
from tests.security.site import CANARY, SECRETS, add_job, call, outcome, running
from ui.guard import ANSWER_HEADERS, is_local
from ui.server import create_app

# -- handlers


HOSTILE = "<img src=x onerror=alert(1)>"
JUNK = [
    None, "", HOSTILE, "../../etc/passwd", -1, 10**30, 1e308, True, [], ["x", None, {}], {}, {"__type__": "update"},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [{"path": "/etc/passwd"}], "\x00", "\ud800",
    "x" * 10_000,
]  # fmt: skip
EVENTS = [None, {}, {"act": "__class__", "uid": {"$": 1}}, {"act": "cancel", "uid": "../../x"},
          {"act": "resume", "uid": HOSTILE}, {"act": ["cancel"], "uid": None}, "x",
          {"act": "erase", "uid": "../../x", "uids": "../../x"}, {"act": "delete", "uid": "", "uids": ["x"] * 99},
          {"act": "sort", "uid": "uid; DROP TABLE jobs"}, {"act": "tag", "uid": HOSTILE}]  # fmt: skip


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
                    # 413: long junk in every field of the largest form is more than a request may have
                    assert answer.status_code in (400, 413, 422), (index, fn.name, data, answer.text)
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
        failed = client.get("/download/" + "0" * 22 + ".yaml")
        assert failed.text == "Internal Server Error" and {name.lower() for name in ANSWER_HEADERS} <= set(
            failed.headers
        )


def opened(site, address):
    """What the handlers of a page that is opened send, as one text."""
    found = []
    with site.client() as client:
        found.append(client.get(address).text)
        for index, fn in site.blocks.fns.items():
            if fn.inputs or not any(event == "load" for _, event in fn.targets):
                continue
            body = {"data": [], "fn_index": index, "session_hash": f"opened{index}"}
            answer = client.post("/gradio_api/queue/join?" + address.partition("?")[2], json=body)
            assert answer.status_code == 200
            for message in outcome(client, body["session_hash"]):
                assert message["msg"] != "unexpected_error" and message.get("success", True), (fn.name, message)
                values = (message.get("output") or {}).get("data") or []
                found += [str(v) for v, block in zip(values, fn.outputs, strict=False) if isinstance(block, gr.HTML)]
    return "\n".join(found)


@pytest.mark.parametrize(
    "uid",
    [
        "..%2F..%2Fetc",
        "%00",
        "a" * 3000,
        "%E2%88%95etc",
        "CON",
        "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E",
        "%ED%A0%80",
    ],
)
def test_odd_ids_in_an_address_show_nothing_of_the_machine_and_make_nothing(open_site, uid):
    before = state_of(open_site.home)
    for page in ("/job?id=", "/compare?jobs=", "/chat?job=", "/new?clone=", "/?p=", "/?q="):
        told = opened(open_site, page + uid)
        assert not SECRETS.search(told) and "<img src=x" not in told, page
    assert state_of(open_site.home) == before


def archives(folder):
    """Files that would do harm if anybody unpacked them: paths that lead out, and 100 MB of zeros."""
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(100_000_000))
        archive.writestr("../../../../../../tmp/qd-unpacked", "x")
    (folder / "x").write_text("x")
    with tarfile.open(folder / "bomb.tar.gz", "w:gz") as archive:
        archive.add(folder / "x", arcname="../../../../../../tmp/qd-unpacked")
    (folder / "bomb.yaml").write_bytes((folder / "bomb.zip").read_bytes() + b"\n")
    return [folder / name for name in ("bomb.zip", "bomb.tar.gz", "bomb.yaml")]


def test_an_archive_is_no_job_file_and_nobody_unpacks_it(open_site, tmp_path):
    index, fn = next((i, fn) for i, fn in open_site.blocks.fns.items() if fn.name == "on_upload")
    before = state_of(open_site.home)
    with open_site.client() as client:
        for number, file in enumerate(archives(tmp_path)):
            (path,) = client.post("/gradio_api/upload", files={"files": (file.name, file.read_bytes())}).json()
            data = [{"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}]
            assert call(client, index, data, f"archive{number}").status_code == 200
            last = outcome(client, f"archive{number}")[-1]
            assert not last["success"] or "was not opened" in str(last["output"]), last
            assert {p.name for p in Path(path).parent.iterdir()} == {Path(path).name}
    assert state_of(open_site.home) == before and not Path("/tmp/qd-unpacked").exists()


def test_uploaded_files_go_with_the_dashboard(tmp_path):
    with running(Home.at(tmp_path)) as site:
        with site.client() as client:
            (path,) = client.post("/gradio_api/upload", files={"files": ("mine.yaml", b"A: 1")}).json()
        assert Path(path).exists()
        frequency, age = site.blocks.delete_cache
        assert frequency <= 3600 and age <= 24 * 3600
    assert not Path(path).exists()


def test_a_page_that_is_closed_changes_nothing_of_a_job(open_site):
    """Its streams end and its events are given up; what Gradio cancels then is no job (as a reload does, too)."""
    job = add_job(open_site.home, "watched")
    index = next(i for i, fn in open_site.blocks.fns.items() if fn.name == "on_load" and not fn.inputs)
    with open_site.client() as client:
        with client.stream("GET", "/gradio_api/heartbeat/closing") as beat, client.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": "closing"}
        ):  # fmt: skip
            next(beat.iter_raw())
            assert call(client, index, [], "closing").status_code == 200
        client.post("/gradio_api/cancel", json={"session_hash": "closing", "fn_index": index, "event_id": "x"})
        client.post("/gradio_api/reset", json={"event_id": "x"})
    assert [e["to_state"] for e in JobStore(open_site.home).history(job.uid)] == ["queued"]


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
    row = {"metric": "perplexity", "name": HOSTILE, "unit": HOSTILE, "protocol": HOSTILE, "protocol_id": HOSTILE,
           "baseline": 1.0,
           "quantized": 2.0, "impact": 1.0, "interval": [0.5, 1.5], "interval_method": HOSTILE,
           "higher_is_better": False}  # fmt: skip
    entry = {"name": HOSTILE, "label": HOSTILE, "artefact": None, "rows": [row], "manifest": {"files": {HOSTILE: {}}},
             "notes": [HOSTILE], "skipped": {HOSTILE: HOSTILE}, "reason": HOSTILE, "layers": []}  # fmt: skip
    second = {**entry, "name": f"{HOSTILE}2"}

    def shown() -> str:
        """The HTML that every page gets when it is opened, as one text."""
        query = (f"/job?id={job.uid}", f"/compare?jobs={job.uid}", f"/chat?job={job.uid}", f"/new?clone={job.uid}")
        return "\n".join(opened(open_site, address) for address in ("/", *query))

    running_job = shown()
    store.update(job.uid, 1, result={"results": [entry, second], "rows": [row], "device": HOSTILE, "timings": {}})
    store.move(job.uid, "failed", actor="test", attempt=1, reason=f"{HOSTILE} reason")
    failed_job = shown()
    for text in (running_job, failed_job):
        assert "&lt;img src=x" in text and "<img src=x" not in text


# -- health


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
