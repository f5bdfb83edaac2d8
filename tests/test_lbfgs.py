"""L-BFGS: the nearest point in the box where it is known, as near as Carlini and Wagner's image."""

from __future__ import annotations

import math
import re
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unfool.attacks import carlini_wagner_l2
from unfool.attacks.lbfgs import Problem, lbfgs
from victims import Counted, Rows, comes_back_after_an_error, digits, row_batch, small_net

room = import_module("unfool.attacks.lbfgs")  # by its name the package knows the function
QUICK: dict[str, Any] = {"searches": 3, "steps": 8, "c": 1.0}


def linear(classes: int = 2) -> nn.Module:
    """A random linear classifier, undecided between all classes on mid-grey."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    net[1].bias.data = -0.5 * net[1].weight.data.sum(dim=1)
    return net


def nearest_in_the_box(net: nn.Module, x: Tensor) -> Tensor:
    """Each image's nearest point of [0, 1]^64 on the border between classes 0 and 1, (N, 64).

    It is clip(x + t w) for the t at which the border is met.
    """
    w, b = (net[1].weight[1] - net[1].weight[0]).detach(), net[1].bias.detach()
    start, low, high = x.flatten(1), torch.zeros(len(x), 1), torch.full((len(x), 1), 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = (start + middle * w).clamp(0, 1) @ w[:, None] + b[1] - b[0] > 0
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (start + high * w).clamp(0, 1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1)


def test_on_a_linear_model_it_finds_the_nearest_point_of_the_box() -> None:
    net = linear()
    w = (net[1].weight[1] - net[1].weight[0]).detach().view(1, 1, 8, 8)
    noise = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (noise - 0.6 * w.sign()).clamp(0, 1)  # many are black or white, all of class 0
    x[:, :, :3] = (w[:, :, :3] > 0).float()  # and these can't help: they are class 1's already
    y = net(x).argmax(dim=1)
    assert not y.any()
    best = nearest_in_the_box(net, x)
    got = lbfgs(net, x, y)
    assert (net(got).argmax(dim=1) == 1).all()
    ratio = distance(got, x) / distance(best.view_as(x), x)
    assert float(ratio.min()) > 0.999
    assert float(ratio.max()) < 1.04
    off = distance(got, best.view_as(x)) / distance(got, x)
    assert float(off.max()) < 0.15
    behind = (net(x)[:, 0] - net(x)[:, 1]).detach()
    assert (distance(got, x) > 1.05 * behind / w.norm()).all()  # without the box it were nearer
    hasty = lbfgs(net, x, y, searches=1, c=50.0)
    assert float((distance(hasty, x) / distance(got, x)).min()) > 1.1  # the control


@pytest.mark.parametrize("targeted", [False, True])
def test_as_near_as_carlini_and_wagner(targeted: bool) -> None:
    net, (x, y, target) = small_net(), digits(5, small=True)
    right = net(x).argmax(dim=1) == y
    x, y, target = x[right], y[right], target[right]
    aim = target if targeted else None
    ours, theirs = lbfgs(net, x, y, target=aim), carlini_wagner_l2(net, x, y, target=aim, steps=80)
    seen = net(ours).argmax(dim=1)
    assert ((seen == target) if targeted else (seen != y)).all()
    near = float(distance(ours, x).median()), float(distance(theirs, x).median())
    assert near[0] < 1.05 * near[1]
    hasty = lbfgs(net, x, y, target=aim, searches=1, c=1000.0, steps=3)
    assert float(distance(hasty, x).median()) > 1.05 * near[1]  # the control


class Quadratic(nn.Module):
    """Three smooth logits of 16 values, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 16, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) + x.flatten(1).square()) @ self.weight.T


