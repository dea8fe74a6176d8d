"""Workers that share each step of one training: a batch is cut among them, and their gradients are summed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
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
            norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            buffers = [
                buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
            ]
            self._sum(buffers)
            for buffer in buffers:
                buffer /= self.size

    def sum_number(self, value: float) -> float:
        """The sum of a number over all workers."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend(self.handle) == "nccl" else "cpu"
        total = torch.tensor([value], dtype=torch.float64, device=device)
        self._all_reduce(total)
        return float(total)

    def _sum(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def _all_reduce(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor, group=self.handle)
        except RuntimeError as error:
            raise ConnectionError(f"another worker of the training is gone ({error})") from error


def join_group(rank: int, world_size: int, group_size: int, *, own_gpus: bool) -> Group:
    """The group of a worker, in a world cut into groups of neighbours. Every worker of the world has to call it.

    own_gpus: no two workers share one, which nccl would refuse.
    """
    if group_size == 1:
        return Group()
    handles = [
        # others wait while the first one measures and publishes a member
        dist.new_group(
            list(range(first, first + group_size)), backend="nccl" if own_gpus else "gloo", timeout=timedelta(hours=12)
        )
        for first in range(0, world_size, group_size)
    ]
    return Group(rank % group_size, group_size, handles[rank // group_size])
