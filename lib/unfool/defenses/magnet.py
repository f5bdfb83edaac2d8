"""MagNet: refuse what no autoencoder can redraw, and redraw the rest (Meng and Chen 2017).

Autoencoders are trained on clean images with a little noise. What lies near clean images comes out
of them as it went in; what lies far off does not, and is refused (the detectors). What passes goes
through an autoencoder to the classifier (the reformer). No attack takes part in the training.

Architecture and settings are those of the authors' code: two autoencoders for grey images, one for
colour, where detectors ask the classifier, too. One thing differs: noise is drawn afresh at every
step, where their code draws it once for each image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer

from unfool.defenses.denoiser import noisy
from unfool.devices import find_device
from unfool.inputs import check_number, frozen
from unfool.progress import Progress
from unfool.training import History, fit

VERSION = 1
TEMPERATURES = (10.0, 40.0)  # of the detectors in colour that compare the classifier's answers


@dataclass(frozen=True)
class Settings:
    """What MagNet's autoencoders are trained with; the defaults are the authors'.

    Attributes:
        epochs: passes over the images.
        batch_size: images per step.
        rate: Adam's learning rate.
        noise: standard deviation of the noise; None is 0.1 for grey images and 0.025 for colour.
        activity: weight of the sum of all layers' squared outputs in a batch.
        false_positives, joint: see `MagNet`; the autoencoders do not depend on them.
    """

    epochs: int = 100
    batch_size: int = 256
    rate: float = 1e-3
    noise: float | None = None
    activity: float = 1e-9
    false_positives: float = 0.001
    joint: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_number(name, getattr(self, name), 1, whole=True)
        for name in ("rate", "activity"):
            check_number(name, getattr(self, name), 0)
        if self.noise is not None:
            check_number("noise", self.noise, 0, 1)

    def of_training(self) -> dict[str, Any]:
        """Return the settings that the autoencoders depend on, by name."""
        return {k: v for k, v in asdict(self).items() if k not in ("false_positives", "joint")}


class AutoEncoder(nn.Module):
    """Autoencoder: (N, C, H, W) in [0, 1] -> the same; all convolutions 3x3, all outputs sigmoid.

    With `halved`, images pass through half of their height and width, both of which must be even.
    """

    def __init__(self, channels: int, *, halved: bool) -> None:
        super().__init__()
        inner = [nn.AvgPool2d(2), _layer(3, 3), _layer(3, 3), nn.Upsample(scale_factor=2)]
        self.layers = nn.Sequential(
            _layer(channels, 3), *(inner if halved else []), _layer(3, 3), _layer(3, channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.layers(images)
        return made

    def activities(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the output of every convolution, the last of which is the image redrawn."""
        x = images
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Sequential):
                yield x


def autoencoders(channels: int) -> nn.ModuleDict:
    """Return MagNet's fresh autoencoders: "I" (halved) and "II" for grey images, "II" for colour.

    Drawn from torch's global generator.
    """
    names = ("I", "II") if channels == 1 else ("II",)
    return nn.ModuleDict({n: AutoEncoder(channels, halved=n == "I") for n in names})


