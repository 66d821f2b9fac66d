"""Two nibble planes against a float64 product, and the choice of the Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.formats.packed_int8 import PackedInt8Linear, PermutedLinear, packed_linear
from backend.formats.packed_linear import PackedInt4Linear
from tests.formats.models import random_weight

# bfloat16: 2^-9 for scales, shifts, each plane's weights, their two products and the sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "width", "group_size"), [(64, 128, 32), (128, 256, -1), (48, 128, 64), (10, 38, -1)])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bits", [5, 8])
def test_product(
    bits: int, out: int, width: int, group_size: int, symmetric: bool, rows: int, dtype: torch.dtype
) -> None:
    weight = random_weight(out, width, group_size, bits, symmetric, torch.bfloat16)
    torch.manual_seed(0)
    x, bias = torch.randn(2, rows, width).to(dtype), torch.randn(out).to(dtype)
    y = PackedInt8Linear(weight, bias, dtype=dtype)(x)
    reference = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert y.dtype == dtype
    assert y.shape == (2, rows, out)
    assert (y.double() - reference).norm() <= TOLERANCE[dtype] * reference.norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantized_weight_is_the_stored_one(symmetric: bool) -> None:
    weight = random_weight(192, 256, 64, 8, symmetric)
    dense = PackedInt8Linear(weight, dtype=torch.float32).dequantize()
    torch.testing.assert_close(dense, weight.dequantize(), rtol=1e-6, atol=1e-6 * float(dense.abs().max()))


def test_every_symmetric_code_is_exact() -> None:
    weight = random_weight(64, 256, -1, 8, symmetric=True)
    weight.q.copy_(torch.arange(256, dtype=torch.uint8).repeat(64, 1))
    assert torch.equal(PackedInt8Linear(weight, dtype=torch.float32).dequantize(), weight.dequantize())


def test_memory_is_one_byte_per_weight() -> None:
    linear = PackedInt8Linear(random_weight(256, 512, 128, 8))
    assert sum(plane.packed.numel() * plane.packed.element_size() for plane in (linear.high, linear.low)) == 256 * 512
    assert list(linear.parameters()) == []


@pytest.mark.parametrize(
    ("bits", "width", "kind"),
    [(2, 64, PackedInt4Linear), (4, 64, PackedInt4Linear), (8, 64, PackedInt8Linear), (4, 33, nn.Linear)],
)
@pytest.mark.parametrize("biased", [True, False])
def test_choice(bits: int, width: int, kind: type, biased: bool) -> None:
    weight = random_weight(24, width, -1, bits)
    bias = torch.randn(24) if biased else None
    linear = packed_linear(weight, bias, dtype=torch.float32, device="cpu")
    assert type(linear) is kind
    x = torch.randn(3, width)
    expected = nn.functional.linear(x, weight.dequantize(), bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_permuted_inputs() -> None:
    order = torch.tensor([2, 0, 1])
    inner = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(PermutedLinear(inner, order)(x), inner(x[:, order]))


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("rows", [1, 70])
def test_product_on_cuda(rows: int, group_size: int) -> None:
    weight = random_weight(256, 512, group_size, 8)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    y = PackedInt8Linear(weight, device="cuda")(x)
    reference = x.double() @ weight.dequantize(torch.float64).to("cuda").T
    assert (y.double() - reference).norm() <= TOLERANCE[torch.bfloat16] * reference.norm()
