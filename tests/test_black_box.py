"""cleverhans's SPSA and HopSkipJump as attacks of ours: known answers, budgets, two faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cleverhans.torch.attacks.hop_skip_jump_attack import hop_skip_jump_attack
from cleverhans.torch.attacks.spsa import spsa as by_cleverhans
from torch import Tensor, nn

import victims
from attack_tools import batch, fooled, network
from test_adaptive import (
    NoGradients,
    best_corner,
    images,
    linear,
    out_of_reach,
    weights,
)
from unfool.attacks import hop_skip_jump, pgd, spsa
from unfool.evaluation import counted

ZEROS = torch.zeros(3, dtype=torch.int64)


def nearest(x: Tensor, weight: Tensor, bias: float) -> Tensor:
    """How far the border of a linear model is from each image in L-infinity, (N,)."""
    return (bias - x.flatten(1) @ weight) / weight.abs().sum()


# --- SPSA -----------------------------------------------------------------------------------------


def test_spsa_finds_the_best_corner_of_a_linear_model() -> None:
    x, weight, eps = images(3), weights(), 0.1
    never = out_of_reach(x, weight, eps, by=-1.0)
    got = spsa(never, x, ZEROS, eps=eps, queries=1000, samples=8)
    assert torch.allclose(got, best_corner(x, weight, eps), atol=0.01)
    few = spsa(never, x, ZEROS, eps=eps, queries=34, samples=8)
    assert not torch.allclose(few, best_corner(x, weight, eps), atol=0.05)  # the control


class Hill(nn.Module):
    """Class 1 leads most where all pixels are 0.4; they start at 0.3, and 2 x 0.3 is beyond."""

    def forward(self, x: Tensor) -> Tensor:
        height = -(x - 0.4).square().flatten(1).sum(dim=1)
        return torch.stack([torch.full_like(height, 0.001), height], dim=1)


def test_the_slope_is_asked_for_where_the_attack_stands() -> None:
    """cleverhans's own asks at twice the image, and walks down this hill."""
    x, y = torch.full((1, 1, 4, 4), 0.3), ZEROS[:1]
    ours = spsa(Hill(), x, y, eps=0.15, queries=2000, samples=16)
    assert float((ours - 0.4).abs().max()) < 0.03
    torch.manual_seed(0)
    theirs = by_cleverhans(
        Hill(), x, 0.15, 60, y=y, learning_rate=0.02, spsa_samples=16, clip_min=0.0, clip_max=1.0
    )
    assert float(theirs.max()) < 0.2


def test_spsa_spends_its_queries_and_stops_where_it_won() -> None:
    never = out_of_reach(images(3), weights(), 0.1, by=-1.0)
    with counted(never) as passes:
        spsa(never, images(3), ZEROS, eps=0.1, queries=100, samples=8)
    assert (passes.forward, passes.backward) == (3 * (1 + 5 * 17), 0)
    net, (x, y, _) = victims.small_net(), victims.digits(12, small=True)
    with counted(net) as passes:
        got = spsa(net, x, y, eps=0.3, queries=1000)
    assert int(fooled(net, x, y, got).sum()) > 8
    assert passes.forward < 12 * 500


# --- HopSkipJump ----------------------------------------------------------------------------------


def test_hop_skip_jump_comes_near_to_a_linear_border() -> None:
    x, weight = images(3), weights()
    bias = float((x.flatten(1) @ weight).max()) + 0.1 * float(weight.abs().sum())
    net, away = linear(weight, bias), nearest(images(3), weight, bias)
    far = (x + 0.6 * weight.sign().view(1, 1, 4, 4)).clamp(0, 1)
    assert (net(far).argmax(1) == 1).any()
    got = hop_skip_jump(net, x, ZEROS, queries=2000, starts=far)
    found = (got - x).abs().flatten(1).amax(dim=1)
    assert (net(got).argmax(1) == 1).all()
    assert bool((found >= away - 1e-4).all())
    assert bool((found <= 1.1 * away).all())
    few = hop_skip_jump(net, x, ZEROS, queries=40, evaluations=10, starts=far)
    assert bool(((few - x).abs().flatten(1).amax(dim=1) > found).all())  # the control
    # What is farther than eps counts for nothing.
    none = hop_skip_jump(net, x, ZEROS, eps=0.9 * float(away.min()), queries=300, starts=far)
    assert torch.equal(none, x)


def test_cleverhans_alone_cannot_do_this_norm() -> None:
    net = linear(weights(), float((images(1).flatten(1) @ weights()).max()) + 0.2)
    with pytest.raises(TypeError, match="min"):
        hop_skip_jump_attack(
            net, images(1), None, constraint=torch.inf, num_iterations=1, verbose=False,
            image_target=images(1)[:, None] + 0.2,
        )  # fmt: skip


