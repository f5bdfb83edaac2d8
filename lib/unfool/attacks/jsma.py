"""JSMA: the Jacobian-based saliency map attack, which changes few pixels and changes them a lot.

At each step it looks for the two pixels whose change helps the target class most while it hurts all
others together, and drives them to white (theta > 0) or to black (theta < 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._pool import rightly_classified, step_while_any
from unfool.inputs import (
    attacked,
    check_choice,
    check_inputs,
    check_number,
    need_target,
    warn_of_rounding,
)
from unfool.progress import Progress

VERSION = 1
SMALLEST = 1e-3  # theta up or down; 8-bit images have steps of 0.004
TABLE = 2**24  # scores of pairs at once, 64 MiB

Choice = tuple[Tensor, Tensor]
"""Values to change, (n, 1 or 2) int64 indices into the flattened image, and (n,) bool: is there a
choice at all?"""


def jsma(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    theta: float = 1.0,
    gamma: float = 0.145,
    variant: Literal["pair", "top2", "single"] = "pair",
    saturated: float = 0.99,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Jacobian-based saliency map attack: drive a few pixels up (or down) until target is seen.

    Papernot et al. 2016, algorithm 3. With alpha_i = dZ_t/dx_i and beta_i = sum_{j != t} dZ_j/dx_i
    of the logits Z, a step takes the pair p, q with the largest
    -(alpha_p + alpha_q) (beta_p + beta_q), where the first sum is > 0 and the second < 0 (for
    theta < 0 the other way round), and adds theta to both. Explained in notebook 04.

    An image stops when the target is reached. It fails, and comes back unchanged, when no pair is
    left or two more values would exceed gamma (with |theta| < 1 even where the next pair would
    change the same ones further). Images that are misclassified already are not touched.

    Args:
        model: returns logits (N, classes). With probabilities alpha and beta would cancel and
            the pair would be the two largest alphas.
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        theta: what a step adds to a value, in units of the [0, 1] range: from 0.001 to 1, or from
            -1 to -0.001; the sum is clipped to [0, 1]. 1 as in the paper.
        gamma: the largest share of the C*H*W values that may change, in [0, 1]; 0.145 is 113 of
            MNIST's 784 (the paper's Upsilon of 14.5 %).
        variant: "pair" as above; "top2": the two largest alphas, whatever becomes of the other
            classes (the Adversarial Robustness Toolbox); "single": one value a step, the one with
            the largest -alpha beta, alpha > 0 and beta < 0 (the paper's equation 8).
        saturated: a value is left alone once it is >= this (<= 1 - this for theta < 0). 0.99 (as
            in cleverhans 3) spares the steps from 253 to 255; 1 is what the toolbox above does.
        target: the class that each image shall become (N,), int64, not y; see `random_targets`.
        generator: unused, JSMA draws nothing; part of every attack's interface.
        progress: called with the number of images done and how many are fooled.

    Returns:
        Images like `x`, in [0, 1], detached: classified as `target`, or unchanged.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    target = need_target(target, "jsma")
    check_inputs(x, y, target)
    check_settings(theta, gamma, variant, saturated)
    with attacked(model) as seen:
        live = rightly_classified(model, x, y, target)
        hunt = Hunt(model, x, target, live, theta, gamma, variant, saturated, progress)
        step_while_any(hunt.step, live)
    found = torch.where(hunt.fooled.view(-1, 1, 1, 1), hunt.x_adv, x.detach())
    warn_of_rounding(seen, x, found)
    return found


def check_settings(theta: float, gamma: float, variant: str, saturated: float) -> None:
    """Refuse what is no setting of JSMA."""
    check_number("theta", theta, -1, 1)
    if abs(theta) < SMALLEST:  # so small a step may be lost in rounding, and never end
        raise ValueError(
            f"theta is what a step adds to a pixel, at least {SMALLEST} up or down, not {theta}: "
            "use 1 or -1"
        )
    check_number("gamma", gamma, 0, 1)
    check_choice("variant", variant, tuple(VARIANTS))
    check_number("saturated", saturated, 0, 1)


class Hunt:
    """All images of one call, and how far each has come.

    Attributes:
        x_adv: (N, C, H, W), the images with the changes so far.
        live: (N,) bool, the images that still have steps to go.
        fooled: (N,) bool, the images that have reached their target.
        changed: (N, C*H*W) bool, the values that have been changed.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, target: Tensor, live: Tensor, theta: float,
        gamma: float, variant: str, saturated: float, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.target, self.live, self.progress = model, target, live, progress
        self.theta, self.saturated, self.variant = theta, saturated, VARIANTS[variant]
        self.x_adv = x.detach().clone()
        self.fooled = torch.zeros_like(live)
        self.changed = torch.zeros_like(self.x_adv.flatten(1), dtype=torch.bool)
        # The hair keeps 0.29 * 100 = 28.999… at 29.
        self.limit = int(gamma * self.changed.shape[1] + 1e-9)
        self.tell()

    def step(self, rows: Tensor) -> None:
        """Look at the images `rows`; change one or two values of those that are not finished."""
        images = self.x_adv[rows].requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(images)
        won = logits.argmax(dim=1) == self.target[rows]
        spent = self.changed[rows].sum(dim=1) + self.variant.width > self.limit
        going = ~(won | spent)
        if going.any():  # else nobody needs the gradients
            good, bad = self.saliency(logits, images, self.target[rows])
            values, found = self.variant.choose(good, bad)
            going &= found
            self.change(rows[going], values[going])
        self.fooled[rows], self.live[rows] = won, going
        self.tell()

    def saliency(self, logits: Tensor, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and -beta of each value, (n, C*H*W) each, both with the sign of theta.

        A step helps where both are positive. Two vector-Jacobian products (of the target's logit
        and of the sum of all) give what a full Jacobian would give in one per class.
        """
        with torch.enable_grad():
            own, total = logits.gather(1, target[:, None]).sum(), logits.sum()
        both = self.variant.needs_others
        (alpha,) = torch.autograd.grad(own, images, retain_graph=both)
        beta = torch.autograd.grad(total, images)[0] - alpha if both else alpha
        sign = 1 if self.theta > 0 else -1
        room = images.detach() if self.theta > 0 else 1 - images.detach()
        full = room.flatten(1) >= self.saturated
        good = (sign * alpha).flatten(1).masked_fill(full, -torch.inf)
        bad = (-sign * beta).flatten(1).masked_fill(full, -torch.inf) if both else good
        return good, bad

    def change(self, rows: Tensor, values: Tensor) -> None:
        """Add theta to the chosen values of each image."""
        flat = self.x_adv[rows].flatten(1)
        flat.scatter_(1, values, (flat.gather(1, values) + self.theta).clamp(0, 1))
        self.x_adv[rows] = flat.view_as(self.x_adv[rows])
        self.changed[rows] = self.changed[rows].scatter(1, values, True)

    def tell(self) -> None:
        """Report the images that are done."""
        if self.progress is not None and len(self.live):
            note = f"jsma: {int(self.fooled.sum())} fooled"
            self.progress(int((~self.live).sum()), len(self.live), note)


# --- which values to change -----------------------------------------------------------------------
# Each takes `good`, how much a value helps the target, and `bad`, how much it hurts the others
# together, (n, features) each, -inf where it can't be changed.


def best_pair(good: Tensor, bad: Tensor) -> Choice:
    """Return the pair with the largest (good_p + good_q) (bad_p + bad_q), both sums > 0.

    Exact, though only a few of the features**2 / 2 pairs are scored: see `not_dominated`. Of equal
    pairs the first in the order of the pixels is taken.
    """
    keep = not_dominated(good, bad)
    most = int(keep.sum(dim=1).max())
    if len(good) > 1 and len(good) * most * most > TABLE:
        halves = [best_pair(g, b) for g, b in zip(good.chunk(2), bad.chunk(2), strict=True)]
        return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])
    rows, features = keep.nonzero(as_tuple=True)
    places = (keep.cumsum(dim=1) - 1)[rows, features]
    candidates = torch.zeros(len(good), most, dtype=torch.int64, device=good.device)
    candidates[rows, places] = features
    empty = torch.full_like(candidates, -torch.inf, dtype=good.dtype)
    p, q = torch.triu_indices(most, most, offset=1, device=good.device)
    g = empty.index_put((rows, places), good[rows, features])
    b = empty.index_put((rows, places), bad[rows, features])
    g, b = g[:, p] + g[:, q], b[:, p] + b[:, q]
    score, at = torch.where((g > 0) & (b > 0), g * b, 0).max(dim=1)
    pair = torch.stack([p[at], q[at]], dim=1)
    return candidates.gather(1, pair), score > 0


def not_dominated(good: Tensor, bad: Tensor) -> Tensor:
    """Return which values can be part of the best pair, (n, features) bool.

    A value is dominated by another that is at least as large in both `good` and `bad`. In a pair,
    it can be replaced by what dominates it, and the score gets no worse, unless that is the pair's
    other half: so two that dominate it are enough to rule it out. Sorted by `good`, the values
    before it are at least as good; it is ruled out if the second largest `bad` among them is not
    below its own. Of MNIST's 784 values, 14 to 43 are left.
    """
    order = good.argsort(dim=1, descending=True, stable=True)
    bad = bad.gather(1, order)
    largest = bad.cummax(dim=1).values
    second = torch.minimum(bad[:, 1:], largest[:, :-1]).cummax(dim=1).values
    keep = torch.ones_like(bad, dtype=torch.bool)
    keep[:, 2:] = bad[:, 2:] > second[:, :-1]
    return torch.zeros_like(keep).scatter(1, order, keep)


def top_two(good: Tensor, bad: Tensor) -> Choice:
    """Return the two values with the largest `good`; `bad` plays no part."""
    largest, values = good.topk(2, dim=1)
    return values, largest[:, 1] > -torch.inf


def best_single(good: Tensor, bad: Tensor) -> Choice:
    """Return the value with the largest good * bad, both > 0."""
    score, value = torch.where((good > 0) & (bad > 0), good * bad, 0).max(dim=1)
    return value[:, None], score > 0


@dataclass(frozen=True)
class Variant:
    """How a step chooses, how many values, and whether it needs the other classes' gradient."""

    choose: Callable[[Tensor, Tensor], Choice]
    width: int
    needs_others: bool


VARIANTS = {
    "pair": Variant(best_pair, 2, True),
    "top2": Variant(top_two, 2, False),
    "single": Variant(best_single, 1, True),
}
