from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.trained_linear import CodeIndex, TrainedLinear

SCHEMES = [(2, 5, 8), (1, 7, 4), (3, 2, 1), (1, 9, 8)]  # K, B, G; the last one has words that nothing uses
OUT, GROUPS = 24, 6


def random_weight(books: int, bits: int, size: int, seed: int = 0) -> AdditiveWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (OUT, GROUPS, books), generator=generator, dtype=torch.int32)
    codebooks = torch.randn(books, 1 << bits, size, generator=generator).half().float()
    return AdditiveWeight(codes, codebooks, (torch.rand(OUT, generator=generator) + 0.1).half().float())


def reference(weight: AdditiveWeight, codebooks: Tensor, scales: Tensor) -> Tensor:
    """W by indexing, float64, differentiable by torch itself."""
    words = [codebooks[k][weight.codes[..., k].long()] for k in range(len(codebooks))]
    return torch.stack(words).sum(0).flatten(1) * scales[:, None]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_those_of_plain_indexing(scheme: tuple[int, int, int], recompute: bool) -> None:
    weight = random_weight(*scheme)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, weight.shape[1], generator=generator)
    bias, grad = torch.randn(OUT, generator=generator), torch.randn(3, 5, OUT, generator=generator)
    linear = TrainedLinear(weight, bias, recompute=recompute)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    found = linear(mine)
    found.backward(grad)

    shift = linear.codebooks.detach().double() / weight.codebooks.double()
    assert shift.unique().numel() == 1
    codebooks = linear.codebooks.detach().double().requires_grad_()
    scales = linear.scales.detach().double().requires_grad_()
    b = bias.double().requires_grad_()
    expected = theirs @ reference(weight, codebooks, scales).T + b
    expected.backward(grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert linear.bias is not None
    pairs = [(linear.codebooks, codebooks), (linear.scales, scales), (linear.bias, b), (mine, theirs)]
    for a, e in pairs:
        assert a.grad is not None and e.grad is not None
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=1e-4, atol=1e-5 * float(e.grad.abs().max()))
    used = torch.zeros(scheme[0], 1 << scheme[1], dtype=torch.bool)
    for k in range(scheme[0]):
        used[k, weight.codes[..., k].long().flatten()] = True
    assert bool((linear.codebooks.grad[~used] == 0).all())
    assert scheme != SCHEMES[-1] or not bool(used.all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_value_comes_back_exactly(scheme: tuple[int, int, int]) -> None:
    """Shifting magnitude between scales and codebooks loses nothing."""
    weight = random_weight(*scheme)
    for factor in (1.0, 2.0**-9, 2.0**7):
        shared = AdditiveWeight(weight.codes, weight.codebooks * factor, weight.scales / factor)
        linear = TrainedLinear(shared)
        value = linear.value
        assert torch.equal(value.codebooks, shared.codebooks)
        assert torch.equal(value.scales, shared.scales)
        assert torch.equal(value.codes, shared.codes)
        torch.testing.assert_close(linear.weight, shared.dequantize(), rtol=1e-6, atol=1e-6)
        rows = reference(weight, linear.codebooks.detach().double(), torch.ones(OUT).double()).norm(dim=1)
        assert 0.7 < rows.square().mean().sqrt() < 1.5  # of unit norm, but for a power of two


def test_a_weight_of_zeros() -> None:
    weight = random_weight(2, 3, 4)
    linear = TrainedLinear(AdditiveWeight(weight.codes, weight.codebooks * 0, weight.scales))
    linear(torch.ones(1, weight.shape[1])).sum().backward()
    assert linear.codebooks.grad is not None and bool(linear.codebooks.grad.isfinite().all())


def test_gather_and_scatter_are_transposes() -> None:
    weight = random_weight(2, 4, 8)
    index = CodeIndex(weight.codes, 16)
    generator = torch.Generator().manual_seed(2)
    table, values = torch.randn(32, 8, generator=generator), torch.randn(OUT * GROUPS, 8, generator=generator)
    one = (index.gather(table).double() * values.double()).sum()
    other = (table.double() * index.scatter(values).double()).sum()
    assert float(one) == pytest.approx(float(other), rel=1e-5)
