"""The AutoAWQ layouts against packers written as loops from the format's description."""

from __future__ import annotations

import pytest
import torch

from backend.errors import CheckpointError
from backend.formats.autoawq import pack, quantization_config, unpack
from backend.formats.weight import QuantizedWeight
from tests.formats.models import random_weight


def word(nibbles: list[int]) -> int:
    value = sum(n << (4 * k) for k, n in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def slow_gemm(weight: QuantizedWeight) -> tuple[list[list[int]], list[list[int]]]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k holds column 8c + order[k]

    def rows(values: torch.Tensor) -> list[list[int]]:  # (out, n) -> (n, out/8)
        table = values.tolist()
        out, n = values.shape
        return [[word([table[8 * c + order[k]][i] for k in range(8)]) for c in range(out // 8)] for i in range(n)]

    return rows(weight.q), rows(weight.zero)


def slow_gemv(weight: QuantizedWeight) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    q, zero, scale = weight.q.tolist(), weight.zero.tolist(), weight.scale.tolist()
    groups = len(zero[0])
    base = (groups + 7) // 8
    multiple = {32: 4, 64: 2, 128: 1}[weight.group_size]
    words = (base + multiple - 1) // multiple * multiple
    qweight = [[word(row[8 * c : 8 * c + 8]) for c in range(len(row) // 8)] for row in q]
    padded = [row + [0] * (8 * words - groups) for row in zero]
    qzeros = [[word(row[8 * c : 8 * c + 8]) for c in range(words)] for row in padded]
    return qweight, qzeros, [row + [0.0] * (8 * words - groups) for row in scale]


@pytest.mark.parametrize(("out", "width", "group_size"), [(16, 64, 32), (8, 128, 64), (24, 256, 128)])
def test_gemm_bits(out: int, width: int, group_size: int) -> None:
    weight = random_weight(out, width, group_size)
    packed = pack(weight, "GEMM")
    qweight, qzeros = slow_gemm(weight)
    assert packed["qweight"].dtype == packed["qzeros"].dtype == torch.int32
    assert packed["qweight"].tolist() == qweight  # (in, out/8)
    assert packed["qzeros"].tolist() == qzeros  # (in/g, out/8)
    assert torch.equal(packed["scales"], weight.scale.T)


@pytest.mark.parametrize(
    ("out", "width", "group_size", "words"),
    [(8, 64, 32, 4), (8, 1056, 32, 8), (8, 128, 64, 2), (4, 1088, 64, 4), (8, 256, 128, 1), (8, 1152, 128, 2)],
)
def test_gemv_bits_and_padding(out: int, width: int, group_size: int, words: int) -> None:
    weight = random_weight(out, width, group_size)
    packed = pack(weight, "GEMV")
    qweight, qzeros, scales = slow_gemv(weight)
    assert packed["qweight"].tolist() == qweight  # (out, in/8)
    assert packed["qzeros"].tolist() == qzeros
    assert packed["scales"].tolist() == scales
    assert packed["qzeros"].shape == (out, words)
    assert packed["scales"].shape == (out, 8 * words)


@pytest.mark.parametrize("version", ["GEMM", "GEMV"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_round_trip(version: str, group_size: int) -> None:
    weight = random_weight(40, 384, group_size)
    back = unpack(pack(weight, version), version, group_size)
    for field in ("q", "scale", "zero"):
        assert torch.equal(getattr(back, field), getattr(weight, field))


def test_dequantized_value_is_code_minus_zero_times_scale() -> None:
    weight = random_weight(8, 64, 32)
    dense = weight.dequantize(torch.float64)
    for o, i in [(0, 0), (3, 31), (7, 32), (5, 63)]:
        q, z, s = weight.q[o, i].item(), weight.zero[o, i // 32].item(), weight.scale[o, i // 32].item()
        assert dense[o, i].item() == (q - z) * s


@pytest.mark.parametrize("version", ["GEMM", "GEMV"])
def test_contradicting_shapes_are_refused(version: str) -> None:
    packed = pack(random_weight(16, 128, 32), version)
    with pytest.raises(CheckpointError, match="needs"):
        unpack(packed, version, 64)


def test_configuration() -> None:
    assert quantization_config(4, 64, ("lm_head",), "GEMV") == {
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "awq",
        "version": "gemv",
        "zero_point": True,
    }
