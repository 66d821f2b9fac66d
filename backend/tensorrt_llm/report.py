"""What TensorRT-LLM's programs report, read strictly: a value that is missing or not finite is an error, never a guess.

Source: TensorRT-LLM 1.2, tensorrt_llm/bench/dataclasses/reporting.py (`--report_json` of `trtllm-bench`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.errors import EngineError

TOKENS_TOLERANCE = 1e-6
PERFORMANCE = {
    "output_tokens_per_s": "system_output_throughput_tok_s",
    "total_tokens_per_s": "system_total_throughput_tok_s",
    "requests_per_s": "request_throughput_req_s",
    "latency_ms": "avg_request_latency_ms",
}
STREAMING = {
    "decode_tokens_per_s": "token_output_speed_tok_s",
    "first_token_ms": "avg_ttft_ms",
    "per_token_ms": "avg_tpot_ms",
}


def read_bench_report(path: Path, *, requests: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """A report of `trtllm-bench throughput --streaming`.

    Args:
        path: The file.
        requests: How many requests were to be measured.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens of each answer; more than 1, or there is no speed of decoding.

    Returns:
        `output_tokens_per_s` (of all answers over the whole run), `total_tokens_per_s`, `requests_per_s`, `latency_ms`
        (mean of the requests), `decode_tokens_per_s` (of one request, without its first token), `first_token_ms`,
        `per_token_ms`, `requests`, `concurrent` (mean), `version`, `backend`, `quantization` (None: 16 bit).

    Raises:
        EngineError: If the file is not such a report, a number is missing, not finite or not positive, or what was
            measured is not what was asked.
    """
    report = _read(path)
    asked = {"num_requests": requests, "avg_input_length": prompt_tokens, "avg_output_length": new_tokens}
    for key, wanted in asked.items():
        found = _number(path, report, "request_info", key)
        if abs(found - wanted) > TOKENS_TOLERANCE * wanted:
            raise EngineError(f"{path.name}: found {key} {found:g}; {wanted} was asked for, so this is another run")
    values: dict[str, Any] = {name: _number(path, report, "performance", key) for name, key in PERFORMANCE.items()}
    values |= {name: _number(path, report, "streaming_metrics", key) for name, key in STREAMING.items()}
    engine = _section(path, report, "engine")
    for key in ("version", "backend"):
        if not isinstance(engine.get(key), str) or not engine[key]:
            raise EngineError(f"{path.name} has no engine.{key}; trtllm-bench 1.2 writes it")
    return {
        **values,
        "requests": requests,
        "concurrent": _number(path, report, "request_info", "avg_num_concurrent_requests"),
        "version": engine["version"],
        "backend": engine["backend"],
        "quantization": engine.get("quantization"),
    }


def read_perplexity(path: Path, counts: list[int]) -> dict[str, Any]:
    """A result of the perplexity script.

    Args:
        path: The file.
        counts: Positions that count in each window.

    Returns:
        `perplexity`, `nll` (mean per token, nats), `tokens`, and `windows`, the summed loss of each.

    Raises:
        EngineError: If it is no such result, or of other windows.
    """
    result = _read(path)
    rows = result.get("windows")
    if not isinstance(rows, list) or [r.get("count") if isinstance(r, dict) else None for r in rows] != counts:
        raise EngineError(f"{path.name} does not hold the losses of the {len(counts)} windows that were asked for")
    sums = [_finite(path, f"windows[{i}].nll", row.get("nll")) for i, row in enumerate(rows)]
    mean = sum(sums) / sum(counts)
    if mean < 0 or mean > 700:
        raise EngineError(f"{path.name}: found a mean loss of {mean:g}; a loss is positive, and this one has no exp()")
    return {"perplexity": math.exp(mean), "nll": mean, "tokens": sum(counts), "windows": sums}


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"the program ended without writing {path.name}") from None
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{path.name} cannot be read as JSON ({error}); the program may have ended half-way"
        ) from error
    if not isinstance(report, dict):
        raise EngineError(f"{path.name} holds a {type(report).__name__}; an object is needed")
    return report


def _section(path: Path, report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = report.get(name)
    if not isinstance(found, dict):
        raise EngineError(f"{path.name} has no section {name}; it has {', '.join(sorted(report)) or 'nothing'}")
    return found


def _number(path: Path, report: Mapping[str, Any], section: str, key: str) -> float:
    value = _finite(path, f"{section}.{key}", _section(path, report, section).get(key))
    if value <= 0:
        raise EngineError(f"{path.name}: found {section}.{key} {value:g}; a measured value is more than 0")
    return value


def _finite(path: Path, name: str, value: Any) -> float:
    if value is None:
        raise EngineError(f"{path.name} has no {name}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EngineError(f"{path.name}: found {name} {value!r}; it must be a finite number")
    return float(value)
