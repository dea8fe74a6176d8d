"""Means and variances of channels in one pass over channels-last activations, on CPUs in float32.

Those of a batch in float32, for losses, and those of each image in float64, for statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teddy_ray.kernels.build import library


def channel_moments(activation: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (channels,) of (n channels positions), differentiable in it.

    Sums are taken around `near` (channels,), within a few sigma of the mean: digits are lost elsewhere.
    """
    mean, var = _channel_moments(activation, near)
    return mean, var


@torch.library.custom_op("teddy_ray::channel_moments", mutates_args=(), device_types="cpu")
def _channel_moments(activation: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    rows = activation.transpose(1, 2).contiguous()  # n positions channels: as a channels-last activation lies
    num_rows, c = rows.shape[0] * rows.shape[1], rows.shape[2]
    assert rows.dtype == near.dtype == torch.float32 and near.shape == (c,)  # noqa: PT018
    mean, var, near = rows.new_empty(c), rows.new_empty(c), near.contiguous()
    scratch = rows.new_empty(library().moments_scratch(num_rows, c))
    pointers = (tensor.data_ptr() for tensor in (rows, near, mean, var, scratch))
    library().channel_moments(*pointers, num_rows, c, torch.get_num_threads())
    return mean, var


@_channel_moments.register_fake
def _(activation: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    c = activation.shape[1]
    return activation.new_empty(c), activation.new_empty(c)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _differentiate(ctx: Any, of_mean: Tensor, of_var: Tensor) -> tuple[Tensor, None]:
    """d mean / dx = 1/N and d var / dx = 2 (x - mean) / N: an affine map of x per channel."""
    x, mean = ctx.saved_tensors
    scale = 2 * of_var / (x.shape[0] * x.shape[2])
    shift = of_mean / (x.shape[0] * x.shape[2]) - scale * mean
    return torch.addcmul(shift[:, None], x, scale[:, None]), None


_channel_moments.register_autograd(_differentiate, setup_context=_keep)


def image_moments(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (n channels), float64, of each image of (n channels positions). Not differentiable."""
    rows = activation.transpose(1, 2).contiguous()  # n positions channels: as a channels-last activation lies
    assert rows.dtype == torch.float32 and rows.shape[1]  # noqa: PT018
    n, positions, c = rows.shape
    mean, var = (rows.new_empty((n, c), dtype=torch.float64) for _ in range(2))
    pointers = (tensor.data_ptr() for tensor in (rows, mean, var))
    library().image_moments(*pointers, n, positions, c, torch.get_num_threads())
    return mean, var
