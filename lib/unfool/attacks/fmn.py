"""FMN: a projected gradient step, in a ball whose radius is led to the border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._descent import ROUNDING
from unfool.attacks._nearest import (
    SHORTEST,
    Nearest,
    Norm,
    Projection,
    annealed,
    clip,
    from_the_right_ones,
    keep_largest,
    l0,
    l1,
    l2,
    linf,
    shorten,
    shrink,
    unit,
)
from unfool.inputs import check_choice, check_inputs, check_number, in_chunks
from unfool.progress import Progress

VERSION = 2
GAMMA_LAST = 0.001
HALVINGS = 10  # of the way from x to a given start


@dataclass(frozen=True)
class Ball:
    """A norm, the projection onto its ball, and how long a gradient is in the dual norm."""

    norm: Norm
    project: Projection
    dual: Norm | None


BALLS: dict[str, Ball] = {
    "l0": Ball(l0, keep_largest, None),
    "l1": Ball(l1, shrink, linf),
    "l2": Ball(l2, shorten, l2),
    "linf": Ball(linf, clip, l1),
}


def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Literal["l0", "l1", "l2", "linf"] = "l2",
    steps: int = 100,
    alpha: float = 1.0,
    gamma: float = 0.05,
    inside: bool = True,
    start: Tensor | None = None,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Fast Minimum-Norm: the nearest image in L0, L1, L2 or L-infinity.

    Pintor et al. 2021, algorithm 1. Each step goes along the gradient of the margin by which the
    wrong class leads, is projected onto a ball around x and clipped to [0, 1]. The ball's radius:

    - until the model is fooled for the first time, the length so far and the way to the border as
      far as the gradient can tell, |margin| / ||gradient|| in the dual norm;
    - then by a share gamma smaller where the model is fooled, and never larger than the best
      image's; by as much larger where it is not, which may lead beyond the best. In L0, which has
      no dual norm, this holds from the start, from 1 value on and in steps of at least 1.

    Both the step, of L2 length alpha at first, and gamma are annealed by half a cosine, to
    alpha / 100 and 0.001. The nearest image seen that fools the model is returned. Explained in
    notebook 03.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        norm: what must be small: "l0", how many values change (each colour counts), "l1", "l2" or
            "linf".
        steps: how many; each is a forward and a backward pass, and one forward comes first.
        alpha: the first step's length, > 0, in L2 of pixels in [0, 1].
        gamma: the first share by which the radius changes, from 0 to 1.
        inside: whether to leave out of the gradient what points out of [0, 1]. The paper does not
            (False): on digits, mostly black, much of a step may then be clipped away, so that the
            radius creeps up to the border; in L2 a quarter to a third of them are never fooled.
        start: images like x to begin with, such as another attack's: one that fools the model is
            moved to the border, by ten halvings of the way from x. By default, and where it does
            not fool the model, x itself.
        target: classes (N,), int64, not y: the error must be this one.
        generator: unused, nothing is drawn; part of every attack's interface.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_choice("norm", norm, tuple(BALLS))
    check_number("steps", steps, 1, whole=True)
    check_number("alpha", alpha, 0)
    if alpha == 0:
        raise ValueError("alpha must be > 0: with 0 nothing would ever move")
    check_number("gamma", gamma, 0, 1)
    check_start(start, x)

    def search(images: Tensor) -> Tensor:
        aim = None if target is None else target[images]
        nearest = Nearest(model, x[images].detach(), y[images], aim, BALLS[norm].norm)
        begin = nearest.x if start is None else start[images].detach()
        descend(nearest, begin, BALLS[norm], steps, alpha, gamma, inside)
        return nearest.best

    def attack(rows: slice) -> Tensor:
        return from_the_right_ones(model, x, y, rows, search)

    return in_chunks(attack, model, x, y, target, progress=progress, name="fmn")


def check_start(start: Tensor | None, x: Tensor) -> None:
    """Refuse what can be no image to begin with for each of x."""
    if start is None:
        return
    if (start.shape, start.dtype, start.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"start must be like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"not {tuple(start.shape)} {start.dtype} on {start.device}"
        )
    if not ((start >= 0) & (start <= 1)).all():  # NaN is refused, too
        raise ValueError("start must be images in [0, 1]: use another attack's result")


def descend(
    nearest: Nearest, begin: Tensor, ball: Ball, steps: int, alpha: float, gamma: float,
    inside: bool,
) -> None:  # fmt: skip
    """Take the steps; `nearest` keeps the best image."""
    x, images = nearest.x, begin
    if begin is not x:
        images = nearest.halve_the_way(begin, ball.project, HALVINGS)
        images = torch.where(nearest.distance.isinf().view(-1, 1, 1, 1), x, images)
    farthest = ball.norm(torch.maximum(x, 1 - x))  # a corner of the box
    radius = ball.norm(images - x).clamp(min=1) if ball.dual is None else farthest
    for step in range(steps):
        share = step / steps
        length = ball.norm(images - x)
        margin, gradient = nearest.look(images, nearest.margin)
        if inside:
            out = ((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0))
            gradient = gradient.masked_fill(out, 0.0)
        by = annealed(gamma, GAMMA_LAST, share)
        if ball.dual is None:
            radius = next_count(radius, by, margin, nearest.distance)
        else:
            # A little further than the border itself, where the classes tie and nothing is fooled.
            way = margin.abs() + 2 * ROUNDING
            border = length + way / ball.dual(gradient).clamp(min=SHORTEST)
            radius = next_radius(radius, by, margin, nearest.distance, border)
        radius = torch.minimum(radius, farthest)
        change = images - x + annealed(alpha, alpha / 100, share) * unit(gradient)
        images = (x + ball.project(change, radius)).clamp(0, 1)


def next_radius(
    radius: Tensor, by: float, margin: Tensor, best: Tensor, border: Tensor
) -> Tensor:  # fmt: skip
    """Return the radius to look in next: all (n,), `best` infinite while nothing has been found."""
    larger = torch.where(best.isinf(), border, (1 + by) * radius)
    return torch.where(margin > ROUNDING, torch.minimum((1 - by) * radius, best), larger)


def next_count(radius: Tensor, by: float, margin: Tensor, best: Tensor) -> Tensor:
    """Return how many values may change next: as `next_radius`, in whole numbers from 1."""
    larger = torch.maximum(radius + 1, ((1 + by) * radius).floor())
    smaller = torch.minimum(radius - 1, ((1 - by) * radius).floor())
    smaller = torch.minimum(smaller, best)
    return torch.where(margin > ROUNDING, smaller, larger).clamp(min=1)
