"""The files that a plan's programs read: requests of exact length from real text, options, windows, the script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.errors import DataError
from backend.files import write_json
from backend.tensorrt_llm.plan import DATASET, OPTIONS, SCRIPT, WINDOWS, RunPlan


def write_inputs(plan: RunPlan, tokens: Sequence[int], windows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write everything that `steps` and `shell_script` take from `plan.work`.

    Args:
        plan: The plan.
        tokens: Ids of running text, at least `prompt_tokens + requests - 1` of them.
        windows: Perplexity: each `tokens` (ids) and `counted` (positions of the tokens whose loss counts, from 1 on);
            needed if `plan.perplexity`.

    Raises:
        DataError: If the text is too short, or a window cannot be measured.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    rows = dataset_rows(tokens, prompt_tokens=plan.prompt_tokens, new_tokens=plan.new_tokens, requests=plan.requests)
    (plan.work / DATASET).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (plan.work / OPTIONS).write_text(options_yaml(plan), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("perplexity_script.py"), plan.work / SCRIPT)
    if plan.perplexity:
        write_json(plan.work / WINDOWS, {"windows": [_window(one, i, plan) for i, one in enumerate(windows)]})
        if not windows:
            raise DataError("perplexity is asked for, and there are no windows of text to measure it on")


def dataset_rows(tokens: Sequence[int], *, prompt_tokens: int, new_tokens: int, requests: int) -> list[dict[str, Any]]:
    """Requests as `trtllm-bench` reads them, one JSON object per line: `task_id`, `input_ids`, `output_tokens`.

    Prompts are given as token ids: text would be cut into tokens anew, and its length would no longer be exact. Each
    begins at a place of its own, as far from the others as the text allows.

    Raises:
        DataError: If the text is too short for that.
    """
    room = len(tokens) - prompt_tokens
    if room < requests - 1:
        raise DataError(
            f"the text has {len(tokens)} tokens; {requests} different prompts of {prompt_tokens} tokens need "
            f"{prompt_tokens + requests - 1}"
        )
    starts = [room * i // max(1, requests - 1) for i in range(requests)]
    return [
        {"task_id": i, "input_ids": [int(t) for t in tokens[s : s + prompt_tokens]], "output_tokens": new_tokens}
        for i, s in enumerate(starts)
    ]


def options_yaml(plan: RunPlan) -> str:
    """`--extra_llm_api_options`: no prompt is served from the cache of an earlier one, so that each is really read."""
    return (
        "kv_cache_config:\n"
        "  enable_block_reuse: false\n"
        f"  free_gpu_memory_fraction: {plan.kv_cache_fraction}\n"
    )  # fmt: skip


def _window(window: Mapping[str, Any], number: int, plan: RunPlan) -> dict[str, Any]:
    tokens, counted = [int(t) for t in window["tokens"]], [int(p) for p in window["counted"]]
    if not counted or min(counted) < 1 or max(counted) >= len(tokens):
        raise DataError(f"window {number} has {len(tokens)} tokens; counted positions are 1 to {len(tokens) - 1}")
    if len(tokens) > plan.input_len:
        raise DataError(
            f"window {number} has {len(tokens)} tokens, and a prompt at most {plan.input_len}; raise max_input_len, or "
            "measure shorter windows"
        )
    return {"tokens": tokens, "counted": counted}
