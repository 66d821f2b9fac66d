"""The pack-quantized layout against its description and against the library that defines it."""

from __future__ import annotations

import pytest
import torch

from backend.errors import CheckpointError
from backend.formats.compressed_tensors import column_order, pack, unpack
from tests.formats.models import random_weight

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, -1)


def slow_pack(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """Rows of codes as one number each, cut into signed 32-bit words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(number >> (32 * k)) & 0xFFFFFFFF for k in range(count)]
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "width"), [(8, 64), (5, 96), (3, 33), (40, 7)])
def test_bits(bits: int, out: int, width: int) -> None:
    weight = random_weight(out, width, -1, bits)
    packed = pack(weight)
    assert packed["weight_packed"].tolist() == slow_pack(weight.q, bits)
    assert packed["weight_zero_point"].T.tolist() == slow_pack(weight.zero.T, bits)
    assert packed["weight_shape"].tolist() == [out, width]
    types = {name: tensor.dtype for name, tensor in packed.items()}
    assert types == {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits: int, group_size: int, symmetric: bool) -> None:
    weight = random_weight(40, 384, group_size, bits, symmetric, torch.bfloat16)
    packed = pack(weight)
    assert ("weight_zero_point" in packed) == (not symmetric)
    back = unpack(packed, bits, group_size)
    for field in ("q", "scale", "zero"):
        assert torch.equal(getattr(back, field), getattr(weight, field))
    assert (back.bits, back.symmetric) == (bits, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_bit_identical_with_the_library(bits: int, group_size: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = random_weight(24, 256, group_size, bits, symmetric, torch.float32)
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    signed = (weight.zero.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scale, "weight_zero_point": signed}
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    ours = pack(weight)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    back = PackedQuantizationCompressor.decompress(dict(ours), scheme)["weight"]
    torch.testing.assert_close(back, weight.dequantize(), rtol=0, atol=0)


def test_zeros_of_older_checkpoints_are_unpacked() -> None:
    weight = random_weight(24, 128, 32, 4)
    packed = pack(weight)
    packed["weight_zero_point"] = (weight.zero.to(torch.int16) - 8).to(torch.int8)
    assert torch.equal(unpack(packed, 4, 32).zero, weight.zero)


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("weight_packed", torch.zeros(24, 17, dtype=torch.int32), r"\(24, 17\).*needs \(24, 16\)"),
        ("weight_scale", torch.zeros(24, 2).half(), r"\(24, 2\).*\(24, 4\)"),
        ("weight_shape", torch.tensor([24]), "needs"),
        ("weight_zero_point", torch.zeros(24, 4, dtype=torch.int32), r"int32 \(24, 4\); needed is int32 \(3, 4\)"),
        ("weight_zero_point", torch.zeros(3, 4), "float32"),
    ],
)
def test_contradictions_are_refused(part: str, tensor: torch.Tensor, reason: str) -> None:
    packed = pack(random_weight(24, 128, 32, 4)) | {part: tensor}
    with pytest.raises(CheckpointError, match=reason):
        unpack(packed, 4, 32)


def test_order_of_columns() -> None:
    assert column_order(torch.tensor([1, 0, 1, 0]), 4, 2).tolist() == [1, 3, 0, 2]
    for g_idx in ([0, 0, 0, 1], [0, 1], [0, 0, 2, 2], [0, 0, -1, 1]):
        with pytest.raises(CheckpointError, match="2 of the 4 inputs"):
            column_order(torch.tensor(g_idx), 4, 2)
