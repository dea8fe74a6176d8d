"""One training loop, for the bases of the pool and for students: AdamW, soft targets, a cosine to 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from teddy_ray.data_parallel import Group
from teddy_ray.randomness import generator


class Batch(NamedTuple):
    """images: (n c h w) in [0, 1]. targets: (n classes), rows that sum to 1. size: n, or more where other workers have
    the rest of the batch."""

    images: Tensor
    targets: Tensor
    size: int


Batches = Callable[[int], Iterable[Batch]]
"""Epoch, from 1 -> its batches."""


def cut_into_batches(order: npt.NDArray[np.intp], batch_size: int) -> list[npt.NDArray[np.intp]]:
    """Batches of nearly equal size, at most batch_size: no small rest with poor statistics for BatchNorm."""
    return np.array_split(order, num_batches(len(order), batch_size))


def num_batches(num_images: int, batch_size: int) -> int:
    """Steps per epoch."""
    return -(-num_images // batch_size)


@dataclass
class State:
    """A training after some epochs: all that it needs to go on, to the bit.

    losses: mean loss of each epoch so far.
    """

    model: nn.Module
    optimiser: torch.optim.AdamW
    losses: list[float] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.losses)

    @classmethod
    def begin(cls, model: nn.Module, weight_decay: float) -> State:
        return cls(model, torch.optim.AdamW(model.parameters(), weight_decay=weight_decay))

    def tensors(self) -> dict[str, Tensor]:
        """The state by name."""
        named = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            named |= {f"optimiser/{index}/{key}": value for key, value in values.items()}
        return {**named, "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `tensors` gave."""
        of_model: dict[str, Tensor] = {}
        of_optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                of_model[rest] = tensor
            elif kind == "optimiser":
                index, _, key = rest.partition("/")
                of_optimiser.setdefault(int(index), {})[key] = tensor
        self.model.load_state_dict(of_model)
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": of_optimiser, "param_groups": groups})
        self.losses = tensors["losses"].tolist()


def fit(
    state: State,
    batches: Batches,
    *,
    key: tuple[str | int, ...],
    epochs: int,
    steps_per_epoch: int,
    learning_rate: float,
    temperature: float = 1.0,
    warmup_epochs: int = 0,
    autocast: torch.dtype | None = None,
    group: Group = Group(),  # noqa: B008 - frozen
) -> Iterator[State]:
    """Train on from `state`, in place, and yield it after each epoch.

    The loss is tau^2 CE(targets, softmax(logits / tau)), whose gradient is that of tau^2 KL(targets || student).
    key: names the training; models that draw (dropout) draw from it and the epoch. autocast: type of products.
    group: the workers that share each batch.
    Raises FloatingPointError naming the epoch where a loss is not finite.
    """
    model, optimiser = state.model, state.optimiser
    gpus = {weight.device for weight in model.parameters() if weight.is_cuda}
    total, warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
    for epoch in range(state.epoch + 1, epochs + 1):
        model.train()
        losses = []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(int(generator("training", *key, epoch, group.rank).integers(2**63)))
            for step, (images, targets, size) in enumerate(batches(epoch), start=(epoch - 1) * steps_per_epoch):
                for parameters in optimiser.param_groups:
                    parameters["lr"] = learning_rate * _warmup_cosine(step, total, warmup)
                with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
                    logits = model(images)
                loss = functional.cross_entropy(logits.to(targets.dtype) / temperature, targets, reduction="sum")
                loss = loss * (temperature**2 / size)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                group.sum_gradients(model)
                optimiser.step()
                losses.append(loss.detach())
        mean_loss = group.sum_number(float(torch.stack(losses).mean()))
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}; lower the learning rate")
        state.losses.append(mean_loss)
        yield state


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images that the model, in evaluation mode, puts into their class. batches: (n c h w) with (n,)."""
    was_training = model.training
    model.eval()
    correct = num = 0
    for images, labels in batches:
        correct += int((model(images).argmax(1) == labels).sum())
        num += len(images)
    model.train(was_training)
    return correct / num


def _warmup_cosine(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
