"""A denoiser: an autoencoder that learns to remove noise, and nothing else.

The last of the washers, and the only one that learns. It is shown clean images with random noise
added and asked for the clean ones (Vincent et al. 2008; Meng and Chen 2017 use such networks
against attacks in MagNet). No attack and no classifier takes part, so it is the control for the
purifier: what that does better, it owes to adversarial images. The network is the purifier's own
U-Net, so that the two differ in their pairs, and in the discriminator, alone.

Explained in notebook 05.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam

from unfool.defenses.pix2pix import UNet
from unfool.devices import find_device
from unfool.progress import Progress
from unfool.training import History, constant_then_linear, fit

VERSION = 3
NOISES = ("gaussian", "uniform")


@dataclass(frozen=True)
class Settings:
    """What a denoiser is trained with.

    Attributes:
        noise: "gaussian", of standard deviation `size`; or "uniform", from -size to size.
        size: of the noise, in units of the [0, 1] range. At size = epsilon the gaussian kind is as
            long (in L2) as a perturbation that moves every pixel by epsilon.
        width: channels of the U-Net's first layer.
        epochs: passes over the images, each with fresh noise.
        batch_size: images per step.
        rate: Adam's learning rate, held for half of the epochs, then falling straight to 0.
    """

    noise: str = "gaussian"
    size: float = 0.15
    width: int = 64
    epochs: int = 20
    batch_size: int = 32
    rate: float = 2e-4

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ValueError(f"unknown noise {self.noise!r}: choose from {', '.join(NOISES)}")
        if not 0 < self.size <= 1:
            raise ValueError(f"size of the noise is above 0 and at most 1, not {self.size}")


def noisy(images: Tensor, noise: str, size: float) -> Tensor:
    """Return images (N, C, H, W) in [0, 1] with noise added, clipped to [0, 1].

    Drawn from torch's global generator, on the CPU: the training loop seeds it for every epoch.
    """
    if noise == "gaussian":
        drawn = size * torch.randn(images.shape)
    else:
        drawn = size * (2 * torch.rand(images.shape) - 1)
    return (images + drawn.to(images)).clamp(0, 1)


def train(
    images: Tensor,
    settings: Settings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[UNet, History]:
    """Train a denoiser on clean images; return it in eval mode with the mean L1 of each epoch.

    Args:
        images: clean, (N, C, H, W) float32 in [0, 1].
        settings: see `Settings`.
        seed: of initial weights, shuffling and noise.
        device: where to train.
        checkpoint: file for resuming.
        progress: called after every step.

    Raises:
        ValueError: no images.
    """
    device = find_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        net = UNet(images.shape[1], settings.width).to(device)
    optimizer = Adam(net.parameters(), settings.rate, betas=(0.5, 0.999), fused=True)

    def step(clean: Tensor) -> dict[str, Tensor]:
        cleaned = net(noisy(clean, settings.noise, settings.size))
        loss = nn.functional.l1_loss(cleaned, clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"l1": loss.detach()}

    history = fit(
        step,
        {"net": net},
        {"net": optimizer},
        [images],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        learning_rate=constant_then_linear,
        checkpoint=checkpoint,
        progress=progress,
    )
    return net, history