def train(
    images: Tensor, settings: Settings, *, seed: int = 0, device: torch.device | str = "cpu",
    checkpoint: Path | None = None, progress: Progress | None = None,
) -> tuple[nn.ModuleDict, History]:  # fmt: skip
    """Train MagNet's autoencoders; return them in eval mode with each epoch's mean losses.

    Args as `denoiser.train`: clean images (N, C, H, W) float32 in [0, 1].

    Raises:
        ValueError: no images, or grey ones whose sides are odd.
    """
    channels = images.shape[1]
    if channels == 1 and (images.shape[2] % 2 or images.shape[3] % 2):
        raise ValueError(
            f"MagNet halves grey images, and {images.shape[2]}x{images.shape[3]} pixels cannot be "
            "halved: pad or resize them"
        )
    device = find_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        nets = autoencoders(channels).to(device)
    optimizers: dict[str, Optimizer] = {
        name: Adam(net.parameters(), settings.rate) for name, net in nets.items()
    }
    size = settings.noise if settings.noise is not None else 0.1 if channels == 1 else 0.025

    def step(clean: Tensor) -> dict[str, Tensor]:
        losses = {}
        for name, net in nets.items():
            outputs = list(net.activities(noisy(clean, "gaussian", size)))  # type: ignore[operator]
            error = mse_loss(outputs[-1], clean)
            activity = torch.stack([out.square().sum() for out in outputs]).sum()
            optimizers[name].zero_grad(set_to_none=True)
            (error + settings.activity * activity).backward()
            optimizers[name].step()
            losses[name] = error.detach()
        return losses

    history = fit(
        step, dict(nets.items()), optimizers, [images], epochs=settings.epochs,
        batch_size=settings.batch_size, seed=seed, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return nets.eval(), history


class MagNet(nn.Module):
    """Reformer: (N, C, H, W) in [0, 1] -> the same, redrawn; `rejects` says which are refused.

    Detectors for grey images are the errors of autoencoder I (mean squared) and II (mean absolute);
    for colour that of II, and how far the classifier's answers to an image and to its redrawing are
    apart (Jensen-Shannon divergence of its softmax at temperatures 10 and 40).

    Args:
        nets: what `train` returned.
        clean: validation images, which set the thresholds; none that the nets were trained on.
        false_positives: share of clean images that is refused, above 0 and below 1.
        joint: True refuses that share by all detectors together: each refuses the same number of
            validation images, as many as keep their union within the share. False lets every
            detector refuse the whole share, as the authors do (0.001 each for MNIST).
        classifier: needed in colour.

    Raises:
        ValueError: a share out of range, or so few images that a detector would refuse none.
    """

    thresholds: Tensor

    def __init__(
        self, nets: nn.ModuleDict, clean: Tensor, *, false_positives: float = 0.001,
        joint: bool = False, classifier: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.nets, self.classifier, self.shape = nets, classifier, tuple(clean.shape[1:])
        if "I" not in nets and classifier is None:
            raise ValueError("MagNet's detectors in colour ask the classifier: give classifier=")
        device = next(nets.parameters()).device
        with torch.no_grad():
            scores = torch.cat([self.scores(part.to(device)) for part in clean.split(64)])
        self.register_buffer("thresholds", thresholds(scores, false_positives, joint=joint))

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        made: Tensor = self.nets["I" if "I" in self.nets else "II"](images)
        return made

    def rejects(self, images: Tensor) -> Tensor:
        """Return which images any detector refuses, (N,) bool."""
        return (self.scores(images) >= self.thresholds).any(dim=1)

    def scores(self, images: Tensor) -> Tensor:
        """Return how suspicious each detector finds each image, (N, detectors), all >= 0."""
        self._check(images)
        redrawn = {name: net(images) for name, net in self.nets.items()}
        off = {name: (images - made).abs().flatten(1) for name, made in redrawn.items()}
        if "I" in off:
            return torch.stack([off["I"].square().mean(dim=1), off["II"].mean(dim=1)], dim=1)
        assert self.classifier is not None
        with frozen(self.classifier):
            before, after = self.classifier(images), self.classifier(redrawn["II"])
        apart = [divergence(before / t, after / t) for t in TEMPERATURES]
        return torch.stack([off["II"].mean(dim=1), *apart], dim=1)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"this MagNet was made for images (N, {', '.join(map(str, self.shape))}), not "
                f"{tuple(images.shape)}: train one on images of that shape"
            )


def thresholds(scores: Tensor, false_positives: float, *, joint: bool) -> Tensor:
    """Return a threshold for each detector, (detectors,); scores of at least it are refused.

    The threshold is the k-th largest score, so that a detector refuses k of the n validation
    images, and k / (n + 1) of new ones on average. Without `joint`, k is the share of n. With it, k
    is the largest number at which all detectors together refuse no more than the share.

    Args:
        scores: of clean images, (n, detectors).
        false_positives, joint: see `MagNet`.
    """
    check_number("false_positives", false_positives, 0, 1)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            "a detector's score of a validation image is NaN or infinite, and would refuse "
            "nothing: look at the images and at the autoencoders' weights"
        )
    n, detectors = scores.shape
    allowed = int(n * false_positives + 1e-9)  # 0.07 * 100 is a hair above 7, 0.29 * 100 below 29
    if not 0 < false_positives < 1 or not allowed:
        raise ValueError(
            f"false_positives={false_positives:g} of {n} validation images is "
            f"{'all' if false_positives == 1 else 'none'}: choose a share from {1 / max(n, 1):.2g} "
            "to below 1, or give more images"
        )
    ordered = scores.sort(dim=0, descending=True).values
    if not joint:
        return ordered[allowed - 1]
    for k in range(allowed, 0, -1):
        if int((scores >= ordered[k - 1]).any(dim=1).sum()) <= allowed:
            return ordered[k - 1]
    raise ValueError(
        f"{detectors} detectors cannot share {allowed} of {n} validation images: "
        f"false_positives={false_positives:g} needs {detectors / false_positives:.0f} images"
    )


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of softmax(a) and softmax(b), (N,), 0 to log 2."""
    p, q = a.softmax(dim=1), b.softmax(dim=1)
    middle = ((p + q) / 2).log()
    return ((p * (a.log_softmax(dim=1) - middle)) + q * (b.log_softmax(dim=1) - middle)).sum(1) / 2


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    """Return a convolution and its sigmoid; its first weights are drawn as Keras draws them."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.Sigmoid())
