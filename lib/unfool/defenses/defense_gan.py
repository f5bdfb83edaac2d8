"""Defense-GAN: show the classifier the nearest image that a generator can make (Samangouei 2018).

A generator trained on clean images can make nothing else, so what it makes nearest to an attacked
image should be the image without the attack:

    z* = arg min_z  mean of (G(z) - x)^2 over the pixels,    and G(z*) goes to the classifier.

The minimum is sought by gradient descent with momentum from several starts. Nothing is trained but
the generator (`wgan_gp`), and no attack and no classifier takes part in that. No gradient leads
through the search, which stops gradients and not attackers: Athalye et al. 2018 replace the search
by the identity on the way back, and results/make_in_z.py does so, too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unfool.defenses.wgan_gp import Generator
from unfool.inputs import check_number, frozen

CPU_ROWS = 128  # starts that descend at once; measured: 64 to 512 take the same time for each
GPU_ROWS = 4096
FAR = 100.0  # length of z; a start is about 1 long, where it ends about 5
GREW = 1.01  # times the error at the start: more than rounding
SLOW_AFTER, SLOWER = 0.8, 0.1  # at 80 % of the steps the rate falls to a tenth


@dataclass(frozen=True)
class Settings:
    """How the nearest image is sought; the defaults are the authors' for MNIST.

    Attributes:
        steps: L, gradient steps from each start.
        restarts: R, starts; the one that ends nearest to the image is kept.
        rate: step length on the gradient of an image's mean squared error.
        momentum: share of the last step that is added to the next.
    """

    steps: int = 200
    restarts: int = 10
    rate: float = 10.0
    momentum: float = 0.7

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 1, whole=True)
        check_number("restarts", self.restarts, 1, whole=True)
        check_number("rate", self.rate, 0)
        check_number("momentum", self.momentum, 0, 1)
        if self.rate == 0:
            raise ValueError("rate must be above 0, not 0: the search would stay at its starts")


class DefenseGAN(nn.Module):
    """Purifier: (N, C, H, W) in [0, 1] -> the nearest images that the generator makes, detached.

    All images descend from the same starts, z ~ N(0, 1/latent), drawn once from `seed`. So what
    becomes of an image depends neither on its batch nor on its place there.

    Args:
        generator: noise (N, latent) -> images in [0, 1]; a `wgan_gp.Generator`, or any module with
            its attribute `latent`. It is used in eval mode and comes back as it was.
        settings: see `Settings`.
        seed: of the starts.
    """

    starts: Tensor

    def __init__(
        self, generator: Generator, settings: Settings | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.generator, self.settings = generator, settings or Settings()
        latent = generator.latent
        drawn = torch.Generator().manual_seed(seed)
        starts = torch.randn(self.settings.restarts, latent, generator=drawn) / latent**0.5
        weight = next(generator.parameters())
        self.register_buffer("starts", starts.to(weight))
        with torch.no_grad(), frozen(generator):
            self.shape = tuple(generator(self.starts[:1]).shape[1:])

    def forward(self, images: Tensor) -> Tensor:
        return self.reconstruct(images)[0]

    def errors(self, images: Tensor) -> Tensor:
        """Return how far each image is from what the generator makes: mean squared error, (N,)."""
        return self.reconstruct(images)[1]

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest images (N, C, H, W) in [0, 1] and their mean squared errors (N,).

        Costs `restarts` x `steps` passes back through the generator for each image, and
        `restarts` x (`steps` + 1) forward. A start that diverges is not chosen.

        Raises:
            ValueError: images of another shape than the generator makes.
            FloatingPointError: the search diverged for more than half of the images: its error is
                not finite, or larger than where it started, or z lies beyond all that a generator
                knows. One whose pixels are bounded hides that: its images stay in [0, 1] wherever
                z has gone. Of fewer images a warning tells the share.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"this generator makes images (N, {', '.join(map(str, self.shape))}), not "
                f"{tuple(images.shape)}: train one on images of that shape"
            )
        rows = CPU_ROWS if self.starts.device.type == "cpu" else GPU_ROWS
        with frozen(self.generator):
            parts = [
                self._nearest(part.detach())
                for part in images.split(max(1, rows // len(self.starts)))
            ]
        made, errors, first = (torch.cat(column) for column in zip(*parts, strict=True))
        self._tell_of_diverged(errors, first)
        return made, errors

    def _tell_of_diverged(self, errors: Tensor, first: Tensor) -> None:
        """Warn of images whose error grew, (N,) each; refuse to go on where most did."""
        n, lost = len(errors), int((~(errors <= GREW * first)).sum())
        if not lost:
            return
        said = (
            f"the search diverged from all {len(self.starts)} starts for {lost} of {n} images: "
            f"lower the rate {self.settings.rate:g}"
        )
        if 2 * lost > n:
            raise FloatingPointError(said)
        warnings.warn(f"{said}; here they are no reconstruction", stacklevel=3)

    def _nearest(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Descend from all starts of a few images at once; return what ended nearest to each.

        That is the image, its error, and the error of the start that it came from.
        """
        n, restarts = len(images), len(self.starts)
        x = images.repeat_interleave(restarts, dim=0)
        z, first = self._descend(self.starts.repeat(n, 1), x)
        with torch.no_grad():
            made = self.generator(z)
            errors = _errors(made, x)
            errors[~(z.norm(dim=1) <= FAR)] = torch.inf  # NaN, too
            errors = errors.view(n, restarts)
        best = errors.nan_to_num(nan=torch.inf).min(dim=1)
        chosen = torch.arange(n, device=z.device) * restarts + best.indices
        return made[chosen].nan_to_num(), best.values, first[chosen]

    def _descend(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the starts z end, and the errors that they began with, a row each."""
        step, first = torch.zeros_like(z), z[:, 0]
        for index in range(self.settings.steps):
            z = z.detach().requires_grad_(True)
            with torch.enable_grad():  # also where the caller wants no gradient
                # Each row's error depends on its own z alone, so one pass gives every gradient.
                errors = _errors(self.generator(z), x)
                (slope,) = torch.autograd.grad(errors.sum(), z)
            first = errors.detach() if index == 0 else first
            late = index >= SLOW_AFTER * self.settings.steps
            step = self.settings.momentum * step + slope
            z = z.detach() - self.settings.rate * (SLOWER if late else 1.0) * step
        return z, first


def _errors(made: Tensor, x: Tensor) -> Tensor:
    return (made - x).square().flatten(1).mean(dim=1)
