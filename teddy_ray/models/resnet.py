"""ResNets for small images: a 3x3 stem of stride 1 and no max-pooling (He et al., 2016, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """Four stages of residual blocks, of `width` times 1, 2, 4, 8 planes.

    images (n channels size size) -> logits (n num_classes).
    """

    def __init__(
        self, num_classes: int, channels: int, image_size: int, *, block: str, layers: tuple[int, ...], width: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self._inplanes = width
        self.stages = nn.Sequential(
            *(
                self._make_stage(BLOCKS[block], width * 2**index, num_blocks, stride=1 if index == 0 else 2)
                for index, num_blocks in enumerate(layers)
            )
        )
        self.classifier = nn.Linear(self._inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_stage(
        self, block: type[BasicBlock | Bottleneck], planes: int, num_blocks: int, stride: int
    ) -> nn.Sequential:
        blocks = []
        for index in range(num_blocks):
            step = stride if index == 0 else 1
            outplanes = planes * block.expansion
            downsample = None
            if step != 1 or self._inplanes != outplanes:
                downsample = nn.Sequential(
                    nn.Conv2d(self._inplanes, outplanes, 1, stride=step, bias=False), nn.BatchNorm2d(outplanes)
                )
            # torchvision's bottleneck derives its inner width from planes alone at base_width 64
            blocks.append(block(self._inplanes, planes, step, downsample))
            self._inplanes = outplanes
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stages(self.stem(images)).mean((2, 3)))
        return logits
