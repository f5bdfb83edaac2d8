"""The sign family: equal to cleverhans, inside its ball, stronger with more steps and more eps.

FGSM's own tests, and those that every attack must pass, are in test_attacks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attack_tools import CLASSES, batch, digits, fooled, length, network, next_class
from unfool.attacks import bim, fgsm, pgd, r_fgsm, r_llc
from unfool.attacks.sign import least_likely_class, project, steepest
from unfool.evaluation import counted

FAMILY = {"fgsm": fgsm, "r_fgsm": r_fgsm, "r_llc": r_llc, "bim": bim, "pgd": pgd}
RANDOM = ["r_fgsm", "r_llc", "pgd"]


def pgd_l2(*arguments: Any, **settings: Any) -> Tensor:
    return pgd(*arguments, norm="l2", **settings)


def linear() -> nn.Module:
    """Two classes, four pixels; uphill from class 0 is (-1, 2, 0, 0.5)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net[1].weight.data = torch.tensor([[1.0, -1.0, 0.0, 3.0], [0.0, 1.0, 0.0, 3.5]])
    net[1].bias.data = torch.zeros(2)
    return net


# --- equal to an independent implementation, or to a formula done by hand -------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("norm", "order", "eps"), [("linf", np.inf, 0.1), ("l2", 2, 0.8)])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_cleverhans(
    channels: int, targeted: bool, norm: str, order: float, eps: float, random_start: bool
) -> None:
    net, (x, y) = network(channels).eval(), batch(40, channels)
    target = next_class(y) if targeted else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # cleverhans draws its start from the global state
        theirs = projected_gradient_descent(
            net, x, eps, eps / 4, 10, order, clip_min=0.0, clip_max=1.0,
            y=y if target is None else target, targeted=targeted, rand_init=random_start,
        ).detach()  # fmt: skip

    def ours(steps: int) -> Tensor:
        return pgd(
            net, x, y, eps=eps, step=eps / 4, steps=steps, norm=norm, random_start=random_start,
            target=target, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    assert torch.allclose(ours(10), theirs, atol=1e-6, rtol=0)
    assert not torch.allclose(ours(9), theirs, atol=1e-5, rtol=0)


def test_the_comparison_tells_one_step_size_and_one_start_from_another() -> None:
    net, (x, y) = network(), batch(40)
    usual = pgd(net, x, y, eps=0.1, steps=10)
    for other in ({"step": 0.024}, {"random_start": False}, {"norm": "l2"}, {"eps": 0.101}):
        assert not torch.allclose(pgd(net, x, y, **{"eps": 0.1, "steps": 10} | other), usual)


@pytest.mark.parametrize("targeted", [False, True])
def test_bim_equals_cleverhans_and_pgd_without_its_random_start(targeted: bool) -> None:
    net, (x, y) = network().eval(), batch(40)
    target = next_class(y) if targeted else None
    ours = bim(net, x, y, eps=0.1, step=0.01, steps=15, target=target)
    theirs = projected_gradient_descent(
        net, x, 0.1, 0.01, 15, np.inf, clip_min=0.0, clip_max=1.0,
        y=y if target is None else target, targeted=targeted, rand_init=False,
    ).detach()  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)
    kin = pgd(net, x, y, eps=0.1, step=0.01, steps=15, target=target, random_start=False)
    assert torch.equal(ours, kin)
    assert not torch.allclose(ours, fgsm(net, x, y, eps=0.1, target=target), atol=1e-3)


def test_one_large_step_of_bim_is_fgsm() -> None:
    net, (x, y) = network(), batch(40)
    assert torch.equal(bim(net, x, y, eps=0.1, step=0.1, steps=1), fgsm(net, x, y, eps=0.1))


def test_the_default_step_is_2_5_eps_over_steps() -> None:
    net, (x, y) = network(), batch()
    for attack in (bim, pgd):
        usual = attack(net, x, y, eps=0.2, steps=10)
        assert torch.equal(usual, attack(net, x, y, eps=0.2, steps=10, step=0.05))
        assert not torch.equal(usual, attack(net, x, y, eps=0.2, steps=10, step=0.04))


