"""ResNet-32 with Meta-Weight-Net (Shu et al. 2019) on images of CIFAR size; random data, the shapes are what counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import mlopt


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut (He et al. 2016, CIFAR variant: option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + shortcut)


def resnet32(classes: int = 10) -> nn.Module:
    """Three stages of five blocks, 16, 32 and 64 wide: 464,154 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for stage in (16, 32, 64):
        for i in range(5):
            layers.append(Block(width, stage, 2 if stage > 16 and i == 0 else 1))
            width = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class Classifier(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        weights = self.reweight(losses.detach()[:, None]).squeeze(1)
        return (weights * losses).mean()


class Reweight(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.classifier(x), y)


def make(batch_size: int = 100, estimator: mlopt.AbstractEstimator | None = None) -> mlopt.Graph:
    """Make the program."""
    torch.manual_seed(0)
    net = resnet32()
    weights = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    data = [(torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))) for _ in range(2)]
    return mlopt.Graph(
        [
            Classifier(
                "classifier",
                module=net,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
                data=data,
                hypergradient=estimator or mlopt.CG(max_steps=3, damping=1.0),
            ),
            Reweight("reweight", module=weights, optimizer=torch.optim.Adam(weights.parameters(), lr=1e-3), data=data),
        ]
    )
