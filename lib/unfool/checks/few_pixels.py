"""Checks of exercise 04: JSMA's Jacobian, saliency and best pair; counting pixels."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from unfool.checks._tools import Answer, Draw, Wrong, pair, same, task, tensor


@task("ex04_jacobian")
def jacobian(answer: Answer, draw: Draw) -> None:
    """All derivatives of the logits by the pixels: for this network a product of matrices."""
    net, x = draw.classifier(1, 3, 3, classes=4), draw.uniform(1, 1, 3, 3)
    first, bias, last, _ = (p.detach() for p in net.parameters())
    with torch.no_grad():
        inner = torch.tanh(torch.mv(first, x.flatten()) + bias)
        exact = last @ torch.diag(1 - inner**2) @ first
        p = torch.softmax(net(x), 1)[0]
    got = answer(net, x)
    same(
        got,
        exact,
        "row k holds the gradient of logit k by the nine pixels, flattened",
        {
            "turn it round: a row for each class, a column for each pixel": exact.T,
            "these are derivatives of probabilities: JSMA asks the logits": torch.diag(p) @ exact
            - torch.outer(p, p @ exact),
            "every row holds the sum over all classes: take one logit at a time": exact.sum(
                0, keepdim=True
            ).expand(4, 9),
            "flatten each image-shaped gradient": exact.view(4, 1, 3, 3),
        },
    )


@task("ex04_saliency")
def saliency(answer: Answer, draw: Draw) -> None:
    """Target's gain times the others' loss, 0 where one of them is none."""
    j = draw.normal(4, 12)
    target = draw.whole(0, 3)
    others = [k for k in range(4) if k != target]
    alpha, beta = j[target], torch.stack([j[k] for k in others]).sum(0)
    useful = (alpha > 0) & (beta < 0)
    right = torch.where(useful, alpha * beta.abs(), 0.0)
    total = j.sum(0)
    reverse = torch.where((alpha < 0) & (beta > 0), alpha.abs() * beta, 0.0)
    same(
        answer(j, target),
        right,
        "alpha · |beta| where alpha > 0 and beta < 0, else 0",
        {
            "beta must leave out the target's own row": torch.where(
                (alpha > 0) & (total < 0), alpha * total.abs(), 0.0
            ),
            "pixels that help only in one of the two ways must get 0": alpha * beta.abs(),
            "pixels that help only in one of the two ways, or in none, must get 0": -alpha * beta,
            "these are the pixels to darken: alpha must be positive and beta negative": reverse,
            "the sign is wrong: take |beta|, so that useful pixels are positive": -right,
            "that is alpha alone: multiply by |beta|": torch.where(useful, alpha, 0.0),
        },
    )


@task("ex04_best_pair")
def best_pair(answer: Answer, draw: Draw) -> None:
    """The pair of pixels with the largest saliency, both factors positive."""
    while True:  # until every shortcut leads astray
        alpha, beta = draw.normal(7), draw.normal(7)
        scores = {
            (p, q): (float(alpha[p] + alpha[q]), float(-beta[p] - beta[q]))
            for p, q in combinations(range(7), 2)
        }
        fit = {k: a * b for k, (a, b) in scores.items() if a > 0 and b > 0}
        right = max(fit, key=lambda k: fit[k]) if fit else (0, 0)
        shortcuts = _shortcuts(alpha, beta, scores)
        if fit and len({right, (-1, -1), *shortcuts.values()}) == 6:
            break
    p, q = pair(answer(alpha, beta), "the places p < q of two pixels")
    same(tensor(torch.as_tensor(p), (), torch.int64), torch.tensor(int(p)), "")
    got = (int(p), int(q))
    if got == right[::-1]:
        raise Wrong("give the smaller place first: p < q")
    if got[0] == got[1]:
        raise Wrong("that is one pixel twice: p and q must differ")
    if got == shortcuts["both negative"]:
        raise Wrong(
            "both factors of that pair are negative, so their product is positive: demand "
            "that each "
            "is positive"
        )
    if got == shortcuts["two best"]:
        raise Wrong(
            "those are the two best single pixels: in a pair one may make up for the other's "
            "fault, "
            "so try all pairs"
        )
    if got == shortcuts["alpha"]:
        raise Wrong("you look at alpha alone: multiply by -(beta_p + beta_q)")
    if got == shortcuts["beta"]:
        raise Wrong("the sign of beta is wrong: the other classes must lose")
    if got != right:
        raise Wrong(
            f"you return {got}, and {right} is right: maximise (alpha_p + alpha_q) · "
            "(-(beta_p + beta_q)) over all pairs whose two factors are positive"
        )


def _shortcuts(
    alpha: Tensor, beta: Tensor, scores: dict[tuple[int, int], tuple[float, float]]
) -> dict[str, tuple[int, int]]:
    """The pairs that usual mistakes lead to."""
    single = (alpha * -beta).tolist()
    order = sorted(range(len(single)), key=lambda i: -single[i])
    negative = {k: a * b for k, (a, b) in scores.items() if a < 0 and b < 0}
    wrong_way = {k: -a * b for k, (a, b) in scores.items() if a > 0 and b < 0} or {(0, 0): 0.0}
    anyhow = {k: a * b for k, (a, b) in scores.items()}
    best = max(anyhow, key=lambda k: anyhow[k])
    return {
        "two best": (min(order[:2]), max(order[:2])),
        "both negative": best if best in negative else (-1, -1),
        "alpha": max(scores, key=lambda k: scores[k][0]),
        "beta": max(wrong_way, key=lambda k: wrong_way[k]),
    }


@task("ex04_count_pixels")
def count_pixels(answer: Answer, draw: Draw) -> None:
    """Changed pixels of each image; one of several channels counts once."""
    x = draw.uniform(4, 3, 5, 5)
    touched = draw.mask(4, 3, 5, 5, share=0.3)
    touched[0] = False
    touched[1, :, 0, 0] = True
    change = torch.where(touched, draw.uniform(4, 3, 5, 5, low=-0.5, high=0.5), 0.0)
    x_adv = x + change
    moved = x_adv != x
    counts = torch.tensor(
        [len({(r, c) for _, r, c in one.nonzero().tolist()}) for one in moved], dtype=torch.int64
    )
    same(
        answer(x, x_adv),
        counts,
        "a pixel counts if any of its channels changed, and it counts once",
        {
            "a pixel of three channels counts once: join the channels by any": moved.sum((1, 2, 3)),
            "a pixel counts if any of its channels changed, not only if all did": moved.all(1).sum(
                (1, 2)
            ),
            "count image by image, (N,)": counts.sum(),
            "that is how far pixels moved: count those that did": change.abs().sum((1, 2, 3)),
            "the counts are right, and int64 is asked for": counts.float(),
            "these are the pixels that stayed": 25 - counts,
        },
    )
