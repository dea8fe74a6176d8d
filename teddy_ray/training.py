"""One training loop, for the bases of the pool and for students: AdamW, soft targets, a cosine to 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from teddy_ray.randomness import generator

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""epoch -> batches of (images (n c h w) in [0, 1], targets (n classes), rows that sum to 1)."""


def cut_into_batches(order: npt.NDArray[np.intp], batch_size: int) -> list[npt.NDArray[np.intp]]:
    """Batches of nearly equal size, at most batch_size: no small rest with poor statistics for BatchNorm."""
    return np.array_split(order, num_batches(len(order), batch_size))


def num_batches(num_images: int, batch_size: int) -> int:
    """Steps per epoch."""
    return -(-num_images // batch_size)


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    steps_per_epoch: int,
    learning_rate: float,
    weight_decay: float,
    temperature: float = 1.0,
    warmup_epochs: int = 0,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train in place. on_epoch is called after each epoch with its number, from 1, and its mean loss.

    What a model draws itself, such as dropout, it draws from (seed, epoch), whatever was drawn before.

    The loss is tau^2 CE(targets, softmax(logits / tau)), whose gradient is that of tau^2 KL(targets || student).
    Raises FloatingPointError naming the epoch where a loss is not finite.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    gpus = {weight.device for weight in model.parameters() if weight.is_cuda}
    total, warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warmup_cosine(step, total, warmup))
    for epoch in range(1, epochs + 1):
        model.train()
        losses = []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(int(generator("dropout", seed, epoch).integers(2**63)))
            for images, targets in batches(epoch):
                loss = functional.cross_entropy(model(images) / temperature, targets) * temperature**2
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}; lower the learning rate")
        on_epoch(epoch, mean_loss)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of images (n c h w) that the model, in evaluation mode, puts into their class."""
    was_training = model.training
    model.eval()
    correct = 0
    for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        correct += int((model(x).argmax(1) == y).sum())
    model.train(was_training)
    return correct / len(images)


def _warmup_cosine(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
