"""Views of a set's images, and the ensemble's soft label of each view.

A view is a pure function of (seed, set, image id, view), so only labels are stored: whoever trains replays the views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from teddy_ray.augment import Boxes, apply_boxes, draw_boxes
from teddy_ray.randomness import generator
from teddy_ray.recipe import Augmentation


@dataclass(frozen=True, kw_only=True)
class Views:
    """The augmented views of a set's images.

    set_key: fingerprint of the set. num_views: views per image.
    """

    seed: int
    set_key: str
    augmentation: Augmentation
    num_views: int

    def boxes(self, image_ids: Sequence[str]) -> Boxes:
        """(n num_views 5): the boxes of every view of the images."""
        return np.stack(
            [
                draw_boxes(self.augmentation, generator("view", self.seed, self.set_key, image_id), self.num_views)
                for image_id in image_ids
            ]
        )


@torch.inference_mode()
def soft_labels(models: Sequence[nn.Module], views: Tensor, temperature: float) -> Tensor:
    """Y = 1/|M| sum softmax(logits / tau). views: (n c h w). Returns (n classes), probabilities in float32."""
    probabilities = [(model(views) / temperature).softmax(1) for model in models]
    return torch.stack(probabilities).mean(0)


def label_views(
    models: Sequence[nn.Module],
    images: Tensor,
    boxes: Boxes,
    temperature: float,
    on_view: Callable[[int], None] = lambda num_done: None,
) -> npt.NDArray[np.float16]:
    """Labels of every view of a batch. images: (n c h w); boxes: (n views 5). Returns (n views classes) float16.

    on_view: told after each view how many are labelled.
    """
    labels = []
    for view in range(boxes.shape[1]):
        labels.append(soft_labels(models, apply_boxes(images, boxes[:, view]), temperature))
        on_view(view + 1)
    return torch.stack(labels, 1).half().cpu().numpy()
