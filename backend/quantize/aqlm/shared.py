"""Tensors and small messages between processes of one machine, without pickle and without files.

A message is a JSON object over a Unix socket; tensors travel beside it as anonymous shared memory (`memfd`), which the
kernel frees when nobody holds it any more, however its holders end.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

MAX_MESSAGE = 2**16  # bytes of JSON
MAX_TENSORS = 16
DTYPES = {"float32": torch.float32, "int32": torch.int32}


def share(tensor: Tensor) -> int:
    """A new descriptor of shared memory that holds a copy of a CPU tensor, not empty. The caller closes it."""
    descriptor = os.memfd_create("tensor")
    size = tensor.numel() * tensor.dtype.itemsize
    os.ftruncate(descriptor, size)
    memory = mmap.mmap(descriptor, size)
    torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)
    return descriptor


def send(end: socket.socket, message: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, int]]) -> None:
    """Send a message.

    Args:
        end: Of a pair of `SOCK_SEQPACKET` sockets.
        message: JSON values.
        tensors: What is shared, and the descriptors of `share`; these stay open.
    """
    about = {name: [str(t.dtype).split(".")[1], list(t.shape)] for name, (t, _) in tensors.items()}
    data = json.dumps({"message": message, "tensors": about}).encode()
    socket.send_fds(end, [data], [descriptor for _, descriptor in tensors.values()])


def receive(end: socket.socket) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The next message and its tensors, which lie in shared memory; None if the other side has closed or ended."""
    try:
        data, descriptors, _, _ = socket.recv_fds(end, MAX_MESSAGE, MAX_TENSORS)
    except ConnectionResetError:
        return None
    if not data:
        return None
    content = json.loads(data)
    tensors = {}
    for (name, (dtype, shape)), descriptor in zip(content["tensors"].items(), descriptors, strict=True):
        kind, count = DTYPES[dtype], prod(shape)
        memory = mmap.mmap(descriptor, count * kind.itemsize)
        os.close(descriptor)
        tensors[name] = torch.frombuffer(memory, dtype=kind, count=count).view(shape)
    return content["message"], tensors
