"""Carlini and Wagner's L0 attack: change every pixel, then give back those that matter least.

How many pixels differ says nothing about which to change. A descent in L2 does: where a pixel's
change hardly moves the logits, it goes back to the original for good, and the others make up for it
in the next round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._rounds import Rounds, Schedule, round_schedule, run
from unfool.inputs import check_inputs, check_number
from unfool.progress import Progress

VERSION = 1
SEEN = 1e-4  # a smaller change doesn't count when their code counts the pixels that differ


@dataclass(frozen=True)
class L0Schedule(Schedule):
    """And how many pixels to freeze after a round: one at least, and while all of this holds more.

    Attributes:
        share: what they contribute together is at most this share of what all do.
        root: they are at most this many times the square root of how many pixels differ.
        small: none but the last contributes more than this to the margin, in units of the logits.
        retreat: is a lost round repeated with half as many, down to one? Else it is the last.
    """

    share: float
    root: float
    small: float
    retreat: bool


PRESETS: dict[str, L0Schedule] = {
    "original": L0Schedule(
        steps=1000, lr=0.01, c=1e-3, growth=2, largest_c=2e6, squeeze=0.999999,
        share=math.inf, root=0.3, small=0.01, retreat=False,
    ),
    "fast": L0Schedule(
        steps=60, lr=0.05, c=0.1, growth=3, largest_c=1000, squeeze=0.999,
        share=0.1, root=math.inf, small=math.inf, retreat=True,
    ),
}  # fmt: skip


def carlini_wagner_l0(
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
    """Carlini and Wagner's L0 attack: make the classifier err by a change of few pixels.

    Carlini and Wagner 2017, section VI-B. In each round the free pixels are (tanh(w) + 1) / 2, the
    others those of x, and Adam minimises

        |x' - x|^2 + c max(-margin(x'), -kappa)

    over w, where the margin is Z_t - max_{i != t} Z_i for a target t and max_{i != y} Z_i - Z_y
    without one; c rises until the model is fooled. Then the free pixels with the least g (x' - x)
    are frozen, where g is the gradient of the margin at x', and the next round begins at x' and at
    this c. A pixel is a place: its channels are summed, and all of them are freed or frozen, where
    `jsma` counts each channel's value.

    The paper freezes a pixel at a time; so many rounds are dear, and Carlini's code freezes up to
    0.3 sqrt(changed) that matter little and stops at the first round that fails. "fast" freezes the
    least pixels that make up a tenth of all contributions, and where a round fails half as many
    from the same image, until one pixel is too many. Their code takes g of the whole objective and
    in w, where a pixel near black or white seems not to matter; here it is the paper's.
    Explained in notebook 04.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        kappa: how far the wrong logit must lie above the others, >= 0, in units of the logits.
        preset: "original", the settings of Carlini's code: 1000 steps for each c, lr 0.01, c from
            0.001 by doubling to 2e6. Or "fast": 60 steps, lr 0.05, c from 0.1 by tripling to 1000,
            a start less flat (`squeeze`).
        steps, lr, c: override the preset's; see `Schedule`. c: the first value.
        target: classes (N,), int64, not y: the error must be this one.
        generator: unused, nothing is drawn; part of every attack's interface.
        progress: called with the number of images done and how many are fooled.

    Returns:
        Images like `x`, in [0, 1], detached; all but a few pixels are the very values of x.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_number("kappa", kappa, 0)
    schedule = round_schedule(PRESETS, preset, steps, lr, c)
    return run(Freezing, model, x, y, target, kappa, schedule, progress)


class Freezing(Rounds):
    """All images of one call, each with its own frozen pixels.

    Attributes, beside those of `Rounds`:
        free: the pixels that may change in this round, (N, 1, H, W) bool.
        kept: those that could in the last round that was won.
        order: the pixels by what they contributed in it, the frozen ones last, (N, H*W) int64.
        group: how many of them this round does without, (N,) int64.
    """

    name = "carlini_wagner_l0"
    schedule: L0Schedule

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, live: Tensor, kappa: float,
        schedule: L0Schedule, progress: Progress | None,
    ) -> None:  # fmt: skip
        super().__init__(model, x, aim, sign, live, kappa, schedule, progress)
        self.free = torch.ones_like(self.x[:, :1], dtype=torch.bool)
        self.kept = self.free.clone()
        self.order = torch.zeros_like(self.free.flatten(1), dtype=torch.int64)
        self.group = torch.zeros_like(self.steps)

    def images(self, rows: Tensor) -> Tensor:
        """Return these images as they are now: the frozen pixels are exactly those of x."""
        return torch.where(self.free[rows], super().images(rows), self.x[rows])

    def pull(self, rows: Tensor, images: Tensor) -> Tensor:
        """Return the gradient of the squared distance."""
        return 2 * (images - self.x[rows])

    def keep(self, rows: Tensor, images: Tensor, fools: Tensor) -> Tensor:
        """Remember the images that fool the model; all of them have won."""
        self.best[rows[fools]] = images[fools]
        return fools

    def tighten(self, rows: Tensor, images: Tensor, slope: Tensor) -> None:
        """Freeze the free pixels that contribute least to the margin."""
        change = images - self.x[rows]
        gain = (slope * change).sum(dim=1).flatten(1).masked_fill(
            ~self.free[rows].flatten(1), torch.inf
        )  # fmt: skip
        gain, self.order[rows] = gain.sort(dim=1, stable=True)
        differ = (change.abs() >= SEEN).any(dim=1).flatten(1).sum(dim=1)
        self.group[rows] = group_size(gain, differ, self.schedule)
        self.kept[rows] = self.free[rows]
        self.freeze(rows)

    def loosen(self, rows: Tensor) -> None:
        """Freeze half as many, or finish."""
        self.group[rows] //= 2
        over = (self.group[rows] == 0) | (not self.schedule.retreat)
        self.finish(rows[over])
        self.freeze(rows[~over])

    def freeze(self, rows: Tensor) -> None:
        """Free what was free when the last round was won, but for the group."""
        order = self.order[rows]
        in_group = torch.arange(order.shape[1], device=order.device) < self.group[rows, None]
        frozen = torch.zeros_like(in_group).scatter(1, order, in_group)
        self.free[rows] = self.kept[rows] & ~frozen.view_as(self.free[rows])
        self.finish(rows[~self.free[rows].flatten(1).any(dim=1)])


def group_size(gain: Tensor, differ: Tensor, schedule: L0Schedule) -> Tensor:
    """Return how many pixels of each image to freeze at once, (n,) int64.

    Args:
        gain: what each free pixel adds to the margin, in ascending order, then inf, (n, H*W).
        differ: how many pixels differ from x, (n,).
    """
    free = gain.isfinite()
    cost = gain.clamp(min=0).masked_fill(~free, 0)  # one that does harm costs nothing
    cheap = free & (cost.cumsum(dim=1) <= schedule.share * cost.sum(dim=1, keepdim=True))
    small = (gain <= schedule.small).sum(dim=1) + 1
    few = (schedule.root * differ.sqrt()).ceil()
    size = torch.minimum(torch.minimum(cheap.sum(dim=1), small), few)
    return size.clamp(min=1).to(torch.int64)
