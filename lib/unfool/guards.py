"""Signs that an attack failed for a reason that is no robustness: one function, one sentence each.

A guard returns what it saw, with the numbers, or None. None is no proof: it is one known fault
fewer. `threats.threat_levels` asks all of them. Explained in notebook 12.

What they look for: Athalye et al. 2018, Carlini et al. 2019 (arXiv 1902.06705), Croce and Hein
2020, Pintor et al. 2022 (indicators of attack failure), Zimmermann et al. 2022 (binarisation test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from unfool.attacks import lead
from unfool.attacks._descent import ROUNDING
from unfool.attacks.adaptive import Eot
from unfool.evaluation import predict
from unfool.inputs import frozen

POINTS = 0.005  # half a percentage point: what two runs of a good attack may differ by
ZERO_SHARE = 0.01  # of images without gradient; a dead one among many is nobody's trick
LATE_SHARE = 0.05  # of all that was gained, gained in the last tenth of the passes
LOST_SHARE = 0.1  # of the images that fool the model that was attacked, and not the defence
FOUND_SHARE = 0.95  # of the planted points; Zimmermann et al. ask for nearly all
UNLIKE = 1e-3  # of the largest logit: more than rounding changes
ALIKE = 8  # images that show whether outputs depend on chance or on the batch

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""`attack(model, x, y) -> x_adv`, its settings bound."""


# --- from accuracies that were measured -----------------------------------------------------------


def chance(n: int) -> float:
    """Return what two shares of n images may differ by where a defence draws at random.

    Two standard errors of a difference at worst, on top of `POINTS`.
    """
    return POINTS + 2 * math.sqrt(0.5 / max(1, n))


def weaker_attacker_wins(
    right: Mapping[str, Tensor], eps: Sequence[float], best: str = "white-box",
    slack: float = POINTS,
) -> str | None:  # fmt: skip
    """Say where an attacker who knows less fools more of the same images than the best one.

    Args:
        right: by the attacker's name, which images stay right at each eps, (E, N) bool.
        eps: the sizes, E of them.
        best: the name of the one who knows everything.
        slack: what shares may differ by, here and in the next three; see `chance`.
    """
    found = []
    for name, theirs in right.items():
        lost = (right[best].float().mean(dim=1) - theirs.float().mean(dim=1)).tolist()
        worst = max(range(len(lost)), key=lost.__getitem__)
        if lost[worst] > slack:
            mine, other = (100 * float(r[worst].float().mean()) for r in (right[best], theirs))
            found.append(
                f"{name} leaves {other:.1f} % right at eps {eps[worst]:g}, {best} {mine:.1f} %"
            )
    if not found:
        return None
    return f"an attacker who knows less fools more, so {best} is broken: {'; '.join(found)}"


def more_succeeds_less(
    right: Sequence[Tensor], budget: Sequence[float], what: str = "eps", slack: float = POINTS
) -> str | None:
    """Say where a larger budget fools fewer images than a smaller one: each (N,) bool."""
    left = [float(r.float().mean()) for r in right]
    for i in range(1, len(left)):
        if left[i] > min(left[:i]) + slack:
            before = min(range(i), key=left.__getitem__)
            return (
                f"more succeeds less: {what} {budget[before]:g} leaves {100 * left[before]:.1f} % "
                f"right and {what} {budget[i]:g} {100 * left[i]:.1f} %"
            )
    return None


def steps_still_gain(few: Tensor, many: Tensor, steps: int, slack: float = POINTS) -> str | None:
    """Say if doubling the steps fools over half a point and one image more; right, (N,) bool."""
    before, after = (100 * float(r.float().mean()) for r in (few, many))
    if before - after <= 100 * slack or int(few.sum()) - int(many.sum()) <= 1:
        return None
    return f"{steps} steps are too few: twice as many leave {after:.1f} % right, not {before:.1f} %"


def unbounded_fails(right: Tensor, slack: float = 0.0) -> str | None:
    """Say if images stay right, (N,) bool, that may be changed into anything at all (eps 1)."""
    left = int(right.sum())
    if left <= slack * len(right):
        return None
    return f"eps 1 allows any image, yet {left} of {len(right)} are still right: the attack fails"


def does_not_carry_over(fools_attacked: Tensor, fools_defense: Tensor) -> str | None:
    """Say if images that fool the model under attack, (N,) bool, do not fool the defence itself."""
    n, lost = int(fools_attacked.sum()), int((fools_attacked & ~fools_defense).sum())
    if not n or lost <= LOST_SHARE * n:
        return None
    return (
        f"{lost} of {n} images that fool the attacked stand-in do not fool the defence: the "
        "stand-in (BPDA, EOT) is not like it"
    )


