"""Products with additive weights on the CPU, straight from the packed codes: the numba kernels and their layout.

y[o] = scale[o] * sum over j, k of T[j, k, codes[o, j, k]] with T[j, k, m] = x[j * G : (j + 1) * G] . codebooks[k, m].
The tables T are made once per row of x; then every weight group costs one look-up. Outputs are cut into tiles; each
is summed by one thread, in an order that depends on nothing else, so that any number of threads gives the same bits.
(aqlm 1.1.7 runs its threads over j instead, all of them adding to the same outputs: with two threads its results are
wrong and change from call to call.)

Kernels are compiled when they are first used, in about two seconds, and not stored: numba's cache is made of pickles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MAX_NBITS = 8
"""Tables of more words cost more than they save, and codes are bytes here."""
TILE = 256
ALIGNMENT = 16
"""Outputs of a tile are a multiple of this, the width of the widest vector unit in float32."""
PARALLEL_LOOKUPS = 2**19
"""Fewer than this are done by one thread: waking another takes as long as 2^17 of them."""

_launching = threading.Lock()


@cache
def available() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def serves(nbits: int) -> bool:
    """Whether codes of so many bits are run by these kernels here."""
    return nbits <= MAX_NBITS and available()


def tile_size(out: int) -> int:
    """Outputs per tile: equal tiles of at most `TILE`, the last one filled up."""
    tiles = -(-out // TILE)
    return -(-out // (tiles * ALIGNMENT)) * ALIGNMENT


def tile_codes(codes: Tensor, size: int) -> Tensor:
    """Codes (out, J, K) in tiles (tiles, J * K, size), of the same type; beyond the last output they are 0."""
    out, groups, K = codes.shape  # noqa: N806
    tiles = -(-out // size)
    padded = torch.nn.functional.pad(codes.flatten(1), (0, 0, 0, tiles * size - out))
    return padded.view(tiles, size, groups * K).transpose(1, 2).contiguous()


def multiply(x: Tensor, codes: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """Rows of x times the transposed weight.

    Args:
        x: float32 (rows, in), contiguous.
        codes: uint8 (tiles, J * K, size), see `tile_codes`.
        words: Codebooks, float32 (K, G, 2^B).
        scales: float32 (tiles, size).

    Returns:
        float32 (rows, tiles * size).
    """
    rows, width = x.shape
    tiles, planes, size = codes.shape
    group = words.shape[1]
    tables = _tables()(x.numpy().reshape(rows, width // group, group), words.numpy())
    tables = tables.reshape(rows, 1, planes, words.shape[2])
    arguments = tables, codes.numpy(), scales.numpy()
    threads = torch.get_num_threads()
    if threads == 1 or tiles * rows == 1 or rows * codes.numel() < PARALLEL_LOOKUPS:
        y = _look_up("cpu")(*arguments)
    else:
        kernel = _look_up("parallel")
        with _launching:  # numba's own thread pool takes one caller at a time
            _set_threads(threads)
            y = kernel(*arguments)
    return torch.from_numpy(y).view(rows, tiles * size)


def warm_up() -> None:
    """Compile the kernels now."""
    _tables()
    _look_up("cpu")
    if torch.get_num_threads() > 1:
        _look_up("parallel")


@cache
def _numba() -> Any:
    numba: Any = import_module("numba")
    # The one layer that is always there, and the one that adds no second OpenMP beside torch's.
    numba.config.THREADING_LAYER = "workqueue"
    return numba


def _set_threads(count: int) -> None:
    numba = _numba()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


@cache
def _tables() -> Callable[..., Any]:
    """(J, G), (K, G, words) -> (J, K, words); any number of dimensions before J."""

    def tables(x: Any, words: Any, out: Any) -> None:
        codebooks, group, count = words.shape
        for k in range(codebooks):
            row = out[k]
            for m in range(count):
                row[m] = x[0] * words[k, 0, m]
            for t in range(1, group):
                value, word = x[t], words[k, t]
                for m in range(count):
                    row[m] += value * word[m]

    signature = ["void(float32[:], float32[:,:,::1], float32[:,::1])"]
    compiled: Callable[..., Any] = _numba().guvectorize(signature, "(g),(k,g,w)->(k,w)", nopython=True)(tables)
    return compiled


@cache
def _look_up(target: str) -> Callable[..., Any]:
    """(planes, words), (planes, size), (size) -> (size); dimensions before these are shared out among threads."""

    def look_up(tables: Any, codes: Any, scales: Any, y: Any) -> None:
        planes, size = codes.shape
        y[:] = 0
        whole = planes - planes % 4
        for p in range(0, whole, 4):  # four at a time: y is read and written once for them
            t0, t1, t2, t3 = tables[p], tables[p + 1], tables[p + 2], tables[p + 3]
            c0, c1, c2, c3 = codes[p], codes[p + 1], codes[p + 2], codes[p + 3]
            for o in range(size):
                y[o] += (t0[c0[o]] + t1[c1[o]]) + (t2[c2[o]] + t3[c3[o]])
        for p in range(whole, planes):
            t0, c0 = tables[p], codes[p]
            for o in range(size):
                y[o] += t0[c0[o]]
        for o in range(size):
            y[o] *= scales[o]

    signature = ["void(float32[:,::1], uint8[:,::1], float32[::1], float32[::1])"]
    make = _numba().guvectorize(signature, "(p,w),(p,s),(s)->(s)", nopython=True, target=target)
    compiled: Callable[..., Any] = make(look_up)
    return compiled
