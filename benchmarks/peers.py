"""The other libraries, how each of their attacks is called, and what is compared with what.

To add an attack: write a function that returns its `Comparison`, and name it in `comparisons`.
To add a library: name it in `PEERS`. Libraries are imported where they are called, so that one that
is not installed hinders nobody.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unfool.attacks import ATTACKS, AttackSettings

CLASSES = 10
Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""`call(model, x, y, target) -> x_adv`, one batch; an untargeted attack ignores `target`."""

PEERS = {  # what is imported, and the package that it comes with
    "adv-lib": ("adv_lib", "adv-lib"),
    "foolbox": ("foolbox", "foolbox"),
    "art": ("art", "adversarial-robustness-toolbox"),
    "torchattacks": ("torchattacks", "torchattacks"),
    "cleverhans": ("cleverhans", "cleverhans"),
}
ADV, FOOL, ART, TORCH, CLEVER = PEERS


def installed(peer: str) -> bool:
    """Return whether a peer can be imported here."""
    return importlib.util.find_spec(PEERS[peer][0]) is not None


def version(peer: str) -> str:
    """Return a peer's installed version."""
    return importlib.metadata.version(PEERS[peer][1])


@dataclass(frozen=True)
class Comparison:
    """One attack of ours and the calls of the peers that do the same.

    Attributes:
        title: the attack and its settings, as the table's heading.
        images: how many are attacked unless told otherwise: what takes seconds, not minutes.
        ours: our attack and its settings, but for the target.
        peers: name of the peer → its call with the same settings.
        targeted: success is the class in `target`, not just another class.
        eps: radius of the L-infinity ball that nobody may leave, in units of the [0, 1] range.
        one_by_one: peers that take an image at a time: the size of a batch is nothing to them.
        note: where settings cannot be the same.
    """

    title: str
    images: int
    ours: AttackSettings
    peers: dict[str, Call]
    targeted: bool = False
    eps: float | None = None
    one_by_one: frozenset[str] = frozenset()
    note: str = ""

    def call_ours(self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Call our attack as the peers are called."""
        aim = target if self.targeted else None
        return ATTACKS[self.ours.name](model, x, y, target=aim, **self.ours.settings)


def comparisons(dataset: str) -> dict[str, Comparison]:
    """Return every comparison by its name on the command line; colour has a smaller ball."""
    eps = 0.3 if dataset == "mnist5k" else 0.1
    return {
        "fgsm": fgsm(eps),
        "bim": iterated("bim", eps),
        "pgd": iterated("pgd", eps),
        "deepfool": deepfool(),
        "jsma-pair": jsma_pair(),
        "jsma-top2": jsma_top2(),
        "cw": cw(),
        "cw-fast": cw_fast(),
        "cw-l0": cw_l0(),
        "ead": ead(),
        "ead-fast": ead_fast(),
        "ddn": ddn(),
        **{f"fmn-{norm}": fmn(norm) for norm in FMN},
    }


# --- how each library is called -------------------------------------------------------------------


def with_foolbox(
    name: str, *, eps: float | None = None, targeted: bool = False, **settings: Any
) -> Call:
    """Return a call of foolbox. Where it fails it may return a black image, and call that hit."""

    def call(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        aim = foolbox.criteria.TargetedMisclassification(target) if targeted else y
        attack = getattr(foolbox.attacks, name)(**settings)
        images: Tensor = attack(wrapped, x, aim, epsilons=eps)[1]
        return images

    return call


def with_torchattacks(name: str, *, targeted: bool = False, **settings: Any) -> Call:
    """Return a call of torchattacks."""

    def call(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        import torchattacks

        attack = getattr(torchattacks, name)(model, **settings)
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        images: Tensor = attack(x, target if targeted else y)
        return images

    return call


def with_art(name: str, *, targeted: bool = False, **settings: Any) -> Call:
    """Return a call of ART, which takes and returns numpy arrays."""

    def call(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        wrapped = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), CLASSES, clip_values=(0.0, 1.0),
            device_type="cpu" if x.device.type == "cpu" else "gpu",
        )  # fmt: skip
        attack = getattr(evasion, name)(wrapped, batch_size=len(x), **settings)
        one_hot = np.eye(CLASSES, dtype=np.float32)[(target if targeted else y).cpu().numpy()]
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y=one_hot)).to(x.device)

    return call


def with_cleverhans(name: str, *arguments: Any, targeted: bool = False, **settings: Any) -> Call:
    """Return a call of cleverhans 4; `arguments` follow the model and the images."""

    def call(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        module = importlib.import_module(f"cleverhans.torch.attacks.{name}")
        images: Tensor = getattr(module, name)(
            model, x, *arguments, y=target if targeted else y, targeted=targeted,
            clip_min=0.0, clip_max=1.0, **settings,
        )  # fmt: skip
        return images.detach()

    return call


def with_adv_lib(name: str, *, targeted: bool = False, **settings: Any) -> Call:
    """Return a call of adv-lib."""

    def call(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        import adv_lib.attacks

        attack = getattr(adv_lib.attacks, name)
        images: Tensor = attack(model, x, target if targeted else y, targeted=targeted, **settings)
        return images

    return call


# --- what is compared -----------------------------------------------------------------------------


def fgsm(eps: float) -> Comparison:
    """One step. adv-lib has no FGSM."""
    return Comparison(
        title=f"FGSM, ε {eps}",
        images=256,
        eps=eps,
        ours=AttackSettings("fgsm", {"eps": eps}),
        peers={
            FOOL: with_foolbox("LinfFastGradientAttack", eps=eps),
            ART: with_art("FastGradientMethod", eps=eps),
            TORCH: with_torchattacks("FGSM", eps=eps),
            CLEVER: with_cleverhans("fast_gradient_method", eps, np.inf, sanity_checks=False),
        },
    )


def iterated(name: str, eps: float) -> Comparison:
    """BIM, or PGD: the same from a random start. Each library draws its own."""
    steps, step, drawn = 40, 0.01, name == "pgd"
    attack = "ProjectedGradientDescent" if drawn else "BasicIterativeMethod"
    in_art: dict[str, Any] = {"eps": eps, "eps_step": step, "max_iter": steps, "verbose": False}
    if drawn:
        in_art["num_random_init"] = 1
    return Comparison(
        title=f"{name.upper()}, L∞, ε {eps}, {steps} steps of {step}",
        images=256,
        eps=eps,
        ours=AttackSettings(name, {"eps": eps, "step": step, "steps": steps}),
        peers={
            ADV: with_adv_lib(
                "pgd_linf", ε=eps, steps=steps, absolute_step_size=step, random_init=drawn
            ),
            FOOL: with_foolbox(
                "LinfPGD" if drawn else "LinfBasicIterativeAttack",
                eps=eps, abs_stepsize=step, steps=steps, random_start=drawn,
            ),
            ART: with_art(attack, **in_art),
            TORCH: with_torchattacks(name.upper(), eps=eps, alpha=step, steps=steps),
            CLEVER: with_cleverhans(
                "projected_gradient_descent", eps, step, steps, np.inf,
                rand_init=drawn, sanity_checks=False,
            ),
        },
    )  # fmt: skip


def deepfool() -> Comparison:
    """DeepFool in L2. cleverhans 4 has none."""
    return Comparison(
        title="DeepFool, L2, at most 50 steps, overshoot 0.02, 10 classes",
        images=256,
        ours=AttackSettings("deepfool", {"steps": 50, "overshoot": 0.02}),
        peers={
            ADV: with_adv_lib("df", steps=50, overshoot=0.02),
            FOOL: with_foolbox("L2DeepFoolAttack", steps=50, candidates=10, overshoot=0.02),
            ART: with_art("DeepFool", max_iter=50, epsilon=0.02, nb_grads=10, verbose=False),
            TORCH: with_torchattacks("DeepFool", steps=50, overshoot=0.02),
        },
        one_by_one=frozenset({TORCH}),
        note="torchattacks stops on the border, so rounding decides which of its images count.",
    )


def jsma_pair() -> Comparison:
    """JSMA as in its paper: the best pair of pixels at each step."""
    return Comparison(
        title="JSMA, pairs, random target, θ 1, γ 0.145",
        images=32,
        targeted=True,
        ours=AttackSettings("jsma", {"theta": 1.0, "gamma": 0.145}),
        peers={TORCH: with_torchattacks("JSMA", targeted=True, theta=1.0, gamma=0.145)},
        one_by_one=frozenset({TORCH}),
    )


def jsma_top2() -> Comparison:
    """JSMA as ART understands it: the two largest gradients of the target at each step."""
    settings: dict[str, Any] = {"theta": 1.0, "gamma": 0.145}
    return Comparison(
        title="JSMA, ART's variant (top2), random target, θ 1, γ 0.145",
        images=128,
        targeted=True,
        ours=AttackSettings("jsma", {**settings, "variant": "top2", "saturated": 1.0}),
        peers={ART: with_art("SaliencyMapMethod", targeted=True, verbose=False, **settings)},
    )


def cw_peers(steps: int) -> dict[str, Call]:
    """Carlini and Wagner's L2 attack, 5 searches, lr 0.01, c from 0.01, in three libraries."""
    return {
        ADV: with_adv_lib(
            "carlini_wagner_l2", targeted=True, binary_search_steps=5, max_iterations=steps,
            learning_rate=0.01, initial_const=0.01,
        ),
        FOOL: with_foolbox(
            "L2CarliniWagnerAttack", targeted=True, binary_search_steps=5, steps=steps,
            stepsize=0.01, initial_const=0.01,
        ),
        CLEVER: with_cleverhans(
            "carlini_wagner_l2", CLASSES, targeted=True, binary_search_steps=5,
            max_iterations=steps, lr=0.01, initial_const=0.01,
        ),
    }  # fmt: skip


def cw() -> Comparison:
    """Carlini and Wagner's L2 attack with the same schedule everywhere."""
    schedule = {"searches": 5, "steps": 200, "lr": 0.01, "c": 0.01, "warm_start": False}
    plain = with_torchattacks("CW", targeted=True, c=1, steps=1000, lr=0.01)
    return Comparison(
        title="Carlini–Wagner L2, random target, 5 searches of 200 steps, lr 0.01, c from 0.01",
        images=32,
        targeted=True,
        ours=AttackSettings("carlini_wagner_l2", {"preset": "original", **schedule}),
        peers={**cw_peers(200), TORCH: plain},
        note=(
            "torchattacks does not search for c: here c 1 and 1,000 steps. cleverhans keeps w and "
            "Adam from one search to the next, and adds the c of the whole batch, so its images "
            "depend on the batch."
        ),
    )


def cw_fast() -> Comparison:
    """Our default schedule against the nearest images that peers find in five times the steps."""
    peers = cw_peers(1000)
    return Comparison(
        title=(
            "Carlini–Wagner L2, random target: our preset `fast` (5 searches of 200 steps, lr "
            "0.05, warm start) against 5 of 1,000 steps, lr 0.01"
        ),
        images=32,
        targeted=True,
        ours=AttackSettings("carlini_wagner_l2", {"preset": "fast"}),
        peers={ADV: peers[ADV], CLEVER: peers[CLEVER]},
        note="Not the same settings: the question is what an equally near image costs.",
    )


def cw_l0() -> Comparison:
    """Carlini and Wagner's L0 attack; JSMA beside it, as ART's of that name fools nothing."""
    return Comparison(
        title="Carlini–Wagner L0, random target, our preset `fast`; beside it JSMA, pairs",
        images=16,
        targeted=True,
        ours=AttackSettings("carlini_wagner_l0", {"preset": "fast"}),
        peers={TORCH: with_torchattacks("JSMA", targeted=True, theta=1.0, gamma=0.145)},
        one_by_one=frozenset({TORCH}),
        note=(
            "Not the same attack, but the same aim, few pixels. Images and target classes are the "
            "first ones of `jsma-pair`."
        ),
    )


def ead_in_foolbox(steps: int) -> Call:
    """Return foolbox's EAD: 5 searches, lr 0.01, c from 0.01, β 0.01, the rule EN."""
    return with_foolbox(
        "EADAttack", targeted=True, binary_search_steps=5, steps=steps, initial_stepsize=0.01,
        initial_const=0.01, regularization=0.01, decision_rule="EN",
    )  # fmt: skip


def ead() -> Comparison:
    """EAD with the same schedule everywhere."""
    schedule = {"searches": 5, "steps": 200, "lr": 0.01, "c": 0.01, "warm_start": False}
    return Comparison(
        title=(
            "EAD, rule EN, β 0.01, random target, 5 searches of 200 steps, lr 0.01, c from 0.01"
        ),
        images=32,
        targeted=True,
        ours=AttackSettings("ead", {"preset": "original", "rule": "EN", "beta": 0.01, **schedule}),
        peers={
            FOOL: ead_in_foolbox(200),
            TORCH: with_torchattacks(
                "EADEN", targeted=True, kappa=0, lr=0.01, binary_search_steps=5,
                max_iterations=200, initial_const=0.01, beta=0.01,
            ),
        },
        note="The libraries end a descent when the objective of the whole batch stops falling.",
    )  # fmt: skip


def ead_fast() -> Comparison:
    """Our default schedule against the nearest images that foolbox finds in ten times the steps."""
    return Comparison(
        title=(
            "EAD, rule EN, β 0.01, random target: our preset `fast` (5 searches of 100 steps, lr "
            "0.01, c from 1, warm start) against 5 of 1,000 steps, lr 0.01, c from 0.01"
        ),
        images=16,
        targeted=True,
        ours=AttackSettings("ead", {"preset": "fast"}),
        peers={FOOL: ead_in_foolbox(1000)},
        note="Not the same settings: the question is what an equally near image costs.",
    )


def ddn() -> Comparison:
    """DDN with its paper's settings. adv-lib's images are not rounded to 256 levels here."""
    return Comparison(
        title="DDN, L2, 50 steps, γ 0.05, radius 1",
        images=256,
        ours=AttackSettings("ddn", {"steps": 50, "gamma": 0.05, "radius": 1.0}),
        peers={
            ADV: with_adv_lib("ddn", steps=50, γ=0.05, init_norm=1.0, levels=None),
            FOOL: with_foolbox("DDNAttack", steps=50, gamma=0.05, init_epsilon=1.0),
        },
    )


FMN: dict[str, tuple[float, str]] = {  # norm → adv-lib's name of it, foolbox's attack
    "l2": (2, "L2FMNAttack"),
    "linf": (np.inf, "LInfFMNAttack"),
    "l1": (1, "L1FMNAttack"),
    "l0": (0, "L0FMNAttack"),
}


def fmn(norm: str) -> Comparison:
    """FMN in one of its four norms."""
    in_adv_lib, in_foolbox = FMN[norm]
    return Comparison(
        title=f"FMN, {norm.capitalize().replace('inf', '∞')}, 50 steps, α 1, γ 0.05",
        images=64,
        ours=AttackSettings("fmn", {"norm": norm, "steps": 50, "alpha": 1.0, "gamma": 0.05}),
        peers={
            ADV: with_adv_lib("fmn", norm=in_adv_lib, steps=50, α_init=1.0, γ_init=0.05),
            FOOL: with_foolbox(in_foolbox, steps=50, max_stepsize=1.0, gamma=0.05),
        },
        note=(
            "Ours leaves out of the gradient what points out of [0, 1]; the libraries, as the "
            "paper, clip it away, and some images are then never fooled."
        ),
    )
