"""Checks of exercise 11: straight-through, averaged and estimated gradients, the worst case."""

from __future__ import annotations

import torch
from torch import Tensor

from unfool.checks._tools import Answer, Draw, Wrong, same, task


@task("ex11_straight_through")
def straight_through(answer: Answer, draw: Draw) -> None:
    """The washer's value forwards, the identity's gradient backwards."""
    weights = draw.normal(3, 1, 4, 4)
    washers = {
        "rounds": lambda images: (images * 7).round() / 7,
        "stretches": lambda images: (3 * images - 1).clamp(0, 1),
    }
    for wash in washers.values():
        x = draw.uniform(3, 1, 4, 4).requires_grad_(True)
        got = answer(wash, x)
        washed = wash(x.detach())
        same(
            got,
            washed,
            "the value must be exactly what the washer makes of x",
            {
                "the value is x itself: it must be what the washer makes of it": x.detach(),
                "the value is off by x: add what the washer changes, wash(x) - x, to x": washed
                + x.detach(),
                "the value is the washer's change alone: add x": washed - x.detach(),
            },
            tolerance=1e-5,
        )
        if not got.requires_grad:
            raise Wrong(
                "no gradient comes back to x: only what the washer changes, wash(x) - x, is to be "
                "cut off with detach()"
            )
        (slope,) = torch.autograd.grad((got * weights).sum(), x, allow_unused=True)
        if slope is None:
            raise Wrong("no gradient comes back to x: x itself must stay in the graph")
        (through,) = torch.autograd.grad((wash(x) * weights).sum() + 0 * x.sum(), x)
        same(
            slope,
            weights,
            "backwards it must look like the identity: the gradient arrives at x unchanged",
            {
                "that is the washer's own gradient, often 0: cut the washer out of the graph and "
                "put the identity in its place": through,
                "the washer's own gradient comes on top: detach what it makes": weights + through,
                "the gradient has the wrong sign": -weights,
            },
        )


@task("ex11_eot_gradient")
def eot_gradient(answer: Answer, draw: Draw) -> None:
    """The mean over draws of the gradient of a random loss."""
    draws = draw.whole(3, 6)
    x = draw.uniform(2, 1, 3, 3)
    weights = draw.normal(40, 2, 1, 3, 3)
    called: list[Tensor] = []

    def loss(images: Tensor) -> Tensor:
        called.append(images.detach().clone())
        return (weights[(len(called) - 1) % 40] * images.square()).sum()

    got = answer(loss, x, draws)
    if len(called) != draws:
        raise Wrong(f"the random loss must be asked `draws` = {draws} times, not {len(called)}")
    if any(not torch.equal(one, x) for one in called):
        raise Wrong("ask for the loss at x itself each time: the defence brings its own randomness")
    slopes = 2 * weights[:draws] * x
    right = slopes.mean(0)
    same(
        got,
        right,
        "add up the gradients of all draws and divide by their number",
        {
            "that is the sum: divide by the number of draws": slopes.sum(0),
            "that is the gradient of the last draw alone": slopes[-1],
            "that is the gradient of the first draw alone": slopes[0],
            "average gradients, not their signs": slopes.sign().mean(0),
            "the sign is wrong": -right,
        },
    )


@task("ex11_worst_case")
def worst_case(answer: Answer, draw: Draw) -> None:
    """Images that stay right under every attack."""
    attacks, n = 4, 60
    right = draw.mask(attacks, n, share=0.75)
    rows = [all(bool(right[a, i]) for a in range(attacks)) for i in range(n)]
    each = right.float().mean(1)
    same(
        answer(right),
        sum(rows) / n,
        "an image counts if it is right under all attacks",
        {
            "that is the worst attack's accuracy: another attack may fool the images that it "
            "spares, so decide image by image": float(each.min()),
            "that is the average over the attacks: the attacker chooses the best one": float(
                each.mean()
            ),
            "one attack that fails is not enough: all must fail": float(
                right.any(0).float().mean()
            ),
            "that is the attacker's share: count the images that stay right": 1 - sum(rows) / n,
            "that is the number of images: divide by all": float(sum(rows)),
        },
        tolerance=1e-6,
    )


@task("ex11_estimate_gradient")
def estimate_gradient(answer: Answer, draw: Draw) -> None:
    """Central differences along given directions, averaged: no gradient is asked for."""
    x, directions = draw.uniform(1, 3, 3), draw.normal(5, 1, 3, 3)
    delta = draw.number(0.05, 0.2)
    a, b = draw.normal(1, 3, 3), draw.normal(1, 3, 3)

    def score(image: Tensor) -> float:
        if image.shape != x.shape:
            raise ValueError(f"score takes one image {tuple(x.shape)}, not {tuple(image.shape)}")
        if image.requires_grad:
            raise ValueError("a black box gives no gradients")
        return float((a * image).sum() + (b * image).sum() ** 2 + 0.5)

    def differences(forward: bool = False) -> Tensor:
        total = torch.zeros_like(x)
        for u in directions:
            back = score(x) if forward else score(x - delta * u)
            total += (score(x + delta * u) - back) * u
        return total

    right = differences() / (2 * delta * 5)
    same(
        answer(score, x, directions, delta),
        right,
        "the mean over u of (score(x + delta u) - score(x - delta u)) / (2 delta) · u",
        {
            "the two points lie 2 delta apart: divide by that": 2 * right,
            "divide by 2 delta": right * 2 * delta,
            "take the mean over the directions, not the sum": 5 * right,
            "the sign is wrong: plus minus minus": -right,
            "that is a one-sided difference: also look at x - delta u": differences(True)
            / (delta * 5),
            "half of a one-sided difference: also look at x - delta u": differences(True)
            / (2 * delta * 5),
        },
        tolerance=1e-3,
    )
