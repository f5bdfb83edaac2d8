"""EAD: its step, its search for c, as near as foolbox's at a third of the passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_tools import length
from unfool.attacks import ead
from unfool.attacks._descent import lead
from unfool.attacks._schedule import schedule_of
from unfool.attacks.ead import PRESETS, Search, shrink_towards
from unfool.evaluation import counted
from victims import (
    Batch,
    Counted,
    Narrow,
    Rows,
    anet,
    comes_back_after_an_error,
    digits,
    in_unit_range,
    row_batch,
    small_net,
)

QUICK: dict[str, Any] = {"searches": 4, "steps": 40}


def rightly_read(n: int = 24) -> tuple[nn.Module, Batch]:
    net, (x, y, target) = small_net(), digits(n, small=True)
    right = net(x).argmax(dim=1) == y
    return net, (x[right], y[right], target[right])


def found(x_adv: Tensor, x: Tensor) -> Tensor:
    return length(x_adv - x) > 0


def search_of(net: nn.Module, x: Tensor, aim: Tensor, **given: Any) -> Search:
    """An untargeted search for all images, with the preset "fast" but for what is given."""
    names = ("searches", "steps", "lr", "c", "warm_start")
    schedule = schedule_of(PRESETS, "fast", **{name: given.get(name) for name in names})
    live = torch.ones(len(x), dtype=torch.bool)
    rule, beta = given.get("rule", "EN"), given.get("beta", 0.01)
    return Search(net, x, aim, -1, live, rule, beta, given.get("kappa", 0.0), schedule, None)


# --- what it computes -----------------------------------------------------------------------------


def test_shrinking_by_hand() -> None:
    x = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.1, 0.9, 0.3])
    images = torch.tensor([0.8, 0.55, 0.45, 0.1, -0.5, 1.6, 0.3])
    got = shrink_towards(x, images, 0.1)
    assert got.tolist() == pytest.approx([0.7, 0.5, 0.5, 0.2, 0.0, 1.0, 0.3])
    assert torch.equal(got[[1, 2, 6]], x[[1, 2, 6]])  # onto x, bit for bit: few pixels change
    assert torch.allclose(shrink_towards(x, images, 0.0), images.clamp(0, 1))


@pytest.mark.parametrize("rule", ["EN", "L1"])
def test_the_rule_by_hand(rule: str) -> None:
    x = torch.zeros(1, 1, 1, 2)
    search = search_of(Rows(2), x, torch.tensor([0]), rule=rule, beta=0.1)
    change = torch.tensor([[0.5, 0.5], [0.0, 0.9]]).view(2, 1, 1, 2)
    expected = {"EN": [0.6, 0.9], "L1": [1.0, 0.9]}  # the rules don't agree which is better
    assert search.cost(change).tolist() == pytest.approx(expected[rule])


def algorithm_1(net: nn.Module, x: Tensor, y: Tensor, c: float, steps: int) -> list[Tensor]:
    """The paper's iterates for one image, written anew: lr 0.01, beta 0.01, kappa 0."""
    now, ahead, seen = x, x, []
    for k in range(10):
        point = ahead.clone().requires_grad_(True)
        z = net(point)[0]
        f = (z[y] - torch.cat([z[:y], z[y + 1 :]]).max()).clamp(min=0)
        (gradient,) = torch.autograd.grad(c * f + ((point - x) ** 2).sum(), point)
        z = ahead - 0.01 * (1 - k / steps) ** 0.5 * gradient
        up, down = (z - 0.01).clamp(max=1), (z + 0.01).clamp(min=0)
        new = torch.where(z - x > 0.01, up, torch.where(z - x < -0.01, down, x))
        ahead, now = new + k / (k + 3) * (new - now), new
        seen.append(new)
    return seen


def test_its_steps_are_those_of_the_algorithm() -> None:
    net, (x, y, _) = rightly_read(3)
    theirs = [algorithm_1(net, x[i : i + 1], int(y[i]), 2.0, 100) for i in range(len(x))]
    search = search_of(net, x, y, searches=1, steps=100, c=2.0)
    for k in range(10):
        search.step(torch.arange(len(x)))
        same = torch.cat([images[k] for images in theirs])
        assert torch.allclose(search.now, same, atol=1e-5)
    assert (length(search.now - x) > 0.1).all()
    assert not torch.allclose(search.ahead, same, atol=1e-5)  # nor are all points alike


