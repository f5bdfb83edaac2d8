"""Checks of exercise 09: transfer matrices, a gradient for several models, one attack left out."""

from __future__ import annotations

import torch
from torch import Tensor

from unfool.checks._tools import Answer, Draw, pair, same, task


@task("ex09_transfer_matrix")
def transfer_matrix(answer: Answer, draw: Draw) -> None:
    """Of what fooled i and was there to fool for j: the share that fools j."""
    k, n = 3, 60
    clean = draw.mask(k, n, share=0.8)
    after = torch.stack([draw.mask(k, n, share=0.6) for _ in range(k)])
    for i in range(k):
        after[i, i] = draw.mask(n, share=0.3)
    right, naive, only_j, total = (torch.zeros(k, k) for _ in range(4))
    for i in range(k):
        for j in range(k):
            used = [p for p in range(n) if clean[i, p] and not after[i, i, p] and clean[j, p]]
            lost = [not bool(after[i, j, p]) for p in used]
            right[i, j] = sum(lost) / max(1, len(used))
            total[i, j] = sum(lost) / n
            hit = ~after[i, i] & clean[i]
            naive[i, j] = (~after[i, j])[hit].float().mean()
            only_j[i, j] = (~after[i, j])[clean[j]].float().mean()
    same(
        answer(clean, after),
        right,
        "of the images that fooled i (right when clean, wrong attacked) and that j reads "
        "rightly when "
        "clean: the share that j misreads; the diagonal is 1",
        {
            "rows are the classifiers that were attacked, columns those that look at the images": (
                right.T
            ),
            "images that j misreads even when clean were never there to be fooled: leave them "
            "out": (naive),
            "only images that did fool i can carry over: leave the others out": only_j,
            "divide by the images that could carry over, not by all": total,
            "that is the share that withstands: count what is misread": 1 - right,
        },
    )


@task("ex09_best_source")
def best_source(answer: Answer, draw: Draw) -> None:
    """The row that fools the others most, and the column that is fooled most."""
    while True:
        m = draw.uniform(4, 4)
        m.fill_diagonal_(0.0)
        away, by = (m.sum(1) / 3).argmax(), (m.sum(0) / 3).argmax()
        weakest = (m + 2 * torch.eye(4)).sum(1).argmin()
        m.fill_diagonal_(1.0)
        m[weakest, weakest] = 3.0  # so that a careless mean falls for the diagonal
        if len({int(away), int(by), int(weakest)}) == 3 and int(m.sum(1).argmax()) == weakest:
            break
    m[weakest, weakest] = 3.0
    source, victim = pair(answer(m), "(source, victim)")
    same(
        source,
        float(away),
        "the row with the largest mean outside the diagonal",
        {
            "the diagonal is an attack on itself, no transfer: leave it out": float(weakest),
            "rows are the attacked, columns those who look: the source is a row": float(by),
        },
    )
    same(
        victim,
        float(by),
        "the column with the largest mean outside the diagonal",
        {
            "the victim is a column: average over the sources": float(away),
            "the diagonal is an attack on itself, no transfer: leave it out": float(
                m.sum(0).argmax()
            ),
        },
    )


@task("ex09_ensemble_gradient")
def ensemble_gradient(answer: Answer, draw: Draw) -> None:
    """The gradient of the mean of several models' losses."""
    nets = [draw.classifier(1, 3, 3) for _ in range(3)]
    x, y = draw.uniform(4, 1, 3, 3), draw.labels(4, 4)
    rows = torch.arange(4)

    def slope(kind: str) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        zs = [net(leaf) for net in nets]
        logits = sum(zs[1:], zs[0]) / 3
        losses = [torch.logsumexp(z, 1) - z[rows, y] for z in zs]
        total = {
            "mean": torch.stack(losses).mean(0),
            "first": losses[0],
            "last": losses[-1],
            "logits": torch.logsumexp(logits, 1) - logits[rows, y],
        }[kind].mean()
        return torch.autograd.grad(total, leaf)[0]

    right = slope("mean")
    same(
        answer(nets, x, y),
        right,
        "the gradient of the mean over the models of cross_entropy(model(x), y)",
        {
            "that is the sum over the models: take the mean": 3 * right,
            "only one of the models counts: all do": slope("first"),
            "only the last of the models counts: all do": slope("last"),
            "you average logits, then take one loss: average the losses": slope("logits"),
            "that is the sign: the gradient is asked for": right.sign(),
            "that is the sum over the images: cross_entropy takes the mean": 4 * right,
        },
        tolerance=1e-5,
    )


@task("ex09_left_out")
def left_out(answer: Answer, draw: Draw) -> None:
    """What it costs, attack by attack, not to have seen the attack in training."""
    seen, without = draw.uniform(4, low=0.8), draw.uniform(4, 4, low=0.4)
    loss = torch.tensor([float(seen[i]) - float(without[i, i]) for i in range(4)])
    same(
        answer(seen, without),
        loss,
        "seen[i] - without[i, i], for each attack i",
        {
            "the sign is wrong: what was lost is positive": -loss,
            "row i was trained without attack i: look at its score on attack i only, the "
            "diagonal": (seen - without.mean(1)),
            "you average over the trainings: take the one that left this attack out": seen
            - without.mean(0),
            "that is the score of the one that left it out: how much less than `seen` is it?": (
                without.diag()
            ),
            "that is a share of what was seen: the difference is asked for": loss / seen,
        },
        tolerance=1e-5,
    )
