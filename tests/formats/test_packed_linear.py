"""PackedInt4Linear against a float64 product."""

from __future__ import annotations

import pytest
import torch

from backend.formats.int4_kernels import kernel_for
from backend.formats.packed_linear import PackedInt4Linear
from tests.formats.models import random_weight

# Relative Frobenius error of the output. bfloat16: 2^-9 for scales, shifts, x W's rounding and y each.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}

SHAPES = [
    (64, 128, 32),  # one tile of the AVX-512 kernel
    (192, 256, 128),
    (128, 192, 64),
    (48, 128, 64),  # no multiple of 64 rows: dequantised
    (8, 64, 32),  # too few rows for any kernel
    (64, 96, 32),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "width", "group_size"), SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_product(out: int, width: int, group_size: int, rows: int, dtype: torch.dtype) -> None:
    weight = random_weight(out, width, group_size)
    torch.manual_seed(0)
    x, bias = torch.randn(2, rows, width).to(dtype), torch.randn(out).to(dtype)
    y = PackedInt4Linear(weight, bias, dtype=dtype)(x)
    reference = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert y.dtype == dtype
    assert y.shape == (2, rows, out)
    assert (y.double() - reference).norm() <= TOLERANCE[dtype] * reference.norm()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 70])
def test_fewer_bits_and_whole_rows(bits: int, group_size: int, symmetric: bool, rows: int) -> None:
    weight = random_weight(64, 384, group_size, bits, symmetric)
    torch.manual_seed(0)
    x = torch.randn(rows, 384)
    linear = PackedInt4Linear(weight, dtype=torch.float32)
    reference = x.double() @ weight.dequantize(torch.float64).T
    assert (linear(x).double() - reference).norm() <= 1e-6 * reference.norm()
    assert linear.packed.numel() * linear.packed.element_size() == 64 * 384 // 2
    if symmetric:  # bfloat16 then rounds the scale alone
        both = PackedInt4Linear(weight).scales_and_shifts
        assert bool((both[..., 1] == 0).all())


def test_whole_rows_use_the_kernel() -> None:
    kernel = kernel_for(torch.device("cpu"))
    if kernel is None:
        pytest.skip("this build of torch has no int4 kernel whose layout can be read back")
    assert PackedInt4Linear(random_weight(64, 96, -1)).takes_rows(1)
    assert not PackedInt4Linear(random_weight(64, 100, -1)).takes_rows(1)


def test_decode_and_prompt_paths_agree() -> None:
    linear = PackedInt4Linear(random_weight(128, 256, 64), dtype=torch.float32)
    x = torch.randn(100, 256)
    one_by_one = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), one_by_one, rtol=1e-4, atol=1e-4)


def test_dequantized_weight_is_the_stored_one() -> None:
    weight = random_weight(192, 256, 64)
    dense = PackedInt4Linear(weight, dtype=torch.float32).dequantize()
    torch.testing.assert_close(dense, weight.dequantize(), rtol=1e-6, atol=1e-6)


def test_memory_is_half_a_byte_per_weight() -> None:
    linear = PackedInt4Linear(random_weight(256, 512, 128))
    assert linear.packed.numel() * linear.packed.element_size() == 256 * 512 // 2
    assert list(linear.parameters()) == []


def test_empty_input() -> None:
    linear = PackedInt4Linear(random_weight(64, 128, 32), dtype=torch.float32)
    assert linear(torch.zeros(0, 128)).shape == (0, 64)


def test_codes_survive_the_kernels_layout() -> None:
    kernel = kernel_for(torch.device("cpu"))
    if kernel is None:
        pytest.skip("this build of torch has no int4 kernel whose layout can be read back")
    q = random_weight(kernel.tile[0] * 3, 160, 32).q
    assert torch.equal(kernel.unpack(kernel.pack(q), *q.shape), q)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 70])
def test_product_on_cuda(rows: int) -> None:
    weight = random_weight(256, 512, 128)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    y = PackedInt4Linear(weight, device="cuda")(x)
    reference = x.double() @ weight.dequantize(torch.float64).to("cuda").T
    assert (y.double() - reference).norm() <= TOLERANCE[torch.bfloat16] * reference.norm()