@pytest.mark.parametrize("targeted", [False, True])
def test_the_gradient_by_finite_differences(targeted: bool) -> None:
    x, y, target = digits(4, small=True)
    first, _, *rest = deepcopy(small_net())
    net, x = nn.Sequential(first, nn.Tanh(), *rest).double(), x.double()
    live, beta, kappa, c, lr = torch.ones(4, dtype=torch.bool), 0.0, 30.0, 0.7, 1e-6
    aim, sign = (target, 1) if targeted else (y, -1)
    schedule = schedule_of(PRESETS, "fast", searches=1, steps=10, lr=lr, c=c, warm_start=False)
    search = Search(net, x, aim, sign, live, "EN", beta, kappa, schedule, None)
    point = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    point = 0.1 + 0.8 * point
    search.ahead = point.clone()
    search.step(torch.arange(4))
    gradient = (point - search.now) / lr

    def value(images: Tensor) -> Tensor:
        losses = []
        for image, original, z, k in zip(images, x, net(images), aim.tolist(), strict=True):
            gap = torch.cat([z[:k], z[k + 1 :]]).max() - z[k]
            hinge = (kappa + (gap if targeted else -gap)).clamp(min=0)
            losses.append(((image - original) ** 2).sum() + c * hinge)
        return torch.stack(losses).detach()

    for row, column in ((3, 4), (7, 7), (9, 6)):
        nudge = torch.zeros_like(point)
        nudge[:, 0, row, column] = 1e-5
        slope = (value(point + nudge) - value(point - nudge)) / 2e-5
        ours = gradient[:, 0, row, column]
        assert torch.allclose(ours, slope, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(1.001 * ours, slope, atol=1e-6, rtol=1e-5)


# --- how near -------------------------------------------------------------------------------------


def as_near_as_foolbox(
    net: nn.Module, batch: Batch, targeted: bool, settings: dict[str, Any]
) -> Callable[..., bool]:
    """Run foolbox's attack, and return what tells whether ours with some settings is no worse.

    That is: in success, in the median L1, in the median L2, and in passes.
    """
    import foolbox

    x, y, target = batch
    attack = foolbox.attacks.EADAttack(
        binary_search_steps=settings["searches"], steps=settings["steps"],
        initial_stepsize=0.01, initial_const=settings["c"],
    )  # fmt: skip
    criterion = foolbox.criteria.TargetedMisclassification(target) if targeted else y
    with counted(net) as peers:
        theirs = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, criterion, epsilons=None)[0]
    net.zero_grad(set_to_none=True)  # it leaves gradients behind

    def wins(x_adv: Tensor) -> Tensor:
        seen = net(x_adv).argmax(dim=1)
        black = x_adv.flatten(1).amax(dim=1) == 0  # what foolbox returns where it fails
        return ((seen == target) if targeted else (seen != y)) & ~black

    def no_worse(**settings: Any) -> bool:
        with counted(net) as passes:
            ours = ead(net, x, y, target=target if targeted else None, **settings)
        won, both = wins(ours), wins(ours) & wins(theirs)
        one, two = ((part - x)[both].flatten(1) for part in (ours, theirs))
        as_near = [
            float(one.norm(p, dim=1).median()) <= 1.005 * float(two.norm(p, dim=1).median())
            for p in (1, 2)
        ]
        assert passes.forward <= 0.8 * peers.forward
        assert passes.backward <= peers.backward
        return int(won.sum()) >= int(wins(theirs).sum()) and all(as_near)

    assert int(wins(theirs).sum()) >= 0.7 * len(x)
    return no_worse


@pytest.mark.parametrize("targeted", [True, False])
def test_as_near_as_foolbox_with_its_settings_for_fewer_passes(targeted: bool) -> None:
    settings = {"searches": 4, "steps": 100, "c": 0.1}
    no_worse = as_near_as_foolbox(*rightly_read(), targeted, settings)
    assert no_worse(warm_start=False, **settings)
    assert not no_worse(searches=1, c=50.0)  # sees a search that doesn't look


def test_by_default_it_comes_nearer_than_foolbox_on_anet_for_fewer_passes() -> None:
    net, (x, y, target) = anet(), digits(8)
    assert torch.equal(net(x).argmax(dim=1), y)
    settings = {"searches": 5, "steps": 200, "c": 0.01}
    no_worse = as_near_as_foolbox(net, (x, y, target), False, settings)
    assert no_worse()
    assert not no_worse(searches=1, c=50.0)


def test_the_rule_decides_and_beta_makes_sparse() -> None:
    net, (x, y, _) = rightly_read()

    def medians(**settings: Any) -> tuple[float, float, float]:
        change = (ead(net, x, y, **settings) - x).flatten(1)
        assert (change != 0).any(dim=1).all()
        kinds = ((change != 0).sum(1).float(), change.abs().sum(1), change.norm(dim=1))
        count, one, two = (float(kind.median()) for kind in kinds)
        return count, one, two

    elastic, sparse, smooth = medians(), medians(rule="L1"), medians(beta=0.0)
    assert sparse[1] < elastic[1] < smooth[1]
    assert sparse[2] > elastic[2]
    assert sparse[0] < elastic[0] < 0.5 * smooth[0]


