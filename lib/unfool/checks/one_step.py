"""Checks of exercise 02: linear gain, FGSM, projections, a random start, BIM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unfool.checks._tools import Answer, Draw, Wrong, same, task, tensor


@task("ex02_worst_gain")
def worst_gain(answer: Answer, draw: Draw) -> None:
    """eps times the sum of absolute weights, for each of several linear scores."""
    w, eps = draw.normal(3, 1, 4, 5), draw.number(0.05, 0.4)
    rows = [sum(abs(v) for v in row.flatten().tolist()) for row in w]
    flat = w.flatten(1)
    same(
        answer(w, eps),
        torch.tensor([eps * row for row in rows]),
        "add up eps times |w| over all pixels of an image, image by image",
        {
            "positive and negative weights cancel: each pixel may move in the direction of its own "
            "weight, so add up absolute values": eps * flat.sum(1),
            "that is the Euclidean length of w: in the L-infinity ball each pixel moves by its "
            "whole eps, so add up |w|": eps * flat.norm(dim=1),
            "that is the largest single weight: all pixels move at once": eps * flat.abs().amax(1),
            "you average over the pixels: add them up": eps * flat.abs().mean(1),
            "you add up the whole batch: one number for each image, (N,)": eps * flat.abs().sum(),
            "the result does not depend on eps: multiply by it": flat.abs().sum(1),
        },
    )


@task("ex02_fgsm")
def fgsm(answer: Answer, draw: Draw) -> None:
    """One step of eps along the sign of the loss's gradient, clipped."""
    net, eps = draw.classifier(1, 4, 4), draw.number(0.05, 0.3)
    next(net.parameters()).data[:, :2] = (
        0  # two pixels that the network does not see stay as they are
    )
    x, y = draw.uniform(5, 1, 4, 4), draw.labels(5, 4)
    g = loss_gradient(net, x, y)
    up = torch.where(g > 0, eps, torch.where(g < 0, -eps, 0.0))
    length = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    same(
        answer(net, x, y, eps),
        torch.minimum(torch.maximum(x + up, torch.zeros(())), torch.ones(())),
        "x plus eps times the sign of the gradient of the cross-entropy at x, clipped to [0, 1]",
        {
            "you walk downhill: the attack raises the loss": (x - up).clamp(0, 1),
            "pixels leave [0, 1]: clip the result": x + up,
            "take the sign of the gradient: each pixel moves by the whole eps": (
                (x + eps * g / len(x)).clamp(0, 1)
            ),
            "that is a step along the gradient itself, for L2: take its sign": (
                (x + eps * g / length).clamp(0, 1)
            ),
            "that is the perturbation alone: add it to x": up,
            "the image comes back as it was: take a step": x,
        },
    )


@task("ex02_project_linf")
def project_linf(answer: Answer, draw: Draw) -> None:
    """The nearest point that differs by at most eps at each pixel."""
    x, eps = draw.uniform(4, 1, 3, 3), draw.number(0.05, 0.3)
    x_adv = x + draw.uniform(4, 1, 3, 3, low=-0.6, high=0.6)
    x_adv[0] = x[0] + 0.5 * eps * draw.uniform(1, 3, 3, low=-1)  # inside: nothing to do
    change = x_adv - x
    capped = change.abs().clamp(max=eps) * change.sign()
    same(
        answer(x_adv, x, eps),
        x + capped,
        "bring the change of each pixel to within [-eps, eps], then add it to x",
        {
            "you return the change: add it to x": capped,
            "you clip the pixels to [0, 1]: here it is the distance to x that is limited": (
                x_adv.clamp(0, 1)
            ),
            "every pixel moves by eps, also where the change was smaller: leave those be": (
                x + eps * change.sign()
            ),
            "you shrink the whole change until it fits: limit each pixel by itself": x
            + change * (eps / change.flatten(1).abs().amax(1).view(-1, 1, 1, 1)).clamp(max=1),
            "changes below -eps remain: limit both sides": x + change.clamp(max=eps),
            "changes above eps remain: limit both sides": x + change.clamp(min=-eps),
            "nothing is limited: bring back what strayed further than eps": x_adv,
        },
    )


