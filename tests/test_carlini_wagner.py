"""Carlini and Wagner's L2 attack: its objective, its search for c, as near as its peers' images."""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unfool.attacks._descent import lead
from unfool.attacks._schedule import schedule_of
from unfool.attacks.carlini_wagner import (
    PRESETS,
    Search,
    carlini_wagner_l2,
    objective,
)
from victims import (
    Batch,
    Counted,
    Narrow,
    Rows,
    comes_back_after_an_error,
    digits,
    in_unit_range,
    row_batch,
    small_net,
)

QUICK: dict[str, Any] = {"searches": 4, "steps": 60, "lr": 0.1, "c": 0.1}


def rightly_read(n: int = 16) -> tuple[nn.Module, Batch]:
    net, (x, y, target) = small_net(), digits(n, small=True)
    right = net(x).argmax(dim=1) == y
    return net, (x[right], y[right], target[right])


def distance(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1)


def found(x_adv: Tensor, x: Tensor) -> Tensor:
    return distance(x_adv, x) > 0


# --- the objective --------------------------------------------------------------------------------


def test_lead() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [3.0, 3.0, 0.0]])
    assert lead(logits, torch.tensor([1, 2, 0])).tolist() == [1.5, -1.5, 0.0]


@pytest.mark.parametrize(
    ("margin", "kappa", "term"),
    [(-2.0, 0.0, 2.0), (2.0, 0.0, 0.0), (2.0, 5.0, -2.0), (6.0, 5.0, -5.0), (-2.0, 5.0, 2.0)],
)
def test_the_objective_by_hand(margin: float, kappa: float, term: float) -> None:
    x = torch.zeros(1, 1, 2, 2)
    images = torch.tensor([0.5, 0.0, 0.5, 1.0]).view_as(x)
    l2, loss = objective(images, x, torch.tensor([margin]), torch.tensor([3.0]), kappa)
    assert l2.item() == 1.5
    assert loss.item() == 1.5 + 3.0 * term


class Seen(Search):
    """A search that keeps the gradients and doesn't move."""

    def descend(self, rows: Tensor, gradient: Tensor) -> None:
        self.gradient = gradient


@pytest.mark.parametrize("targeted", [False, True])
def test_the_gradient_by_finite_differences(targeted: bool) -> None:
    x, y, target = digits(4, small=True)
    first, _, *rest = deepcopy(small_net())
    net, x = nn.Sequential(first, nn.Tanh(), *rest).double(), x.double()
    aim, sign, kappa, c = (target if targeted else y), (1 if targeted else -1), 30.0, 0.7
    live, schedule = torch.ones(4, dtype=torch.bool), schedule_of(PRESETS, "fast", c=c)
    search = Seen(net, x, aim, sign, live, kappa, schedule, None)
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    search.w = w.clone()
    search.step(torch.arange(4))

    def value(w: Tensor) -> Tensor:  # equation 3, written anew
        images = 0.5 * (w.tanh() + 1)
        losses = []
        for image, original, z, k in zip(images, x, net(images), aim.tolist(), strict=True):
            gap = torch.cat([z[:k], z[k + 1 :]]).max() - z[k]
            hinge = (gap if targeted else -gap).clamp(min=-kappa)
            losses.append(((image - original) ** 2).sum() + c * hinge)
        return torch.stack(losses).detach()

    for row, column in ((3, 4), (7, 7), (9, 6), (0, 0)):
        nudge = torch.zeros_like(w)
        nudge[:, 0, row, column] = 1e-5
        slope = (value(w + nudge) - value(w - nudge)) / 2e-5
        ours = search.gradient[:, 0, row, column]
        assert torch.allclose(ours, slope, atol=1e-7, rtol=1e-5)
        assert float(slope.abs().max()) > 1e-2
        assert not torch.allclose(1.001 * ours, slope, atol=1e-7, rtol=1e-5)


