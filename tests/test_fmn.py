"""FMN: projections by hand, its radius, four norms as near as foolbox's, kind to the batch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attack_tools import length
from unfool.attacks import deepfool, fmn
from unfool.attacks._nearest import Norm, clip, keep_largest, l0, l1, l2, linf, shorten, shrink
from unfool.attacks.fmn import BALLS, next_count, next_radius
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

NORMS: dict[str, Norm] = {"l0": l0, "l1": l1, "l2": l2, "linf": linf}


def rightly_read(n: int = 24) -> tuple[nn.Module, Batch]:
    net, (x, y, target) = small_net(), digits(n, small=True)
    right = net(x).argmax(dim=1) == y
    return net, (x[right], y[right], target[right])


def wins(net: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    seen = net(x_adv).argmax(dim=1)
    return (seen != y) if target is None else (seen == target)


def change(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


# --- norms and projections ------------------------------------------------------------------------


def test_norms_by_hand() -> None:
    found = [float(norm(change(3.0, 0.0, -4.0))) for norm in NORMS.values()]
    assert found == [2, 7, 5, 4]


@pytest.mark.parametrize(
    ("project", "radius", "expected"),
    [
        (keep_largest, 2.0, [3.0, 0.0, 0.0, -2.0]),
        (keep_largest, 4.0, [3.0, 1.0, 0.0, -2.0]),
        (keep_largest, 0.0, [0.0, 0.0, 0.0, 0.0]),
        (shrink, 6.0, [3.0, 1.0, 0.0, -2.0]),
        (shrink, 3.0, [2.0, 0.0, 0.0, -1.0]),  # all move by 1
        (shrink, 4.5, [2.5, 0.5, 0.0, -1.5]),
        (shrink, 0.5, [0.5, 0.0, 0.0, 0.0]),
        (shrink, 0.0, [0.0, 0.0, 0.0, 0.0]),
        (shorten, 14**0.5 / 2, [1.5, 0.5, 0.0, -1.0]),
        (shorten, 4.0, [3.0, 1.0, 0.0, -2.0]),  # inside already: it must not grow
        (clip, 1.5, [1.5, 1.0, 0.0, -1.5]),
        (clip, float("inf"), [3.0, 1.0, 0.0, -2.0]),
    ],
)
def test_projections_by_hand(project: Any, radius: float, expected: list[float]) -> None:
    got = project(change(3.0, 1.0, 0.0, -2.0), torch.tensor([radius]))
    assert got.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_of_equal_values_the_first_stay() -> None:
    got = keep_largest(change(1.0, -1.0, 1.0, 1.0), torch.tensor([2.0]))
    assert got.flatten().tolist() == [1, -1, 0, 0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), radius=st.floats(0.01, 8), size=st.integers(1, 5))
def test_nothing_in_the_ball_is_nearer_than_the_projection(
    seed: int, radius: float, size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    far = 2 * torch.randn(1, 1, size, size, generator=generator, dtype=torch.float64)
    others = torch.randn(200, 1, size, size, generator=generator, dtype=torch.float64)
    limit = torch.tensor([radius], dtype=torch.float64)
    for name in ("l1", "l2", "linf"):
        norm, project = NORMS[name], BALLS[name].project
        got = project(far, limit)
        assert float(norm(got)) <= radius + 1e-9
        inside = others * (radius / norm(others).clamp(min=radius)).view(-1, 1, 1, 1)
        inside = torch.cat([inside, 0.99 * got + 0.01 * inside])  # also its neighbours
        assert float(l2(far - got)) <= float(l2(far - inside).min()) + 1e-9
        assert torch.allclose(project(got, limit), got)


# --- the radius -----------------------------------------------------------------------------------


def test_the_next_radius_by_hand() -> None:
    """Not yet fooled; fooled at last; fooled again, further than the best; not fooled any more."""
    inf = float("inf")
    margin = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    best = torch.tensor([inf, 2.0, 1.5, 2.0])
    border = torch.full((4,), 5.0)
    got = next_radius(torch.full((4,), 2.0), 0.1, margin, best, border)
    assert got.tolist() == pytest.approx([5.0, 1.8, 1.5, 2.2])
    radius, best = torch.tensor([1.0, 20.0, 1.0, 20.0]), torch.tensor([inf, inf, 1.0, 12.0])
    got = next_count(radius, 0.1, torch.tensor([-1.0, -1.0, 1.0, 1.0]), best)
    assert got.tolist() == [2, 22, 1, 12]


class Line(nn.Module):
    """Class 1 where 4 a + 2 b > 3 for the first two of four pixels, class 0 else."""

    def forward(self, x: Tensor) -> Tensor:
        by = x.flatten(1)[:, :2] @ torch.tensor([4.0, 2.0]) - 3
        return torch.stack([-by, by], dim=1) / 2


@pytest.mark.parametrize(
    ("norm", "expected"), [("l0", 1.0), ("l1", 0.75), ("l2", 3 / 20**0.5), ("linf", 0.5)]
)
def test_on_a_linear_model_it_finds_the_nearest_point_of_the_border(
    norm: str, expected: float
) -> None:
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    got = fmn(Line(), x, y, norm=norm, steps=200)
    assert float(NORMS[norm](got - x)) == pytest.approx(expected, rel=2e-3)
    assert Line()(got).argmax() == 1
    assert got[0, 0, 1].tolist() == [0, 0]


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_where_the_classes_tie_it_goes_on(norm: str) -> None:
    # Exactly linear, so the first jump ends on the border itself, where nothing is fooled yet.
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 16))
        model[1].bias.copy_(torch.tensor([-7.2, 7.2]))
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    got = fmn(model, x, y, norm=norm, steps=10)
    assert model(got).argmax() == 1
    assert float((got - x).abs().max()) == pytest.approx(0.05, rel=1e-3)


# --- how near -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l0", "l1", "linf"])
def test_as_near_as_foolbox(norm: str) -> None:
    import foolbox

    net, (x, y, _) = rightly_read()
    name = {"l0": "L0", "l1": "L1", "linf": "LInf"}[norm]
    attack = getattr(foolbox.attacks, f"{name}FMNAttack")(steps=40)
    theirs = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=None)[0]
    net.zero_grad(set_to_none=True)  # it leaves gradients behind

    def no_worse(**more: Any) -> bool:
        ours = fmn(net, x, y, norm=norm, steps=40, **more)
        won, both = wins(net, ours, y, None), wins(net, theirs, y, None)
        measure = NORMS[norm]
        near, nearer = (float(measure(part - x)[won & both].median()) for part in (theirs, ours))
        return int(won.sum()) >= int(both.sum()) and nearer <= 1.01 * near

    assert no_worse()
    assert no_worse(inside=False)
    assert not no_worse(alpha=0.02)  # sees steps that get nowhere


def test_in_l2_it_goes_nearer_than_foolbox_which_does_not_project() -> None:
    import foolbox

    net, (x, y, target) = rightly_read()
    attack = foolbox.attacks.L2FMNAttack(steps=40)
    for criterion, aim in (
        (y, None), (foolbox.criteria.TargetedMisclassification(target), target),
    ):  # fmt: skip
        theirs = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, criterion, epsilons=None)[0]
        ours = fmn(net, x, y, target=aim, steps=40)
        won, both = wins(net, ours, y, aim), wins(net, theirs, y, aim)
        assert int(won.sum()) >= int(both.sum()) > 12
        near, nearer = (float(length(part - x)[won & both].median()) for part in (theirs, ours))
        assert nearer < near
    net.zero_grad(set_to_none=True)


def test_looking_inside_only_fools_what_the_paper_cannot() -> None:
    """Where most of a step would be clipped away: digits, as black as those in notebook 01."""
    net, (x, y, _) = rightly_read(32)
    papers = int(wins(net, fmn(net, x, y, steps=30, inside=False), y, None).sum())
    ours = fmn(net, x, y, steps=30)
    assert int(wins(net, ours, y, None).sum()) == len(x)
    assert papers < len(x)


def test_a_start_that_fools_is_led_to_the_border_and_gone_on_from() -> None:
    net, (x, y, _) = rightly_read()
    start = deepfool(net, x, y, overshoot=2.0)
    for norm, measure in NORMS.items():
        one = fmn(net, x, y, norm=norm, steps=1, start=start)
        assert wins(net, one, y, None).all()
        assert (measure(one - x) <= measure(start - x) + 1e-4).all()
        if norm != "l0":  # most of deepfool's pixels are needed, however little
            assert float(measure(one - x).median()) < 0.8 * float(measure(start - x).median())
        more = fmn(net, x, y, norm=norm, steps=15, start=start)
        assert float(measure(more - x).median()) < float(measure(one - x).median())
    assert torch.equal(fmn(net, x, y, steps=1), x)  # the control: without it, x is all it has seen
    assert torch.equal(fmn(net, x, y, steps=9, start=x), fmn(net, x, y, steps=9))


# --- minimal-norm semantics and batches -----------------------------------------------------------


def test_what_it_cannot_fool_and_what_is_misread_comes_back() -> None:
    net, (x, y, target) = Rows(), row_batch(20)
    for norm in NORMS:
        got = fmn(net, x, y, target=target, norm=norm, steps=30)
        assert torch.equal(got[::5], x[::5])
        assert in_unit_range(got)
        hit = length(got - x) > 0
        assert int(hit.sum()) > 8
        assert torch.equal(net(got).argmax(dim=1)[hit], target[hit])
        assert torch.equal(fmn(net, x, y, target=target, norm=norm, steps=1), x)


def test_a_step_is_a_pass_and_finished_images_cost_nothing() -> None:
    net, (x, y, _) = Rows(), row_batch(20)
    with counted(net) as passes:
        fmn(net, x, y, steps=7)
    assert (passes.forward, passes.backward) == (20 + 16 * 7, 16 * 7)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_an_images_result_does_not_depend_on_the_others(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y, target) = Rows(), row_batch(12)
    quick: dict[str, Any] = {"norm": norm, "steps": 20}
    whole = fmn(net, x, y, target=target, **quick)
    for i in (0, 1, 4, 11):
        rows = slice(i, i + 1)
        assert torch.equal(fmn(net, x[rows], y[rows], target=target[rows], **quick), whole[rows])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = fmn(net, x[order], y[order], target=target[order], **quick)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(mixed, whole)
    monkeypatch.setattr("unfool.inputs.CPU_CHUNK", 5)
    told: list[tuple[int, int, str]] = []
    chunked = fmn(net, x, y, target=target, progress=lambda *step: told.append(step), **quick)
    assert torch.equal(chunked, whole)
    assert told == [(5, 12, "fmn"), (10, 12, "fmn"), (12, 12, "fmn")]
    assert torch.equal(fmn(Narrow(net), x, y, target=target, **quick), whole)


def test_a_vanishing_gradient_makes_no_nan() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([3.0, 0.0]) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    for norm in NORMS:
        assert torch.equal(fmn(Flat(), x, y, norm=norm, steps=5), x)


def test_the_bits_repeat_and_the_random_state_stays() -> None:
    net, (x, y, _) = rightly_read(6)
    before = torch.get_rng_state()
    first = fmn(net, x, y, steps=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    with torch.no_grad():
        again = fmn(net, x.clone().requires_grad_(True), y, steps=10)
    assert torch.equal(again, first)
    assert not again.requires_grad


# --- the caller's model and bad input -------------------------------------------------------------


def test_the_model_comes_back_after_an_error() -> None:
    comes_back_after_an_error(fmn)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"norm": "L2"}, ValueError, r"norm must be one of l0, l1, l2, linf, not 'L2'"),
        ({"steps": 0}, ValueError, r"steps must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"alpha": 0}, ValueError, r"alpha must be > 0"),
        ({"alpha": -1.0}, ValueError, r"alpha must be >= 0, not -1"),
        ({"gamma": 1.5}, ValueError, r"gamma must be from 0 to 1, not 1\.5"),
        ({"start": row_batch(7)[0]}, ValueError, r"start must be like x, \(20, 1.*not \(7, 1"),
        ({"start": row_batch(20)[0].double()}, ValueError, r"not .*float64"),
        ({"start": row_batch(20)[0] * 2}, ValueError, r"start must be images in \[0, 1\]"),
        ({"start": row_batch(20)[0] * float("nan")}, ValueError, r"start must be images in"),
        ({"target": row_batch(20)[1]}, ValueError, r"equals y for 20"),
    ],
)
def test_bad_input(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, y, _ = row_batch(20)
    with pytest.raises(kind) as caught:
        fmn(Rows(), x, y, **given)
    assert re.search(message, str(caught.value)), str(caught.value)
