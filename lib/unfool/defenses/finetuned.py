"""The classifier itself, trained further on attacked images: the control that a reviewer asks for.

A purifier is trained on pairs of attacked and clean images. The same images could as well teach
the classifier. This does so: it sees each attacked image and its clean one, under their true class.
What a purifier does better than this, it owes to purifying and not to the images.

It replaces the classifier instead of standing before it, so attacks made on the old one reach it as
mere transfer, as they do every adversarially trained network in the paper's Table 6.

Explained in notebook 08.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unfool.inputs import check_number
from unfool.progress import Progress
from unfool.training import History, Recipe, train_classifier

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """How the classifier is trained further.

    Attributes:
        epochs: passes over the attacked and the clean images. Half of a purifier's epochs show as
            many images as the purifier sees, for it sees the attacked ones only.
        rate: its learning rate at the start, as a share of the rate that it was first trained with.
    """

    epochs: int = 10
    rate: float = 0.1

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, 1, whole=True)
        check_number("rate", self.rate, 0)


class Finetuned(nn.Module):
    """A classifier that stands in the place of another: (N, C, H, W) in [0, 1] -> logits."""

    replaces_classifier = True  # `evaluation.defended` asks for it

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def train(
    classifier: nn.Module,
    adversarial: Tensor,
    clean: Tensor,
    labels: Tensor,
    recipe: Recipe,
    settings: Settings,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Finetuned, History]:
    """Return a copy of the classifier, trained further, in eval mode; the given one stays as it is.

    Args:
        classifier: trained already; its device is where the copy is trained.
        adversarial, clean: (N, C, H, W) float32 in [0, 1]; row i of both is one pair.
        labels: their true classes (N,), int64.
        recipe: what it was first trained with; see `training.recipe_for`.
        settings: see `Settings`.
        seed: of shuffling and shifting.
        checkpoint: file for resuming.
        progress: called after every step.

    Raises:
        ValueError: no pairs, or shapes that differ.
    """
    if adversarial.shape != clean.shape or not len(clean) == len(labels) > 0:
        raise ValueError(
            "pairs of equal shape and a class for each are needed: got "
            f"{tuple(adversarial.shape)} adversarial and {tuple(clean.shape)} clean images, "
            f"{len(labels)} classes" + ("; no attack succeeded" if len(clean) == 0 else "")
        )
    made = Finetuned(copy.deepcopy(classifier).requires_grad_(True))
    history = train_classifier(
        made, torch.cat([adversarial, clean]), labels.repeat(2),
        replace(recipe, rate=recipe.rate * settings.rate), epochs=settings.epochs, seed=seed,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return made.eval(), history
