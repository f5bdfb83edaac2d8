"""Checks of exercise 05: fewer bits, and what a threshold can and can't wash off."""

from __future__ import annotations

import torch

from unfool.checks._tools import Answer, Draw, same, task


@task("ex05_keep_bits")
def keep_bits(answer: Answer, draw: Draw) -> None:
    """The nearest of 2**bits evenly spaced levels."""
    bits = draw.whole(2, 4)
    levels = [k / (2**bits - 1) for k in range(2**bits)]
    x = draw.uniform(2, 1, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.0, 1.0
    steps = 2**bits - 1
    table = torch.tensor(levels)
    nearest = (x[..., None] - table).abs().argmin(-1)
    same(
        answer(x, bits),
        table[nearest],
        "scale by 2**bits - 1, round, scale back",
        {
            "white is no longer white: b bits have 2**b levels, and 2**b - 1 steps between": (
                x * 2**bits
            ).round()
            / 2**bits,
            "you cut off: take the nearest level": (x * steps).floor() / steps,
            "you round up: take the nearest level": (x * steps).ceil() / steps,
            "there are 2**bits levels, not `bits`": (x * bits).round() / bits,
            "scale back to [0, 1]": (x * steps).round(),
        },
    )


@task("ex05_can_flip")
def can_flip(answer: Answer, draw: Draw) -> None:
    """Pixels that some change within eps, inside [0, 1], carries across the threshold."""
    eps = draw.whole(6, 26) / 64  # a binary fraction: the border cases are exact
    x = draw.uniform(3, 1, 4, 4)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 0.5, 0.5 + eps])
    x[0, 0, 1] = torch.tensor([0.5 + eps / 2, 0.5 - eps / 2, 0.5 - eps, 1 - 0.1 * eps])
    rows = [(v > 0.5) != (w > 0.5) for v in x.flatten().tolist() for w in (v - eps, v + eps)]
    right = torch.tensor(rows).view(-1, 2).any(1).view_as(x)
    white = x > 0.5
    up, down = ~white & (x + eps > 0.5), white & (x - eps <= 0.5)
    same(
        answer(x, eps),
        right,
        "a dark pixel flips when x + eps is above 0.5, a white one (x > 0.5) when x - eps is not",
        {
            "you see only dark pixels turn white: white ones turn dark, too": up,
            "you see only white pixels turn dark: dark ones turn white, too": down,
            "these are the pixels that can't flip": ~right,
            "these are the pixels that are white after the change": x + eps > 0.5,
        },
    )


@task("ex05_safe_eps")
def safe_eps(answer: Answer, draw: Draw) -> None:
    """How far each image's nearest pixel is from the threshold."""
    x = draw.uniform(5, 1, 3, 3)
    x = torch.where(x > 0.5, 0.6 + 0.4 * x, 0.9 * x)
    rows = [min(abs(v - 0.5) for v in one.flatten().tolist()) for one in x]
    away = (x - 0.5).flatten(1).abs()
    same(
        answer(x),
        torch.tensor(rows),
        "the smallest distance of a pixel to 0.5, image by image",
        {
            "that is the farthest pixel: the nearest one flips first": away.amax(1),
            "the average does not count: the nearest pixel flips first": away.mean(1),
            "each image has a bound of its own, (N,)": away.min(),
            "take the distance, |x - 0.5|: dark pixels lie below": (x - 0.5).flatten(1).amin(1),
            "that is the distance to black: the border is 0.5": x.flatten(1).amin(1),
        },
    )


@task("ex05_pixels_needed")
def pixels_needed(answer: Answer, draw: Draw) -> None:
    """How many pixels a budget in L2 can carry across the threshold, the cheapest first."""
    x, budget = draw.uniform(12, 1, 4, 4), draw.whole(3, 4) / 8
    x[0] = 0.0
    x[0, 0, 2, 2] = 0.5 + budget  # one pixel that the budget just reaches
    counts = []
    for one in x:
        left, count = budget**2, 0
        for cost in sorted((v - 0.5) ** 2 for v in one.flatten().tolist()):
            left -= cost
            count += left >= 0
        counts.append(count)
    away = (x - 0.5).flatten(1).abs()
    cheap = away.sort(dim=1).values
    same(
        answer(x, budget),
        torch.tensor(counts),
        "sort the squared distances to 0.5, add them up, count how many sums fit into budget²",
        {
            "you add up distances: in L2 their squares add up": (cheap.cumsum(1) <= budget).sum(1),
            "the budget is a length: compare sums of squares with its square": (
                cheap.square().cumsum(1) <= budget
            ).sum(1),
            "you look at pixels one by one: together they share the budget": (away <= budget).sum(
                1
            ),
            "start with the pixels nearest to 0.5: they are the cheapest": (
                away.sort(dim=1, descending=True).values.square().cumsum(1) <= budget**2
            ).sum(1),
            "you take pixels in their order: the cheapest come first": (
                away.square().cumsum(1) <= budget**2
            ).sum(1),
            "count image by image, (N,)": torch.tensor(sum(counts)),
        },
    )
