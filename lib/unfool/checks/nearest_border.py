"""Checks of exercise 03: DeepFool's steps, and the parts of Carlini and Wagner's attack."""

from __future__ import annotations

import torch
from torch import Tensor

from unfool.checks._tools import Answer, Draw, Wrong, same, task, tensor


@task("ex03_straight_step")
def straight_step(answer: Answer, draw: Draw) -> None:
    """The shortest way to the border of a linear classifier of two classes."""
    w, b, x = 2 * draw.normal(3), draw.number(0.5, 2), draw.normal(5, 3)
    f = torch.mv(x, w) + b
    unit = w / w.norm()
    step = torch.outer(-f / w.norm(), unit)
    got = tensor(answer(w, b, x), (5, 3))
    same(
        got,
        step,
        "the change is -f(x) w / |w|², so that f is 0 where it ends",
        {
            "you walk away from the border: mind the sign of f": -step,
            "the way has the wrong length: divide by the square of |w|": torch.outer(-f, unit),
            "b is missing: f(x) = w · x + b": torch.outer(-(f - b) / w.norm(), unit),
            "you use |f|: images with f < 0 must go the other way": torch.outer(
                -f.abs() / w.norm(), unit
            ),
            "that is where the step ends: the change alone is asked for": x + step,
            "you step as far as f says: divide by the square of |w|": torch.outer(-f, w),
        },
    )


@task("ex03_deepfool_step")
def deepfool_step(answer: Answer, draw: Draw) -> None:
    """The shortest way to the border with any other class of a linear classifier."""
    rows, scale = torch.arange(6), torch.tensor([0.4, 0.7, 1.0, 2.0, 4.0])[:, None]
    while True:  # until the runner-up is not always the nearest
        x, weights, b = draw.normal(6, 2), draw.normal(5, 2) * scale, 0.5 * draw.normal(5)
        z = x @ weights.T + b
        y, second = z.topk(2, dim=1).indices.T
        ways = _ways(weights, b, x, y)
        lengths = ways.norm(dim=2)
        nearest = ways[rows, lengths.argmin(1)]
        if not torch.allclose(nearest, ways[rows, second]):
            break
    far = lengths.masked_fill(torch.isinf(lengths), -1).argmax(1)
    f = z.gather(1, y[:, None]) - z
    own = weights[None, :, :] * (f / weights.square().sum(1)).unsqueeze(2)
    same(
        answer(weights, b, x, y),
        nearest,
        "for each class j but y: f = z_j - z_y, w = w_j - w_y, the way is |f| w / |w|²; take the "
        "shortest",
        {
            "you go to the class with the second largest logit: the nearest border counts, "
            "|f| / |w|": _chosen(ways, second),
            "you go to the farthest border: take the shortest way": _chosen(ways, far),
            "you walk away from the border: mind the sign": -nearest,
            "the gradient of z_j - z_y is w_j - w_y, not w_j": own[
                rows, own.norm(dim=2).scatter(1, y[:, None], float("inf")).argmin(1)
            ],
            "you don't move: leave out the class y itself, whose border lies at distance 0": (
                torch.zeros_like(x)
            ),
            "the way has the wrong length: divide by the square of |w|": _chosen(
                ways * _norms(weights, y)[:, :, None], lengths.argmin(1)
            ),
        },
    )


def _norms(weights: Tensor, y: Tensor) -> Tensor:
    return (weights[None] - weights[y][:, None]).norm(dim=2)


