"""What goes along with an export so that TensorRT-LLM can run it anywhere: requests, windows of text, and a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.files import sync_path
from backend.tensorrt_llm.inputs import write_inputs
from backend.tensorrt_llm.methods import ENGINE
from backend.tensorrt_llm.plan import TRT_CHECKPOINT, RunPlan
from backend.tensorrt_llm.script import shell_script

SCRIPT = "run_tensorrt_llm.sh"
WORK, ENGINE_FOLDER = "tensorrt_llm_run", "tensorrt_llm_engine"
MAX_WINDOWS = 128
"""Windows of the perplexity text that are measured in TensorRT-LLM, at most: their logits come over one by one."""


def plan_of(values: Mapping[str, Any], *, model: Path, folder: Path, work: Path | None = None) -> RunPlan:
    """A plan whose folders are those of an export.

    Args:
        values: The plan's fields without its folders.
        model: The 16-bit model.
        folder: The export.
        work: Where reports go; default: a folder of the export.
    """
    return RunPlan(
        **values,
        model=model,
        checkpoint=folder,
        trt_checkpoint=folder / TRT_CHECKPOINT if values["mode"] == ENGINE else None,
        work=work or folder / WORK,
        engine=(work or folder) / ENGINE_FOLDER,
    )


def write_handover(
    plan: RunPlan, tokens: Sequence[int], text_file: Path | None, tokenizer_dir: Path, image: str
) -> None:
    """Write the inputs of a plan and, beside the export, the script that runs it elsewhere.

    Args:
        plan: With `work` inside the export.
        tokens: Ids of running text, repeated if they are too few for different prompts.
        text_file: The perplexity text; needed if the plan measures perplexity.
        tokenizer_dir: Folder with the model's tokenizer.
        image: The container image.
    """
    wanted = plan.prompt_tokens + plan.requests - 1
    running = list(tokens) * -(-wanted // max(1, len(tokens)))
    windows = perplexity_windows(text_file, tokenizer_dir) if plan.perplexity and text_file else []
    write_inputs(plan, running, windows)
    script = plan.checkpoint / SCRIPT
    script.write_text(shell_script(plan, plan.checkpoint, image), encoding="utf-8")
    for path in (*plan.work.iterdir(), script):
        sync_path(path)


def perplexity_windows(text_file: Path, tokenizer_dir: Path) -> list[dict[str, Any]]:
    """The windows of the guides' protocol: the second half of 512 tokens counts.

    Raises:
        DataError: If the text is shorter than one.
    """
    from backend.evaluate.perplexity import gptq_windows, read_rows
    from backend.formats.loader import load_tokenizer

    windows = gptq_windows(load_tokenizer(tokenizer_dir), read_rows(text_file), MAX_WINDOWS)
    counted = list(range(windows.first + 1, windows.tokens.shape[1]))
    return [{"tokens": row, "counted": counted} for row in windows.tokens.tolist()]
