"""A member made ready for many passes with weights that never change."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from teddy_ray.kernels.winograd import WinogradConv2d, fits

BATCH_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm})


class FrozenBatchNorm(nn.Module):
    """A BatchNorm whose running statistics no longer change: an affine map per channel, in float32.

    (n channels ...) -> the same shape and type. A layer as BatchNorm is: statistics are taken at its input.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None  # noqa: PT018
        scale = torch.rsqrt(var.double() + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.detach().double()
        shift = -mean.double() * scale
        shift = shift if norm.bias is None else shift + norm.bias.detach().double()
        self.register_buffer("scale", scale.to(var.dtype))
        self.register_buffer("shift", shift.to(var.dtype))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(self.shift.view(shape), x.to(self.scale.dtype), self.scale.view(shape)).to(x.dtype)


def frozen_copy(model: nn.Module, dtype: torch.dtype = torch.float32, *, kernels: bool = False) -> nn.Module:
    """A copy for passes with weights that never change, as `dtype`, channels-last.

    BatchNorms become affine maps; with `kernels`, convolutions use Winograd's algorithm where they fit. Layers keep
    their names. A BatchNorm without running statistics stays as it is, and so does one that does more than its class.
    The model's own buffers, which normalise its pixels, stay in their type: 8-bit pixels are too fine for bfloat16.
    """
    frozen = copy.deepcopy(model).requires_grad_(False)
    replaced: dict[str, nn.Module] = {}
    for name, module in frozen.named_modules():
        if type(module) in BATCH_NORMS and module.running_mean is not None:
            replaced[name] = FrozenBatchNorm(cast(nn.modules.batchnorm._BatchNorm, module))
        elif kernels and fits(module):
            assert isinstance(module, nn.Conv2d)
            replaced[name] = WinogradConv2d(module)
    own = dict(frozen.named_buffers(recurse=False))
    frozen = frozen.to(dtype).to(memory_format=torch.channels_last)
    for name, buffer in own.items():
        setattr(frozen, name, buffer)
    for name, module in replaced.items():
        parent, _, child = name.rpartition(".")
        setattr(frozen.get_submodule(parent), child, module)
    return frozen.eval()