@pytest.mark.parametrize("targeted", [True, False])
def test_kappa_is_kept(targeted: bool) -> None:
    net, (x, y, target) = rightly_read(12)
    aim, medians = (target if targeted else None), []
    for kappa in (0.0, 2.0):
        got = ead(net, x, y, target=aim, kappa=kappa, **QUICK)
        hit = found(got, x)
        assert int(hit.sum()) > 6
        logits = net(got).detach()
        margin = lead(logits, target) if targeted else -lead(logits, y)
        assert (margin[hit] > kappa).all()
        assert torch.equal(got[~hit], x[~hit])
        medians.append(float(length(got - x)[hit].median()))
    assert medians[0] < medians[1]


def test_what_it_cannot_fool_and_what_is_misread_comes_back() -> None:
    net, (x, y, target) = Rows(), row_batch(20)
    got = ead(net, x, y, target=target, **QUICK)
    assert torch.equal(got[::5], x[::5])
    assert in_unit_range(got)
    hit = found(got, x)
    assert int(hit.sum()) > 8
    assert torch.equal(net(got).argmax(dim=1)[hit], target[hit])
    much_too_cheap = ead(net, x, y, target=target, searches=1, c=1e-6, steps=20)
    assert torch.equal(much_too_cheap, x)
    assert torch.equal(ead(net, x[:0], y[:0]), x[:0])


# --- the search for c, and what it spares ---------------------------------------------------------


def test_presets_and_what_overrides_them() -> None:
    original, fast = PRESETS["original"], PRESETS["fast"]
    assert (original.searches, original.steps, original.lr, original.c) == (9, 1000, 0.01, 1e-3)
    assert not original.warm_start
    assert fast.warm_start
    changed = schedule_of(PRESETS, "original", searches=2, steps=3, lr=0.5, c=7.0, warm_start=True)
    assert (changed.searches, changed.steps, changed.lr, changed.c) == (2, 3, 0.5, 7.0)
    assert changed.warm_start
    assert schedule_of(PRESETS, "fast", warm_start=False).warm_start is False


def test_c_grows_by_tens_and_is_then_halved() -> None:
    x, y, _ = row_batch(3)
    search = search_of(Rows(), x, y, searches=4, steps=1, c=0.01)
    tried = []
    for hits in ([0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1]):
        search.hit[:] = torch.tensor(hits, dtype=torch.bool)
        tried.append(search.c.tolist())
        search.steps += 1
        search.next_c(torch.arange(3))
        assert not search.hit.any()
        assert not search.steps.any()
    expected = [[0.01] * 3, [0.1, 0.1, 0.005], [1, 0.055, 0.0025], [0.55, 0.0775, 0.00375]]
    for row, values in zip(tried, expected, strict=True):
        assert row == pytest.approx(values, rel=1e-5)
    assert not search.live.any()


def test_a_warm_start_begins_at_the_best_image_or_else_at_the_last() -> None:
    x, y, _ = row_batch(2)
    for warm in (True, False):
        search = search_of(Rows(), x, y, warm_start=warm)
        search.now += 0.01
        search.ahead += 0.02
        search.best[0], search.best_cost[0] = 0.25, 3.0
        last = search.now.clone()
        search.next_c(torch.arange(2))
        assert torch.equal(search.now, search.ahead)
        assert torch.equal(search.now[0], torch.full_like(x[0], 0.25) if warm else x[0])
        assert torch.equal(search.now[1], last[1] if warm else x[1])


