"""What the job page says about loading a model: what can be tried here is run as it stands there, the rest is right."""

from __future__ import annotations

import argparse
import contextlib
import html.parser
import io
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from lm_eval._cli.utils import MergeDictAction

from backend.demo import MODEL_DIR
from backend.files import sha256_file
from backend.quantize.recipe import Recipe, Scheme
from tests.conftest import demo_text
from tests.formats.models import write
from ui.loadview import load_html
from ui.loadways import GUIDES_TASK, tasks_of, ways, weight_bits
from ui.madeview import made, sums_list

NASTY = 'it\'s a "4 bit" model, (w4) & $HOME'
EVIL = "<script>alert(1)</script>"


class Shown(html.parser.HTMLParser):
    """The commands of a page by program, and what its buttons copy by what they say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.commands: dict[str, str] = {}
        self.copied: dict[str, str] = {}
        self._summary = self._within = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._within = tag
        named = dict(attributes)
        if tag == "summary":
            self._summary = ""
        if "data-copy" in named:
            self.copied[named["title"]] = named["data-copy"]

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within == "summary":
            self._summary += data
        if self._within == "pre":
            self.commands[self._summary] = self.commands.get(self._summary, "") + data


def packed(*groups, **more):
    """A `quantization_config` of compressed-tensors; a group is (bits, symmetric, targets)."""
    found = {
        f"group_{i}": {"weights": {"num_bits": bits, "symmetric": symmetric}, "targets": targets}
        for i, (bits, symmetric, targets) in enumerate(groups)
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": found, **more}


def found(stated, folder=Path("/m"), **options):
    return {way.program: way for way in ways(folder, stated, **options)}


def lm_eval_reads(argument):
    """The dictionary that lm_eval makes of a model argument."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_args", nargs="+", action=MergeDictAction)
    return parser.parse_args(["--model_args", argument]).model_args


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The demo model, rounded to 4 bits, in a folder whose name has all that has to be quoted."""
    folder = write(MODEL_DIR, tmp_path_factory.mktemp("models") / NASTY, Recipe("w4", Scheme("RTN", 4, 128, True)))
    for file in MODEL_DIR.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def shown(checkpoint) -> Shown:
    """What the page shows of it."""
    entry = {"name": "w4", "label": "4 bit", "artefact": str(checkpoint)}
    return Shown(made("0123", [entry], (("quantdeck_demo", 0, 2),)))


@pytest.mark.parametrize("program", ["Python (Quantdeck)", "transformers"])
def test_what_is_shown_loads_the_model_and_answers(shown, program):
    if program == "transformers":
        pytest.importorskip("compressed_tensors")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(shown.commands[program], program, "exec"), {})
    assert "The capital of France is" in out.getvalue() and len(out.getvalue().split()) > 8


def test_lm_eval_measures_what_is_shown(shown, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    from lm_eval import tasks
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))  # 10 s to read
    monkeypatch.setattr(sys, "argv", shlex.split(shown.commands["lm_eval"]))
    cli_evaluate()
    table = capsys.readouterr().out.replace(" ", "")
    assert "|quantdeck_demo|" in table and "limit:2.0" in table and "num_fewshot:0" in table


def test_the_list_of_checksums_is_one_that_sha256sum_checks(checkpoint):
    files = {name: {"sha256": sha256_file(checkpoint / name)} for name in ("config.json", "model.safetensors")}
    entry = {"name": "w4", "label": "", "artefact": str(checkpoint), "manifest": {"files": files}}
    copied = Shown(made("0123", [entry])).copied
    assert copied["Copy the SHA-256 of config.json"] == files["config.json"]["sha256"]
    assert copied["Copy the path of the folder"] == str(checkpoint)
    found = subprocess.run(
        ["sha256sum", "--strict", "-c"], input=copied["Copy all checksums as a list for sha256sum -c"],
        capture_output=True, text=True, cwd=checkpoint,
    )  # fmt: skip
    assert found.returncode == 0 and found.stdout.splitlines() == ["config.json: OK", "model.safetensors: OK"]
    assert sums_list({"a\nb": "0" * 64, "c": "1" * 64}) == f"{'1' * 64}  c\n"


def test_what_is_typed_into_a_shell_names_the_folder_and_nothing_else():
    folder = Path("/models") / NASTY
    for stated in ({}, {"quant_method": "awq", "bits": 4}, packed((4, True, ["Linear"])), {"quant_method": "aqlm"}):
        for way in ways(folder, stated):
            if way.program in ("vLLM", "TensorRT-LLM") and way.command:
                assert shlex.split(way.command)[-1] == str(folder)
            if way.program == "lm_eval":
                (argument,) = (word for word in shlex.split(way.command) if word.startswith("pretrained="))
                assert lm_eval_reads(argument)["pretrained"] == str(folder)
    assert EVIL not in load_html(ways(Path(EVIL), {"quant_method": "modelopt", "quant_algo": EVIL}))


def test_autoawq_files_need_gptqmodel_and_gemv_is_not_for_vllm():
    gemm = found({"quant_method": "awq", "bits": 4, "version": "gemm"})
    assert "pip install gptqmodel" in gemm["transformers"].remark and gemm["vLLM"].command == "vllm serve /m"
    gemv = found({"quant_method": "awq", "bits": 4, "version": "gemv"})
    assert gemv["vLLM"].command == "" and "VERSION: GEMM" in gemv["vLLM"].remark
    assert found({"bits": 4})["vLLM"].command  # as older files state it


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        (packed((4, False, ["Linear"])), ""),
        (packed((8, True, ["Linear"])), ""),
        (packed((3, True, ["Linear"])), "these have 3"),
        (packed((2, True, ["a.q_proj"]), (4, True, ["b.q_proj"])), "these have 2."),
        (packed((8, False, ["Linear"])), "without zero points"),
        (packed((4, True, ["l.q_proj", "l.k_proj"]), (8, True, ["l.v_proj"])), "q_proj, k_proj, v_proj"),
        (packed((4, True, ["l.q_proj", "l.k_proj", "l.v_proj"]), (8, True, ["l.o_proj"])), ""),
        (packed((4, True, ["Linear"]), ignore=["lm_head", "l.mlp.gate_proj"]), "gate_proj, up_proj"),
        (packed((4, True, ["Linear"]), ignore=["lm_head", "l.mlp.gate_proj", "l.mlp.up_proj"]), ""),
        (packed((4, True, None)), ""),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, ""),
    ],
)
def test_vllm_is_named_where_its_kernels_fit(stated, why):
    way = found(stated)["vLLM"]
    assert bool(way.command) == (not why) and why in way.remark
    assert found(stated)["transformers"].command and found(stated)["lm_eval"].command


def test_four_bit_floats_load_in_bfloat16():
    ways = found({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    assert 'dtype="bfloat16"' in ways["transformers"].command and "dtype=bfloat16" in ways["lm_eval"].command


def test_aqlm_runs_on_one_thread_and_not_in_vllm():
    ways = found({"quant_method": "aqlm"})
    assert ways["vLLM"].command == "" and ways["lm_eval"].command.startswith("NUMBA_NUM_THREADS=1 lm_eval")
    code = ways["transformers"].command
    assert code.index("NUMBA_NUM_THREADS") < code.index("import torch") < code.index("import AutoModel")
    compile(code, "shown", "exec")


def test_modelopt_is_for_tensorrt_llm(tmp_path):
    stated = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    ways = found(stated, tmp_path)
    assert not any(ways[program].command for program in ("transformers", "vLLM", "lm_eval"))
    assert "answers nonsense" in ways["transformers"].remark
    assert ways["TensorRT-LLM"].command == f"trtllm-serve {tmp_path}"
    (tmp_path / "run_tensorrt_llm.sh").write_text("#!/bin/sh\n")
    script = str(tmp_path / "run_tensorrt_llm.sh")
    assert found(stated, tmp_path)["TensorRT-LLM"].command.splitlines()[:2] == [f"sh {script}", f"sh {script} serve"]
    int8 = {"quant_method": "modelopt", "quant_algo": "W8A16"}
    assert "trtllm-serve" not in found(int8, tmp_path)["TensorRT-LLM"].command
    assert found(int8, tmp_path / "no")["TensorRT-LLM"].command == ""
    assert found({"quant_method": "modelopt", "quant_algo": "FP8"})["vLLM"].command == "vllm serve /m"


def test_dense_models_load_everywhere():
    assert all(way.command for way in ways(Path("/m"), {}))


def test_lm_eval_takes_the_tasks_of_the_job():
    text = demo_text(EVALUATION={"TASKS": ["arc_challenge:25", "gsm8k:5:250"]})
    assert tasks_of(text) == (("arc_challenge", 25, None), ("gsm8k", 5, 250))
    first, second = found(packed((4, True, ["Linear"])), tasks=tasks_of(text))["lm_eval"].command.splitlines()
    assert first.endswith("--tasks arc_challenge --num_fewshot 25")
    assert second.endswith("--tasks gsm8k --num_fewshot 5 --limit 250")
    assert tasks_of(demo_text(EVALUATION={"TASKS": []})) == tasks_of("no: [yaml") == GUIDES_TASK


@pytest.mark.parametrize(
    "stated", [{"config_groups": 5}, {"config_groups": {"a": 5}}, {"bits": "x"}, {"bits": [4]}, {"ignore": 3}]
)
def test_damaged_settings_break_nothing(stated):
    assert load_html(ways(Path("/m"), {"quant_method": "compressed-tensors", **stated}))
    assert weight_bits(stated) == set()


def test_a_folder_that_is_gone_offers_nothing_to_load():
    html = made("0123", [{"name": "w4", "label": "", "artefact": "/gone"}])
    assert "was removed" in html and "from_pretrained" not in html
