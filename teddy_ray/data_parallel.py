"""Workers that share each step of one training: a batch is cut among them, and their gradients are summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """The workers of one training. Alone by default.

    handle: torch.distributed's process group, None where there is one worker.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None

    def part_of(self, batch: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """This worker's rows of a batch."""
        return batch[self.rank :: self.size]

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum the gradients of all workers, in one flat tensor of a fixed layout.

        DistributedDataParallel lays its buckets out anew after the first step, so that a training that was resumed
        would add in another order than one that was not.
        """
        if self.size > 1:
            self._sum([parameter.grad for parameter in model.parameters() if parameter.grad is not None])

    def average_buffers(self, model: nn.Module) -> None:
        """Average what each worker's BatchNorms remember of its own part of the batches."""
        if self.size > 1:
            buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            self._sum(buffers)
            for buffer in buffers:
                buffer /= self.size

    def sum_number(self, value: float) -> float:
        """The sum of a number over all workers."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        device = "cuda" if dist.get_backend(self.handle) == "nccl" else "cpu"
        total = total.to(device)
        dist.all_reduce(total, group=self.handle)
        return float(total)

    def _sum(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.handle)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def join_group(rank: int, world_size: int, group_size: int, device: torch.device) -> Group:
    """The group of a worker, in a world cut into groups of neighbours. Every worker of the world has to call it."""
    if group_size == 1:
        return Group()
    backend = "nccl" if device.type == "cuda" else "gloo"
    handles = [
        dist.new_group(list(range(first, first + group_size)), backend=backend)
        for first in range(0, world_size, group_size)
    ]
    return Group(rank % group_size, group_size, handles[rank // group_size])
