"""The scanner of option definitions, on small sources made here, and the real comparison where there is something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.errors import EngineError
from backend.paths import PROJECT
from backend.tensorrt_llm.contract import IMAGE_PACKAGE, SOURCES, Option, copy_sources, differences, scan
from backend.tensorrt_llm.flags import BUILD, TABLES, THROUGHPUT, Flag
from backend.tensorrt_llm.methods import IMAGE

CLICK = """
import click
from click_option_group import optgroup
BACKENDS = ["a"]

@click.command("serve")
@click.argument("model", type=str)
@optgroup.group("Engine", help="x")
@optgroup.option("--tp_size", "--tensor_parallel_size", "tp", type=int, default=1)
@click.option("--streaming", is_flag=True, default=False)
@click.option("--policy", type=click.Choice(["x", "y"]), default="x")
@optgroup.option("--backend", type=ChoiceWithAlias(["p", "t"], {"trt": "t"}))
@click.option("--level", type=click.Choice(severity.keys()))
@click.option("-m", "--short", help="text with --no_such_option inside")
def serve(model): ...

@click.option("--other", type=int)
def another(): ...
"""
ARGPARSE = """
import argparse

def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument('--max_seq_len', '--max_decoder_seq_len', dest='max_seq_len', type=int)
    group = parser.add_argument_group("Logits")
    group.add_argument('--logits_dtype', choices=['float16', 'float32'])
    group.add_argument('--levels', choices=severity.keys())
    group.add_argument('--dry_run', default=False, action='store_true')
    add_plugin_argument(parser)

class PluginConfig:
    _gemm_plugin: str = None
    context_fmha: bool = True
    def method(self): ...
"""


def test_click_options_with_every_spelling_and_only_those_of_the_command():
    assert scan(CLICK, "serve") == {
        "--tp_size": Option("--tp_size"),
        "--tensor_parallel_size": Option("--tensor_parallel_size"),
        "--streaming": Option("--streaming", switch=True),
        "--policy": Option("--policy", choices=("x", "y")),
        "--backend": Option("--backend", choices=("p", "t")),
        "--level": Option("--level"),
        "--short": Option("--short"),
    }


def test_argparse_options_and_the_fields_that_options_are_generated_from():
    assert scan(ARGPARSE, "parse_arguments") == {
        "--max_seq_len": Option("--max_seq_len"),
        "--max_decoder_seq_len": Option("--max_decoder_seq_len"),
        "--logits_dtype": Option("--logits_dtype", choices=("float16", "float32")),
        "--levels": Option("--levels"),
        "--dry_run": Option("--dry_run", switch=True),
    }
    assert set(scan(ARGPARSE, "PluginConfig")) == {"--gemm_plugin", "--context_fmha"}


def click_source(owner: str, flags: list[Flag]) -> str:
    lines = []
    for flag in flags:
        about = ", is_flag=True" if flag.kind == "flag" else ""
        about += f", type=click.Choice({list(flag.choices)!r})" if flag.choices else ""
        lines.append(f"@click.option({flag.name!r}{about})")
    return "\n".join([*lines, f"def {owner}(): ..."]) + "\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Sources that define exactly what the tables have, by click throughout."""
    folder = tmp_path / "tensorrt_llm"
    for tool, files in SOURCES.items():
        about = TABLES["1.2.1"][tool]
        parts = [list(about.common.values()), list(about.flags.values())] if about.common else [[*about.flags.values()]]
        for (file, owner), flags in zip(files, parts, strict=False):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(click_source(owner, flags))
    (folder / "plugin").mkdir()
    (folder / "plugin/plugin.py").write_text("class PluginConfig:\n    nccl_plugin: str = None\n")
    return folder


def test_sources_that_have_all_of_it_agree(package):
    assert differences(package) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("commands/build.py", "'--workers'", "'--jobs'", f"{BUILD} --workers: the source has no such option"),
        (
            "bench/benchmark/throughput.py", "['guaranteed_no_evict', 'max_utilization']", "['max_utilization']",
            f"{THROUGHPUT} --scheduler_policy: the source does not allow guaranteed_no_evict; it has max_utilization",
        ),
        (
            "bench/benchmark/throughput.py", "'--streaming', is_flag=True", "'--streaming'",
            f"{THROUGHPUT} --streaming: the source has it with a value",
        ),
    ],
)  # fmt: skip
def test_a_change_upstream_is_one_line(package, file, old, new, line):
    source = (package / file).read_text()
    assert old in source
    (package / file).write_text(source.replace(old, new))
    assert differences(package) == [line]


def test_a_folder_that_is_no_such_package_is_an_error(package):
    (package / "commands/build.py").write_text("def parse_arguments(): pass\n")
    with pytest.raises(EngineError, match=r"build.py defines no options in parse_arguments"):
        differences(package)
    (package / "commands/build.py").unlink()
    with pytest.raises(EngineError, match="build.py cannot be read"):
        differences(package)


def run_contract(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backend.tensorrt_llm.contract", *args], cwd=PROJECT, capture_output=True, text=True
    )


def test_the_command_tells_by_its_exit_code(package):
    assert run_contract("--package", str(package)).returncode == 0
    source = (package / "commands/serve.py").read_text()
    (package / "commands/serve.py").write_text(source.replace("--max_seq_len", "--max_length"))
    done = run_contract("--package", str(package))
    assert (done.returncode, done.stdout) == (1, "trtllm-serve --max_seq_len: the source has no such option\n")
    assert run_contract("--package", str(package / "none")).returncode == 2


DOCKER = """#!{python}
import json, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "create":
    if sys.argv[-1] != {image!r}:
        sys.exit("Error response from daemon: No such image: " + sys.argv[-1])
    print("c0ffee")
elif sys.argv[1] == "cp":
    place, _, path = sys.argv[2].partition(":")
    shutil.copyfile({package!r} + path.removeprefix({inside!r}), sys.argv[3])
"""


def test_an_image_is_read_without_running_or_pulling_it(package, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text(DOCKER.format(python=sys.executable, image=IMAGE, package=str(package), inside=IMAGE_PACKAGE))
    docker.chmod(0o755)
    done = run_contract("--image", IMAGE, "--docker", str(docker))
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls.jsonl").read_text()
    assert '["create", "--pull", "never", ' in calls
    assert calls.endswith('["rm", "--force", "c0ffee"]\n')
    assert '"run"' not in calls
    with pytest.raises(EngineError, match="No such image: other"):
        copy_sources("other", tmp_path / "none", str(docker))


@pytest.mark.tensorrt_llm
def test_the_tables_agree_with_the_present_tensorrt_llm(tmp_path):
    """Set QUANTDECK_TENSORRT_LLM to the folder of an installed tensorrt_llm; else the pinned image is read."""
    package = Path(os.environ.get("QUANTDECK_TENSORRT_LLM") or tmp_path)
    if package == tmp_path:
        copy_sources(IMAGE, package)
    assert differences(package) == []
