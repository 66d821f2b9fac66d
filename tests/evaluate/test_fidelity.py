"""Divergence and flips against their definitions in float64, both ways of running two models, and the program."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from backend.errors import CheckpointError, ConfigError, DataError, ModelError
from backend.evaluate import fidelity
from backend.evaluate.divergence import Divergence, compare_in_turns, compare_together, position_divergence
from backend.evaluate.fidelity import measure, metrics_of, spread
from backend.evaluate.perplexity import Windows, full_windows
from backend.evaluate.report import build_rows, format_table
from backend.evaluate.stats import distance_interval
from backend.event_stream import EventWriter
from tests.conftest import write_jsonl
from tests.evaluate.test_worker import run
from tests.evaluate.tiny import make_model


def by_definition(base: Tensor, quantized: Tensor) -> Tensor:
    """Sum over the vocabulary of p (log p - log q), in float64."""
    log_p, log_q = base.double().log_softmax(-1), quantized.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> Windows:
    return full_windows(tokenizer, rows, 32, 12)


@pytest.fixture(scope="module")
def other() -> LlamaForCausalLM:
    return make_model(noise=0.05)


@torch.inference_mode()
def reference(base: LlamaForCausalLM, other: LlamaForCausalLM, windows: Windows) -> tuple[Tensor, Tensor]:
    """KL and flips of every window, all logits at once."""
    p, q = (model(input_ids=windows.tokens[:, :-1]).logits for model in (base, other))
    return by_definition(p, q).mean(-1), (p.argmax(-1) != q.argmax(-1)).double().mean(-1)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0])
def test_the_divergence_is_the_definitions_even_where_it_is_tiny(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(300, 1000, generator=generator)
    other = base + noise * torch.randn(300, 1000, generator=generator)
    kl, flips = position_divergence(base, other)
    torch.testing.assert_close(kl, by_definition(base, other), rtol=1e-3, atol=0.0)
    assert torch.equal(flips, base.argmax(-1) != other.argmax(-1))


def test_rows_are_cut_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = torch.randn(50, 64), torch.randn(50, 64)
    whole = position_divergence(base, other)
    monkeypatch.setattr("backend.evaluate.divergence.CHUNK", {"cpu": 7 * 64 + 3, "cuda": 1})
    assert all(torch.equal(a, b) for a, b in zip(position_divergence(base, other), whole, strict=True))


def test_predictions_that_share_nothing_do_not_overflow() -> None:
    base, other = torch.zeros(2, 3), torch.zeros(2, 3)
    base[:, 0], other[:, 1] = 300.0, 300.0
    kl, flips = position_divergence(base, other)
    torch.testing.assert_close(kl, by_definition(base, other))
    assert kl[0] == pytest.approx(300) and bool(flips.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_exactly_nothing_away_from_itself(windows: Windows, dtype: torch.dtype, tmp_path: Path) -> None:
    one, same = make_model().to(dtype), make_model().to(dtype)
    for found in (
        compare_together(lambda: one, lambda: same, windows, batch_size=5),
        compare_in_turns(lambda: one, lambda: same, windows, spool_dir=tmp_path, batch_size=5),
    ):
        assert found == Divergence([0.0] * 12, [0.0] * 12)


def test_every_window_has_its_own_number(model: LlamaForCausalLM, other: LlamaForCausalLM, windows: Windows) -> None:
    steps: list[int] = []
    found = compare_together(lambda: model, lambda: other, windows, batch_size=5, on_step=steps.append)
    kl, flips = reference(model, other, windows)
    assert found.kl == pytest.approx(kl.tolist(), rel=1e-4)
    assert found.flips == pytest.approx(flips.tolist()) and 0 < sum(found.flips) < 12
    assert steps == [5, 10, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [1, 6, 1000])
def test_one_model_after_the_other_gives_the_same_numbers(
    windows: Windows, tmp_path: Path, room: int, dtype: torch.dtype
) -> None:
    """Whatever fits into the file: a batch of 4 windows, two of them, everything."""
    models = make_model().to(dtype), make_model(noise=0.05).to(dtype)
    loaded, steps = [0, 0], []

    def opened(side: int) -> LlamaForCausalLM:
        loaded[side] += 1
        return models[side]

    found = compare_in_turns(
        lambda: opened(0), lambda: opened(1), windows, spool_dir=tmp_path, batch_size=4,
        spool_bytes=room * 32 * 300 * dtype.itemsize, on_step=steps.append,
    )  # fmt: skip
    assert found == compare_together(lambda: models[0], lambda: models[1], windows, batch_size=4)
    rounds = {1: 3, 6: 3, 1000: 1}[room]
    assert loaded == [rounds, rounds] and steps[-1] == 24 == max(steps) and steps == sorted(steps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_turns", [False, True])
def test_other_vocabularies_and_broken_outputs_are_refused(
    model: LlamaForCausalLM, windows: Windows, tmp_path: Path, in_turns: bool
) -> None:
    def compare(other: LlamaForCausalLM) -> None:
        if in_turns:
            compare_in_turns(lambda: model, lambda: other, windows, spool_dir=tmp_path)
        else:
            compare_together(lambda: model, lambda: other, windows)

    with pytest.raises(CheckpointError, match="320 tokens and its base model 300"):
        compare(make_model(vocabulary=320))
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(CheckpointError, match="Window 0 has no finite KL"):
        compare(broken)


def test_windows_are_spread_over_the_text(windows: Windows) -> None:
    def numbers(chosen: Windows) -> list[int]:
        return [next(i for i, one in enumerate(windows.tokens) if torch.equal(one, row)) for row in chosen.tokens]

    assert numbers(spread(windows, 4)) == [0, 3, 6, 9]
    assert numbers(spread(windows, 5)) == [0, 2, 4, 7, 9]
    assert spread(windows, 12) is windows and spread(windows, 99) is windows


def test_the_interval_is_students_of_the_windows_and_never_below_nothing() -> None:
    values = [0.001, 0.002, 0.0015, 0.0025, 0.0012, 0.0018, 0.0022, 0.0016]
    mean, s = sum(values) / 8, math.sqrt(sum((v - sum(values) / 8) ** 2 for v in values) / 7)
    margin = 2.3646 * s / math.sqrt(8)  # 97.5 % of Student's t with 7 degrees of freedom
    assert distance_interval([0.0] * 8, values) == pytest.approx((mean - margin, mean + margin), rel=2e-3)
    assert distance_interval([0.0] * 8, [0.0] * 7 + [1.0]) == pytest.approx((0.0, 0.125 * (1 + 2.3646)), rel=2e-3)
    assert distance_interval([0.0] * 7, values[:7]) is None
    assert distance_interval([0.0] * 9, [0.0] * 9) is None


PROTOCOL: Mapping[str, Any] = {
    "windows": 8, "windows_of_text": 267, "window": 512, "tokens": 4096, "base": "a/model", "text": "text:test",
    "dtype": "bfloat16", "device": "cpu",
}  # fmt: skip


def test_rows_tell_small_distances_with_three_digits() -> None:
    def table(kl: float) -> list[str]:
        samples = [kl * (1 + 0.1 * (i % 2)) / 1.05 for i in range(8)]
        result = metrics_of(Divergence(samples, [0.02, 0.01] * 4), PROTOCOL)
        rows = build_rows({"metrics": []}, {"metrics": []}, fidelity=result)
        assert [row["metric"] for row in rows] == ["KL divergence", "top-1 flips"]
        assert all(row["interval"][0] < row["impact"] < row["interval"][1] for row in rows)
        assert rows[1]["quantized"] == pytest.approx(1.5) and rows[1]["interval"][1] < 3  # percent
        lines = format_table(rows, "m").splitlines()
        assert len({line.count("|") for line in lines}) == 1  # no bar of a name ends a cell
        return [cell.strip() for cell in lines[2].split("|")[4:-1]]

    assert table(0.00071234) == ["0", "0.000712", "+0.000712"]
    assert table(5.7e-7) == ["0", "0.00000057", "+0.00000057"]
    assert table(0.0241) == ["0", "0.0241", "+0.0241"]
    assert table(1.5) == ["0", "1.50", "+1.50"]


@pytest.fixture
def request_of(folders: tuple[Path, Path], rows: list[str], tmp_path: Path) -> dict[str, Any]:
    text = write_jsonl(tmp_path / "eval.jsonl", [{"text": row} for row in rows])
    return {
        "baseline_dir": str(folders[0]), "quantized_dir": str(folders[1]), "base": {"name": "a/model", "sha256": "5"},
        "device": "cpu", "dtype": None, "text_file": str(text), "text_name": "words:test", "window": 32,
        "max_windows": 24, "windows": 10, "batch_size": 4, "spool_dir": str(tmp_path), "stage": "evaluate_fidelity",
        "configuration": "w4",
    }  # fmt: skip


def test_the_program_compares_the_models_of_two_folders(
    request_of: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, events, result, stderr = run("backend.evaluate.fidelity", request_of, tmp_path / "run")
    assert code == 0 and result is not None, stderr
    assert {(e["stage"], e["configuration"]) for e in events} == {("evaluate_fidelity", "w4")}
    assert events[0]["message"] == "loading the models" and events[-1]["step"] == events[-1]["total"] == 10
    assert [result[side]["decode_path"] for side in ("baseline", "quantized")] == ["bfloat16 weights"] * 2
    assert result["together"] and result["peak_rss_bytes"] > 10**8
    base, quantized = (result[side]["metrics"] for side in ("baseline", "quantized"))
    kl, flips = quantized
    assert [m["value"] for m in base] == [0, 0] and base[0]["samples"] == [0.0] * 10
    assert len(kl["samples"]) == 10 and kl["value"] == pytest.approx(sum(kl["samples"]) / 10)
    assert flips["value"] == pytest.approx(100 * sum(flips["samples"]) / 10) and flips["value"] > 0
    stated = kl["protocol"]
    assert (stated["windows"], stated["windows_of_text"], stated["tokens"]) == (10, 24, 320)
    assert (stated["dtype"], stated["device"], stated["base_sha256"]) == ("bfloat16", "cpu", "5")
    assert "10 of 24 windows of 32, 320 predictions; base a/model; words:test; bfloat16, cpu" in stated["summary"]

    monkeypatch.setattr(fidelity, "fits_together", lambda *_: False)
    told = io.StringIO()
    again = measure(request_of, EventWriter(told))
    assert not again["together"] and again["quantized"] == result["quantized"]
    last = json.loads(told.getvalue().splitlines()[-1])
    assert last["step"] == last["total"] == 20 and last["message"] == "divergence, one model after the other"


def test_what_does_not_fit_is_not_tried(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, quantized = (sum(p.stat().st_size for p in folder.glob("*.safetensors")) for folder in folders)
    needed = base + 1.5 * max(base, quantized)

    class Memory:
        available = needed

    monkeypatch.setattr(fidelity.psutil, "virtual_memory", lambda: Memory)
    assert not fidelity.fits_together(*folders, "cpu")
    Memory.available = needed + 1
    assert fidelity.fits_together(*folders, "cpu")


def test_a_model_without_a_bos_is_compared_too(
    folders: tuple[Path, Path],
    request_of: dict[str, Any],
    tokenizer_without_bos: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    for side, folder in zip(("baseline_dir", "quantized_dir"), folders, strict=True):
        copy = tmp_path / side
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        tokenizer_without_bos.save_pretrained(copy)
        request_of[side] = str(copy)
    result = measure(request_of, EventWriter(io.StringIO()))
    assert result["quantized"]["metrics"][0]["protocol"]["tokens"] == 310


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"baseline_dir": None}, ConfigError, "lacks the key 'baseline_dir'"),
        ({"dtype": "int8"}, ConfigError, "is no compute dtype"),
        ({"quantized_dir": "/nonexistent"}, CheckpointError, "/nonexistent"),
        ({"text_file": "/nonexistent"}, DataError, "/nonexistent"),
        ({"window": 100_000}, DataError, "100000"),
        ({"window": 1500, "max_windows": 1}, ModelError, "max_position_embeddings is 1024"),
    ],
)
def test_wrong_requests_end_with_a_reason(
    request_of: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    request = {key: value for key, value in (request_of | change).items() if value is not None}
    with pytest.raises(error, match=message):
        measure(request, EventWriter(io.StringIO()))


def test_damaged_weights_are_named(request_of: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in folders[1].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][:] = float("inf")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no finite KL divergence"):
        measure(request_of | {"quantized_dir": str(copy)}, EventWriter(io.StringIO()))
