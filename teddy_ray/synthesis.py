"""Optimisation of one unit of synthetic images by Eq. 7. A unit's result depends on its key and members alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from teddy_ray.augment import apply_boxes, draw_boxes, views_of_step
from teddy_ray.device import is_out_of_memory
from teddy_ray.errors import StageError
from teddy_ray.formation import enlarge_all
from teddy_ray.frozen import frozen_copy
from teddy_ray.matching import Target, layer_weights, make_targets, member_loss
from teddy_ray.moments import Moments
from teddy_ray.pixels import from_pixels
from teddy_ray.priors import prior
from teddy_ray.randomness import generator
from teddy_ray.recipe import Recipe
from teddy_ray.taps import Taps

LOOK_EVERY_S = 0.5
"""Seconds between two looks at the losses: each look waits for the device."""

BETAS = (0.5, 0.9)


class Member:
    """A model of the pool, frozen for good and tapped. dtype, kernels: what it computes in and how."""

    def __init__(
        self, name: str, model: nn.Module, dtype: torch.dtype = torch.float32, *, kernels: bool = False
    ) -> None:
        self.name, self.kernels = name, kernels
        self.model = frozen_copy(model, dtype, kernels=kernels)
        # entered for good: a compiled program is tied to its hooks
        self.taps = Taps(self.model).__enter__()

    def targets(
        self, moments: Mapping[str, Moments], pooled: Mapping[str, Moments], labels: Tensor, recipe: Recipe
    ) -> list[Target]:
        """What the statistics of a batch should be under this member.

        moments, pooled: by layer, of the batch's classes and of all data; labels: (n,) rows of the former.
        """
        own, of_all = ([known[layer] for layer in self.taps.layers] for known in (moments, pooled))
        part = recipe.statistics
        return make_targets(own, of_all, labels, scope=part.scope, blend=part.blend, device=labels.device)


@dataclass(frozen=True)
class State:
    """Where a unit stands after `step` steps: all that is needed to go on from there.

    images, exp_avg, exp_avg_sq: S and Adam's moments, (n c h w) float32. losses: (steps models 3), of which the first
    `step` rows are filled: statistics, u CE, priors.
    """

    step: int
    images: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    losses: Tensor

    @classmethod
    def begin(cls, start: npt.NDArray[np.uint8], recipe: Recipe, device: torch.device) -> State:
        """Before the first step. start: (n c h w)."""
        S = from_pixels(start, device)
        losses = torch.zeros(recipe.synthesis.steps, recipe.synthesis.models_per_step, 3, device=device)
        return cls(0, S, torch.zeros_like(S), torch.zeros_like(S), losses)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            **{name: value for name, value in vars(self).items() if name != "step"},
            "step": torch.tensor(self.step),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> State:
        """From a checkpoint."""
        # copied, for what is read from a file is aligned otherwise, and low bits of products may follow that
        on_device = {name: value.to(device, copy=True) for name, value in tensors.items() if name != "step"}
        return cls(step=int(tensors["step"]), **on_device)

    def mean_losses(self, last: int) -> list[float]:
        """Statistics, u CE and priors, means over the models of the last so many steps."""
        rows = self.losses[max(0, self.step - last) : self.step]
        return [float(mean) for mean in rows.mean((0, 1))]


def optimise(
    state: State,
    labels: npt.NDArray[np.int64],
    members: Sequence[Member],
    targets: Sequence[Sequence[Target]],
    recipe: Recipe,
    *,
    key: str,
    loss: Callable[..., Any] = member_loss,
) -> Iterator[State]:
    """Optimise the images of a unit together, from wherever they stand to the last step.

    Yields the state at every look at the losses, at last that after the last step. A state is a view of what is being
    worked on: use it before asking for the next. labels: (n,); targets: of each member; key: the unit's name, from
    which all its draws come; loss: `member_loss`, or a compiled form of it.
    Raises StageError naming unit, step and member where a loss or its gradient is not finite, or memory is too small.
    """
    part, device = recipe.synthesis, state.images.device
    y = torch.from_numpy(labels).to(device).repeat_interleave(part.formation**2)
    weights = [_weights(target[0], recipe) for target in targets]
    S = state.images.requires_grad_()
    optimiser = torch.optim.Adam([S], betas=BETAS)
    optimiser.state[S] = {
        "step": torch.tensor(float(state.step)),
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
    }
    losses, checked, looked = state.losses, state.step, time.monotonic()

    for step in range(state.step, part.steps):
        with _named(key, step):
            drawn = _draw(members, recipe, key, step)
            augmentation, size = views_of_step(part, step)
            whole = enlarge_all(S, part.formation)
            boxes = draw_boxes(augmentation, generator("crop", recipe.seed, key, step), len(whole))
            views = apply_boxes(whole, boxes, size)
            gradient = torch.zeros_like(views)
            for index, theta in enumerate(drawn):
                with _named(key, step, members[theta]):
                    x = views.detach().requires_grad_()
                    statistics, ce = loss(
                        members[theta].model,
                        members[theta].taps,
                        x,
                        y,
                        targets[theta],
                        u=part.ce_weight,
                        weights=weights[theta],
                        kernels=members[theta].kernels,
                    )
                    (own,) = torch.autograd.grad(statistics + ce, x)
                    gradient += own / len(drawn)
                losses[step, index, 0] = statistics.detach()
                # a gradient that is not finite, or whose square is not, spoils the images under a loss that is finite
                losses[step, index, 1] = torch.where(own.square().sum().isfinite(), ce.detach(), torch.nan)
            (S.grad,) = torch.autograd.grad(views, S, gradient, retain_graph=bool(part.tv_weight or part.l2_weight))
            if part.tv_weight or part.l2_weight:
                term = prior(whole, part.tv_weight, part.l2_weight)
                S.grad += torch.autograd.grad(term, S)[0]
                losses[step, :, 2] = term.detach()
            for group in optimiser.param_groups:
                group["lr"] = part.learning_rate * (1 + math.cos(math.pi * step / part.steps)) / 2
            optimiser.step()
            with torch.no_grad():
                S.clamp_(0, 1)
        if step + 1 == part.steps or time.monotonic() - looked >= LOOK_EVERY_S:
            _check_finite(losses[checked : step + 1], checked, key, members, recipe)
            checked, looked = step + 1, time.monotonic()
            yield State(step + 1, S.detach(), state.exp_avg, state.exp_avg_sq, losses)


def _weights(target: Target, recipe: Recipe) -> list[float]:
    part = recipe.synthesis
    channels = [len(mu) for mu in target.RM]
    return layer_weights(channels, first_layer_factor=part.first_layer_factor, normalise=part.normalise_layers)


def _draw(members: Sequence[Member], recipe: Recipe, key: str, step: int) -> npt.NDArray[np.int64]:
    """Indices of the members of a step, without replacement."""
    random = generator("members", recipe.seed, key, step)
    drawn: npt.NDArray[np.int64] = random.choice(len(members), recipe.synthesis.models_per_step, replace=False)
    return drawn


def _check_finite(losses: Tensor, first_step: int, key: str, members: Sequence[Member], recipe: Recipe) -> None:
    bad = torch.nonzero(~torch.isfinite(losses.sum(2)))
    if len(bad):
        step, index = first_step + int(bad[0, 0]), int(bad[0, 1])
        raise StageError(
            "synthesis",
            f"unit {key}, step {step}, member {members[_draw(members, recipe, key, step)[index]].name}",
            "the loss or its gradient is not finite; lower synthesis.learning_rate or synthesis.ce_weight, or look at "
            "that member",
        )


@contextlib.contextmanager
def _named(key: str, step: int, member: Member | None = None) -> Iterator[None]:
    """Of an error in a step, one that says where it was and what to do."""
    try:
        yield
    except (StageError, torch.AcceleratorError):  # told already; the device's own fault: another one may do it
        raise
    except (MemoryError, RuntimeError) as error:
        item = f"unit {key}, step {step}" + (f", member {member.name}" if member else "")
        if is_out_of_memory(error):
            remedy = "out of memory; lower synthesis.slots_per_unit or synthesis.classes_per_unit: fewer images at once"
            raise StageError("synthesis", item, remedy) from error
        raise StageError("synthesis", item, f"{type(error).__name__}: {error}") from error
