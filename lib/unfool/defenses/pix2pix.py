"""The paper's purifier: pix2pix from adversarial to clean images (Yu et al. 2020, Section 4).

`UNet` is the generator G, `PatchGAN` the discriminator D. A training pair is (x, y): an adversarial
image and the clean one it was made from. G learns y from x under three losses (equation 11):

    G* = arg min_G max_D  L_cGAN(G, D)  +  lambda L1(G)  +  mu L_f(G)

Architecture and defaults are those of Isola et al. 2017 and their code, at 32x32 instead of
256x256: five halvings instead of eight, and hence no dropout (pix2pix drops out only in the middle
blocks that 32x32 images do not have). Explained in notebook 07.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, pad
from torch.optim import Adam, Optimizer

from unfool.devices import find_device
from unfool.inputs import (
    check_choice,
    check_device,
    check_images,
    check_number,
    check_range,
    frozen,
)
from unfool.progress import Progress
from unfool.training import History, constant_then_linear, fit

VERSION = 3
DOWNS = 5  # 32 -> 16 -> 8 -> 4 -> 2 -> 1
Guide = Callable[..., Tensor]
"""L_f: (purified, clean), both (N, C, H, W) in [0, 1], and (N,) true classes if given -> scalar."""


@dataclass(frozen=True)
class Settings:
    """What a purifier is trained with; the defaults are pix2pix's where it has one.

    Attributes:
        width: channels of the generator's first layer (pix2pix: 64).
        discriminator_width: channels of the discriminator's first layer (pix2pix: 64).
        patch_layers: strided layers of the discriminator: a patch of 16, 34 or 70 pixels for 1, 2
            or 3. pix2pix has 3, whose patch is larger than a 32x32 image; 1 is a real patch here.
        lam: lambda, the weight of L1 on the [-1, 1] scale.
        mu: weight of the classifier-guided loss; 0 leaves it out.
        guide: which L_f, a key of `GUIDES`; without meaning while mu is 0.
        adversarial: False trains on L1 (and L_f) alone, without a discriminator.
        skips: False cuts the U-Net's skip connections.
        identity: True adds each clean image once as a pair of its own, (y, y); the paper is silent.
        epochs: passes over the pairs.
        batch_size: pairs per step (pix2pix: 1).
        rate: Adam's learning rate, held for half of the epochs, then falling straight to 0.
    """

    width: int = 64
    discriminator_width: int = 64
    patch_layers: int = 1
    lam: float = 100.0
    mu: float = 0.0
    guide: str = "clean"
    adversarial: bool = True
    skips: bool = True
    identity: bool = False
    epochs: int = 20
    batch_size: int = 32
    rate: float = 2e-4

    def __post_init__(self) -> None:
        for name in ("lam", "mu"):
            check_number(name, getattr(self, name), 0)
        check_choice("guide", self.guide, tuple(GUIDES))

    def named(self) -> dict[str, Any]:
        """Return the settings that matter, by name: without a weight no guide is asked."""
        return {k: v for k, v in asdict(self).items() if self.mu or k != "guide"}


class UNet(nn.Module):
    """Generator: (N, C, H, W) in [0, 1] -> the same shape and range.

    Sizes that are not a multiple of 32 are padded with black and cropped back. In eval mode batch
    norm uses its running statistics, so that an image's output does not depend on its batch.
    """

    def __init__(self, channels: int, width: int = 64, skips: bool = True) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(DOWNS)]  # 64, 128, 256, 512, 512
        self.channels, self.skips = channels, skips
        self.downs = nn.ModuleList(
            _down(a, b, first=i == 0, norm=0 < i < DOWNS - 1)
            for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        joined = 2 if skips else 1  # a skip doubles the channels that come in
        self.ups = nn.ModuleList([_up(widths[-1], widths[-2])])
        for i in range(DOWNS - 2, 0, -1):
            self.ups.append(_up(joined * widths[i], widths[i - 1]))
        self.last = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(joined * width, channels, 4, 2, 1), nn.Tanh()
        )
        self.apply(_start)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"this generator takes images (N, {self.channels}, H, W), not "
                f"{tuple(images.shape)}: build one for their channels"
            )
        check_device(self, images, "this generator")
        x, crop = _padded(images)
        x = 2 * x - 1
        seen: list[Tensor] = []
        for down in self.downs:
            x = down(x)
            seen.append(x)  # width 16 at 16x16, 32 at 8x8, ... for width 16
        seen.pop()
        for up in self.ups:
            x = up(x)
            skip = seen.pop()
            x = torch.cat([x, skip], dim=1) if self.skips else x
        return crop((self.last(x) + 1) / 2)


def with_batch_statistics(generator: UNet) -> UNet:
    """Return a copy whose batch norm asks the batch at hand, in eval mode, too, as pix2pix's does.

    What it makes of an image then depends on the images beside it.
    """
    made = copy.deepcopy(generator)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):  # without running ones torch takes the batch's
            module.running_mean = module.running_var = None
    return made


class PatchGAN(nn.Module):
    """Discriminator: (adversarial, candidate) images in [0, 1] -> a logit per patch (N, 1, h, w).

    A positive logit says "this patch is a real clean image". It is conditional: both images are
    seen together.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 1) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(2 * channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        inputs = width
        for i in range(1, layers + 1):
            outputs = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2),
            ]
            inputs = outputs
        self.net = nn.Sequential(*parts, nn.Conv2d(inputs, 1, 4, 1, 1))
        self.apply(_start)

    def forward(self, adversarial: Tensor, candidate: Tensor) -> Tensor:
        logits: Tensor = self.net(2 * torch.cat([adversarial, candidate], dim=1) - 1)
        return logits