def test_a_step_of_adam_equals_torchs() -> None:
    """Each image has its own count of steps; a common start makes it torch's own Adam."""
    net, (x, y, _) = rightly_read(4)
    live = torch.ones(len(x), dtype=torch.bool)
    search = Search(net, x, y, -1, live, 0.0, schedule_of(PRESETS, "fast"), None)
    theirs = search.w.clone().requires_grad_(True)
    adam = torch.optim.Adam([theirs], lr=0.05)
    for step in range(5):
        gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = gradient
        adam.step()
        search.descend(torch.arange(len(x)), gradient)
    assert torch.allclose(search.w, theirs, atol=1e-5)
    assert float((search.w - search.to_w(x)).abs().max()) > 0.05


# --- how near -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [True, False])
def test_as_near_as_foolbox(targeted: bool) -> None:
    import foolbox

    net, (x, y, target) = rightly_read()
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=4, steps=60, stepsize=0.1, initial_const=0.1
    )
    criterion = foolbox.criteria.TargetedMisclassification(target) if targeted else y
    theirs = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, criterion, epsilons=None)[0]
    net.zero_grad(set_to_none=True)  # it leaves gradients behind
    aim = target if targeted else None

    def wins(x_adv: Tensor) -> Tensor:
        seen = net(x_adv).argmax(dim=1)
        black = x_adv.flatten(1).amax(dim=1) == 0  # what foolbox returns where it fails
        return ((seen == target) if targeted else (seen != y)) & ~black

    def no_worse(settings: dict[str, Any]) -> bool:
        ours = carlini_wagner_l2(net, x, y, target=aim, **settings)
        both = wins(ours) & wins(theirs)
        assert int(both.sum()) > 8
        near, nearer = (float(distance(part, x)[both].median()) for part in (theirs, ours))
        return int(wins(ours).sum()) >= int(wins(theirs).sum()) and nearer <= 1.01 * near

    assert no_worse(QUICK | {"warm_start": False})
    assert no_worse({})
    assert not no_worse(QUICK | {"searches": 1, "c": 50.0})  # sees a search that doesn't look


def test_more_searches_and_steps_come_nearer() -> None:
    net, (x, y, target) = rightly_read()
    medians = [
        float(distance(carlini_wagner_l2(net, x, y, target=target, c=50.0, searches=n), x).median())
        for n in (1, 2, 5)
    ]
    assert medians[0] > 1.05 * medians[1]
    assert medians[1] > medians[2]


@pytest.mark.parametrize("targeted", [True, False])
def test_kappa_is_kept(targeted: bool) -> None:
    net, (x, y, target) = rightly_read()
    aim = target if targeted else None
    medians = []
    for kappa in (0.0, 1.0, 4.0):
        got = carlini_wagner_l2(net, x, y, target=aim, kappa=kappa, **QUICK)
        hit = found(got, x)
        assert int(hit.sum()) > 8
        logits = net(got).detach()
        margin = lead(logits, target) if targeted else -lead(logits, y)
        assert (margin[hit] > kappa).all()
        assert float(margin[hit].median()) < kappa + 0.5
        assert (got[~hit] == x[~hit]).all()
        medians.append(float(distance(got, x)[hit].median()))
    assert all(less < more for less, more in pairwise(medians))


def test_what_it_cannot_fool_and_what_is_misread_comes_back() -> None:
    net, (x, y, target) = Rows(), row_batch(20)
    got = carlini_wagner_l2(net, x, y, target=target, **QUICK)
    assert torch.equal(got[::5], x[::5])
    assert in_unit_range(got)
    hit = found(got, x)
    assert int(hit.sum()) > 8
    assert torch.equal(net(got).argmax(dim=1)[hit], target[hit])
    much_too_cheap = carlini_wagner_l2(net, x, y, target=target, searches=1, c=1e-6, steps=20)
    assert torch.equal(much_too_cheap, x)
    assert torch.equal(carlini_wagner_l2(net, x[:0], y[:0]), x[:0])


def test_black_and_white_can_move() -> None:
    """atanh(±1) is infinite: without the squeeze these pixels would be frozen."""
    net, (x, y, _) = rightly_read(8)
    x = x.round()
    right = net(x).argmax(dim=1) == y
    got = carlini_wagner_l2(net, x[right], y[right], **QUICK)
    assert found(got, x[right]).all()
    assert torch.isfinite(got).all()
    assert in_unit_range(got)


# --- the search for c -----------------------------------------------------------------------------


