"""Defences that only hide, and honest ones: what guards must speak of, and what not."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import victims
from unfool.attacks import AttackSettings, pgd
from unfool.datasets import load
from unfool.defenses import BitDepth, Blur
from unfool.threats import Attackers

QUICK = Attackers(  # enough to tell a mask from a defence on small networks
    draws=2,
    transfer=AttackSettings("pgd", {"steps": 8}),
    black_box=AttackSettings("square", {"queries": 100}),
    white_box=AttackSettings("apgd", {"steps": 15, "targets": 2}),
)

Pair = tuple[nn.Module, nn.Module | None]
"""A classifier and the defence before it."""


class Scale(nn.Module):
    """Logits times a number: the softmax saturates."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, logits: Tensor) -> Tensor:
        return self.by * logits


class BatchBrightness(nn.Module):
    """Moves every image to the mean brightness of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=(1, 2, 3), keepdim=True) + 2 * x.mean()).clamp(0, 1)


class Noise(nn.Module):
    """Adds noise, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.2 * torch.randn_like(x)).clamp(0, 1)


class Detached(nn.Module):
    """The image itself, with a gradient that leads the wrong way."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() - (x - x.detach())


class Shattered(nn.Module):
    """Nearly the image itself, with a gradient of random sign."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.01 * torch.sin(5000 * x)).clamp(0, 1)


class Smooth(nn.Module):
    """A purifier with a good gradient: contrast, after a blur."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = Blur(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(8 * (self.blur(x) - 0.5))


def masked() -> dict[str, Pair]:
    """By what hides: a classifier and its defence."""
    net = victims.small_net()
    return {
        "one bit": (net, BitDepth(1)),
        "two bits": (net, BitDepth(2)),
        "saturated logits": (nn.Sequential(net, nn.ReLU(), Scale(1000.0)).eval(), None),
        "temperature": (nn.Sequential(net, Scale(100.0)).eval(), None),
        "batch statistics": (net, BatchBrightness()),
        "noise": (net, Noise()),
        "wrong gradient": (net, Detached()),
        "shattered gradient": (net, Shattered()),
    }


def honest() -> dict[str, Pair]:
    """By what it is: a classifier and its defence."""
    net = victims.small_net()
    return {
        "a network": (net, None),
        "a linear model": (trained(linear=True), None),
        "adversarial training": (trained(eps=0.1), None),
        "a smooth purifier": (net, Smooth()),
        "blur": (net, Blur(0.7)),
    }


@cache
def trained(linear: bool = False, eps: float = 0.0) -> nn.Module:
    """A little classifier of 14x14 digits, trained on attacked images where eps > 0."""
    data = load("mnist5k").train
    images, labels = avg_pool2d(data.images, 2), data.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(196, 10)]
        if not linear:
            layers = [nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]
        net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            x, y = images[rows], labels[rows]
            if eps:
                x = pgd(net, x, y, eps=eps, steps=3, generator=generator)
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(net(x), y).backward()
            optimizer.step()
    net.zero_grad(set_to_none=True)
    return net.eval()
