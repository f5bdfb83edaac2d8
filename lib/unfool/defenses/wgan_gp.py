"""WGAN-GP: a generator of images from noise, trained against a critic (Gulrajani et al. 2017).

The critic scores a sample with any number, not a probability. Kept to slopes near 1, the gap
between its mean scores estimates the Wasserstein distance between real and made samples: how far
probability has to be carried. That gap has a slope wherever the generator stands, which is what
helps against mode collapse.

The losses and `train_step` work on rows of any shape, points in the plane as well as images.
Architecture and settings for images are those of Defense-GAN's code (Samangouei et al. 2018), with
one repair: there the penalty takes the gradient's norm over one axis of an image, here over all of
its pixels. Explained in notebook 06.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from unfool.devices import find_device
from unfool.progress import Progress
from unfool.training import History, fit

VERSION = 1
START = 4  # the generator grows 4x4 to a quarter of the image, to a half, to the image
LARGEST = 8 * START


@dataclass(frozen=True)
class Settings:
    """What a WGAN-GP is trained with; the defaults are Defense-GAN's, its 200,000 steps aside.

    Attributes:
        latent: length of the noise vector z.
        width: channels of the generator's last hidden and of the critic's first layer.
        critic_steps: updates of the critic per update of the generator.
        penalty: lambda, the weight of the gradient penalty.
        epochs: passes over the images; each image is seen by the critic once in a pass.
        batch_size: images per update.
        rate: Adam's learning rate, for both networks.
        betas: Adam's memory of the gradient and of its square.
    """

    latent: int = 128
    width: int = 64
    critic_steps: int = 5
    penalty: float = 10.0
    epochs: int = 40
    batch_size: int = 50
    rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)


class Generator(nn.Module):
    """Generator: noise (N, latent), standard normal -> images (N, C, H, W) in [0, 1].

    Raises:
        ValueError: height or width is not a multiple of 4, or above 32.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int = 128, width: int = 64) -> None:
        super().__init__()
        channels, height, wide = shape
        if height % 4 or wide % 4 or not 0 < max(height, wide) <= LARGEST:
            raise ValueError(
                f"the generator makes images whose sides are multiples of 4 up to {LARGEST}, not "
                f"{height}x{wide}: pad or resize them"
            )
        self.latent, self.width = latent, width
        self.quarter = height // 4, wide // 4
        self.start = nn.Linear(latent, 4 * width * START * START)
        self.grow = nn.ModuleList([_double(4 * width, 2 * width), _double(2 * width, width)])
        self.last = _double(width, channels)

    def forward(self, z: Tensor) -> Tensor:
        x = torch.relu(self.start(z)).view(len(z), 4 * self.width, START, START)
        x = torch.relu(self.grow[0](x))[..., : self.quarter[0], : self.quarter[1]]  # 8x8, cut to 7
        x = torch.relu(self.grow[1](x))
        return torch.sigmoid(self.last(x))

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return z for n images, (n, latent), drawn on the CPU from `generator`."""
        z = torch.randn(n, self.latent, generator=generator)
        return z.to(self.start.weight.device)


class Critic(nn.Module):
    """Critic: images (N, C, H, W) in [0, 1] -> scores (N, 1), higher for what looks real.

    No batch norm: the penalty asks for the slope at each image alone.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, height, wide = shape
        flat = 4 * width * math.ceil(height / 8) * math.ceil(wide / 8)
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 5, 2, 2), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 5, 2, 2), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 5, 2, 2), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(flat, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images)
        return scores


