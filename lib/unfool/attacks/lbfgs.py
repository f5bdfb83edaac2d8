"""L-BFGS: the attack that found adversarial examples, a box-constrained quasi-Newton descent.

It takes the images one by one, through scipy. Carlini and Wagner's L2 attack descends much the same
objective for a whole batch.
"""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import fmin_l_bfgs_b
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from unfool.attacks._descent import ROUNDING, lead
from unfool.attacks._pool import rightly_classified
from unfool.inputs import (
    attacked,
    check_inputs,
    check_number,
    levels_up_to_the_caller,
    warn_of_rounding,
)
from unfool.progress import Progress

VERSION = 1
PATIENCE = 120.0  # seconds that a call may take without a warning

Vector = NDArray[np.float64]


def lbfgs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    searches: int = 10,
    steps: int = 30,
    c: float = 0.01,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The box-constrained L-BFGS attack: the least change in L2 that makes the classifier err.

    Szegedy et al. 2014, section 4.1. L-BFGS-B minimises

        |x' - x|^2 + c loss(x')   over x' in [0, 1]^(C*H*W)

    where the loss is the cross-entropy of the target class or, without a target, of "any class but
    y": -log(1 - p_y). c is searched for: ten times the last one until the minimiser fools the
    model (a tenth of it until it doesn't, where the first one does), from then on the middle, of
    the logarithms, between the largest that failed and the smallest that did not. Of all images
    looked at the nearest that fools the model is returned. Explained in notebook 03.

    The authors put the factor before the distance; it is that of Carlini and Wagner's attacks here,
    1 / c, and the distance squared, as they read it. They publish no settings: those here are ours.

    Where the attack fails the original comes back, and images that are misclassified already are
    not touched.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1]. One at a time: a warning says how many minutes
            they will take where these are more than two.
        y: true classes (N,), int64.
        searches: how many values of c each image tries.
        steps: iterations of L-BFGS-B per value of c, each one or two passes through the model.
        c: the first value of c.
        target: classes (N,), int64, not y: the error must be this one, as in the paper.
        generator: unused, nothing is drawn; part of every attack's interface.
        progress: called with the number of images done and how many are fooled.

    Returns:
        Images like `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_number("searches", searches, 1, whole=True)
    check_number("steps", steps, 1, whole=True)
    check_number("c", c, 0)
    if c == 0:
        raise ValueError("c must be > 0: with 0 nothing would ever move")
    best, fooled = x.detach().clone(), 0
    with attacked(model) as seen:
        rows = rightly_classified(model, x, y, target).nonzero().flatten().tolist()
        started = time.perf_counter()
        for done, i in enumerate(rows):
            problem = Problem(model, best[i : i + 1], y[i], None if target is None else target[i])
            problem.search(searches, steps, c)
            best[i : i + 1], fooled = problem.best, fooled + math.isfinite(problem.best_l2)
            if done == 0:
                warn_if_long(len(rows), time.perf_counter() - started)
            if progress is not None:
                others = len(x) - len(rows)
                progress(others + done + 1, len(x), f"lbfgs: {fooled} of {len(rows)} fooled")
    warn_of_rounding(seen, x, best)
    return best


def warn_if_long(images: int, seconds: float) -> None:
    """Say how long so many images will take, if the first one took so many seconds."""
    if images * seconds > PATIENCE:
        warnings.warn(
            f"lbfgs takes one image at a time, and these {images} will take about "
            f"{images * seconds / 60:.0f} minutes: give it fewer, or use carlini_wagner_l2, which "
            "takes them side by side",
            stacklevel=levels_up_to_the_caller(),
        )


class Problem:
    """One image: its objective as scipy wants it, and the nearest image that fools the model.

    Attributes:
        best, best_l2: that image (x while there is none), (1, C, H, W), and its squared distance.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None) -> None:
        self.model, self.x, self.targeted = model, x.clone(), target is not None
        self.aim = (y if target is None else target).view(1)
        self.origin: Vector = x.double().cpu().numpy().ravel()
        self.best, self.best_l2 = self.x, math.inf

    def search(self, searches: int, steps: int, c: float) -> None:
        """Minimise the objective for several c, towards the smallest whose minimiser fools."""
        low, high = 0.0, math.inf
        bounds = [(0.0, 1.0)] * len(self.origin)
        for _ in range(searches):
            end = fmin_l_bfgs_b(self.look, self.origin, args=(c,), bounds=bounds, maxiter=steps)[0]
            if self.fools(self.model(self.image(end))):
                high = c
            else:
                low = c
            c = 10 * low if high == math.inf else math.sqrt(low * high) if low else high / 10

    def look(self, vector: Vector, c: float) -> tuple[float, Vector]:
        """Return the objective and its gradient; remember the image if it is the best so far."""
        image = self.image(vector).requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(image)
            loss = self.loss(logits.double())
            (slope,) = torch.autograd.grad(loss, image)
        price = c * float(loss.detach())
        change = vector - self.origin
        l2 = float(change @ change)
        if l2 < self.best_l2 and self.fools(logits):
            self.best, self.best_l2 = image.detach(), l2
        gradient: Vector = slope.double().cpu().numpy().ravel()
        return l2 + price, 2 * change + c * gradient

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy of the target or, without one, of all classes but y."""
        if self.targeted:
            return cross_entropy(logits, self.aim)
        others = logits.scatter(1, self.aim[:, None], -torch.inf)
        return (logits.logsumexp(dim=1) - others.logsumexp(dim=1)).sum()

    def fools(self, logits: Tensor) -> bool:
        """Return whether the model takes the image for the target, or for anything but y."""
        ahead = float(lead(logits.detach(), self.aim))
        return (ahead if self.targeted else -ahead) > ROUNDING

    def image(self, vector: Vector) -> Tensor:
        """Return scipy's vector as an image like x, in [0, 1]."""
        values = torch.as_tensor(vector, dtype=self.x.dtype, device=self.x.device)
        return values.view_as(self.x).clamp(0, 1)
