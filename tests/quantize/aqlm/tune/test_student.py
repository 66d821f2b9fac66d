"""The student is the quantized model, and its gradients are those of the whole computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.func import functional_call

from backend.errors import CheckpointError, ModelError
from backend.formats.additive_reader import read_additive, read_unquantized
from backend.formats.loader import load_model
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.tune.divergence import divergence
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.quantize.aqlm.tune.student import Student
from tests.quantize.aqlm.tune.tiny import TRAIN, quantized
from tests.quantize.models import make_model

CPU = torch.device("cpu")


def student(folder: Path, **settings: object) -> Student:
    return Student(folder, TuneSettings(**({"amp_dtype": "float32"} | settings)), CPU, Group())  # type: ignore[arg-type]


def test_it_predicts_what_the_checkpoint_does(start: Path) -> None:
    expected = load_model(start, dtype=torch.float32)(TRAIN[:4]).logits
    torch.testing.assert_close(student(start).logits(TRAIN[:4]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_everything_against_autograd_in_float64(base: Path, start: Path, checkpointing: bool) -> None:
    """The loss as a function of codebooks, scales and the rest, written down once more in float64."""
    ids = TRAIN[:6]
    found = student(start, gradient_checkpointing=checkpointing)
    teacher = load_model(base, dtype=torch.float32)(ids).logits
    logits = found.logits(ids)
    _, grad = divergence(teacher, logits.detach(), gradient=True)
    logits.backward(grad)

    exact = load_model(base, dtype=torch.float64)
    weights = dict(read_additive(start))
    parameters = {n: t.double().requires_grad_(True) for n, t in read_unquantized(start)}
    leaves = {}
    for name, weight in weights.items():
        codebooks = weight.codebooks.double().requires_grad_(True)
        scales = weight.scales.double().requires_grad_(True)
        plain = sum(codebooks[k][weight.codes[:, :, k].long()] for k in range(len(codebooks)))
        leaves[name] = (codebooks, scales)
        parameters[f"{name}.weight"] = plain.reshape(weight.shape) * scales[:, None]  # type: ignore[union-attr]
    theirs = functional_call(exact, parameters, kwargs={"input_ids": ids, "use_cache": False}).logits
    log_p = teacher.double().log_softmax(-1)
    F.kl_div(theirs.log_softmax(-1), log_p, log_target=True, reduction="sum").backward()

    assert set(found.linears) == set(weights)
    for name, (codebooks, scales) in leaves.items():
        grad = found.gradient(name)
        assert grad is not None
        assert found.gradient(name) is None  # it was handed over
        for mine, expected in zip(found.linears[name].gradients(grad), (codebooks.grad, scales.grad), strict=True):
            assert expected is not None
            assert (mine - expected).norm() / expected.norm() < 1e-4
    others = [name for name in parameters if name.removesuffix(".weight") not in weights]
    assert sorted(found.others) == sorted(others)
    for name in others:
        mine, expected = found.gradient(name), parameters[name].grad
        assert mine is not None and expected is not None
        assert (mine - expected).norm() / expected.norm() < 1e-4


def test_only_what_is_updated_has_gradients(start: Path) -> None:
    frozen = student(start, update_non_quantized_parameters=False)
    frozen.logits(TRAIN[:1]).sum().backward()
    assert frozen.gradient("model.norm.weight") is None
    assert frozen.gradient("model.layers.0.mlp.up_proj") is not None
    rest = student(start, update_codes=False, update_codebooks_and_scales=False)
    rest.logits(TRAIN[:1]).sum().backward()
    assert rest.gradient("model.norm.weight") is not None
    assert rest.gradient("model.layers.0.mlp.up_proj") is None


def test_tied_embeddings_biases_and_linears_that_stay(tmp_path: Path) -> None:
    """Qwen2 has biases at q, k, v; with a group of 24, only Linears of 96 inputs get codebooks."""
    source = make_model(tmp_path / "base", "qwen2", tie_word_embeddings=True, intermediate_size=96)
    folder = quantized(source, tmp_path / "start", AdditiveScheme(1, 4, 24))
    found = student(folder)
    assert list(found.linears) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert "model.layers.0.self_attn.q_proj.bias" in found.others
    assert "lm_head.weight" not in found.others
    assert found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight
    expected = load_model(folder, dtype=torch.float32)(TRAIN[:2]).logits
    torch.testing.assert_close(found.logits(TRAIN[:2]), expected, rtol=1e-5, atol=1e-5)


def test_16_bit_passes_are_near(start: Path) -> None:
    exact, rough = student(start), student(start, amp_dtype="bfloat16")
    logits = exact.logits(TRAIN[:2])
    assert 0 < (rough.logits(TRAIN[:2]) - logits).norm() / logits.norm() < 0.02


def test_what_is_no_aqlm_checkpoint(base: Path) -> None:
    with pytest.raises((ModelError, CheckpointError), match="AQLM"):
        student(base)
