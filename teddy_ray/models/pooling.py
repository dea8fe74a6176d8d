"""Adaptive pooling whose backward pass is deterministic on GPUs, which PyTorch's own is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """As its base class; on GPUs by two matrices of averages, for the backward pass of the base adds atomically."""

    def forward(self, x: Tensor) -> Tensor:
        return by_matrices(x, self.output_size) if x.is_cuda else super().forward(x)


def by_matrices(x: Tensor, output_size: int | tuple[int | None, ...] | None) -> Tensor:
    """Means over cells that cover the image, as adaptive pooling cuts them. (n c h w) -> (n c, output_size)."""
    sizes = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    rows, columns = (
        _averages(old, old if new is None else new, x) for old, new in zip(x.shape[-2:], sizes, strict=True)
    )
    return rows @ x @ columns.T


def replace_pooling(network: nn.Module) -> nn.Module:
    """Put it in place of PyTorch's, in place. A mean over the whole image is deterministic as it is."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1)):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, AdaptiveAvgPool2d(module.output_size))
    return network


def _averages(old: int, new: int, like: Tensor) -> Tensor:
    """(new old): row i holds the mean over [floor(i old / new), ceil((i + 1) old / new))."""
    cell = torch.arange(new, device=like.device)[:, None]
    pixel = torch.arange(old, device=like.device)
    inside = (pixel >= cell * old // new) & (pixel < -(-(cell + 1) * old // new))
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)
