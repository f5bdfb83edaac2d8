"""DDN: step by step as in the paper, as near as foolbox's, kind to the batch."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attack_tools import length
from unfool.attacks import ddn
from unfool.attacks._nearest import Nearest, annealed, from_the_right_ones, l2, shorten, unit
from unfool.evaluation import counted
from victims import (
    Batch,
    Narrow,
    Rows,
    comes_back_after_an_error,
    digits,
    in_unit_range,
    row_batch,
    small_net,
)


def rightly_read(n: int = 24) -> tuple[nn.Module, Batch]:
    net, (x, y, target) = small_net(), digits(n, small=True)
    right = net(x).argmax(dim=1) == y
    return net, (x[right], y[right], target[right])


def wins(net: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    seen = net(x_adv).argmax(dim=1)
    return (seen != y) if target is None else (seen == target)


# --- what it computes -----------------------------------------------------------------------------


def one_by_one(
    net: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, steps: int, gamma: float
) -> Tensor:
    """Algorithm 1 as the paper writes it down, an image at a time."""
    done = []
    for i, image in enumerate(x):
        aim, sign = (y[i], 1) if target is None else (target[i], -1)
        delta, eps, best, shortest = torch.zeros_like(image), 1.0, image, math.inf
        for k in range(steps):
            now = (image + delta).requires_grad_(True)
            logits = net(now[None])
            (gradient,) = torch.autograd.grad(sign * cross_entropy(logits, aim[None]), now)
            won = bool((logits.argmax() == aim) == (target is not None))
            if won and float(delta.norm()) < shortest:
                shortest, best = float(delta.norm()), now.detach()
            alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2
            delta = delta + alpha * gradient / gradient.norm()
            eps *= 1 - gamma if won else 1 + gamma
            delta = (image + eps * delta / delta.norm()).clamp(0, 1) - image
        done.append(best)
    return torch.stack(done)


@pytest.mark.parametrize("targeted", [False, True])
def test_its_images_are_those_of_the_algorithm_done_one_by_one(targeted: bool) -> None:
    net, (x, y, target) = rightly_read(8)
    aim = target if targeted else None
    theirs = one_by_one(net, x, y, aim, 20, 0.05)
    assert torch.allclose(ddn(net, x, y, target=aim, steps=20), theirs, atol=1e-4)
    assert int((length(theirs - x) > 0).sum()) >= 3
    assert not torch.allclose(ddn(net, x, y, target=aim, steps=20, gamma=0.06), theirs, atol=1e-3)


@pytest.mark.parametrize("targeted", [False, True])
def test_as_near_as_foolbox(targeted: bool) -> None:
    import foolbox

    net, (x, y, target) = rightly_read()
    criterion = foolbox.criteria.TargetedMisclassification(target) if targeted else y
    attack = foolbox.attacks.DDNAttack(steps=40)
    theirs = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, criterion, epsilons=None)[0]
    net.zero_grad(set_to_none=True)  # it leaves gradients behind
    aim = target if targeted else None

    def no_worse(**settings: Any) -> bool:
        ours = ddn(net, x, y, target=aim, steps=40, **settings)
        won, both = wins(net, ours, y, aim), wins(net, theirs, y, aim)
        near, nearer = (float(length(part - x)[won & both].median()) for part in (theirs, ours))
        return int(won.sum()) >= int(both.sum()) and nearer <= 1.002 * near

    assert int(wins(net, theirs, y, aim).sum()) > 16
    assert no_worse()
    assert no_worse(gamma=0.1, gamma_last=0.001)
    assert not no_worse(gamma=0.4)  # sees a sphere that jumps


def test_annealed_it_ends_on_the_border() -> None:
    net, (x, y, _) = rightly_read()

    def on_the_border(**settings: float) -> float:
        """The share of images that are what they were when they go back 1 % of the way."""
        back = x + 0.99 * (ddn(net, x, y, steps=50, gamma=0.3, **settings) - x)
        return float((net(back).argmax(dim=1) == y).float().mean())

    assert on_the_border(gamma_last=0.001) > 0.9
    assert on_the_border() < 0.7


def test_annealed_by_half_a_cosine() -> None:
    assert annealed(1.0, 0.01, 0.0) == 1.0
    assert annealed(1.0, 0.01, 0.5) == pytest.approx(0.505)
    assert annealed(1.0, 0.01, 1.0) == pytest.approx(0.01)
    assert annealed(1.0, 0.01, 0.25) > 0.8  # a straight line would be at 0.75


def test_walks_to_the_rivals_come_nearer_and_each_costs_its_passes() -> None:
    net, (x, y, _) = rightly_read()
    with counted(net) as passes:
        usual = length(ddn(net, x, y, steps=20) - x)
    one = passes.backward
    with counted(net) as passes:
        aimed = ddn(net, x, y, steps=20, rivals=3)
    assert passes.backward == 4 * one
    order = net(x).scatter(1, y[:, None], -torch.inf).topk(3, dim=1).indices
    each = [length(ddn(net, x, y, steps=20, target=rival) - x) for rival in order.T]
    each = [torch.where(part > 0, part, torch.inf) for part in (usual, *each)]
    assert torch.allclose(length(aimed - x), torch.stack(each).amin(dim=0), rtol=1e-3)
    assert float((length(aimed - x) < 0.999 * usual).float().mean()) > 0.1
    assert wins(net, aimed, y, None).all()


# --- the nearest image ----------------------------------------------------------------------------


class First(nn.Module):
    """Class 1 where the first pixel is over 0.75, by twice the excess; else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        by = x.flatten(1)[:, :1] - 0.75
        return torch.cat([-by, by], dim=1)


