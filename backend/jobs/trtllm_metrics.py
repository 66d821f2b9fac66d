"""What TensorRT-LLM's own programs reported of a result: as rows of the comparison, and as the guide's table.

A row of the comparison needs both models on one backend, under one load. An engine has no 16-bit one beside it: its
numbers stand in the guide's table alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.evaluate.metrics import Metric

Ran = Mapping[str, Any]
"""Result of `backend.engines.trtllm_run` with its `plan` and `device`; or only `obstacles`: why it did not run."""


@dataclass(frozen=True)
class GuideRow:
    """One model in the guide's table; None where nothing was measured.

    Attributes:
        which: `baseline` or `quantized`.
        weight_bytes: Of the files that were loaded (WM).
        memory_bytes: The most GPU memory that was taken, the KV cache's share included (RM).
        decode_tokens_s: Of one request at a time, without its first token.
        load_tokens_s: Of all requests together at full load.
        perplexity: Of the windows of the guides' protocol, over all scored tokens.
    """

    which: str
    weight_bytes: int
    memory_bytes: int | None
    decode_tokens_s: float
    load_tokens_s: float | None
    perplexity: float | None


def guide_rows(ran: Ran | None) -> list[GuideRow]:
    """The guide's table of a result; empty if it was not run."""
    rows = []
    for which in ("baseline", "quantized"):
        found = (ran or {}).get(which)
        if not found:
            continue
        single, load, perplexity = found["single"], found.get("load"), found.get("perplexity")
        rows.append(
            GuideRow(
                which, found["weight_bytes"], single.get("peak_bytes"), single["decode_tokens_per_s"],
                load["output_tokens_per_s"] if load else None, perplexity["perplexity"] if perplexity else None,
            )
        )  # fmt: skip
    return rows


def of_both_models(ran: Ran | None, text_name: str) -> dict[str, Any] | None:
    """Metrics of baseline and quantized model as the speed benchmark gives them; None if not both were run.

    Args:
        ran: The result.
        text_name: Of the perplexity text.
    """
    if not ran or not ran.get("baseline") or not ran.get("quantized"):
        return None
    return {
        which: {"metrics": _metrics(ran[which], ran, text_name), "decode_path": f"TensorRT-LLM, {ran['plan']['mode']}"}
        for which in ("baseline", "quantized")
    }


def _metrics(found: Mapping[str, Any], ran: Ran, text_name: str) -> list[Metric]:
    plan = ran["plan"]
    protocol: dict[str, Any] = {
        "name": "tensorrt_llm",
        "backend": plan["mode"],
        "prompt_tokens": plan["prompt_tokens"],
        "new_tokens": plan["new_tokens"],
        "tp_size": plan["tp_size"],
        "kv_cache_fraction": plan["kv_cache_fraction"],
        "device_name": ran["device"],
        "versions": ran["versions"],
    }
    where = f"TensorRT-LLM, {plan['mode']} backend, {ran['device']}"
    sizes = f"{plan['new_tokens']} tokens after {plan['prompt_tokens']}"
    metrics = [
        _metric(
            "tokens/s", f"Decode in TensorRT-LLM ({plan['new_tokens']} tokens)", found["single"]["decode_tokens_per_s"],
            protocol | {"concurrency": 1, "requests": found["single"]["requests"]},
            f"one request at a time, {sizes}, without the first token; mean of the requests; {where}",
        )
    ]  # fmt: skip
    if load := found.get("load"):
        metrics.append(
            _metric(
                "tokens/s", f"{plan['concurrency']} requests at a time in TensorRT-LLM", load["output_tokens_per_s"],
                protocol | {"concurrency": plan["concurrency"], "requests": load["requests"]},
                f"all answers together, {sizes}; {where}",
            )
        )  # fmt: skip
    if (peak := found["single"].get("peak_bytes")) is not None:
        metrics.append(
            _metric(
                "peak memory", "GPU memory in TensorRT-LLM", float(peak), protocol | {"concurrency": 1},
                f"the most taken while it ran, {plan['kv_cache_fraction']:g} of the free memory for the KV cache "
                f"included; {where}",
            )
        )  # fmt: skip
    if perplexity := found.get("perplexity"):
        count = perplexity["tokens"] / len(perplexity["windows"])
        metric = _metric(
            "perplexity", f"Perplexity ({text_name}, gptq windows in TensorRT-LLM)", perplexity["perplexity"],
            {"name": "gptq_wikitext", "statistic": "corpus", "windows": len(perplexity["windows"]), **protocol},
            f"{len(perplexity['windows'])} windows of 512 tokens, the second half scored; {where}",
        )  # fmt: skip
        metrics.append({**metric, "samples": [nll / count for nll in perplexity["windows"]]})
    return metrics


def _metric(kind: str, name: str, value: float, protocol: dict[str, Any], summary: str) -> Metric:
    units = {"tokens/s": "tokens/s", "peak memory": "bytes", "perplexity": ""}
    return Metric(
        metric=kind,
        name=name,
        value=value,
        stderr=None,
        unit=units[kind],
        higher_is_better=kind == "tokens/s",
        protocol={**protocol, "summary": summary},
        samples=[],
    )
