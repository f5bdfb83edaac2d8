"""Adversarial training: the classifier learns from attacks on itself, made while it learns.

Two kinds. "fgsm" is the single step of Goodfellow et al. 2015, which the paper's Table 6 compares
with: the loss is the mean of that of clean images and of that of the same images attacked, each
with half of the weight, as Defense-GAN's authors trained it. "pgd" is Madry et al. 2018: attacked
images alone, from a random start and over several steps, which is the inner maximum of

    min over the weights of the mean over images of  max_{|r| <= eps}  J(x + r, y).

Attacks in training see the classifier in eval mode, without dropout and with batch norm's running
statistics, for this is what an attacker meets. Like `finetuned`, it replaces the classifier, and
attacks made on the old one reach it as mere transfer; but it is trained afresh.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unfool.attacks.sign import check_eps, climb
from unfool.defenses.denoiser import noisy
from unfool.defenses.finetuned import Finetuned
from unfool.inputs import check_choice, check_number, frozen
from unfool.progress import Progress
from unfool.training import (
    History,
    Recipe,
    classifier_step,
    cosine,
    fit,
    optimizer_for,
    varied,
)

VERSION = 1
KINDS = ("fgsm", "pgd")


@dataclass(frozen=True)
class Settings:
    """How the attacks in training are made; the defaults are Madry et al.'s for MNIST.

    Attributes:
        kind: "fgsm" or "pgd"; see above.
        eps: largest change of a pixel, in units of the [0, 1] range.
        steps: of "pgd"; "fgsm" takes one.
        reach: how far all steps of "pgd" lead together, in units of eps: 40 steps of 0.01 at eps
            0.3 reach 4/3 of it.
        warmup: share of the training, from its beginning, over which eps grows from 0 to its full
            size. The authors have none; a short training learns nothing without.
        epochs: passes over the images. Madry et al.'s 100,000 steps of 50 images are 83.
    """

    kind: str = "pgd"
    eps: float = 0.3
    steps: int = 40
    reach: float = 4 / 3
    warmup: float = 0.0
    epochs: int = 83

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_eps(self.eps)
        check_number("steps", self.steps, 1, whole=True)
        check_number("reach", self.reach, 0)
        check_number("warmup", self.warmup, 0, 1)
        check_number("epochs", self.epochs, 1, whole=True)

    def eps_at(self, done: float) -> float:
        """Return eps after a share of the training, 0 to 1."""
        return self.eps * min(1.0, done / self.warmup) if self.warmup else self.eps


class AdversariallyTrained(Finetuned):
    """A classifier trained on attacks on itself: (N, C, H, W) in [0, 1] -> logits."""


def attacked(
    net: nn.Module, images: Tensor, labels: Tensor, settings: Settings, eps: float
) -> Tensor:
    """Return images attacked as in training, (N, C, H, W) in [0, 1], within eps of the given ones.

    The random start is drawn from torch's global generator. Inputs are not checked.
    """
    with frozen(net):
        if settings.kind == "fgsm":
            return climb(net, images, images, labels, eps, eps=eps)
        start = noisy(images, "uniform", eps)
        step = settings.reach * eps / settings.steps
        return climb(net, images, start, labels, step, eps=eps, steps=settings.steps)


def train(
    untrained: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    settings: Settings,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[AdversariallyTrained, History]:
    """Return a copy of the classifier, adversarially trained, in eval mode.

    Args:
        untrained: fresh weights; its device is where the copy is trained. It stays as it is.
        images: clean, (N, C, H, W) float32 in [0, 1].
        labels: true classes (N,), int64.
        recipe: learning rate, batch size and shifts; see `training.recipe_for`.
        settings: see `Settings`.
        seed: of shuffling, shifts and random starts.
        checkpoint: file for resuming.
        progress: called after every step.

    Raises:
        ValueError: no images, or not as many classes as images.
    """
    made = AdversariallyTrained(copy.deepcopy(untrained).requires_grad_(True))
    optimizer = optimizer_for(made, recipe)
    learn = classifier_step(made, optimizer)
    eps = settings.eps_at(0)

    def rate(done: float) -> float:  # called before every step: eps follows the same clock
        nonlocal eps
        eps = settings.eps_at(done)
        return cosine(done) if recipe.schedule == "cosine" else 1.0

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x = varied(x, recipe)
        x_adv = attacked(made, x, y, settings, eps)
        if settings.kind == "fgsm":
            x_adv, y = torch.cat([x, x_adv]), y.repeat(2)
        return dict(learn(x_adv, y))

    history = fit(
        step, {"net": made}, {"net": optimizer}, [images, labels], epochs=settings.epochs,
        batch_size=recipe.batch_size, seed=seed, learning_rate=rate,
        mixed_precision=images.shape[1] == 3 and next(made.parameters()).is_cuda,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return made, history
