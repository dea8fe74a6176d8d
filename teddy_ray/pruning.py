"""Structural pruning by torch-pruning, an optional extra, and the models that it leaves, which need it no more."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from teddy_ray.models import Classifier

Structure = dict[str, dict[str, int | list[int]]]
"""Module -> attribute -> size. Plain JSON."""

SIZES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_groups",
    "normalized_shape",
)
"""Attributes of layers that pruning changes."""

ATTENTION = frozenset({torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default})
"""Products of activations with activations. Heads of attention are more than channels: torch-pruning breaks them, or
takes all memory in following them."""

INSTEAD = "set its ratio to 0 (plain fine-tuning)"


def prune(model: Classifier, ratio: float, *, channels: int, image_size: int) -> Classifier:
    """A copy without the weakest `ratio` of every layer's channels, but for the layer that gives the logits.

    Channels that depend on each other go together, in the order of the L2 norm of their group (Fang et al., DepGraph,
    CVPR 2023). The share is rounded up to whole channels, of each group where a layer has groups. The copy's weights
    can be trained. channels, image_size: of the images that the model takes.
    Raises ValueError where the model cannot be pruned, or torch-pruning is not installed.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the ratio should be at least 0 and below 1, not {ratio}")
    pruned = copy.deepcopy(model).requires_grad_(True)
    if ratio == 0:
        return pruned
    name = type(model.network).__name__
    try:
        tp = importlib.import_module("torch_pruning")
    except ImportError:
        remedy = f"pip install 'torch-pruning>=1.6,<2', or {INSTEAD}"
        raise ValueError(f"{name} cannot be pruned: torch-pruning is not installed; {remedy}") from None
    images = torch.zeros(2, channels, image_size, image_size, device=model.mean.device)
    try:
        with torch.enable_grad():
            head, logits = _head(pruned.eval(), images)
            pruner = tp.pruner.BasePruner(
                pruned,
                images,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                ignored_layers=[head],
                customized_pruners={nn.GroupNorm: _group_norm_pruner(tp)},
                in_channel_groups={},  # torch-pruning's own defaults are shared by all that it prunes
                out_channel_groups={},
            )
            pruner.step()
            shape = pruned(images).shape
    except Exception as error:  # torch-pruning and the models each have their own
        raise ValueError(f"{name} cannot be pruned ({type(error).__name__}: {error}); {INSTEAD}") from error
    if shape != logits or _num_weights(pruned) >= _num_weights(model):
        raise ValueError(f"{name} cannot be pruned (nothing of it could be left out); {INSTEAD}")
    pruned.zero_grad(set_to_none=True)
    return pruned.train(model.training)


def structure(model: nn.Module) -> Structure:
    """The sizes of all layers, for `reshape`."""
    found = {
        name: {key: size for key in SIZES if isinstance(size := vars(module).get(key), int | tuple)}
        for name, module in model.named_modules()
    }
    return {
        name: {key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items()}
        for name, sizes in found.items()
        if sizes
    }


def reshape(model: Classifier, structure: Structure, state: Mapping[str, Tensor]) -> Classifier:
    """Make a freshly built model the pruned one with that structure and state_dict, in place, and return it.

    Raises ValueError where they are not of this architecture.
    """
    try:
        for name, sizes in structure.items():
            module = model.get_submodule(name)
            for key, size in sizes.items():
                setattr(module, key, tuple(size) if isinstance(size, list) else size)
        for name, tensor in state.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, leaf, _of_shape(getattr(module, leaf), tensor.shape))
        model.load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"the structure is not one of {type(model.network).__name__}: {error}") from error
    return model


def _of_shape(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape == shape:
        return tensor
    empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _head(model: Classifier, images: Tensor) -> tuple[nn.Module, torch.Size]:
    """The layer that gives the logits, which is the last to run that is as wide as they are, and their shape."""
    ran: list[tuple[nn.Module, int]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: ran.append((module, _width(module))))
        for layer in layers
    ]
    with _NoAttention():  # type: ignore[no-untyped-call]
        shape = model(images).shape
    for handle in handles:
        handle.remove()
    return next(layer for layer, width in reversed(ran) if width == shape[1]), shape


def _width(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else cast(nn.Conv2d, layer).out_channels


class _NoAttention(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION or "scaled_dot_product" in func.name():
            raise NotImplementedError("it has attention, whose heads are more than channels")
        return func(*args, **(kwargs or {}))


def _group_norm_pruner(tp: Any) -> Any:
    """Instance normalisation, one group for each channel, keeps it so; other groups lose the same share each."""

    class Pruner(tp.pruner.function.GroupNormPruner):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.GroupNorm, idxs: list[int]) -> nn.Module:
            per_channel = layer.num_groups == layer.num_channels
            super().prune_out_channels(layer, idxs)
            if per_channel:
                layer.num_groups = layer.num_channels
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channel_groups(self, layer: nn.GroupNorm) -> int:
            return 1 if layer.num_groups == layer.num_channels else layer.num_groups

        get_in_channel_groups = get_out_channel_groups

    return Pruner()


def _num_weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
