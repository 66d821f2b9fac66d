"""torch's packed int4 matrix products for CPU and CUDA, and the way back out of their weight layouts.

Both compute x @ W.T with W = (q - 8) * scale + shift per group of inputs, from a packed weight and one tensor
(in / group_size, out, 2) of scales and shifts. The packed layouts are private to torch, so they are not assumed:
the weight is a grid of tiles, and the order of the nibbles inside a tile is found by packing a tile whose
position numbers are spelled in base 16. A layout that does not come back exactly is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

CUDA_INNER_K_TILES = 8
GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Kernel:
    """One backend's kernel.

    Attributes:
        tile: Rows and columns (out, in) of the tiles in its packed layout.
        max_rows: Above this many rows of x, dequantising and multiplying is faster.
        dtypes: Types of x (and of scales and shifts) that it takes.
        pack: uint8 codes (out, in) -> packed weight.
        multiply: (x (rows, in), packed, group_size, scales and shifts) -> (rows, out).
        order: For each position in a tile, row-major, the nibble that holds it.
    """

    tile: tuple[int, int]
    max_rows: int
    dtypes: tuple[torch.dtype, ...]
    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, int, Tensor], Tensor]
    order: Tensor

    def takes(self, out: int, width: int, group_size: int, dtype: torch.dtype) -> bool:
        """True if the kernel can hold a weight of this shape."""
        rows, columns = self.tile
        return (
            out % rows == 0
            and width % columns == 0
            and width % group_size == 0
            and group_size in GROUP_SIZES
            and dtype in self.dtypes
        )

    @cached_property
    def _in_order(self) -> bool:
        return torch.equal(self.order, torch.arange(len(self.order), device=self.order.device))

    def unpack(self, packed: Tensor, out: int, width: int) -> Tensor:
        """uint8 codes (out, in) of a packed weight."""
        rows, columns = self.tile
        tiles = _nibbles(packed, rows * columns)
        if not self._in_order:
            tiles = tiles[:, self.order]
        return tiles.view(out // rows, width // columns, rows, columns).transpose(1, 2).reshape(out, width)


def kernel_for(device: torch.device) -> Kernel | None:
    """The kernel of a device, or None where torch has none whose layout can be read back."""
    if device.type == "cpu":
        return _cpu_kernel()
    if device.type == "cuda":
        return _cuda_kernel(device.index if device.index is not None else torch.cuda.current_device())
    return None


@cache
def _cpu_kernel() -> Kernel | None:
    def pack(q: Tensor) -> Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)  # 1: unused on CPU

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    # Tiles are one column by as many rows as the vector unit's int4 kernel takes at once: AVX-512 64, AVX2 32.
    for rows in (64, 32, 16):
        order = _tile_order(pack, (rows, 1), torch.device("cpu"))
        if order is not None:
            return Kernel((rows, 1), 32, dtypes, pack, torch._weight_int4pack_mm_for_cpu, order)
    return None


@cache
def _cuda_kernel(index: int) -> Kernel | None:
    device = torch.device("cuda", index)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None

    def pack(q: Tensor) -> Tensor:
        pairs = (q[:, 0::2] << 4) | q[:, 1::2]
        return torch._convert_weight_to_int4pack(pairs.contiguous(), CUDA_INNER_K_TILES)

    tile = (8, 16 * CUDA_INNER_K_TILES)
    order = _tile_order(pack, tile, device)
    if order is None:
        return None
    return Kernel(tile, 16, (torch.bfloat16,), pack, torch._weight_int4pack_mm, order)


def _tile_order(pack: Callable[[Tensor], Tensor], tile: tuple[int, int], device: torch.device) -> Tensor | None:
    """Where each element of a tile is stored; None if the layout is no grid of such tiles.

    Checked on a weight of 4 x 64 tiles against `Kernel.unpack`'s reading.
    """
    rows, columns = tile
    size = rows * columns
    copies = -(-32 // columns)  # the CPU kernel wants at least one group of 32 inputs
    position = torch.arange(size, device=device).view(rows, columns).repeat(1, copies)
    try:
        found = torch.zeros(size, dtype=torch.long, device=device)
        for digit in range(3):  # a tile has at most 16**3 elements
            packed = pack(((position >> (4 * digit)) & 15).to(torch.uint8))
            found += _nibbles(packed, size)[0].long() << (4 * digit)
        order = found.argsort()
        shape = (4 * rows, 64 * columns)
        q = (torch.arange(shape[0] * shape[1], device=device) * 2654435761 >> 7) & 15
        q = q.view(shape).to(torch.uint8)
        tiles = _nibbles(pack(q), size)[:, order]
    except (RuntimeError, AttributeError):
        return None  # this build of torch lacks the kernel
    back = tiles.view(4, 64, rows, columns).transpose(1, 2).reshape(shape)
    return order if torch.equal(back, q) else None


def _nibbles(packed: Tensor, tile_size: int) -> Tensor:
    """uint8 (tiles, tile_size): the low nibbles of each tile's bytes, then the high ones."""
    data = packed.view(-1).view(torch.uint8).view(-1, tile_size // 2)
    return torch.cat((data & 15, data >> 4), dim=1)
