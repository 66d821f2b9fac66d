"""What is run in TensorRT-LLM for one result, as a list of steps whose paths are those of this machine.

An engine is built for at least what the measurement needs: a batch of `concurrency` requests, prompts of
`prompt_tokens`. Its perplexity needs the logits of every prompt token, which only an engine made for that returns and
which would slow the measured one down; so it has a second engine.

Source of the data set's format: tensorrt_llm/bench/utils/data.py (`task_id`, `input_ids`, `output_tokens`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, DataError
from backend.tensorrt_llm.command import Value
from backend.tensorrt_llm.flags import BUILD, SERVE, THROUGHPUT
from backend.tensorrt_llm.methods import ENGINE, MODES, PYTORCH

BUILD_STAGE, BENCH_STAGE, PERPLEXITY_STAGE = "trtllm_build", "trtllm_bench", "trtllm_perplexity"
BASELINE, QUANTIZED = "baseline", "quantized"
DATASET = "bench_dataset.jsonl"
TRT_CHECKPOINT = "tensorrt_llm_checkpoint"
"""Name of the engine's checkpoint inside a published export."""
SINGLE_REQUESTS = 16
"""Requests of the run that has one at a time; there are fewer if the run at full load has fewer."""
PERPLEXITY = "perplexity"


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
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ values.keys()):
            raise ConfigError(f"the plan has {sorted(values)}; missing or unknown: {', '.join(wrong)}", key=wrong[0])
        paths = {k: Path(v) for k, v in values.items() if k in FOLDERS and v is not None}
        return cls(**{**values, **paths})

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


FOLDERS = ("model", "checkpoint", "trt_checkpoint", "work", "engine")


@dataclass(frozen=True)
class Step:
    """One program to run.

    Attributes:
        stage: Under which its progress is told.
        model: `baseline` or `quantized`.
        title: For people.
        tool: Its name in `flags.TABLES`, or `perplexity`.
        values: Its options; paths are this machine's.
        report: The file that it writes; None: a folder, or nothing.
    """

    stage: str
    model: str
    title: str
    tool: str
    values: Mapping[str, Value]
    report: Path | None = None


def steps(plan: RunPlan, *, window: int | None = None, baseline: bool = True) -> list[Step]:
    """Everything to run, in order.

    Args:
        plan: The result.
        window: Tokens of the longest window whose perplexity is measured; None: it is not.
        baseline: Whether to measure the 16-bit model too, if the plan has it as a baseline.
    """
    models = [BASELINE] if baseline and plan.has_baseline else []
    made = [build_step(plan)] if plan.mode == ENGINE else []
    for model in (*models, QUANTIZED):
        made += [bench_step(plan, model, single=True), bench_step(plan, model, single=False)]
    if window is None:
        return made
    if plan.mode == ENGINE:
        made.append(build_step(plan, window=window))
    return made + [_perplexity_step(plan, model) for model in (*models, QUANTIZED)]


def build_step(plan: RunPlan, *, window: int | None = None) -> Step:
    """How the engine is built; with a window, how the one that returns the logits of its prompt is."""
    # FP8 has its own matrix products; the plugin is for the other types.
    plugin = None if plan.method == "fp8" else "auto"
    values: dict[str, Value] = {
        "--checkpoint_dir": plan.trt_checkpoint,
        "--output_dir": plan.engine if window is None else plan.logits_engine,
        "--gemm_plugin": plugin,
        "--max_batch_size": plan.batch_size if window is None else 1,
        "--max_input_len": plan.input_len if window is None else window,
        "--max_seq_len": plan.seq_len if window is None else window + 1,
        "--max_beam_width": plan.max_beam_width if window is None else 1,
        "--max_num_tokens": plan.num_tokens if window is None else window + 1,
        "--max_prompt_embedding_table_size": plan.max_prompt_embedding_table_size if window is None else None,
        "--workers": plan.tp_size,
        "--gather_context_logits": window is not None,
    }
    title = "building the engine" if window is None else "building the engine that returns logits"
    return Step(BUILD_STAGE, QUANTIZED, title, BUILD, values)


