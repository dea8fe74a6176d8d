"""Eq. 7 of Teddy (ECCV 2024): the loss of a batch of synthetic images S_B under members theta of the pool M.

L(S_B) = 1/n sum_theta [ sum_l w_l ( ||mu_l(f_theta(A(S_B))) - RM_l||_2 + ||var_l(f_theta(A(S_B))) - RV_l||_2 )
                         + u CE(f_theta(A(S_B)), y) ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from teddy_ray.kernels.moments import channel_moments
from teddy_ray.moments import Moments
from teddy_ray.taps import Taps


@dataclass(frozen=True)
class Target:
    """What a member's statistics should be: RM and RV per layer, each (channels,), with a weight of the whole."""

    RM: Sequence[Tensor]
    RV: Sequence[Tensor]
    weight: float = 1.0


def make_targets(
    moments: Sequence[Moments],
    pooled: Sequence[Moments],
    labels: Tensor,
    *,
    scope: str,
    blend: float,
    device: torch.device,
) -> list[Target]:
    """Targets of a batch, from the moments of each layer.

    moments: of the batch's classes, of which labels (n,) names the rows; pooled: of all data, in one row.
    scope: subset mixes the batch's own classes by their shares in it, global takes all data, blend asks for both,
    `blend` being the weight of the global one: losses are blended, never targets.
    """
    in_batch = torch.bincount(labels.cpu(), minlength=len(moments[0].count)).double() / len(labels)
    subset, whole = (moments, in_batch), (pooled, torch.ones(1, dtype=torch.float64))
    weighted = {
        "subset": [(1.0, subset)],
        "global": [(1.0, whole)],
        "blend": [(1.0 - blend, subset), (blend, whole)],
    }[scope]
    targets = []
    for weight, (layers, shares) in weighted:
        mixtures = [layer.mixture(shares) for layer in layers]
        targets.append(
            Target(
                RM=[mu.float().to(device) for mu, _ in mixtures],
                RV=[var.float().to(device) for _, var in mixtures],
                weight=weight,
            )
        )
    return targets


def layer_weights(channels: Sequence[int], *, first_layer_factor: float, normalise: bool) -> list[float]:
    """w_l of each layer: 1, `first_layer_factor` for the first, each divided by the root of its channels if told."""
    factors = [first_layer_factor, *[1.0] * (len(channels) - 1)]
    return [w / num**0.5 if normalise else w for w, num in zip(factors, channels, strict=True)]


def statistics_loss(
    activations: Sequence[Tensor], targets: Sequence[Target], weights: Sequence[float], *, kernels: bool = False
) -> Tensor:
    """The sum over layers l in Eq. 7. activations: per layer (n channels positions); weights: w_l. Returns a scalar."""
    loss = 0.0
    for index, (activation, w) in enumerate(zip(activations, weights, strict=True)):
        mu, var = batch_moments(activation, targets[0].RM[index], kernels=kernels)
        for target in targets:
            distance = torch.linalg.vector_norm(mu - target.RM[index])
            distance = distance + torch.linalg.vector_norm(var - target.RV[index])
            loss = loss + w * target.weight * distance
    assert isinstance(loss, Tensor)
    return loss


def batch_moments(activation: Tensor, near: Tensor, *, kernels: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (channels,) of (n channels positions), in float32 at least.

    Both sums in one pass, around `near` (channels,): with the mean that is aimed at, no digits are lost where the
    mean is much larger than sigma. kernels: by the CPU's own kernel, in float32.
    """
    if kernels:
        return channel_moments(activation, near)
    x = activation.to(torch.promote_types(activation.dtype, torch.float32))
    if not torch.compiler.is_compiling():  # each operation would be a pass of its own
        var, mu = torch.var_mean(x, dim=(0, 2), correction=0)
        return mu, var
    deviation = x - near[:, None]
    offset = deviation.mean((0, 2))
    return near + offset, deviation.square().mean((0, 2)) - offset.square()


def member_loss(
    model: nn.Module,
    taps: Taps,
    views: Tensor,
    y: Tensor,
    targets: Sequence[Target],
    *,
    u: float,
    weights: Sequence[float],
    kernels: bool = False,
) -> tuple[Tensor, Tensor]:
    """One member's two terms in Eq. 7: statistics and u CE. views: A(S_B), (n c h w); y: (n,). Returns two scalars."""
    logits = model(views).to(views.dtype)
    statistics = statistics_loss(taps.take(), targets, weights, kernels=kernels)
    return statistics, u * functional.cross_entropy(logits, y)
