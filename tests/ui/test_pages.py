"""Every page builds, its form covers the schema, and nothing of it reaches for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gradio as gr
import pytest

from backend.paths import Home
from backend.schema import ALGORITHMS, SECTIONS, JobConfig, describe, sections
from backend.schema.facts import OWN
from ui.chat_pair import ChatPair
from ui.draft import FIELDS
from ui.fields import elem_id, plain_info
from ui.site import build_site

ROOT = Path(__file__).parents[2]
CHOICE = (gr.Radio, gr.Dropdown)
KINDS = {"bool": gr.Checkbox, "choice": CHOICE, "int_choice": CHOICE, "int": gr.Textbox, "float": gr.Textbox}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    home = Home.at(tmp_path_factory.mktemp("home"))
    return build_site(home, ChatPair(home))


def test_all_pages_are_there(site):
    assert [path for path, *_ in site.pages] == ["", "new", "job", "compare", "chat", "engines"]


def test_every_setting_has_a_control_with_help_and_unit(site):
    controls = {block.elem_id: block for block in site.blocks.values() if str(block.elem_id).startswith("f-")}
    algorithms = [model for algorithm in ALGORITHMS.values() for _, model in sections(algorithm)]
    models = [JobConfig, *algorithms, *SECTIONS.values()]
    assert len(FIELDS) == sum(len(describe(model)) for model in models) == len(controls)
    for field in FIELDS:
        control = controls[elem_id(field)]
        assert field.spec.help and plain_info(field.spec.help) in control.info, field.key
        assert (field.spec.source in control.info) or field.spec.source == OWN, field.key
        assert field.spec.unit.lower() in control.label.lower(), field.key
        assert isinstance(control, KINDS.get(field.spec.type, (gr.Textbox, gr.Dropdown, gr.CheckboxGroup))), field.key


def test_settings_with_several_values_let_one_choose_several(site):
    controls = {block.elem_id: block for block in site.blocks.values()}
    several = [f for f in FIELDS if f.spec.several]
    assert {f.key for f in several} >= {"llm.AutoAWQ.W_BIT", "llm.Native.METHOD"}
    for field in FIELDS:
        assert bool(getattr(controls[elem_id(field)], "multiselect", False)) == field.spec.several, field.key


def test_only_the_chosen_algorithms_settings_are_shown(site):
    shown = {b.elem_id: b.visible for b in site.blocks.values() if str(b.elem_id).startswith("algorithm-")}
    assert shown == {f"algorithm-{name}": name == "AutoAWQ" for name in ALGORITHMS}


def test_bounds_are_told(site):
    shown = next(b for b in site.blocks.values() if b.elem_id == "f-CALIBRATION-SEQUENCE_LENGTH")
    assert "16 to 131,072" in shown.info
    shown = next(b for b in site.blocks.values() if b.elem_id == "f-llm-LLMCompressor-SPARSITY")
    assert "0.05 to 0.95" in shown.info


def test_no_listener_is_a_public_endpoint(site):
    """Only the endpoints for programs are, and those belong to no control of a page."""
    public = {fn.api_name: fn.targets for fn in site.fns.values() if fn.api_visibility != "private"}
    assert set(public) == {"submit", "status", "cancel", "result", "list_jobs", "export"}
    assert not any(targets for targets in public.values())


def test_the_dashboard_does_not_import_torch(tmp_path):
    program = (
        "import sys, pathlib; from backend.paths import Home; from ui.server import create_app; "
        f"create_app(Home.at({str(tmp_path)!r})); "
        "from ui.draft import TEMPLATE, open_draft; from ui.review import review; "
        f"draft = open_draft(TEMPLATE); found = review(Home.at({str(tmp_path)!r}), draft, draft.shown); "
        "assert not found.problems, found.problems; "
        "print(sorted({'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_backend_never_imports_gradio_and_ui_never_torch():
    for folder, banned in (("backend", ("gradio",)), ("ui", ("torch", "transformers"))):
        for path in (ROOT / folder).rglob("*.py"):
            words = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if "import" in line]
            names = [w[1].split(".")[0] for w in words if len(w) > 1 and w[0] in ("import", "from")]
            assert not set(names) & set(banned), path
