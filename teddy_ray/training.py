"""One training loop, for the bases of the pool and for students."""

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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from teddy_ray.data_parallel import Group
from teddy_ray.randomness import generator
from teddy_ray.schedules import Schedule, cosine


class Batch(NamedTuple):
    """images: (n c h w) in [0, 1]. targets: (n classes), rows that sum to 1, or logits where the loss compares those.
    size: n, or more where other workers have the rest of the batch. hard: (n classes), rows that sum to 1, for a loss
    that takes the hard labels beside the targets."""

    images: Tensor
    targets: Tensor
    size: int
    hard: Tensor | None = None


Batches = Callable[[int], Iterable[Batch]]
"""Epoch, from 1 -> its batches."""


def cut_into_batches(order: npt.NDArray[np.intp], batch_size: int) -> list[npt.NDArray[np.intp]]:
    """Batches of nearly equal size, at most batch_size: no small rest with poor statistics for BatchNorm."""
    return np.array_split(order, num_batches(len(order), batch_size))


def num_batches(num_images: int, batch_size: int) -> int:
    """Steps per epoch."""
    return -(-num_images // batch_size)


Loss = Callable[[Tensor, Batch], Tensor]
"""Logits (n classes) in the targets' type, their batch -> the mean over the batch: a worker's share of it."""


def soft_cross_entropy(logits: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """tau^2 CE(targets, softmax(logits / tau)), whose gradient is that of tau^2 KL(targets || student).

    tau^2 keeps the size of the gradient (Hinton, Vinyals & Dean, 2015, section 2.1).
    """
    loss = functional.cross_entropy(logits / temperature, batch.targets, reduction="sum")
    return loss * (temperature**2 / batch.size)


def logit_error(logits: Tensor, batch: Batch) -> Tensor:
    """Squared differences from logits, their mean over classes: the soft part of "MSE + gamma GT" (G-VBSM, Shao et
    al., 2024; EDC, Shao et al., 2024)."""
    return functional.mse_loss(logits, batch.targets, reduction="sum") / (batch.size * logits.shape[1])


def with_hard_labels(loss: Loss, weight: float) -> Loss:
    """`loss` + weight CE(hard, softmax(logits)): with `logit_error`, the whole of "MSE + gamma GT"."""

    def both(logits: Tensor, batch: Batch) -> Tensor:
        assert batch.hard is not None
        return loss(logits, batch) + weight * soft_cross_entropy(logits, batch._replace(targets=batch.hard))

    return both


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """An average of the model's weights over the steps, theta' <- decay theta' + (1 - decay) theta, from those after
    the first step on.

    BatchNorm's running statistics are averaged with the same decay: to first order in the movement of the weights,
    they are the statistics that the averaged weights have. Beside the present statistics, as EDC's code has it, the
    averaged weights would be measured with those of others. The count of batches is an integer and loses its
    fractions; no evaluation reads it.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def lay_out(model: nn.Module) -> None:
    """Make a model channels-last, in which convolutions are faster, but for those that come out wrong.

    In the gradient of a strided 1x1 convolution's weights, oneDNN writes past its workspace where images are
    channels-last and have fewer than 8 (AVX2) or 16 (AVX-512) channels: wrong numbers, or the end of the process
    (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if _comes_out_wrong(module):
            module.to(memory_format=torch.contiguous_format)
            module.register_forward_pre_hook(_make_contiguous)


def _comes_out_wrong(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < 16
    )


def _make_contiguous(module: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in images)


@dataclass
class State:
    """A training after some epochs: all that it needs to go on, to the bit. Its models are laid out by `lay_out`.

    losses: mean loss of each epoch so far. average: of the weights, where one is kept.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    average: AveragedModel | None = None

    def __post_init__(self) -> None:
        for model in (self.model, self.average):
            if model is not None:
                lay_out(model)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.losses)

    @property
    def measured(self) -> nn.Module:
        """The model whose accuracy counts."""
        return self.model if self.average is None else self.average

    @classmethod
    def begin(cls, model: nn.Module, weight_decay: float) -> State:
        return cls(model, torch.optim.AdamW(model.parameters(), weight_decay=weight_decay))

    def tensors(self) -> dict[str, Tensor]:
        """The state by name."""
        named = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            named |= {f"optimiser/{index}/{key}": value for key, value in values.items()}
        if self.average is not None:
            named |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        return {**named, "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `tensors` gave."""
        of_model: dict[str, Tensor] = {}
        of_average: dict[str, Tensor] = {}
        of_optimiser: dict[int, dict[str, Tensor]] = {}
        weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                of_model[rest] = tensor
            elif kind == "average":
                of_average[rest] = tensor
            elif kind == "optimiser":
                index, _, key = rest.partition("/")
                weight = weights[int(index)]
                if tensor.shape == weight.shape:  # in its layout, as if it had never been saved
                    tensor = torch.empty_like(weight).copy_(tensor)
                of_optimiser.setdefault(int(index), {})[key] = tensor
        self.model.load_state_dict(of_model)
        if self.average is not None:
            self.average.load_state_dict(of_average)
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
    loss: Loss = soft_cross_entropy,
    schedule: Schedule = cosine,
    warmup_epochs: int = 0,
    dtype: torch.dtype = torch.float32,
    group: Group = Group(),  # noqa: B008 - frozen
) -> Iterator[State]:
    """Train on from `state`, in place, and yield it after each epoch.

    The learning rate rises in a straight line over the warm-up, then follows the schedule.
    key: names the training; models that draw (dropout) draw from it and the epoch. dtype: of products; weights
    and sums are float32. group: the workers that share each batch.
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
            for step, batch in enumerate(batches(epoch), start=(epoch - 1) * steps_per_epoch):
                factor = (step + 1) / warmup if step < warmup else schedule(step - warmup, total - warmup)
                for parameters in optimiser.param_groups:
                    parameters["lr"] = learning_rate * factor
                with torch.autocast(batch.images.device.type, dtype, enabled=dtype != torch.float32):
                    logits = model(batch.images)
                value = loss(logits.to(batch.targets.dtype), batch)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                group.sum_gradients(model)
                optimiser.step()
                if state.average is not None:
                    state.average.update_parameters(model)
                losses.append(value.detach())
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
