"""Speed of a synthesis step against a plain loop, side by side in one run: `make bench`.

The plain loop is Eq. 7 as it is usually written: float32, a hook per normalisation layer that permutes a copy of the
activation and takes its mean and its variance in two passes, gradients of the weights included, crops by grid_sample.
Both draw one member per step from the same pool. Prints the median of the ratio over alternating rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from teddy_ray.device import describe, prepare
from teddy_ray.models import build, freeze
from teddy_ray.moments import Moments, class_moments
from teddy_ray.recipe import Recipe, parse_recipe
from teddy_ray.synthesis import Member, optimise_unit
from teddy_ray.taps import Taps

ROUNDS, STEPS, NUM_MEMBERS, NUM_CLASSES, PER_CLASS = 7, 50, 4, 10, 10
CASES = [("convnet:width=32", 8, 1), ("convnet:width=32", 32, 3), ("resnet18:width=16", 32, 3)]


def plain_loop(
    models: Sequence[nn.Module],
    targets: Sequence[Sequence[tuple[Tensor, Tensor]]],
    start: Tensor,
    y: Tensor,
    steps: int,
) -> None:
    """The same loss, written plainly."""
    images = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([images], lr=0.02, betas=(0.5, 0.9))
    for model in models:
        model.requires_grad_(True)
    for step in range(steps):
        model, target = models[step % len(models)], targets[step % len(models)]
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], seen: list[tuple[Tensor, Tensor]] = seen) -> None:
            x = inputs[0].permute(1, 0, 2, 3).contiguous().view(inputs[0].shape[1], -1)
            seen.append((x.mean(1), x.var(1, unbiased=False)))

        handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        scale = torch.rand(len(images)) * 0.3 + 0.7
        theta = torch.zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        views = functional.grid_sample(
            images, functional.affine_grid(theta, list(images.shape), False), align_corners=False
        )
        optimiser.zero_grad()
        loss = functional.cross_entropy(model(views), y)
        for (mu, var), (target_mu, target_var) in zip(seen, target, strict=True):
            loss = loss + torch.norm(mu - target_mu, 2) + torch.norm(var - target_var, 2)
        loss.backward()
        optimiser.step()
        images.data.clamp_(0, 1)
        for handle in handles:
            handle.remove()


def time_of(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(architecture: str, image_size: int, channels: int, device: torch.device) -> None:
    """Prints images·steps/s of both, and the median ratio."""
    recipe: Recipe = parse_recipe({"name": "bench", "data": {"source": "none"}, "synthesis": {"steps": STEPS}})
    rng = np.random.default_rng(0)
    shape = (NUM_CLASSES * PER_CLASS, channels, image_size, image_size)
    start = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
    y, x = torch.from_numpy(labels), torch.from_numpy(start).float() / 255
    size = {"num_classes": NUM_CLASSES, "channels": channels, "image_size": image_size}
    models = [freeze(build(architecture, **size, seed=seed)) for seed in range(NUM_MEMBERS)]
    members, targets = [], []
    for index, model in enumerate(models):
        with torch.no_grad(), Taps(model) as taps:
            model(x)
            activations = dict(zip(taps.layers, taps.take(), strict=True))
        moments: dict[str, Moments] = {name: class_moments(a, y, NUM_CLASSES) for name, a in activations.items()}
        members.append(Member(str(index), model, moments))
        targets.append([(a.mean((0, 2)), a.var((0, 2), unbiased=False)) for a in activations.values()])

    def ours() -> None:
        for model in models:
            freeze(model)
        optimise_unit(start, labels, members, recipe, key="bench", device=device)

    def plain() -> None:
        plain_loop(models, targets, x, y, STEPS)

    ours(), plain()
    pairs = [(time_of(ours), time_of(plain)) for _ in range(ROUNDS)]
    images_steps = len(start) * STEPS
    ratio = statistics.median(b / a for a, b in pairs)
    mine, theirs = (images_steps / statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    print(f"| {architecture}, {image_size}x{image_size} | {mine:,.0f} | {theirs:,.0f} | {ratio:.2f} |")


def main() -> None:
    """Measure every case on one thread."""
    device = prepare(threads=1, gpus=0)
    print(
        f"{describe(device)}, torch {torch.__version__}; unit of {NUM_CLASSES * PER_CLASS} images, median of {ROUNDS}\n"
    )
    print("| case | images·steps/s | plain loop | ratio |\n| --- | --- | --- | --- |")
    for architecture, image_size, channels in CASES:
        measure(architecture, image_size, channels, device)


if __name__ == "__main__":
    main()
