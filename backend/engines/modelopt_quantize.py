"""The quantize stage of `ALGORITHM: TensorRTLLM`: nvidia-modelopt quantizes, exports, and is read back.

Run as `python -m backend.engines.modelopt_quantize REQUEST.json RESULT.json` by a job's runner. The package keeps the
whole model in memory and cannot continue an interrupted run. It makes two exports: the Hugging Face folder, which
TensorRT-LLM's PyTorch backend and our own reader load, and below it, where an engine is to be built, TensorRT-LLM's
checkpoint. What other programs will read is checked before it is published: our reader loads the folder from the disk,
and has to compute what the quantized model in memory does.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.child import run_child
from backend.engines.clock import Clock
from backend.engines.modelopt_check import check_reload, logits, observe, probe_of
from backend.engines.modelopt_files import rewrite, write_configs
from backend.engines.sequences import read_sequences
from backend.engines.trtllm_handover import plan_of, write_handover
from backend.errors import EngineError, QuantdeckError
from backend.event_stream import EventWriter
from backend.files import required
from backend.quick_start import quick_import
from backend.tensorrt_llm.methods import ENGINE, METHODS
from backend.tensorrt_llm.models import DECODER_TYPES, architecture_of
from backend.tensorrt_llm.plan import TRT_CHECKPOINT

if TYPE_CHECKING:
    from torch import Tensor, nn

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
UNIT = "relative weight error"


def quantize(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Quantize a model folder into one export folder.

    Args:
        request: `model_dir`, `tokens_file` (safetensors: `tokens`, optional `lengths`), `out_dir`, `device` (torch's
            name) and `configuration`: `name`, `method` (of `METHODS`; None: 16 bits), `mode`, `dtype`, `smoothquant`,
            `group_size`, `alpha_step`, `batch_size`, `tp_size`. `handover`: `plan` (`RunPlan` without its folders),
            `text_file` (the perplexity text, or None), `image`.
        events: Takes progress events: one per batch of calibration text and pass over it.

    Returns:
        `timings` (per stage: `wall_s`, `cpu_s`), `tokens` used, `layers` (relative errors of the stored weights),
        `skipped` (Linear: why it keeps its 16 bits), `notes`, and `check` (see `backend.engines.modelopt_check`).

    Raises:
        EngineError: If the package fails; the message says where.
        CheckpointError: If what was read back is another model.
    """
    clock = Clock()
    source, out = Path(required(request, "model_dir")), Path(required(request, "out_dir"))
    wanted, device = required(request, "configuration"), str(request.get("device", "cpu"))
    about = {"configuration": wanted["name"]}
    os.environ.update(ENVIRONMENT)
    events.note(stage="calibrate", message="loading the model and nvidia-modelopt", **about)
    quick_import("backend.formats.loader")

    from backend.formats.loader import load_model
    from backend.formats.skeleton import read_config

    method = METHODS[wanted["method"]] if wanted["method"] else None
    architecture = architecture_of(read_config(source).to_dict())
    shutil.rmtree(out, ignore_errors=True)  # of an attempt that was cut off
    scratch = out.with_name(f"{out.name}.export")
    shutil.rmtree(scratch, ignore_errors=True)
    compute = compute_dtype(source, device, wanted["dtype"])
    model = load_model(source, device=device, dtype=compute)
    rows, notes = calibration_rows(
        Path(required(request, "tokens_file")), getattr(model.config, "max_position_embeddings", None)
    )
    batches = _batches(rows, int(wanted["batch_size"])) if method is not None and method.needs_text else []
    with _modelopt("starting"):
        quick_import("modelopt.torch.quantization", "modelopt.torch.export")
    timings = {"calibrate": clock.lap()}

    errors: dict[str, float] = {}
    probe = probe_of(rows, device)
    original = logits(model, probe)
    if method is not None:
        loop = _forward_loop(batches, events, wanted["name"])
        with _modelopt("quantizing"):
            _quantize(model, wanted, loop)
        errors = _layer_errors(model)
        for name, error in errors.items():
            events.note(stage="quantize", layer=name, error=error, unit=UNIT, **about)
    skipped = _skipped(model)
    timings["quantize"] = clock.lap()

    events.note(stage="save", message="exporting", **about)
    if wanted["mode"] == ENGINE:
        with _modelopt("exporting TensorRT-LLM's checkpoint"):
            _export_engine_checkpoint(model, architecture, wanted, scratch / TRT_CHECKPOINT)
    with _modelopt("exporting the Hugging Face folder"):
        if method is not None:
            from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

            requantize_resmooth_fused_llm_layers(model)  # as the export would: Linears that run as one share scales
        expected = observe(model, probe, original)
        from modelopt.torch.export import export_hf_checkpoint

        # In the type of the computation: rounded to 16 bits first, some weights would get other codes.
        export_hf_checkpoint(model, dtype=compute, export_dir=scratch / "hf")
    del model
    gc.collect()
    out.mkdir(parents=True)
    rewrite(scratch / "hf", out, wanted["dtype"])
    write_configs(source, scratch, out, wanted["dtype"], TRT_CHECKPOINT)
    shutil.rmtree(scratch)
    handover = required(request, "handover")
    text = Path(handover["text_file"]) if handover["text_file"] else None
    plan = plan_of(handover["plan"], model=source, folder=out)
    write_handover(plan, [t for row in rows for t in row.tolist()], text, source, handover["image"])
    events.note(stage="save", message="reading it back", **about)
    found = check_reload(load_model(out, device=device, dtype=compute), probe, expected)
    timings["save"] = clock.lap()
    by = f"made by nvidia-modelopt {version('nvidia-modelopt')}, computed in {_name(compute)}"
    return {
        "timings": timings,
        "tokens": sum(batch.numel() for batch in batches),
        "layers": [{"layer": name, "error": error, "notes": []} for name, error in errors.items()],
        "skipped": skipped,
        "notes": [*notes, by],
        "check": found,
    }


