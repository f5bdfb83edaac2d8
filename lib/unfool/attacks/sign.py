"""The sign family: steps along the sign of the loss's gradient, inside an L-infinity ball.

These attacks always return the perturbed image, also where it does not fool the classifier.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from unfool.attacks._guard import (
    check_images,
    check_labels,
    check_range,
    count_classes,
    frozen,
)
from unfool.progress import Progress

VERSION = 1
CPU_CHUNK = 32  # images at once: larger activations are returned to the system and faulted in anew


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Fast gradient sign method: one step of size eps uphill in the loss, clipped to [0, 1].

    x* = x + eps sign(grad_x J(x, y)): Goodfellow et al. 2015; the paper's equation 1 (eps 0.15 on
    MNIST, 0.1 on CIFAR-10). Explained in notebook 02.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel, in units of the [0, 1] range; 0.15 is 38 of 255.
        target: classes (N,), int64: step downhill towards them instead of uphill from `y`.
        generator: unused, FGSM draws nothing; part of every attack's interface.
        progress: called with the number of images done.

    Returns:
        Perturbed images: shape, dtype and device of `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_images(x)
    check_labels(y, x)
    if target is not None:
        check_labels(target, x, "target")
        if (target == y).any():
            raise ValueError(
                f"target equals y for {int((target == y).sum())} images: aim at another class"
            )
    if not eps >= 0:
        raise ValueError(f"eps is a distance in pixel units and must be >= 0, not {eps}")
    aim, sign = (y, 1.0) if target is None else (target, -1.0)
    chunk = CPU_CHUNK if x.device.type == "cpu" else max(len(x), 1)
    done: list[Tensor] = []
    with frozen(model):
        if len(x):
            classes = count_classes(model, x)
            check_range(y, classes)
            check_range(aim, classes, "y" if target is None else "target")
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            gradient = loss_gradient(model, x[rows], aim[rows])
            done.append((x[rows].detach() + sign * eps * gradient.sign()).clamp(0, 1))
            if progress is not None:
                progress(min(start + chunk, len(x)), len(x), "fgsm")
    return torch.cat(done) if done else x.detach().clone()


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each image's own cross-entropy with respect to its pixels.

    (N, C, H, W) like x. The losses are summed, not averaged, so that image i's gradient
    depends on image i alone and not on the size of its batch.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = cross_entropy(model(x), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient
