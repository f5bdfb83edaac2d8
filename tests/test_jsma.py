"""JSMA: the very pixels that a table of all pairs would choose, few passes, honest failures."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unfool.attacks.jsma import best_pair, best_single, jsma, not_dominated, top_two
from victims import (
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

MODULE = import_module("unfool.attacks.jsma")  # the name in the package is the function

# --- the choice of pixels -------------------------------------------------------------------------


def table(good: Tensor, bad: Tensor) -> tuple[int, int] | None:
    """The best pair by brute force; the first of equal ones; None if no pair helps."""
    g, b = good[:, None] + good, bad[:, None] + bad
    score = torch.where((g > 0) & (b > 0), g * b, 0).triu(diagonal=1)
    best = int(score.argmax())
    return divmod(best, len(good)) if score.max() > 0 else None


def pairs(good: Tensor, bad: Tensor) -> list[tuple[int, int] | None]:
    chosen, found = best_pair(good, bad)
    rows = zip(chosen.tolist(), found.tolist(), strict=True)
    return [(p, q) if ok else None for (p, q), ok in rows]


def gradients(n: int, features: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Random gains, some of them barred; "ties": few values, so that many pairs are equal."""
    generator = torch.Generator().manual_seed(seed)
    good, bad = torch.randn(2, n, features, generator=generator)
    if kind == "ties":
        good, bad = (good * 1.5).round(), (bad * 1.5).round()
    elif kind == "front":  # nearly nothing is dominated
        bad = 1 - good.abs() + 0.1 * bad
    barred = torch.rand(n, features, generator=generator) < 0.2
    return good.masked_fill(barred, -torch.inf), bad.masked_fill(barred, -torch.inf)


KINDS = ("plain", "ties", "front")


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 4), features=st.integers(2, 40), seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
)  # fmt: skip
@example(n=3, features=784, seed=0, kind="plain")
@example(n=3, features=300, seed=0, kind="ties")
def test_the_pruned_search_finds_the_tables_pair(
    n: int, features: int, seed: int, kind: str
) -> None:
    good, bad = gradients(n, features, seed, kind)
    assert pairs(good, bad) == [table(g, b) for g, b in zip(good, bad, strict=True)]


