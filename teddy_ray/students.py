"""Students: models trained from scratch on a small set, whose accuracy says what the set is worth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from teddy_ray import schedules
from teddy_ray.models import build
from teddy_ray.randomness import generator
from teddy_ray.recipe import Evaluation, Labels
from teddy_ray.replay import TrainingSet
from teddy_ray.training import (
    Batch,
    Loss,
    State,
    cut_into_batches,
    fit,
    logit_error,
    num_batches,
    running_average,
    soft_cross_entropy,
    with_hard_labels,
)


def train_student(
    training: TrainingSet,
    evaluation: Evaluation,
    labels: Labels,
    *,
    architecture: str,
    seed: int,
    epochs: int,
    learning_rate: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_epoch: Callable[[State], None] = lambda state: None,
) -> nn.Module:
    """Train one student and return it as it is after the last epoch: its running average where the recipe has one.

    dtype: of products, as `training.fit` takes it.
    """
    _, channels, image_size, _ = training.viewed.images.shape
    model = build(
        architecture, num_classes=training.num_classes, channels=channels, image_size=image_size, seed=seed
    ).to(device)

    def batches(epoch: int) -> Iterator[Batch]:
        order = generator("student", seed, epoch).permutation(len(training))
        for rows in cut_into_batches(order, evaluation.batch_size):
            views, targets, hard = training.batch(rows, epoch, device)
            yield Batch(views, targets, len(rows), hard)

    state = begin(model, evaluation)
    for _ in fit(
        state,
        batches,
        key=("student", architecture, seed),
        epochs=epochs,
        steps_per_epoch=num_batches(len(training), evaluation.batch_size),
        learning_rate=learning_rate,
        loss=loss_of(evaluation, labels) if training.soft else soft_cross_entropy,
        schedule=schedules.of_students(evaluation),
        warmup_epochs=evaluation.warmup_epochs,
        dtype=dtype,
    ):
        on_epoch(state)
    return state.measured


def begin(model: nn.Module, evaluation: Evaluation) -> State:
    """A training at its start, with the recipe's optimiser and average."""
    weights, decay = model.parameters(), evaluation.weight_decay
    optimiser: torch.optim.Optimizer
    if evaluation.optimiser == "sgd":
        optimiser = torch.optim.SGD(weights, momentum=evaluation.momentum, weight_decay=decay)
    else:
        optimiser = torch.optim.AdamW(weights, weight_decay=decay)
    return State(model, optimiser, average=running_average(model, evaluation.ema) if evaluation.ema else None)


def loss_of(evaluation: Evaluation, labels: Labels) -> Loss:
    """What a student lowers on soft labels."""
    loss: Loss = logit_error
    if evaluation.loss == "kl":
        loss = functools.partial(soft_cross_entropy, temperature=labels.temperature)
        if labels.ensemble == "logits":
            loss = of_logits(loss, labels.temperature)
    return with_hard_labels(loss, evaluation.ce_weight) if evaluation.ce_weight else loss


def of_logits(loss: Loss, temperature: float) -> Loss:
    """A loss of probabilities, on targets that are logits."""

    def on_probabilities(logits: Tensor, batch: Batch) -> Tensor:
        return loss(logits, batch._replace(targets=(batch.targets / temperature).softmax(1)))

    return on_probabilities
