"""Accuracy on lm_eval tasks, by lm_eval itself, on the model that we loaded from disk.

The model object goes into lm_eval's Hugging Face wrapper, so baseline and quantized model run the same
code. Per-question scores are kept: comparing two models on the same questions is far sharper than comparing
two averages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backend.demo import TASK_DIR, TASK_NAME
from backend.errors import ConfigError, DataError
from backend.evaluate.metrics import Metric, versions
from backend.evaluate.tasks import check_tasks, declaring_folders
from backend.event_stream import Progress

PERCENT_METRICS = frozenset({"acc", "acc_norm", "acc_mutual_info", "exact_match"})
BOOTSTRAP_DRAWS = 1000
"""Only for metrics without a closed-form standard error; accuracy has one."""

Samples = dict[str, list[dict[str, Any]]]


class ReportingLM(HFLM):
    """lm_eval's Hugging Face wrapper that reports how many requests are done."""

    def __init__(self, *args: Any, on_progress: Progress | None, label: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_progress = on_progress
        self._label = label
        self._total = self._done = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Score continuations; see HFLM."""
        self._start(requests)
        return self._finish(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Score whole texts; see HFLM."""
        self._start(requests)
        return self._finish(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Generate until a stop string; see HFLM."""
        self._start(requests)
        return self._finish(super().generate_until(requests, disable_tqdm=True))

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = super()._model_call(inps, **kwargs)
        self._advance(len(inps))
        return output

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return output

    def _start(self, requests: Sequence[Any]) -> None:
        self._total, self._done = len(requests), 0

    def _finish(self, responses: Any) -> Any:
        self._advance(self._total)
        return responses

    def _advance(self, rows: int) -> None:
        # rows of the batch, not requests: requests with a common context may share a row, long texts take several
        self._done = min(self._done + rows, self._total)
        if self._on_progress:
            self._on_progress(self._done, self._total, self._label)


def measure_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    seed: int = 0,
    samples_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> list[Metric]:
    """Run lm_eval tasks on a loaded model.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        tasks: `{"name", "num_fewshot": int or None, "limit": int or None}` each; None means the task's own.
        batch_size: Sequences per forward pass.
        seed: Seeds the choice of few-shot examples and lm_eval's own draws.
        samples_dir: Folder for one JSONL file per task with every question, answer and score.
        on_progress: Called with (requests done, requests, message) per task.

    Returns:
        One metric per task, lm_eval metric and filter; accuracies in percent, samples as fractions.

    Raises:
        ConfigError: If a task is unknown, or refused because it runs code that a model wrote.
        DataError: If a task's data is neither cached nor downloadable.
    """
    names = [str(task["name"]) for task in tasks]
    check_tasks(names)
    if not names:
        return []
    once = adds_bos(tokenizer)
    metrics: list[Metric] = []
    for task in tasks:
        name = str(task["name"])
        manager = _manager(name)
        lm = ReportingLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
            add_bos_token=True if once else None,
            on_progress=on_progress,
            label=f"accuracy {name}",
        )
        results = simple_evaluate(
            model=lm,
            tasks=_load_task(manager, name),
            num_fewshot=task.get("num_fewshot"),
            limit=task.get("limit"),
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        stated = {
            "name": "lm_eval",
            "task": name,
            "limit": task.get("limit"),
            "seed": seed,
            "bos": "BOS once per request" if once else "as tokenized: no BOS",
            "chat_template": False,
            "log_softmax": "float32",
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "versions": versions("lm_eval", "torch", "transformers", "tokenizers", "datasets"),
        }
        metrics += _metrics(name, results, stated)
        if samples_dir is not None:
            _write_samples(samples_dir / f"{name}.jsonl", results["samples"])
    return metrics


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts BOS in front by default, i.e. whether its model was trained with it."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _manager(name: str) -> TaskManager:
    """lm_eval's index, reduced to the folder of a task where that is enough: the whole one takes 10 s to read.

    Groups and tags may reach into other folders, so they get the whole index.
    """
    if name == TASK_NAME:
        return TaskManager(include_path=str(TASK_DIR), include_defaults=False)
    folders = declaring_folders(name)
    if len(folders) == 1:
        manager = TaskManager(include_path=str(next(iter(folders))), include_defaults=False)
        entry = manager.task_index.get(name)
        if entry is not None and entry.kind in (Kind.TASK, Kind.PY_TASK):
            return manager
    return TaskManager()


def _load_task(manager: TaskManager, name: str) -> list[Any]:
    """Build a task, which downloads its data; a group comes back whole, a tag as its tasks."""
    entry = manager.task_index.get(name)
    if entry is None:  # lm_eval would go on and look for a file of that name
        raise ConfigError(f"lm_eval has no task {name!r}.", key="EVALUATION.TASKS", value=name)
    if (entry.cfg or {}).get("unsafe_code"):  # before its functions are imported
        raise _unsafe(name)
    try:
        loaded = manager.load([name])
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        # what `datasets` raises offline or for a missing set depends on where it notices
        raise DataError(
            f"The data of task {name!r} cannot be loaded: {type(error).__name__}: {error}. "
            "Check the network, or run once with a connection so that the data is cached."
        ) from error
    for member, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise _unsafe(member)
    group = loaded.get("groups", {}).get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _unsafe(name: str) -> ConfigError:
    message = f"Task {name!r} runs code that the model writes, which Quantdeck does not allow. Choose another task."
    return ConfigError(message, key="EVALUATION.TASKS", value=name)


def _metrics(name: str, results: Mapping[str, Any], stated: Mapping[str, Any]) -> list[Metric]:
    """Metrics of the asked task or group; for a tag, of each of its tasks."""
    reported = [name] if name in results["results"] else sorted(results["results"])
    metrics: list[Metric] = []
    for task in reported:
        values = results["results"][task]
        members = _members(task, results)
        shots = _common(results["n-shot"].get(member) for member in members)
        logged = [sample for member in members for sample in results["samples"][member]]
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            scores = _scores(logged, metric, filter_name, float(value))
            percent = metric in PERCENT_METRICS
            scale = 100.0 if percent else 1.0
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            label = f"{task} ({shots} shot), {metric}" + ("" if filter_name == "none" else f", {filter_name}")
            questions = len({(sample["doc_hash"], sample["doc_id"]) for sample in logged})
            protocol = {
                **stated,
                "task": task,
                "task_version": _common(results["versions"].get(member) for member in members),
                "num_fewshot": shots,
                "metric": metric,
                "filter": filter_name,
                "questions": questions,
                "questions_sha256": _digest(logged),
                "summary": f"lm_eval {stated['versions']['lm_eval']}, {label}; {questions} questions; "
                f"{stated['bos']}; {stated['dtype']}, {stated['device']}",
            }
            metrics.append(
                Metric(
                    metric="accuracy" if percent else metric,
                    name=label,
                    value=scale * float(value),
                    stderr=scale * float(stderr) if isinstance(stderr, int | float) else None,
                    unit="%" if percent else "",
                    higher_is_better=bool(results["higher_is_better"].get(task, {}).get(metric, True)),
                    protocol=protocol,
                    samples=scores,
                )
            )
    return metrics


def _members(task: str, results: Mapping[str, Any]) -> list[str]:
    """The leaf tasks whose questions make up a task or group."""
    if task in results["samples"]:
        return [task]
    children = results.get("group_subtasks", {}).get(task, [])
    return [leaf for child in children for leaf in _members(child, results)]


def _scores(logged: Samples | list[dict[str, Any]], metric: str, filter_name: str, value: float) -> list[float]:
    """Per-question scores, if their mean is the reported value; empty for aggregates of another kind."""
    chosen = [s[metric] for s in logged if isinstance(s, dict) and s["filter"] == filter_name and metric in s]
    if not chosen or not all(isinstance(score, int | float) for score in chosen):
        return []
    scores = [float(score) for score in chosen]
    return scores if abs(sum(scores) / len(scores) - value) < 1e-9 else []


def _common(values: Iterable[Any]) -> Any:
    """The value that all agree on, else the sorted distinct values as text."""
    distinct = {str(value): value for value in values}
    return next(iter(distinct.values())) if len(distinct) == 1 else ", ".join(sorted(distinct))


def _digest(logged: Iterable[Mapping[str, Any]]) -> str:
    """Identity of the questions and their prompts, in order: equal digests may be compared in pairs."""
    seen = hashlib.sha256()
    for sample in logged:
        seen.update(f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']}\n".encode())
    return seen.hexdigest()


def _write_samples(path: Path, samples: Samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
