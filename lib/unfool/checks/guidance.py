"""Checks of exercise 08: the classifier-guided loss, its KL spelling, and what it is worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unfool.checks._tools import Answer, Draw, Wrong, pair, same, task

CUT = "no gradient reaches the purified images: G learns through f, so don't cut there"


@task("ex08_guided_loss")
def guided_loss(answer: Answer, draw: Draw) -> None:
    """Cross-entropy to the class of the clean image, through a frozen classifier."""
    net = draw.classifier(1, 3, 3)
    f = nn.Sequential(*list(net), nn.Dropout(0.5)).train()
    clean = draw.uniform(6, 1, 3, 3)
    with torch.no_grad():
        wanted = net(clean).argmax(1)
    while True:  # until the purified images are read otherwise, some at least
        purified = draw.uniform(6, 1, 3, 3).requires_grad_(True)
        z = net(purified)
        if (z.argmax(1) != wanted).sum() >= 2:
            break
    rows = torch.logsumexp(z, 1) - z[torch.arange(6), wanted]
    (slope,) = torch.autograd.grad(rows.mean(), purified, retain_graph=True)
    got = answer(f, purified, clean, may_change=(0, 1))
    if f.training:
        raise Wrong("f is still in training mode, where dropout answers at random: call f.eval()")
    sure = torch.logsumexp(z, 1) - z.amax(1)
    other = net(clean).detach()
    same(
        got,
        float(rows.mean().detach()),
        "the mean cross-entropy of f(purified) against the class that f gives the clean image",
        {
            "that class is f's own answer to the purified image: ask f about the clean one": float(
                sure.mean().detach()
            ),
            "purified and clean are swapped: the logits are those of the purified image": float(
                (torch.logsumexp(other, 1) - other.gather(1, z.argmax(1)[:, None])[:, 0]).mean()
            ),
            "take the mean over the images, not the sum": float(rows.sum().detach()),
        },
    )
    if not isinstance(got, Tensor) or not got.requires_grad:
        raise Wrong(
            "no gradient reaches the purified images: G learns through f, so don't cut there"
        )
    got.backward()
    if any(p.grad is not None for p in f.parameters()):
        raise Wrong(
            "f's weights got a gradient: freeze them with f.requires_grad_(False), only G learns"
        )
    if purified.grad is None:
        raise Wrong(
            "no gradient reaches the purified images: G learns through f, so don't cut there"
        )
    same(purified.grad, slope, "this is not the gradient of that loss")


@task("ex08_kl_guide")
def kl_guide(answer: Answer, draw: Draw) -> None:
    """Divergence of the purified image's probabilities from the clean one's."""
    made, clean = 2 * draw.normal(5, 4), 2 * draw.normal(5, 4)

    def divergence(one: Tensor, other: Tensor) -> float:
        total = 0.0
        for a, b in zip(
            one.double().softmax(1).tolist(), other.double().softmax(1).tolist(), strict=True
        ):
            total += sum(p * math.log(p / q) for p, q in zip(a, b, strict=True))
        return total

    right = divergence(clean, made) / 5
    p, q = clean.softmax(1), made.softmax(1)
    same(
        answer(made, clean),
        right,
        "for each image add up p · log(p / q) over the classes, p of the clean and q of the "
        "purified "
        "image; then the mean over the images",
        {
            "the two are swapped: p belongs to the clean image": divergence(made, clean) / 5,
            "add up over the classes, take the mean over the images only": right / 4,
            "take the mean over the images, not the sum": right * 5,
            "that is the cross-entropy: subtract the entropy of p, so that equal ones give "
            "0": float(-(p * q.log()).sum(1).mean()),
            "p and q are probabilities: softmax first": float(
                (clean * (clean - made)).sum(1).mean()
            ),
            "the sign is wrong: a divergence is 0 or more": -right,
        },
    )


@task("ex08_looks_clean")
def looks_clean(answer: Answer, draw: Draw) -> None:
    """Images near the clean ones in mean L1, and still misread."""
    n, near = 12, draw.whole(5, 9) / 64
    clean = draw.uniform(n, 3, 4, 4)
    sizes = torch.tensor([0.3, 0.7, 1.4, 2.0]).repeat(3)[:, None, None, None] * near
    spread = draw.uniform(n, 3, 4, 4, low=0.5, high=1.5)
    spread = spread / spread.mean((1, 2, 3), keepdim=True) * sizes
    purified = clean + torch.where(draw.mask(n, 3, 4, 4), spread, -spread)
    clean[4], purified[4] = 0.5, 0.5 + near  # just near enough
    y, read = draw.labels(n, 5), draw.labels(n, 5)
    read[:4], read[4:8] = y[:4], (y[4:8] + 1) % 5
    distance = (purified - clean).abs()
    mean = distance.flatten(1).mean(1)
    same(
        answer(purified, clean, read, y, near),
        torch.tensor(
            [float(m) <= near and int(a) != int(b) for m, a, b in zip(mean, read, y, strict=True)]
        ),
        "both must hold: the mean of |purified - clean| of that image is at most `near`, and it is "
        "misread",
        {
            "these look clean and are read rightly": (mean <= near) & (read == y),
            "both must hold: you ask for one of the two": (mean <= near) | (read != y),
            "these are misread and look far from clean": (mean > near) & (read != y),
            "take the mean over the pixels of an image, not its largest difference": (
                distance.flatten(1).amax(1) <= near
            )
            & (read != y),
            "take absolute differences: others cancel": (
                (purified - clean).flatten(1).mean(1) <= near
            )
            & (read != y),
            "each image has a distance of its own": (distance.mean() <= near) & (read != y),
        },
    )


@task("ex08_carried_over")
def carried_over(answer: Answer, draw: Draw) -> None:
    """What the guide gains before its own classifier, and the share of it before another."""
    n = 80
    while True:
        shares = (0.5, 0.85, 0.55, 0.7)
        plain, guided, plain_b, guided_b = (draw.mask(n, share=p) for p in shares)
        counts = [int(m.sum()) for m in (plain, guided, plain_b, guided_b)]
        gain, gain_b = counts[1] - counts[0], counts[3] - counts[2]
        if gain > 5 and gain_b > 2 and gain != gain_b:
            break
    own, kept = pair(answer(plain, guided, plain_b, guided_b), "(gain, kept)")
    same(
        own,
        gain / n,
        "accuracy with the guide minus accuracy without, before its own classifier",
        {
            "the sign is wrong: with the guide minus without": -gain / n,
            "these are per cent: a share is asked for": 100 * gain / n,
            "that is a number of images: divide by all": gain,
            "that is the quotient of two accuracies: a gain is a difference": counts[1] / counts[0],
        },
    )
    same(
        kept,
        gain_b / gain,
        "divide the gain before the other classifier by the gain before its own",
        {
            "that is the other gain: divide it by the first": gain_b / n,
            "the quotient is upside down": gain / gain_b,
            "you divide accuracies: gains are to be divided": counts[3] / counts[1],
            "that is the difference of the gains: divide them": (gain - gain_b) / n,
        },
    )
