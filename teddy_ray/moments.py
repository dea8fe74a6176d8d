"""Per-class moments of activations: exact in float64, merged by Chan's method, mixed by the law of total variance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from teddy_ray.kernels import moments as kernel


@dataclass(frozen=True)
class Moments:
    """Moments per class and channel, all float64, in which every image has the same weight.

    count: (classes,) images. mean: (classes channels). m2: (classes channels), the squared deviations from the mean,
    averaged over an image's positions and summed over images: so channels of layers of different sizes can stand side
    by side. A class without images has zeros. Rows are classes of whatever range the owner has in mind.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def zeros(cls, num_classes: int, channels: int, device: torch.device | None = None) -> Moments:
        """Of no images."""
        count, mean, m2 = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((num_classes,), (num_classes, channels), (num_classes, channels))
        )
        return cls(count, mean, m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub & LeVeque, 1983, eq. 2.1)."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0.0)[:, None]
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta.square() * self.count[:, None] * share,
        )

    def rows(self, index: Tensor | slice) -> Moments:
        """Those of some classes."""
        return Moments(self.count[index], self.mean[index], self.m2[index])

    def add(self, index: Tensor, other: Moments) -> None:
        """Merge the rows of another sample into the rows `index` (each once) of this one, in place."""
        merged = self.rows(index).merge(other)
        self.count[index], self.mean[index], self.m2[index] = merged.count, merged.mean, merged.m2

    def pooled(self) -> Moments:
        """All classes as one, merged in their order."""
        return reduce(Moments.merge, (self.rows(slice(row, row + 1)) for row in range(len(self.count))))

    def split(self, channels: Iterable[int]) -> list[Moments]:
        """By stretches of so many channels."""
        sizes = list(channels)
        parts = zip(self.mean.split(sizes, 1), self.m2.split(sizes, 1), strict=True)
        return [Moments(self.count, mean, m2) for mean, m2 in parts]

    @classmethod
    def beside(cls, parts: Iterable[Moments]) -> Moments:
        """The channels of all parts side by side: the inverse of `split`."""
        all_parts = list(parts)
        mean, m2 = (torch.cat([getattr(part, name) for part in all_parts], 1) for name in ("mean", "m2"))
        return cls(all_parts[0].count, mean, m2)

    def mixture(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (channels,) of a mixture of the classes with `shares` (classes,), which sum to 1.

        mu = sum p_c mu_c and var = sum p_c [var_c + (mu_c - mu)^2]; the difference of squares would lose digits.
        """
        present = shares > 0
        if bool((self.count[present] == 0).any()):
            missing = torch.nonzero(present & (self.count == 0)).flatten().tolist()
            raise ValueError(f"no activations of classes {missing}: their share cannot be above 0")
        p = shares[present].double()[:, None]
        mean_c, var_c = self.mean[present], self.m2[present] / self.count[present, None]
        # around a reference, so that weights that do not sum to 1 exactly cost nothing where mean >> sigma
        reference = mean_c[:1]
        mu = reference[0] + (p * (mean_c - reference)).sum(0)
        return mu, (p * (var_c + (mean_c - mu).square())).sum(0)


def buffer_moments(model: nn.Module) -> dict[str, Moments]:
    """What the BatchNorms of a model remember of their training, by layer, as moments of one class of all images."""
    moments = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mean, var = module.running_mean, module.running_var
            if mean is not None and var is not None:
                count = torch.ones(1, dtype=torch.float64)
                moments[name] = Moments(count, mean.double()[None].cpu(), var.double()[None].cpu())
    return moments


def class_moments(activation: Tensor, labels: Tensor, num_classes: int, *, kernels: bool = False) -> Moments:
    """Moments of one batch. activation: (n channels positions); labels: (n,) below num_classes.

    kernels: by the CPU's own kernel, for float32.
    """
    mean_i, var_i = (kernel.image_moments if kernels else image_moments)(activation)
    count_c = torch.bincount(labels, minlength=num_classes).double()
    per_class = torch.zeros(num_classes, mean_i.shape[1], dtype=torch.float64, device=mean_i.device)
    divisor = count_c.clamp(min=1)[:, None]
    # Two passes over the means of the images, so that no square of a large mean is ever formed.
    reference = mean_i.mean(0)
    mean = reference + per_class.index_add(0, labels, mean_i - reference) / divisor
    deviation = mean_i - mean[labels]
    # what rounding left in the mean, taken back out
    residue = per_class.index_add(0, labels, deviation) / divisor
    m2 = per_class.index_add(0, labels, var_i + deviation.square()) - residue.square() * count_c[:, None]
    seen = (count_c > 0)[:, None]
    return Moments(
        count=count_c,
        mean=torch.where(seen, mean + residue, 0.0),
        m2=torch.where(seen, m2, 0.0).clamp(min=0.0),
    )


def image_moments(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (n channels), float64, of each image of (n channels positions).

    Around the image's own first position: of a sample with that value in it, (mean - value)^2 is at most `positions`
    times the variance, so that the difference loses no more digits than `positions` has, whatever mean / sigma is.
    """
    first = activation[:, :, 0].double()
    deviation = activation.double() - first[:, :, None]
    offset = deviation.mean(2)
    return first + offset, (deviation.square().mean(2) - offset.square()).clamp(min=0.0)
