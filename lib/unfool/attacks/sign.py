"""The sign family: steps uphill in the loss, inside a ball around the image.

In the L-infinity ball the steepest step of a given size is the sign of the gradient, hence the
name; in the L2 ball it is the gradient itself, scaled. All attacks here are one loop, `climb`, from
different starts, and always return the perturbed image, also where it does not fool the classifier.
Explained in notebook 02.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from unfool.inputs import (
    check_choice,
    check_inputs,
    check_number,
    in_chunks,
    refuse_target,
    uniform_noise,
)
from unfool.progress import Progress

VERSION = 1
NORMS = ("linf", "l2")


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Fast gradient sign method: one step of size eps uphill in the loss, clipped to [0, 1].

    x* = x + eps sign(grad_x J(x, y)): Goodfellow et al. 2015; the paper's equation 1 (eps 0.15 on
    MNIST, 0.1 on CIFAR-10). Explained in notebook 02.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        eps: largest change of a pixel, in units of the [0, 1] range; 0.15 is 38 of 255.
        target: classes (N,), int64: step downhill towards them instead of uphill from `y`.
        generator: unused, FGSM draws nothing; part of every attack's interface.
        progress: called with the number of images done.

    Returns:
        Perturbed images: shape, dtype and device of `x`, in [0, 1], detached.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y, target)
    check_eps(eps)
    aim, uphill = (y, 1) if target is None else (target, -1)

    def attack(rows: slice) -> Tensor:
        return climb(model, x[rows], x[rows], aim[rows], uphill * eps, eps=eps)

    return in_chunks(attack, model, x, y, target, progress=progress, name="fgsm")


def r_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    alpha: float | None = None,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """R+FGSM: a random step of size alpha, then FGSM with the rest of eps.

    x' = x + alpha sign(N(0, I)), x* = x' + (eps - alpha) sign(grad_x' J(x', y)), both clipped:
    Tramèr et al. 2018. The random step leaves the place where a model's gradient may be
    masked. Explained in notebook 02.

    Args:
        model, x, y, target, progress: as for `fgsm`.
        eps: largest change of a pixel, in units of the [0, 1] range; by default as for `fgsm`.
        alpha: the random step's part of it, from 0 to eps; by default eps / 2, as Tramèr et al.
            Defense-GAN (Samangouei et al. 2018) takes 0.05 of eps 0.3.
        generator: draws the random step; by default one of seed 0.

    Returns, raises:
        As `fgsm`.
    """
    check_inputs(x, y, target)
    alpha = check_eps_and_alpha(eps, alpha)
    aim, uphill = (y, 1) if target is None else (target, -1)
    start = random_corner(x, alpha, generator)

    def attack(rows: slice) -> Tensor:
        return climb(model, x[rows], start[rows], aim[rows], uphill * (eps - alpha), eps=eps)

    return in_chunks(attack, model, x, y, target, progress=progress, name="r_fgsm")


def r_llc(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    alpha: float | None = None,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """R+LLC: a random step of size alpha, then one towards the least-likely class of x.

    x' = x + alpha sign(N(0, I)), x* = x' - (eps - alpha) sign(grad_x' J(x', y_LL)), both clipped;
    y_LL is the class other than y with the lowest logit for x. Tramèr et al. 2018 (R+Step-LL).
    Explained in notebook 02.

    Args:
        model, x, y, eps, alpha, generator, progress: as for `r_fgsm`.
        target: must be None: the least-likely class is the target.

    Returns, raises:
        As `fgsm`.
    """
    check_inputs(x, y)
    refuse_target(target, "r_llc", "it aims at the least-likely class")
    alpha = check_eps_and_alpha(eps, alpha)
    start = random_corner(x, alpha, generator)

    def attack(rows: slice) -> Tensor:
        aim = least_likely_class(model, x[rows], y[rows])
        return climb(model, x[rows], start[rows], aim, -(eps - alpha), eps=eps)

    return in_chunks(attack, model, x, y, progress=progress, name="r_llc")


def bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    step: float | None = None,
    steps: int = 40,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Basic iterative method: small FGSM steps from x, kept within eps of it and in [0, 1].

    Kurakin et al. 2017. Explained in notebook 02.

    Args:
        model, x, y, target, progress: as for `fgsm`.
        eps: largest change of a pixel, in units of the [0, 1] range; by default as for `fgsm`.
        step: size of a step in the same units; by default 2.5 eps / steps, Madry et al.'s
            rule: whatever eps is, the steps can cross the ball and move along its border.
        steps: how many, at least 1; 40 is Madry et al.'s number for MNIST.
        generator: unused, BIM draws nothing.

    Returns, raises:
        As `fgsm`.
    """
    check_inputs(x, y, target)
    step = check_eps_and_steps(eps, step, steps)
    aim, uphill = (y, 1) if target is None else (target, -1)

    def attack(rows: slice) -> Tensor:
        return climb(model, x[rows], x[rows], aim[rows], uphill * step, eps=eps, steps=steps)

    return in_chunks(attack, model, x, y, target, progress=progress, name="bim")


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.15,
    step: float | None = None,
    steps: int = 40,
    norm: str = "linf",
    random_start: bool = True,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Projected gradient descent: BIM from a random start, in an L-infinity or an L2 ball.

    Madry et al. 2018. Explained in notebook 02.

    Args:
        model, x, y, target, progress: as for `fgsm`.
        eps: radius of the ball, in units of the [0, 1] range: the largest change of a pixel for
            norm "linf" (by default as for `fgsm`), the Euclidean length of the whole change for
            "l2", where digits take 1 to 3.
        step: length of a step in the same units; by default 2.5 eps / steps (Madry et al.).
        steps: how many, at least 1; 40 is Madry et al.'s number for MNIST.
        norm: "linf" or "l2".
        random_start: whether to start from x plus uniform noise in [-eps, eps], or from x. For "l2"
            the noise is shortened to eps, the ball's surface, where in hundreds of dimensions
            nearly all of a ball is.
        generator: draws the start, image after image; by default one of seed 0.

    Returns, raises:
        As `fgsm`.
    """
    check_inputs(x, y, target)
    step = check_eps_and_steps(eps, step, steps, norm)
    check_choice("norm", norm, NORMS)
    aim, uphill = (y, 1) if target is None else (target, -1)
    start = random_point(x, eps, norm, generator) if random_start else x

    def attack(rows: slice) -> Tensor:
        return climb(
            model, x[rows], start[rows], aim[rows], uphill * step, eps=eps, steps=steps, norm=norm
        )

    return in_chunks(attack, model, x, y, target, progress=progress, name="pgd")


# --- the loop that they share ---------------------------------------------------------------------


def climb(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    y: Tensor,
    step: float,
    *,
    eps: float,
    steps: int = 1,
    norm: str = "linf",
) -> Tensor:
    """Take `steps` steps uphill in the loss of class y, never leaving the ball around x.

    All images (N, C, H, W); y is (N,). A negative step goes downhill, towards class y.
    """
    x_adv = start
    for _ in range(steps):
        gradient = loss_gradient(model, x_adv, y)
        x_adv = project(x_adv + step * steepest(gradient, norm), x, eps, norm)
    return x_adv


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each image's own cross-entropy with respect to its pixels.

    (N, C, H, W) like x. The losses are summed, not averaged, so that image i's gradient
    depends on image i alone and not on the size of its batch.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = cross_entropy(model(x), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Return the step of length 1 that raises a linear function with this gradient the most.

    Where the gradient is 0 there is no such direction, and the step is 0.
    """
    if norm == "linf":
        return gradient.sign()
    return gradient / length(gradient).clamp(min=1e-12)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Return the images in [0, 1] and within eps of x, starting from `x_adv`.

    [0, 1] comes first: the way from there back into the ball leads towards x, which lies in both.
    """
    x_adv = x_adv.clamp(0, 1)
    if norm == "linf":
        return x_adv.clamp(min=x - eps, max=x + eps)
    return (x + shorten(x_adv - x, eps)).clamp(0, 1)  # again, for rounding only


def shorten(change: Tensor, eps: float) -> Tensor:
    """Return each image's change, scaled down to length eps where it is longer."""
    return change * (eps / length(change).clamp(min=1e-12)).clamp(max=1)


