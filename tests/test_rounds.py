"""Carlini and Wagner's L0 and L-infinity attacks: what they share, each image in its own rounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unfool.attacks import carlini_wagner_l0, carlini_wagner_linf
from unfool.attacks._descent import lead
from unfool.attacks._rounds import Rounds, round_schedule
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

L0, LINF = (import_module(f"unfool.attacks.carlini_wagner_{norm}") for norm in ("l0", "linf"))
BOTH = pytest.mark.parametrize(
    "attack", [carlini_wagner_l0, carlini_wagner_linf], ids=["l0", "linf"]
)
QUICK: dict[str, Any] = {"steps": 12, "lr": 0.2}
Attack = Callable[..., Tensor]


def state(
    norm: str, net: nn.Module, x: Tensor, aim: Tensor, sign: int = -1, **settings: Any
) -> Rounds:
    """The state of an attack on images that are all under way."""
    module, kind = (L0, "Freezing") if norm == "l0" else (LINF, "Lowering")
    kappa, preset = settings.pop("kappa", 0.0), settings.pop("preset", "fast")
    values = {"steps": None, "lr": None, "c": None} | settings
    schedule = round_schedule(module.PRESETS, preset, **values)
    live = torch.ones(len(x), dtype=torch.bool)
    rounds: Rounds = getattr(module, kind)(net, x, aim, sign, live, kappa, schedule, None)
    return rounds


def found(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv != x).flatten(1).any(dim=1)


def rightly_read(n: int) -> tuple[nn.Module, Batch]:
    net, (x, y, target) = small_net(), digits(n, small=True)
    right = net(x).argmax(dim=1) == y
    return net, (x[right], y[right], target[right])


# --- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l0", "linf"])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_gradient_by_finite_differences(norm: str, targeted: bool) -> None:
    x, y, target = digits(4, small=True)
    first, _, *rest = deepcopy(small_net())
    net, x = nn.Sequential(first, nn.Tanh(), *rest).double(), x.double()
    aim, sign, kappa, c, tau = (target if targeted else y), (1 if targeted else -1), 30.0, 0.7, 0.3
    rounds = state(norm, net, x, aim, sign, kappa=kappa, c=c)
    frozen = torch.zeros_like(x, dtype=torch.bool)
    if norm == "l0":
        frozen[:, :, ::3] = True
        rounds.free[:] = ~frozen
    else:
        rounds.tau[:] = tau
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    rounds.w = w.clone()
    seen: list[Tensor] = []
    rounds.descend = lambda rows, gradient: seen.append(gradient)  # type: ignore[method-assign]
    rounds.step(torch.arange(4))

    def value(w: Tensor) -> Tensor:  # the papers' objectives, written anew
        images = torch.where(frozen, x, 0.5 * (w.tanh() + 1))
        losses = []
        for image, original, z, k in zip(images, x, net(images), aim.tolist(), strict=True):
            gap = torch.cat([z[:k], z[k + 1 :]]).max() - z[k]
            hinge = (gap if targeted else -gap).clamp(min=-kappa)
            change = image - original
            squares, excess = change.square(), (change.abs() - tau).clamp(min=0)
            losses.append((squares if norm == "l0" else excess).sum() + c * hinge)
        return torch.stack(losses).detach()

    steepest = 0.0
    for row, column in ((4, 4), (7, 7), (10, 6), (1, 1)):
        nudge = torch.zeros_like(w)
        nudge[:, 0, row, column] = 1e-5
        slope = (value(w + nudge) - value(w - nudge)) / 2e-5
        ours = seen[0][:, 0, row, column]
        assert torch.allclose(ours, slope, atol=1e-7, rtol=1e-5)
        assert not torch.allclose(1.001 * ours, slope, atol=1e-7, rtol=1e-5)
        steepest = max(steepest, float(slope.abs().max()))
    assert steepest > 1e-2


@BOTH
@pytest.mark.parametrize("targeted", [True, False])
def test_what_comes_back_fools_by_more_than_kappa(attack: Attack, targeted: bool) -> None:
    net, (x, y, target) = rightly_read(10)
    aim = target if targeted else None
    lowest = []
    for kappa in (0.0, 3.0):
        got = attack(net, x, y, target=aim, kappa=kappa, **QUICK)
        hit = found(got, x)
        assert int(hit.sum()) > 7
        assert in_unit_range(got)
        logits = net(got).detach()
        margin = lead(logits, target) if targeted else -lead(logits, y)
        assert (margin[hit] > kappa).all()
        lowest.append(float(margin[hit].min()))
    assert lowest[0] < 3.0  # the control: without kappa nobody cares


@BOTH
def test_what_it_cannot_fool_and_what_is_misread_comes_back(attack: Attack) -> None:
    net, (x, y, target) = Rows(), row_batch(10)
    got = attack(net, x, y, target=target, **QUICK)
    assert torch.equal(got[::5], x[::5])
    hit = found(got, x)
    assert int(hit.sum()) > 4
    assert torch.equal(net(got).argmax(dim=1)[hit], target[hit])
    too_short = attack(net, x, y, target=target, steps=1, lr=1e-6)
    assert torch.equal(too_short, x)


# --- rounds ---------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Nothing to descend: the logits don't depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 0.0]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("norm", ["l0", "linf"])
def test_c_grows_to_its_end_and_then_the_round_is_lost(norm: str) -> None:
    x, y = torch.full((1, 1, 3, 3), 0.5), torch.zeros(1, dtype=torch.int64)
    rounds, tried = state(norm, Flat(), x, y, steps=4), []
    while rounds.live.any():
        tried.append(float(rounds.c))
        rounds.step(torch.arange(1))
    growth, most = rounds.schedule.growth, rounds.schedule.largest_c
    expected = [rounds.schedule.c * growth**k for k in range(20)]
    expected = [c for c in expected if c <= most * (1 + 1e-5) for _ in range(4)]
    assert tried == pytest.approx(expected, rel=1e-5)
    assert len(tried) >= 8


@pytest.mark.parametrize("norm", ["l0", "linf"])
def test_a_lost_round_goes_back_to_the_best_image_and_its_c(norm: str) -> None:
    x, y, _ = row_batch(5)
    rounds = state(norm, Rows(), x, y, steps=3)
    rows = torch.tensor([1, 3])
    rounds.hit[1], rounds.best[1], rounds.won_c[1], rounds.c[:] = True, 0.25, 0.3, 900.0
    rounds.w += 1
    rounds.m += 1
    rounds.steps[:] = 3
    if norm == "l0":
        rounds.order[:], rounds.group[:] = torch.arange(64), 8
    rounds.raise_c(rows)
    assert rounds.live.tolist() == [True, True, True, False, True]  # 3 has nothing to go back to
    assert torch.allclose((rounds.w[1].tanh() + 1) / 2, torch.full_like(x[1], 0.25), atol=1e-3)
    assert float(rounds.c[1]) == pytest.approx(0.3)
    assert float(rounds.c[2]) == 900.0
    assert not rounds.m[rows].any()
    assert rounds.m[2].all()


@BOTH
def test_each_image_ends_on_its_own(attack: Attack) -> None:
    """Side by side, images cost what they cost alone: none is dragged along."""
    x, y, target = row_batch(7)
    alone = []
    for i in range(7):
        counted = Counted(Rows())
        attack(counted, x[i : i + 1], y[i : i + 1], target=target[i : i + 1], **QUICK)
        assert counted.forwards == counted.backwards + 1
        alone.append(counted.backwards)
    together = Counted(Rows())
    attack(together, x, y, target=target, **QUICK)
    assert together.backwards == sum(alone)
    assert len(set(alone)) > 3
    assert alone[0] == 0  # misread anyway


# --- batches --------------------------------------------------------------------------------------


@BOTH
def test_an_images_result_does_not_depend_on_the_others(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y, target) = Rows(), row_batch(8)
    whole = attack(net, x, y, target=target, **QUICK)
    for i in (0, 1, 7):
        rows = slice(i, i + 1)
        alone = attack(net, x[rows], y[rows], target=target[rows], **QUICK)
        assert torch.equal(alone, whole[rows])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    mixed = attack(net, x[order], y[order], target=target[order], **QUICK)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(mixed, whole)
    monkeypatch.setattr("unfool.attacks._pool.CPU_CHUNK", 3)
    counted = Counted(net)
    assert torch.equal(attack(counted, x, y, target=target, **QUICK), whole)
    assert counted.largest == 3


@BOTH
def test_without_memory_for_all_it_goes_on_with_fewer(attack: Attack) -> None:
    x, y, target = row_batch(6)
    whole = attack(Rows(), x, y, target=target, **QUICK)
    assert torch.equal(attack(Narrow(Rows()), x, y, target=target, **QUICK), whole)


@BOTH
def test_three_channels(attack: Attack) -> None:
    x, _, _ = row_batch(3)
    x = torch.cat([x, 1 - x, x.flip(3)], dim=1)
    net = Rows(features=192)
    y = net(x).argmax(dim=1).detach()
    got = attack(net, x, y, target=(y + 1) % 4, **QUICK)
    assert got.shape == x.shape
    hit = found(got, x)
    assert hit.any()
    assert torch.equal(net(got).argmax(dim=1)[hit], ((y + 1) % 4)[hit])


@BOTH
def test_progress_tells_images_done_and_fooled(attack: Attack) -> None:
    x, y, target = row_batch(10)
    told: list[tuple[int, int, str]] = []
    got = attack(Rows(), x, y, target=target, progress=lambda *s: told.append(s), **QUICK)
    done = [step[0] for step in told]
    assert done == sorted(done)
    assert done[0] == 2  # misread before
    assert len(set(done)) > 3
    assert {step[1] for step in told} == {10}
    assert told[0][2].endswith(": 0 of 8 fooled")
    name = attack.__name__
    assert told[-1] == (10, 10, f"{name}: {int(found(got, x).sum())} of 8 fooled")


# --- presets, the caller's model, bad input -------------------------------------------------------


def test_presets_are_the_authors_and_can_be_overridden() -> None:
    ours = L0.PRESETS["original"], LINF.PRESETS["original"]
    assert [s.steps for s in ours] == [1000, 1000]
    assert [s.lr for s in ours] == [0.01, 0.005]
    assert [(s.c, s.growth, s.largest_c) for s in ours] == [(1e-3, 2, 2e6), (1e-5, 2, 20)]
    assert (ours[0].root, ours[0].small, ours[0].retreat) == (0.3, 0.01, False)
    assert (ours[1].shrink, ours[1].retreats) == (0.9, 0)
    changed = round_schedule(L0.PRESETS, "original", 7, 0.5, 3.0)
    assert (changed.steps, changed.lr, changed.c, changed.root) == (7, 0.5, 3.0, 0.3)
    assert round_schedule(LINF.PRESETS, "fast", None, None, None) == LINF.PRESETS["fast"]


@BOTH
def test_the_original_preset_fools_too(attack: Attack) -> None:
    net, (x, y, target) = rightly_read(2)
    got = attack(net, x, y, target=target, preset="original", steps=20, lr=0.2, c=1.0)
    assert torch.equal(net(got).argmax(dim=1), target)


@BOTH
def test_the_model_comes_back_after_an_error(attack: Attack) -> None:
    comes_back_after_an_error(attack)


@BOTH
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"kappa": -1}, ValueError, r"kappa must be >= 0, not -1"),
        ({"kappa": float("nan")}, ValueError, r"kappa .*nan"),
        ({"preset": "paper"}, ValueError, r"preset must be one of original, fast, not 'paper'"),
        ({"steps": 0}, ValueError, r"steps must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"lr": 0.0}, ValueError, r"lr must be > 0"),
        ({"lr": -1.0}, ValueError, r"lr must be >= 0, not -1"),
        ({"c": 0}, ValueError, r"c must be > 0"),
        ({"c": 1e9}, ValueError, r"c must be <= .*, where it ends, not 1e\+09"),
        ({"x": row_batch(5)[0] * 255}, ValueError, r"divide by 255"),
        ({"y": row_batch(5)[1].int()}, TypeError, r"y\.long\(\)"),
        ({"target": row_batch(5)[1]}, ValueError, r"equals y for 5"),
        ({"target": row_batch(5)[2] + 4}, ValueError, r"target spans.*4 classes"),
    ],
)  # fmt: skip
def test_bad_input(
    attack: Attack, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    x, y, _ = row_batch(5)
    with pytest.raises(kind) as caught:
        attack(**({"model": Rows(), "x": x, "y": y} | change))
    assert re.search(message, str(caught.value)), str(caught.value)
