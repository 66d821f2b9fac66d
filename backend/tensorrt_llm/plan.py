"""What is run in TensorRT-LLM for one result, as a list of steps whose paths are those of this machine.

An engine, or a server, is made for at least what the measurement needs: a batch of `concurrency` requests, prompts of
`prompt_tokens`. Perplexity needs the logits of every prompt token, which only an engine made for that returns and
which would slow the measured one down; so it has a second engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from backend.errors import ConfigError
from backend.tensorrt_llm.command import Value
from backend.tensorrt_llm.flags import BUILD, SERVE, THROUGHPUT
from backend.tensorrt_llm.methods import ENGINE, MODES, PYTORCH

BUILD_STAGE, BENCH_STAGE, PERPLEXITY_STAGE = "trtllm_build", "trtllm_bench", "trtllm_perplexity"
BASELINE, QUANTIZED = "baseline", "quantized"
PYTHON = "python"
"""The tool of a step that runs a script with TensorRT-LLM's own Python."""
DATASET, OPTIONS, SCRIPT, WINDOWS = "bench_dataset.jsonl", "llm_options.yaml", "perplexity_script.py", "windows.json"
"""Files in a plan's `work`: requests, options of TensorRT-LLM, the script that measures perplexity, and its text."""
TRT_CHECKPOINT = "tensorrt_llm_checkpoint"
"""Name of the engine's checkpoint inside a published export."""
SINGLE_REQUESTS = 16
"""Requests of the run that has one at a time; there are fewer if the run at full load has fewer."""

INSIDE = {
    "model": "/model", "trt_checkpoint": "/trt_checkpoint", "checkpoint": "/checkpoint", "engine": "/engine",
    "work": "/scratch",
}  # fmt: skip
"""Folder of a plan -> where a container sees it."""


