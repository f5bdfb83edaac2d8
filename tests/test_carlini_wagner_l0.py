"""Carlini and Wagner's L0 attack: the fewest pixels where they are known, fewer than JSMA's."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unfool.attacks import carlini_wagner_l0, carlini_wagner_l2, jsma
from unfool.attacks.carlini_wagner_l0 import PRESETS, Freezing, group_size
from unfool.evaluation import distortion
from victims import digits, small_net

room = import_module("unfool.attacks.carlini_wagner_l0")  # by its name the function is known


def pixels(x: Tensor, x_adv: Tensor) -> Tensor:
    return distortion(x, x_adv)["l0"]


def linear(features: int = 64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A random linear classifier of two classes, undecided on mid-grey, and its weights 1 - 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(features, 2))
    weight = net[1].weight.detach()
    net[1].bias.data = -0.5 * weight.sum(dim=1)
    return net, weight[1] - weight[0]


def fewest(net: nn.Module, w: Tensor, x: Tensor) -> Tensor:
    """How many pixels of a linear model must go to black or white for class 1 to win, (N,)."""
    most = torch.where(w > 0, w * (1 - x.flatten(1)), -w * x.flatten(1))
    logits = net(x).detach()
    behind = logits[:, :1] - logits[:, 1:]
    return (most.sort(dim=1, descending=True).values.cumsum(dim=1) < behind).sum(dim=1) + 1


def class_0(w: Tensor, n: int = 6) -> Tensor:
    """Greys, the later the further on the side of class 0, (n, 1, 8, 8)."""
    return 0.5 - torch.linspace(0.03, 0.25, n).view(-1, 1, 1, 1) * w.sign().view(1, 1, 8, 8)


# --- how few --------------------------------------------------------------------------------------


def test_on_a_linear_model_it_changes_the_fewest_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    net, w = linear()
    x, y = class_0(w), torch.zeros(6, dtype=torch.int64)
    best = fewest(net, w, x)
    assert best.tolist() == sorted(set(best.tolist()))  # from few to many
    got = carlini_wagner_l0(net, x, y)
    assert (net(got).argmax(dim=1) == 1).all()
    assert torch.equal(pixels(x, got), best)
    greedy = replace(PRESETS["fast"], share=0.5, retreat=False)  # the control: too many at once
    monkeypatch.setitem(PRESETS, "fast", greedy)
    assert int(pixels(x, carlini_wagner_l0(net, x, y)).sum()) > 1.2 * int(best.sum())


def test_fewer_pixels_than_jsma_at_no_less_success() -> None:
    net, (x, y, target) = small_net(), digits(9, small=True)
    right = net(x).argmax(dim=1) == y
    x, y, target = x[right], y[right], target[right]
    ours = carlini_wagner_l0(net, x, y, target=target)
    theirs = jsma(net, x, y, target=target, gamma=1.0)
    won, too = (net(part).argmax(dim=1) == target for part in (ours, theirs))
    assert int(won.sum()) >= int(too.sum()) > 5
    both = won & too
    few, many = pixels(x, ours)[both], pixels(x, theirs)[both]
    assert float(few.median()) < 0.6 * float(many.median())
    assert int((few <= many).sum()) >= int(both.sum()) - 1
    l2 = pixels(x, carlini_wagner_l2(net, x, y, target=target, searches=2, steps=40, c=1.0))
    assert float(l2[l2 > 0].float().median()) > 5 * float(few.median())  # the control


def test_fewer_pixels_than_arts() -> None:
    """Its descent freezes nothing here: all 16 pixels differ, whatever its settings."""
    from art.attacks.evasion import CarliniL0Method
    from art.estimators.classification import PyTorchClassifier

    net, w = linear(features=16)
    x = (0.5 - torch.tensor([0.05, 0.2]).view(-1, 1) * w.sign()).view(2, 1, 4, 4)
    y = torch.zeros(2, dtype=torch.int64)
    judge = PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 4, 4), 2, clip_values=(0, 1))
    attack = CarliniL0Method(
        judge, targeted=True, max_iter=5, binary_search_steps=3, initial_const=10.0,
        learning_rate=0.1, verbose=False,
    )  # fmt: skip
    theirs = torch.from_numpy(attack.generate(x.numpy(), np.eye(2)[[1, 1]])).float()
    ours = carlini_wagner_l0(net, x, y, target=1 - y)
    for part in (ours, theirs):
        assert (net(part).argmax(dim=1) == 1).all()
    assert torch.equal(pixels(x, ours), fewest(net, w, x))
    assert (pixels(x, ours) < pixels(x, theirs)).all()


# --- what counts as a pixel -----------------------------------------------------------------------


def test_a_pixel_is_freed_and_frozen_in_all_its_channels() -> None:
    """Place 0 gains in three channels; place 1 more in one; together the three are the better."""
    weight = torch.zeros(1, 3, 2, 2)
    weight[0, :, 0, 0], weight[0, 0, 0, 1] = 1.0, 1.5
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    net[1].weight.data = torch.stack([-weight.flatten(), weight.flatten()]) / 2
    net[1].bias.data = torch.tensor([0.0, -2.25 - 1.2])
    x, y = torch.full((1, 3, 2, 2), 0.5), torch.tensor([0])
    got = carlini_wagner_l0(net, x, y)
    changed = (got != x)[0]
    assert changed[:, 0, 0].all()
    assert not changed[:, 0, 1].any()
    assert int(pixels(x, got)) == 1
    alone = jsma(net, x, y, target=1 - y, variant="single", gamma=1.0)
    assert (alone != x)[0, 0, 0, 1]  # the control: it takes the largest value first


def test_frozen_pixels_are_the_very_values_of_the_original() -> None:
    net, w = linear()
    x = class_0(w)
    got = carlini_wagner_l0(net, x, torch.zeros(6, dtype=torch.int64))
    moved = (got - x).abs().flatten(1)
    assert (moved > 0.05).sum(dim=1).tolist() == pixels(x, got).tolist()  # none a hair away
    assert int(pixels(x, got).max()) < 20


# --- how many at once -----------------------------------------------------------------------------

INF = float("inf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [3, 1]),  # -1 and 0.01 cost nothing or little, 0.5 less than a tenth; 4 of 4 is all
        ({"share": 0.5}, [4, 1]),
        ({"share": INF}, [5, 1]),
        ({"share": INF, "small": 0.01}, [3, 1]),  # the one after the last small one goes, too
        ({"share": INF, "small": -2.0}, [1, 1]),
        ({"share": INF, "root": 0.3}, [2, 1]),  # ceil(0.3 sqrt(25)), ceil(0.3 sqrt(1))
        ({"share": INF, "root": 1.0}, [5, 1]),
        ({"share": 0.0}, [1, 1]),
    ],
)
def test_the_size_of_a_group_by_hand(change: dict[str, float], expected: list[int]) -> None:
    gain = torch.tensor([[-1.0, 0.01, 0.5, 2.0, 4.0, INF], [4.0, INF, INF, INF, INF, INF]])
    differ = torch.tensor([25, 1])
    size = group_size(gain, differ, replace(PRESETS["fast"], **change))
    assert size.tolist() == expected
    assert size.dtype == torch.int64


def hunt(preset: str = "fast") -> Freezing:
    net, w = linear()
    x, live = class_0(w, 1), torch.ones(1, dtype=torch.bool)
    aim = torch.zeros(1, dtype=torch.int64)
    return Freezing(net, x, aim, -1, live, 0.0, PRESETS[preset], None)


def test_the_least_useful_go_first_and_half_of_them_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "group_size", lambda gain, differ, schedule: torch.tensor([8]))
    state, rows = hunt(), torch.tensor([0])
    slope = torch.linspace(-1, 1, 64).flip(0).view(1, 1, 8, 8)
    state.tighten(rows, state.x + 0.1, slope)
    assert (~state.free).flatten().nonzero().flatten().tolist() == list(range(56, 64))
    for left in (4, 2, 1):
        state.loosen(rows)
        assert (~state.free).flatten().nonzero().flatten().tolist() == list(range(64 - left, 64))
        assert state.live.item()
    state.loosen(rows)
    assert not state.live.item()
    strict = hunt("original")
    strict.tighten(rows, strict.x + 0.1, slope)
    strict.loosen(rows)
    assert not strict.live.item()


def test_what_is_frozen_stays_so_and_ranks_last() -> None:
    state, rows = hunt(), torch.tensor([0])
    slope = torch.linspace(1, 2, 64).view(1, 1, 8, 8)
    frozen: set[int] = set()
    while state.live.any():
        state.tighten(rows, state.x + 0.1 * state.free, slope)
        now = set((~state.free).flatten().nonzero().flatten().tolist())
        assert now > frozen
        assert now == set(range(len(now)))
        frozen = now
    assert len(frozen) == 64


def test_the_paper_freezes_one_pixel_a_round_and_gets_as_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, w = linear()
    x, y = class_0(w, 2), torch.zeros(2, dtype=torch.int64)
    sizes: list[int] = []

    def counted(*given: Any) -> Tensor:
        size = group_size(*given)
        sizes.extend(size.tolist())
        return size

    monkeypatch.setattr(room, "group_size", counted)
    fast = carlini_wagner_l0(net, x, y, steps=20, lr=0.2)
    assert max(sizes) > 3  # the control
    sizes.clear()
    monkeypatch.setitem(PRESETS, "fast", replace(PRESETS["fast"], root=1e-9))
    slow = carlini_wagner_l0(net, x, y, steps=20, lr=0.2)
    assert set(sizes) == {1}
    assert pixels(x, slow).tolist() == pixels(x, fast).tolist() == fewest(net, w, x).tolist()
