"""The Square attack: random squares, kept where the scores get worse. It never asks for a gradient.

What stops gradients does not stop it, so it tells a robust defence from one that hides.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._descent import ROUNDING, lead
from unfool.attacks._draws import generators, seeds_for, uniform
from unfool.attacks.sign import check_eps
from unfool.inputs import check_inputs, check_number, in_chunks
from unfool.progress import Progress

VERSION = 1

# After so many of 10,000 queries the squares' share of the image is halved: Andriushchenko et al.
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    queries: int = 5000,
    p_init: float = 0.8,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Square attack in L-infinity: a black box that answers with scores is all it needs.

    Andriushchenko et al. 2020. It starts from vertical stripes of ±eps. Then each query sets a
    square at a random place to x + eps or x - eps in every channel, and keeps it where the margin
    of the wrong class grows. The squares shrink on the authors' schedule, stretched to `queries`.
    A draw that would change nothing is turned round, as in the authors' first code, which on one
    channel saves half of the late queries. Explained in notebook 11.

    An image that is fooled leaves the batch; one that is misclassified already is not touched. One
    that holds out comes back with the largest margin found.

    Args:
        model: returns logits (N, classes); only the differences of scores matter.
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel, in units of the [0, 1] range.
        queries: forward passes per image, at least 1; one more comes first, on x. 5,000 is
            AutoAttack's number.
        p_init: the first squares' share of the image's area, above 0 up to 1.
        target: classes (N,), int64, not y: the error must be this one.
        generator: draws a seed for each image; by default one of seed 0.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], within eps of x, detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_eps(eps)
    check_number("queries", queries, 1, whole=True)
    check_number("p_init", p_init, 0, 1)
    if p_init == 0:
        raise ValueError("p_init must be > 0: squares of no area change nothing")
    seeds = seeds_for(x, generator)
    aim, sign = (y, -1) if target is None else (target, 1)

    @torch.no_grad()
    def attack(rows: slice) -> Tensor:
        search = _Search(model, x[rows].detach(), aim[rows], sign, eps, seeds[rows], queries)
        for query in range(1, queries):
            if not len(search.rows):
                break
            search.try_square(query, side_of(query, queries, p_init, x.shape[2:]))
        return search.result

    return in_chunks(attack, model, x, y, target, progress=progress, name="square")


class _Search:
    """A chunk under attack.

    Attributes:
        result: the image of each row with the largest margin so far, (N, C, H, W).
        rows: those that are not fooled yet, (n,); all below are theirs.
        low, high: the ends of the ball and of [0, 1] around their images.
        margin: by how much the wrong class leads in `result`, (n,).
        draws: in [-1, 1), (n, queries, 2 + C): place and signs of each square.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, eps: float, seeds: Tensor,
        queries: int,
    ) -> None:  # fmt: skip
        self.model, self.sign, self.aim = model, sign, aim
        self.low, self.high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        own = generators(seeds)
        stripes = uniform(own, (x.shape[1], 1, x.shape[3]), x)
        self.draws = uniform(own, (queries, 2 + x.shape[1]), x)
        self.result, self.rows = x.clone(), torch.arange(len(x), device=x.device)
        self.margin = self._margin(x)
        self._leave()
        if len(self.rows):
            kept = torch.where(stripes[self.rows] > 0, self.high, self.low)
            self.margin = self._margin(kept)
            self.result[self.rows] = kept
            self._leave()

    def try_square(self, query: int, side: int) -> None:
        """Spend a query on a square of this side, in pixels, for each image that is left."""
        draw, best = self.draws[:, query], self.result[self.rows]
        inside = torch.ones_like(best[:, :1], dtype=torch.bool)
        for axis, size in ((2, best.shape[2]), (3, best.shape[3])):
            places = size - side + 1
            first = ((draw[:, axis - 2] + 1) / 2 * places).long().clamp(max=places - 1)
            along = torch.arange(size, device=best.device)[None, :] - first[:, None]
            line = (along >= 0) & (along < side)
            inside = inside & (line[:, None, :, None] if axis == 2 else line[:, None, None, :])
        up = (draw[:, 2:] > 0)[:, :, None, None]
        tried = torch.where(inside, torch.where(up, self.high, self.low), best)
        idle = (tried == best).flatten(1).all(dim=1).view(-1, 1, 1, 1)
        turned = torch.where(inside, torch.where(up, self.low, self.high), best)
        tried = torch.where(idle, turned, tried)
        margin = self._margin(tried)
        better = margin > self.margin
        self.result[self.rows[better]] = tried[better]
        self.margin = torch.where(better, margin, self.margin)
        self._leave()

    def _margin(self, images: Tensor) -> Tensor:
        return self.sign * lead(self.model(images), self.aim)

    def _leave(self) -> None:
        """Drop the images that are fooled."""
        left = self.margin <= ROUNDING
        if left.all():
            return
        for name in ("rows", "aim", "low", "high", "margin", "draws"):
            setattr(self, name, getattr(self, name)[left])


def side_of(query: int, queries: int, p_init: float, shape: torch.Size | tuple[int, ...]) -> int:
    """Return the side of the squares of a query, in pixels; `shape` is the image's (H, W)."""
    halvings = sum(10_000 * query / queries > at for at in HALVED_AT)
    area = p_init / 2**halvings * shape[0] * shape[1]
    return max(1, min(round(math.sqrt(area)), *shape))