def test_presets_and_what_overrides_them() -> None:
    original, fast = PRESETS["original"], PRESETS["fast"]
    assert (original.searches, original.steps, original.lr, original.c) == (9, 10_000, 0.01, 1e-3)
    assert not original.warm_start
    assert fast.warm_start
    assert schedule_of(PRESETS, "original") == original
    changed = schedule_of(PRESETS, "original", searches=2, steps=3, lr=0.5, c=7.0, warm_start=True)
    assert (changed.searches, changed.steps, changed.lr, changed.c) == (2, 3, 0.5, 7.0)
    assert changed.warm_start
    assert schedule_of(PRESETS, "fast", warm_start=False).warm_start is False


def test_c_grows_by_tens_and_is_then_halved() -> None:
    x, y, _ = row_batch(4)
    live = torch.ones(4, dtype=torch.bool)
    search = Search(
        Rows(), x, y, -1, live, 0.0, schedule_of(PRESETS, "fast", searches=5, steps=1, c=0.01), None
    )
    tried = []
    for hits in ([0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]):
        search.hit[:] = torch.tensor(hits, dtype=torch.bool)
        tried.append(search.c.tolist())
        search.steps += 1
        search.next_c(torch.arange(4))
        assert not search.hit.any()  # or a c that fails would pass for one that succeeds
        assert not search.steps.any()
    expected = [
        [0.01] * 4, [0.1, 0.1, 0.1, 0.005], [1, 1, 0.055, 0.0025],
        [10, 0.55, 0.0775, 0.00125], [100, 0.775, 0.08875, 0.001875],
    ]  # fmt: skip
    for row, values in zip(tried, expected, strict=True):
        assert row == pytest.approx(values, rel=1e-5)
    assert not search.live.any()


