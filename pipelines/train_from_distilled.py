"""Train torchvision's ResNet-18 on a distilled set, in plain PyTorch: python train_from_distilled.py PATH [EPOCHS].

PATH is a folder or URI such as runs/digits/distilled.
"""

import sys

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models import resnet18

import teddy_ray

data = teddy_ray.load(sys.argv[1])
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 30
model = resnet18(num_classes=len(data.classes))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
for epoch in range(1, epochs + 1):
    for views, targets, _ in DataLoader(data.at(epoch), batch_size=25, shuffle=True, drop_last=len(data) > 25):
        logits = model(views.expand(-1, 3, -1, -1))  # grey images as colours
        loss = cross_entropy(logits / data.temperature, targets) * data.temperature**2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    schedule.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
