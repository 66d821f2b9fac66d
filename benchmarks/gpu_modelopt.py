"""The modelopt stage of `ALGORITHM: TensorRTLLM` on a CUDA machine: each method quantized, exported, read back, timed.

Needs nvidia-modelopt beside torch, transformers and safetensors; without it, that is said.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.event_stream import EventWriter
from backend.formats.size import weight_bytes
from backend.tensorrt_llm.methods import METHODS

if TYPE_CHECKING:
    from benchmarks.gpu import Results

SAMPLES, LENGTH = 16, 512
PLAN: dict[str, Any] = {
    "tp_size": 1, "max_batch_size": 1, "max_input_len": 512, "max_output_len": 512, "max_beam_width": 1,
    "max_num_tokens": None, "max_prompt_embedding_table_size": 0, "kv_cache_fraction": 0.2, "prompt_tokens": 128,
    "new_tokens": 64, "requests": 16, "concurrency": 4, "perplexity": False,
}  # fmt: skip


def check_modelopt(results: Results, source: Path, folder: Path, device: str, methods: Sequence[str] = ()) -> None:
    """Quantize a model with each method; the stage itself refuses an export that is not the model in memory.

    Args:
        results: Takes a row per method.
        source: The 16-bit model.
        folder: Where exports go.
        device: torch's name.
        methods: Names of `METHODS`; default: all that this GPU's machine can make.
    """
    missing = [name for name in ("modelopt", "requests") if importlib.util.find_spec(name) is None]
    if missing:
        results.add("modelopt", f"not measured: not installed: {', '.join(missing)}")
        return
    import torch
    from safetensors.torch import save_file

    from backend.engines.modelopt_quantize import quantize

    vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = torch.randint(0, vocabulary, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for name in methods or METHODS:
            method, began = METHODS[name], time.perf_counter()
            mode = method.modes[0]
            dtype = "bfloat16" if method.needs_cuda else "float16"
            configuration = {
                "name": name, "method": name, "mode": mode, "dtype": dtype, "smoothquant": 0.5, "batch_size": 1,
                "group_size": 128 if method.grouped else None, "alpha_step": 0.1, "tp_size": 1,
            }  # fmt: skip
            request = {
                "model_dir": str(source), "tokens_file": str(folder / "tokens.safetensors"), "device": device,
                "out_dir": str(folder / name), "configuration": configuration,
                "handover": {"plan": {**PLAN, "method": name, "mode": mode, "dtype": dtype}, "text_file": None,
                             "image": "none"},
            }  # fmt: skip
            try:
                done = quantize(request, EventWriter(nowhere))
            except Exception as error:  # one method must not hide the others
                results.add(f"modelopt {name}", f"FAILED: {error}"[:300])
                results.failures.append(f"modelopt {name}")
                continue
            size = f"{weight_bytes(source) / 1e6:.0f} MB -> {weight_bytes(folder / name) / 1e6:.0f} MB"
            seconds = time.perf_counter() - began
            differs = done["check"]["linear_difference"]
            results.add(
                f"modelopt {name}", f"{seconds:.1f} s for {done['tokens']} tokens, {size}, differs {differs:.1e}"
            )
