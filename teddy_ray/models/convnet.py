"""ConvNet, the small student of the distillation literature (Gidaris & Komodakis, 2018)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda width: nn.BatchNorm2d(width),
    "instance": lambda width: nn.GroupNorm(width, width),
    "group": lambda width: nn.GroupNorm(min(8, width), width),
    "layer": lambda width: nn.GroupNorm(1, width),
    "none": lambda width: nn.Identity(),
}


class ConvNet(nn.Module):
    """`depth` blocks of 3x3 convolution, normalisation, ReLU and 2x2 average pooling, then one linear layer. The first
    has `width` channels, each of the others `growth` times those of the one before: 1 in the literature.

    images (n channels size size) -> logits (n num_classes). Raises ValueError where the size is below 2**depth.
    """

    def __init__(
        self, num_classes: int, channels: int, image_size: int, *, width: int, growth: int, depth: int, norm: str
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm should be one of {', '.join(NORMS)}")
        if image_size < 2**depth:
            raise ValueError(f"depth {depth} needs images of at least {2**depth} pixels; lower the depth")
        widths = [width * growth**index for index in range(depth)]
        blocks: list[nn.Module] = []
        for before, after in zip([channels, *widths], widths, strict=False):
            blocks += [nn.Conv2d(before, after, 3, padding=1), NORMS[norm](after), nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1] * (image_size // 2**depth) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
