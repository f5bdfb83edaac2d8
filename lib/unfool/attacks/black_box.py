"""Black boxes by cleverhans: SPSA asks for scores, HopSkipJump for nothing but the class.

Neither asks for a gradient, so what stops gradients stops neither. Both are cleverhans 4's, image
by image, with a count of what is asked and two repairs that are told where they stand.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._descent import ROUNDING, lead
from unfool.attacks._draws import seeds_for
from unfool.attacks.sign import check_eps
from unfool.inputs import (
    check_images,
    check_inputs,
    check_number,
    frozen,
    in_chunks,
    refuse_target,
)
from unfool.progress import Progress

VERSION = 1


def spsa(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    queries: int = 2000,
    samples: int = 16,
    rate: float = 0.02,
    delta: float = 0.01,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """SPSA in L-infinity: a slope guessed from scores on both sides, and Adam's steps along it.

    Uesato et al. 2018, by cleverhans. Each step asks for the margin at `samples` pairs x' ± delta
    with random signs, and once where the step ends. An image stops as soon as it is fooled; one
    that is misclassified already is not touched; one that holds out comes back as it was last.
    Explained in notebook 11.

    Args:
        model: returns logits (N, classes); only the differences of scores matter.
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel, in units of the [0, 1] range.
        queries: images asked about per image, at least one step's 2 x samples + 1.
        samples: pairs per step, at least 1.
        rate: Adam's, in units of the [0, 1] range, above 0.
        delta: how far the pairs lie off, in the same units, above 0; a defence that rounds answers
            only to large ones.
        target: classes (N,), int64, not y: the error must be this one.
        generator: draws a seed for each image; by default one of seed 0.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], within eps of x, detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_eps(eps)
    check_number("queries", queries, 1, whole=True)
    check_number("samples", samples, 1, whole=True)
    for name, value in (("rate", rate), ("delta", delta)):
        check_number(name, value, 0)
        if value == 0:
            raise ValueError(f"{name} must be > 0: SPSA would stay where it is")
    if queries < 2 * samples + 1:
        raise ValueError(
            f"queries={queries} is less than one step's 2 x {samples} + 1: give more queries, or "
            "fewer samples"
        )
    aim, sign = (y, -1) if target is None else (target, 1)

    def one(image: Tensor, label: Tensor) -> Tensor:
        from cleverhans.torch.attacks.spsa import spsa as by_cleverhans

        found: Tensor = by_cleverhans(
            _at_the_iterate(model, image), image, eps, queries // (2 * samples + 1), y=label,
            targeted=sign > 0, clip_min=0.0, clip_max=1.0, early_stop_loss_threshold=-ROUNDING,
            learning_rate=rate, delta=delta, spsa_samples=samples, sanity_checks=False,
        )  # fmt: skip
        return image + (found - image).clamp(-eps, eps)  # it rounds by some 1e-8

    attack = _one_by_one(one, model, x, aim, sign, seeds_for(x, generator))
    return in_chunks(attack, model, x, y, target, progress=progress, name="spsa")


