"""Both protocols against a slow reference in float64 that follows their description word by word."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from backend.errors import CheckpointError, ConfigError, DataError, ModelError
from backend.evaluate.perplexity import full_windows, gptq_windows, measure_perplexity, read_rows, window_nll
from tests.evaluate.tiny import make_model


def probabilities(model: LlamaForCausalLM, ids: list[int]) -> np.ndarray:
    """Softmax of all positions in float64, (tokens, vocab)."""
    exact = make_model().double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([ids])).logits[0].numpy()
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference_gptq(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> list[float]:
    """Running perplexities as the guides' script computes them, one token at a time."""
    text = "".join(" \n" if row == "" else row for row in rows)
    tokens = tokenizer(text)["input_ids"]
    nll, count, running = 0.0, 0, []
    for window in range(len(tokens) // 512):
        ids = tokens[window * 512 : (window + 1) * 512]
        given = ids.copy()
        if tokenizer.bos_token_id is not None:
            given[0] = tokenizer.bos_token_id
        chances = probabilities(model, given)
        for j in range(256, 511):
            nll -= math.log(chances[j, ids[j + 1]])
            count += 1
        running.append(math.exp(nll / count))
    return running


@pytest.mark.parametrize("with_bos", [True, False])
def test_gptq_wikitext_equals_reference(
    with_bos: bool,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_without_bos: PreTrainedTokenizerFast,
    rows: list[str],
) -> None:
    chosen = tokenizer if with_bos else tokenizer_without_bos
    expected = reference_gptq(model, chosen, rows)
    assert len(expected) >= 3
    headline, corpus = measure_perplexity(
        model, chosen, rows, text_name="words:test", protocols=["gptq_wikitext"], batch_size=2
    )
    assert headline["value"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert corpus["value"] == pytest.approx(expected[-1], rel=1e-5)
    assert headline["protocol"]["windows"] == len(expected)
    assert headline["protocol"]["tokens"] == 255 * len(expected)
    assert "BOS (0)" in headline["protocol"]["bos"] if with_bos else "no BOS" in headline["protocol"]["bos"]
    assert "mean of running" in headline["protocol"]["summary"] and "corpus" in corpus["protocol"]["summary"]


@pytest.mark.parametrize("with_bos", [True, False])
def test_full_window_scores_every_token(
    with_bos: bool,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_without_bos: PreTrainedTokenizerFast,
    rows: list[str],
) -> None:
    chosen = tokenizer if with_bos else tokenizer_without_bos
    tokens = chosen("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 99, 100):
        window = tokens[start : start + 100]
        given = [chosen.bos_token_id, *window] if with_bos else window
        chances = probabilities(model, given)
        for j in range(len(given) - 1):
            total -= math.log(chances[j, given[j + 1]])
            count += 1
    (metric,) = measure_perplexity(
        model, chosen, rows, text_name="words:test", protocols=["full_window"], window=100, batch_size=3
    )
    assert metric["value"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert metric["protocol"]["tokens"] == count == (100 if with_bos else 99) * (len(tokens) // 100)
    assert metric["protocol"]["dropped_tokens"] == len(tokens) % 100


def test_batch_size_and_limit_do_not_change_the_windows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[str]
) -> None:
    windows = full_windows(tokenizer, rows, 64, max_windows=7)
    one_by_one = window_nll(model, windows, batch_size=1)
    seen: list[int] = []
    together = window_nll(model, windows, batch_size=5, on_step=seen.append)
    assert together == pytest.approx(one_by_one, rel=1e-5)
    assert seen == [5, 7]
    assert window_nll(model, full_windows(tokenizer, rows, 64), batch_size=8)[:7] == pytest.approx(one_by_one, rel=1e-5)


def test_progress_counts_windows_of_all_protocols(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[str]
) -> None:
    steps: list[tuple[int, int, str]] = []
    measure_perplexity(
        model, tokenizer, rows, text_name="t", max_windows=2, batch_size=1, on_progress=lambda *s: steps.append(s)
    )
    assert [step for step, _, _ in steps] == [1, 2, 3, 4]
    assert {total for _, total, _ in steps} == {4}
    assert steps[0][2].endswith("gptq_wikitext") and steps[-1][2].endswith("full_window")


def test_short_text_is_refused_with_both_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"has \d+ tokens.*one window of 512"):
        gptq_windows(tokenizer, ["the river walks"])


def test_window_beyond_the_context_is_refused(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> None:
    with pytest.raises(ModelError, match="feeds 511 tokens.*max_position_embeddings is 128"):
        measure_perplexity(
            make_model(context=128),
            tokenizer,
            rows,
            text_name="t",
            protocols=["full_window", "gptq_wikitext"],
            window=64,
        )


def test_unknown_protocol_names_the_known_ones(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[str]
) -> None:
    with pytest.raises(ConfigError, match="gptq_wikitext or full_window"):
        measure_perplexity(model, tokenizer, rows, text_name="t", protocols=["c4"])


def test_broken_weights_are_an_error_not_a_number(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> None:
    broken = make_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="no finite likelihood"):
        window_nll(broken, full_windows(tokenizer, rows, 64, max_windows=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no rows"), ('{"text": "a"}\n{"txt": "b"}\n', "Line 2"), ('{"text": 3}\n', "Line 1"), ("x\n", "Line 1")],
)
def test_text_file_errors_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_text_file_rows_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in ["b", "", "a\n"]))
    assert read_rows(path) == ["b", "", "a\n"]
