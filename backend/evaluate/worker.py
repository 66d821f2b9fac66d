"""Measure one model: `python -m backend.evaluate.worker REQUEST.json RESULT.json`.

One process per model, so that baseline and quantized model cannot share memory or state, and so that a
crash cannot take the job with it. Standard output carries events only, one JSON object per line; everything
that libraries print goes to standard error.

REQUEST: `{"model_dir", "device", "dtype", "perplexity": {"text_file", "text_name", "protocols", "window",
"max_windows"} or null, "tasks": [{"name", "num_fewshot", "limit"}], "batch_size", "seed", "samples_dir",
"stage", "configuration"}`, the last two for its events. RESULT: `{"metrics": [...], "decode_path",
"peak_rss_bytes", "wall_s"}`, `decode_path` being how the model was run, in words; written only when all went well.
Exit code 0; 2 for a wrong request; 1 for any other failure.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from backend.child import progress_of, run_child
from backend.evaluate.loading import check_folder, open_model
from backend.evaluate.memory import peak_resident_bytes
from backend.evaluate.tasks import check_tasks
from backend.event_stream import EventWriter
from backend.files import required


def evaluate(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Load the model of a request from disk and measure it.

    Returns:
        The RESULT object; `peak_rss_bytes` is this whole process's peak, `wall_s` includes loading.

    Raises:
        QuantdeckError: If the request, the model or the text cannot be used.
    """
    started = time.monotonic()
    stage = str(request.get("stage", "evaluate"))
    perplexity = request.get("perplexity")
    tasks = request.get("tasks") or []
    model_dir = Path(required(request, "model_dir"))
    check_tasks(str(required(task, "name")) for task in tasks)
    check_folder(model_dir, request.get("dtype"))
    progress = progress_of(request, stage, events)
    progress(0, 1, "loading the model")
    model, tokenizer = open_model(model_dir, request.get("device", "cpu"), request.get("dtype"))
    from backend.formats.decode_path import decode_path

    batch_size = int(request.get("batch_size", 8))
    metrics: list[Any] = []
    if perplexity and perplexity.get("protocols"):
        from backend.evaluate.perplexity import measure_perplexity, read_rows

        text_file = Path(required(perplexity, "text_file"))
        metrics += measure_perplexity(
            model,
            tokenizer,
            read_rows(text_file),
            text_name=perplexity.get("text_name") or text_file.name,
            protocols=perplexity["protocols"],
            window=int(perplexity.get("window", 512)),
            max_windows=perplexity.get("max_windows"),
            batch_size=batch_size,
            on_progress=progress,
        )
    if tasks:
        from backend.evaluate.accuracy import measure_accuracy

        samples_dir = request.get("samples_dir")
        metrics += measure_accuracy(
            model,
            tokenizer,
            tasks,
            batch_size=batch_size,
            seed=int(request.get("seed", 0)),
            samples_dir=Path(samples_dir) if samples_dir else None,
            on_progress=progress,
        )
    return {
        "metrics": metrics,
        "decode_path": decode_path(model),
        "peak_rss_bytes": peak_resident_bytes(),
        "wall_s": time.monotonic() - started,
    }


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    # lm_eval warns on every run that it was given a loaded model, which is what we mean to do.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    run_child(evaluate)