@task("ex02_project_l2")
def project_l2(answer: Answer, draw: Draw) -> None:
    """The nearest point within Euclidean distance eps, image by image."""
    x, eps = draw.uniform(5, 2, 3, 3), draw.number(0.5, 1.5)
    lengths = torch.tensor([0.0, 0.4 * eps, 1.0 * eps, 1.8 * eps, 3.0 * eps])
    way = draw.normal(5, 2, 3, 3)
    way = way / way.square().sum((1, 2, 3), keepdim=True).sqrt()
    change = way * lengths.view(-1, 1, 1, 1)
    whole = change.norm()
    far = (lengths > eps).view(-1, 1, 1, 1)
    x_adv = x + change
    same(
        answer(x_adv, x, eps),
        torch.where(far, x + eps * way, x_adv),
        "where the change is longer than eps, shorten it to eps; leave the others as they are "
        "(mind a change of length 0)",
        {
            "you stretch changes that were short enough: only shorten": x
            + eps * torch.where(lengths.view(-1, 1, 1, 1) > 0, way, change),
            "you return the change: add it to x": torch.where(far, eps * way, change),
            "you take the length of the whole batch: each image has its own": x
            + change * (eps / whole).clamp(max=1),
            "you limit each pixel, which is the L-infinity ball: limit the length of the whole "
            "change": x + change.clamp(-eps, eps),
            "nothing is shortened: bring back the images that strayed further than eps": x_adv,
        },
        tolerance=1e-5,
    )


@task("ex02_random_start")
def random_start(answer: Answer, draw: Draw) -> None:
    """Uniform in the ball, within [0, 1], from the generator that is given."""
    x, eps = draw.uniform(3, 1, 16, 16), draw.number(0.1, 0.3)
    x[0] = 0.0
    x[1] = 0.5
    seed = draw.whole(0, 10**6)

    def start(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return tensor(answer(x, eps, generator), tuple(x.shape))

    got, again, other = start(seed), start(seed), start(seed + 1)
    if not torch.equal(got, again):
        raise Wrong("the same seed gives two different starts: draw from `generator`")
    if torch.equal(got, other):
        raise Wrong("two seeds give the same start: draw from `generator`")
    if got.min() < 0 or got.max() > 1:
        raise Wrong(f"pixels lie in [{got.min():.2f}, {got.max():.2f}]: clip to [0, 1]")
    change = got - x
    if change.abs().max() > eps + 1e-5:
        raise Wrong(f"a pixel moves by {change.abs().max():.3f}, more than eps = {eps}")
    grey = change[1].flatten()  # 256 values that no clipping touches
    if grey.abs().std() < 1e-4:
        raise Wrong("all pixels move equally far: uniform means any distance up to eps")
    if abs(float(grey.mean())) > 0.25 * eps:
        raise Wrong("the noise leans to one side: it must reach from -eps to eps")
    if grey.abs().max() < 0.9 * eps:
        raise Wrong(f"no pixel moves by more than {grey.abs().max():.3f}: noise up to eps is asked")
    inner = float((grey.abs() < eps / 2).float().mean())
    if not 0.3 < inner < 0.7:
        raise Wrong("the noise is not uniform: half of it should be smaller than eps / 2")


@task("ex02_bim")
def bim(answer: Answer, draw: Draw) -> None:
    """Small sign steps, each pulled back into the ball and into [0, 1]."""
    net, steps = draw.classifier(1, 3, 3), draw.whole(3, 6)
    next(net.parameters()).data[:, 0] = 0  # a pixel that the network does not see stays as it is
    x, y = draw.uniform(4, 1, 3, 3), draw.labels(4, 4)
    eps = draw.number(0.1, 0.2)
    step = round(0.4 * eps, 3)

    def slope(images: Tensor) -> Tensor:
        return loss_gradient(net, images, y)

    got = tensor(answer(slope, x, eps, step, steps), tuple(x.shape))
    if (got - x).abs().max() > eps + 1e-4:
        raise Wrong(
            f"a pixel ends {(got - x).abs().max():.3f} from x, more than eps = {eps}: after every "
            "step come back to within eps of the clean x"
        )
    if got.min() < 0 or got.max() > 1:
        raise Wrong("pixels leave [0, 1]: clip after every step")
    same(
        got,
        walk(slope, x, eps, step, steps),
        "repeat `steps` times: a new gradient, a step of size `step` along its sign, back to "
        "within "
        "eps of x, clip to [0, 1]",
        lambda: {
            "you walk downhill: the attack raises the loss": walk(slope, x, eps, -step, steps),
            "the gradient is always that of the clean x: ask for a new one at every step": walk(
                lambda _: slope(x), x, eps, step, steps
            ),
            "you take one step: repeat it `steps` times": walk(slope, x, eps, step, 1),
            "you take one step too few": walk(slope, x, eps, step, steps - 1),
            "you step by eps: the size of a step is `step`": walk(slope, x, eps, eps, steps),
            "the image comes back as it was: take a step": x,
        },
    )


def walk(
    slope: Callable[[Tensor], Tensor], x: Tensor, eps: float, step: float, steps: int
) -> Tensor:
    """Reference of BIM: the limits of each pixel are fixed beforehand."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    now = x
    for _ in range(steps):
        now = torch.minimum(torch.maximum(now + step * slope(now).sign(), low), high)
    return now


def loss_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the cross-entropy, summed over the batch, from the formula of the softmax."""
    image = x.detach().clone().requires_grad_(True)
    z = net(image)
    loss = torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]
    return torch.autograd.grad(loss.sum(), image)[0]
