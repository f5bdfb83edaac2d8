"""Attacks: functions `attack(model, x, y, *, …) -> x_adv`, found by name in `ATTACKS`.

An attack is a function of a model that returns logits, of images in [0, 1] and labels. It knows
nothing of data sets, training or printing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unfool.attacks import sign
from unfool.attacks.sign import fgsm

__all__ = [
    "ATTACKS",
    "SIGN_FAMILY",
    "VERSIONS",
    "Attack",
    "AttackSettings",
    "fgsm",
    "paper_attacks",
]


Attack = Callable[..., Tensor]
"""`attack(model, x, y, *, target=None, generator=None, progress=None, **settings) -> x_adv`.

`model` returns logits; x is float32 (N, C, H, W) in [0, 1]; y and `target` are int64 (N,). Returns
shape, dtype and device of x, in [0, 1], detached. The model comes back as it was.
"""

ATTACKS: dict[str, Attack] = {"fgsm": fgsm}

VERSIONS: dict[str, int] = {"fgsm": sign.VERSION}
"""Part of the key of every adversarial set: raised when an attack's result changes."""

SIGN_FAMILY = frozenset({"fgsm"})
"""Attacks that always return their perturbed image; the others return the original on failure."""


@dataclass(frozen=True)
class AttackSettings:
    """An attack by name with its settings, as a record or a grid writes it down."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise ValueError(f"unknown attack {self.name!r}: choose from {', '.join(ATTACKS)}")


def paper_attacks(dataset: str) -> tuple[AttackSettings, ...]:
    """Return the paper's attacks with the settings adopted for a data set.

    The paper gives eps 0.15 for MNIST and 0.1 for CIFAR-10 (here: for every colour data set).
    """
    eps = 0.15 if dataset in ("mnist", "mnist5k") else 0.1
    return (AttackSettings("fgsm", {"eps": eps}),)
