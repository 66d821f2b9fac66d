"""The stage that runs a result in TensorRT-LLM: builds its engine, measures its speed, memory and perplexity.

Run as `python -m backend.engines.trtllm_run REQUEST.json RESULT.json` by a job's runner. Imports no torch: everything
that needs it runs where TensorRT-LLM is. Stopped by SIGINT or SIGTERM, it ends its containers too.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.errors import ConfigError, EngineError
from backend.event_stream import EventWriter
from backend.files import required
from backend.process import adopt_orphans
from backend.tensorrt_llm.executors import DockerExecutor, EnvironmentExecutor, Executor
from backend.tensorrt_llm.machine import stored_bytes
from backend.tensorrt_llm.methods import ENGINE
from backend.tensorrt_llm.plan import (
    BASELINE,
    BENCH_STAGE,
    BUILD_STAGE,
    DATASET,
    OPTIONS,
    PERPLEXITY_STAGE,
    QUANTIZED,
    SCRIPT,
    WINDOWS,
    RunPlan,
    Step,
    steps,
)
from backend.tensorrt_llm.process import MemoryWatch, run_process
from backend.tensorrt_llm.report import read_bench_report, read_perplexity

LIMITS_S = {BUILD_STAGE: 4 * 3600.0, BENCH_STAGE: 2 * 3600.0, PERPLEXITY_STAGE: 4 * 3600.0}
MESSAGE_S = 1.0
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,100}")


def run(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Run the steps of a plan.

    Args:
        request: `job` (a unique name, which its containers get), `plan` (`RunPlan.to_json`), `inputs_dir` (where
            `inputs.write_inputs` wrote; the files are copied to the plan's `work`), `executor` (`environment` or
            `docker`), `gpus` (UUIDs), `environment` (folder) or `image` and `docker`; optionally `limits_s` (seconds,
            by stage) and `configuration` (for the events).
        events: Takes progress events of the stages `trtllm_build`, `trtllm_bench` and `trtllm_perplexity`.

    Returns:
        `baseline` (None if the plan has none) and `quantized`, each with `weight_bytes`, `single` and `load` (see
        `report.read_bench_report`, and `idle_bytes` and `peak_bytes`: GPU memory before, and the most that was taken
        beyond it; None if the driver does not tell) and `perplexity` (see `report.read_perplexity`; None if it is not
        measured); `timings` (seconds, by step), `versions` and `commands` (argv lists).

    Raises:
        ConfigError: If the request is wrong.
        EngineError: If a program fails, takes too long, or does not leave what it should.
    """
    adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = RunPlan.from_json(required(request, "plan"))
    name = _checked_name(required(request, "job"))
    executor = executor_of(request)
    refuse_own_code(plan)
    copy_inputs(Path(required(request, "inputs_dir")), plan)
    made = _Results(plan)
    todo = steps(plan)
    limits = {**LIMITS_S, **request.get("limits_s", {})}
    for number, step in enumerate(todo):
        call = f"{name}-{step.name}"
        argv = executor.argv(plan, step, call)
        made.commands.append(argv)
        telling = _Telling(events, step, number, len(todo), request.get("configuration"))
        _make_room(step)
        watch, started = MemoryWatch(executor.gpus), time.monotonic()
        try:
            run_process(
                argv, executor, call, limit_s=limits[step.stage], on_line=telling.line, on_poll=watch.sample
            )  # fmt: skip
        except EngineError as error:
            raise EngineError(f"{step.title}: {error.message}") from error
        made.timings[step.name] = round(time.monotonic() - started, 3)
        made.take(step, watch)
        telling.tell("done", number + 1)
    return made.result(executor)


def executor_of(request: Mapping[str, Any]) -> Executor:
    """Where a request wants its programs to run.

    Raises:
        ConfigError: If it does not say.
    """
    uuids = tuple(required(request, "gpus"))
    if not uuids:
        raise ConfigError("found no GPU; TensorRT-LLM runs on NVIDIA GPUs only", key="gpus")
    kind = required(request, "executor")
    if kind == "environment":
        return EnvironmentExecutor(Path(required(request, "environment")), uuids)
    if kind == "docker":
        return DockerExecutor(required(request, "image"), uuids, request.get("docker", "docker"))
    raise ConfigError(f"found {kind!r}; it must be environment or docker", key="executor", value=kind)


