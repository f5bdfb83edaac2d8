"""Checks of exercise 01: confidence, cross-entropy, a table of confusions, Wilson's interval."""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq

from unfool.checks._tools import Answer, Draw, pair, same, task


@task("ex01_confidence")
def confidence(answer: Answer, draw: Draw) -> None:
    """The largest softmax value, also where exp overflows."""
    logits = 3 * draw.normal(6, 5)
    logits[:2] += 500
    kept = logits.double() - logits.double().amax(1, keepdim=True)
    exact = (1 / kept.exp().sum(1)).float()
    over = torch.softmax(logits, dim=0).amax(1)
    same(
        answer(logits),
        exact,
        "divide exp of the largest logit by the sum of exp over the classes",
        {
            "that is the largest logit: the softmax turns logits into shares": logits.amax(1),
            "your softmax runs over the batch: it must run over the classes, dim=1": over,
            "that is the sigmoid of the largest logit: classes compete, so divide by the sum of "
            "all exp": torch.sigmoid(logits.amax(1)),
            "that is the class, the position of the largest: its share is asked for": logits.argmax(
                1
            ),
            "that is the smallest share: the largest is asked for": torch.softmax(logits, 1).amin(
                1
            ),
        },
    )


@task("ex01_cross_entropy")
def cross_entropy(answer: Answer, draw: Draw) -> None:
    """Minus the logarithm of the true class's share, image by image."""
    logits, y = 2 * draw.normal(6, 4), draw.labels(6, 4)
    rows = [
        math.log(sum(math.exp(v) for v in row)) - row[k]
        for row, k in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    loss = torch.tensor(rows)
    best = torch.logsumexp(logits, 1) - logits.amax(1)
    same(
        answer(logits, y),
        loss,
        "take the softmax's share of the true class y, its logarithm, and a minus",
        {
            "the sign is wrong: a loss is 0 at best and positive otherwise": -loss,
            "one number for each image is asked for, (N,): leave out the mean": loss.mean(),
            "one number for each image is asked for, (N,): leave out the sum": loss.sum(),
            "you look at the predicted class: the loss is about the true class y": best,
            "you forgot the logarithm": (-loss).exp(),
            "that is minus the logit of y: subtract the logarithm of the sum of exp": (
                -logits[torch.arange(6), y]
            ),
        },
    )


@task("ex01_confusion")
def confusion(answer: Answer, draw: Draw) -> None:
    """How often each class is read as each class, rows true."""
    n, classes = 40, draw.whole(3, 5)
    y, read = draw.labels(n, classes), draw.labels(n, classes)
    y[:4], read[:4] = 0, 1
    y[4], read[4] = 1, 0
    rows = [[0] * classes for _ in range(classes)]
    for a, b in zip(y.tolist(), read.tolist(), strict=True):
        rows[a][b] += 1
    table = torch.tensor(rows)
    same(
        answer(y, read, classes),
        table,
        "entry [a, b] counts the images of true class a that are read as b",
        {
            "the table is turned round: rows are the true classes": table.T,
            "every entry is 0 or 1: `table[y, read] += 1` counts an index once, however often it "
            "comes": (table > 0).long(),
            "these are shares: counts are asked for": table / table.sum(1, keepdim=True),
            "these are shares: counts are asked for, whole numbers": table / n,
            "the counts are right, and int64 is asked for": table.float(),
            "only the right answers are counted": torch.diag(table.diag()),
        },
    )


@task("ex01_wilson")
def wilson(answer: Answer, draw: Draw) -> None:
    """Where a share p is 1.96 of its own standard errors from the one observed."""
    n = draw.whole(12, 40)
    right = draw.whole(n // 2 + 1, n - 2)
    share, z = right / n, 1.959964

    def off(p: float) -> float:
        return (share - p) ** 2 - z * z * p * (1 - p) / n

    exact = brentq(off, 0, share), brentq(off, share, 1)
    low, high = pair(answer(right, n), "(low, high)")
    wald = z * math.sqrt(share * (1 - share) / n)
    middle, width = (share + z * z / (2 * n)) / (1 + z * z / n), (exact[1] - exact[0]) / 2
    simple = "that is share ± 1.96 standard errors, which fails near 0 and 1: use Wilson's formula"
    where = "check each term of Wilson's formula against the text"
    same(
        low,
        exact[0],
        where,
        {
            simple: share - wald,
            "the first of the two is the lower end": exact[1],
            "these are per cent: a share between 0 and 1 is asked for": 100 * exact[0],
            "the interval sits around the share itself: Wilson's middle is drawn towards 1/2": (
                share - width
            ),
            "you divide only the middle by 1 + z²/n: the half width, too": (
                middle - width * (1 + z * z / n)
            ),
        },
        tolerance=3e-5,
    )
    same(high, exact[1], where, {simple: share + wald}, tolerance=3e-5)