def test_one_that_dominates_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a search that prunes too much is caught by the same comparison."""

    def skyline(good: Tensor, bad: Tensor) -> Tensor:
        order = good.argsort(dim=1, descending=True, stable=True)
        bad = bad.gather(1, order)
        keep = torch.ones_like(bad, dtype=torch.bool)
        keep[:, 1:] = bad[:, 1:] > bad.cummax(dim=1).values[:, :-1]
        keep[:, :2] = True
        return torch.zeros_like(keep).scatter(1, order, keep)

    good, bad = gradients(50, 30, 0, "plain")
    expected = [table(g, b) for g, b in zip(good, bad, strict=True)]
    assert pairs(good, bad) == expected
    monkeypatch.setattr(MODULE, "not_dominated", skyline)
    assert pairs(good, bad) != expected


def test_the_search_prunes_and_splits_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = gradients(16, 784, 1, "plain")
    assert int(not_dominated(good, bad).sum(dim=1).max()) < 40
    good, bad = gradients(16, 200, 1, "front")
    whole = pairs(good, bad)
    sizes: list[int] = []

    def counted(good: Tensor, bad: Tensor) -> Tensor:
        sizes.append(len(good))
        return not_dominated(good, bad)

    monkeypatch.setattr(MODULE, "TABLE", 5_000)
    monkeypatch.setattr(MODULE, "not_dominated", counted)
    assert pairs(good, bad) == whole
    assert sizes[0] == 16
    assert len(sizes) > 3


def test_one_value_and_the_top_two() -> None:
    good = torch.tensor([[3.0, 1.0, 2.0, -1.0], [-1.0, -2.0, -3.0, -torch.inf]])
    bad = torch.tensor([[-1.0, 5.0, 2.0, 9.0], [1.0, 1.0, 1.0, -torch.inf]])
    values, found = best_single(good, bad)
    assert values[0].tolist() == [1]  # 1 * 5 beats 2 * 2
    assert found.tolist() == [True, False]
    values, found = top_two(good, bad)
    assert values.tolist() == [[0, 2], [0, 1]]  # also where both make it worse
    assert found.tolist() == [True, True]
    assert top_two(good[1:, 2:], bad[1:, 2:])[1].tolist() == [False]


# --- whole attacks --------------------------------------------------------------------------------


def by_hand(
    net: nn.Module, x: Tensor, target: int, theta: float = 1.0, gamma: float = 0.145
) -> Tensor | None:
    """Algorithm 3 of Papernot et al. with a full Jacobian and the table of all pairs."""
    image, left = x.clone(), int(gamma * x.numel()) // 2
    sign = 1 if theta > 0 else -1
    while net(image[None]).argmax() != target:
        jacobian = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], image).flatten(1)
        alpha = jacobian[target]
        beta = jacobian.sum(dim=0) - alpha
        full = (image if theta > 0 else 1 - image).flatten() >= 0.99
        pair = table(
            (sign * alpha).masked_fill(full, -torch.inf),
            (-sign * beta).masked_fill(full, -torch.inf),
        )
        if pair is None or left == 0:
            return None
        image.view(-1)[list(pair)] = (image.view(-1)[list(pair)] + theta).clamp(0, 1)
        left -= 1
    return image


def test_every_step_is_the_tables_on_anet() -> None:
    x, y, target = digits(5)
    found = jsma(anet(), x, y, target=target)
    expected = [by_hand(anet(), image, int(t)) for image, t in zip(x, target, strict=True)]
    assert sum(image is not None for image in expected) >= 3
    for got, image, original in zip(found, expected, x, strict=True):
        assert torch.equal(got, original if image is None else image)


@pytest.mark.parametrize("theta", [1.0, -1.0])
def test_every_step_is_the_tables_on_a_small_network(theta: float) -> None:
    net, (x, y, target) = small_net(), digits(30, small=True)
    right = net(x).argmax(dim=1) == y
    x, y, target = x[right], y[right], target[right]
    found = jsma(net, x, y, target=target, theta=theta)
    expected = [by_hand(net, image, int(t), theta) for image, t in zip(x, target, strict=True)]
    assert 2 < sum(image is not None for image in expected) < len(x)
    for got, image, original in zip(found, expected, x, strict=True):
        assert torch.equal(got, original if image is None else image)
    assert not torch.equal(found, jsma(net, x, y, target=target, theta=theta, variant="top2"))


def test_top2_equals_arts() -> None:
    from art.attacks.evasion import SaliencyMapMethod
    from art.estimators.classification import PyTorchClassifier

    net, (x, y, target) = small_net(), digits(48, small=True)
    right = net(x).argmax(dim=1) == y
    x, y, target = x[right], y[right], target[right]
    wrapped = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (1, 14, 14), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    art = SaliencyMapMethod(wrapped, theta=1.0, gamma=0.145, batch_size=64, verbose=False)
    theirs = torch.from_numpy(art.generate(x.numpy(), y=np.eye(10)[target.numpy()]))
    net.zero_grad(set_to_none=True)  # it leaves gradients behind
    ours = jsma(net, x, y, target=target, variant="top2", saturated=1.0)
    fooled = net(ours).argmax(dim=1) == target
    assert int(fooled.sum()) > 10
    assert torch.equal(ours[fooled], theirs[fooled])
    # Its last step may exceed gamma by up to two values; ours never does.
    spent = (theirs[~fooled] != x[~fooled]).flatten(1).sum(dim=1) > int(0.145 * 196)
    assert ((net(theirs[~fooled]).argmax(dim=1) != target[~fooled]) | spent).all()
    assert not torch.equal(jsma(net, x, y, target=target)[fooled], theirs[fooled])


@pytest.mark.parametrize("variant", ["pair", "top2", "single"])
@pytest.mark.parametrize("theta", [1.0, 0.4, -1.0, -0.3])
def test_changes_are_few_large_and_one_way_or_none_at_all(variant: Any, theta: float) -> None:
    net, (x, y, target) = small_net(), digits(40, small=True)
    gamma = 0.1
    found = jsma(net, x, y, target=target, theta=theta, gamma=gamma, variant=variant)
    change = (found - x).flatten(1)
    fooled = net(found).argmax(dim=1) == target
    right = net(x).argmax(dim=1) == y
    assert 1 < int((fooled & right).sum()) < int(right.sum())
    assert not (~right).all()
    assert (change[~(fooled & right)] == 0).all()
    assert int((change != 0).sum(dim=1).max()) <= int(gamma * 196)
    assert (change * theta >= 0).all()
    assert in_unit_range(found)
    edge = 1.0 if theta > 0 else 0.0
    at_edge = (found == edge).flatten(1)
    steps = change[(change != 0) & ~at_edge] / theta
    assert torch.allclose(steps, steps.round(), atol=1e-4)  # whole steps, or up to the edge


def test_gamma_is_a_share_of_the_values() -> None:
    """A network that is never fooled: the attack spends all it may, and hands back the original."""
    changed: list[int] = []

    class Stubborn(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            changed.extend((images != 0).flatten(1).sum(dim=1).tolist())
            s = images.sum(dim=(1, 2, 3))
            return torch.stack([100 - s, s], dim=1)

    x, y = torch.zeros(1, 1, 10, 10), torch.tensor([0])
    for gamma, most in ((0.0, 0), (0.019, 0), (0.02, 2), (0.13, 12), (0.29, 28)):
        changed.clear()
        assert torch.equal(jsma(Stubborn(), x, y, target=1 - y, gamma=gamma), x)
        assert max(changed) == most
    changed.clear()
    jsma(Stubborn(), x, y, target=1 - y, gamma=0.29, variant="single")
    assert max(changed) == 29


def test_saturated_values_are_left_alone() -> None:
    net, (x, y, target) = small_net(), digits(40, small=True)
    x = torch.where(x > 0.3, 0.995, x)
    moved = {
        limit: bool((jsma(net, x, y, target=target, saturated=limit) != x)[x == 0.995].any())
        for limit in (0.99, 1.0)
    }
    assert moved == {0.99: False, 1.0: True}


# --- batches --------------------------------------------------------------------------------------


def test_an_images_result_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y, target) = Rows(), row_batch(20)
    whole = jsma(net, x, y, target=target, gamma=0.6)
    assert 3 < int((whole != x).flatten(1).any(dim=1).sum()) < 20
    for i in range(20):
        rows = slice(i, i + 1)
        alone = jsma(net, x[rows], y[rows], target=target[rows], gamma=0.6)
        assert torch.equal(alone, whole[rows])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    mixed = jsma(net, x[order], y[order], target=target[order], gamma=0.6)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(mixed, whole)
    monkeypatch.setattr("unfool.attacks._pool.CPU_CHUNK", 3)
    counted = Counted(net)
    assert torch.equal(jsma(counted, x, y, target=target, gamma=0.6), whole)
    assert counted.largest == 3


def test_without_memory_for_all_it_goes_on_with_fewer() -> None:
    x, y, target = row_batch(20)
    whole = jsma(Rows(), x, y, target=target, gamma=0.6)
    assert torch.equal(jsma(Narrow(Rows()), x, y, target=target, gamma=0.6), whole)


def test_the_bits_repeat_and_the_random_state_stays() -> None:
    net, (x, y, target) = small_net(), digits(8, small=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = jsma(net, x, y, target=target)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        again = jsma(net, x.clone().requires_grad_(True), y, target=target)
    assert torch.equal(again, first)
    assert not again.requires_grad


def test_passes() -> None:
    """Two products a step ("top2": one), and nothing for an image that is finished."""
    x, y, target = row_batch(20)
    for variant, width, products in (("pair", 2, 2), ("top2", 2, 1), ("single", 1, 2)):
        settings = {"gamma": 0.6, "variant": variant}
        alone = Counted(Rows())
        found = jsma(alone, x[1:2], y[1:2], target=target[1:2], **settings)
        steps = int((found != x[1:2]).sum()) // width
        assert steps > 0
        assert alone.forwards == 1 + steps + 1  # look at x, each step, the end
        assert alone.backwards == products * steps
        together = Counted(Rows())
        found = jsma(together, x, y, target=target, **settings)
        right = Rows()(x).argmax(dim=1) == y
        fooled = (found != x).flatten(1).any(dim=1)
        least = (found != x).flatten(1).sum(dim=1)[fooled].sum() // width + fooled.sum()
        most = 20 + int(least) + int((right & ~fooled).sum()) * (int(0.6 * 64) // width + 1)
        assert 20 + int(least) <= together.forwards <= most
        assert together.backwards <= products * (together.forwards - 20)


def test_an_empty_batch_and_one_that_is_misread_anyway() -> None:
    net, (x, y, target) = Rows(), row_batch(20)
    assert jsma(net, x[:0], y[:0], target=target[:0]).shape == (0, 1, 8, 8)
    got = jsma(net, x[::5], y[::5], target=target[::5])
    assert torch.equal(got, x[::5])
    assert got.data_ptr() != x.data_ptr()


def test_progress_tells_images_done_and_fooled() -> None:
    x, y, target = row_batch(20)
    told: list[tuple[int, int, str]] = []
    found = jsma(Rows(), x, y, target=target, gamma=0.6, progress=lambda *step: told.append(step))
    done = [step[0] for step in told]
    assert done == sorted(done)
    fooled = int((found != x).flatten(1).any(dim=1).sum())
    assert told[0] == (4, 20, "jsma: 0 fooled")  # four were misread before
    assert told[-1] == (20, 20, f"jsma: {fooled} fooled")
    assert fooled > 0


# --- the caller's model and bad input -------------------------------------------------------------


def test_the_model_comes_back_after_an_error() -> None:
    comes_back_after_an_error(jsma, gamma=0.6)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"target": None}, ValueError, r"jsma needs target.*random_targets"),
        ({"theta": 0}, ValueError, r"theta .*at least 0\.001.*not 0: use 1 or -1"),
        ({"theta": -1e-9}, ValueError, r"theta .*at least 0\.001.*not -1e-09"),
        ({"theta": 1.5}, ValueError, r"theta .*from -1 to 1.*1\.5"),
        ({"theta": float("nan")}, ValueError, r"theta .*nan"),
        ({"gamma": -0.1}, ValueError, r"gamma .*from 0 to 1.*-0\.1"),
        ({"gamma": 14.5}, ValueError, r"gamma .*from 0 to 1.*14\.5"),
        ({"gamma": "all"}, TypeError, r"gamma must be a number, not 'all'"),
        ({"variant": "pairs"}, ValueError, r"one of pair, top2, single, not 'pairs'"),
        ({"saturated": 2}, ValueError, r"saturated .*from 0 to 1.*2"),
        ({"x": row_batch(20)[0] * 255}, ValueError, r"divide by 255"),
        ({"y": row_batch(20)[1][:3]}, ValueError, r"y must have shape \(20,\)"),
        ({"target": row_batch(20)[1]}, ValueError, r"equals y for 20"),
        ({"target": row_batch(20)[2] + 4}, ValueError, r"target spans.*4 classes"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    x, y, target = row_batch(20)
    with pytest.raises(kind) as caught:
        jsma(**({"model": Rows(), "x": x, "y": y, "target": target} | change))
    assert re.search(message, str(caught.value)), str(caught.value)