@torch.no_grad()
def shapes(generator: UNet, image: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shapes (C, H, W) from the padded input to the output, block by block."""
    x, _ = _padded(torch.zeros(1, *image))
    found = [tuple(x.shape[1:])]
    blocks = [*generator.downs, *generator.ups, generator.last]
    # A hook is called with what a block puts out.
    hooks = [
        block.register_forward_hook(lambda block, given, out: found.append(tuple(out.shape[1:])))
        for block in blocks
    ]
    generator(x)
    for hook in hooks:
        hook.remove()
    return found


def discriminator_loss(
    discriminator: PatchGAN, adversarial: Tensor, clean: Tensor, purified: Tensor
) -> Tensor:
    """Equation 7 as D sees it: call (x, y) real and (x, G(x)) fake.

    `purified` is detached: this step must not move the generator. Halved as in pix2pix, which slows
    D down relative to G.
    """
    real = discriminator(adversarial, clean)
    fake = discriminator(adversarial, purified.detach())
    return 0.5 * (bce(real, 1.0) + bce(fake, 0.0))


def generator_loss(
    discriminator: PatchGAN | None,
    adversarial: Tensor,
    clean: Tensor,
    purified: Tensor,
    *,
    lam: float = 100.0,
    mu: float = 0.0,
    guide: Guide | None = None,
) -> dict[str, Tensor]:
    """Equations 9 and 11: the weighted terms "gan", "l1", "guide" of what G minimises.

    G wants D to call its output real (the non-saturating form), to stay near the clean image in L1
    (on the [-1, 1] scale, as pix2pix has it), and, with mu > 0, to be classified like it.
    """
    terms = {"l1": lam * 2 * (clean - purified).abs().mean()}
    if discriminator is not None:
        terms["gan"] = bce(discriminator(adversarial, purified), 1.0)
    if mu:
        if guide is None:
            raise ValueError(f"mu={mu} needs a guide: the loss L_f that a classifier gives")
        terms["guide"] = mu * guide(purified, clean)
    return terms


def train_step(
    generator: UNet,
    discriminator: PatchGAN | None,
    optimizers: dict[str, Optimizer],
    adversarial: Tensor,
    clean: Tensor,
    *,
    lam: float = 100.0,
    mu: float = 0.0,
    guide: Guide | None = None,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """One update of D, then one of G, on a batch of pairs; return the losses."""
    losses: dict[str, Tensor] = {}
    purified = generator(adversarial)
    if discriminator is not None:
        loss = discriminator_loss(discriminator, adversarial, clean, purified)
        _update(optimizers["discriminator"], loss)
        losses["d"] = loss.detach()
        discriminator.requires_grad_(False)  # G's step needs no gradient of D's weights
    ask = guide if guide is None or labels is None else partial(guide, labels=labels)
    terms = generator_loss(discriminator, adversarial, clean, purified, lam=lam, mu=mu, guide=ask)
    _update(optimizers["generator"], torch.stack(list(terms.values())).sum())
    if discriminator is not None:
        discriminator.requires_grad_(True)
    return losses | {name: term.detach() for name, term in terms.items()}


def _to_label(made: Tensor, clean: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("the guide 'label' needs the true classes: give labels, (N,) int64")
    check_range(labels, made.shape[1], "labels")
    return cross_entropy(made, labels)


def _to_distribution(made: Tensor, clean: Tensor, labels: Tensor | None) -> Tensor:
    return kl_div(made.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean")


GUIDES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "clean": lambda made, clean, labels: cross_entropy(made, clean.argmax(dim=1)),
    "label": _to_label,
    "kl": _to_distribution,
    "logits": lambda made, clean, labels: (made - clean).abs().mean(),
}
"""Readings of L_f (equation 10), from the logits of purified and clean images, and true classes.

"clean": cross-entropy to the class that the classifier gives the clean image, the paper's own
words. "label": cross-entropy to the true class. "kl": divergence from the clean image's
probabilities. "logits": mean difference of logits, the loss of Liao et al. 2018 (HGD), who guided a
denoiser by the classifier before the paper did.
"""


def guided_by(classifier: nn.Module, kind: str = "clean") -> Guide:
    """Return L_f as `classifier` gives it; see `GUIDES`.

    The classifier is frozen and in eval mode while it is asked, and comes back as it was: only G
    learns.

    Raises:
        ValueError: no guide of that name; or, when it is asked, images on another device.
    """
    check_choice("guide", kind, tuple(GUIDES))

    def guide(purified: Tensor, clean: Tensor, labels: Tensor | None = None) -> Tensor:
        for images in (purified, clean):
            check_device(classifier, images, "the guide's classifier")
        with frozen(classifier):
            with torch.no_grad():
                wanted = classifier(clean)
            return GUIDES[kind](classifier(purified), wanted, labels)

    return guide


def train(
    adversarial: Tensor,
    clean: Tensor,
    settings: Settings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    guide: Guide | None = None,
    labels: Tensor | None = None,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int, UNet], None] | None = None,
    progress: Progress | None = None,
) -> tuple[UNet, History]:
    """Train a purifier on pairs; return it in eval mode with the mean losses of each epoch.

    In float32 on every device, unlike classifiers of colour images, which a GPU trains in bfloat16:
    so that records of all devices stay comparable. In bfloat16 a step on 2 cores handles 14 to 29 %
    more images a second (`benchmarks/README.md`), of a training that takes seconds to minutes.

    Args:
        adversarial, clean: (N, C, H, W) float32 in [0, 1]; row i of both is one pair. They and
            `labels` may lie elsewhere than `device`, together: they are moved batch by batch.
        settings: see `Settings`.
        seed: of initial weights and shuffling.
        device: where to train; a guide's classifier must be there.
        guide: L_f, needed when `settings.mu` > 0; see `guided_by`.
        labels: true classes (N,), int64; only the guide "label" asks for them.
        checkpoint: file for resuming.
        after_epoch: called with the epochs done and the generator in eval mode.
        progress: called after every step.

    Raises:
        ValueError: no pairs (did the attack succeed at all?), shapes or devices that differ, pixels
            that are not in [0, 1], or a GPU that is not there.
    """
    if adversarial.shape != clean.shape or len(clean) == 0:
        raise ValueError(
            f"a purifier learns from pairs of equal shape: got {tuple(adversarial.shape)} "
            f"adversarial and {tuple(clean.shape)} clean images"
            + ("; no attack succeeded: raise its strength" if len(clean) == 0 else "")
        )
    for name, other in {"clean": clean, "labels": labels}.items():
        if other is not None and other.device != adversarial.device:
            raise ValueError(
                f"{name} is on {other.device} and adversarial on {adversarial.device}: move one "
                "with .to(device)"
            )
    for images in (adversarial, clean):
        check_images(images)
    if settings.identity:
        once, which = clean.unique(dim=0, return_inverse=True)
        adversarial, clean = torch.cat([adversarial, once]), torch.cat([clean, once])
        if labels is not None:
            theirs = labels.new_empty(len(once)).scatter_(0, which, labels)
            labels = torch.cat([labels, theirs])
    device = find_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        generator = UNet(clean.shape[1], settings.width, settings.skips).to(device)
        discriminator = None
        if settings.adversarial:
            discriminator = PatchGAN(
                clean.shape[1], settings.discriminator_width, settings.patch_layers
            ).to(device)
    modules: dict[str, nn.Module] = {"generator": generator}
    if discriminator is not None:
        modules["discriminator"] = discriminator
    optimizers: dict[str, Optimizer] = {
        name: Adam(module.parameters(), settings.rate, betas=(0.5, 0.999), fused=True)
        for name, module in modules.items()
    }

    def step(x: Tensor, y: Tensor, *known: Tensor) -> dict[str, Tensor]:
        return train_step(
            generator, discriminator, optimizers, x, y,
            lam=settings.lam, mu=settings.mu, guide=guide, labels=known[0] if known else None,
        )  # fmt: skip

    history = fit(
        step,
        modules,
        optimizers,
        [adversarial, clean] if labels is None else [adversarial, clean, labels],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        learning_rate=constant_then_linear,
        checkpoint=checkpoint,
        after_epoch=None if after_epoch is None else lambda done: after_epoch(done, generator),
        progress=progress,
    )
    return generator, history


def _down(inputs: int, outputs: int, *, first: bool, norm: bool) -> nn.Module:
    parts: list[nn.Module] = [] if first else [nn.LeakyReLU(0.2)]
    parts.append(nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False))
    return nn.Sequential(*parts, *([nn.BatchNorm2d(outputs)] if norm else []))


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _start(module: nn.Module) -> None:
    """pix2pix's initial weights: N(0, 0.02) for convolutions, N(1, 0.02) for batch norm."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _padded(images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Pad with black to multiples of 2**DOWNS; return the function that crops back, too."""
    height, width = images.shape[-2:]
    unit = 2**DOWNS
    down, right = -height % unit, -width % unit
    top, left = down // 2, right // 2
    x = pad(images, (left, right - left, top, down - top)) if down or right else images
    return x, lambda y: y[..., top : top + height, left : left + width]


def bce(logits: Tensor, label: float) -> Tensor:
    """Return the mean cross-entropy of patch logits against one label, 1 (real) or 0 (fake)."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