def gradient_penalty(critic: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Return how far the critic's slope is from 1, halfway between real and made samples.

    At a random point between each pair, the norm of the score's gradient over all of a sample's
    numbers; the mean of its squared distance from 1 (Gulrajani et al. 2017, equation 3).

    Args:
        critic: samples -> one score each.
        real, made: samples of equal shape (N, …); no gradient flows into them.
    """
    t = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
    between = (t * real + (1 - t) * made).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def critic_loss(
    critic: nn.Module, real: Tensor, made: Tensor, *, penalty: float = 10.0
) -> dict[str, Tensor]:
    """Return the terms "gap" and "penalty" of what the critic minimises.

    The gap is mean score of made minus of real samples: its negative estimates the Wasserstein
    distance. `made` is detached: this step must not move the generator.
    """
    made = made.detach()
    gap = critic(made).mean() - critic(real).mean()
    return {"gap": gap, "penalty": penalty * gradient_penalty(critic, real, made)}


def train_step(
    generator: nn.Module,
    critic: nn.Module,
    optimizers: dict[str, Optimizer],
    real: Tensor,
    noise: Callable[[int], Tensor],
    *,
    critic_steps: int = 5,
    penalty: float = 10.0,
) -> dict[str, Tensor]:
    """Update the critic on each of `critic_steps` parts of a batch, then the generator once.

    Args:
        generator, critic: noise -> samples, samples -> scores.
        optimizers: "generator" and "critic".
        real: samples (N, …), cut into `critic_steps` parts.
        noise: called with a number, returns that many rows of noise.
        critic_steps, penalty: see `Settings`.

    Returns:
        The last "gap" and "penalty", see `critic_loss`, and "generator", minus the mean score of
        what it made.
    """
    terms: dict[str, Tensor] = {}
    for part in real.chunk(critic_steps):
        with torch.no_grad():
            made = generator(noise(len(part)))
        terms = critic_loss(critic, part, made, penalty=penalty)
        _update(optimizers["critic"], terms["gap"] + terms["penalty"])
    critic.requires_grad_(False)  # the generator's step needs no gradient of the critic's weights
    loss = -critic(generator(noise(len(part)))).mean()
    _update(optimizers["generator"], loss)
    critic.requires_grad_(True)
    return {name: term.detach() for name, term in terms.items()} | {"generator": loss.detach()}


def train(
    images: Tensor,
    settings: Settings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    after_epoch: Callable[[int, Generator], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Generator, History]:
    """Train a generator on images; return it in eval mode with the mean losses of each epoch.

    Args:
        images: (N, C, H, W) float32 in [0, 1].
        settings: see `Settings`.
        seed: of initial weights, shuffling, noise and the points of the penalty.
        device: where to train.
        checkpoint: file for resuming; it holds both networks.
        after_epoch: called with the epochs done and the generator in eval mode.
        progress: called after every step.

    Raises:
        ValueError: values outside of [0, 1], sides that the generator can't make, or settings out
            of range.
    """
    _check(images, settings)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    device = find_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        generator = Generator(shape, settings.latent, settings.width).to(device)
        critic = Critic(shape, settings.width).to(device)
    modules: dict[str, nn.Module] = {"generator": generator, "critic": critic}
    optimizers: dict[str, Optimizer] = {
        name: Adam(module.parameters(), settings.rate, betas=settings.betas)
        for name, module in modules.items()
    }

    def step(real: Tensor) -> dict[str, Tensor]:
        return train_step(
            generator, critic, optimizers, real, generator.noise,
            critic_steps=settings.critic_steps, penalty=settings.penalty,
        )  # fmt: skip

    history = fit(
        step,
        modules,
        optimizers,
        [images],
        epochs=settings.epochs,
        batch_size=settings.critic_steps * settings.batch_size,  # no counter to save: one G update
        seed=seed,
        checkpoint=checkpoint,
        after_epoch=None if after_epoch is None else lambda done: after_epoch(done, generator),
        progress=progress,
    )
    return generator, history


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 5, 2, 2, output_padding=1)


def _check(images: Tensor, settings: Settings) -> None:
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be (N, C, H, W) with N > 0, not {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # catches NaN, too
        raise ValueError(
            f"images must lie in [0, 1], not [{low:g}, {high:g}]: the generator ends in a sigmoid"
        )
    for name in ("latent", "width", "critic_steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be >= 1, not {getattr(settings, name)}")
    if settings.penalty < 0:
        raise ValueError(f"penalty must be >= 0, not {settings.penalty}: it keeps slopes near 1")


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