def test_r_fgsm_is_a_random_step_then_fgsm_with_the_rest() -> None:
    net, (x, y) = network(), batch(40)
    draw = torch.empty(x.shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
    start = (x + 0.03 * draw.sign()).clamp(0, 1)
    by_hand = fgsm(net, start, y, eps=0.07)
    ours = r_fgsm(net, x, y, eps=0.1, alpha=0.03, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(ours, by_hand, atol=1e-6)
    assert not torch.allclose(ours, fgsm(net, x, y, eps=0.1), atol=1e-3)
    half = r_fgsm(net, x, y, eps=0.1)
    assert torch.equal(half, r_fgsm(net, x, y, eps=0.1, alpha=0.05))
    assert not torch.equal(half, r_fgsm(net, x, y, eps=0.1, alpha=0.03))


def test_r_llc_is_a_random_step_then_one_to_the_least_likely_class() -> None:
    net, (x, y) = network().eval(), batch(40)

    def logits(images: Tensor) -> Tensor:
        return net(images).detach()

    draw = torch.empty(x.shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
    start = (x + 0.3 * draw.sign()).clamp(0, 1)
    ours = r_llc(net, x, y, eps=0.4, alpha=0.3, generator=torch.Generator().manual_seed(5))
    aims = {
        "least likely": logits(x).scatter(1, y[:, None], 99.0).argmin(dim=1),
        "most likely": logits(x).scatter(1, y[:, None], -99.0).argmax(dim=1),
        "least likely after the random step": logits(start).scatter(1, y[:, None], 99.0).argmin(1),
    }
    for name, aim in aims.items():
        by_hand = fgsm(net, start, y, eps=0.1, target=aim)
        assert torch.allclose(ours, by_hand, atol=1e-6) == (name == "least likely")


def test_the_least_likely_class_is_never_the_images_own() -> None:
    net = linear()
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).view(1, 1, 2, 2)  # logits 1, 0
    assert least_likely_class(net, x, torch.tensor([0])).tolist() == [1]
    assert least_likely_class(net, x, torch.tensor([1])).tolist() == [0]


def test_without_a_random_step_they_are_fgsm_and_with_nothing_else_noise() -> None:
    net, (x, y) = network(), batch(40)
    assert torch.equal(r_fgsm(net, x, y, eps=0.1, alpha=0), fgsm(net, x, y, eps=0.1))
    noise = r_fgsm(net, x, y, eps=0.1, alpha=0.1)
    inside = (x > 0.1) & (x < 0.9)
    assert torch.allclose((noise - x)[inside].abs(), torch.tensor(0.1), atol=1e-6)
    assert abs(float((noise - x)[inside].sign().mean())) < 0.1
    assert torch.equal(noise, r_llc(net, x, y, eps=0.1, alpha=0.1))  # neither looks at a gradient


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("linf", [0.3, 0.7, 0.5, 0.7]), ("l2", [0.41271, 0.67457, 0.5, 0.54364])],
)
def test_pgd_by_hand(norm: str, expected: list[float]) -> None:
    """Uphill on a linear model is always (-1, 2, 0, 0.5); in L2 the ball's rim is met there."""
    x = torch.full((1, 1, 2, 2), 0.5)
    got = pgd(linear(), x, torch.tensor([0]), eps=0.2, steps=5, norm=norm, random_start=False)
    assert torch.allclose(got.flatten(), torch.tensor(expected), atol=1e-5)


def test_a_vanishing_gradient_moves_nothing_and_makes_no_nan() -> None:
    flat, (x, y) = network(), batch()
    for parameter in flat.parameters():
        parameter.data.zero_()
    for attack in (fgsm, bim, pgd_l2):
        settings = {} if attack is fgsm else {"steps": 2}
        if attack is pgd_l2:
            settings |= {"random_start": False}
        assert torch.equal(attack(flat, x, y, **settings), x)
    assert torch.isfinite(pgd_l2(flat, x, y, eps=0.0, steps=2)).all()
    assert torch.equal(steepest(torch.zeros(1, 1, 2, 2), "l2"), torch.zeros(1, 1, 2, 2))