def _at_the_iterate(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the model for cleverhans's SPSA, which looks for the slope in the wrong place.

    It asks about x + (x + delta) instead of x + (perturbation + delta), at every step the same
    (its issue 1249). Single images are those where its steps end, so the pairs are moved there.
    """
    here = x

    def answer(images: Tensor) -> Tensor:
        nonlocal here
        if len(images) == 1:
            here = images
        else:
            images = images - 2 * x + here
        logits: Tensor = model(images.clamp(0, 1))
        return logits

    return answer


def hop_skip_jump(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 1.0,
    queries: int = 2000,
    evaluations: int = 100,
    starts: Tensor | None = None,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """HopSkipJump in L-infinity: from an image of another class along the border, by labels alone.

    Chen et al. 2020, by cleverhans. It looks for the nearest image that is misread. Each round
    guesses the border's direction from `evaluations` x sqrt(round) answers, steps along it, and
    halves its way back to the border. The nearest that was met within the budget is returned, and
    the original where it is farther than eps, where none was met, or where the image is
    misclassified already. Explained in notebook 11.

    Args:
        model: returns logits (N, classes); only the largest matters.
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel that counts, in units of the [0, 1] range.
        queries: images asked about per image, at least 1.
        evaluations: of the first round, at least 1.
        starts: images (M, C, H, W) that the attacker has; each attack starts from the nearest of
            them that is read otherwise. What they are read as is asked once. By default uniform
            noise, which fails where noise is read as the class of the image itself.
        target: none is taken.
        generator: draws a seed for each image; by default one of seed 0.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y)
    refuse_target(target, "hop_skip_jump", "it looks for the nearest border")
    check_eps(eps)
    check_number("queries", queries, 1, whole=True)
    check_number("evaluations", evaluations, 1, whole=True)
    others: tuple[Tensor, Tensor] | None = None
    if starts is not None:
        _check_starts(starts, x)
        with frozen(model), torch.no_grad():
            others = starts, model(starts).argmax(dim=1)

    def one(image: Tensor, label: Tensor) -> Tensor:
        from cleverhans.torch.attacks.hop_skip_jump_attack import hop_skip_jump_attack

        start = None if others is None else _nearest_other(*others, image, label)
        box = _Counted(model, image, label, queries)
        # Of a plain number gamma this version cannot take the smaller of two thresholds.
        gamma = torch.ones((), device=image.device)
        with suppress(_Spent):
            hop_skip_jump_attack(
                box, image, None, image_target=start, initial_num_evals=evaluations, gamma=gamma,
                num_iterations=queries, constraint=torch.inf, verbose=False,
            )  # fmt: skip
        return box.nearest if box.distance <= eps else image

    attack = _one_by_one(one, model, x, y, -1, seeds_for(x, generator))
    return in_chunks(attack, model, x, y, progress=progress, name="hop_skip_jump")


class _Spent(Exception):
    """No more questions are allowed."""


class _Counted:
    """A model that answers so many questions, and remembers the nearest image that it misread."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, queries: int) -> None:
        self.model, self.x, self.y, self.left = model, x, y, queries
        self.nearest, self.distance = x, torch.inf

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > self.left:
            raise _Spent
        self.left -= len(images)
        images = images.clamp(0, 1)
        logits: Tensor = self.model(images)
        misread = images[lead(logits, self.y.expand(len(images))) < -ROUNDING]
        if len(misread):
            distance, k = (misread - self.x).abs().flatten(1).amax(dim=1).min(dim=0)
            if float(distance) < self.distance:
                self.nearest, self.distance = misread[k][None], float(distance)
        return logits


def _check_starts(starts: Tensor, x: Tensor) -> None:
    check_images(starts)
    if starts.shape[1:] != x.shape[1:] or not len(starts):
        raise ValueError(
            f"starts must be images like x, (M, {', '.join(map(str, x.shape[1:]))}), not "
            f"{tuple(starts.shape)}: take some of the training images"
        )


def _nearest_other(starts: Tensor, read: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    """Return the start nearest to x in L2 that is not read as y, in cleverhans's shape, or None."""
    others = starts[read != y]
    if not len(others):
        return None
    return others[(others - x).flatten(1).norm(dim=1).argmin()][None, None]


def _one_by_one(
    attack: Callable[[Tensor, Tensor], Tensor], model: nn.Module, x: Tensor, aim: Tensor,
    sign: int, seeds: Tensor,
) -> Callable[[slice], Tensor]:  # fmt: skip
    """Return what attacks the images of a slice that are not fooled yet, each with its own seed.

    cleverhans draws from torch's global random state, which is put back.
    """

    @torch.no_grad()
    def attack_rows(rows: slice) -> Tensor:
        images = x[rows].detach().clone()
        margin = sign * lead(model(images), aim[rows])
        for i in (margin <= ROUNDING).nonzero().flatten().tolist():
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(int(seeds[rows][i]))
                images[i : i + 1] = attack(images[i : i + 1].clone(), aim[rows][i : i + 1])
        return images

    return attack_rows