def test_the_nearest_image_by_hand() -> None:
    x, y = torch.zeros(2, 1, 1, 2), torch.tensor([0, 0])
    nearest = Nearest(First(), x, y, None, l2)
    seen = []
    for pixels in ([0.9, 0.7], [0.8, 0.0], [1.0, 1.0]):
        images = torch.tensor([pixels, [0.75, 0.5]]).view_as(x)
        margin, gradient = nearest.look(images, nearest.margin)
        seen.append(float(margin[0]))
        assert gradient.flatten(1).tolist() == [[2.0, 0.0], [2.0, 0.0]]
    assert seen == pytest.approx([0.3, 0.1, 0.5])
    assert nearest.best[0].flatten().tolist() == pytest.approx([0.8, 0.0])
    assert nearest.distance.tolist() == pytest.approx([0.8, float("inf")])
    assert torch.equal(nearest.best[1], x[1])  # a margin of 0 is none: rounding may turn it
    aimed = Nearest(First(), x, y, torch.tensor([1, 1]), l2)
    assert aimed.keep(images, First()(images)).tolist() == pytest.approx([0.5, 0.0])


def test_halving_the_way_by_hand() -> None:
    """The border lies at 3/4 of the way: 2 halvings find 1, 3 find 7/8, 4 find 13/16."""
    x, far = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    for times, expected in ((0, 1.0), (2, 1.0), (3, 0.875), (4, 0.8125)):
        nearest = Nearest(First(), x, torch.tensor([0]), None, l2)
        got = nearest.halve_the_way(far, shorten, times)
        assert got.flatten().tolist() == pytest.approx([expected, 0.0])
        assert torch.equal(nearest.best, got)


def test_only_what_is_read_rightly_is_searched_for() -> None:
    net, (x, y, _) = Rows(), row_batch(10)
    asked: list[int] = []

    def search(rows: Tensor) -> Tensor:
        asked.extend(rows.tolist())
        return 0 * x[rows]

    got = from_the_right_ones(net, x, y, slice(2, 8), search)
    assert asked == [2, 3, 4, 6, 7]  # the fifth is labelled wrongly
    assert torch.equal(got[3], x[5])
    assert float(got.sum()) == float(x[5].sum())


def test_a_vanishing_gradient_makes_no_nan() -> None:
    assert unit(torch.zeros(2, 1, 2, 2)).tolist() == torch.zeros(2, 1, 2, 2).tolist()
    assert float(l2(unit(torch.full((1, 1, 2, 2), 1e-9)))) == pytest.approx(1)

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([3.0, 0.0]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(ddn(Flat(), x, y, steps=5), x)


# --- minimal-norm semantics and batches -----------------------------------------------------------


def test_what_it_cannot_fool_and_what_is_misread_comes_back() -> None:
    net, (x, y, target) = Rows(), row_batch(20)
    got = ddn(net, x, y, target=target, steps=30)
    assert torch.equal(got[::5], x[::5])
    assert in_unit_range(got)
    hit = length(got - x) > 0
    assert int(hit.sum()) > 8
    assert torch.equal(net(got).argmax(dim=1)[hit], target[hit])
    assert torch.equal(ddn(net, x, y, target=target, steps=1), x)  # it has only seen x


def test_a_step_is_a_pass_and_finished_images_cost_nothing() -> None:
    net, (x, y, _) = Rows(), row_batch(20)
    with counted(net) as passes:
        ddn(net, x, y, steps=7)
    assert (passes.forward, passes.backward) == (20 + 16 * 7, 16 * 7)


def test_an_images_result_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y, target) = Rows(), row_batch(12)
    whole = ddn(net, x, y, target=target, steps=20)
    for i in (0, 1, 4, 11):
        rows = slice(i, i + 1)
        assert torch.equal(ddn(net, x[rows], y[rows], target=target[rows], steps=20), whole[rows])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = ddn(net, x[order], y[order], target=target[order], steps=20)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(mixed, whole)
    monkeypatch.setattr("unfool.inputs.CPU_CHUNK", 5)
    told: list[tuple[int, int, str]] = []
    chunked = ddn(net, x, y, target=target, steps=20, progress=lambda *step: told.append(step))
    assert torch.equal(chunked, whole)
    assert told == [(5, 12, "ddn"), (10, 12, "ddn"), (12, 12, "ddn")]
    assert torch.equal(ddn(Narrow(net), x, y, target=target, steps=20), whole)


def test_the_bits_repeat_and_the_random_state_stays() -> None:
    net, (x, y, _) = rightly_read(6)
    before = torch.get_rng_state()
    first = ddn(net, x, y, steps=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    with torch.no_grad():
        again = ddn(net, x.clone().requires_grad_(True), y, steps=10)
    assert torch.equal(again, first)
    assert not again.requires_grad


# --- the caller's model and bad input -------------------------------------------------------------


def test_the_model_comes_back_after_an_error() -> None:
    comes_back_after_an_error(ddn)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"steps": 0}, ValueError, r"steps must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"gamma": -0.1}, ValueError, r"gamma must be from 0 to 1, not -0\.1"),
        ({"gamma_last": 2}, ValueError, r"gamma_last must be from 0 to 1, not 2"),
        ({"radius": 0}, ValueError, r"radius must be > 0: .* the paper's is 1"),
        ({"radius": float("nan")}, ValueError, r"radius .*nan"),
        ({"rivals": -1}, ValueError, r"rivals must be >= 0, not -1"),
        (
            {"rivals": 2, "target": row_batch(20)[2]},
            ValueError,
            r"rivals=2 needs target to be",
        ),
        ({"target": row_batch(20)[1]}, ValueError, r"equals y for 20"),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, y, _ = row_batch(20)
    with pytest.raises(kind) as caught:
        ddn(Rows(), x, y, **change)
    assert re.search(message, str(caught.value)), str(caught.value)