class Flat(nn.Module):
    """Nothing to descend: the logits don't depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([30.0, 0.0]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)


def test_a_descent_that_never_leaves_x_ends_at_once() -> None:
    x, y = torch.full((7, 1, 3, 3), 0.5), torch.zeros(7, dtype=torch.int64)
    counted = Counted(Flat())
    ead(counted, x, y, searches=3, steps=100)
    # x, and per search one look ahead and one at the image.
    assert (counted.forwards, counted.backwards) == (7 + 3 * 7 * 2, 3 * 7)


class Steep(nn.Module):
    """Class 0 by 30 at first, and by less the brighter the image, but never less than 29."""

    def forward(self, x: Tensor) -> Tensor:
        z = 30 - x.flatten(1).sum(dim=1, keepdim=True).clamp(max=1)
        return torch.cat([z, 0 * z], dim=1)


def test_a_descent_that_gains_nothing_ends_early() -> None:
    """It moves until the sum is 1, cannot win, and is stopped after the next tenth."""
    x, y = torch.zeros(3, 1, 3, 3), torch.zeros(3, dtype=torch.int64)
    counted = Counted(Steep())
    ead(counted, x, y, searches=1, steps=100, c=10.0)
    assert 3 * 10 < counted.backwards < 3 * 60
    assert counted.backwards % 3 == 0


def test_what_would_cost_more_is_not_looked_at() -> None:
    net, (x, y, _) = rightly_read(6)
    looked = Counted(net)
    search = search_of(looked, x, y)
    search.hit[:], search.best_cost[:] = True, 1.0
    search.hit[0] = False
    nearer = x + 0.0
    nearer[:, 0, 0, 0] = torch.tensor([0.9, 0.9, 1.0, *[0.0] * (len(x) - 3)])
    search.beta = 0.2
    search.keep(torch.arange(len(x)), nearer)
    assert looked.forwards == len(x) - 1  # only the third one costs over 1; the first has not hit
    search.best_cost[:], search.hit[:] = 0.0, True
    search.keep(torch.arange(len(x)), nearer)
    assert looked.forwards == len(x) - 1


def test_each_image_ends_on_its_own() -> None:
    """Side by side, images cost what they cost alone: none is dragged along."""
    x, y, target = row_batch(12)
    alone = []
    for i in range(12):
        counted = Counted(Rows())
        ead(counted, x[i : i + 1], y[i : i + 1], target=target[i : i + 1], **QUICK)
        alone.append(counted.backwards)
    together = Counted(Rows())
    ead(together, x, y, target=target, **QUICK)
    assert together.backwards == sum(alone)
    assert len(set(alone)) > 3
    assert alone[0] == 0  # misread anyway


# --- batches --------------------------------------------------------------------------------------


def test_an_images_result_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y, target) = Rows(), row_batch(12)
    whole = ead(net, x, y, target=target, **QUICK)
    for i in (0, 1, 4, 11):
        rows = slice(i, i + 1)
        assert torch.equal(ead(net, x[rows], y[rows], target=target[rows], **QUICK), whole[rows])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = ead(net, x[order], y[order], target=target[order], **QUICK)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(mixed, whole)
    assert torch.equal(ead(Narrow(net), x, y, target=target, **QUICK), whole)
    monkeypatch.setattr("unfool.attacks._pool.CPU_CHUNK", 5)
    counted = Counted(net)
    assert torch.equal(ead(counted, x, y, target=target, **QUICK), whole)
    assert counted.largest == 5


def test_the_bits_repeat_and_the_random_state_stays() -> None:
    net, (x, y, _) = rightly_read(6)
    before = torch.get_rng_state()
    first = ead(net, x, y, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    with torch.no_grad():
        again = ead(net, x.clone().requires_grad_(True), y, **QUICK)
    assert torch.equal(again, first)
    assert not again.requires_grad


def test_progress_tells_steps_and_images_fooled() -> None:
    x, y, target = row_batch(20)
    told: list[tuple[int, int, str]] = []
    got = ead(Rows(), x, y, target=target, progress=lambda *step: told.append(step), **QUICK)
    steps, whole = [step[0] for step in told], 20 * 4 * 40
    assert steps == sorted(steps)
    assert steps[0] == 4 * 4 * 40  # four were misread before
    assert max(after - before for before, after in pairwise(steps)) < whole / 2
    assert {step[1] for step in told} == {whole}
    assert told[0][2] == "ead: 0 of 16 fooled"
    assert told[-1][::2] == (whole, f"ead: {int(found(got, x).sum())} of 16 fooled")


# --- the caller's model and bad input -------------------------------------------------------------


def test_the_model_comes_back_after_an_error() -> None:
    comes_back_after_an_error(ead)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"rule": "L2"}, ValueError, r"rule must be one of EN, L1, not 'L2'"),
        ({"beta": -1}, ValueError, r"beta must be >= 0, not -1"),
        ({"kappa": float("nan")}, ValueError, r"kappa .*nan"),
        ({"preset": "paper"}, ValueError, r"preset must be one of original, fast, not 'paper'"),
        ({"searches": 0}, ValueError, r"searches must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"lr": 0.0}, ValueError, r"lr must be > 0"),
        ({"c": 0}, ValueError, r"c must be > 0"),
        ({"c": float("inf")}, ValueError, r"c must be .*inf"),
        ({"target": row_batch(20)[1]}, ValueError, r"equals y for 20"),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, y, _ = row_batch(20)
    with pytest.raises(kind) as caught:
        ead(Rows(), x, y, **change)
    assert re.search(message, str(caught.value)), str(caught.value)