def bench_step(plan: RunPlan, model: str, *, single: bool) -> Step:
    """How speed is measured: one request at a time, or at full load."""
    engine = plan.mode == ENGINE and model == QUANTIZED
    folder = plan.checkpoint if model == QUANTIZED else plan.model
    name = "single" if single else "load"
    report = plan.work / f"{model}_{name}.json"
    values: dict[str, Value] = {
        "--model": "local",
        "--model_path": folder,
        "--workspace": plan.work / "bench",
        "--backend": plan.mode,
        "--engine_dir": plan.engine if engine else None,
        "--dataset": plan.work / DATASET,
        "--num_requests": min(plan.requests, SINGLE_REQUESTS) if single else plan.requests,
        "--concurrency": 1 if single else plan.concurrency,
        # trtllm-bench refuses --max_seq_len beside an engine, which has its own.
        "--max_seq_len": None if engine else plan.seq_len,
        "--max_batch_size": None if engine else plan.batch_size,
        "--max_num_tokens": None if engine else plan.num_tokens,
        "--tp": None if engine else plan.tp_size,
        "--kv_cache_free_gpu_mem_fraction": plan.kv_cache_fraction,
        # Only then does the report tell the time of the first token from that of the others.
        "--streaming": single,
        "--report_json": report,
    }
    title = f"{model}: {'one request at a time' if single else f'{plan.concurrency} requests at a time'}"
    return Step(BENCH_STAGE, model, title, THROUGHPUT, values, report)


def serve_values(plan: RunPlan, *, host: str, port: int) -> tuple[str, dict[str, Value]]:
    """The tool and options that serve the result over the OpenAI protocol."""
    engine = plan.mode == ENGINE
    return SERVE, {
        "MODEL": plan.engine if engine else plan.checkpoint,
        "--tokenizer": plan.checkpoint if engine else None,
        "--host": host,
        "--port": port,
        "--backend": plan.mode,
        "--max_batch_size": plan.batch_size,
        "--max_seq_len": plan.seq_len,
        "--max_num_tokens": plan.num_tokens,
        "--tp_size": plan.tp_size,
        "--kv_cache_free_gpu_memory_fraction": plan.kv_cache_fraction,
    }


def _perplexity_step(plan: RunPlan, model: str) -> Step:
    engine = plan.mode == ENGINE and model == QUANTIZED
    folder = plan.checkpoint if model == QUANTIZED else plan.model
    report = plan.work / f"{model}_perplexity.json"
    values: dict[str, Value] = {
        "model": plan.logits_engine if engine else folder,
        "tokenizer": folder,
        "backend": plan.mode,
        "tp_size": plan.tp_size,
        "kv_cache_fraction": plan.kv_cache_fraction,
    }
    return Step(PERPLEXITY_STAGE, model, f"{model}: perplexity", PERPLEXITY, values, report)


def dataset_lines(rows: Sequence[Sequence[int]], prompt_tokens: int, new_tokens: int, requests: int) -> Iterator[str]:
    """The data set of `trtllm-bench`: prompts of exactly so many tokens, each another piece of the text.

    Args:
        rows: Token ids of the text; rows are joined in their order.
        prompt_tokens: Per request.
        new_tokens: Per request; `trtllm-bench` generates exactly that many, whatever the model says.
        requests: How many. Where the text is too short for that, pieces overlap; none is the same as another.

    Yields:
        One JSON object per request, without its line break.

    Raises:
        DataError: If the text has too few tokens for so many different prompts.
    """
    tokens = [int(token) for row in rows for token in row]
    starts = len(tokens) - prompt_tokens
    if starts < requests - 1 or starts < 0:
        raise DataError(
            f"the text has {len(tokens)} tokens; {requests} different prompts of {prompt_tokens} need at least "
            f"{prompt_tokens + requests - 1}: take a longer text, fewer requests or shorter prompts"
        )
    step = min(prompt_tokens, starts // max(1, requests - 1))  # 0 only for a single request
    for number in range(requests):
        begin = number * step
        yield json.dumps(
            {"task_id": number, "input_ids": tokens[begin : begin + prompt_tokens], "output_tokens": new_tokens}
        )
