"""APE-GAN: the purifier's idea three years before the paper (Shen et al. 2017).

A small encoder and decoder is trained from adversarial to clean images by the mean squared error
and by a discriminator. Beside the paper's purifier (`pix2pix`) it has no skip connections, its
discriminator sees one image and not a pair, and judges it as a whole and not in patches.

The weights of the losses are theirs; what they leave open is as in the public re-implementation
owruby/APE-GAN. Carlini and Wagner 2017 broke it ("MagNet and ... are not robust").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer

from unfool.defenses.pix2pix import bce
from unfool.devices import find_device
from unfool.inputs import check_number
from unfool.progress import Progress
from unfool.training import History, fit

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What an APE-GAN is trained with.

    Attributes:
        width: channels of the outer layers of both networks.
        mse, gan: weights of the generator's two losses, pixels in [0, 1].
        generator_steps: updates of the generator per update of the discriminator.
        epochs: passes over the pairs.
        batch_size: pairs per step.
        rate: Adam's learning rate, for both networks.
    """

    width: int = 64
    mse: float = 0.7
    gan: float = 0.3
    generator_steps: int = 2
    epochs: int = 2
    batch_size: int = 128
    rate: float = 2e-4

    def __post_init__(self) -> None:
        for name in ("width", "generator_steps", "epochs", "batch_size"):
            check_number(name, getattr(self, name), 1, whole=True)
        for name in ("mse", "gan", "rate"):
            check_number(name, getattr(self, name), 0)


class ApeGAN(nn.Module):
    """Generator: (N, C, H, W) in [0, 1] -> the same; both sides must be multiples of 4."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2] % 4 or images.shape[-1] % 4:
            raise ValueError(
                "APE-GAN halves images twice: sides must be multiples of 4, not "
                f"{images.shape[-2]}x{images.shape[-1]}: pad or resize them"
            )
        made: Tensor = (self.net(2 * images - 1) + 1) / 2
        return made


def discriminator(shape: tuple[int, int, int], width: int = 64) -> nn.Module:
    """Return D: images (N, C, H, W) in [0, 1] -> a logit each (N, 1), positive for "clean"."""
    channels, height, wide = shape
    flat = 4 * width * math.ceil(height / 8) * math.ceil(wide / 8)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(flat, 1),
    )  # fmt: skip


def train(
    adversarial: Tensor, clean: Tensor, settings: Settings, *, seed: int = 0,
    device: torch.device | str = "cpu", checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[ApeGAN, History]:  # fmt: skip
    """Train on pairs; return the generator in eval mode with each epoch's mean losses.

    Args and errors as `pix2pix.train`, whose guided loss and `after_epoch` it does not have.
    """
    if adversarial.shape != clean.shape or len(clean) == 0:
        raise ValueError(
            f"APE-GAN learns from pairs of equal shape: got {tuple(adversarial.shape)} adversarial "
            f"and {tuple(clean.shape)} clean images"
        )
    device = find_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        g = ApeGAN(clean.shape[1], settings.width).to(device)
        d = discriminator((clean.shape[1], clean.shape[2], clean.shape[3]), settings.width).to(
            device
        )
    modules: dict[str, nn.Module] = {"generator": g, "discriminator": d}
    optimizers: dict[str, Optimizer] = {
        name: Adam(module.parameters(), settings.rate, betas=(0.5, 0.999))
        for name, module in modules.items()
    }

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            made = g(x)
        terms = {"d": bce(d(y), 1.0) + bce(d(made), 0.0)}
        _update(optimizers["discriminator"], terms["d"])
        d.requires_grad_(False)  # the generator's steps need no gradient of its weights
        for _ in range(settings.generator_steps):
            made = g(x)
            terms |= {
                "mse": settings.mse * mse_loss(made, y),
                "gan": settings.gan * bce(d(made), 1.0),
            }
            _update(optimizers["generator"], terms["mse"] + terms["gan"])
        d.requires_grad_(True)
        return {name: term.detach() for name, term in terms.items()}

    history = fit(
        step, modules, optimizers, [adversarial, clean], epochs=settings.epochs,
        batch_size=settings.batch_size, seed=seed, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return g, history


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
