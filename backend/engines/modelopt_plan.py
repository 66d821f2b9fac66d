"""What the modelopt program is asked for: from the section of the job file to one request per result.

Imports no torch: pages and checks before the start read plans too.
"""

from __future__ import annotations

from typing import Any

from backend.schema import TensorRTLLMSettings
from backend.tensorrt_llm.methods import METHODS


def modelopt_requests(settings: TensorRTLLMSettings) -> list[dict[str, Any]]:
    """The results that a job makes.

    Returns:
        Per result, as JSON values: `name`, `label`, `method` (None: only exported), `mode` (of
        `backend.tensorrt_llm.methods`), `dtype`, `group_size` (None without blocks), `smoothquant`, `alpha_step`,
        `batch_size`. Those that do not matter to a method have its default, so that they do not change its key.
    """
    if not settings.to_quantize:
        return [_request(settings, None, settings.dtype, f"16 bit ({settings.dtype}), exported")]
    return [_request(settings, name, name, _label(settings, name)) for name in settings.methods]


def _label(settings: TensorRTLLMSettings, name: str) -> str:
    method = METHODS[name]
    return f"{method.label}, blocks of {settings.awq_block_size}" if method.grouped else method.label


def _request(settings: TensorRTLLMSettings, method: str | None, name: str, label: str) -> dict[str, Any]:
    grouped = method is not None and METHODS[method].grouped
    return {
        "name": name,
        "label": label,
        "method": method,
        "mode": settings.mode(method),
        "dtype": settings.dtype,
        "group_size": settings.awq_block_size if grouped else None,
        "smoothquant": settings.smoothquant if method == "smoothquant" else None,
        "alpha_step": settings.AWQ_ALPHA_STEP if grouped else None,
        "batch_size": settings.batch_size,
    }
