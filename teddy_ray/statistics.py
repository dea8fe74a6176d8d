"""Moments of the data under every member at once: each batch passes through all of them. In this process, no storage.

The moments of all layers of all members stand side by side, channel after channel; `Layout` says whose is which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teddy_ray.frozen import frozen_copy
from teddy_ray.moments import Moments, class_moments
from teddy_ray.taps import Taps


@dataclass(frozen=True)
class Layout:
    """Whose the channels are: for each member the names of its tapped layers, each with its number of channels."""

    members: tuple[tuple[tuple[str, int], ...], ...]

    @classmethod
    def from_json(cls, members: Sequence[Sequence[Sequence[str | int]]]) -> Layout:
        """From what JSON makes of `members`."""
        return cls(tuple(tuple((str(name), int(num)) for name, num in layers) for layers in members))

    @property
    def num_channels(self) -> int:
        return sum(self._channels)

    @property
    def _channels(self) -> list[int]:
        return [num for layers in self.members for _, num in layers]

    def by_layer(self, moments: Moments) -> list[dict[str, Moments]]:
        """For each member its moments by layer."""
        parts = iter(moments.split(self._channels))
        return [{name: next(parts) for name, _ in layers} for layers in self.members]

    def owner(self, channel: int) -> tuple[int, str]:
        """Member and layer of a channel."""
        for index, layers in enumerate(self.members):
            for name, num in layers:
                if channel < num:
                    return index, name
                channel -= num
        raise IndexError(channel)


class Measurer:
    """The members, frozen and tapped on their device, in float32. kernels: the CPU's own are used."""

    def __init__(self, models: Iterable[nn.Module], device: torch.device, *, kernels: bool) -> None:
        self._models = [frozen_copy(model, kernels=kernels).to(device) for model in models]
        self._kernels = kernels

    @torch.inference_mode()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> tuple[Moments, Layout]:
        """Moments of a stream of batches, of which nothing is kept: images (n c h w) and labels (n,) below num_classes.

        At least one batch. Every image has the same size.
        """
        total: Moments | None = None
        for x, y in batches:
            present, rows = y.unique(return_inverse=True)
            of_batch, layers = self._of_batch(x, rows, len(present))
            if total is None:
                layout = Layout(tuple(layers))
                total = Moments.zeros(num_classes, layout.num_channels, x.device)
            total.add(present, of_batch)
        assert total is not None
        return total, layout

    def _of_batch(self, x: Tensor, rows: Tensor, num_rows: int) -> tuple[Moments, list[tuple[tuple[str, int], ...]]]:
        parts, layers = [], []
        for model in self._models:
            with Taps(model) as taps:
                model(x)
                own = [class_moments(a, rows, num_rows, kernels=self._kernels) for a in taps.take()]
            parts += own
            layers.append(tuple((name, m.mean.shape[1]) for name, m in zip(taps.layers, own, strict=True)))
        return Moments.beside(parts), layers
