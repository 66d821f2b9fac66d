"""The command-line options of TensorRT-LLM's programs, as data: one table per program and version.

Options that run code of the model or of the caller (`--trust_remote_code`, `--custom_module_dirs`, `--model_cls_file`)
are left out on purpose, as are those for several nodes, images and speculative decoding: what is not here cannot be
asked for. A later version is one more entry of `TABLES`.

Sources, read in TensorRT-LLM's repository: tensorrt_llm/commands/{bench,serve,build}.py,
tensorrt_llm/bench/benchmark/{throughput,low_latency}.py, tensorrt_llm/plugin/plugin.py. Only what revisions both before
and after 1.2 have in common is listed. `backend.tensorrt_llm.contract` compares the tables with a present image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from backend.tensorrt_llm.methods import LEGACY_VERSION

Kind = Literal["int", "float", "str", "path", "choice", "flag"]

THROUGHPUT, LATENCY = "trtllm-bench throughput", "trtllm-bench latency"
SERVE, BUILD = "trtllm-serve", "trtllm-build"
TOOLS = (THROUGHPUT, LATENCY, SERVE, BUILD)


@dataclass(frozen=True)
class Flag:
    """One option.

    Attributes:
        name: With its dashes.
        kind: What its value is; a `flag` has none.
        choices: The allowed values of a `choice`.
        least: Smallest number.
        most: Largest number.
    """

    name: str
    kind: Kind
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Tool:
    """A program and what may be given to it.

    Attributes:
        words: Program and subcommand.
        common: Options that stand before the subcommand.
        flags: Options that stand after it.
        required: Names that must be given.
        positional: Name, in upper case, of the path that stands before the options; empty if there is none.
    """

    words: tuple[str, ...]
    common: dict[str, Flag]
    flags: dict[str, Flag]
    required: tuple[str, ...] = ()
    positional: str = ""


def _table(flags: Iterable[Flag]) -> dict[str, Flag]:
    return {flag.name: flag for flag in flags}


def _ints(*names: str, least: int = 1) -> list[Flag]:
    return [Flag(name, "int", least=least) for name in names]


def _paths(*names: str) -> list[Flag]:
    return [Flag(name, "path") for name in names]


def _switches(*names: str) -> list[Flag]:
    return [Flag(name, "flag") for name in names]


_BACKEND = Flag("--backend", "choice", ("pytorch", "_autodeploy", "tensorrt"))
_LOG = Flag("--log_level", "choice", ("internal_error", "error", "warning", "info", "verbose", "debug"))
_TYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")

_BENCH_COMMON = _table([Flag("--model", "str"), *_paths("--model_path", "--workspace"), _LOG])
_BENCH = [
    *_paths("--engine_dir", "--dataset", "--extra_llm_api_options"),
    *_paths("--report_json", "--iteration_log"),
    _BACKEND,
    *_ints("--max_seq_len", "--beam_width", "--tp", "--pp", "--ep", "--concurrency"),
    *_ints("--num_requests", "--warmup", least=0),
    Flag("--kv_cache_free_gpu_mem_fraction", "float", least=0.01, most=1.0),
]
_THROUGHPUT = [
    *_BENCH,
    *_paths("--output_json", "--request_json"),
    *_ints("--max_batch_size", "--max_num_tokens", "--target_input_len", "--target_output_len"),
    *_ints("--eos_id", least=-1),
    *_switches("--streaming"),
    Flag("--scheduler_policy", "choice", ("guaranteed_no_evict", "max_utilization")),
]
_SERVE = [
    *_paths("--tokenizer", "--extra_llm_api_options"),
    Flag("--host", "str"),
    Flag("--port", "int", least=1, most=65535),
    _BACKEND,
    _LOG,
    *_ints("--max_beam_width", "--max_batch_size", "--max_num_tokens", "--max_seq_len", "--tp_size", "--pp_size"),
    *_ints("--num_postprocess_workers", least=0),
    Flag("--kv_cache_free_gpu_memory_fraction", "float", least=0.01, most=1.0),
    *_switches("--enable_chunked_prefill"),
]
_BUILD = [
    *_paths("--checkpoint_dir", "--output_dir", "--input_timing_cache", "--output_timing_cache"),
    *_ints("--max_batch_size", "--max_input_len", "--max_seq_len", "--max_beam_width", "--max_num_tokens"),
    *_ints("--opt_num_tokens", "--workers"),
    *_ints("--max_prompt_embedding_table_size", least=0),
    Flag("--profiling_verbosity", "choice", ("layer_names_only", "detailed", "none")),
    _LOG,
    *_switches("--weight_sparsity", "--weight_streaming", "--dry_run", "--monitor_memory"),
    Flag("--logits_dtype", "choice", ("float16", "float32")),
    *_switches("--gather_context_logits", "--gather_generation_logits"),
    Flag("--gemm_plugin", "choice", ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable")),
    Flag("--gpt_attention_plugin", "choice", _TYPES),
    Flag("--nccl_plugin", "choice", _TYPES),
    Flag("--tokens_per_block", "int", least=1),
    *(
        Flag(name, "choice", ("enable", "disable"))
        for name in ("--context_fmha", "--remove_input_padding", "--use_paged_context_fmha", "--use_fp8_context_fmha")
    ),
]

_TABLES_1_2 = {
    THROUGHPUT: Tool(
        ("trtllm-bench", "throughput"), _BENCH_COMMON, _table(_THROUGHPUT), ("--model", "--model_path", "--dataset")
    ),
    LATENCY: Tool(("trtllm-bench", "latency"), _BENCH_COMMON, _table(_BENCH), ("--model", "--model_path", "--dataset")),
    SERVE: Tool(("trtllm-serve",), {}, _table(_SERVE), positional="MODEL"),
    BUILD: Tool(("trtllm-build",), {}, _table(_BUILD), ("--checkpoint_dir", "--output_dir")),
}

TABLES: dict[str, dict[str, Tool]] = {LEGACY_VERSION: _TABLES_1_2}
"""Version -> name of a tool -> its options."""
