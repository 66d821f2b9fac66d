"""Two processes that talk through gloo on the loopback interface do what one does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.errors import CheckpointError, ConfigError
from backend.formats.additive_reader import read_additive, read_unquantized
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.tune.report import StepReport
from tests.formats.crash import digest
from tests.quantize.aqlm.tune.tiny import quantized, tuned
from tests.quantize.models import make_model

ROOT = Path(__file__).parents[4]
PROGRAM = """
import os, sys, time
from pathlib import Path
from tests.quantize.aqlm.tune.tiny import tuned
base, start, out = map(Path, sys.argv[1:4])
tuned(base, start, out, processes=2, checkpoint_dir=out / "checkpoint", max_epochs=200,
      on_step=lambda step: print(step.step, flush=True))
"""


def assert_alike(one: Path, other: Path, start: Path) -> None:
    """The same codes but for a few near ties; the same numbers relative to how far they moved from the start."""
    first, second, before = (dict(read_additive(folder)) for folder in (one, other, start))
    differing = sum(int((w.codes != second[n].codes).any(-1).sum()) for n, w in first.items())
    changed = sum(int((w.codes != before[n].codes).any(-1).sum()) for n, w in first.items())
    assert differing <= 0.05 * changed
    rest, others, unmoved = (dict(read_unquantized(folder)) for folder in (one, other, start))
    for name, tensor in rest.items():
        moved = (tensor.float() - unmoved[name].float()).norm()
        assert (tensor.float() - others[name].float()).norm() < 0.02 * moved
    for name, weight in first.items():
        moved = (weight.dequantize() - before[name].dequantize()).norm()
        assert (weight.dequantize() - second[name].dequantize()).norm() < 0.1 * moved


@pytest.mark.parametrize(
    "settings", [{}, {"minimize_sync": True, "gradient_checkpointing": True, "lamb": False, "lr": 1e-3}]
)
def test_two_processes_are_like_one(base: Path, start: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    told: list[StepReport] = []
    stages: list[str] = []
    options = {"max_epochs": 2, "code_lr": 0.1, "microbatch_size": 2, **settings}
    one = tuned(base, start, tmp_path / "one", **options)
    two = tuned(base, start, tmp_path / "two", processes=2, on_step=told.append, on_stage=stages.append, **options)
    assert (one.processes, two.processes) == (1, 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
    assert [m.divergence for m in two.validation] == pytest.approx([m.divergence for m in one.validation], rel=1e-3)
    assert sum(two.changed) == pytest.approx(sum(one.changed), rel=0.05) and sum(one.changed) > 0.001
    assert_alike(tmp_path / "one", tmp_path / "two", start)
    assert [step.step for step in told] == list(range(13))
    assert stages == ["teacher", "load", "tune", "save"]


def test_rows_that_cannot_be_shared_out_evenly(tmp_path: Path) -> None:
    """48 and 80 rows over three processes, tied embeddings, biases, and Linears that stay."""
    sizes = {"hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 80}
    source = make_model(tmp_path / "base", "qwen2", tie_word_embeddings=True, **sizes)
    folder = quantized(source, tmp_path / "start", AdditiveScheme(2, 3, 16))
    options: dict[str, Any] = {"max_epochs": 1, "batch_size": 12, "microbatch_size": 2, "code_lr": 0.1}
    one = tuned(source, folder, tmp_path / "one", **options)
    three = tuned(source, folder, tmp_path / "three", processes=3, **options)
    assert three.losses == pytest.approx(one.losses, rel=1e-3)
    assert_alike(tmp_path / "one", tmp_path / "three", folder)


def test_16_bit_weights_are_for_one_process(base: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="master_dtype: found 'bfloat16' with 2 processes"):
        tuned(base, start, tmp_path, processes=2, master_dtype="bfloat16")


def test_an_error_of_a_process_comes_out_as_its_own(base: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block_type: found 'GPTBlock'.*LlamaDecoderLayer") as error:
        tuned(base, start, tmp_path / "out", processes=2, block_type="GPTBlock")
    assert (error.value.key, error.value.value) == ("block_type", "GPTBlock")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in start.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 5000 if path.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        tuned(base, broken, tmp_path / "out", processes=2)


def start_program(base: Path, start: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(base), str(start), str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in family(int(child)))]


def listening(pid: int) -> set[str]:
    """Local addresses, hexadecimal, on which a process accepts connections."""
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    inodes = {match.group(1) for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_killed_processes_go_on_leave_no_orphans_and_are_heard_by_nobody_else(
    base: Path, start: Path, tmp_path: Path
) -> None:
    with start_program(base, start, tmp_path) as program:
        assert program.stdout is not None
        while program.stdout.readline().strip() != "7":
            assert program.poll() is None
        pids = family(program.pid)
        assert len(pids) == 4  # itself, torchrun, two workers
        addresses = set().union(*(listening(pid) for pid in pids))
        assert addresses == {"0100007F"}  # 127.0.0.1
        program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with start_program(base, start, tmp_path) as program:
        assert program.stdout is not None
        assert 6 < int(program.stdout.readline()) <= 12  # the last state was that of step 6 or a later one
        program.send_signal(signal.SIGKILL)


def test_a_resumed_run_of_two_processes_gives_the_same_bytes(base: Path, start: Path, tmp_path: Path) -> None:
    def interrupt(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"max_epochs": 2, "code_lr": 0.1, "processes": 2}
    tuned(base, start, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        tuned(base, start, tmp_path / "out", checkpoint_dir=tmp_path / "checkpoint", on_step=interrupt, **options)
    resumed = tuned(base, start, tmp_path / "out", checkpoint_dir=tmp_path / "checkpoint", **options)
    assert resumed.resumed_at >= 4
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_more_processes_than_devices(base: Path, start: Path, tmp_path: Path) -> None:
    assert not torch.cuda.is_available() or torch.cuda.device_count() < 64
    with pytest.raises(Exception, match="64 processes need as many CUDA devices"):
        tuned(base, start, tmp_path, processes=64, batch_size=64, train=torch.zeros(64, 8).long(), device="cuda")
