"""Per-class moments of activations: exact in float64, merged by Chan's method, mixed by the law of total variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Moments per class and channel of one tapped layer, all float64.

    count: (classes,) activations per channel. mean: (classes channels). m2: (classes channels), the sum of
    squared deviations from the mean. A class without activations has zeros.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

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


def class_moments(activation: Tensor, labels: Tensor, num_classes: int) -> Moments:
    """Moments of one batch. activation: (n channels positions); labels: (n,) class indices."""
    x = activation.double()
    positions = x.shape[2]
    count_c = torch.bincount(labels, minlength=num_classes).double()
    per_class = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device)
    divisor = count_c.clamp(min=1)[:, None]

    # Two passes: first a mean per image, then deviations, so that no square of a large mean is ever formed.
    mean_i = x.mean(2)
    reference = mean_i.mean(0)
    mean = reference + per_class.index_add(0, labels, mean_i - reference) / divisor
    deviation = x - mean[labels][:, :, None]
    # what rounding left in the mean, taken back out
    residue = per_class.index_add(0, labels, deviation.mean(2)) / divisor
    m2 = per_class.index_add(0, labels, deviation.square().sum(2)) - residue.square() * (count_c * positions)[:, None]
    seen = (count_c > 0)[:, None]
    return Moments(
        count=count_c * positions,
        mean=torch.where(seen, mean + residue, 0.0),
        m2=torch.where(seen, m2, 0.0).clamp(min=0.0),
    )
