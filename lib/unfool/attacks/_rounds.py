"""Round after round under an ever tighter limit: Carlini and Wagner's attacks in L0 and L-infinity.

Neither norm has a useful gradient. So a round descends, at a price c that rises until the model is
fooled, and the next one starts where it ended, with fewer pixels or less room for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from unfool.attacks._descent import ROUNDING, Descent
from unfool.attacks._pool import rightly_classified, step_while_any
from unfool.attacks._schedule import schedule_of
from unfool.inputs import attacked, warn_of_rounding
from unfool.progress import Progress


@dataclass(frozen=True)
class Schedule:
    """How long to descend in a round.

    Attributes:
        steps: Adam's steps per value of c.
        lr: Adam's learning rate, in units of w.
        c: the price of the wrong class at first; a round takes over the c of the one before.
        growth: what c is multiplied by where the steps were not enough.
        largest_c: the round has failed when c would exceed this.
        squeeze: w starts at atanh(squeeze (2x - 1)), which is finite for black and white, too.
    """

    steps: int
    lr: float
    c: float
    growth: float
    largest_c: float
    squeeze: float


S = TypeVar("S", bound=Schedule)


def round_schedule(
    presets: dict[str, S], preset: str, steps: int | None, lr: float | None, c: float | None
) -> S:
    """Return a preset with some settings overridden, or refuse them."""
    schedule = schedule_of(presets, preset, steps=steps, lr=lr, c=c)
    if schedule.c > schedule.largest_c:
        raise ValueError(f"c must be <= {schedule.largest_c:g}, where it ends, not {schedule.c:g}")
    return schedule


class Rounds(Descent, ABC):
    """All images of one call, each in a round of its own.

    Attributes, beside those of a descent:
        c, won_c: the price of the wrong class, now and when a round was last won, (N,).
        hit: has the image fooled the model in any round? (N,) bool.
    """

    name = ""

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, live: Tensor, kappa: float,
        schedule: Schedule, progress: Progress | None,
    ) -> None:  # fmt: skip
        super().__init__(model, x, aim, sign, live, kappa, schedule.lr, schedule.squeeze, progress)
        self.schedule = schedule
        self.c = torch.full((len(x),), schedule.c, dtype=x.dtype, device=x.device)
        self.won_c, self.hit = self.c.clone(), torch.zeros_like(live)
        self.tell()

    def images(self, rows: Tensor) -> Tensor:
        """Return these images as they are now, (n, C, H, W)."""
        return (self.w[rows].tanh() + 1) / 2

    def step(self, rows: Tensor) -> None:
        """Take one step of Adam for the images `rows`; end the rounds that are won or lost."""
        images = self.images(rows).requires_grad_(True)
        with torch.enable_grad():
            margin = self.margin(images, rows)
            (slope,) = torch.autograd.grad(margin.sum(), images)
        images, fools = images.detach(), margin.detach() > self.kappa + ROUNDING
        self.hit[rows] |= fools
        won = self.keep(rows, images, fools)
        price = (self.c[rows] * ~fools).view(-1, 1, 1, 1)  # what fools already has no price
        gradient = (self.pull(rows, images) - price * slope) * 2 * images * (1 - images)
        self.descend(rows[~won], gradient[~won])
        self.win(rows[won], images[won], slope[won])
        self.raise_c(rows[~won])

    def win(self, rows: Tensor, images: Tensor, slope: Tensor) -> None:
        """Start the next, tighter round of these images."""
        if len(rows):
            self.won_c[rows] = self.c[rows]
            self.rest(rows)
            self.tighten(rows, images, slope)

    def raise_c(self, rows: Tensor) -> None:
        """Raise c where the steps were not enough; where it can't rise, the round is lost."""
        rows = rows[self.steps[rows] >= self.schedule.steps]
        self.rest(rows)
        higher = self.c[rows] * self.schedule.growth
        lost = higher > self.schedule.largest_c
        self.c[rows[~lost]] = higher[~lost]
        self.lose(rows[lost])

    def lose(self, rows: Tensor) -> None:
        """Go back to the best image and try a milder round, or finish."""
        self.finish(rows[~self.hit[rows]])
        rows = rows[self.hit[rows]]
        if len(rows):
            self.c[rows], self.w[rows] = self.won_c[rows], self.to_w(self.best[rows])
            self.loosen(rows)

    def finish(self, rows: Tensor) -> None:
        """These images are as good as they get."""
        self.live[rows] = False
        if len(rows):
            self.tell()

    def tell(self) -> None:
        """Report the images that are finished, and those that are fooled."""
        if self.progress is not None and len(self.live):
            note = f"{self.name}: {int(self.hit.sum())} of {self.attacked} fooled"
            self.progress(int((~self.live).sum()), len(self.live), note)

    @abstractmethod
    def pull(self, rows: Tensor, images: Tensor) -> Tensor:
        """Return the gradient, by pixel, of what draws the images back to x."""

    @abstractmethod
    def keep(self, rows: Tensor, images: Tensor, fools: Tensor) -> Tensor:
        """Remember the images that fool the model; return which rounds are won, (n,) bool."""

    @abstractmethod
    def tighten(self, rows: Tensor, images: Tensor, slope: Tensor) -> None:
        """Set a tighter limit for images that won their round; slope is the margin's, by pixel."""

    @abstractmethod
    def loosen(self, rows: Tensor) -> None:
        """Set a milder limit for images that lost their round, or finish them."""


def run(
    rounds: Callable[..., Rounds], model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None,
    kappa: float, schedule: Schedule, progress: Progress | None,
) -> Tensor:  # fmt: skip
    """Attack the images that the model gets right; return the best of each, or the original."""
    with attacked(model) as seen:
        live = rightly_classified(model, x, y, target)
        aim, sign = (y, -1) if target is None else (target, 1)
        state = rounds(model, x, aim, sign, live, kappa, schedule, progress)
        step_while_any(state.step, live)
    warn_of_rounding(seen, x, state.best)
    return state.best
