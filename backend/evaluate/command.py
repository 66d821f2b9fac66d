"""`python -m backend evaluate`: one model folder under named protocols, outside any job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from backend.demo import MODEL_DIR
from backend.errors import ConfigError, EngineError
from backend.evaluate.tasks import check_tasks
from backend.files import write_json
from backend.formats import remote_code
from backend.jobs.devices import choose_device, device_environment, torch_device
from backend.paths import PROJECT, Home
from backend.process import QUIET_THREADS
from backend.schema import DEMO
from backend.schema.measurement import parse_task
from backend.sources.texts import TextSource, read_rows


def evaluate_folder(
    model: str,
    home: Home,
    work: Path,
    *,
    protocols: list[str] | None,
    dataset: str,
    subset: str | None,
    split: str,
    tasks: str,
) -> dict[str, Any]:
    """Measure a model folder in a process of its own.

    Args:
        model: Folder, or the demo model's id.
        home: Downloads are cached below it.
        work: Folder for temporary files.
        protocols: Perplexity protocols; None for the guides' one.
        dataset: Text for perplexity: a dataset id or a local file.
        subset: Subset of a Hub dataset.
        split: Split of the dataset.
        tasks: `name:shots[:limit]`, separated by commas.

    Returns:
        The worker's result.

    Raises:
        ConfigError: If the folder or a task does not exist.
        EngineError: If the worker fails, with its reason.
    """
    folder = MODEL_DIR if model == DEMO else Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"found {model!r}; give a folder with a model, or {DEMO}", key="MODEL_DIR", value=model)
    try:
        wanted = [parse_task(part) for part in tasks.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(str(error), key="--tasks", value=tasks) from None
    check_tasks([task["NAME"] for task in wanted])
    local = Path(dataset).expanduser()
    source = TextSource(dataset, subset, split, ("text",), None, local if local.exists() else None)
    text_file = work / "evaluation.jsonl"
    with open(text_file, "w", encoding="utf-8") as file:
        for row in read_rows(source, home.user_data / ".cache" / "datasets"):
            file.write(json.dumps({"text": row}) + "\n")
    device = choose_device("0")
    request = {
        "model_dir": str(folder.resolve()),
        "device": torch_device(device),
        "dtype": None,
        "perplexity": {
            "text_file": str(text_file),
            "text_name": source.label,
            "protocols": protocols or ["gptq_wikitext"],
            "window": 512,
            "max_windows": None,
        },
        "tasks": [{"name": t["NAME"], "num_fewshot": t.get("NUM_FEWSHOT", 0), "limit": t.get("LIMIT")} for t in wanted],
        "batch_size": 8,
        "seed": 0,
    }
    write_json(work / "request.json", request)
    command = [sys.executable, "-m", "backend.evaluate.worker", str(work / "request.json"), str(work / "result.json")]
    finished = subprocess.run(command, stdout=subprocess.PIPE, cwd=PROJECT, env=_environment(device), check=False)
    if finished.returncode != 0:
        raise EngineError(_reason(finished.stdout) or f"the evaluation ended with exit code {finished.returncode}")
    return json.loads((work / "result.json").read_text(encoding="utf-8"))


def _environment(device: str) -> dict[str, str]:
    found = {**os.environ, **device_environment(device), **QUIET_THREADS, "TQDM_DISABLE": "1"}
    return remote_code.environment(found, None)


def _reason(output: bytes) -> str:
    for line in reversed(output.decode("utf-8", "replace").splitlines()):
        event = json.loads(line)
        if event.get("stage") == "error":
            return str(event["message"])
    return ""