def test_hop_skip_jump_spends_its_queries_and_no_more() -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(4, small=True)
    for queries in (1, 50, 300):
        with counted(net) as passes:
            hop_skip_jump(net, x, y, queries=queries, evaluations=20)
        assert passes.forward <= 4 * (queries + 1)
    assert passes.backward == 0
    assert passes.forward > 4 * 250


def test_where_noise_is_read_as_the_class_other_starts_help() -> None:
    x, weight = images(2), weights()
    never_noise = linear(weight, 0.97 * float(weight.clamp(min=0).sum()))
    best = (weight > 0).float().view(1, 1, 4, 4)
    assert torch.equal(hop_skip_jump(never_noise, x, ZEROS[:2], queries=300), x)
    got = hop_skip_jump(never_noise, x, ZEROS[:2], queries=300, starts=torch.cat([x, best]))
    assert (never_noise(got).argmax(1) == 1).all()


# --- both -----------------------------------------------------------------------------------------

QUICK: Any = [(spsa, {"queries": 300, "samples": 8}), (hop_skip_jump, {"queries": 300})]


@pytest.mark.parametrize(("attack", "more"), QUICK)
def test_neither_asks_for_a_gradient(attack: Any, more: dict[str, Any]) -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(6, small=True)
    got = attack(NoGradients(net), x, y, eps=0.4, **more)
    assert int(fooled(net, x, y, got).sum()) > 2
    with pytest.raises(AssertionError):
        pgd(NoGradients(net), x, y)


@pytest.mark.parametrize(("attack", "more"), QUICK)
def test_results_lie_in_the_ball_and_in_the_unit_range(attack: Any, more: dict[str, Any]) -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(5, small=True)
    x[:2] = x[:2].round()
    for eps in (0.0, 0.05, 1.0):
        got = attack(net, x, y, eps=eps, **more)
        assert 0 <= float(got.min()) <= float(got.max()) <= 1
        assert float((got - x).abs().max()) <= eps + 1e-6
    assert not torch.equal(got, x)


@pytest.mark.parametrize(("attack", "more"), QUICK)
def test_an_image_draws_its_own_numbers_and_what_is_wrong_stays(
    attack: Any, more: dict[str, Any]
) -> None:
    net, (x, y, _) = victims.Rows().eval(), victims.row_batch(5)
    whole = attack(net, x, y, eps=0.3, **more)
    assert torch.equal(attack(net, x[:2], y[:2], eps=0.3, **more), whole[:2])
    other = attack(net, x, y, eps=0.3, generator=torch.Generator().manual_seed(1), **more)
    assert not torch.equal(other, whole)
    wrong = net(x).argmax(1)
    assert torch.equal(attack(net, x, (wrong + 1) % 4, eps=0.3, **more), x)


def test_spsa_reaches_a_target() -> None:
    net, (x, y, aim) = victims.small_net(), victims.digits(8, small=True)
    hit = net(spsa(net, x, y, eps=1.0, queries=1500, samples=8, target=aim)).argmax(1) == aim
    free = net(spsa(net, x, y, eps=1.0, queries=1500, samples=8)).argmax(1) == aim
    assert int(hit.sum()) > 2 + int(free.sum())


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (spsa, {"queries": 32}, r"queries=32 is less than one step's 2 x 16 \+ 1"),
        (spsa, {"queries": 0}, "queries must be >= 1, not 0"),
        (spsa, {"samples": 0}, "samples must be >= 1, not 0"),
        (spsa, {"rate": 0}, "rate must be > 0"),
        (spsa, {"delta": 0.0}, "delta must be > 0"),
        (spsa, {"eps": -0.1}, "eps must be >= 0, not -0.1"),
        (hop_skip_jump, {"queries": 0}, "queries must be >= 1, not 0"),
        (hop_skip_jump, {"evaluations": 0}, "evaluations must be >= 1, not 0"),
        (hop_skip_jump, {"starts": torch.rand(2, 1, 4, 4)}, r"\(M, 1, 8, 8\), not \(2, 1, 4, 4\)"),
        (hop_skip_jump, {"starts": torch.rand(0, 1, 8, 8)}, r"\(0, 1, 8, 8\): take some of the tr"),
        (hop_skip_jump, {"starts": 2 * torch.ones(1, 1, 8, 8)}, r"pixels must lie in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused(attack: Any, settings: dict[str, Any], message: str) -> None:
    x, y = batch(2)
    with pytest.raises(ValueError, match=message):
        attack(network(), x, y, **settings)


def test_the_starts_are_read_once() -> None:
    seen: list[int] = []
    x, weight = images(3), weights()
    net = out_of_reach(x, weight, 0.5, by=0.0)
    net.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    hop_skip_jump(net, x, ZEROS, queries=20, evaluations=5, starts=images(37))
    assert seen.count(37) == 1
