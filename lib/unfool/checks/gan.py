"""Checks of exercise 06: the two players' losses, D's step, gradient penalty, a patch's size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unfool.checks._tools import Answer, Draw, Wrong, same, task


def cost(logits: Tensor, label: int) -> float:
    """Mean cross-entropy of logits against one label: log(1 + exp(∓logit))."""
    turned = logits.double() * (-1 if label else 1)
    return float(torch.logaddexp(turned, torch.zeros_like(turned)).mean())


@task("ex06_discriminator_loss")
def discriminator_loss(answer: Answer, draw: Draw) -> None:
    """Half the cost of calling the real ones real and the made ones made."""
    real, made = 2 * draw.normal(4, 1, 3, 3), 2 * draw.normal(4, 1, 3, 3)
    real[0, 0, 0, 0], made[0, 0, 0, 0] = -120.0, 120.0  # where exp of a float32 is infinite
    right = (cost(real, 1) + cost(made, 0)) / 2
    same(
        answer(real, made),
        right,
        "half of the mean cost of real logits against 1 plus that of made logits against 0",
        {
            "the labels are swapped: real is 1": (cost(real, 0) + cost(made, 1)) / 2,
            "halve the sum of the two": cost(real, 1) + cost(made, 0),
            "D must also call the made ones made": cost(real, 1) / 2,
            "D must also call the real ones real": cost(made, 0) / 2,
            "both are called real: that would be G's wish": (cost(real, 1) + cost(made, 1)) / 2,
        },
        tolerance=1e-3,
    )


@task("ex06_generator_loss")
def generator_loss(answer: Answer, draw: Draw) -> None:
    """The non-saturating form: what it costs D to call the made ones real."""
    made = 2 * draw.normal(4, 1, 3, 3)
    made[0, 0, 0, 0] = -120.0
    same(
        answer(made),
        cost(made, 1),
        "the mean cross-entropy of the made logits against the label 1",
        {
            "that is what D wants: G wants its samples called real, label 1": cost(made, 0),
            "that is the saturating form, whose gradient dies where D is sure: use the label 1": (
                -cost(made, 0)
            ),
            "the logits themselves are the critic's game (WGAN): here it is cross-entropy": float(
                -made.mean()
            ),
            "take the mean over all patches, not the sum": cost(made, 1) * made.numel(),
        },
        tolerance=1e-3,
    )


@task("ex06_discriminator_step")
def discriminator_step(answer: Answer, draw: Draw) -> None:
    """One update of D on real and made samples that leaves no gradient at G."""
    g, d = _linear(draw, 2, 3), _linear(draw, 3, 1)
    rate = draw.number(0.1, 0.5)
    real, z = 1 + draw.normal(5, 3), draw.normal(5, 2)
    weight, bias = d.weight.detach().clone(), d.bias.detach().clone()
    with torch.no_grad():
        made = g(z)
        wrong_real, wrong_made = torch.sigmoid(d(real)) - 1, torch.sigmoid(d(made))
    slope = 0.5 * (wrong_real.T @ real + wrong_made.T @ made) / 5
    shift = 0.5 * (wrong_real.mean() + wrong_made.mean())
    optimizer = torch.optim.SGD(d.parameters(), lr=rate)
    d.weight.grad, d.bias.grad = torch.ones_like(weight), torch.ones_like(bias)  # of an older step
    before = [p.detach().clone() for p in g.parameters()]
    answer(g, d, optimizer, real, z, may_change=(1, 2))
    if any(p.grad is not None for p in g.parameters()):
        raise Wrong(
            "a gradient reached the generator: cut the graph with detach() (or make the samples "
            "under torch.no_grad())"
        )
    if any(not torch.equal(p, q) for p, q in zip(g.parameters(), before, strict=True)):
        raise Wrong("the generator moved: this is the discriminator's step")
    if torch.equal(d.weight, weight):
        raise Wrong("the discriminator did not move: call optimizer.step() after backward()")
    moved, expected = (weight - d.weight.detach()) / rate, slope
    same(
        moved,
        expected,
        "forget old gradients, backward through half the sum of both costs, one optimizer.step()",
        {
            "a gradient of an earlier step is still there: call optimizer.zero_grad() first": (
                expected + 1
            ),
            "D walks uphill: it lowers its loss": -expected,
            "halve the sum of the two costs": 2 * expected,
            "only the real samples count: D sees the made ones, too": 0.5 * wrong_real.T @ real / 5,
            "only the made samples count: D sees the real ones, too": 0.5 * wrong_made.T @ made / 5,
            "the labels are swapped: real is 1": 0.5
            * ((wrong_real + 1).T @ real + (wrong_made - 1).T @ made)
            / 5,
        },
        tolerance=1e-3,
    )
    same((bias - d.bias.detach()) / rate, shift.view(1), "look at D's bias", tolerance=1e-3)


def _linear(draw: Draw, inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(draw.normal(outputs, inputs))
        layer.bias.copy_(draw.normal(outputs))
    return layer


@task("ex06_gradient_penalty")
def gradient_penalty(answer: Answer, draw: Draw) -> None:
    """How far the critic's slope is from 1 between real and made samples."""
    a, b = draw.normal(9), draw.normal(9)

    def critic(images: Tensor) -> Tensor:  # its gradient at x is a + 2 (b · x) b
        flat = images.flatten(1)
        return (flat @ a + (flat @ b) ** 2)[:, None]

    real, made, t = draw.uniform(4, 1, 3, 3), draw.uniform(4, 1, 3, 3), draw.uniform(4, 1, 1, 1)
    t = 0.05 + 0.35 * t

    def slopes(share: Tensor) -> Tensor:
        x = (share * real + (1 - share) * made).flatten(1)
        return a + 2 * (x @ b)[:, None] * b

    def penalty(g: Tensor) -> float:
        return float(((g.norm(dim=1) - 1) ** 2).mean())

    g = slopes(t)
    got = answer(critic, real, made, t)
    same(
        got,
        penalty(g),
        "the mean over images of (|gradient| - 1)², at t · real + (1 - t) · made",
        {
            "t weighs the real ones: t · real + (1 - t) · made": penalty(slopes(1 - t)),
            "the norm runs over all pixels of an image, not over one axis": float(
                ((g.view(4, 3, 3).norm(dim=1) - 1) ** 2).mean()
            ),
            "each image has its own slope: take the norm image by image": float(
                (g.norm() - 1) ** 2
            ),
            "the slope should be 1, not 0: subtract 1 from the norm": float(
                g.norm(dim=1).square().mean()
            ),
            "square the difference": float((g.norm(dim=1) - 1).mean()),
            "the penalty is taken between the samples, not at the real ones": penalty(
                slopes(torch.ones_like(t))
            ),
        },
        tolerance=1e-3,
    )
    w = draw.normal(4).requires_grad_(True)
    images = draw.uniform(2, 1, 2, 2)
    got = answer(lambda x: (x.flatten(1) @ w)[:, None], images, 1 - images, t[:2])
    if not (isinstance(got, Tensor) and got.requires_grad):
        raise Wrong(
            "the critic can't learn from this: torch.autograd.grad needs create_graph=True, "
            "and the "
            "result must stay in the graph"
        )