def compute_dtype(source: Path, device: str, dtype: str) -> Any:
    """The type to calibrate in: on a GPU the one asked for; a CPU, slow in float16, has float32 where it fits."""
    import psutil
    import torch

    from backend.formats.headers import read_headers

    if device != "cpu":
        return getattr(torch, dtype)
    weights = sum(prod(info.shape) for info in read_headers(source))
    return torch.float32 if 3 * 4 * weights < psutil.virtual_memory().available else torch.bfloat16


def calibration_rows(path: Path, most: int | None) -> tuple[list[Tensor], list[str]]:
    """The calibration text without its padding, in pieces no longer than the model has positions.

    Args:
        path: safetensors file with `tokens` and maybe `lengths`.
        most: The model's positions; None if it does not say.

    Returns:
        Sequences (length,) int64, and what to tell of them.
    """
    rows = read_sequences(path)
    longest = max(len(row) for row in rows)
    if most is None or longest <= most:
        return rows, []
    pieces = [piece for row in rows for piece in row.split(most) if len(row) <= most or len(piece) == most]
    told = (
        f"the model has {most} positions: the calibration sequences of {longest} tokens were cut into pieces of {most}"
    )
    return pieces, [told]


def _batches(rows: list[Tensor], size: int) -> list[Tensor]:
    """Neighbours of one length together, at most so many: padding would be calibrated on like text."""
    import torch

    batches: list[list[Tensor]] = []
    for row in rows:
        if batches and len(batches[-1]) < size and len(batches[-1][0]) == len(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [torch.stack(batch) for batch in batches]


def _forward_loop(batches: list[Tensor], events: EventWriter, name: str) -> Callable[[nn.Module], None] | None:
    """What modelopt calls to run the text through the model, once or, for AWQ, twice; None if there is no text."""
    if not batches:
        return None
    passes = 0

    def loop(model: nn.Module) -> None:
        nonlocal passes
        passes += 1
        device = next(model.parameters()).device
        for done, batch in enumerate(batches, start=1):
            model(batch.to(device), use_cache=False)
            message = f"pass {passes} over the calibration text"
            events.note(stage="quantize", step=done, total=len(batches), message=message, configuration=name)

    return loop


def _quantize(model: nn.Module, wanted: dict[str, Any], loop: Callable[[nn.Module], None] | None) -> None:
    """Insert and calibrate modelopt's quantizers."""
    import modelopt.torch.quantization as mtq

    method = METHODS[wanted["method"]]
    config = copy.deepcopy(getattr(mtq, method.modelopt))
    if method.name == "smoothquant":
        config["algorithm"] = {"method": "smoothquant", "alpha": wanted["smoothquant"]}
    if method.grouped:
        config["algorithm"] = {"method": "awq_lite", "alpha_step": wanted["alpha_step"]}
        for entry in config["quant_cfg"]:
            for part in _parts(entry.get("cfg")):
                if -1 in part.get("block_sizes", {}):
                    part["block_sizes"][-1] = wanted["group_size"]
    mtq.quantize(model, config, forward_loop=loop)


def _parts(cfg: Any) -> Iterator[dict[str, Any]]:
    """The settings of a quantizer: one, or a list where weights are quantized in two steps."""
    yield from (part for part in (cfg if isinstance(cfg, list) else [cfg]) if isinstance(part, dict))


def _layer_errors(model: nn.Module) -> dict[str, float]:
    """Per decoder layer the relative error of its rounded weights, as AWQ or SmoothQuant have scaled them."""
    from backend.formats.size import LAYER

    sums: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        quantizer, place = getattr(module, "weight_quantizer", None), LAYER.search(f"{name}.")
        if quantizer is None or not quantizer.is_enabled or place is None:
            continue
        weight = module.weight.detach().float()
        rounded = quantizer(module.weight).detach().float()
        layer = sums.setdefault(f"{name[: place.end() - 1]}", [0.0, 0.0])
        layer[0] += float((rounded - weight).square().sum())
        layer[1] += float(weight.square().sum())
    return {name: (error / signal) ** 0.5 for name, (error, signal) in sums.items()}


def _skipped(model: nn.Module) -> dict[str, str]:
    """Every Linear that keeps its 16 bits, and why."""
    from torch import nn

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not getattr(
            getattr(module, "weight_quantizer", None), "is_enabled", False
        ):
            found[name] = "modelopt's configuration leaves it out"
    return found


def _export_engine_checkpoint(model: nn.Module, architecture: str, wanted: dict[str, Any], folder: Path) -> None:
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    folder.mkdir(parents=True)
    export_tensorrt_llm_checkpoint(
        model,
        decoder_type=DECODER_TYPES[architecture],
        dtype=getattr(torch, wanted["dtype"]),
        export_dir=folder,
        inference_tensor_parallel=wanted["tp_size"],  # left out, it is 0, and the package divides by it
        inference_pipeline_parallel=1,
    )
    if not (folder / "config.json").is_file():
        raise EngineError(f"no checkpoint came out for {architecture}; the log says why")


@contextmanager
def _modelopt(doing: str) -> Iterator[None]:
    """Turn whatever the package raises into its failure; the trace goes to the log."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is not tested with.*")
            yield
    except (QuantdeckError, MemoryError, OSError):
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise EngineError(f"nvidia-modelopt stopped while {doing}: {type(error).__name__}: {reason}") from None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    run_child(quantize)
