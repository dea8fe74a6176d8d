"""How the learning rate goes over the steps of a training, as a factor of its peak."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from teddy_ray.recipe import Evaluation

Schedule = Callable[[int, int], float]
"""(step, from 0; number of steps), both counted after the warm-up -> factor."""


def cosine(step: int, num_steps: int) -> float:
    """To 0 (Loshchilov & Hutter, 2017, Eq. 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, num_steps)))


def half_cosine(step: int, num_steps: int) -> float:
    """The first half of a cosine, to half the rate, as RDED trains its students (Sun et al., 2024)."""
    return cosine(step, 2 * num_steps)


def constant(step: int, num_steps: int) -> float:
    """The peak at every step."""
    return 1.0


def in_steps(step: int, num_steps: int, *, at: Sequence[float], factor: float) -> float:
    """`factor` once more from each share of the steps in `at` on."""
    num_past = sum(step >= round(share * num_steps) for share in at)  # 0.55 * 100 is above 55
    return float(factor**num_past)


def of_students(evaluation: Evaluation) -> Schedule:
    """The schedule that a recipe names."""
    schedules: dict[str, Schedule] = {
        "cosine": cosine,
        "half_cosine": half_cosine,
        "constant": constant,
        "steps": functools.partial(in_steps, at=evaluation.steps.at, factor=evaluation.steps.factor),
    }
    return schedules[evaluation.schedule]