@task("ex06_receptive_field")
def receptive_field(answer: Answer, draw: Draw) -> None:
    """Counted forwards here: how far apart neighbours are, layer by layer."""
    while True:
        layers = [(draw.whole(1, 5), draw.whole(1, 3)) for _ in range(draw.whole(3, 5))]
        right = _field(layers)
        shortcuts = {
            "count backwards, from the last layer to the first": _field(layers[::-1]),
            "a stride multiplies what is seen behind it: r ← (r - 1) · s + k": 1
            + sum(k - 1 for k, _ in layers),
            "start from one output, r = 1": _backwards(layers, 0),
            "it is (r - 1) · s + k: r outputs lie r - 1 steps apart": _times(layers),
        }
        if right not in shortcuts.values() and len(set(shortcuts.values())) == 4:
            break
    same(
        answer(layers),
        float(right),
        "r ← (r - 1) · s + k, from the last layer to the first",
        shortcuts,
    )


def _field(layers: list[tuple[int, int]]) -> int:
    field, apart = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * apart
        apart *= stride
    return field


def _backwards(layers: list[tuple[int, int]], r: int) -> int:
    for k, s in layers[::-1]:
        r = s * (r - 1) + k
    return r


def _times(layers: list[tuple[int, int]]) -> int:
    r = 1
    for k, s in layers[::-1]:
        r = s * r + k
    return r
