"""Optimisation of one unit of synthetic images by Eq. 7. A unit's result depends on its key and members alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from teddy_ray.augment import apply_boxes, draw_boxes
from teddy_ray.errors import StageError
from teddy_ray.matching import make_targets, member_loss
from teddy_ray.moments import Moments
from teddy_ray.pixels import from_pixels, to_pixels
from teddy_ray.randomness import generator
from teddy_ray.recipe import Recipe
from teddy_ray.taps import Taps

CHECK_EVERY = 25
"""Steps between two looks at the losses: each look waits for the device."""


@dataclass(frozen=True)
class Member:
    """A frozen model of the pool with the moments of the data at its taps, by layer."""

    name: str
    model: nn.Module
    moments: Mapping[str, Moments]


@dataclass(frozen=True)
class UnitResult:
    """images: (n c h w) uint8, the last iterate. losses: (steps 2), statistics and u CE, means over the n members."""

    images: npt.NDArray[np.uint8]
    losses: npt.NDArray[np.float32]


def noise_start(num: int, channels: int, image_size: int, key: Sequence[str | int]) -> npt.NDArray[np.uint8]:
    """Grey images with Gaussian noise, (num channels image_size image_size)."""
    noise = generator("noise", *key).normal(0.5, 0.25, (num, channels, image_size, image_size))
    return (noise.clip(0, 1) * 255).round().astype(np.uint8)


def optimise_unit(
    start: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    members: Sequence[Member],
    recipe: Recipe,
    *,
    key: str,
    device: torch.device,
    on_progress: Callable[[int, float], None] = lambda step, loss: None,
) -> UnitResult:
    """Optimise the images of a unit together.

    start: (n c h w) uint8; labels: (n,); key: the unit's name, from which all its draws come.
    on_progress: called with the step and the latest loss at every look at the losses.
    Raises StageError naming unit, step and member where a loss or its gradient is not finite.
    """
    synthesis, scope, blend = recipe.synthesis, recipe.statistics.scope, recipe.statistics.blend
    y = torch.from_numpy(labels).to(device)
    S = from_pixels(start, device).requires_grad_()
    optimiser = torch.optim.Adam([S], lr=synthesis.learning_rate, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, synthesis.steps)
    n = synthesis.models_per_step
    losses = torch.zeros(synthesis.steps, n, 2, device=device)
    drawn = np.zeros((synthesis.steps, n), dtype=np.int64)
    checked = 0

    with contextlib.ExitStack() as stack:
        taps = [stack.enter_context(Taps(member.model)) for member in members]
        targets = [
            make_targets([member.moments[layer] for layer in tap.layers], y, scope=scope, blend=blend, device=device)
            for member, tap in zip(members, taps, strict=True)
        ]
        for step in range(synthesis.steps):
            drawn[step] = generator("members", recipe.seed, key, step).choice(len(members), n, replace=False)
            boxes = draw_boxes(synthesis.augmentation, generator("crop", recipe.seed, key, step), len(S))
            optimiser.zero_grad(set_to_none=True)
            for index, theta in enumerate(drawn[step]):
                # the views anew for each member, so that the graph of one is freed before the next
                statistics, ce = member_loss(
                    members[theta].model,
                    taps[theta],
                    apply_boxes(S, boxes),
                    y,
                    targets[theta],
                    u=synthesis.ce_weight,
                    first_layer_factor=synthesis.first_layer_factor,
                )
                ((statistics + ce) / n).backward()
                losses[step, index, 0] = statistics.detach()
                # a gradient that is not finite spoils the images under a loss that is: it counts as the loss
                assert S.grad is not None
                losses[step, index, 1] = torch.where(torch.isfinite(S.grad).all(), ce.detach(), torch.nan)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                S.clamp_(0, 1)
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == synthesis.steps:
                _check_finite(losses[checked : step + 1], checked, key, drawn, members)
                checked = step + 1
                on_progress(checked, float(losses[step].sum(1).mean()))
    return UnitResult(images=to_pixels(S).cpu().numpy(), losses=losses.mean(1).cpu().numpy())


def _check_finite(
    losses: Tensor, first_step: int, key: str, drawn: npt.NDArray[np.int64], members: Sequence[Member]
) -> None:
    bad = torch.nonzero(~torch.isfinite(losses.sum(2)))
    if len(bad):
        step, index = first_step + int(bad[0, 0]), int(bad[0, 1])
        member = members[drawn[step, index]].name
        raise StageError(
            "synthesis",
            f"unit {key}, step {step}, member {member}",
            "the loss or its gradient is not finite; lower synthesis.learning_rate or synthesis.ce_weight, or look at "
            "that member",
        )
