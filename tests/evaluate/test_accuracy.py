"""Accuracy through lm_eval: right answers counted, BOS exactly once, questions kept for pairing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from backend.demo import TASK_DIR, TASK_NAME
from backend.errors import ConfigError, DataError
from backend.evaluate.accuracy import adds_bos, measure_accuracy
from backend.evaluate.tasks import check_tasks, task_exists

DEMO = {"name": TASK_NAME, "num_fewshot": 0, "limit": 12}


def questions(limit: int) -> list[dict[str, Any]]:
    lines = (TASK_DIR / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def log_likelihood(model: LlamaForCausalLM, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    chances = logits.log_softmax(-1)
    return sum(float(chances[len(context) + i - 1, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize("with_bos", [True, False])
def test_score_equals_choosing_the_likeliest_answer(
    with_bos: bool,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_without_bos: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    chosen = tokenizer if with_bos else tokenizer_without_bos
    assert adds_bos(chosen) is with_bos
    starts: list[list[int]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, args, kwargs: starts.extend((args[0] if args else kwargs["input_ids"])[:, :2].tolist()),
        with_kwargs=True,
    )
    steps: list[tuple[int, int, str]] = []
    try:
        (metric,) = measure_accuracy(
            model, chosen, [DEMO], batch_size=4, samples_dir=tmp_path, on_progress=lambda *s: steps.append(s)
        )
    finally:
        hook.remove()
    expected = []
    for question in questions(12):
        context = chosen(question["question"])["input_ids"]
        whole = [chosen(f"{question['question']} {choice}")["input_ids"] for choice in question["choices"]]
        scores = [log_likelihood(model, context, ids[len(context) :]) for ids in whole]
        expected.append(float(scores.index(max(scores)) == question["answer"]))
    assert metric["samples"] == expected
    right = sum(expected) / 12
    assert metric["value"] == pytest.approx(100 * right) and metric["unit"] == "%"
    assert metric["stderr"] == pytest.approx(100 * math.sqrt(right * (1 - right) / 11))
    assert metric["protocol"]["questions"] == 12 and metric["protocol"]["num_fewshot"] == 0
    if with_bos:
        assert all(first == 0 and second != 0 for first, second in starts), "BOS exactly once"
    else:
        assert "no BOS" in metric["protocol"]["bos"]
    assert steps[-1][0] == steps[-1][1] == 48
    logged = [json.loads(line) for line in (tmp_path / f"{TASK_NAME}.jsonl").read_text().splitlines()]
    assert [row["acc"] for row in logged] == expected


def test_names_are_checked_with_near_matches() -> None:
    assert task_exists(TASK_NAME) and task_exists("arc_challenge") and task_exists("mmlu")
    assert not task_exists("../questions")
    with pytest.raises(ConfigError, match="arc_challenge") as caught:
        check_tasks([TASK_NAME, "arc_chalenge"])
    assert caught.value.key == "EVALUATION.TASKS" and caught.value.value == "arc_chalenge"


def test_a_file_in_the_working_directory_is_not_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mytask").write_text("task: mytask\ndataset_path: json\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not among lm_eval's installed tasks"):
        check_tasks(["mytask"])


def test_task_whose_data_cannot_be_had_is_a_data_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"'arc_challenge' cannot be loaded.*network"):
        measure_accuracy(model, tokenizer, [{"name": "arc_challenge", "num_fewshot": 25, "limit": 4}])


def test_tasks_that_run_generated_code_are_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        measure_accuracy(model, tokenizer, [{"name": "humaneval", "num_fewshot": 0, "limit": 1}])
