"""KL divergence and its gradient against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from backend.quantize.aqlm.tune import divergence as module
from backend.quantize.aqlm.tune.divergence import divergence


@pytest.mark.parametrize("chunk_bytes", [2**20, 4 * 50 * 3])
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_against_autograd_in_float64(chunk_bytes: int, distance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk_bytes)
    torch.manual_seed(0)
    teacher = 5 * torch.randn(3, 7, 50)
    student = teacher + distance * torch.randn(3, 7, 50)
    exact = student.double().requires_grad_(True)
    loss = F.kl_div(exact.log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="sum")
    loss.backward()
    total, grad = divergence(teacher, student, gradient=True)
    assert grad is not None and grad.shape == student.shape
    assert float(total) == pytest.approx(float(loss.detach()), rel=1e-5, abs=21 * 1e-8)
    assert exact.grad is not None
    assert (grad - exact.grad).norm() / exact.grad.norm() < 1e-6 / distance


def test_16_bit_logits_give_16_bit_gradients() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 4, 50), torch.randn(2, 4, 50).bfloat16()
    total, grad = divergence(teacher, student, gradient=True)
    _, exact = divergence(teacher, student.float(), gradient=True)
    assert grad is not None and exact is not None and grad.dtype == torch.bfloat16
    assert (grad - exact).norm() / exact.norm() < 0.01
    assert divergence(teacher, student, gradient=False) == (total, None)


def test_equal_predictions() -> None:
    logits = 30 * torch.randn(4, 50)
    total, grad = divergence(logits, logits + 3.0, gradient=True)  # a shift changes no probability
    assert grad is not None
    assert abs(float(total)) < 1e-6
    assert float(grad.abs().max()) < 1e-5