# --- from the model -------------------------------------------------------------------------------


def zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Say of how many images the gradient of the cross-entropy is exactly zero, if over 1 %."""
    with frozen(model), torch.enable_grad():
        images = x.detach().clone().requires_grad_(True)
        loss = cross_entropy(model(images), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
    zero = int((gradient == 0).flatten(1).all(dim=1).sum())
    if zero <= ZERO_SHARE * len(x):
        return None
    return f"the loss has no gradient at {zero} of {len(x)} images: look for rounding or saturation"


def random_without_eot(model: nn.Module, x: Tensor) -> str | None:
    """Say if two looks at the same images differ and no `eot` averages over such differences."""
    changed = differing(model, x)
    if not changed or any(isinstance(module, Eot) for module in model.modules()):
        return None
    return (
        f"the logits of {changed} of {len(x[:ALIKE])} images differ from one look to the next: "
        "attack eot(model, samples), not one draw"
    )


def differing(model: nn.Module, x: Tensor) -> int:
    """Return for how many of the first images two looks differ: 0 for a model that is not random.

    Draws from torch's global random state where the model does.
    """
    return _unlike(*(_logits(model, x[:ALIKE]) for _ in range(2)))


def batch_matters(model: nn.Module, x: Tensor) -> str | None:
    """Say if an image's logits depend on which images stand beside it.

    Asked of models that are not random; of those it would say so, too.
    """
    together = _logits(model, x[:ALIKE])
    alone = torch.cat([_logits(model, image[None]) for image in x[:ALIKE]])
    changed = _unlike(together, alone)
    if 2 * changed <= len(alone):  # a rounding that tips over may show in one
        return None
    return (
        f"the logits of {changed} of {len(alone)} images depend on their batch: statistics of the "
        "test batch tell the defence what it should not know"
    )


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with frozen(model):
        logits: Tensor = model(x)
        return logits


def _unlike(a: Tensor, b: Tensor) -> int:
    """Return how many rows of logits differ by more than rounding does."""
    limit = UNLIKE * torch.maximum(a.abs(), b.abs()).amax(dim=1)
    return int(((a - b).abs().amax(dim=1) > limit).sum())


# --- from watching the attack ---------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """What single attacks did: `silent` of `n` fooled the model on the way and not at their end.

    `late` is the share of the margin gained in the last tenth of the passes, the mean over images.
    """

    n: int
    silent: int
    late: float


def watch(model: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> Watched:
    """Attack the images one at a time and look at every pass through the model.

    Best given images that the attack does not fool, for there a fault shows.
    """
    silent, late = 0, []
    for i in range(len(x)):
        one, label = x[i : i + 1], y[i : i + 1]
        with _margins(model, label) as seen:
            x_adv = attack(model, one, label)
        if not seen:
            continue
        best = torch.tensor(seen).cummax(dim=0).values
        gained = float(best[-1] - best[0])
        before = float(best[-1 - max(1, len(seen) // 10)]) if len(seen) > 1 else float(best[0])
        late.append((float(best[-1]) - before) / gained if gained > 0 else 0.0)
        silent += bool(best[-1] > ROUNDING) and bool((predict(model, x_adv) == label.cpu()).all())
    return Watched(len(late), silent, sum(late) / max(1, len(late)))


@contextmanager
def _margins(model: nn.Module, y: Tensor) -> Iterator[list[float]]:
    """Yield a list that grows by the margin of the wrong class at every pass of one image."""
    seen: list[float] = []

    def note(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        seen.append(float(-lead(logits.detach(), y)))

    hook = model.register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def silent_success(watched: Watched) -> str | None:
    """Say if the attack met images that fool the model and returned others."""
    if not watched.silent:
        return None
    return (
        f"{watched.silent} of {watched.n} attacks that failed had fooled the model on the way: "
        "return the best image, not the last"
    )


def still_climbing(watched: Watched) -> str | None:
    """Say if the margin still grew at the end: then the optimisation is incomplete."""
    if watched.late <= LATE_SHARE:
        return None
    return (
        f"{100 * watched.late:.0f} % of the margin was gained in the last tenth of the passes, "
        f"over {watched.n} images: the attack had not finished"
    )


# --- the binarisation test ------------------------------------------------------------------------


@dataclass(frozen=True)
class Binarisation:
    """Of `n` planted points the attack found `found`, and random corners of the ball `at_random`.

    `skipped` images had no separable problem: there the defence maps the whole ball to one place.
    """

    n: int
    found: int
    at_random: int
    skipped: int


def binarise(
    model: nn.Module, attack: Attack, x: Tensor, *, eps: float, inner: int = 200, seed: int = 0
) -> Binarisation:
    """Plant an adversarial image in every ball, and see whether the attack finds one.

    Zimmermann et al. 2022. Around each image, the model's last linear layer is replaced by a
    discriminator of two classes: `inner` points within 0.95 eps, and one random corner of the ball.
    It accepts the corner, by a hair, so there is something to find; all that lies before and
    behind the layer stays. Where a model has no linear layer its logits are read instead.

    Args:
        model: images (N, C, H, W) -> logits.
        attack: the one to be tried; its eps must be this one.
        x: images to try it on, one by one.
        eps: radius of the L-infinity ball.
        inner: points, at least 2; as many random corners are tried as a control.
        seed: of all points.
    """
    generator, tried = Generator().manual_seed(seed), []
    skipped = 0
    with frozen(model):
        for i in range(len(x)):
            one = x[i : i + 1]
            around, corners = _points(one, eps, inner, generator)
            reader = _Reader(model)
            if not reader.learn(torch.cat([one, around]), corners[:1]):
                skipped += 1
                continue
            label = torch.zeros(1, dtype=torch.int64, device=x.device)
            x_adv = attack(reader, one, label)
            with torch.no_grad():
                hit = reader(torch.cat([x_adv, corners[1:]])).argmax(dim=1) == 1
            tried.append((bool(hit[0]), bool(hit[1:].any())))
    return Binarisation(
        len(tried), sum(found for found, _ in tried), sum(luck for _, luck in tried), skipped
    )


def planted_is_missed(result: Binarisation) -> str | None:
    """Say how many planted points the attack missed, if it found under 95 %."""
    if result.found >= FOUND_SHARE * result.n:
        return None
    return (
        f"the attack found {result.found} of {result.n} planted adversarial images (binarisation "
        f"test; random corners found {result.at_random}): it would miss others, too"
    )


def _points(x: Tensor, eps: float, inner: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return points well inside the ball around one image, and corners: (inner, C, H, W) each."""
    shape = (2, inner, *x.shape[1:])
    around, corners = torch.empty(shape).uniform_(-1, 1, generator=generator).to(x.device)
    return (x + 0.95 * eps * around).clamp(0, 1), (x + eps * corners.sign()).clamp(0, 1)


