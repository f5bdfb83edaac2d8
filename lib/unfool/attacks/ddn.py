"""DDN: walk around the border on a sphere that shrinks inside the wrong class and grows outside."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from unfool.attacks._descent import ROUNDING
from unfool.attacks._nearest import (
    SHORTEST,
    Nearest,
    annealed,
    from_the_right_ones,
    l2,
    per_image,
    unit,
)
from unfool.attacks.deepfool import largest_others
from unfool.inputs import check_inputs, check_number, in_chunks
from unfool.progress import Progress

VERSION = 1
FIRST, LAST = 1.0, 0.01  # the length of a step, before it is put back on the sphere


def ddn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    gamma_last: float | None = None,
    radius: float = 1.0,
    rivals: int = 0,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Decoupled Direction and Norm: the nearest image in L2, direction and distance by turns.

    Rony et al. 2019, algorithm 1. The image lies on a sphere around x. Each step goes along the
    gradient of the cross-entropy (for a target against it), by 1 at first and by 0.01 at last, in
    half a cosine; then the radius is multiplied by 1 - gamma if the model is fooled, else by
    1 + gamma, and the image is put back on the sphere and into [0, 1]. The nearest image seen that
    fools the model is returned. There is no price c to search for, as Carlini and Wagner's attack
    has, so some ten steps do. Explained in notebook 03.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched. Images are not rounded to 256 levels, as the paper may do.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        steps: how many; each is a forward and a backward pass, and one forward comes first. 100;
            with 50, say, `gamma=0.1, gamma_last=0.001` comes as near as with 100.
        gamma: by which share the radius changes, from 0 to 1; 0.05 as in the paper.
        gamma_last: its value at the last step, reached in half a cosine; by default it stays.
            Annealed, the image ends on the border and not within gamma of it, so that gamma can
            begin larger: 0.2 with a radius of 2 where there are 20 steps or fewer.
        radius: the first one, in L2 of pixels in [0, 1]; 1 as in the paper.
        rivals: how many walks more, each aimed at one of the likeliest other classes; the nearest
            image of all of them is returned. 0 as in the paper; a walk may end at a border that is
            not the nearest, and where passes abound, 4 find nearer ones than longer walks do.
        target: classes (N,), int64, not y: the error must be this one.
        generator: unused, nothing is drawn; part of every attack's interface.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_number("steps", steps, 1, whole=True)
    check_number("gamma", gamma, 0, 1)
    last = gamma if gamma_last is None else gamma_last
    check_number("gamma_last", last, 0, 1)
    check_number("radius", radius, 0)
    if radius == 0:
        raise ValueError("radius must be > 0: a sphere of radius 0 never grows; the paper's is 1")

    check_number("rivals", rivals, 0, whole=True)
    if rivals > 0 and target is not None:
        raise ValueError(f"rivals={rivals} needs target to be None: a target is the only rival")

    def search(images: Tensor) -> Tensor:
        start, own = x[images].detach(), y[images]
        aims: list[Tensor | None] = [None if target is None else target[images]]
        if rivals > 0:
            with torch.no_grad():
                aims += largest_others(model(start), own, rivals).unbind(dim=1)
        walks = [Nearest(model, start, own, aim, l2) for aim in aims]
        for nearest in walks:
            walk(nearest, steps, gamma, last, radius)
        first = torch.stack([nearest.distance for nearest in walks]).argmin(dim=0)
        best = torch.stack([nearest.best for nearest in walks])
        return best[first, torch.arange(len(start), device=start.device)]

    def attack(rows: slice) -> Tensor:
        return from_the_right_ones(model, x, y, rows, search)

    return in_chunks(attack, model, x, y, target, progress=progress, name="ddn")


def walk(nearest: Nearest, steps: int, gamma: float, last: float, radius: float) -> None:
    """Take the steps; `nearest` keeps the best image."""
    x, images = nearest.x, nearest.x
    farthest = l2(torch.maximum(x, 1 - x))  # a corner of the box
    radii = x.new_full((len(x),), radius)

    def gain(logits: Tensor) -> Tensor:
        return -nearest.sign * cross_entropy(logits, nearest.aim, reduction="none")

    for step in range(steps):
        share = step / steps
        margin, gradient = nearest.look(images, gain)
        change = images - x + annealed(FIRST, LAST, share) * unit(gradient)
        by = annealed(gamma, last, share)
        radii = torch.where(margin > ROUNDING, (1 - by) * radii, (1 + by) * radii)
        radii = torch.minimum(radii, farthest)
        images = (x + change * per_image(radii / l2(change).clamp(min=SHORTEST))).clamp(0, 1)
