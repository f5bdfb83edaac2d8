"""Carlini and Wagner's L2 attack: descent to the nearest image of another class.

Each image has its own search over c, its own Adam and its own early end, so that its result does
not depend on the images beside it, and none waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._descent import ROUNDING, Descent
from unfool.attacks._pool import rightly_classified, step_while_any
from unfool.attacks._schedule import bisect_c, schedule_of
from unfool.inputs import attacked, check_inputs, check_number, warn_of_rounding
from unfool.progress import Progress

VERSION = 2
CHECKS = 10  # how often a descent is asked whether it still gets anywhere
GAIN = 0.9999  # it does where the objective has fallen below this share of its last value
TELL_EVERY = 10  # steps between two calls of progress


@dataclass(frozen=True)
class Schedule:
    """From where and how long to look.

    Attributes:
        searches: how many values of c each image tries: ten times the last one until one succeeds,
            from then on the middle between the largest that failed and the smallest that did not.
        steps: Adam's steps per value of c; fewer where the objective stops falling.
        lr: Adam's learning rate, in units of w.
        c: the first value of c.
        squeeze: w starts at atanh(squeeze (2x - 1)), which is finite for black and white, too.
        warm_start: begin each descent at the best image found so far (at the last one seen while
            there is none), not at x.
    """

    searches: int
    steps: int
    lr: float
    c: float
    squeeze: float
    warm_start: bool


PRESETS: dict[str, Schedule] = {
    "original": Schedule(9, 10_000, 0.01, 1e-3, squeeze=0.999999, warm_start=False),
    "fast": Schedule(5, 200, 0.05, 1e-2, squeeze=0.999, warm_start=True),
}


def carlini_wagner_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    kappa: float = 0.0,
    preset: Literal["original", "fast"] = "fast",
    searches: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    c: float | None = None,
    warm_start: bool | None = None,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Carlini and Wagner's L2 attack: the least change that makes the classifier err by kappa.

    Carlini and Wagner 2017, section V-D; the paper's equations 3 and 4. The image is
    x' = (tanh(w) + 1) / 2, so that it lies in [0, 1] whatever w is, and Adam minimises

        |x' - x|^2 + c max(-margin(x'), -kappa)

    over w, where the margin is Z_t - max_{i != t} Z_i for a target t and max_{i != y} Z_i - Z_y
    without one. c, the price of the wrong class, is searched for: the smallest that succeeds gives
    the nearest image. Of all images seen on the way the nearest with margin > kappa is returned.
    Explained in notebook 03.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        kappa: how far the wrong logit must lie above the others, >= 0, in units of the logits;
            0 as in the paper.
        preset: "original", the schedule of Carlini's code: 9 searches of at most 10,000 steps, lr
            0.01, c from 0.001, each descent from x; or "fast": 5 of at most 200, lr 0.05, c from
            0.01, each descent from the best image so far, and a start less flat (`squeeze`).
        searches, steps, lr, c, warm_start: override the preset's; see `Schedule`.
        target: classes (N,), int64, not y: the error must be this one.
        generator: unused, nothing is drawn; part of every attack's interface.
        progress: called with steps done (those spared by an early end count as done), their
            largest possible number, and how many images are fooled.

    Returns:
        Images like `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_number("kappa", kappa, 0)
    schedule = schedule_of(
        PRESETS, preset, searches=searches, steps=steps, lr=lr, c=c, warm_start=warm_start
    )
    with attacked(model) as seen:
        live = rightly_classified(model, x, y, target)
        aim, sign = (y, -1) if target is None else (target, 1)
        search = Search(model, x, aim, sign, live, kappa, schedule, progress)
        step_while_any(search.step, live)
    warn_of_rounding(seen, x, search.best)
    return search.best


class Search(Descent):
    """A descent for each c that is tried.

    Attributes, beside those of a descent:
        searches: how many are done, (N,) int64.
        c, low, high: the price under trial, the largest that failed, the smallest that did not.
        hit: has this c succeeded? (N,) bool.
        lowest, mark: the lowest objective of this descent, now and when it was last checked.
        best_l2: the squared distance of the best image, infinite while there is none.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, live: Tensor, kappa: float,
        schedule: Schedule, progress: Progress | None,
    ) -> None:  # fmt: skip
        super().__init__(model, x, aim, sign, live, kappa, schedule.lr, schedule.squeeze, progress)
        self.schedule = schedule
        self.searches = torch.zeros_like(self.steps)
        self.c = torch.full((len(x),), schedule.c, dtype=x.dtype, device=x.device)
        self.low = torch.zeros_like(self.c)
        self.high, self.best_l2, self.lowest, self.mark = (
            torch.full_like(self.c, torch.inf) for _ in range(4)
        )
        self.hit = torch.zeros_like(live)
        self.turn = 0
        self.tell()

    def step(self, rows: Tensor) -> None:
        """Take one step of Adam for the images `rows`; go on to the next c where one is done."""
        w = self.w[rows].requires_grad_(True)
        with torch.enable_grad():
            images = (w.tanh() + 1) / 2
            margin = self.margin(images, rows)
            l2, loss = objective(images, self.x[rows], margin, self.c[rows], self.kappa)
            (gradient,) = torch.autograd.grad(loss.sum(), w)
        self.keep(rows, images.detach(), l2.detach(), margin.detach())
        stuck = self.is_stuck(rows, loss.detach())
        self.descend(rows, gradient)
        done = rows[stuck | (self.steps[rows] >= self.schedule.steps)]
        self.next_c(done)
        self.turn += 1
        if self.turn % TELL_EVERY == 0 or len(done):
            self.tell()

    def keep(self, rows: Tensor, images: Tensor, l2: Tensor, margin: Tensor) -> None:
        """Remember the images that fool the model and lie nearer than all before."""
        fools = margin > self.kappa + ROUNDING
        self.hit[rows] |= fools
        nearer = fools & (l2 < self.best_l2[rows])
        self.best[rows[nearer]], self.best_l2[rows[nearer]] = images[nearer], l2[nearer]

    def is_stuck(self, rows: Tensor, loss: Tensor) -> Tensor:
        """Return which descents have gained nothing in the last tenth of their steps.

        Carlini's code compares the objective, summed over the batch, at two moments. That of one
        image swings, and would often end a good descent: so its lowest value counts.
        """
        self.lowest[rows] = lowest = torch.minimum(self.lowest[rows], loss)
        due = self.steps[rows] % -(-self.schedule.steps // CHECKS) == 0
        stuck = due & ~(lowest <= GAIN * self.mark[rows])  # NaN is stuck, too
        self.mark[rows[due]] = lowest[due]
        return stuck

    def next_c(self, rows: Tensor) -> None:
        """End the descents of these images and set up their next ones, with Adam at rest."""
        self.c[rows], self.low[rows], self.high[rows] = bisect_c(
            self.hit[rows], self.c[rows], self.low[rows], self.high[rows]
        )
        self.w[rows] = self.restart(rows)
        self.rest(rows)
        self.hit[rows], self.lowest[rows], self.mark[rows] = False, torch.inf, torch.inf
        self.searches[rows] += 1
        self.live[rows] = self.searches[rows] < self.schedule.searches

    def restart(self, rows: Tensor) -> Tensor:
        """Return the w at which the next descent of these images begins."""
        start = self.to_w(self.best[rows] if self.schedule.warm_start else self.x[rows])
        lost = self.best_l2[rows].isinf() & self.schedule.warm_start
        return torch.where(lost.view(-1, 1, 1, 1), self.w[rows], start)

    def tell(self) -> None:
        """Report steps done and possible, and the images fooled."""
        if self.progress is not None and len(self.live):
            per_image = self.schedule.searches * self.schedule.steps
            under_way = self.searches * self.schedule.steps + self.steps
            done = int(torch.where(self.live, under_way, per_image).sum())
            fooled = int(self.best_l2.isfinite().sum())
            note = f"carlini_wagner_l2: {fooled} of {self.attacked} fooled"
            self.progress(done, per_image * len(self.live), note)


def objective(
    images: Tensor, x: Tensor, margin: Tensor, c: Tensor, kappa: float
) -> tuple[Tensor, Tensor]:
    """Return squared distance and objective of each image, (N,) each: equation 3 of the paper."""
    l2 = (images - x).flatten(1).square().sum(dim=1)
    return l2, l2 + c * (-margin).clamp(min=-kappa)