# --- the ball and the box -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*FAMILY, "pgd_l2"]), n=st.integers(1, 5),
    channels=st.sampled_from([1, 3]), size=st.integers(1, 9), eps=st.floats(0, 1),
    seed=st.integers(0, 99), black_and_white=st.booleans(), targeted=st.booleans(),
)  # fmt: skip
def test_results_lie_in_the_ball_and_in_the_unit_range(
    name: str, n: int, channels: int, size: int, eps: float, seed: int, black_and_white: bool,
    targeted: bool,
) -> None:  # fmt: skip
    net, (x, y) = network(channels, size, seed), batch(n, channels, size, seed)
    x = x.round() if black_and_white else x
    before = x.clone()
    attack: Callable[..., Tensor] = pgd_l2 if name == "pgd_l2" else FAMILY[name]
    settings: dict[str, Any] = {"steps": 3} if name in ("bim", "pgd", "pgd_l2") else {}
    if targeted and name != "r_llc":
        settings["target"] = next_class(y)
    got = attack(net, x, y, eps=eps, generator=torch.Generator().manual_seed(seed), **settings)
    assert (got.shape, got.dtype, got.requires_grad) == (x.shape, x.dtype, False)
    assert 0 <= float(got.min()) <= float(got.max()) <= 1
    size_of = length(got - x) if name == "pgd_l2" else (got - x).abs().flatten(1).amax(1)
    assert float(size_of.max()) <= eps * (1 + 1e-6) + 1e-6
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", [*FAMILY, "pgd_l2"])
def test_the_budget_is_used(name: str) -> None:
    """Negative control of the ball: an attack that does nothing would lie in it, too."""
    x, y = batch(8)
    x = 0.2 + 0.6 * x  # far from black and white, where clipping would spend less
    if name == "pgd_l2":
        assert torch.allclose(length(pgd_l2(network(), x, y, eps=0.5) - x), torch.tensor(0.5))
        return
    moved = (FAMILY[name](network(), x, y, eps=0.1) - x).abs()
    at_random = name in ("r_fgsm", "r_llc")  # there, the two steps cancel in half of the pixels
    assert float((moved > 0.099).float().mean()) > (0.4 if at_random else 0.9)


def test_project_by_hand() -> None:
    x = torch.tensor([0.5, 0.0, 1.0, 0.5]).view(1, 1, 2, 2)
    far = torch.tensor([0.9, -1.0, 2.0, 0.5]).view(1, 1, 2, 2)
    for norm in ("linf", "l2"):
        got = project(far, x, 0.1, norm)
        assert torch.allclose(got.flatten(), torch.tensor([0.6, 0.0, 1.0, 0.5]))
        assert torch.equal(project(x, x, 0.1, norm), x)
    near = x + torch.tensor([0.06, 0.08, 0.0, 0.0]).view(1, 1, 2, 2)
    assert torch.allclose(project(near, x, 0.1, "l2"), near)
    assert torch.allclose(length(project(near, x, 0.05, "l2") - x), torch.tensor(0.05))


# --- the batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"norm": "l2", "eps": 1.0}])
def test_an_image_does_not_depend_on_its_neighbours(settings: dict[str, Any]) -> None:
    net, (x, y) = network(), batch(96)
    plain = {"random_start": False, "steps": 8} | settings
    whole = pgd(net, x, y, **plain)
    for i in (0, 63, 64, 95):  # on both sides of a chunk's edge
        one = pgd(net, x[i : i + 1], y[i : i + 1], **plain)
        assert torch.allclose(one, whole[i : i + 1], atol=1e-5)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pgd(net, x[order], y[order], **plain), whole[order], atol=1e-5)
    assert not torch.allclose(pgd(net, x, next_class(y), **plain), whole, atol=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_random_starts_are_drawn_image_after_image(name: str) -> None:
    """So an image alone gets its row of the batch, if as much has been drawn before it."""
    net, (x, y) = network(), batch(64)
    whole = FAMILY[name](net, x, y)
    for i in (0, 31, 32, 63):
        generator = torch.Generator().manual_seed(0)
        torch.empty(x[:i].shape).uniform_(generator=generator)
        one = FAMILY[name](net, x[i : i + 1], y[i : i + 1], generator=generator)
        assert torch.allclose(one, whole[i : i + 1], atol=1e-5)
        if i:
            assert not torch.allclose(
                FAMILY[name](net, x[i : i + 1], y[i : i + 1]), whole[i : i + 1], atol=1e-3
            )


@pytest.mark.parametrize("name", FAMILY)
def test_bits_depend_on_the_seed_alone(name: str) -> None:
    net, (x, y) = network(), batch()

    def run(seed: int) -> Tensor:
        return FAMILY[name](net, x, y, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = run(0)
    assert torch.equal(FAMILY[name](net, x, y), first)  # seed 0 is the default
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert torch.equal(run(0), first)
    assert torch.equal(run(1), first) == (name not in RANDOM)


# --- passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("fgsm", 1, 1), ("r_fgsm", 1, 1), ("r_llc", 2, 1), ("bim", 7, 7), ("pgd", 7, 7)],
)
def test_each_step_costs_one_pass_each_way(name: str, forward: int, backward: int) -> None:
    net, (x, y) = network(), batch(40)
    settings = {"steps": 7} if name in ("bim", "pgd") else {}
    with counted(net) as passes:
        FAMILY[name](net, x, y, **settings)
    assert (passes.forward, passes.backward) == (40 * forward, 40 * backward)


# --- strength, on real digits ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "sizes"),
    [(bim, (0.05, 0.1, 0.15, 0.2, 0.3)), (pgd, (0.05, 0.1, 0.15, 0.2, 0.3)),
     (pgd_l2, (0.5, 1.0, 2.0, 3.0, 5.0))],
)  # fmt: skip
def test_more_eps_never_succeeds_less_up_to_all(
    attack: Callable[..., Tensor], sizes: tuple[float, ...]
) -> None:
    net, x, y = (part[:48] if isinstance(part, Tensor) else part for part in digits())
    count = [int(fooled(net, x, y, attack(net, x, y, eps=eps, steps=15)).sum()) for eps in sizes]
    right = int((net(x).argmax(1) == y).sum())
    assert count == sorted(count)
    assert count[0] < right / 2
    assert count[-1] == right
    noise = r_fgsm(net, x, y, eps=0.3, alpha=0.3)  # the control: it takes a gradient to get there
    assert int(fooled(net, x, y, noise).sum()) < right / 2


