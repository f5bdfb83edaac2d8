"""DeepFool: step by step to the nearest border between two classes.

Around an image a classifier is nearly linear, and the border of class j lies at the distance
|f_j| / ||w_j||, where f_j = z_j - z_y is how far its logit is behind and w_j the gradient of f_j.
DeepFool steps over the nearest of these borders, looks again, and stops when the class has changed.
Explained in notebook 03.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from unfool.attacks._guard import check_inputs, check_number, in_chunks, refuse_target
from unfool.progress import Progress

VERSION = 1
# How many times the mean of the gradients seen an unseen one may be. Measured at x on 1,376 digits
# and two networks, none of which chose another border; against the largest one seen instead of the
# mean, 1.5 is as dear and misses the nearest border of 8. On colour it is less exact: of 568 photos
# with digits (mnist-m, training images, resnet8) 12 end elsewhere, and the mean way is 0.3 %
# longer; with 2.5 none does, for half as many backward passes again.
SLACK = 1.75
CROSSING = 1e-4  # added to each step, so that it crosses the border also where it is short


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    overshoot: float = 0.02,
    steps: int = 50,
    classes: int = 10,
    exact: bool = False,
    bisect: int = 0,
    target: Tensor | None = None,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """DeepFool in L2: the nearest image of another class, found border by border.

    Moosavi-Dezfooli et al. 2016, algorithm 2, with its authors' defaults and the 1e-4 of their
    code. As in other libraries each step is clipped to [0, 1], and the overshoot belongs to each
    step, where the authors, who don't clip, apply it once to the sum. Explained in notebook 03.

    Args:
        model: returns logits (N, classes).
        x: images (N, C, H, W), float32 in [0, 1].
        y: true classes (N,), int64.
        overshoot: how much further than the border to step, as a share of the way; 0.02.
        steps: how many steps at most; 50.
        classes: how many classes are considered: those with the largest logits for x, its own
            included; 10.
        exact: visit all of them at every step. By default they are visited in the order of their
            logits, until no border can be nearer than the best one so far unless its gradient is
            over 1.75 times as long as those seen on average. Digits are the same but for a rare
            one, of small colour images 98 %, at a fifth of the backward passes.
        bisect: how many times to halve the way back from the result to the border; 0 as in the
            paper, 8 come within 0.4 % of the way.
        target: must be None: DeepFool goes to the nearest class.
        generator: unused, DeepFool draws nothing.
        progress: called with the number of images done.

    Returns:
        Images of another class, in [0, 1]: shape, dtype and device of `x`, detached. Those where it
        failed, and those that the model misread anyway, are the original.

    Raises:
        TypeError, ValueError: an input is not as above; the message has the value and the remedy.
    """
    check_inputs(x, y)
    refuse_target(target, "deepfool", "it goes to the nearest class")
    check_number("overshoot", overshoot, 0)
    check_number("steps", steps, 1, whole=True)
    check_number("classes", classes, 2, whole=True)
    check_number("bisect", bisect, 0, whole=True)

    def attack(rows: slice) -> Tensor:
        images, labels = x[rows].detach(), y[rows]
        crossed = cross(
            model, images, labels, overshoot=overshoot, steps=steps, classes=classes, exact=exact
        )
        return halve_the_way(model, images, crossed, labels, bisect)

    return in_chunks(attack, model, x, y, progress=progress, name="deepfool")


def cross(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    overshoot: float,
    steps: int,
    classes: int,
    exact: bool,
) -> Tensor:
    """Step over the nearest border until the class changes; return x where it never does.

    Images (N, C, H, W), y (N,). An image that is done leaves the batch before the next backward.
    """
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    now, logits = forward(model, x)
    rivals = largest_others(logits, y, classes - 1)
    for taken in range(steps + 1):
        stays = logits.argmax(dim=1) == y[left]
        x_adv[left[~stays]] = now[~stays].detach()
        left = left[stays]
        if len(left) == 0 or taken == steps:
            break
        if not stays.all():
            now, logits = forward(model, now[stays])
        way = to_nearest_border(model, now, logits, y[left], rivals[left], exact)
        now, logits = forward(model, (now + (1 + overshoot) * way).clamp(0, 1))
    return x_adv


def to_nearest_border(
    model: nn.Module, x: Tensor, logits: Tensor, y: Tensor, rivals: Tensor, exact: bool
) -> Tensor:
    """Return each image's way to its nearest linearised border, (n, C, H, W).

    A gradient costs a backward, so the rivals with the largest logits come first, and an image
    stops as soon as no other border can be nearer: that of a rival `behind` by f lies at f / ||w||,
    and no ||w|| is expected to exceed SLACK times the mean of those seen.

    Args:
        x, logits: images in the graph and what the model says of them, from `forward`.
        y, rivals: own class (n,) and the classes to compare with (n, K).
    """
    ahead, order = logits.detach().gather(1, rivals).sort(dim=1, descending=True, stable=True)
    behind = logits.detach().gather(1, y[:, None]) - ahead
    rivals = rivals.gather(1, order)
    way, nearest = torch.zeros_like(x), torch.full_like(behind[:, 0], float("inf"))
    seen, left = torch.zeros_like(nearest), torch.arange(len(x), device=x.device)
    for k in range(rivals.shape[1]):
        if k > 0 and not exact:
            may_win = behind[left, k] < SLACK * seen[left] / k * nearest[left]
            left = left[may_win]
            if len(left) == 0:
                break
            if not may_win.all():
                x, logits = forward(model, x[may_win])
        w = difference_gradient(x, logits, rivals[left, k], y[left])
        norm = w.flatten(1).norm(dim=1).clamp(min=1e-6)
        distance = behind[left, k] / norm
        nearer = distance < nearest[left]
        winners = left[nearer]
        nearest[winners] = distance[nearer]
        way[winners] = w[nearer] * ((distance + CROSSING) / norm)[nearer].view(-1, 1, 1, 1)
        seen[left] += norm
    return way


def forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as the start of a new graph, and the model's logits for it."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        return x, model(x)


def difference_gradient(x: Tensor, logits: Tensor, rivals: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of z_rival - z_y for each image, like x; its graph can be used again."""
    rows = torch.arange(len(x), device=x.device)
    with torch.enable_grad():
        difference = (logits[rows, rivals] - logits[rows, y]).sum()
    (gradient,) = torch.autograd.grad(difference, x, retain_graph=True)
    return gradient


def largest_others(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the classes other than y with the largest logits, (N, count) or all there are."""
    others = logits.detach().scatter(1, y[:, None], float("-inf"))
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


@torch.no_grad()
def halve_the_way(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, times: int) -> Tensor:
    """Return the image nearest to x, of those met by halving the way, whose class is not y.

    Images that did not move, and all of them where `times` is 0, come back as they are.
    """
    moved = (x_adv != x).flatten(1).any(dim=1)
    if times == 0 or not moved.any():
        return x_adv
    start, end, own = x[moved], x_adv[moved], y[moved]
    near, far = start.new_zeros(len(start), 1, 1, 1), start.new_ones(len(start), 1, 1, 1)
    for _ in range(times):
        middle = (near + far) / 2
        crossed = (model(torch.lerp(start, end, middle)).argmax(dim=1) != own).view_as(middle)
        near, far = torch.where(crossed, near, middle), torch.where(crossed, middle, far)
    result = x_adv.clone()
    result[moved] = torch.lerp(start, end, far)
    return result
