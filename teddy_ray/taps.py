"""Where feature statistics are taken: at the input of every normalisation layer.

A model without any is tapped at the output of every convolution.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from teddy_ray.frozen import FrozenBatchNorm

CHANNEL_AXIS: dict[type[nn.Module] | str, int] = {
    FrozenBatchNorm: 1,
    nn.modules.batchnorm._BatchNorm: 1,
    nn.modules.instancenorm._InstanceNorm: 1,
    nn.GroupNorm: 1,
    nn.LayerNorm: -1,
    nn.RMSNorm: -1,
    # by name: torchvision takes seconds to import; timm need not be installed, and the rest of its norms are subclasses
    "torchvision.ops.misc.FrozenBatchNorm2d": 1,
    "torchvision.models.convnext.LayerNorm2d": 1,
    "timm.layers.norm.LayerNorm2d": 1,
    "timm.layers.norm.LayerNorm2dFp32": 1,
    "timm.layers.norm.LayerNormExp2d": 1,
    "timm.layers.norm_act.LayerNormAct2d": 1,
    "timm.layers.norm_act.LayerNormAct2dFp32": 1,
    "timm.layers.norm_act.FrozenBatchNormAct2d": 1,
    "timm.layers.norm.RmsNorm": -1,
    "timm.layers.norm.RmsNormFp32": -1,
    "timm.layers.norm.RmsNorm2d": 1,
    "timm.layers.norm.RmsNorm2dFp32": 1,
    "timm.layers.norm.SimpleNorm": -1,
    "timm.layers.norm.SimpleNormFp32": -1,
    "timm.layers.norm.SimpleNorm2d": 1,
    "timm.layers.norm.SimpleNorm2dFp32": 1,
}
"""The axis of the channels in the input of a normalisation layer, for its class and all subclasses that have no own."""


def channel_axis(layer: nn.Module) -> int | None:
    """The axis of the channels in a normalisation layer's input. None for other layers."""
    for kind in type(layer).__mro__:
        for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            if key in CHANNEL_AXIS:
                return CHANNEL_AXIS[key]
    return None


class Taps:
    """Records the tapped activations of each forward pass while it is entered.

    `layers` names the tapped layers in the model's own order. After a forward pass, `activations[layer]` is
    (n channels positions). A model is refused whose layers do not all run once in a pass, on rows that are images.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = type(getattr(model, "network", model)).__name__
        named = dict(model.named_modules())
        axes = {name: channel_axis(module) for name, module in named.items()}
        norms = {name: axis for name, axis in axes.items() if axis is not None}
        self._at_output = not norms
        self._axes = norms or {name: 1 for name, module in named.items() if isinstance(module, nn.Conv2d)}
        if not self._axes:
            raise ValueError(f"{self._model} has neither a normalisation layer nor a convolution: nothing to match")
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
        if missing := [name for name in self.layers if name not in self.activations]:
            raise ValueError(f"layers of {self._model} did not run in a forward pass: {', '.join(missing)}")
        taken = [self.activations[name] for name in self.layers]
        if odd := [name for name, one in zip(self.layers, taken, strict=True) if len(one) != len(taken[0])]:
            raise ValueError(f"layers of {self._model} mix images with positions in their rows: {', '.join(odd)}")
        self.activations.clear()  # a compiled caller would hand out what a new dictionary left in the old one
        return taken

    def _input_hook(self, name: str) -> Any:
        return lambda module, inputs: self._record(name, inputs[0])

    def _output_hook(self, name: str) -> Any:
        return lambda module, inputs, output: self._record(name, output.clone())  # an activation may work in place

    def _record(self, name: str, activation: Tensor) -> None:
        if name in self.activations:
            twice = f"layer {name!r} of {self._model} runs twice in one forward pass"
            raise ValueError(f"{twice}; its statistics would be ambiguous")
        channels_second = activation.movedim(self._axes[name], 1)
        self.activations[name] = channels_second.reshape(*channels_second.shape[:2], -1)
