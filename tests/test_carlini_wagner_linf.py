"""Carlini and Wagner's L-infinity attack: the least largest change where it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unfool.attacks import bim, carlini_wagner_l2, carlini_wagner_linf
from unfool.attacks.carlini_wagner_linf import LOWEST, PRESETS, Lowering
from victims import digits, small_net


def largest(x: Tensor, x_adv: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).abs().amax(dim=1)


def linear(classes: int) -> nn.Module:
    """A random linear classifier, undecided between all classes on mid-grey."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    net[1].bias.data = -0.5 * net[1].weight.data.sum(dim=1)
    return net


def to_borders(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The distance f / ||w||_1 to each border of a linear model, (N, K)."""
    weight, rows = net[1].weight.detach(), torch.arange(len(x))
    logits = net(x).detach()
    behind = logits[rows, y][:, None] - logits
    lengths = (weight[None] - weight[y][:, None]).abs().sum(dim=2)
    return (behind / lengths).masked_fill(nn.functional.one_hot(y, len(weight)).bool(), torch.inf)


@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_model_it_comes_to_the_nearest_border(targeted: bool) -> None:
    net, generator = linear(4 if targeted else 2), torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(12, 1, 8, 8, generator=generator)
    y = net(x).argmax(dim=1).detach()
    target = (y + 1) % (4 if targeted else 2)
    best = to_borders(net, x, y).gather(1, target[:, None]).squeeze(1)
    far = best > 2 * LOWEST
    x, y, target, best = (part[far] for part in (x, y, target, best))
    got = carlini_wagner_linf(net, x, y, target=target if targeted else None)
    ratio = largest(x, got) / best
    assert len(x) > 7
    assert float(ratio.min()) > 1 - 1e-3
    assert float(ratio.max()) < 1.1
    assert float(ratio.median()) < 1.03
    l2 = carlini_wagner_l2(net, x, y, target=target, searches=3, steps=60, c=1.0)
    l2, x, best = (part[(l2 != x).flatten(1).any(dim=1)] for part in (l2, x, best))
    assert float((largest(x, l2) / best).median()) > 1.3  # the control: another norm's optimum


def test_no_further_than_the_smallest_eps_at_which_bim_succeeds() -> None:
    net, (x, y, target) = small_net(), digits(7, small=True)
    right = net(x).argmax(dim=1) == y
    x, y, target = x[right], y[right], target[right]
    smallest = torch.full((len(x),), torch.inf)
    for eps in torch.arange(0.4, 0.04, -0.03).tolist():
        won = net(bim(net, x, y, eps=eps, step=eps / 8, steps=25, target=target)).argmax(1)
        smallest[won == target] = eps
    got = carlini_wagner_linf(net, x, y, target=target)
    assert (net(got).argmax(dim=1) == target).all()
    ratio = largest(x, got) / smallest
    assert float(ratio.max()) < 1.05
    weak = carlini_wagner_linf(net, x, y, target=target, steps=10, lr=0.5)
    assert float((largest(x, weak) / smallest).median()) > 1.05  # the control: sees a poor descent


# --- the ceiling ----------------------------------------------------------------------------------


def lowering(preset: str = "fast") -> Lowering:
    net, live = linear(4), torch.ones(3, dtype=torch.bool)
    x, aim = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    return Lowering(net, x, aim, -1, live, 0.0, PRESETS[preset], None)


def test_only_what_sticks_out_is_pulled_back() -> None:
    state = lowering()
    state.tau[:] = 0.1
    images = state.x[:1].clone()
    images[0, 0, 0, :4] += torch.tensor([0.11, -0.11, 0.09, -0.09])
    pull = state.pull(torch.tensor([0]), images)
    assert pull[0, 0, 0, :4].tolist() == [1.0, -1.0, 0.0, 0.0]
    assert int(pull.abs().sum()) == 2


def test_a_round_is_won_half_way_and_the_nearest_image_is_kept() -> None:
    state, rows = lowering(), torch.arange(3)
    change = torch.tensor([0.4, 0.4, 0.4]).view(-1, 1, 1, 1)
    fools = torch.tensor([True, True, False])
    assert state.keep(rows, state.x + change, fools).tolist() == [True, True, False]
    state.tighten(rows[:2], state.best[:2], state.best[:2])
    assert state.tau[:2].tolist() == pytest.approx([0.36, 0.36])
    change = torch.tensor([0.385, 0.375, 0.375]).view(-1, 1, 1, 1)
    assert state.keep(rows, state.x + change, fools).tolist() == [False, True, False]
    assert state.linf.tolist() == pytest.approx([0.385, 0.375, 1.0])
    assert torch.allclose(state.best, state.x + torch.where(fools.view(-1, 1, 1, 1), change, 0))
    state.keep(rows, state.x + 0.39, fools)
    assert state.linf.tolist() == pytest.approx([0.385, 0.375, 1.0])  # further: not kept


def test_a_lost_round_lowers_it_by_half_as_much_until_it_is_over() -> None:
    state, rows = lowering(), torch.tensor([0])
    state.linf[:] = 0.4
    for shrink in (0.95, 0.975, 0.9875):
        state.loosen(rows)
        assert float(state.tau[0]) == pytest.approx(shrink * 0.4)
        assert state.live[0]
    state.loosen(rows)
    assert state.live.tolist() == [False, True, True]
    strict = lowering("original")
    strict.loosen(rows)
    assert not strict.live[0]


def test_steps_become_smaller_with_the_room_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    state, rows = lowering(), torch.arange(3)
    state.linf[:] = torch.tensor([0.9, 0.1, 0.01])
    state.tighten(rows, state.best, state.best)
    assert state.lr.flatten().tolist() == pytest.approx([0.02, 0.009, 0.0009])
    net = linear(2)
    x = 0.3 + 0.4 * torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(dim=1).detach()
    near = to_borders(net, x, y).amin(dim=1)
    ratio = largest(x, carlini_wagner_linf(net, x, y)) / near
    monkeypatch.setitem(PRESETS, "fast", replace(PRESETS["fast"], ease=0.0))
    clumsy = largest(x, carlini_wagner_linf(net, x, y)) / near
    assert float(clumsy.median()) > 1.1
    assert float(ratio.median()) < 1.05


def test_below_a_256th_it_is_over() -> None:
    state, rows = lowering(), torch.arange(3)
    state.linf[:] = torch.tensor([0.5, 1.1 * LOWEST, 1.2 * LOWEST])
    state.tighten(rows, state.best, state.best)
    assert state.live.tolist() == [True, False, True]


def test_retreats_come_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    net = linear(2)
    x = 0.3 + 0.4 * torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(dim=1).detach()
    fine = largest(x, carlini_wagner_linf(net, x, y))
    monkeypatch.setitem(PRESETS, "fast", replace(PRESETS["fast"], retreats=0))
    coarse = largest(x, carlini_wagner_linf(net, x, y))
    assert (fine <= coarse + 1e-6).all()
    assert float(fine.mean()) < 0.99 * float(coarse.mean())
