"""The classifiers under attack; each returns logits.

| name | what | source |
|---|---|---|
| anet, bnet | two small convolutional networks | Yu et al. 2020, Table 1 |
| a … f | the networks of the Defense-GAN comparison | Samangouei et al. 2018 and their code |
| resnet8, resnet20, resnet18 | CIFAR-style residual networks | He et al. 2016 |
| densenet40, densenet100 | DenseNet-BC, growth 12 | Huang et al. 2017 |

The paper ends Anet and Bnet with ReLU before the softmax. A ReLU on the last layer clips negative
logits to zero, so classes die and gradients vanish: an attack then fails for a reason that is no
robustness. Attacks and losses here get plain logits; `relu_logits=True` restores the paper's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from difflib import get_close_matches

import torch
from torch import Tensor, nn

VERSION = 1
Shape = tuple[int, int, int]
"""(channels, height, width) of one image."""


def build(
    name: str, shape: Shape, classes: int = 10, *, seed: int = 0, relu_logits: bool = False,
    literal_dropout: bool = False,
) -> nn.Module:  # fmt: skip
    """Return a fresh classifier with weights drawn from `seed`; the global random state stays put.

    Args:
        name: a key of `CLASSIFIERS`.
        shape: (channels, height, width) of the images it will see.
        classes: number of logits.
        seed: of the initial weights.
        relu_logits: append a ReLU to the logits, as the paper's Table 1 prints it.
        literal_dropout: of Defense-GAN's A to F, what their code did with the printed rates.

    Raises:
        ValueError: no classifier of that name, the message lists them; or no such dropout in it.
    """
    if name not in CLASSIFIERS:
        raise unknown(name, CLASSIFIERS)
    if literal_dropout and name not in DEFENSE_GAN:
        raise ValueError(f"literal_dropout is a reading of {', '.join(DEFENSE_GAN)}, not of {name}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        if literal_dropout:
            net = DEFENSE_GAN[name](shape, classes, literal_dropout=True)
        else:
            net = CLASSIFIERS[name](shape, classes)
    return nn.Sequential(net, nn.ReLU()) if relu_logits else net


def unknown(name: str, choices: Collection[str]) -> ValueError:
    """Return the error for a classifier's name that is none of `choices`."""
    close = get_close_matches(name, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown classifier {name!r}: choose from {', '.join(choices)}{hint}")


# --- the paper's Table 1 ---------------------------------------------------------------------


def anet(shape: Shape, classes: int = 10) -> nn.Module:
    """Anet of the paper's Table 1 (convolutions without padding; about 1 M weights at 28x28)."""
    channels, height, width = shape
    h, w = ((height - 4) - 3) // 2 + 1, ((width - 4) - 3) // 2 + 1
    return nn.Sequential(
        nn.Conv2d(channels, 64, 5), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(64 * h * w, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, classes),
    )  # fmt: skip


def bnet(shape: Shape, classes: int = 10) -> nn.Module:
    """Bnet of the paper's Table 1 (convolutions without padding)."""
    channels, height, width = shape
    h, w = ((height - 4) // 2 - 4) // 2, ((width - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 64, 3), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * h * w, 200), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(200, 200), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(200, classes),
    )  # fmt: skip


# --- Defense-GAN's A to F ------------------------------------------------------------------------
# Their code passes the dropout rates to an argument that means the share that is KEPT, so "0.2" on
# model B's input keeps 20 % of the pixels; this explains B's odd clean accuracy of 96.2 %.
# The default here is the rate as printed; `literal_dropout=True` does what their code did.


def model_a(shape: Shape, classes: int = 10, *, literal_dropout: bool = False) -> nn.Module:
    """Model A: Conv 64 5x5, Conv 64 5x5 stride 2, FC 128."""
    channels, height, width = shape
    flat = 64 * ((height - 5) // 2 + 1) * ((width - 5) // 2 + 1)
    return _unit_weights(
        nn.Conv2d(channels, 64, 5, padding=2), nn.ReLU(),
        nn.Conv2d(64, 64, 5, stride=2), nn.ReLU(),
        nn.Flatten(), _dropout(0.25, literal_dropout),
        nn.Linear(flat, 128), nn.ReLU(), _dropout(0.5, literal_dropout),
        nn.Linear(128, classes),
    )  # fmt: skip


def model_b(shape: Shape, classes: int = 10, *, literal_dropout: bool = False) -> nn.Module:
    """Model B: dropout on the input, Conv 64 8x8 s2, Conv 128 6x6 s2, Conv 128 5x5."""
    return _unit_weights(
        _dropout(0.2, literal_dropout),
        *_layers_b(shape), _dropout(0.5, literal_dropout),
        nn.Linear(_flat_b(shape), classes),
    )  # fmt: skip


def model_c(shape: Shape, classes: int = 10, *, literal_dropout: bool = False) -> nn.Module:
    """Model C: Conv 128 3x3, Conv 64 5x5 stride 2, FC 128."""
    channels, height, width = shape
    flat = 64 * ((height - 5) // 2 + 1) * ((width - 5) // 2 + 1)
    return _unit_weights(
        nn.Conv2d(channels, 128, 3, padding=1), nn.ReLU(),
        nn.Conv2d(128, 64, 5, stride=2), nn.ReLU(),
        nn.Flatten(), _dropout(0.25, literal_dropout),
        nn.Linear(flat, 128), nn.ReLU(), _dropout(0.5, literal_dropout),
        nn.Linear(128, classes),
    )  # fmt: skip


def model_d(shape: Shape, classes: int = 10, *, literal_dropout: bool = False) -> nn.Module:
    """Model D: two fully connected layers of 200."""
    return _unit_weights(
        nn.Flatten(),
        nn.Linear(_pixels(shape), 200), nn.ReLU(), _dropout(0.5, literal_dropout),
        nn.Linear(200, 200), nn.ReLU(),
        nn.Linear(200, classes),
    )  # fmt: skip


def model_e(shape: Shape, classes: int = 10) -> nn.Module:
    """Model E, an attacker's substitute: D without dropout."""
    return _unit_weights(
        nn.Flatten(),
        nn.Linear(_pixels(shape), 200), nn.ReLU(),
        nn.Linear(200, 200), nn.ReLU(),
        nn.Linear(200, classes),
    )  # fmt: skip


def model_f(shape: Shape, classes: int = 10) -> nn.Module:
    """Model F, an attacker's substitute: B without dropout."""
    return _unit_weights(*_layers_b(shape), nn.Linear(_flat_b(shape), classes))


def _layers_b(shape: Shape) -> list[nn.Module]:
    return [
        nn.Conv2d(shape[0], 64, 8, stride=2, padding=3), nn.ReLU(),
        nn.Conv2d(64, 128, 6, stride=2), nn.ReLU(),
        nn.Conv2d(128, 128, 5), nn.ReLU(),
        nn.Flatten(),
    ]  # fmt: skip


def _flat_b(shape: Shape) -> int:
    h, w = (((n - 2) // 2 + 1 - 6) // 2 + 1 - 4 for n in shape[1:])
    return 128 * h * w


def _pixels(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


def _dropout(rate: float, literal: bool) -> nn.Dropout:
    return nn.Dropout(1 - rate if literal else rate)


def _unit_weights(*layers: nn.Module) -> nn.Module:
    """Chain the layers with Defense-GAN's start: normal weights, unit length per output, bias 0."""
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weight = torch.randn_like(layer.weight)
                norm = weight.flatten(1).norm(dim=1).clamp_min(1e-4)
                layer.weight.copy_(weight / norm.view(-1, *[1] * (weight.ndim - 1)))
                assert layer.bias is not None
                layer.bias.zero_()
    return net


# --- residual and densely connected networks for 32x32 images --------------------------------


class _Residual(nn.Module):
    """x -> relu(f(x) + shortcut(x)), f = two 3x3 convolutions with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.f(x) + self.shortcut(x))


def resnet(shape: Shape, classes: int = 10, *, depth: int = 20) -> nn.Module:
    """CIFAR residual network: depth 6n+2 with 16-32-64 channels, or 18 with 64-128-256-512."""
    if depth == 18:
        widths, blocks = [64, 128, 256, 512], 2
    elif depth >= 8 and (depth - 2) % 6 == 0:
        widths, blocks = [16, 32, 64], (depth - 2) // 6
    else:
        raise ValueError(f"resnet has depth 18 or 6n+2 (8, 14, 20, …), not {depth}")
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    ]  # fmt: skip
    inputs = widths[0]
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            layers.append(_Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class _Dense(nn.Module):
    """x -> cat(x, g(x)): a 1x1 bottleneck of 4*growth channels, then 3x3 to `growth`."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.g = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.g(x)], dim=1)


def densenet(shape: Shape, classes: int = 10, *, depth: int = 40, growth: int = 12) -> nn.Module:
    """DenseNet-BC with three blocks, compression 0.5; depth 6n+4 (40, 100)."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"densenet has depth 6n+4 (10, 40, 100, …), not {depth}")
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, 1, 1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(_Dense(channels, growth))
            channels += growth
        if block < 2:
            half = channels // 2
            layers += [
                nn.BatchNorm2d(channels), nn.ReLU(),
                nn.Conv2d(channels, half, 1, bias=False), nn.AvgPool2d(2),
            ]  # fmt: skip
            channels = half
    return nn.Sequential(
        *layers, nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes),
    )  # fmt: skip


def _resnet(depth: int) -> Callable[[Shape, int], nn.Module]:
    return lambda shape, classes: resnet(shape, classes, depth=depth)


def _densenet(depth: int) -> Callable[[Shape, int], nn.Module]:
    return lambda shape, classes: densenet(shape, classes, depth=depth)


DEFENSE_GAN: dict[str, Callable[..., nn.Module]] = {
    "a": model_a, "b": model_b, "c": model_c, "d": model_d, "e": model_e, "f": model_f,
}  # fmt: skip
CLASSIFIERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "anet": anet,
    "bnet": bnet,
    **DEFENSE_GAN,
    "resnet8": _resnet(8),
    "resnet20": _resnet(20),
    "resnet18": _resnet(18),
    "densenet40": _densenet(40),
    "densenet100": _densenet(100),
}
