"""What attacks share that cross the border again and again and keep the nearest image seen.

Norms are of changes (n, C, H, W), image by image. Their number of values counts each colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unfool.attacks._descent import ROUNDING, lead

SHORTEST = 1e-12  # nothing is divided by less
Norm = Callable[[Tensor], Tensor]  # changes (n, C, H, W) -> their lengths (n,)
Projection = Callable[[Tensor, Tensor], Tensor]  # changes, radii (n,) -> the nearest in the ball


class Nearest:
    """The nearest image seen so far of each image that the model gets right.

    Attributes:
        x: where they came from, (n, C, H, W).
        best: the nearest one that fools the model, or reaches the target; x while there is none.
        distance: how far it is in the attack's norm, (n,); infinite while there is none.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, norm: Norm
    ) -> None:
        self.model, self.x, self.norm = model, x, norm
        self.aim, self.sign = (y, -1) if target is None else (target, 1)
        self.best, self.distance = x.clone(), x.new_full((len(x),), torch.inf)

    def look(self, images: Tensor, gain: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keep what is nearer; return the margins, (n,), and the gradient of `gain(logits)`.

        One pass through the network and back.
        """
        images = images.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(images)
            (gradient,) = torch.autograd.grad(gain(logits).sum(), images)
        return self.keep(images.detach(), logits.detach()), gradient

    def keep(self, images: Tensor, logits: Tensor) -> Tensor:
        """Remember the images that fool the model and are nearer than all before; their margins."""
        margin = self.margin(logits)
        distance = self.norm(images - self.x)
        nearer = (margin > ROUNDING) & (distance < self.distance)
        self.best[nearer], self.distance[nearer] = images[nearer], distance[nearer]
        return margin

    def margin(self, logits: Tensor) -> Tensor:
        """Return by how much the wrong class leads, (n,); up to 0 the model is not fooled."""
        return self.sign * lead(logits, self.aim)

    @torch.no_grad()
    def halve_the_way(self, images: Tensor, project: Projection, times: int) -> Tensor:
        """Go from x towards `images` as far as needed, found by halving; return where that is.

        The way leads through the balls around x: `project` on ever larger ones. Images that do not
        fool the model may end anywhere. Costs times + 1 forward passes.
        """
        self.keep(images, self.model(images))
        change, length = images - self.x, self.norm(images - self.x)
        near, far = torch.zeros_like(length), torch.ones_like(length)
        for _ in range(times):
            middle = (near + far) / 2
            between = (self.x + project(change, middle * length)).clamp(0, 1)
            fools = self.keep(between, self.model(between)) > ROUNDING
            near, far = torch.where(fools, near, middle), torch.where(fools, middle, far)
        return (self.x + project(change, far * length)).clamp(0, 1)


def from_the_right_ones(
    model: nn.Module, x: Tensor, y: Tensor, rows: slice, search: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return x[rows] with `search(indices)` in place of the images that the model gets right.

    The others are fooled already. Costs a forward pass.
    """
    with torch.no_grad():
        right = model(x[rows]).argmax(dim=1) == y[rows]
    result = x[rows].detach().clone()
    if right.any():
        result[right] = search(right.nonzero().flatten() + rows.start)
    return result


def annealed(first: float, last: float, share: float) -> float:
    """Return the value after a share of the steps: from `first` to `last` by half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def per_image(values: Tensor) -> Tensor:
    """Return one value per image, (n,), in a shape that multiplies images."""
    return values.view(-1, 1, 1, 1)


def unit(gradient: Tensor) -> Tensor:
    """Return gradients of L2 length 1; those of length 0 stay."""
    return gradient / per_image(l2(gradient).clamp(min=SHORTEST))


def l0(change: Tensor) -> Tensor:
    """Return how many values change."""
    return (change != 0).flatten(1).sum(dim=1).to(change.dtype)


def l1(change: Tensor) -> Tensor:
    """Return the sum of the absolute changes."""
    return change.abs().flatten(1).sum(dim=1)


def l2(change: Tensor) -> Tensor:
    """Return the Euclidean length."""
    return change.flatten(1).norm(dim=1)


def linf(change: Tensor) -> Tensor:
    """Return the largest absolute change."""
    return change.abs().flatten(1).amax(dim=1)


def keep_largest(change: Tensor, count: Tensor) -> Tensor:
    """Return the change with all but the `count` (n,) largest values 0: onto the L0 ball.

    Of equal ones the first in the image stay, so that there are never more.
    """
    order = change.abs().flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, rank).view_as(change)
    return torch.where(rank < per_image(count), change, 0.0)


def shrink(change: Tensor, radius: Tensor) -> Tensor:
    """Return the nearest change of at most this L1 length, (n,): onto the L1 ball.

    Duchi et al. 2008, figure 1: all values are moved towards 0 by the same amount.
    """
    sizes = change.abs().flatten(1).sort(dim=1, descending=True).values
    excess = sizes.cumsum(dim=1) - radius[:, None]
    count = torch.arange(1, sizes.shape[1] + 1, device=sizes.device)
    last = ((sizes * count > excess).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    by = (excess.gather(1, last) / (last + 1)).clamp(min=0)
    return change.sign() * (change.abs() - per_image(by)).clamp(min=0)


def shorten(change: Tensor, radius: Tensor) -> Tensor:
    """Return the nearest change of at most this L2 length, (n,): onto the L2 ball."""
    return change * per_image((radius / l2(change).clamp(min=SHORTEST)).clamp(max=1))


def clip(change: Tensor, radius: Tensor) -> Tensor:
    """Return the nearest change with no value over the radius, (n,): onto the L-infinity ball."""
    limit = per_image(radius)
    return change.clamp(-limit, limit)
