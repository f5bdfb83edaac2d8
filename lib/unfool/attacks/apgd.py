"""Auto-PGD: steps uphill with momentum that find their own size, in two losses or more.

The course's strongest attack at a given eps: several runs, of which an image needs to fall to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from unfool.attacks._descent import ROUNDING, lead
from unfool.attacks._draws import generators, seeds_for, uniform
from unfool.attacks.sign import check_eps, project
from unfool.inputs import check_choice, check_inputs, check_number, in_chunks
from unfool.progress import Progress

VERSION = 1
LOSSES = ("ce", "margin", "dlr", "dlr-t")
MOMENTUM = 0.75  # the share of a step that is new; alpha in the paper
RHO = 0.75  # fewer rises than this share since the last checkpoint halve the step


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    steps: int = 100,
    losses: Sequence[str] = ("ce", "dlr-t"),
    targets: int = 9,
    restarts: int = 1,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Auto-PGD in L-infinity with several losses: AutoAttack's two gradient attacks that matter.

    Croce and Hein 2020, algorithm 1. A step is half momentum; where the loss rises too rarely, or
    its best value stands still, the step is halved and the image goes back to its best place. The
    defaults are APGD-CE and APGD-T as AutoAttack runs them. Explained in notebook 11.

    An image that is fooled leaves the batch and takes part in no further run; one that is
    misclassified already is not touched. One that holds out comes back where the last run's loss
    was largest.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel, in units of the [0, 1] range.
        steps: of each run, at least 1; each is a forward and a backward pass, one more comes first.
        losses: runs to make, in order: "ce" cross-entropy; "margin" by how much the best wrong
            class leads; "dlr" the same, divided by the distance of the first to the third logit, so
            that the logits' scale cannot mask it; "dlr-t" the lead of one wrong class over the true
            one, so divided, a run for each of the `targets` likeliest on x.
        targets: how many of them, at least 1.
        restarts: how often all this is done from new random points, at least 1.
        target: classes (N,), int64, not y: the error must be this one, the only target.
        generator: draws a seed for each image; by default one of seed 0.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], within eps of x, detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_eps(eps)
    for name, value in (("steps", steps), ("targets", targets), ("restarts", restarts)):
        check_number(name, value, 1, whole=True)
    if isinstance(losses, str) or not losses:
        raise ValueError(f"losses must be a list such as ['ce', 'dlr-t'], not {losses!r}")
    for loss in losses:
        check_choice("losses", loss, LOSSES)
    seeds = seeds_for(x, generator)

    def attack(rows: slice) -> Tensor:
        images, aims = x[rows].detach(), None if target is None else target[rows]
        with torch.no_grad():
            logits = model(images)
        left, own = ~won(logits, y[rows], aims), generators(seeds[rows])
        result = images.clone()
        for loss, aim in plan(logits, y[rows], aims, losses, targets, restarts):
            at = left.nonzero().flatten()
            if not len(at):
                break
            noise = eps * uniform([own[i] for i in at.tolist()], x.shape[1:], x)
            objective = Objective(model, loss, aimed=target is not None)
            start = project(images[at] + noise, images[at], eps, "linf")
            found, fell = climb(objective, images[at], start, y[rows][at], aim[at], eps, steps)
            result[at], left[at] = found, ~fell
        return result

    return in_chunks(attack, model, x, y, target, progress=progress, name="apgd")


def plan(
    logits: Tensor, y: Tensor, aims: Tensor | None, losses: Sequence[str], targets: int,
    restarts: int,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yield the loss and the wrong class, (N,), of each run; most losses ignore the class."""
    others = logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)[:, :-1]
    wrong = others.T if aims is None else aims[None]
    for _ in range(restarts):
        for loss in losses:
            yield from ((loss, aim) for aim in wrong[: targets if loss == "dlr-t" else 1])


def won(logits: Tensor, y: Tensor, aims: Tensor | None) -> Tensor:
    """Return which images fool the model, or reach their aim, (N,) bool."""
    return (-lead(logits, y) if aims is None else lead(logits, aims)) > ROUNDING


