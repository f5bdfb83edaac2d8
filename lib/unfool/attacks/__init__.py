"""Attacks: functions `attack(model, x, y, *, …) -> x_adv`, found by name in `ATTACKS`.

An attack is a function of a model that returns logits, of images in [0, 1] and labels. It knows
nothing of data sets, training or printing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unfool.attacks._descent import lead
from unfool.attacks.adaptive import bpda, eot, misread_by_generator, with_refusal
from unfool.attacks.apgd import VERSION as _APGD
from unfool.attacks.apgd import apgd
from unfool.attacks.autoattack import autoattack
from unfool.attacks.black_box import VERSION as _BLACK_BOX
from unfool.attacks.black_box import hop_skip_jump, spsa
from unfool.attacks.carlini_wagner import VERSION as _CARLINI_WAGNER
from unfool.attacks.carlini_wagner import carlini_wagner_l2
from unfool.attacks.carlini_wagner_l0 import VERSION as _CARLINI_WAGNER_L0
from unfool.attacks.carlini_wagner_l0 import carlini_wagner_l0
from unfool.attacks.carlini_wagner_linf import VERSION as _CARLINI_WAGNER_LINF
from unfool.attacks.carlini_wagner_linf import carlini_wagner_linf
from unfool.attacks.ddn import VERSION as _DDN
from unfool.attacks.ddn import ddn
from unfool.attacks.deepfool import VERSION as _DEEPFOOL
from unfool.attacks.deepfool import deepfool
from unfool.attacks.ead import VERSION as _EAD
from unfool.attacks.ead import ead
from unfool.attacks.fmn import VERSION as _FMN
from unfool.attacks.fmn import fmn
from unfool.attacks.jsma import VERSION as _JSMA
from unfool.attacks.jsma import jsma
from unfool.attacks.lbfgs import VERSION as _LBFGS
from unfool.attacks.lbfgs import lbfgs
from unfool.attacks.sign import VERSION as _SIGN
from unfool.attacks.sign import bim, check_eps, fgsm, pgd, r_fgsm, r_llc
from unfool.attacks.square import VERSION as _SQUARE
from unfool.attacks.square import square
from unfool.inputs import random_targets

__all__ = [
    "ATTACKS",
    "SIGN_FAMILY",
    "VERSIONS",
    "Attack",
    "AttackSettings",
    "apgd",
    "autoattack",
    "bim",
    "bpda",
    "carlini_wagner_l0",
    "carlini_wagner_l2",
    "carlini_wagner_linf",
    "ddn",
    "deepfool",
    "ead",
    "eot",
    "fgsm",
    "fmn",
    "hop_skip_jump",
    "jsma",
    "lbfgs",
    "lead",
    "misread_by_generator",
    "paper_attacks",
    "pgd",
    "r_fgsm",
    "r_llc",
    "random_targets",
    "spsa",
    "square",
    "with_refusal",
]


Attack = Callable[..., Tensor]
"""`attack(model, x, y, *, target=None, generator=None, progress=None, **settings) -> x_adv`.

`model` returns logits; x is float32 (N, C, H, W) in [0, 1]; y and `target` are int64 (N,). Returns
shape, dtype and device of x, in [0, 1], detached. The model comes back as it was.
"""

SIGN_FAMILY = frozenset({"fgsm", "r_fgsm", "r_llc", "bim", "pgd"})
"""Attacks that always return their perturbed image; the others return the original on failure,
but for apgd, square and spsa, which leave alone only what is misclassified already."""

ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "r_fgsm": r_fgsm,
    "r_llc": r_llc,
    "bim": bim,
    "pgd": pgd,
    "deepfool": deepfool,
    "jsma": jsma,
    "carlini_wagner_l2": carlini_wagner_l2,
    "carlini_wagner_l0": carlini_wagner_l0,
    "carlini_wagner_linf": carlini_wagner_linf,
    "lbfgs": lbfgs,
    "ead": ead,
    "ddn": ddn,
    "fmn": fmn,
    "apgd": apgd,
    "square": square,
    "spsa": spsa,
    "hop_skip_jump": hop_skip_jump,
}

VERSIONS: dict[str, int] = {
    **dict.fromkeys(SIGN_FAMILY, _SIGN),
    "deepfool": _DEEPFOOL,
    "jsma": _JSMA,
    "carlini_wagner_l2": _CARLINI_WAGNER,
    "carlini_wagner_l0": _CARLINI_WAGNER_L0,
    "carlini_wagner_linf": _CARLINI_WAGNER_LINF,
    "lbfgs": _LBFGS,
    "ead": _EAD,
    "ddn": _DDN,
    "fmn": _FMN,
    "apgd": _APGD,
    "square": _SQUARE,
    "spsa": _BLACK_BOX,
    "hop_skip_jump": _BLACK_BOX,
}
"""Part of the key of every adversarial set: raised when an attack's result changes."""


@dataclass(frozen=True)
class AttackSettings:
    """An attack by name with its settings, as a record or a grid writes it down.

    `settings` are the attack's keyword arguments, but for `target`: there "random" stands for
    classes from `random_targets`, which whoever calls the attack draws.

    Raises:
        TypeError, ValueError: an unknown attack, or an eps that is none (below 0, of 255 levels).
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise ValueError(f"unknown attack {self.name!r}: choose from {', '.join(ATTACKS)}")
        if "eps" in self.settings:  # told here, not after an hour of other attacks
            check_eps(self.settings["eps"], self.settings.get("norm", "linf"))


def paper_attacks(dataset: str) -> tuple[AttackSettings, ...]:
    """Return the paper's attacks with the settings adopted for a data set.

    The paper gives eps 0.15 for MNIST and 0.1 for CIFAR-10 (here: for every colour data set), and
    random target classes for JSMA and Carlini and Wagner's attack. The rest it leaves open: here
    the inventors' settings, and for Carlini and Wagner's attack a schedule that is ours.
    """
    eps = 0.15 if dataset in ("mnist", "mnist5k") else 0.1
    return (
        AttackSettings("fgsm", {"eps": eps}),
        AttackSettings("deepfool", {"overshoot": 0.02, "steps": 50}),
        AttackSettings("jsma", {"theta": 1.0, "gamma": 0.145, "target": "random"}),
        AttackSettings("carlini_wagner_l2", {"kappa": 0.0, "preset": "fast", "target": "random"}),
    )