class _Reader(nn.Module):
    """A model whose last linear layer tells one corner of a ball from the points inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.model, self.layer = model, linear[-1] if linear else model
        self.weight: Tensor | None = None
        self.centre, self.bias = torch.zeros(0), 0.0

    def forward(self, x: Tensor) -> Tensor:
        def exchange(_layer: nn.Module, inputs: Any, out: Tensor) -> Tensor | None:
            features = inputs[0] if isinstance(self.layer, nn.Linear) else out
            if self.weight is None:
                self.features = features.detach().flatten(1).double()
                return None
            score = (features.flatten(1) - self.centre) @ self.weight + self.bias
            return torch.stack([-score / 2, score / 2], dim=1)

        hook = self.layer.register_forward_hook(exchange)
        try:
            logits: Tensor = self.model(x)
            return logits
        finally:
            hook.remove()

    @torch.no_grad()
    def learn(self, inside: Tensor, corner: Tensor) -> bool:
        """Fit Fisher's discriminant; return whether it tells the corner from all points inside."""
        self(torch.cat([inside, corner]))
        centre = self.features[:-1].mean(dim=0)
        within, planted = self.features[:-1] - centre, self.features[-1] - centre
        scatter = within.T @ within / len(within)
        # Shrunk half-way to a plain difference of means: unshrunk, with fewer points than features,
        # it hangs on units that are dead inside, and good attacks miss up to 40 % on good networks.
        scatter.diagonal().add_(scatter.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(scatter, planted)
        nearest, score = float((within @ weight).max()), float(planted @ weight)
        if score - nearest <= 1e-3 * score:
            return False
        scale = 5 / score  # the points inside lie around -5, where no softmax saturates
        self.weight, self.centre = (scale * weight).to(inside.dtype), centre.to(inside.dtype)
        self.bias = -scale * (nearest + 0.999 * (score - nearest))
        return True
