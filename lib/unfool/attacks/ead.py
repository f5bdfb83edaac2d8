"""EAD: descent to the nearest image of another class in the elastic net, L1 and L2 mixed.

As in Carlini and Wagner's attack each image has its own search over c and its own early end, so
that its result does not depend on the images beside it, and none waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._descent import ROUNDING, lead
from unfool.attacks._nearest import l1, per_image
from unfool.attacks._pool import rightly_classified, step_while_any
from unfool.attacks._schedule import bisect_c, schedule_of
from unfool.attacks.carlini_wagner import CHECKS, GAIN, TELL_EVERY
from unfool.inputs import (
    attacked,
    check_choice,
    check_inputs,
    check_number,
    warn_of_rounding,
)
from unfool.progress import Progress

VERSION = 1


@dataclass(frozen=True)
class Schedule:
    """From where and how long to look.

    Attributes:
        searches: how many values of c each image tries: ten times the last one until one succeeds,
            from then on the middle between the largest that failed and the smallest that did not.
        steps: FISTA's steps per value of c; fewer where the objective stops falling.
        lr: the first step's size; it falls with the square root of the share of steps left.
        c: the first value of c.
        warm_start: begin each descent at the best image found so far (at the last one seen while
            there is none), not at x.
    """

    searches: int
    steps: int
    lr: float
    c: float
    warm_start: bool


PRESETS: dict[str, Schedule] = {
    "original": Schedule(9, 1000, 0.01, 1e-3, warm_start=False),
    "fast": Schedule(5, 100, 0.01, 1.0, warm_start=True),
}


def ead(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    rule: Literal["EN", "L1"] = "EN",
    beta: float = 0.01,
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
    """Elastic-net attack: the least change in L1 and L2 together; few pixels move.

    Chen et al. 2018, algorithm 1. FISTA minimises over images x' in [0, 1]

        c max(kappa - margin(x'), 0) + |x' - x|_2^2 + beta |x' - x|_1

    where the margin is Z_t - max_{i != t} Z_i for a target t and max_{i != y} Z_i - Z_y without
    one: a step down the gradient of the first two terms, from a point a little further on than the
    last image, then each value goes back towards that of x by beta, and onto it where it was nearer
    than that (equation 6). c is searched for as in Carlini and Wagner's attack. Of all images with
    margin > kappa seen on the way the best by `rule` is returned. Explained in notebook 04.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        rule: what the best image is: "EN", that with the least beta L1 + L2^2, or "L1", that with
            the least L1.
        beta: how far each step shrinks the change, >= 0, in units of the pixels; 0 leaves L2 alone.
            At the step size lr it weighs L1 by beta / lr, not by beta, as in the paper.
        kappa: how far the wrong logit must lie above the others, >= 0, in units of the logits.
        preset: "original", the schedule of the paper's experiments: 9 searches of at most 1,000
            steps, lr 0.01, c from 0.001, each descent from x; or "fast": 5 of at most 100, c from
            1, each descent from the best image so far.
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
    check_choice("rule", rule, ("EN", "L1"))
    check_number("beta", beta, 0)
    check_number("kappa", kappa, 0)
    schedule = schedule_of(
        PRESETS, preset, searches=searches, steps=steps, lr=lr, c=c, warm_start=warm_start
    )
    with attacked(model) as seen:
        live = rightly_classified(model, x, y, target)
        aim, sign = (y, -1) if target is None else (target, 1)
        search = Search(model, x, aim, sign, live, rule, beta, kappa, schedule, progress)
        step_while_any(search.step, live)
    warn_of_rounding(seen, x, search.best)
    return search.best


class Search:
    """All images of one call, and how far each has come: tensors with a row per image.

    Attributes:
        now: the last image of each descent, (N, C, H, W).
        ahead: where the next gradient is taken: `now` and some of its last movement once more.
        steps, searches: how many are done, (N,) int64.
        c, low, high: the price under trial, the largest that failed, the smallest that did not.
        hit: has this c succeeded? (N,) bool.
        best, best_cost: the best image so far (x while there is none) and its cost by the rule.
        lowest: the lowest objective of this descent.
        mark, mark_cost: what `lowest` and `best_cost` were when the descent was last checked.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, live: Tensor, rule: str,
        beta: float, kappa: float, schedule: Schedule, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.aim, self.sign, self.live = model, aim, sign, live
        self.rule, self.beta, self.kappa = rule, beta, kappa
        self.schedule, self.progress = schedule, progress
        self.x, self.best = x.detach(), x.detach().clone()
        self.now, self.ahead = self.x.clone(), self.x.clone()
        self.steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.searches = torch.zeros_like(self.steps)
        self.c = torch.full((len(x),), schedule.c, dtype=x.dtype, device=x.device)
        self.low = torch.zeros_like(self.c)
        self.high, self.best_cost, self.lowest, self.mark, self.mark_cost = (
            torch.full_like(self.c, torch.inf) for _ in range(5)
        )
        self.hit = torch.zeros_like(live)
        self.attacked, self.turn = int(live.sum()), 0
        self.tell()

    def step(self, rows: Tensor) -> None:
        """Take one step of FISTA for the images `rows`; go on to the next c where one is done."""
        x, ahead, steps = self.x[rows], self.ahead[rows].requires_grad_(True), self.steps[rows]
        with torch.enable_grad():
            l2 = (ahead - x).flatten(1).square().sum(dim=1)
            hinge = (self.kappa - self.margin(ahead, rows)).clamp(min=0)
            smooth = l2 + self.c[rows] * hinge
            (gradient,) = torch.autograd.grad(smooth.sum(), ahead)
        size = self.schedule.lr * (1 - steps / self.schedule.steps).sqrt()
        images = shrink_towards(x, ahead.detach() - per_image(size) * gradient, self.beta)
        self.keep(rows, images)  # the last pass; from here on things change
        objective = smooth.detach() + self.beta * l1(ahead.detach() - x)
        stuck = self.is_stuck(rows, objective) | self.is_at_rest(rows, images)
        momentum = per_image(steps / (steps + 3))
        self.ahead[rows] = images + momentum * (images - self.now[rows])
        self.now[rows] = images
        self.steps[rows] += 1
        done = rows[stuck | (self.steps[rows] >= self.schedule.steps)]
        self.next_c(done)
        self.turn += 1
        if self.turn % TELL_EVERY == 0 or len(done):
            self.tell()

    def margin(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return by how much the wrong class leads in these images of the rows, (n,)."""
        return self.sign * lead(self.model(images), self.aim[rows])

    @torch.no_grad()
    def keep(self, rows: Tensor, images: Tensor) -> None:
        """Remember the images that fool the model and cost less than all before.

        Those that would cost more are not looked at once this c has succeeded: a pass is saved.
        """
        cost = self.cost(images - self.x[rows])
        look = ~self.hit[rows] | (cost < self.best_cost[rows])
        rows, images, cost = rows[look], images[look], cost[look]
        if len(rows) == 0:
            return
        fools = self.margin(images, rows) > self.kappa + ROUNDING
        self.hit[rows] |= fools
        better = fools & (cost < self.best_cost[rows])
        self.best[rows[better]], self.best_cost[rows[better]] = images[better], cost[better]

    def cost(self, change: Tensor) -> Tensor:
        """Return what the rule finds changes worth, (n,)."""
        if self.rule == "L1":
            return l1(change)
        return self.beta * l1(change) + change.flatten(1).square().sum(dim=1)

    def is_stuck(self, rows: Tensor, objective: Tensor) -> Tensor:
        """Return which descents have gained nothing in the last tenth of their steps.

        Neither in the objective nor, once the border is reached, in the best image's cost.
        """
        self.lowest[rows] = lowest = torch.minimum(self.lowest[rows], objective)
        due = self.steps[rows] % -(-self.schedule.steps // CHECKS) == 0
        gains = (lowest <= GAIN * self.mark[rows]) | (self.best_cost[rows] < self.mark_cost[rows])
        self.mark[rows[due]], self.mark_cost[rows[due]] = lowest[due], self.best_cost[rows[due]]
        return due & ~gains  # NaN is no gain

    def is_at_rest(self, rows: Tensor, images: Tensor) -> Tensor:
        """Return which images were on x and stay there: no later step is larger, so they always do.

        So it is with a c too small for any pixel to outdo beta.
        """
        x = self.x[rows]
        moves = (self.now[rows] != x) | (self.ahead[rows] != x) | (images != x)
        return ~moves.flatten(1).any(dim=1)

    def next_c(self, rows: Tensor) -> None:
        """End the descents of these images and set up their next ones."""
        self.c[rows], self.low[rows], self.high[rows] = bisect_c(
            self.hit[rows], self.c[rows], self.low[rows], self.high[rows]
        )
        start = self.x[rows]
        if self.schedule.warm_start:
            lost = per_image(self.best_cost[rows].isinf())
            start = torch.where(lost, self.now[rows], self.best[rows])
        self.now[rows], self.ahead[rows], self.steps[rows] = start, start, 0
        self.hit[rows], self.lowest[rows], self.mark[rows] = False, torch.inf, torch.inf
        self.mark_cost[rows] = self.best_cost[rows]
        self.searches[rows] += 1
        self.live[rows] = self.searches[rows] < self.schedule.searches

    def tell(self) -> None:
        """Report steps done and possible, and the images fooled."""
        if self.progress is not None and len(self.live):
            per_row = self.schedule.searches * self.schedule.steps
            under_way = self.searches * self.schedule.steps + self.steps
            done = int(torch.where(self.live, under_way, per_row).sum())
            fooled = int(self.best_cost.isfinite().sum())
            note = f"ead: {fooled} of {self.attacked} fooled"
            self.progress(done, per_row * len(self.live), note)


def shrink_towards(x: Tensor, images: Tensor, by: float) -> Tensor:
    """Move each value towards that of x by `by`, onto it where it is nearer; clip: equation 6."""
    change = images - x
    shrunk = change.sign() * (change.abs() - by).clamp(min=0)
    return torch.where(shrunk == 0, x, (x + shrunk).clamp(0, 1))
