"""3x3 convolutions with weights that never change, on CPUs, by Winograd's minimal filtering.

F(4x4, 3x3) of Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, takes 36 products where a
direct convolution takes 144. The points 0, ±1/sqrt(2), ±sqrt(2) and infinity keep float32's error near that of a direct
one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from teddy_ray.kernels.build import library

POINTS = (math.sqrt(0.5), math.sqrt(2.0))
TRANSFORMED_IN_THE_KERNEL = 2**16
"""Number of filters from which they are transformed anew each time: that takes a twentieth of the time, and four times
fewer bytes are kept and read."""


class WinogradConv2d(nn.Conv2d):
    """A frozen convolution for which `fits` holds, float32 and channels-last: (n c h w) -> (n d h w).

    It has all that the convolution has, for a model may read that.
    """

    packed: Tensor
    backward_packed: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        channels, bias = (convolution.in_channels, convolution.out_channels), convolution.bias
        super().__init__(*channels, 3, padding=1, bias=bias is not None, device="meta")
        weight = convolution.weight.detach()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # back to the input: the same convolution with its filters turned and its channels exchanged
        self.register_buffer("packed", _pack(weight), persistent=False)
        self.register_buffer("backward_packed", _pack(weight.flip(2, 3).transpose(0, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _convolve(x, self.packed, self.backward_packed)
        return y if self.bias is None else y + self.bias[:, None, None]


def fits(module: nn.Module) -> bool:
    """Whether a module is a convolution that `WinogradConv2d` computes."""
    return (
        type(module) is nn.Conv2d
        and module.weight.dtype == torch.float32
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
        and module.in_channels % library().panel() == 0 == module.out_channels % library().panel()
        and max(module.in_channels, module.out_channels) <= library().most_channels()
    )


@torch.library.custom_op("teddy_ray::winograd", mutates_args=(), device_types="cpu")
def _convolve(x: Tensor, weight: Tensor, backward_weight: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    d, transformed = _filters(weight, c)
    assert weight.is_contiguous() and x.dtype == weight.dtype == torch.float32  # noqa: PT018
    y = torch.empty((n, d, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    if not y.numel():
        return y
    sizes = (n, h, w, c, d, transformed, torch.get_num_threads())
    scratch = x.new_empty(library().scratch(*sizes))
    library().convolve(*(tensor.data_ptr() for tensor in (x, weight, y, scratch)), *sizes)
    return y


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, backward_weight: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return torch.empty(
        (n, _filters(weight, c)[0], h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    weight, backward_weight = ctx.saved_tensors
    return _convolve(gradient, backward_weight, weight), None, None


_convolve.register_autograd(_differentiate, setup_context=_keep)


def _filters(weight: Tensor, c: int) -> tuple[int, bool]:
    """Number of filters of packed weights, and whether they are transformed."""
    blocks, rows, panel = weight.shape
    return (blocks // 36 * panel, True) if rows == c else (blocks * panel, False)


def _pack(weight: Tensor) -> Tensor:
    """(d c 3 3) -> (36*d/p c p), transformed, p being the width of a panel. Many as they are: (d/p c*9 p).

    Not four-dimensional, or the compiler would lay them out as an image, channels-last.
    """
    d, c = weight.shape[:2]
    p = library().panel()
    if d * c >= TRANSFORMED_IN_THE_KERNEL:
        return weight.reshape(-1, p, c * 9).transpose(1, 2).contiguous()
    tiles = _transform(weight)
    return tiles.reshape(-1, p, c).transpose(1, 2).contiguous()


def _transform(weight: Tensor) -> Tensor:
    """G w G^T of each filter, (d c 3 3) -> (6 6 d c)."""
    a, b = POINTS
    za, zb = 2 * a * a * (a * a - b * b), 2 * b * b * (b * b - a * a)
    rows = [
        [1 / (a * b) ** 2, 0, 0],
        *[[1 / za, sign * a / za, a * a / za] for sign in (1, -1)],
        *[[1 / zb, sign * b / zb, b * b / zb] for sign in (1, -1)],
        [0, 0, 1],
    ]
    G = torch.tensor(rows, dtype=torch.float64)
    return torch.einsum("ai,dcij,bj->abdc", G, weight.double(), G).float()
