"""AutoAttack, an outside judge: its authors' own package behind the checks of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from unfool.attacks.sign import check_eps
from unfool.inputs import (
    check_choice,
    check_inputs,
    in_chunks,
    levels_up_to_the_caller,
    like_probabilities,
    refuse_target,
)
from unfool.progress import Progress

FEWEST = 4  # classes that the targeted loss compares
MOST = 9  # wrong classes that are tried, the likeliest first


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    version: Literal["standard", "rand"] = "standard",
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """AutoAttack in L-infinity: four attacks, each on the images that the last one left right.

    Croce and Hein 2020, by pyautoattack: APGD on the cross-entropy, APGD towards each of the nine
    likeliest wrong classes, FAB towards the same, and Square with 5,000 queries. No knob is to be
    turned, which is what makes it a judge. It is ten times the work of `apgd` on images that hold
    out, so give it few. What it says itself of the model (drawn at random, no gradient, Square
    wins) comes as warnings. Explained in notebook 11.

    Args:
        model: returns logits (N, classes) of 4 classes or more.
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel, in units of the [0, 1] range.
        version: "standard", or "rand" for a model that draws at random: APGD alone, with two losses
            and 20 draws per step.
        target: not to be had, AutoAttack only misleads.
        generator: draws the seed; by default 0. Images are attacked in chunks, and what is drawn
            for one depends on the chunk.
        progress: called with the number of images done.

    Returns:
        Images like `x`, in [0, 1], within eps of x, detached; an image that is misclassified
        already, or holds out, as it was.

    Raises:
        TypeError, ValueError: an input is not as above, or the model returns probabilities, which
            have no gradient where they are 0 and 1; the message has the value and the remedy.
    """
    from pyautoattack import AutoAttack

    check_inputs(x, y, target)
    check_eps(eps)
    check_choice("version", version, ("standard", "rand"))
    refuse_target(target, "autoattack", "it only misleads")
    seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))

    def attack(rows: slice) -> Tensor:
        with torch.no_grad():
            classes = _classes(model(x[rows]))
        # It seeds the global generators itself; the caller's are to come back as they were.
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), _warnings_told():
            judge = AutoAttack(model, eps=eps, version=version, seed=seed, device=x.device)
            judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = classes - 1
            made, _ = judge.run_standard_evaluation(x[rows], y[rows], batch_size=len(x[rows]))
        # FAB's projections are off by some 1e-7.
        return (x[rows] + (made - x[rows]).clamp(-eps, eps)).clamp(0, 1)

    return in_chunks(attack, model, x, y, progress=progress, name="autoattack")


def _classes(logits: Tensor) -> int:
    """Return how many classes are compared; refuse what AutoAttack can't judge."""
    if logits.shape[1] < FEWEST:
        raise ValueError(
            f"{logits.shape[1]} classes, but AutoAttack's targeted loss compares {FEWEST}: "
            'use apgd(losses=["ce", "margin"])'
        )
    if like_probabilities(logits):
        raise ValueError(
            "the model's outputs are >= 0 and sum to 1, like probabilities, which AutoAttack would "
            "find flat and call robust: give it logits, the values before the softmax"
        )
    return min(logits.shape[1], MOST + 1)


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Turn what AutoAttack tells its log at level WARNING into warnings, each once."""
    told: dict[str, None] = {}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.setdefault(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("auto-attack")
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before
        for message in told:
            warnings.warn(f"AutoAttack: {message}", stacklevel=levels_up_to_the_caller())