def _ways(weights: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The way of each point to each class's border, (N, K, D); infinitely far for its own."""
    ways = torch.full((len(x), len(b), x.shape[1]), float("inf"))
    for i, k in enumerate(y.tolist()):
        for j in range(len(b)):
            if j != k:
                w = weights[j] - weights[k]
                f = torch.dot(w, x[i]) + b[j] - b[k]
                ways[i, j] = -f * w / torch.dot(w, w)
    return ways


def _chosen(ways: Tensor, which: Tensor) -> Tensor:
    return ways[torch.arange(len(ways)), which]


@task("ex03_to_image")
def to_image(answer: Answer, draw: Draw) -> None:
    """Half of tanh w + 1: any w becomes pixels in [0, 1]."""
    w = 2 * draw.normal(2, 1, 3, 3)
    same(
        answer(w),
        torch.sigmoid(2 * w),
        "tanh lies in [-1, 1]: add 1, then halve",
        {
            "the 1 stands inside the bracket: halve the whole sum (the paper's print is wrong)": (
                w.tanh() / 2 + 1
            ),
            "halve it: pixels end at 1": w.tanh() + 1,
            "that is the sigmoid of w: tanh is asked for, which is steeper": torch.sigmoid(w),
            "pixels are negative: add 1": w.tanh() / 2,
            "clipping is no change of variable: its gradient is 0 outside": w.clamp(0, 1),
            "that is w itself: squeeze it with tanh": w,
        },
    )


@task("ex03_to_w")
def to_w(answer: Answer, draw: Draw) -> None:
    """A finite w that gives the image back, also for black and white pixels."""
    x = draw.uniform(2, 1, 4, 4)
    x[:, :, 0, 0], x[:, :, 0, 1] = 0.0, 1.0
    got = answer(x)
    if isinstance(got, Tensor) and got.is_floating_point() and not torch.isfinite(got).all():
        raise Wrong(
            "black or white pixels give infinity: pull 2x - 1 a hair inside (-1, 1) first, and for "
            "w beyond tanh's range there is NaN"
        )
    w = tensor(got, tuple(x.shape))
    inner = (x > 0.03) & (x < 0.93)
    odds = (x / (1 - x)).log()[inner]  # the logit, which is twice the arctanh of 2x - 1
    same(
        w[inner],
        odds / 2,
        "solve x = (tanh w + 1) / 2 for w",
        {
            "that is twice too much: x = (tanh w + 1) / 2 is not the sigmoid of w": odds,
            "map [0, 1] to [-1, 1] first: arctanh of 2x - 1": x.atanh()[inner],
            "that is 2x - 1: take its arctanh": (2 * x - 1)[inner],
            "atan is another function: arctanh undoes tanh": (2 * x - 1).atan()[inner],
            "that is tanh again: arctanh undoes it": (2 * x - 1).tanh()[inner],
        },
    )
    back = torch.sigmoid(2 * w)
    if (back - x).abs().max() > 1e-3:
        raise Wrong(
            "black and white pixels don't come back: you pull 2x - 1 too far inside (-1, 1), a "
            "factor of 0.9999 or more is enough"
        )


@task("ex03_cw_objective")
def cw_objective(answer: Answer, draw: Draw) -> None:
    """Squared length plus c times the hinge of the margin."""
    n, c, kappa = 6, draw.number(0.5, 3), draw.number(0.5, 2)
    x, x_adv = draw.uniform(n, 1, 3, 3), draw.uniform(n, 1, 3, 3)
    logits, target = 3 * draw.normal(n, 4), draw.labels(n, 4)
    target[:2] = logits[:2].argmax(1)
    logits[0, target[0]] += 5  # far beyond kappa
    logits[1, target[1]] = torch.sort(logits[1]).values[-2] + kappa / 2  # ahead, not by kappa
    logits[2, target[2]] = logits[2].amin() - 1  # far behind
    squared = (x_adv - x).square().sum((1, 2, 3))
    rows = logits.tolist()
    lead = torch.tensor(
        [
            max(v for j, v in enumerate(row) if j != t) - row[t]
            for row, t in zip(rows, target.tolist(), strict=True)
        ]
    )
    right = squared + c * torch.maximum(lead, torch.tensor(-kappa))
    same(
        answer(x_adv, x, logits, target, c, kappa),
        right,
        "squared length plus c · max(largest other logit - target's logit, -kappa), image by image",
        {
            "square the length": squared.sqrt() + c * lead.clamp(min=-kappa),
            "the largest logit must leave out the target itself, else the hinge never gets below "
            "0": squared + c * lead.clamp(min=0),
            "the hinge ends at -kappa: the target must lead by kappa": squared
            + c * lead.clamp(min=kappa),
            "the hinge must stop at -kappa: a lead beyond it earns nothing": squared + c * lead,
            "c weighs the hinge, not the length": c * squared + lead.clamp(min=-kappa),
            "the sign of the margin is wrong: it must fall when the target's logit rises": squared
            + c * (-lead).clamp(min=-kappa),
            "one number for each image is asked for, (N,): add up pixels, not images": right.sum(),
            "the hinge is missing": squared,
        },
    )