def copy_inputs(source: Path, plan: RunPlan) -> None:
    """Bring the programs' input files to where they may write beside them.

    Raises:
        ConfigError: If one is missing.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    for name in (DATASET, OPTIONS, *((SCRIPT, WINDOWS) if plan.perplexity else ())):
        if not (source / name).is_file():
            raise ConfigError(f"there is no {name} in {source}; the stage that exports writes it", key="inputs_dir")
        if source != plan.work:
            shutil.copyfile(source / name, plan.work / name)


def refuse_own_code(plan: RunPlan) -> None:
    """Refuse folders that name code of their own: `trtllm-bench` runs it whether one wants that or not.

    Raises:
        ConfigError: With the file.
    """
    for folder in (plan.model, plan.checkpoint):
        for path in (folder / "config.json", folder / "tokenizer_config.json"):
            if not path.is_file():
                continue
            if "auto_map" in json.loads(path.read_text(encoding="utf-8")):
                raise ConfigError(f"{path} names code of the model's own (auto_map), which TensorRT-LLM would run")


class _Results:
    """What the steps have shown so far."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.commands: list[list[str]] = []
        self.timings: dict[str, float] = {}
        self._measured: dict[str, dict[str, Any]] = {}
        self._version = ""

    def take(self, step: Step, watch: MemoryWatch) -> None:
        """Read what a step left.

        Raises:
            EngineError: If it is not what the step should leave.
        """
        if step.stage == BUILD_STAGE:
            folder = step.values["--output_dir"]
            assert isinstance(folder, Path)
            if not (folder / "config.json").is_file() or not stored_bytes(folder):
                raise EngineError(f"{step.title}: the program ended well, and there is no engine in {folder}")
            return
        assert step.output is not None
        measured = self._measured.setdefault(step.which, {})
        if step.stage == PERPLEXITY_STAGE:
            windows = json.loads((self.plan.work / WINDOWS).read_text(encoding="utf-8"))["windows"]
            measured["perplexity"] = read_perplexity(step.output, [len(window["counted"]) for window in windows])
            return
        requests = step.values["--num_requests"]
        assert isinstance(requests, int)
        report = read_bench_report(
            step.output, requests=requests, prompt_tokens=self.plan.prompt_tokens, new_tokens=self.plan.new_tokens
        )
        if step.which == QUANTIZED and self.plan.method and not report["quantization"]:
            # a checkpoint whose scales are not understood is loaded, and its codes are taken for weights
            raise EngineError(f"{step.title}: {step.output.name} reports no quantization; it was run as 16 bit")
        self._version = report["version"]
        load = "single" if step.values["--concurrency"] == 1 and "single" not in measured else "load"
        measured[load] = {**report, "idle_bytes": watch.before, "peak_bytes": watch.taken}

    def result(self, executor: Executor) -> dict[str, Any]:
        """All of it."""
        plan = self.plan
        folders = {BASELINE: plan.model, QUANTIZED: plan.engine if plan.mode == ENGINE else plan.checkpoint}
        models: dict[str, Any] = {
            which: {"weight_bytes": stored_bytes(folder), "perplexity": None, **self._measured[which]}
            if which in self._measured
            else None
            for which, folder in folders.items()
        }
        versions = {"tensorrt_llm": self._version, **executor.about()}
        return {**models, "timings": self.timings, "versions": versions, "commands": self.commands}


class _Telling:
    """Progress events of a step: what it is, and the last line that its program wrote."""

    def __init__(self, events: EventWriter, step: Step, number: int, total: int, configuration: str | None) -> None:
        self._events, self._step, self._number, self._total = events, step, number, total
        self._about = {"configuration": configuration} if configuration else {}
        self._next = time.monotonic() + MESSAGE_S
        self.tell("", number)

    def tell(self, more: str, done: int) -> None:
        """Send an event."""
        message = f"{self._step.title}: {more}" if more else self._step.title
        self._events.note(stage=self._step.stage, step=done, total=self._total, message=message, **self._about)

    def line(self, text: str) -> None:
        """Pass on a line, no more than one a second."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + MESSAGE_S
            self.tell(text[:160], self._number)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"found {name!r}; letters, digits, '-', '_' and '.' can name a container", key="job")
    return name


def _make_room(step: Step) -> None:
    """Make the folders that a step writes to; take away what an earlier attempt left, which must not be read as new."""
    for name in ("--workspace", "--output_dir"):
        if isinstance(folder := step.values.get(name), Path):
            folder.mkdir(parents=True, exist_ok=True)
    if step.output is not None:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        step.output.unlink(missing_ok=True)
    if isinstance(folder := step.values.get("--output_dir"), Path):
        for old in (*folder.glob("*.engine"), folder / "config.json"):
            old.unlink(missing_ok=True)


if __name__ == "__main__":
    run_child(run)
