"""Checks of exercise 12: McNemar, Holm, signs of masking, a planted evaluation, a leaking batch."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from unfool.checks._tools import Answer, Draw, Wrong, same, task


@task("ex12_mcnemar")
def mcnemar(answer: Answer, draw: Draw) -> None:
    """Twice the smaller tail of fair coins, over the images on which the two differ."""
    n = 60
    while True:
        a, b = draw.mask(n, share=0.7), draw.mask(n, share=0.6)
        only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
        if 2 < only_a != only_b > 2:
            break
    m, least = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(m, k) for k in range(least + 1)) / 2**m
    one_less = sum(comb(m, k) for k in range(least)) / 2**m
    all_right = sum(comb(n, k) for k in range(least + 1)) / 2**n
    same(
        answer(a, b),
        min(1.0, 2 * tail),
        "of the images on which just one is right, count the smaller side; p is twice the "
        "chance that "
        "a fair coin falls so seldom on that side",
        {
            "that is one side of the test: double it": tail,
            "count also the case that happened: at most so few": 2 * one_less,
            "only images on which the two differ count": 2 * all_right,
            "that is the chance of exactly this count: add up all that are as extreme": 2
            * comb(m, least)
            / 2**m,
            "that is the other tail: 1 minus p": 1 - min(1.0, 2 * tail),
        },
        tolerance=1e-6,
    )
    same(answer(a, a), 1.0, "two defences that never differ give p = 1")
    one, other = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    where = "where both sides are equally large the two tails overlap: a p-value is at most 1"
    same(answer(one, other), 1.0, where)


@task("ex12_holm")
def holm(answer: Answer, draw: Draw) -> None:
    """The smallest times m, the next times m - 1, never falling, at most 1."""
    m = 6
    p = [0.004, 0.0045, 0.011, 0.02, 0.7, 0.8]  # some fall, some exceed 1
    scale = float(draw.uniform(1, low=0.8, high=1.2))
    order = torch.randperm(m, generator=draw.generator).tolist()
    p = [scale * p[i] for i in order]
    ranks = sorted(range(m), key=lambda i: p[i])
    right = [
        min(1.0, max((m - r) * p[ranks[r]] for r in range(ranks.index(i) + 1))) for i in range(m)
    ]
    falling = [min(1.0, (m - ranks.index(i)) * p[i]) for i in range(m)]
    uncapped = [max((m - r) * p[ranks[r]] for r in range(ranks.index(i) + 1)) for i in range(m)]
    got = answer(p)
    if isinstance(got, Tensor):
        got = got.tolist()
    if not isinstance(got, list | tuple) or len(got) != m:
        raise Wrong("return a list with one corrected p-value for each that was given")
    same(
        torch.tensor([float(v) for v in got]),
        torch.tensor(right),
        "sort, multiply the smallest by m, the next by m - 1, …; none may be smaller than the one "
        "before; at most 1; back in the order given",
        {
            "that is Bonferroni's, which multiplies all by m: the next factor is m - "
            "1": torch.tensor([min(1.0, m * v) for v in p]),
            "give them back in the order that they came in": torch.tensor(sorted(right)),
            "a corrected value may not be smaller than one whose p was smaller: carry the largest "
            "so far": torch.tensor(falling),
            "a p-value is at most 1": torch.tensor(uncapped),
            "the smallest p gets the largest factor": torch.tensor(
                [min(1.0, (ranks.index(i) + 1) * p[i]) for i in range(m)]
            ),
            "that is Benjamini and Hochberg's q, which promises less": torch.tensor(
                [
                    min(1.0, min(m / (r + 1) * p[ranks[r]] for r in range(ranks.index(i), m)))
                    for i in range(m)
                ]
            ),
        },
        tolerance=1e-6,
    )


SIGNS = {
    "one step beats many": lambda r: r["one step"] > r["many steps"],
    "black box beats white box": lambda r: r["black box"] > r["white box"],
    "noise does as well": lambda r: r["noise"] >= r["white box"],
    "without a limit some survive": lambda r: r["unbounded"] < 1,
}


@task("ex12_masking_signs")
def masking_signs(answer: Answer, draw: Draw) -> None:
    """Which of four signs of a masked gradient a set of success rates shows."""
    sound = {
        "noise": 0.05, "one step": 0.4, "many steps": 0.7, "black box": 0.5, "white box": 0.8,
        "unbounded": 1.0,
    }  # fmt: skip
    faults: dict[str, dict[str, float]] = {
        "one step beats many": {"one step": 0.75},
        "black box beats white box": {"black box": 0.85},
        "noise does as well": {"noise": 0.8},
        "without a limit some survive": {"unbounded": 0.96},
    }
    chosen = [sign for sign in faults if draw.whole(0, 1)]
    cases = [[], *([sign] for sign in faults), chosen]
    for signs in cases:
        rates = dict(sound)
        for sign in signs:
            rates |= faults[sign]
        right = {sign for sign, shows in SIGNS.items() if shows(rates)}
        _same_set(answer(rates), right, set(SIGNS), str(rates))
    even = sound | {"one step": 0.7, "black box": 0.8}
    _same_set(answer(even), set(), set(SIGNS), f"equal rates are no sign: {even}")


FLAWS = ("budget", "range", "selection", "success")


@task("ex12_find_flaws")
def find_flaws(answer: Answer, draw: Draw) -> None:
    """Which of four flaws was planted in an evaluation."""
    planted = {flaw for flaw in FLAWS if draw.whole(0, 1)}
    for flaws in (set(), *({flaw} for flaw in FLAWS), planted):
        for below in (0, 1):
            got = answer(_evaluation(draw, flaws, below))
            _same_set(got, flaws, set(FLAWS), "look at the largest and the smallest values")


def _evaluation(draw: Draw, flaws: set[str], below: int = 0) -> dict[str, Any]:
    """An evaluation of 12 images, right but for the flaws that are asked for.

    With the flaw "range" a pixel is above 1, or below 0 where `below` is 1.
    """
    n, eps = 12, draw.number(0.1, 0.2)
    x = draw.uniform(n, 1, 3, 3, low=0.3, high=0.7)
    x[:, :, 0, 0], x[:, :, 0, 1] = 1.0, 0.0
    change = draw.uniform(n, 1, 3, 3, low=-eps, high=eps)
    change[:, :, 0, :2] = 0.0  # black and white pixels that stay so
    change[1, 0, 1, 1] = eps + 5e-5  # within what rounding may add
    y = draw.labels(n, 5)
    clean = y.clone()
    clean[:3] = (y[:3] + 1) % 5  # misread from the start
    attacked = clean.clone()
    attacked[3:9] = (y[3:9] + 2) % 5  # fooled
    success = (clean == y) & (attacked != y)
    if "budget" in flaws:
        change[5, 0, 1, 1] = (eps + 0.05) * (1 if draw.whole(0, 1) else -1)
    if "range" in flaws:
        change[7, 0, 0, below] = 0.9 * eps * (1 - 2 * below)
    if "selection" in flaws:
        success[0] = True
    if "success" in flaws:
        success[10] = True
    return {
        "x": x, "x_adv": x + change, "y": y, "eps": eps,
        "clean": clean, "attacked": attacked, "success": success,
    }  # fmt: skip


def _same_set(got: Any, right: set[str], names: set[str], where: str) -> None:
    if not isinstance(got, set | list | tuple | frozenset):
        raise Wrong(f"return a set of names, not a {type(got).__name__}")
    found = set(got)
    if found - names:
        raise Wrong(
            f"unknown name {sorted(map(str, found - names))[0]!r}: use the names of the text"
        )
    if right - found:
        raise Wrong(f"you overlook {sorted(right - found)[0]!r} ({where})")
    if found - right:
        raise Wrong(f"a false alarm: {sorted(found - right)[0]!r} ({where})")


@task("ex12_leaks_batch")
def leaks_batch(answer: Answer, draw: Draw) -> None:
    """Whether a model's answer to an image depends on the images beside it."""
    x = draw.uniform(6, 1, 3, 3)
    net = draw.classifier(1, 3, 3)
    by_itself = "this model looks at each image by itself: compare answers up to rounding errors"
    cases: list[tuple[nn.Module, bool, str]] = [
        (net, False, by_itself),
        (_Beside(net, lambda x: x - x.mean((1, 2, 3), keepdim=True)), False, by_itself),
        (
            _Beside(lambda x: net(x) * (1 if len(x) > 1 else -1)),
            True,
            "compare an image's answer alone with its answer among the others",
        ),
        (
            _Beside(net, lambda x: x - 0.02 * x.mean()),
            True,
            "this model's classes stay the same and its logits don't: compare logits",
        ),
        (
            _Beside(net, lambda x: torch.cat([x[:1] + x[1:].sum(0) / 5, x[1:]])),
            True,
            "in this model only the first image changes with its neighbours: compare every image",
        ),
        (
            _Beside(lambda x: net(x) + 0.01 * len(x)),
            True,
            "in this model all logits rise with the batch: take the absolute difference",
        ),
    ]
    for model, leaks, why in cases:
        got = answer(model, x)
        if not isinstance(got, bool) and not (isinstance(got, Tensor) and got.dtype == torch.bool):
            raise Wrong(f"return True or False, not {type(got).__name__}")
        if bool(got) != leaks:
            raise Wrong(f"you say {bool(got)}, and {leaks} is right: {why}")


class _Beside(nn.Module):
    """A function of a batch, after another one, as a module."""

    def __init__(
        self, last: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.steps = [step for step in (first, last) if step is not None]

    def forward(self, images: Tensor) -> Tensor:
        for step in self.steps:
            images = step(images)
        return images
