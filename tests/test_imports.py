"""The import rules that keep the parts apart."""

import ast
import subprocess
import sys

import pytest

from backend.paths import PROJECT

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "gradio")


def imported(path):
    """Top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("backend", {"gradio"}), ("ui", {"torch", "transformers", "datasets", "lm_eval"})]
)
def test_no_file_imports_what_its_folder_must_not(folder, forbidden):
    files = list((PROJECT / folder).rglob("*.py"))
    assert files
    assert [(str(f), sorted(found)) for f in files if (found := forbidden & set(imported(f)))] == []


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "modules",
    [
        "backend.schema, backend.cli, backend.jobs.control, backend.jobs.runner, backend.sources.models",
        "backend.chat.client, backend.evaluate.report, backend.evaluate.cache, backend.formats.size",
        "backend.formats.trtllm_checkpoint, backend.formats.modelopt_layout, backend.formats.bits",
        "backend.commands_served, backend.served.client, backend.served.known, backend.served.measure",
        "backend.formats.layouts, backend.quantize.recipe, backend.engines.configurations, backend.jobs.preflight",
    ],
)
def test_what_pages_and_commands_use_loads_nothing_heavy(modules):
    assert loaded_by(f"import {modules}") == []


def test_the_dashboard_loads_gradio_alone():
    assert loaded_by("import ui.site, ui.server") == ["gradio"]


def test_the_core_needs_torch_transformers_and_safetensors_alone():
    blocked = ("pydantic", "datasets", "gradio", "lm_eval", "psutil", "sqlite_utils", "ruamel", "modelopt")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "import backend.quantize.pipeline, backend.formats.loader, backend.formats.writer, backend.formats.size"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)
