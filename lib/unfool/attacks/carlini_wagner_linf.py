"""Carlini and Wagner's L-infinity attack: a ceiling for every change, lowered until it is too low.

The largest change alone is a poor thing to descend: its gradient moves one pixel, and the next one
sticks out. So all that sticks out above a ceiling tau is penalised, and tau comes down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._rounds import Rounds, Schedule, round_schedule, run
from unfool.inputs import check_inputs, check_number
from unfool.progress import Progress

VERSION = 2
LOWEST = 1 / 256  # a tau below it is finer than 8-bit images, and the search ends, as in their code


@dataclass(frozen=True)
class LinfSchedule(Schedule):
    """And how the ceiling comes down.

    Attributes:
        shrink: tau is this share of the largest change of the best image.
        retreats: how often a lost round is repeated with half as large a decrease of tau.
        ease: where tau is less than this, lr falls in proportion to it, lest a step be larger than
            the room that is left.
    """

    shrink: float
    retreats: int
    ease: float


PRESETS: dict[str, LinfSchedule] = {
    "original": LinfSchedule(
        steps=1000, lr=0.005, c=1e-5, growth=2, largest_c=20, squeeze=0.999999, shrink=0.9,
        retreats=0, ease=0.0,
    ),
    "fast": LinfSchedule(
        steps=100, lr=0.02, c=0.1, growth=10, largest_c=1, squeeze=0.999, shrink=0.9, retreats=3,
        ease=0.2,
    ),
}  # fmt: skip


def carlini_wagner_linf(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    kappa: float = 0.0,
    preset: Literal["original", "fast"] = "fast",
    steps: int | None = None,
    lr: float | None = None,
    c: float | None = None,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Carlini and Wagner's L-infinity attack: make the classifier err by the least largest change.

    Carlini and Wagner 2017, section VI-C. The image is x' = (tanh(w) + 1) / 2, and Adam minimises

        sum_i max(|x'_i - x_i| - tau, 0) + c max(-margin(x'), -kappa)

    over w, where i runs over all values and the margin is Z_t - max_{i != t} Z_i for a target t and
    max_{i != y} Z_i - Z_y without one. c rises until the model is fooled. Then tau becomes 0.9 of
    the largest change, and a round for this tau begins at the image found, until a round fails.
    A round is won by an image with margin > kappa that has come at least half of the way to tau:
    Carlini's code allows the penalty a rest in proportion to c instead. As there, c stays where the
    last round left it.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        kappa: how far the wrong logit must lie above the others, >= 0, in units of the logits.
        preset: "original", the settings of Carlini's code: 1000 steps for each c, lr 0.005, c from
            1e-5 by doubling to 20; the first round that fails is the last. Or "fast": 100 steps, lr
            0.02 (less where tau is less than 0.2), c 0.1 and 1, a start less flat (`squeeze`); a
            round that fails is tried again with half the decrease of tau, three times in all.
        steps, lr, c: override the preset's; see `Schedule`. c: the first value.
        target: classes (N,), int64, not y: the error must be this one.
        generator: unused, nothing is drawn; part of every attack's interface.
        progress: called with the number of images done and how many are fooled.

    Returns:
        Images like `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_number("kappa", kappa, 0)
    schedule = round_schedule(PRESETS, preset, steps, lr, c)
    return run(Lowering, model, x, y, target, kappa, schedule, progress)


class Lowering(Rounds):
    """All images of one call, each under its own ceiling.

    Attributes, beside those of `Rounds`:
        tau: the ceiling, (N,), in units of the [0, 1] range.
        linf: the largest change of the best image so far, 1 while there is none, (N,).
        goal: the largest change with which the round is won, (N,).
        shrink, retreats: tau as a share of linf, and how often it had to come nearer to 1, (N,).
    """

    name = "carlini_wagner_linf"
    schedule: LinfSchedule

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, live: Tensor, kappa: float,
        schedule: LinfSchedule, progress: Progress | None,
    ) -> None:  # fmt: skip
        super().__init__(model, x, aim, sign, live, kappa, schedule, progress)
        self.tau, self.linf, self.goal = (torch.ones_like(self.c) for _ in range(3))
        self.shrink = torch.full_like(self.c, schedule.shrink)
        self.retreats = torch.zeros_like(self.steps)

    def pull(self, rows: Tensor, images: Tensor) -> Tensor:
        """Return the penalty's gradient: the sign of each change that sticks out."""
        change = images - self.x[rows]
        return change.sign() * (change.abs() > self.tau[rows].view(-1, 1, 1, 1))

    def keep(self, rows: Tensor, images: Tensor, fools: Tensor) -> Tensor:
        """Remember the images with the least largest change; return which have won, (n,) bool."""
        linf = (images - self.x[rows]).flatten(1).abs().amax(dim=1)
        nearer = fools & (linf <= self.linf[rows])
        self.best[rows[nearer]], self.linf[rows[nearer]] = images[nearer], linf[nearer]
        return fools & (linf <= self.goal[rows])

    def tighten(self, rows: Tensor, images: Tensor, slope: Tensor) -> None:
        """Lower the ceiling."""
        self.lower(rows)

    def loosen(self, rows: Tensor) -> None:
        """Lower the ceiling by half as much, or finish."""
        self.retreats[rows] += 1
        self.shrink[rows] = (1 + self.shrink[rows]) / 2
        over = self.retreats[rows] > self.schedule.retreats
        self.finish(rows[over])
        self.lower(rows[~over])

    def lower(self, rows: Tensor) -> None:
        """Set tau to a share of the best image's largest change."""
        self.tau[rows] = self.shrink[rows] * self.linf[rows]
        self.goal[rows] = (self.tau[rows] + self.linf[rows]) / 2
        if self.schedule.ease > 0:
            slower = (self.tau[rows] / self.schedule.ease).clamp(max=1)
            self.lr[rows] = self.schedule.lr * slower.view(-1, 1, 1, 1)
        self.finish(rows[self.tau[rows] <= LOWEST])
