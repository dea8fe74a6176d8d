"""Models by name.

`convnet:width=32,norm=group` and `resnet18` are this package's own, `torchvision/densenet121` and `timm/resnet18d`
those of libraries, and `my.nets:make:width=3` is a function of the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from teddy_ray.models import from_timm, from_torchvision, from_user, own
from teddy_ray.models.blueprint import Blueprint, suggestion
from teddy_ray.models.own import ARCHITECTURES
from teddy_ray.models.pooling import replace_pooling
from teddy_ray.randomness import generator

__all__ = [
    "ARCHITECTURES",
    "MEAN",
    "STD",
    "Classifier",
    "build",
    "code_identity",
    "freeze",
    "is_users",
    "outline",
    "takes_any_size",
]

MEAN, STD = 0.5, 0.25
"""What pixels in [0, 1] are normalised by, where no base says otherwise."""
FORMS = ("torchvision/<name>", "timm/<name>", "<module>:<function>")
LIBRARIES = {"torchvision": from_torchvision.find, "timm": from_timm.find}
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
"""Sizes to try, in pixels, for what a model can take where no table knows."""


class Classifier(nn.Module):
    """A network with its pixel normalisation inside: takes images in [0, 1], gives logits.

    mean, std: one number for all channels, or one for each. repeat: how often the channels are repeated first, for a
    network of colours that is given grey images. The network may be of another type than the images: they are
    converted after the normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: float | Sequence[float] = MEAN,
        std: float | Sequence[float] = STD,
        *,
        repeat: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.repeat = repeat
        self.register_buffer("mean", torch.tensor(mean).reshape(-1))
        self.register_buffer("std", torch.tensor(std).reshape(-1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.repeat(1, self.repeat, 1, 1) if self.repeat > 1 else images
        mean, std = (value.to(images.dtype)[:, None, None] for value in (self.mean, self.std))
        normalised = (images - mean) / std
        logits: Tensor = self.network(normalised.to(next(self.network.parameters(), normalised).dtype))
        return logits


def build(
    name: str,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    seed: int = 0,
    mean: float | Sequence[float] = MEAN,
    std: float | Sequence[float] = STD,
) -> Classifier:
    """Build a model with weights drawn from (name, seed).

    mean, std: of the pixels, one number, or one for each channel of the data. Raises ValueError for a name that makes
    no sense, or a model that cannot do what is asked of it.
    """
    blueprint = _find(name)
    taken = blueprint.channels or channels
    repeat, rest = divmod(taken, channels)
    if rest or (repeat > 1 and channels > 1):
        raise ValueError(f"{name}: takes images of {taken} channels, or of one, which is repeated; not of {channels}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator("init", name, seed).integers(2**63)))
        try:
            network = _network(blueprint, num_classes, taken, image_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}{_smallest(blueprint, num_classes, taken)}") from error
    return Classifier(replace_pooling(network), _each(mean, taken), _each(std, taken), repeat=repeat)


def outline(name: str, *, num_classes: int, channels: int, image_size: int) -> Classifier:
    """The model for what follows from its shape alone, without weights: on the meta device. Raises as `build` does.

    Code of others that works on weights alone gives a model with weights.
    """
    size = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    if code_identity(name) is not None:
        build(name, **size)  # whether code of others can take the layout of weights shows with weights alone
    try:
        with _WithoutWeights():
            return build(name, **size).to("meta")
    except ValueError:
        if not _find(name).tried:
            raise
        return build(name, **size)


def takes_any_size(name: str) -> bool:
    """Whether a model of this name takes images of another size than it was built for.

    Of a function of the user's that is not known, and not supposed.
    """
    return _find(name).any_size


def code_identity(name: str) -> str | None:
    """The hash of the code behind a name: what else can change the weights of (name, seed).

    None where that is versioned with a package: for all names but functions of the user's.
    """
    return from_user.code_identity(name) if _form(name) == "user" else None


def is_users(name: str) -> bool:
    """Whether a name is that of a function of the user's: code that is imported and run."""
    return _form(name) == "user"


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients of weights: how members are used once they are trained."""
    return model.eval().requires_grad_(False)


class _WithoutWeights(TorchFunctionMode):
    """Tensors that weights are drawn into are made on the meta device. Others are not: some builders compute."""

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "meta"} if func in self.FACTORIES else {}
        return func(*args, **{**(kwargs or {}), **device})


def _network(blueprint: Blueprint, num_classes: int, channels: int, image_size: int) -> nn.Module:
    network = blueprint.make(num_classes, channels, image_size)
    if not blueprint.tried:
        return network
    weights = list(network.parameters())
    if any(weight.is_meta for weight in weights):
        network = network.to("meta")
    modes = {module: module.training for module in network.modules()}
    device = weights[0].device if weights else torch.device("cpu")
    images = torch.zeros(2, channels, image_size, image_size, device=device)
    told = f"a pass of 2 images of {channels} x {image_size} x {image_size} should give logits (2, {num_classes})"
    try:
        with torch.no_grad():
            # laid out as trainings and frozen copies do
            logits = network.eval().to(memory_format=torch.channels_last)(images)
    except Exception as error:  # code of others
        hint = (
            "; use reshape or flatten: models run channels-last" if "view size is not compatible" in str(error) else ""
        )
        raise ValueError(f"{told}, but raised {type(error).__name__}: {error}{hint}") from error
    network.to(memory_format=torch.contiguous_format)
    for module, training in modes.items():
        module.training = training
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        gave = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{told}, but gave {gave}")
    return network


def _smallest(blueprint: Blueprint, num_classes: int, channels: int) -> str:
    """What a message says of the sizes that a model can take, where only trying tells."""
    if blueprint.tried:
        for size in SIZES:
            try:
                with _WithoutWeights():
                    _network(blueprint, num_classes, channels, size)
            except ValueError:
                continue
            return f"; images of {size} pixels are the smallest that it was found to take"
    return ""


def _each(value: float | Sequence[float], channels: int) -> list[float]:
    """One number for each of the channels."""
    values = [value] if isinstance(value, int | float) else list(value)
    if len(values) not in (1, channels):
        raise ValueError(f"mean and std should be one number, or one for each of {channels} channels, not {values}")
    return values * (channels // len(values))


def _form(name: str) -> str:
    """Whose name it is: of a library, this package's own, the user's, or nobody's."""
    library, slash, _ = name.partition("/")
    if slash and library in LIBRARIES:
        return library
    if name.partition(":")[0] in ARCHITECTURES:
        return "own"
    return "user" if from_user.is_one(name) else ""


def _find(name: str) -> Blueprint:
    form, (base, _, options) = _form(name), name.partition(":")
    if form in LIBRARIES:
        return LIBRARIES[form](name)
    if form == "own":
        return own.find(base, options)
    if form == "user":
        try:
            return from_user.find(name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    close = suggestion(base, [*from_torchvision.names(), *ARCHITECTURES])
    raise ValueError(f"unknown architecture {base!r}; should be one of {', '.join([*ARCHITECTURES, *FORMS])}{close}")