def length(images: Tensor) -> Tensor:
    """Return each image's Euclidean length, shape (N, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


# --- their own parts ------------------------------------------------------------------------------


def random_point(x: Tensor, eps: float, norm: str, generator: Generator | None) -> Tensor:
    """Return x with uniform noise from the ball (for "l2" as good as its surface), in [0, 1]."""
    noise = uniform_noise(x, eps, generator)
    return (x + (noise if norm == "linf" else shorten(noise, eps))).clamp(0, 1)


def random_corner(x: Tensor, alpha: float, generator: Generator | None) -> Tensor:
    """Return x with every pixel moved by alpha, up or down at random, clipped to [0, 1]."""
    return (x + alpha * uniform_noise(x, 1, generator).sign()).clamp(0, 1)


@torch.no_grad()
def least_likely_class(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the class with the lowest logit, (N,) int64; the true class y is out of the question.

    An attack that aimed at y, where the model errs that far, would mend the image.
    """
    return model(x).scatter(1, y[:, None], float("inf")).argmin(dim=1)


def check_eps(eps: float, norm: str = "linf") -> None:
    """Refuse what is no distance, and a pixel's change on the scale of 0 to 255."""
    check_number("eps", eps, 0)
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps={eps} is more than the whole range of a pixel, which is [0, 1] here: for {eps:g} "
            f"of 255 levels give {eps:g}/255 = {eps / 255:.4f}"
        )


def check_eps_and_alpha(eps: float, alpha: float | None) -> float:
    """Return alpha, by default half of eps; refuse what is no part of it."""
    check_eps(eps)
    alpha = eps / 2 if alpha is None else alpha
    check_number("alpha", alpha, 0, eps)
    return alpha


def check_eps_and_steps(eps: float, step: float | None, steps: int, norm: str = "linf") -> float:
    """Return the step's size, by default 2.5 eps / steps; refuse numbers that make no attack."""
    check_eps(eps, norm)
    check_number("steps", steps, 1, whole=True)
    step = 2.5 * eps / steps if step is None else step
    check_number("step", step, 0)
    return step