@dataclass(frozen=True)
class RunPlan:
    """One result and how it is run.

    Attributes:
        method: Name in `methods.METHODS`; None: the 16-bit export.
        mode: `pytorch` or `tensorrt`.
        dtype: 16-bit type of what is not quantized.
        tp_size: GPUs that share every layer.
        max_batch_size: Sequences at a time.
        max_input_len: Tokens of a prompt.
        max_output_len: Tokens of an answer.
        max_beam_width: Beams.
        max_num_tokens: Tokens of a step; None: TensorRT-LLM's own.
        max_prompt_embedding_table_size: Rows for prompt tuning, engines only.
        kv_cache_fraction: Of the free GPU memory.
        prompt_tokens: Per request of the measurement.
        new_tokens: Per request of the measurement.
        requests: Of the run at full load.
        concurrency: Requests at a time at full load.
        model: Folder of the 16-bit model.
        checkpoint: Folder of the unified Hugging Face export.
        trt_checkpoint: Folder of the TensorRT-LLM checkpoint; None if there is none.
        work: Folder for reports and temporary files.
        engine: Folder for the built engine.
        perplexity: Whether perplexity is measured in TensorRT-LLM.
    """

    method: str | None
    mode: str
    dtype: str
    tp_size: int
    max_batch_size: int
    max_input_len: int
    max_output_len: int
    max_beam_width: int
    max_num_tokens: int | None
    max_prompt_embedding_table_size: int
    kv_cache_fraction: float
    prompt_tokens: int
    new_tokens: int
    requests: int
    concurrency: int
    model: Path
    checkpoint: Path
    trt_checkpoint: Path | None
    work: Path
    engine: Path
    perplexity: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"found {self.mode!r}; it must be one of {', '.join(MODES)}", key="mode", value=self.mode)
        if self.mode == ENGINE and self.trt_checkpoint is None:
            raise ConfigError("an engine is built from a TensorRT-LLM checkpoint; none was given", key="trt_checkpoint")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunPlan:
        """The plan that `to_json` wrote.

        Raises:
            ConfigError: If a field is missing, unknown, or no plan can have its value.
        """
        names = {one.name for one in fields(cls)}
        if wrong := sorted(names ^ values.keys()):
            raise ConfigError(f"the plan has {sorted(values)}; missing or unknown: {', '.join(wrong)}", key=wrong[0])
        known: dict[str, Any] = {k: Path(v) if k in INSIDE and v is not None else v for k, v in values.items()}
        return cls(**known)

    @property
    def batch_size(self) -> int:
        """Sequences at a time that the measurement needs."""
        return max(self.max_batch_size, self.concurrency)

    @property
    def input_len(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.max_input_len, self.prompt_tokens)

    @property
    def seq_len(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(self.max_input_len + self.max_output_len, self.prompt_tokens + self.new_tokens)

    @property
    def num_tokens(self) -> int | None:
        """Tokens of a step: no fewer than a prompt has."""
        return None if self.max_num_tokens is None else max(self.max_num_tokens, self.input_len)

    @property
    def has_baseline(self) -> bool:
        """Whether the 16-bit model is measured too: on the same backend, or the comparison would not be one."""
        return self.method is not None and self.mode == PYTORCH

    @property
    def logits_engine(self) -> Path:
        """Folder of the engine that perplexity is measured on."""
        return self.work / "engine_logits"


@dataclass(frozen=True)
class Step:
    """One program to run.

    Attributes:
        name: Unique in its plan.
        stage: Under which its progress is told.
        which: `baseline` or `quantized`.
        title: For people.
        tool: Its name in `flags.TABLES`, or `PYTHON`.
        values: Options of a tool; paths are this machine's.
        args: Arguments of a script.
        reads: Names of the plan's folders that it reads.
        writes: Names of the plan's folders that it writes.
        output: The report that it leaves.
    """

    name: str
    stage: str
    which: str
    title: str
    tool: str
    values: Mapping[str, Value] = field(default_factory=dict)
    args: tuple[str | Path, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("work",)
    output: Path | None = None


def steps(plan: RunPlan) -> list[Step]:
    """Everything to run, in order."""
    models = (*([BASELINE] if plan.has_baseline else []), QUANTIZED)
    made = [_build(plan, logits=False)] if plan.mode == ENGINE else []
    for which in models:
        made += [_bench(plan, which, single=True), _bench(plan, which, single=False)]
    if plan.perplexity:
        made += [_build(plan, logits=True)] if plan.mode == ENGINE else []
        made += [_perplexity(plan, which) for which in models]
    return made


def serve_step(plan: RunPlan, port: int) -> Step:
    """The server of the result: OpenAI's protocol on this machine's loopback."""
    engine = plan.mode == ENGINE
    values: dict[str, Value] = {
        "MODEL": plan.engine if engine else plan.checkpoint,
        "--tokenizer": plan.checkpoint if engine else None,
        "--host": "127.0.0.1",
        "--port": port,
        "--backend": plan.mode,
        "--max_batch_size": plan.batch_size,
        "--max_seq_len": plan.seq_len,
        "--max_num_tokens": plan.num_tokens,
        "--tp_size": plan.tp_size,
        "--kv_cache_free_gpu_memory_fraction": plan.kv_cache_fraction,
    }
    reads = ("checkpoint", "engine") if engine else ("checkpoint",)
    return Step("serve", "trtllm_serve", QUANTIZED, "serving the result", SERVE, values, reads=reads)


def _build(plan: RunPlan, *, logits: bool) -> Step:
    """How the engine is built; or the one that returns the logits of its prompts."""
    values: dict[str, Value] = {
        "--checkpoint_dir": plan.trt_checkpoint,
        "--output_dir": plan.logits_engine if logits else plan.engine,
        # FP8 has matrix products of its own; the plugin is for the other types.
        "--gemm_plugin": None if plan.method == "fp8" else "auto",
        "--max_batch_size": 1 if logits else plan.batch_size,
        "--max_input_len": plan.input_len,
        "--max_seq_len": plan.seq_len,
        "--max_beam_width": 1 if logits else plan.max_beam_width,
        "--max_num_tokens": plan.input_len if logits else plan.num_tokens,
        "--max_prompt_embedding_table_size": None if logits else plan.max_prompt_embedding_table_size or None,
        "--workers": plan.tp_size,
        "--gather_context_logits": logits,
    }
    title = "building the engine that returns logits" if logits else "building the engine"
    return Step(
        "build_logits" if logits else "build", BUILD_STAGE, QUANTIZED, title, BUILD, values, reads=("trt_checkpoint",),
        writes=("work",) if logits else ("engine", "work"),
    )  # fmt: skip


def _source(plan: RunPlan, which: str) -> tuple[str, Path]:
    """Name and place of the folder that a model and its tokenizer lie in."""
    return ("model", plan.model) if which == BASELINE else ("checkpoint", plan.checkpoint)


def _bench(plan: RunPlan, which: str, *, single: bool) -> Step:
    """How speed is measured: one request at a time, or at full load."""
    engine = plan.mode == ENGINE
    (source, folder), name = _source(plan, which), f"{which}_{'single' if single else 'load'}"
    output = plan.work / f"{name}.json"
    values: dict[str, Value] = {
        "--model": "local",
        "--model_path": folder,
        "--workspace": plan.work / "bench",
        "--backend": plan.mode,
        "--engine_dir": plan.engine if engine else None,
        "--dataset": plan.work / DATASET,
        "--extra_llm_api_options": plan.work / OPTIONS,
        "--num_requests": min(plan.requests, SINGLE_REQUESTS) if single else plan.requests,
        "--concurrency": 1 if single else plan.concurrency,
        # trtllm-bench refuses --max_seq_len beside an engine, which has its own sizes.
        "--max_seq_len": None if engine else plan.seq_len,
        "--max_batch_size": None if engine else plan.batch_size,
        "--max_num_tokens": None if engine else plan.num_tokens,
        "--tp": None if engine else plan.tp_size,
        "--kv_cache_free_gpu_mem_fraction": plan.kv_cache_fraction,
        # Only then does the report tell the time of the first token from that of the others.
        "--streaming": True,
        "--report_json": output,
    }
    title = f"{which}: {'one request' if single else f'{plan.concurrency} requests'} at a time"
    reads = (source, "engine") if engine else (source,)
    return Step(name, BENCH_STAGE, which, title, THROUGHPUT, values, reads=reads, output=output)


def _perplexity(plan: RunPlan, which: str) -> Step:
    """How perplexity is measured, on the prompts' logits."""
    engine = plan.mode == ENGINE
    (source, folder), name = _source(plan, which), f"{which}_perplexity"
    output = plan.work / f"{name}.json"
    args = (
        plan.work / SCRIPT, plan.work / WINDOWS, output, "--model", plan.logits_engine if engine else folder,
        "--backend", plan.mode, "--tp", str(plan.tp_size), "--kv-cache-fraction", str(plan.kv_cache_fraction),
    )  # fmt: skip
    return Step(
        name, PERPLEXITY_STAGE, which, f"{which}: perplexity", PYTHON, args=args, reads=(source,), output=output
    )
