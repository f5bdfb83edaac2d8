"""Checks of exercise 10: MagNet's detector, what it counts, Defense-GAN's choice of a restart."""

from __future__ import annotations

import torch

from unfool.checks._tools import Answer, Draw, pair, same, task


@task("ex10_reconstruction_error")
def reconstruction_error(answer: Answer, draw: Draw) -> None:
    """Mean of |x - made| to the power p, image by image."""
    p = draw.whole(1, 2)
    x, made = draw.uniform(4, 3, 3, 3), draw.uniform(4, 3, 3, 3)
    gap = (x - made).abs().flatten(1)
    rows = [sum(v**p for v in one) / len(one) for one in gap.tolist()]
    right = torch.tensor(rows)
    hints = {
        "take the mean over the pixels, not the sum": right * 27,
        "each image has an error of its own, (N,)": right.mean(),
        "take absolute differences: others cancel": (x - made).flatten(1).mean(1),
        "leave the root out: MagNet compares means of powers": right ** (1 / p) + (p == 1),
        "the power is p, not always 1": gap.mean(1) + (p == 1),
        "the power is p, not always 2": gap.square().mean(1) + (p == 2),
        "take the mean over the pixels, not the largest": gap.amax(1) ** p,
    }
    same(answer(x, made, p), right, "the mean over all pixels of |x - made| ** p", hints)
    if p == 1:  # a fixed power is right half of the time: ask the other half, too
        same(answer(x, made, 2), gap.square().mean(1), "the power is p, not always 1")
    else:
        same(answer(x, made, 1), gap.mean(1), "the power is p, not always 2")


@task("ex10_threshold")
def threshold(answer: Answer, draw: Draw) -> None:
    """The smallest clean score above which at most a share `rate` of the clean scores lies."""
    n = draw.whole(30, 60)
    k = draw.whole(2, 6)
    rate = (k + 0.4) / n
    scores = 5 * draw.uniform(n)
    order = sorted(scores.tolist())
    right = order[n - 1 - k]
    cut = torch.tensor(order)
    same(
        answer(scores, rate),
        right,
        "sort the clean scores; the int(rate * n) largest may lie above the threshold",
        {
            "you cut at the small scores: attacked images have large ones": order[k],
            "that lets one more clean image be rejected than the rate allows": order[n - 2 - k],
            "that rejects one clean image less than the rate allows": order[n - k],
            "that is the largest clean score: it rejects nobody, and the rate allows some": order[
                -1
            ],
            "you interpolate between two scores: return one of them": float(
                torch.quantile(cut, 1 - rate)
            ),
            "that is a share: a score is asked for": 1 - rate,
            "that rejects the share 1 - rate: mind the side": order[int(rate * n) - 1],
        },
        tolerance=1e-6,
    )


@task("ex10_two_scores")
def two_scores(answer: Answer, draw: Draw) -> None:
    """MagNet's count, where a rejection is a success, and the strict one."""
    n = 70
    rejected, right = draw.mask(n, share=0.3), draw.mask(n, share=0.6)
    rows = list(zip(rejected.tolist(), right.tolist(), strict=True))
    generous, strict = pair(answer(rejected, right), "(generous, strict)")
    either, both = sum(r or g for r, g in rows) / n, sum(g and not r for r, g in rows) / n
    alone = sum(g for _, g in rows) / n
    accepted = sum(g and not r for r, g in rows) / sum(not r for r, _ in rows)
    names = {
        "rejected images count as a success here, whatever they are read as": alone,
        "the two are in the wrong order: (generous, strict)": both,
        "an image counts once: rejected or right": sum(r + g for r, g in rows) / n,
        "that is the share of rejected images": sum(r for r, _ in rows) / n,
    }
    same(generous, either, "the share of images that are rejected or read rightly", names, 1e-6)
    names = {
        "a rejected image answers nothing: it must also be accepted": alone,
        "divide by all images, not by the accepted ones": accepted,
        "the two are in the wrong order: (generous, strict)": either,
        "that counts the rejected ones among those read rightly": alone - both,
    }
    same(strict, both, "the share of images that are accepted and read rightly", names, 1e-6)


@task("ex10_best_restart")
def best_restart(answer: Answer, draw: Draw) -> None:
    """For each image the restart whose result is nearest to it."""
    x, made = draw.uniform(5, 1, 3, 3), draw.uniform(4, 5, 1, 3, 3)
    errors = torch.tensor([[float(((m - x[i]) ** 2).mean()) for m in made[:, i]] for i in range(5)])
    best, worst = errors.min(1).indices.tolist(), errors.max(1).indices.tolist()
    rows = list(range(5))
    overall = int(errors.sum(0).argmin())
    signed = (made - x).flatten(2).mean(2).argmin(0)
    same(
        answer(x, made),
        torch.stack([made[r, i] for i, r in enumerate(best)]),
        "compute the mean squared error of each restart and image, (R, N), and take the smallest "
        "over R for each image",
        {
            "each image chooses its own restart": made[overall],
            "that is the restart farthest from the image": made[worst, rows],
            "averaging restarts gives an image that the generator never made": made.mean(0),
            "that is always the first restart": made[0],
            "square the differences: others cancel": made[signed, rows],
            "that is the image itself: the generator's answer is asked for": x,
        },
    )
