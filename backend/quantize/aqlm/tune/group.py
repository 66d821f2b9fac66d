"""The processes that tune one model together, or the only one. Parameters are spread over them by rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Group:
    """This process among those that tune together.

    Attributes:
        rank: Its number.
        size: How many there are; 1: no communication takes place.
    """

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def rows(self, count: int) -> tuple[int, int]:
        """First and last row, exclusive, that this process holds of `count`: as FSDP chunks a parameter."""
        chunk = -(-count // self.size)
        return min(self.rank * chunk, count), min((self.rank + 1) * chunk, count)

    def gather_rows(self, mine: Tensor, count: int) -> Tensor:
        """All `count` rows of a tensor of which every process gives its own."""
        if self.size == 1:
            return mine
        chunk = -(-count // self.size)
        padded = mine.new_zeros((chunk, *mine.shape[1:]))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:count]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The rows of a parameter or gradient that this process holds, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def spread(module: nn.Module, group: Group) -> None:
    """Have each process hold some rows of a module's parameters; FSDP2 gathers them while the module runs."""
    if group.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(module.parameters()).device.type
        # Always sharded again after a forward pass: evaluation must not leave gathered parameters that then go stale.
        fully_shard(module, mesh=init_device_mesh(device, (group.size,)), reshard_after_forward=True)
