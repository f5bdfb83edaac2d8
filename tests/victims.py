"""What the slower attacks are tried on: digits, two classifiers of them, a counter of passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from unfool import classifiers
from unfool.artifacts import REPO, load_tensors
from unfool.datasets import load

Batch = tuple[Tensor, Tensor, Tensor]
"""Images, their classes, and another class for each."""


def digits(n: int, *, small: bool = False) -> Batch:
    """The first n test digits, 28x28 or averaged down to 14x14."""
    images, labels = (part[:n] for part in _digits("test"))
    shift = torch.randint(1, 10, (n,), generator=torch.Generator().manual_seed(0))
    return (avg_pool2d(images, 2) if small else images), labels, (labels + shift) % 10


@cache
def _digits(split: str) -> tuple[Tensor, Tensor]:
    part = getattr(load("mnist5k"), split)
    return part.images, part.labels


@cache
def anet() -> nn.Module:
    """The committed anet, in eval mode."""
    tensors, _ = load_tensors(REPO / "results" / "weights" / "anet-mnist.safetensors")
    net = classifiers.build("anet", (1, 28, 28))
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return net.eval()


@cache
def small_net() -> nn.Module:
    """A little convolutional network that reads 14x14 digits; trained in two seconds."""
    images, labels = _digits("train")
    images = avg_pool2d(images, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(6):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    net.zero_grad(set_to_none=True)
    return net.eval()


class Rows(nn.Module):
    """A classifier whose logits are the same bits in whatever batch an image stands.

    64 values an image, so that none falls to the scalar loop at the end of a vectorised one.
    """

    def __init__(self, features: int = 64, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(classes, features, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self._logits(image) for image in x.flatten(1)])

    def _logits(self, image: Tensor) -> Tensor:
        return (self.weight * (image - 0.5)).sum(dim=1) + (self.weight * image.square()).sum(dim=1)


def row_batch(n: int) -> Batch:
    """Images (n, 1, 8, 8) for `Rows`; every fifth is labelled wrongly."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = Rows()(x).argmax(dim=1).detach()
    y[::5] = (y[::5] + 1) % 4
    return x, y, (y + 2) % 4


class Counted(nn.Module):
    """Counts the images that pass forwards and backwards, and the largest batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards, self.largest = inner, 0, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.largest = max(self.largest, len(x))
        logits: Tensor = self.inner(x)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Breaks(nn.Module):
    """Raises at its fifth pass; its modules and weights are in mixed states, with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.left = Rows(), nn.Dropout(0.5), 4
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)
        self.inner.weight.grad = torch.ones_like(self.inner.weight)
        self.train()
        self.inner.eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.drop.training
        assert not self.inner.weight.requires_grad
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of something")
        return self.inner(self.drop(x)) * self.fixed

    def state(self) -> list[Any]:
        modes = [m.training for m in self.modules()]
        flags = [p.requires_grad for p in self.parameters()]
        values = [p.tolist() for p in self.parameters()]
        grads = [None if p.grad is None else p.grad.tolist() for p in self.parameters()]
        return [modes, flags, values, grads]


class Narrow(nn.Module):
    """Runs out of memory, as a GPU does, with more than four images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("too many")
        logits: Tensor = self.inner(x)
        return logits


def comes_back_after_an_error(attack: Callable[..., Tensor], **settings: Any) -> None:
    """The model is the caller's again when it raises in the middle of an attack."""
    net, (x, y, target) = Breaks(), row_batch(4)
    before = net.state()
    assert [len(set(kinds)) for kinds in before[:2]] == [2, 2]  # mixed: one flag would not do
    with pytest.raises(RuntimeError, match="out of something"):
        attack(net, x, y, target=target, **settings)
    assert net.left == -1
    assert net.state() == before
    net.drop.eval()
    assert net.state() != before


def in_unit_range(x_adv: Tensor) -> bool:
    return float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
