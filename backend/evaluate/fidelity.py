"""How far a quantized model is from its base model: `python -m backend.evaluate.fidelity REQUEST.json RESULT.json`.

Mean KL(base ‖ quantized) and top-1 flips over held-out text: windows of `full_window`, evenly spread over the text,
every position of which is a prediction of both models. Both are read from disk and run as they are when evaluated: in
one type, on one device, with packed weights. Perplexity asks how well a model predicts the text; divergence asks
whether it is still the same model, and tells small damage far sooner, since no luck of the text goes into it.

REQUEST: `{"baseline_dir", "quantized_dir", "base": {"name", "sha256"}, "device", "dtype", "text_file", "text_name",
"window", "max_windows", "windows", "batch_size", "spool_dir", "stage", "configuration"}`, the last two for its events.
`windows` of them are compared, out of the first `max_windows` (null: of all). RESULT: `{"baseline": {"metrics",
"decode_path"}, "quantized": {...}, "together", "peak_rss_bytes", "wall_s"}`: the baseline's values are 0 by definition,
`decode_path` says in words how a model was run, and `together` whether both were in memory at once. torch is imported
once the request is known to be sound.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import psutil

from backend.child import progress_of, run_child
from backend.evaluate.loading import LOADER, check_folder, open_model
from backend.evaluate.memory import peak_resident_bytes
from backend.evaluate.metrics import Metric, versions
from backend.event_stream import EventWriter, Progress
from backend.files import required
from backend.formats.size import weight_bytes
from backend.quick_start import quick_import

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backend.evaluate.divergence import Divergence
    from backend.evaluate.perplexity import Windows

LOADING_FACTOR = 1.5
"""Loading may hold this multiple of the weight files for a moment: the file's pages and the packed copy."""


