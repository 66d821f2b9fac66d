"""How far quantized checkpoints are from their base model: mean KL divergence and changed top-1 predictions.

    python -m benchmarks.fidelity REQUEST.json RESULT.json

Jobs compare the models as they are run. Here every checkpoint is read from disk by one and the same reader, its weights
dequantised exactly, and run in float32, so that only the stored numbers count and not the kernels of whoever made them.
The base model is the bfloat16 checkpoint, computed in float32 as well. The request has `base` (folder), `checkpoints`
(folders) and `held_out_file`; the result has for each checkpoint `kl` (nats per token), `kl_stderr` over windows,
`flips` (share of positions) and `tokens`, or `error`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backend.child import run_child
from backend.errors import QuantdeckError
from backend.evaluate.divergence import Divergence, add_batch
from backend.evaluate.stats import mean_stderr
from backend.event_stream import EventWriter
from backend.formats.config import read_config_json
from backend.formats.loader import load_model
from benchmarks.gptq_reader import is_gptq, load_gptq

BATCH = 4


def measure(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Compare all checkpoints with the base model on the same tokens."""
    tokens = load_file(request["held_out_file"])["tokens"]
    reference = list(logits_of(read_dense(Path(request["base"])), tokens))
    results: list[dict[str, Any]] = []
    for step, folder in enumerate(request["checkpoints"], 1):
        try:
            results.append(compare(reference, read_dense(Path(folder)), tokens))
        except QuantdeckError as error:
            results.append({"error": error.message})
        events.progress("fidelity", step, len(request["checkpoints"]), str(folder))
    return {"results": results}


def read_dense(folder: Path) -> nn.Module:
    """A checkpoint as a float32 model with ordinary Linears.

    Raises:
        QuantdeckError: If the checkpoint is broken, or of a kind that cannot be read.
    """
    if is_gptq(read_config_json(folder).get("quantization_config") or {}):
        return load_gptq(folder)
    model = load_model(folder, dtype=torch.float32)
    _make_dense(model)
    return model


def _make_dense(parent: nn.Module) -> None:
    """Replace the packed Linears below a module: kernels would round, and dequantising at every call is slow."""
    for name, module in parent.named_children():
        if hasattr(module, "dequantize") and hasattr(module, "in_features"):
            setattr(parent, name, _dense(module))
        else:
            _make_dense(module)


def _dense(packed: Any) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    linear.weight = nn.Parameter(packed.dequantize().float(), requires_grad=False)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.float(), requires_grad=False)
    return linear


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """Logits of every prediction, float32 (batch, length, vocabulary), in batches of windows."""
    for batch in tokens.split(BATCH):
        yield model(input_ids=batch, use_cache=False).logits.float()


def compare(reference: list[Tensor], model: nn.Module, tokens: Tensor) -> dict[str, float | None]:
    """Mean KL(base ‖ model) per predicted token, its standard error over windows, and the changed predictions."""
    found = Divergence()
    for base, other in zip(reference, logits_of(model, tokens), strict=True):
        add_batch(found, base, other)
    return {
        "kl": fmean(found.kl),
        "kl_stderr": mean_stderr(found.kl),
        "flips": fmean(found.flips),
        "tokens": tokens.numel(),
    }


if __name__ == "__main__":
    run_child(measure)
