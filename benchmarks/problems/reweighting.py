"""Meta-Weight-Net (Shu et al. 2019) over classifiers: a small network weights each sample's loss by its value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems.base import BenchmarkProblem, Instance, ridge_loss


def lower_loss(ridge):
    """Return the weighted loss with an L2 term that makes the Hessian positive definite."""

    def loss(lower, upper, batch):
        x, y = batch
        losses = F.cross_entropy(lower(x), y, reduction="none")
        return (upper(losses.detach()[:, None]).squeeze(1) * losses).mean() + ridge_loss(lower, ridge)

    return loss


def upper_loss(lower, upper, batch):
    x, y = batch
    return F.cross_entropy(lower(x), y)


def weight_net(width: int = 100) -> nn.Module:
    return nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())


def convnet(smoke: bool) -> nn.Module:
    """Two convolutions and two linear layers: 66,610 parameters."""
    a, b, c = (2, 3, 4) if smoke else (20, 40, 30)
    return nn.Sequential(
        *(nn.Conv2d(1, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(49 * b, c), nn.ReLU(), nn.Linear(c, 10)),
    )


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        shape = (*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / shape[-1] ** 0.5).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer layer, normalized before each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Two layers over token embeddings, a classifier on the mean."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(Layer(width, heads), Layer(width, heads))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.layers(self.tokens(x) + self.places).mean(1))


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut (He et al. 2016, CIFAR variant: option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x):
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + shortcut)


def resnet32(classes: int = 10, *, blocks: int = 5) -> nn.Module:
    """Three stages of five blocks, 16, 32 and 64 wide: 464,154 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for stage in (16, 32, 64):
        for i in range(blocks):
            layers.append(Block(width, stage, 2 if stage > 16 and i == 0 else 1))
            width = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def _instance(lower, inputs, num, dtype, *, solver_steps, neumann_scale, ridge=1.0, lr=0.05) -> Instance:
    generator = torch.Generator().manual_seed(1)

    def batch():
        x = inputs(num, generator)
        x = x.to(dtype) if x.is_floating_point() else x
        return x, torch.randint(0, 10, (num,), generator=generator)

    upper = weight_net()
    return Instance(
        *(lower.to(dtype), upper.to(dtype), lower_loss(ridge), upper_loss),
        *([batch() for _ in range(2)], [batch() for _ in range(2)]),
        lower_lr=lr,
        momentum=0.9,
        upper_lr=1e-3,
        unroll_steps=1,
        solver_steps=solver_steps,
        neumann_scale=neumann_scale,
    )


def make_convnet(dtype: torch.dtype, smoke: bool) -> Instance:
    torch.manual_seed(0)

    def images(num, generator):
        return torch.randn(num, 1, 28, 28, generator=generator, dtype=torch.float64)

    num, steps = (4, 2) if smoke else (64, 10)
    return _instance(convnet(smoke), images, num, dtype, solver_steps=steps, neumann_scale=0.05, ridge=10.0)


def make_transformer(dtype: torch.dtype, smoke: bool) -> Instance:
    torch.manual_seed(0)
    vocabulary, length, width = (20, 4, 8) if smoke else (100, 32, 64)

    def tokens(num, generator):
        return torch.randint(0, vocabulary, (num, length), generator=generator)

    lower = Transformer(vocabulary, length, width, heads=2 if smoke else 4)
    num, steps = (4, 2) if smoke else (16, 10)
    return _instance(lower, tokens, num, dtype, solver_steps=steps, neumann_scale=0.2)


def make_resnet(dtype: torch.dtype, smoke: bool) -> Instance:
    torch.manual_seed(0)
    size, num, steps, blocks = (8, 4, 2, 1) if smoke else (32, 100, 10, 5)

    def images(num, generator):
        return torch.randn(num, 3, size, size, generator=generator, dtype=torch.float64)

    settings = {"solver_steps": steps, "neumann_scale": 0.02, "ridge": 20.0, "lr": 0.01}
    return _instance(resnet32(blocks=blocks), images, num, dtype, **settings)


CONVNET = BenchmarkProblem(
    "convnet", "convolutions, 66,610 parameters, batch 64, weight net", make_convnet, {"cg": 1.8}
)
TRANSFORMER = BenchmarkProblem(
    "transformer", "2-layer transformer, 32 tokens, width 64, batch 16, weight net", make_transformer, {"cg": 1.25}
)
RESNET = BenchmarkProblem(
    "resnet",
    "ResNet-32 with BatchNorm, batch 100, weight net",
    make_resnet,
    {"cg": 1.3, "cg-ggn": 1.9, "finite-difference": 1.15},
)
