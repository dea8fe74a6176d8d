"""Where feature statistics are taken: at the input of every normalisation layer.

A model without any is tapped at the output of every convolution.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from teddy_ray.frozen import FrozenBatchNorm
from teddy_ray.kernels.winograd import WinogradConv2d

CHANNEL_AXIS: dict[type[nn.Module], int] = {
    FrozenBatchNorm: 1,
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.BatchNorm3d: 1,
    nn.GroupNorm: 1,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 1,
    nn.InstanceNorm3d: 1,
    nn.LayerNorm: -1,
}


class Taps:
    """Records the tapped activations of each forward pass while it is entered.

    `layers` names the tapped layers in the model's own order. After a forward pass, `activations[layer]` is
    (n channels positions). A layer that runs twice in one pass is refused: its statistics would be ambiguous.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        norms = {name: CHANNEL_AXIS[type(module)] for name, module in named.items() if type(module) in CHANNEL_AXIS}
        self._at_output = not norms
        self._axes = norms or {
            name: 1 for name, module in named.items() if isinstance(module, nn.Conv2d | WinogradConv2d)
        }
        if not self._axes:
            raise ValueError("the model has neither a normalisation layer nor a convolution: nothing to match")
        self._modules = {name: named[name] for name in self._axes}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.layers = tuple(self._axes)
        self.activations: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            if self._at_output:
                self._handles.append(module.register_forward_hook(self._output_hook(name)))
            else:
                self._handles.append(module.register_forward_pre_hook(self._input_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.activations.clear()

    def take(self) -> list[Tensor]:
        """The activations of the last pass in the order of `layers`, each (n channels positions); forgets them."""
        taken = [self.activations[name] for name in self.layers]
        self.activations.clear()  # a compiled caller would hand out what a new dictionary left in the old one
        return taken

    def _input_hook(self, name: str) -> Any:
        return lambda module, inputs: self._record(name, inputs[0])

    def _output_hook(self, name: str) -> Any:
        return lambda module, inputs, output: self._record(name, output.clone())  # an activation may work in place

    def _record(self, name: str, activation: Tensor) -> None:
        if name in self.activations:
            raise ValueError(f"layer {name!r} runs twice in one forward pass; its statistics would be ambiguous")
        channels_second = activation.movedim(self._axes[name], 1)
        self.activations[name] = channels_second.reshape(*channels_second.shape[:2], -1)
