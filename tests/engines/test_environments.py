"""Engine environments, built by the real uv from packages made here; no network."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from backend.engines import environments, uv
from backend.engines.environments import READY, Environment, build
from backend.errors import ConfigError, EngineError
from backend.paths import PROJECT
from tests.engines.toy_environment import make_toy, make_wheel, only_the_toys_packages


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages come from the toy's folder alone, and only pip is told so."""
    only_the_toys_packages(tmp_path, monkeypatch)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")


@pytest.fixture
def toy(tmp_path: Path) -> Environment:
    return make_toy(tmp_path)


def nothing(line: str) -> None:
    pass


def run(python: Path, code: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_built_from_the_lock_and_tried_out(toy: Environment) -> None:
    lines: list[str] = []
    python = build(toy, lines.append)
    assert python == toy.python
    assert run(python, "import toy_torch, toy_engine; print(toy_engine.ANSWER)") == "42"
    assert "toy answers 42" in lines
    facts = toy.ready()
    assert facts is not None
    assert facts["packages"] == ["toy-engine==1.0", "toy-library==1.0", "toy-torch==2.0"]
    ours = "import importlib.util as u; print(u.find_spec('pydantic'), u.find_spec('torch'))"
    assert run(python, ours) == "None None"


def test_once_installed_it_is_found_quickly_and_checked(toy: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    build(toy, nothing)
    ready = toy.folder / READY
    before = ready.stat().st_mtime_ns
    monkeypatch.setattr(environments, "find_uv", lambda: pytest.fail("uv was asked for"))
    lines: list[str] = []
    assert build(toy, lines.append) == toy.python
    assert lines == [f"toy is already installed in {toy.folder}"]
    assert ready.stat().st_mtime_ns == before

    began = time.process_time()
    for _ in range(20):
        assert toy.ready()
    assert time.process_time() - began < 1.0, "pages ask for it"

    text = ready.read_text()
    for broken in ("{", text.replace(toy.hash, "0" * 16)):
        ready.write_text(broken)
        assert toy.ready() is None
    ready.write_text(text)
    toy.python.unlink()
    assert toy.ready() is None


def test_a_killed_build_is_not_used_and_is_made_afresh(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    toy = make_toy(
        tmp_path,
        probe="import os, pathlib, time\nparent = os.getppid()\nprint('probing', flush=True)\n"
        f"while pathlib.Path({str(hold)!r}).exists() and os.getppid() == parent:\n    time.sleep(0.02)\n",
    )
    code = (
        "import sys; from pathlib import Path; from backend.engines.environments import Environment, build\n"
        f"build(Environment(Path({str(toy.definition)!r}), Path({str(toy.root)!r})), lambda l: print(l, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=PROJECT) as builder:
        assert builder.stdout is not None
        assert any(line.strip() == "probing" for line in builder.stdout)
        builder.send_signal(signal.SIGKILL)
    assert toy.python.exists()
    assert toy.ready() is None
    rest = toy.folder / "rest"
    rest.touch()
    hold.unlink()
    lines: list[str] = []
    build(toy, lines.append)
    assert any("unfinished" in line for line in lines)
    assert toy.ready() is not None
    assert not rest.exists()


def builder(toy: Environment, log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A process that builds the toy and writes its lines to `log`."""
    code = (
        "import sys; from pathlib import Path; from backend.engines.environments import Environment, build\n"
        f"build(Environment(Path({str(toy.definition)!r}), Path({str(toy.root)!r})), lambda l: print(l, flush=True))"
    )
    with open(log, "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=subprocess.STDOUT, cwd=PROJECT,
            env={**os.environ, **variables},
        )  # fmt: skip


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_killed_while_uv_installs_another_process_takes_over(toy: Environment, tmp_path: Path) -> None:
    hold, log = tmp_path / "hold", tmp_path / "second.log"
    reached = tmp_path / "hold.reached"
    hold.touch()
    first = builder(toy, tmp_path / "first.log", TOY_HOLD=str(hold))
    second = None
    try:
        wait_for(reached.exists)
        programs = psutil.Process(first.pid).children()
        assert [program.name() for program in programs] == ["uv"]
        second = builder(toy, log)
        wait_for(lambda: b"waiting for it" in log.read_bytes())
        assert toy.ready() is None
        first.kill()
        first.wait(60)
        gone, alive = psutil.wait_procs(programs, timeout=60)
        assert (len(gone), alive) == (1, []), "a uv that goes on would spoil the next build"
        assert second.wait(120) == 0, log.read_text()
    finally:
        hold.unlink()  # lets an orphaned build of the source package end
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
    text = log.read_text()
    assert "an unfinished build is in" in text
    assert "toy answers 42" in text
    assert toy.ready() is not None
    assert run(toy.python, "import toy_engine; print(toy_engine.ANSWER)") == "42"


def test_two_processes_at_once_build_it_once(toy: Environment, tmp_path: Path) -> None:
    hold, reached = tmp_path / "hold", tmp_path / "hold.reached"
    hold.touch()
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    processes = [builder(toy, logs[0], TOY_HOLD=str(hold))]
    try:
        wait_for(reached.exists)
        processes += [builder(toy, log, TOY_HOLD=str(hold)) for log in logs[1:]]
        for log in logs[1:]:
            wait_for(lambda log=log: b"waiting for it" in log.read_bytes())
        hold.unlink()
        assert [process.wait(120) for process in processes] == [0, 0, 0]
    finally:
        hold.unlink(missing_ok=True)
        for process in processes:
            process.kill()
            process.wait()
    texts = [log.read_text() for log in logs]
    assert [text.count("building toy in") for text in texts] == [1, 0, 0]
    assert all("was built by another process" in text for text in texts[1:])


@pytest.mark.parametrize("marker", ["", "[]", "3", "null", "{}", '{"hash": 3}', "\xff"])
def test_a_marker_that_says_nothing_is_no_marker(toy: Environment, marker: str) -> None:
    toy.python.parent.mkdir(parents=True)
    toy.python.touch()
    (toy.folder / READY).write_bytes(marker.encode("latin-1"))
    assert toy.ready() is None


def test_the_marker_is_written_last(toy: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(environments, "write_json", full)
    with pytest.raises(EngineError, match="No space left on device.*not used"):
        build(toy, nothing)
    assert run(toy.python, "import toy_engine") == ""  # all is there but the marker
    assert toy.ready() is None
    monkeypatch.undo()


def test_a_failing_probe_leaves_it_unusable(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, probe="raise SystemExit('the toy is broken')")
    with pytest.raises(EngineError, match="probe.py.*\n.*the toy is broken"):
        build(toy, nothing)
    assert toy.ready() is None


def test_a_changed_lock_is_a_new_environment(toy: Environment) -> None:
    build(toy, nothing)
    old = toy.folder
    new_hash = make_wheel(toy.definition.parents[1] / "wheels", "toy_library", "1.1", "ANSWER = 41\nNEW = True\n")
    (toy.definition / "lock.txt").write_text(f"toy-library==1.1 --hash=sha256:{new_hash}\n")
    assert toy.folder != old
    assert toy.ready() is None
    lines: list[str] = []
    assert run(build(toy, lines.append), "import toy_library; print(toy_library.NEW)") == "True"
    assert (old / READY).exists(), "a running job may still use the old one"
    assert any(str(old) in line and "earlier version" in line for line in lines)


def test_two_installs_at_once_build_it_once(toy: Environment) -> None:
    lines: list[str] = []
    threads = [threading.Thread(target=build, args=(toy, lines.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert toy.ready() is not None
    assert len([line for line in lines if line.startswith("building toy")]) == 1


def test_a_file_that_differs_from_the_lock_is_refused(toy: Environment) -> None:
    make_wheel(toy.definition.parents[1] / "wheels", "toy_library", "1.0", "ANSWER = 666\n")
    with pytest.raises(EngineError, match="(?s)installing the locked packages.*differs from the locked one"):
        build(toy, nothing)
    assert toy.ready() is None


def test_a_package_that_is_not_offered_is_named(toy: Environment) -> None:
    (toy.definition / "lock.txt").write_text(f"toy-library==9.9 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(EngineError, match="(?s)toy-library.*not offered for this machine"):
        build(toy, nothing)


def test_no_network_says_so(toy: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(EngineError, match="could not be fetched: check the network"):
        build(toy, nothing)


def test_pip_settings_are_read_from_its_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://a/simple\nfind-links = /file\n"
        "extra-index-url =\n    https://b/simple\n    https://c/simple\n[install]\nindex-url = https://i/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "/one /two")
    assert uv.uv_options(uv.pip_settings()) == [
        "--index-url", "https://i/simple", "--extra-index-url", "https://b/simple", "--extra-index-url",
        "https://c/simple", "--index-strategy", "unsafe-best-match", "--find-links", "/one", "--find-links", "/two",
    ]  # fmt: skip


def test_certificate_proxy_and_timeout_of_pip_reach_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", "/elsewhere")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "77")
    monkeypatch.setenv("PIP_CERT", "/ca.pem")
    monkeypatch.setenv("PIP_PROXY", "http://proxy:1")
    made = uv.uv_environment(uv.pip_settings())
    assert (made["SSL_CERT_FILE"], made["ALL_PROXY"], made["UV_HTTP_TIMEOUT"]) == ("/ca.pem", "http://proxy:1", "77")
    assert "VIRTUAL_ENV" not in made


def test_without_uv_the_message_says_what_to_do(toy: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(EngineError, match="uv.*make setup"):
        build(toy, nothing)


def test_programs_in_it_see_an_allow_list_of_variables(toy: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "DEFINITIONS", toy.definition.parent)
    base = {
        "HOME": "/home", "PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "QUANTDECK_HOME": "/q", "HF_TOKEN": "secret",
        "PYTHONPATH": "/ours", "LD_PRELOAD": "x", "LD_LIBRARY_PATH": "/lib", "VIRTUAL_ENV": "/ours/.venv",
    }  # fmt: skip
    made = environments.environment_variables("toy", base)
    bin_folder = environments.environment("toy").python.parent
    assert made == {
        "HOME": "/home", "OMP_NUM_THREADS": "1", "QUANTDECK_HOME": "/q", "PATH": f"{bin_folder}:/usr/bin",
        "PYTHONNOUSERSITE": "1", "TOY_WORKERS": "2",
    }  # fmt: skip


def test_by_name(toy: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "DEFINITIONS", toy.definition.parent)
    monkeypatch.setenv(environments.ROOT_VARIABLE, str(tmp_path / "elsewhere"))
    assert environments.names() == ("toy",)
    assert environments.environment_python("toy") is None
    reason = "engine toy is not installed; run `python -m backend engines install toy`"
    assert environments.missing_reason("toy") == reason
    python = environments.install("toy")
    assert python.is_relative_to(tmp_path / "elsewhere")
    assert environments.environment_python("toy") == python
    assert environments.missing_reason("toy") is None
    with pytest.raises(ConfigError, match="'ty'; there are toy"):
        environments.install("ty")


@pytest.mark.parametrize("name", sorted(environments.environments()))
def test_definitions_of_the_project(name: str) -> None:
    env = environments.environment(name)
    assert env.about["kind"] in ("engine", "peer")
    assert env.about["about"].endswith(".")
    pins = [env.definition / file for file in ("lock.txt", "source.txt") if (env.definition / file).exists()]
    locked: dict[str, str] = {}
    for path in pins:
        for block in re.split(r"\n(?=[a-z0-9])", path.read_text(encoding="utf-8")):
            if pin := re.match(r"([a-z0-9][a-z0-9.-]*)==(\S+)", block):
                assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
                locked[pin[1]] = pin[2]
    assert not [package for package in locked if re.match("torch$|triton|nvidia-|cuda-", package)]
    wanted = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (env.definition / "requirements.in").read_text(), re.MULTILINE)
    assert wanted
    assert {n.lower().replace("_", "-"): v for n, v in wanted}.items() <= locked.items(), "make lock.txt anew"
    assert re.fullmatch(r"(#.*\n)*torch==[0-9.]+\n", (env.definition / "torch.txt").read_text())
    compile((env.definition / "probe.py").read_text(), "probe.py", "exec")
