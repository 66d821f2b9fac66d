"""The engines page: every engine with its reason, and a real installation by uv, started once and seen by all."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from backend.engines import environments, installing, status
from backend.engines.registry import ENGINES
from backend.errors import ConfigError
from backend.paths import Home
from backend.schema import ALGORITHMS
from backend.settings import Settings, TensorRTLLMRunSettings
from tests.engines.toy_environment import PROBE, make_toy, only_the_toys_packages
from ui.chat_pair import ChatPair
from ui.enginesview import engines_table, environment_card, log_html, machine_html
from ui.site import build_site

# The real command, which knows the toy instead of the project's own environments.
CODE = """
import sys
from pathlib import Path
from backend.engines import environments
environments.DEFINITIONS = Path(sys.argv[1])
from backend.cli import main
sys.exit(main(["engines", "install", sys.argv[2]]))
"""
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Definitions for `make_toy(tmp_path)`, whose packages come from its folder alone."""
    only_the_toys_packages(tmp_path, monkeypatch)
    monkeypatch.setenv("QUANTDECK_ENVIRONMENTS", str(tmp_path / "installed"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "autoawq").symlink_to(environments.DEFINITIONS / "autoawq")  # an engine of the registry needs it
    monkeypatch.setattr(environments, "DEFINITIONS", folder)
    monkeypatch.setattr(installing, "command", lambda name: [sys.executable, "-c", CODE, str(folder), name])
    return folder


def ended(home: Home) -> installing.Installation:
    """The toy's installation after its process has ended."""
    deadline = time.monotonic() + 120
    while (found := installing.look(home, "toy")).state == "running":
        assert time.monotonic() < deadline, found.lines
        time.sleep(0.05)
    return found


def handlers(home: Home) -> dict[str, SimpleNamespace]:
    """What the page's events call, by name."""
    site = build_site(home, ChatPair(home))
    return {fn.name: fn for fn in site.fns.values() if fn.fn and fn.fn.__module__ == "ui.pages.engines"}


def shown(updates: list[object]) -> str:
    """All HTML of an answer."""
    return "\n".join(str(getattr(update, "value", "")) for update in updates)


def test_installed_by_the_button_once_and_seen_by_every_page(
    tmp_path: Path, home: Home, definitions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy(tmp_path, probe=f"{PROBE}import os\nprint('sees', os.environ.get('HF_TOKEN'), {TOKEN!r})\n")
    hold = tmp_path / "hold"
    hold.touch()
    monkeypatch.setenv("TOY_HOLD", str(hold))
    page = handlers(home)
    assert "Not installed" in shown(page["on_load"].fn())
    click = SimpleNamespace(_data={"act": "install", "uid": "toy"})
    try:
        said, seen = page["on_install"].fn({}, click)
        assert said.visible is False
        first = installing.log_file(home, "toy").stat().st_ino
        page["on_install"].fn(seen, click)  # a second click, and a second tab below
        assert installing.start(home, "toy") is False
        updates = page["show"].fn(seen)
        assert "Installing" in shown(updates)
        assert updates[1].active is True, "the page goes on asking"
        deadline = time.monotonic() + 120
        while (
            "building from source" not in (text := shown(handlers(home)["on_load"].fn()))
            and not (tmp_path / "hold.reached").exists()
        ):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
    finally:
        hold.unlink()
    found = ended(home)
    assert found.state == "installed", found.lines
    assert any("toy answers 42" in line for line in found.lines)
    assert sum("building toy in" in line for line in found.lines) == 1
    assert TOKEN not in "\n".join(found.lines)
    assert any("sees None" in line for line in found.lines), "an installer needs no token"
    assert installing.log_file(home, "toy").stat().st_ino == first
    assert installing.log_file(home, "toy").stat().st_mode & 0o077 == 0
    updates = page["show"].fn({})
    assert "Installed" in shown(updates) and 'data-uid="toy"' not in shown(updates)
    assert "toy-torch==2.0" in shown(updates)
    assert updates[1].active is False
    assert status.disk_bytes(toy.folder) > 1000
    assert installing.start(home, "toy") is False, "it is installed"


def test_a_failed_installation_tells_why_and_can_be_tried_again(tmp_path: Path, home: Home, definitions: Path) -> None:
    make_toy(tmp_path, probe="raise SystemExit('the toy is <b>broken</b>')\n")
    assert installing.start(home, "toy")
    found = ended(home)
    assert found.state == "failed"
    assert "trying out toy" in found.reason and "the toy is <b>broken</b>" in found.reason
    card = environment_card(environments.environment("toy"), found)
    assert "Try again" in card and "&lt;b&gt;broken" in card and "<b>broken" not in card
    assert "&lt;b&gt;broken" in log_html(found)
    assert installing.start(home, "toy"), "nothing holds the lock any more"
    assert ended(home).state == "failed"


def test_an_installation_that_was_killed_is_told(tmp_path: Path, home: Home, definitions: Path) -> None:
    make_toy(tmp_path)
    log = installing.log_file(home, "toy")
    log.parent.mkdir(parents=True)
    log.write_text("building toy in a folder\n")
    found = installing.look(home, "toy")
    assert (found.state, found.lines) == ("failed", ("building toy in a folder",))
    assert "killed" in found.reason


@pytest.mark.parametrize("name", ["../toy", "", "toy; id", "--help", "nothing"])
def test_other_names_start_nothing(home: Home, name: str) -> None:
    with pytest.raises(ConfigError):
        installing.start(home, name)
    said, _ = handlers(home)["on_install"].fn({}, SimpleNamespace(_data={"act": "install", "uid": name}))
    assert "Nothing was started" in said.value
    assert not (home.private / "engines").exists()


def test_every_algorithm_and_engine_is_told_with_its_reason() -> None:
    rows = status.engine_rows()
    assert {row.algorithm for row in rows} == set(ALGORITHMS)
    assert {row.engine for row in rows} == set(ENGINES)
    html = engines_table(rows)
    for row in rows:
        assert row.reason == row.engine.unavailable_because()
        assert (row.reason or "Enabled").split("`")[0] in html
    import pydantic

    assert status.versioned("pydantic") == f"pydantic {pydantic.VERSION}"
    assert status.versioned("no_such_package") == "no_such_package (not installed)"


def test_the_machine_is_told_with_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tmp_path / "gpus.json"
    gpus.write_text(
        '[{"uuid": "GPU-1", "name": "Toy <GPU>", "total_bytes": 80000000000, "used_bytes": 0, "capability": [9, 0], '
        '"driver": "580.1", "processes": []}]'
    )
    monkeypatch.setenv("QUANTDECK_FAKE_GPUS", str(gpus))
    folder = tmp_path / "trt"
    (folder / "bin").mkdir(parents=True)
    for program in ("trtllm-bench", "trtllm-build", "python3"):
        (folder / "bin" / program).touch(0o755)
    run = TensorRTLLMRunSettings(environment=str(folder), docker=str(tmp_path / "no-docker"))
    facts = status.machine(Settings(tensorrt_llm=run), [])
    ready, missing = facts.places
    assert (ready.name, ready.reasons) == ("environment", ()) and str(folder) in ready.found
    assert missing.name == "docker" and "no program" in missing.reasons[0]
    html = machine_html(facts, status.own_packages())
    assert "NVIDIA driver 580.1" in html and "Toy &lt;GPU&gt;, 80 GB, compute capability 9.0" in html
    assert "lm_eval" in html