def measure(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Compare the two models of a request.

    Returns:
        The RESULT object.

    Raises:
        QuantdeckError: If the request, a model or the text cannot be used.
    """
    started = time.monotonic()
    base_dir, quantized_dir = (Path(required(request, key)) for key in ("baseline_dir", "quantized_dir"))
    text_file = Path(required(request, "text_file"))
    for folder in (base_dir, quantized_dir):
        check_folder(folder, request.get("dtype"))
    progress = progress_of(request, str(request.get("stage", "fidelity")), events)
    progress(0, 1, "loading the models")

    quick_import(LOADER)
    from backend.evaluate.perplexity import full_windows, read_rows, text_digest
    from backend.formats.loader import load_tokenizer

    rows = read_rows(text_file)
    every = full_windows(load_tokenizer(base_dir), rows, int(request.get("window", 512)), request.get("max_windows"))
    windows = spread(every, int(request.get("windows", len(every.tokens))))
    found, facts, together = _compare(request, windows, progress)
    paths = facts.pop("decode_paths")
    base = request.get("base") or {}
    stated = {
        **windows.protocol,
        **facts,
        "name": "fidelity",
        "direction": "KL(base ‖ quantized)",
        "base": base.get("name") or base_dir.name,
        "base_sha256": base.get("sha256"),
        "text": request.get("text_name") or text_file.name,
        "text_sha256": text_digest(rows),
        "windows": len(windows.tokens),
        "windows_of_text": len(every.tokens),
        "tokens": len(windows.tokens) * windows.scored,
        "log_softmax": "float32",
        "versions": versions("torch", "transformers", "tokenizers"),
    }
    sides = metrics_of(found, stated)
    return {
        **{side: {**sides[side], "decode_path": path} for side, path in zip(sides, paths, strict=True)},
        "together": together,
        "peak_rss_bytes": peak_resident_bytes(),
        "wall_s": time.monotonic() - started,
    }


def spread(windows: Windows, count: int) -> Windows:
    """At most `count` of the windows, evenly spread: a few documents in a row would say little about the rest."""
    there = len(windows.tokens)
    if count >= there:
        return windows
    return replace(windows, tokens=windows.tokens[[i * there // count for i in range(count)]])


def fits_together(base_dir: Path, quantized_dir: Path, device: str) -> bool:
    """Whether both models can be in memory at once.

    On a GPU, where what does not fit is refused and can be tried otherwise, the files count. On a CPU the process would
    be killed, and some formats are dequantised as they are loaded: there the quantized model counts as a whole one.
    """
    base, quantized = weight_bytes(base_dir), weight_bytes(quantized_dir)
    if device.startswith("cuda"):
        import torch

        free = torch.cuda.mem_get_info(device)[0]
    else:
        free, quantized = psutil.virtual_memory().available, max(base, quantized)
    return max(LOADING_FACTOR * base, base + LOADING_FACTOR * quantized) < free


def _compare(
    request: Mapping[str, Any], windows: Windows, progress: Progress
) -> tuple[Divergence, dict[str, Any], bool]:
    """Compare with both models in memory if that works, else in turns.

    Returns:
        What was found; `dtype`, `device` and the `decode_paths` of both; and whether they were there together.
    """
    import torch

    from backend.evaluate.divergence import compare_in_turns, compare_together, free_memory
    from backend.evaluate.perplexity import check_context
    from backend.formats.decode_path import decode_path

    device, types, paths = str(request.get("device", "cpu")), dict[str, None](), dict[Path, str]()

    def opened(folder: Path) -> PreTrainedModel:
        model, _ = open_model(folder, device, request.get("dtype"))
        check_context(model, windows)
        types[str(model.dtype).removeprefix("torch.")] = None
        paths[folder] = decode_path(model)
        return model

    folders = Path(request["baseline_dir"]), Path(request["quantized_dir"])
    both = partial(opened, folders[0]), partial(opened, folders[1])
    count, batch_size = len(windows.tokens), int(request.get("batch_size", 8))

    together, found = fits_together(*folders, device), None
    if together:
        on_step = partial(_tell, progress, count, "divergence")
        try:
            found = compare_together(*both, windows, batch_size=batch_size, on_step=on_step)
        except torch.OutOfMemoryError:
            together = False
    if found is None:
        free_memory()
        on_step = partial(_tell, progress, 2 * count, "divergence, one model after the other")
        spool_dir = Path(request.get("spool_dir") or ".")
        found = compare_in_turns(*both, windows, spool_dir=spool_dir, batch_size=batch_size, on_step=on_step)
    facts = {"dtype": " and ".join(types), "device": torch.device(device).type}
    return found, {**facts, "decode_paths": [paths[folder] for folder in folders]}, together


def _tell(progress: Progress, total: int, message: str, done: int) -> None:
    progress(done, total, message)


def metrics_of(found: Divergence, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Both sides' metrics: the base model's are 0 by definition, window by window."""
    kl = _metric("KL divergence", "KL(base ‖ quantized)", "nats/token", found.kl, 1.0, protocol)
    flips = _metric("top-1 flips", "Top-1 flips", "%", found.flips, 100.0, protocol)
    zeros = [Metric(**{**one, "value": 0.0, "stderr": None, "samples": [0.0] * len(found.kl)}) for one in (kl, flips)]
    return {"baseline": {"metrics": zeros}, "quantized": {"metrics": [kl, flips]}}


def _metric(
    metric: str, name: str, unit: str, samples: Sequence[float], scale: float, protocol: Mapping[str, Any]
) -> Metric:
    from backend.evaluate.stats import mean_stderr

    summary = (
        f"mean over {protocol['windows']} of {protocol['windows_of_text']} windows of {protocol['window']}, "
        f"{protocol['tokens']} predictions; base {protocol['base']}; {protocol['text']}; {protocol['dtype']}, "
        f"{protocol['device']}"
    )
    stderr = mean_stderr(samples)
    return Metric(
        metric=metric,
        name=f"{name}, {protocol['text']}",
        value=scale * fmean(samples),
        stderr=None if stderr is None else scale * stderr,
        unit=unit,
        higher_is_better=False,
        protocol={**protocol, "statistic": metric, "summary": summary},
        samples=list(samples),
    )


if __name__ == "__main__":
    run_child(measure)
