"""What the tests of attacks share: toy networks, real digits with Anet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import victims

CLASSES = 3


def network(channels: int = 1, size: int = 8, seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A random classifier with batch norm and dropout, its modules in mixed modes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(5 * size * size, 16), nn.Tanh(), nn.Linear(16, classes),
        )  # fmt: skip
    net[1].eval()
    net[0].weight.requires_grad_(False)
    return net


def batch(n: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, size, size, generator=generator)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def next_class(y: Tensor) -> Tensor:
    return (y + 1) % CLASSES


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """The committed Anet and 256 real digits. It has seen them in training: attacks don't mind."""
    x, y, _ = victims.digits(256)
    return victims.anet(), x, y


def fooled(net: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
    """Which images the network gets right before and wrong after, (N,) bool."""
    net.eval()
    with torch.no_grad():
        return (net(x).argmax(1) == y) & (net(x_adv).argmax(1) != y)


def length(change: Tensor) -> Tensor:
    return change.flatten(1).norm(dim=1)