@dataclass(frozen=True)
class Objective:
    """What is climbed: a loss by name; `aimed` where only one error, the class `aim`, counts."""

    model: nn.Module
    loss: str
    aimed: bool

    def look(self, images: Tensor, y: Tensor, aim: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each image's loss, (n,), its gradient and whether it fools the model."""
        images = images.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(images)
            loss = self.value(logits, y, aim)
            (gradient,) = torch.autograd.grad(loss.sum(), images)
        return loss.detach(), gradient, won(logits.detach(), y, aim if self.aimed else None)

    def value(self, logits: Tensor, y: Tensor, aim: Tensor) -> Tensor:
        """Return the loss, (n,): the larger, the nearer to an error."""
        if self.loss == "ce":
            sign, label = (-1, aim) if self.aimed else (1, y)
            return sign * cross_entropy(logits, label, reduction="none")
        if self.loss == "dlr-t":
            ahead = logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])
            return ahead.squeeze(1) / spread(logits, 2)
        ahead = lead(logits, aim) if self.aimed else -lead(logits, y)
        return ahead if self.loss == "margin" else ahead / spread(logits, 1)


def spread(logits: Tensor, count: int) -> Tensor:
    """Return the largest logit minus the mean of `count` from the third on; 1 for two classes."""
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    if top.shape[1] < 3:
        return torch.ones_like(top[:, 0])
    return top[:, 0] - top[:, 2 : 2 + count].mean(dim=1) + 1e-12


@dataclass
class Climb:
    """Images under way: their rows in the batch, and for each what the algorithm keeps of it."""

    row: Tensor
    x: Tensor
    y: Tensor
    aim: Tensor
    now: Tensor
    before: Tensor
    loss: Tensor
    gradient: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    size: Tensor
    rises: Tensor
    mark: Tensor  # the best loss at the last checkpoint
    halved: Tensor  # whether the step was, there

    def keep(self, left: Tensor) -> None:
        """Drop all rows but these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[left])

    def remember(self) -> None:
        """Keep the present place where its loss is the largest so far."""
        better = self.loss > self.best_loss
        wide = better.view(-1, 1, 1, 1)
        self.best = torch.where(wide, self.now, self.best)
        self.best_gradient = torch.where(wide, self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, self.loss, self.best_loss)

    def judge(self, since: int) -> None:
        """At a checkpoint, `since` steps after the last: halve the step and go back, or go on."""
        stuck = ~self.halved & (self.best_loss <= self.mark)
        self.halved = (self.rises < RHO * since) | stuck
        wide = self.halved.view(-1, 1, 1, 1)
        self.size = torch.where(wide, self.size / 2, self.size)
        self.now = torch.where(wide, self.best, self.now)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.loss = torch.where(self.halved, self.best_loss, self.loss)
        self.mark, self.rises = self.best_loss.clone(), torch.zeros_like(self.rises)


def climb(
    objective: Objective, x: Tensor, start: Tensor, y: Tensor, aim: Tensor, eps: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Return where each image ends, and whether it fools the model there: one run."""
    loss, gradient, fell = objective.look(start, y, aim)
    result, rows, size = start.clone(), torch.arange(len(x), device=x.device), 2 * eps
    at = Climb(
        rows, x, y, aim, start, start, loss, gradient, start, loss, gradient,
        torch.full_like(loss, size).view(-1, 1, 1, 1), torch.zeros_like(rows), loss,
        torch.ones_like(fell),
    )  # fmt: skip
    at.keep(~fell)
    marks, last = checkpoints(steps), 0
    for step in range(1, steps + 1):
        if not len(at.row):
            break
        uphill = project(at.now + at.size * at.gradient.sign(), at.x, eps, "linf")
        if step > 1:
            mixed = at.now + MOMENTUM * (uphill - at.now) + (1 - MOMENTUM) * (at.now - at.before)
            uphill = project(mixed, at.x, eps, "linf")
        at.before, at.now, previous = at.now, uphill, at.loss
        at.loss, at.gradient, now_fell = objective.look(at.now, at.y, at.aim)
        at.rises = at.rises + (at.loss > previous)
        at.remember()
        if now_fell.any():
            result[at.row[now_fell]], fell[at.row[now_fell]] = at.now[now_fell], True
            at.keep(~now_fell)
        if step in marks:
            at.judge(step - last)
            last = step
    result[at.row] = at.best
    return result, fell


def checkpoints(steps: int) -> set[int]:
    """Return the steps after which the step's size is judged: ever closer, 22 % of all at first."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(round(share * steps, 9)) for share in shares[1:] if share <= 1}
