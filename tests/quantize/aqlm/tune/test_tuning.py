"""Tuning as a whole: divergence falls on text that nothing has seen, and the best model is what is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.errors import ConfigError, DataError
from backend.formats.additive_reader import read_additive, read_unquantized
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.tune.report import StepReport
from backend.quantize.aqlm.tune.tuner import Tuner
from tests.formats.crash import digest
from tests.quantize.aqlm.tune.tiny import TRAIN, VALIDATION, mean_divergence, quantized, tuned
from tests.quantize.models import VOCABULARY, make_model

P_ONLY = {"update_codes": False}
V_ONLY = {"update_codebooks_and_scales": False, "update_non_quantized_parameters": False, "code_lr": 0.1}


def parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Codes, codebooks and scales, and all else of a checkpoint."""
    weights = dict(read_additive(folder))
    codes = {name: weight.codes for name, weight in weights.items()}
    continuous = {f"{n}.{part}": getattr(w, part) for n, w in weights.items() for part in ("codebooks", "scales")}
    return codes, continuous, dict(read_unquantized(folder))


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The part of the tensors that are not the same."""
    assert one.keys() == other.keys()
    return sum(not torch.equal(one[name], other[name]) for name in one) / len(one)


@pytest.mark.parametrize(
    ("settings", "part", "changes"),
    [
        ({}, 0.3, None),
        (P_ONLY, 0.3, (False, True, True)),
        (P_ONLY | {"update_non_quantized_parameters": False}, 0.6, (False, True, False)),
        (V_ONLY, 0.7, (True, False, False)),
        ({"lamb": False, "lr": 1e-3, "code_lr": 1e-2}, 0.5, None),
        ({"lr_schedule": "cosine", "warmup_steps": 3, "lr": 1e-2}, 0.3, None),
        ({"p_only_epochs": 2, "code_lr": 0.1}, 0.3, (True, True, True)),
        (V_ONLY | {"delta_decay": 1.0, "force_code_update": True, "max_epochs": 1}, 1.0, (True, False, False)),
    ],
)
def test_divergence_falls_on_unseen_text(
    base: Path, start: Path, tmp_path: Path, settings: dict[str, Any], part: float, changes: Any
) -> None:
    report = tuned(base, start, tmp_path, **settings)
    before, after = mean_divergence(base, start), mean_divergence(base, tmp_path)
    assert after < part * before
    assert report.after == pytest.approx(after, rel=0.3)  # the validation's, of the same language
    assert report.before == pytest.approx(before, rel=0.3)
    if changes is not None:
        for old, new, changed in zip(parts(start), parts(tmp_path), changes, strict=True):
            assert (differ(old, new) > 0.5) == changed
            assert changed or differ(old, new) == 0


def test_the_report_tells_what_happened(base: Path, start: Path, tmp_path: Path) -> None:
    told: list[StepReport] = []
    stages: list[str] = []
    report = tuned(base, start, tmp_path, on_step=told.append, on_stage=stages.append, code_lr=0.1)
    assert stages == ["teacher", "load", "tune", "save"]
    assert [step.step for step in told] == list(range(25))  # 4 epochs of 48 sequences, 8 at a time
    assert {step.total for step in told} == {24}
    assert math.isnan(told[0].loss)
    assert tuple(step.loss for step in told[1:]) == report.losses
    measured = [(step.step, step.validation) for step in told if step.validation is not None]
    assert measured == [(m.step, m.divergence) for m in report.validation]
    assert [step for step, _ in measured] == [0, 4, 8, 12, 16, 20, 24]
    assert report.losses[-1] < report.losses[0]
    assert report.losses[0] == pytest.approx(report.before, rel=0.3)
    assert (report.steps, report.best_step, report.stopped, report.resumed_at) == (24, 24, None, 0)
    assert (report.tokens, report.validation_tokens) == (TRAIN.numel(), VALIDATION.numel())
    assert report.kept == {}
    codes, _, _ = parts(start)
    groups = sum(c.shape[0] * c.shape[1] for c in codes.values())
    changed = sum(int((new != codes[n]).any(-1).sum()) for n, new in parts(tmp_path)[0].items())
    assert 0 < changed <= round(sum(report.changed) * groups)  # a group may change more than once
    assert all(0 <= part <= 0.02 for part in report.changed)  # 1 % of every Linear, rounded up


def test_the_same_twice(base: Path, start: Path, tmp_path: Path) -> None:
    tuned(base, start, tmp_path / "a")
    tuned(base, start, tmp_path / "b")
    tuned(base, start, tmp_path / "c", seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_microbatches_and_checkpointing_change_rounding_alone(base: Path, start: Path, tmp_path: Path) -> None:
    whole = tuned(base, start, tmp_path / "whole", max_epochs=2)
    for number, settings in enumerate(({"microbatch_size": 2}, {"gradient_checkpointing": True})):
        report = tuned(base, start, tmp_path / str(number), max_epochs=2, **settings)
        assert report.losses == pytest.approx(whole.losses, rel=1e-3)
        assert report.after == pytest.approx(whole.after, rel=1e-3)


def test_16_bit_types(base: Path, start: Path, tmp_path: Path) -> None:
    exact = tuned(base, start, tmp_path / "exact", code_lr=0.1)
    rough = tuned(
        base, start, tmp_path / "rough", code_lr=0.1, amp_dtype="bfloat16", master_dtype="bfloat16",
        straight_through_buffer_dtype="bfloat16", code_adam_16bit=True,
    )  # fmt: skip
    assert rough.amp_dtype == "bfloat16"
    assert mean_divergence(base, tmp_path / "rough") == pytest.approx(
        mean_divergence(base, tmp_path / "exact"), rel=0.1
    )
    assert rough.losses != exact.losses


def test_the_best_model_is_kept_not_the_last(base: Path, start: Path, tmp_path: Path) -> None:
    """Steps that become longer and longer."""
    report = tuned(base, start, tmp_path / "long", lr=0.1, warmup_steps=60, max_epochs=6)
    assert 0 < report.best_step < report.steps == 36
    assert report.validation[-1].divergence > 1.5 * report.after
    assert mean_divergence(base, tmp_path / "long") < 1.3 * report.after


def test_early_stop(base: Path, start: Path, tmp_path: Path) -> None:
    report = tuned(base, start, tmp_path, lr=0.05, warmup_steps=60, max_epochs=30, early_stop=2)
    assert report.stopped == "2 measurements in a row were no better"
    assert report.steps == report.best_step + 8 < 180


def test_a_loss_that_is_not_finite_ends_it_and_the_best_is_kept(
    base: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "_factor", lambda _, step: 1.0 if step < 10 else 1e30)
    report = tuned(base, start, tmp_path)
    assert report.stopped == "the loss was not finite in step 12"
    assert (report.best_step, report.steps) == (8, 11)
    assert all(map(math.isfinite, report.losses))
    assert all(math.isfinite(m.divergence) for m in report.validation)
    assert mean_divergence(base, tmp_path) == pytest.approx(report.after, rel=0.3)


def test_without_any_gain_the_model_stays_as_it_is(base: Path, start: Path, tmp_path: Path) -> None:
    report = tuned(base, start, tmp_path, lr=3.0, max_epochs=1)
    assert report.best_step == 0
    assert "as it was given" in report.notes[0]
    for old, new in zip(parts(start), parts(tmp_path), strict=True):
        assert differ(old, new) == 0
    assert digest(tmp_path)["model.safetensors"] == digest(start)["model.safetensors"]


def test_biases_tied_embeddings_and_linears_that_stay(tmp_path: Path) -> None:
    source = make_model(tmp_path / "base", "qwen2", tie_word_embeddings=True, intermediate_size=96)
    folder = quantized(source, tmp_path / "start", AdditiveScheme(1, 4, 24))
    report = tuned(source, folder, tmp_path / "out")
    assert len(report.kept) == 12
    assert mean_divergence(source, tmp_path / "out") < 0.6 * mean_divergence(source, folder)
    assert digest(tmp_path / "out")["config.json"] == digest(folder)["config.json"]
    assert parts(tmp_path / "out")[2].keys() == parts(folder)[2].keys()


def test_a_base_model_that_cannot_be_recorded(tmp_path: Path) -> None:
    source = make_model(tmp_path / "base", "gemma2", final_logit_softcapping=20.0)
    folder = quantized(source, tmp_path / "start")
    report = tuned(source, folder, tmp_path / "out")
    assert report.notes == ("the base model ran in every step, since it changes the head's outputs",)
    assert report.after < 0.7 * report.before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 64}, ConfigError, "batch_size: found 64, but there are 48"),
        ({"microbatch_size": 4, "processes": 4}, ConfigError, "found 8 with microbatch_size 4 x 4 processes"),
        ({"block_type": "GPTBlock"}, ConfigError, "block_type: found 'GPTBlock'"),
        ({"train": TRAIN + VOCABULARY}, DataError, "the model knows 96"),
        ({"validation": VALIDATION[:0]}, DataError, r"validation tokens have shape \(0, 32\)"),
    ],
)
def test_what_is_refused(base: Path, start: Path, tmp_path: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        tuned(base, start, tmp_path, **options)