def test_more_steps_never_succeed_less_and_beat_one() -> None:
    net, x, y = (part[:64] if isinstance(part, Tensor) else part for part in digits())
    eps = 0.12
    for attack in (bim, pgd):
        made = [attack(net, x, y, eps=eps, steps=k, step=max(0.03, eps / k)) for k in (1, 4, 16)]
        count = [int(fooled(net, x, y, images).sum()) for images in made]
        assert count == sorted(count)
        assert count[-1] > int(fooled(net, x, y, fgsm(net, x, y, eps=eps)).sum())


def test_a_target_is_reached() -> None:
    net, x, y = (part[:32] if isinstance(part, Tensor) else part for part in digits())
    target = (y + 3) % 10
    for attack in (bim, pgd):
        aimed = attack(net, x, y, eps=0.35, steps=30, target=target)
        assert float((net(aimed).argmax(1) == target).float().mean()) > 0.9
        free = attack(net, x, y, eps=0.35, steps=30)
        assert float((net(free).argmax(1) == target).float().mean()) < 0.5


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "kind", "message"),
    [
        ("bim", {"steps": 0}, ValueError, "steps must be >= 1, not 0"),
        ("pgd", {"steps": 2.5}, TypeError, r"steps must be a whole number, not 2\.5 \(float\)"),
        ("pgd", {"steps": True}, TypeError, "steps must be a whole number, not True"),
        ("pgd", {"step": -0.1}, ValueError, r"step must be >= 0, not -0\.1"),
        ("bim", {"step": float("nan")}, ValueError, "step must be >= 0, not nan"),
        ("pgd", {"eps": -1}, ValueError, "eps must be >= 0, not -1"),
        ("pgd", {"eps": float("inf")}, ValueError, "eps must be >= 0 and finite, not inf"),
        ("bim", {"eps": "0.1"}, TypeError, r"eps must be a number, not '0\.1' \(str\)"),
        ("r_fgsm", {"eps": torch.tensor(0.1)}, TypeError, r"eps must be a number, not tensor"),
        ("r_fgsm", {"alpha": 0.2}, ValueError, r"alpha must be from 0 to 0\.15, not 0\.2"),
        ("r_llc", {"alpha": -0.1}, ValueError, r"alpha must be from 0 to 0\.15, not -0\.1"),
        ("pgd", {"norm": "l1"}, ValueError, "norm must be one of linf, l2, not 'l1'"),
        ("pgd", {"norm": 2}, ValueError, "norm must be one of linf, l2, not 2"),
        ("r_llc", {"target": next_class(batch()[1])}, ValueError,
         "r_llc takes no target, because it aims at the least-likely class: leave target out"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_value_and_remedy(
    name: str, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    x, y = batch()
    with pytest.raises(kind, match=message):
        FAMILY[name](network(), x, y, **settings)


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.1), 0, 1])
def test_any_real_number_is_a_setting(number: float) -> None:
    x, y = batch()
    assert CLASSES > 1
    assert pgd(network(), x, y, eps=number, steps=np.int64(2)).shape == x.shape