@pytest.mark.parametrize("targeted", [False, True])
def test_the_objective_and_its_gradient(targeted: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    net, y, target, c = Quadratic(), torch.tensor(0), torch.tensor(2), 0.7
    problem = Problem(net, x, y, target if targeted else None)
    vector = np.random.default_rng(0).uniform(0.2, 0.8, 16)
    value, gradient = problem.look(vector, c)
    p = net(torch.from_numpy(vector).view_as(x)).softmax(dim=1)[0].tolist()
    loss = -math.log(p[2] if targeted else 1 - p[0])
    change = vector - x.numpy().ravel()
    assert value == pytest.approx(float(change @ change) + c * loss, rel=1e-9)
    for k in range(16):
        nudge = np.zeros(16)
        nudge[k] = 1e-6
        slope = (problem.look(vector + nudge, c)[0] - problem.look(vector - nudge, c)[0]) / 2e-6
        assert gradient[k] == pytest.approx(slope, abs=1e-7)
        assert gradient[k] != pytest.approx(slope + 1e-3, abs=1e-7)


def test_c_grows_by_tens_until_it_is_bracketed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = row_batch(2)

    def tried(answers: list[bool]) -> list[float]:
        problem, left, seen = Problem(Rows(), x[1:], y[1], None), list(answers), []

        def minimise(look: Any, start: Any, args: tuple[float], **rest: Any) -> tuple[Any]:
            assert np.array_equal(start, x[1:].double().numpy().ravel())
            assert rest["bounds"] == [(0.0, 1.0)] * 64
            assert rest["maxiter"] == 7
            seen.append(args[0])
            return (start,)

        monkeypatch.setattr(room, "fmin_l_bfgs_b", minimise)
        monkeypatch.setattr(problem, "fools", lambda logits: left.pop(0))
        problem.search(len(answers), 7, 0.01)
        return seen

    grown = tried([False, False, True, True, False])
    assert grown == pytest.approx([0.01, 0.1, 1, 10**-0.5, 10**-0.75])
    shrunk = tried([True, True, False, False])
    assert shrunk == pytest.approx([0.01, 0.001, 1e-4, 10**-3.5])


def test_what_it_cannot_fool_and_what_is_misread_comes_back() -> None:
    net, (x, y, target) = Rows(), row_batch(10)
    got = lbfgs(net, x, y, target=target, **QUICK)
    assert torch.equal(got[::5], x[::5])
    hit = (got != x).flatten(1).any(dim=1)
    assert int(hit.sum()) > 4
    assert torch.equal(net(got).argmax(dim=1)[hit], target[hit])
    assert float(got.min()) >= 0
    assert float(got.max()) <= 1
    too_cheap = lbfgs(net, x, y, target=target, searches=1, c=1e-6)
    assert torch.equal(too_cheap, x)


def test_an_images_result_does_not_depend_on_the_others() -> None:
    net, (x, y, target) = small_net(), digits(5, small=True)
    counted = Counted(net)
    whole = lbfgs(counted, x, y, target=target, **QUICK)
    assert counted.backwards <= 5 * 3 * 2 * 8
    for i in range(5):
        rows = slice(i, i + 1)
        assert torch.equal(lbfgs(net, x[rows], y[rows], target=target[rows], **QUICK), whole[rows])
    assert not torch.equal(whole, lbfgs(net, x, y, target=target, searches=3, steps=9, c=1.0))


def test_progress_tells_images_done_and_fooled() -> None:
    x, y, target = row_batch(6)
    told: list[tuple[int, int, str]] = []
    got = lbfgs(Rows(), x, y, target=target, progress=lambda *s: told.append(s), **QUICK)
    fooled = int((got != x).flatten(1).any(dim=1).sum())
    assert [step[:2] for step in told] == [(3, 6), (4, 6), (5, 6), (6, 6)]  # two are misread
    assert told[-1][2] == f"lbfgs: {fooled} of 4 fooled"


# --- patience -------------------------------------------------------------------------------------


def test_a_long_call_is_announced_with_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"these 100 will take about 5 minutes: give it fewer"):
        room.warn_if_long(100, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        room.warn_if_long(10, 3.0)
    clock = iter(range(0, 1000, 90))  # an image takes a minute and a half
    monkeypatch.setattr(room.time, "perf_counter", lambda: next(clock))
    x, y, target = row_batch(6)
    with pytest.warns(UserWarning, match=r"one image at a time.*these 4 .*6 minutes") as caught:
        lbfgs(Rows(), x, y, target=target, searches=1, steps=2)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lbfgs(Rows(), x[:2], y[:2], target=target[:2], searches=1, steps=2)


# --- the caller's model and bad input -------------------------------------------------------------


def test_the_model_comes_back_after_an_error() -> None:
    comes_back_after_an_error(lbfgs)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"searches": 0}, ValueError, r"searches must be >= 1, not 0"),
        ({"steps": 0}, ValueError, r"steps must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"c": 0}, ValueError, r"c must be > 0"),
        ({"c": -1}, ValueError, r"c must be >= 0, not -1"),
        ({"c": float("inf")}, ValueError, r"c must be .*inf"),
        ({"x": row_batch(5)[0] * 255}, ValueError, r"divide by 255"),
        ({"target": row_batch(5)[1]}, ValueError, r"equals y for 5"),
        ({"target": row_batch(5)[2] + 4}, ValueError, r"target spans.*4 classes"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, y, _ = row_batch(5)
    with pytest.raises(kind) as caught:
        lbfgs(**({"model": Rows(), "x": x, "y": y} | change))
    assert re.search(message, str(caught.value)), str(caught.value)
