"""Adam in tanh space, image by image: what Carlini and Wagner's three attacks share.

An image is x' = (tanh(w) + 1) / 2, so that it lies in [0, 1] whatever w is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unfool.progress import Progress

BETAS, TINY = (0.9, 0.999), 1e-8  # Adam's usual ones
ROUNDING = 1e-5  # a smaller margin between two logits may change sign in a batch of another size


class Descent:
    """All images of one call, and how far each has come: tensors with a row per image.

    Attributes:
        aim, sign: the class to reach (sign 1) or to leave (sign -1) of each image, (N,).
        live: the images that are not finished, (N,) bool.
        kappa: by how much the margin must be exceeded.
        w, m, v: the image in tanh space, and Adam's two moments of it, (N, C, H, W).
        lr: Adam's learning rate for each image, (N, 1, 1, 1), in units of w.
        steps: how many Adam has taken since it was last at rest, (N,) int64.
        best: the nearest image that fools the model so far, x while there is none.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, aim: Tensor, sign: int, live: Tensor, kappa: float,
        lr: float, squeeze: float, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.aim, self.sign, self.live = model, aim, sign, live
        self.kappa, self.squeeze, self.progress = kappa, squeeze, progress
        self.x, self.best = x.detach(), x.detach().clone()
        self.w = self.to_w(self.x)
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.lr = x.new_full((len(x), 1, 1, 1), lr)
        self.steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.attacked = int(live.sum())

    def to_w(self, images: Tensor) -> Tensor:
        """Return where the descent to or from these images starts."""
        return ((2 * images - 1) * self.squeeze).atanh()

    def margin(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return by how much the wrong class leads in these images of the rows, (n,)."""
        return self.sign * lead(self.model(images), self.aim[rows])

    def descend(self, rows: Tensor, gradient: Tensor) -> None:
        """Take a step of Adam (Kingma and Ba 2015), each image by its own count of steps."""
        self.steps[rows] += 1
        first, second = BETAS
        m = self.m[rows].lerp_(gradient, 1 - first)
        v = self.v[rows].lerp_(gradient.square(), 1 - second)
        t = self.steps[rows].view(-1, 1, 1, 1)
        change = (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + TINY)
        self.w[rows] -= self.lr[rows] * change
        self.m[rows], self.v[rows] = m, v

    def rest(self, rows: Tensor) -> None:
        """Put Adam at rest for these images."""
        self.m[rows], self.v[rows], self.steps[rows] = 0.0, 0.0, 0


def lead(logits: Tensor, classes: Tensor) -> Tensor:
    """Return by how much each image's class leads the best of the others, (N,); < 0: it trails."""
    own = logits.gather(1, classes[:, None]).squeeze(1)
    others = logits.scatter(1, classes[:, None], -torch.inf)
    return own - others.amax(dim=1)