class Flat(nn.Module):
    """Nothing to descend: the logits don't depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 0.0]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)


def test_a_descent_that_gains_nothing_ends_early() -> None:
    x, y = torch.full((7, 1, 3, 3), 0.5), torch.zeros(7, dtype=torch.int64)
    counted = Counted(Flat())
    carlini_wagner_l2(counted, x, y, searches=3, steps=100)
    # x, and per search: 10 steps until the first look that sees no gain, and that one.
    assert counted.forwards == 7 + 3 * 7 * 11
    assert counted.backwards == 3 * 7 * 11


def test_each_image_ends_on_its_own() -> None:
    """Side by side, images cost what they cost alone: none is dragged along."""
    x, y, target = row_batch(12)
    alone = []
    for i in range(12):
        counted = Counted(Rows())
        carlini_wagner_l2(counted, x[i : i + 1], y[i : i + 1], target=target[i : i + 1], **QUICK)
        assert counted.forwards == counted.backwards + 1
        alone.append(counted.backwards)
    together = Counted(Rows())
    carlini_wagner_l2(together, x, y, target=target, **QUICK)
    assert together.backwards == sum(alone)
    assert len(set(alone)) > 3
    assert alone[0] == 0  # misread anyway
    assert sum(alone) < 0.9 * sum(n > 0 for n in alone) * QUICK["searches"] * QUICK["steps"]


def test_a_warm_start_begins_at_the_best_image_or_else_at_the_last() -> None:
    x, y, _ = row_batch(4)
    live = torch.ones(4, dtype=torch.bool)
    for warm in (True, False):
        schedule = schedule_of(PRESETS, "fast", warm_start=warm)
        search = Search(Rows(), x, y, -1, live.clone(), 0.0, schedule, None)
        search.w += 1
        search.best[0], search.best_l2[0] = 0.25, 3.0
        search.m += 1
        search.next_c(torch.arange(4))
        image = (search.w.tanh() + 1) / 2
        assert torch.allclose(image[0], torch.full_like(x[0], 0.25) if warm else x[0], atol=1e-3)
        last = search.to_w(x)[1:] + (1 if warm else 0)
        assert torch.allclose(search.w[1:], last)
        assert not search.m.any()


# --- batches --------------------------------------------------------------------------------------


def test_an_images_result_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y, target) = Rows(), row_batch(12)
    whole = carlini_wagner_l2(net, x, y, target=target, **QUICK)
    for i in (0, 1, 4, 11):
        rows = slice(i, i + 1)
        alone = carlini_wagner_l2(net, x[rows], y[rows], target=target[rows], **QUICK)
        assert torch.equal(alone, whole[rows])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = carlini_wagner_l2(net, x[order], y[order], target=target[order], **QUICK)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(mixed, whole)
    monkeypatch.setattr("unfool.attacks._pool.CPU_CHUNK", 5)
    counted = Counted(net)
    assert torch.equal(carlini_wagner_l2(counted, x, y, target=target, **QUICK), whole)
    assert counted.largest == 5


def test_beside_others_a_real_network_gives_the_same_but_for_rounding() -> None:
    net, (x, y, target) = rightly_read(40)
    whole = distance(carlini_wagner_l2(net, x, y, target=target, **QUICK), x)
    alone = torch.stack([
        distance(carlini_wagner_l2(net, x[i : i + 1], y[i : i + 1], target=target[i : i + 1],
                                   **QUICK), x[i : i + 1])[0]
        for i in range(0, len(x), 4)
    ])  # fmt: skip
    assert torch.allclose(alone, whole[::4], rtol=0.02)
    assert not torch.allclose(alone, alone.flip(0), rtol=0.02)  # nor is everything alike


def test_without_memory_for_all_it_goes_on_with_fewer() -> None:
    x, y, target = row_batch(12)
    whole = carlini_wagner_l2(Rows(), x, y, target=target, **QUICK)
    got = carlini_wagner_l2(Narrow(Rows()), x, y, target=target, **QUICK)
    assert torch.equal(got, whole)


def test_the_bits_repeat_and_the_random_state_stays() -> None:
    net, (x, y, _) = rightly_read(6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = carlini_wagner_l2(net, x, y, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        again = carlini_wagner_l2(net, x.clone().requires_grad_(True), y, **QUICK)
    assert torch.equal(again, first)
    assert not again.requires_grad


def test_progress_tells_steps_and_images_fooled() -> None:
    x, y, target = row_batch(20)
    told: list[tuple[int, int, str]] = []
    got = carlini_wagner_l2(
        Rows(), x, y, target=target, progress=lambda *step: told.append(step), **QUICK
    )
    steps, whole = [step[0] for step in told], 20 * 4 * 60
    assert steps == sorted(steps)
    assert steps[0] == 4 * 4 * 60  # four were misread before
    assert len(set(steps)) > 20
    assert max(after - before for before, after in pairwise(steps)) < whole / 4
    assert {step[1] for step in told} == {whole}
    fooled = int(found(got, x).sum())
    assert told[0][2] == "carlini_wagner_l2: 0 of 16 fooled"
    assert told[-1][::2] == (whole, f"carlini_wagner_l2: {fooled} of 16 fooled")


# --- the caller's model and bad input -------------------------------------------------------------


def test_the_model_comes_back_after_an_error() -> None:
    comes_back_after_an_error(carlini_wagner_l2)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"kappa": -1}, ValueError, r"kappa must be >= 0, not -1"),
        ({"kappa": float("nan")}, ValueError, r"kappa .*nan"),
        ({"preset": "paper"}, ValueError, r"preset must be one of original, fast, not 'paper'"),
        ({"searches": 0}, ValueError, r"searches must be >= 1, not 0"),
        ({"steps": 0}, ValueError, r"steps must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"lr": 0.0}, ValueError, r"lr must be > 0"),
        ({"lr": -1.0}, ValueError, r"lr must be >= 0, not -1"),
        ({"c": 0}, ValueError, r"c must be > 0"),
        ({"c": float("inf")}, ValueError, r"c must be .*inf"),
        ({"x": row_batch(20)[0] * 255}, ValueError, r"divide by 255"),
        ({"y": row_batch(20)[1].int()}, TypeError, r"y\.long\(\)"),
        ({"target": row_batch(20)[1]}, ValueError, r"equals y for 20"),
        ({"target": row_batch(20)[2] + 4}, ValueError, r"target spans.*4 classes"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, y, _ = row_batch(20)
    with pytest.raises(kind) as caught:
        carlini_wagner_l2(**({"model": Rows(), "x": x, "y": y} | change))
    assert re.search(message, str(caught.value)), str(caught.value)
