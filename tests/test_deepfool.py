"""DeepFool: exact on linear models, as far as foolbox's, the same with and without pruning."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from attack_tools import CLASSES, batch, digits, fooled, length, network, next_class
from unfool.attacks import deepfool
from unfool.evaluation import counted

room = import_module("unfool.attacks.deepfool")  # by its name the package knows the function


def linear(classes: int, seed: int = 0) -> nn.Module:
    """A random linear classifier of 6 x 6 images, undecided between all classes on mid-grey."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    net[1].bias.data = -0.5 * net[1].weight.data.sum(dim=1)
    return net


def greys(net: nn.Module, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images far from black and white, where nothing is clipped, and what the net says they are."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 + 0.2 * torch.rand(n, 1, 6, 6, generator=generator)
    return x, net(x).argmax(1).detach()


def some(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    net, x, y = digits()
    return net, x[:n], y[:n]


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_on_a_linear_model_it_steps_just_over_the_nearest_border(classes: int, exact: bool) -> None:
    net = linear(classes)
    x, y = greys(net, 40)
    with torch.no_grad():
        logits, weight = net(x), net[1].weight
    w = weight[None] - weight[y][:, None]
    distance = (logits.gather(1, y[:, None]) - logits) / w.norm(dim=2)
    distance = distance.scatter(1, y[:, None], torch.inf)  # its own class has no border
    nearest = distance.argmin(dim=1)
    rows = torch.arange(len(x))
    way = w[rows, nearest] / w[rows, nearest].norm(dim=1, keepdim=True)
    expected = x.flatten(1) + 1.02 * (distance[rows, nearest] + 1e-4)[:, None] * way
    got = deepfool(net, x, y, exact=exact)
    assert torch.allclose(got.flatten(1), expected, atol=1e-5)
    assert torch.equal(net(got).argmax(1), nearest)
    assert torch.equal(deepfool(net, x, y, exact=exact, steps=1), got)
    if classes == 10:  # the control: it is not simply the class with the next largest logit
        assert (nearest != logits.topk(2).indices[:, 1]).any()


def one_by_one(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Algorithm 2 as its authors wrote it down, an image and a class at a time, clipped."""
    done = []
    for image, label in zip(x.split(1), y.tolist(), strict=True):
        for _ in range(50):
            image = image.detach().requires_grad_(True)
            logits = net(image)[0]
            if logits.argmax() != label:
                break
            best, way = float("inf"), torch.zeros_like(image)
            for k in set(range(len(logits))) - {label}:
                difference = logits[k] - logits[label]
                (w,) = torch.autograd.grad(difference, image, retain_graph=True)
                distance = float(-difference.detach() / w.norm())
                if distance < best:
                    best, way = distance, (distance + 1e-4) * w / w.norm()
            image = (image + 1.02 * way).clamp(0, 1)
        done.append(image.detach())
    return torch.cat(done)


def test_its_images_are_those_of_the_algorithm_done_one_by_one() -> None:
    net, x, y = some(16)
    theirs = one_by_one(net, x, y)
    assert torch.allclose(deepfool(net, x, y, exact=True), theirs, atol=1e-5)
    assert torch.allclose(deepfool(net, x, y), theirs, atol=1e-5)
    assert not torch.allclose(deepfool(net, x, y, overshoot=0.03), theirs, atol=1e-3)


def test_it_goes_as_far_as_foolboxs_and_succeeds_as_often() -> None:
    import foolbox

    net, x, y = some(48)
    attack = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02)
    theirs, _, _ = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=None)
    net.zero_grad()

    def further(ours: Tensor) -> Tensor:
        """How much further than foolbox's image ours is, as a share, where both succeed."""
        both = fooled(net, x, y, ours) & fooled(net, x, y, theirs)
        return (length(ours - x)[both] / length(theirs - x)[both] - 1).abs()

    ours = deepfool(net, x, y)
    assert fooled(net, x, y, ours).sum() >= fooled(net, x, y, theirs).sum()
    assert float(length(ours - x).median()) <= 1.005 * float(length(theirs - x).median())
    assert float(further(ours).quantile(0.9)) < 0.05
    assert float(further(deepfool(net, x, y, classes=2)).quantile(0.9)) > 0.05  # the control


# --- the pruned visit of the classes --------------------------------------------------------------


def test_pruning_leaves_the_images_alone_and_saves_most_backwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x, y = digits()
    with counted(net) as usual:
        pruned = deepfool(net, x, y)
    with counted(net) as all_classes:
        exact = deepfool(net, x, y, exact=True)
    right = int((net(x).argmax(1) == y).sum())
    assert int(fooled(net, x, y, pruned).sum()) == right
    assert int(fooled(net, x, y, exact).sum()) == right

    def differ(a: Tensor, b: Tensor) -> int:
        return int(((a - b).flatten(1).abs().amax(1) > 1e-4).sum())

    assert differ(pruned, exact) <= 0.01 * len(x)
    assert usual.backward <= 17 * len(x)
    assert all_classes.backward > 3 * usual.backward
    assert usual.forward <= 20 * len(x)
    monkeypatch.setattr(room, "SLACK", 1.0)  # the control: stopping too early is seen
    assert differ(deepfool(net, x[:64], y[:64]), exact[:64]) > 0.1 * 64


def test_an_image_is_backwarded_only_for_borders_that_could_be_nearer() -> None:
    """Three borders at distances 1, 1.2 and 3 times the first, all gradients equally long."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    net[1].weight.data = torch.eye(4)  # w_j = e_j - e_0, length sqrt(2)
    net[1].bias.data = torch.tensor([0.0, -0.1, -0.12, -0.3])
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    with counted(net) as passes:
        got = deepfool(net, x, y)
    assert net(got).argmax(1).item() == 1
    # One step; the third border is further than SLACK = 2 times the first.
    assert passes.backward == 2
    # Whether it is right, at x for each border, and at the new point.
    assert passes.forward == 4
    with counted(net) as passes:
        deepfool(net, x, y, exact=True)
    assert passes.backward == 3


def test_the_number_of_classes_limits_the_rivals_to_the_likeliest() -> None:
    net = linear(30)
    steep = net[1].weight.data[7].mul_(30)  # an unlikely class whose border is near all the same
    net[1].bias.data[7] = -0.3 - 0.5 * steep.sum()
    x, y = greys(net, 40)
    likeliest = net(x).topk(10).indices
    ten, all_of_them = deepfool(net, x, y, exact=True), deepfool(net, x, y, exact=True, classes=30)
    hit, anywhere = net(ten).argmax(1), net(all_of_them).argmax(1)
    assert (likeliest == hit[:, None]).any(dim=1).all()
    assert not (likeliest == anywhere[:, None]).any(dim=1).all()
    assert float(length(all_of_them - x).mean()) < float(length(ten - x).mean())
    assert torch.equal(all_of_them, deepfool(net, x, y, exact=True, classes=99))
    way = (deepfool(net, x, y, classes=2) - x).flatten(1)  # to the second likeliest, near or not
    w = net[1].weight.detach()[likeliest[:, 1]] - net[1].weight.detach()[y]
    assert torch.allclose(cosine_similarity(way, w), torch.ones(40), atol=1e-5)


# --- minimal-norm semantics -----------------------------------------------------------------------


def test_misread_images_and_failures_come_back_as_they_were() -> None:
    net, x, y = some(64)
    y = y.clone()
    y[::2] = (y[::2] + 1) % 10  # as if half of them were misread
    wrong = net(x).argmax(1) != y
    assert 30 < int(wrong.sum()) < 40
    with counted(net) as passes:
        got = deepfool(net, x, y, steps=2)
    done = fooled(net, x, y, got)
    assert torch.equal(got[~done], x[~done])
    assert 0 < int(done.sum()) < int((~wrong).sum())  # two steps are too few for some
    assert (got[done] != x[done]).flatten(1).any(dim=1).all()
    with counted(net) as passes:
        assert torch.equal(deepfool(net, x[wrong], y[wrong]), x[wrong])
    assert (passes.forward, passes.backward) == (int(wrong.sum()), 0)


@pytest.mark.parametrize("size", [0.0, 1e-20])
def test_a_vanishing_gradient_makes_no_nan(size: float) -> None:
    net = linear(3)
    net[1].weight.data = size * net[1].weight.data.sign()
    net[1].weight.data[:, :9] = 0
    net[1].bias.data = torch.tensor([0.0, 200.0, 100.0])
    x, y = greys(net, 5)
    assert torch.equal(deepfool(net, x, y, steps=3), x)  # a failure, so the original


def test_more_steps_never_succeed_less_up_to_all() -> None:
    net, x, y = some(48)
    count = [int(fooled(net, x, y, deepfool(net, x, y, steps=k)).sum()) for k in (1, 2, 4, 8, 16)]
    assert count == sorted(count)
    assert count[0] < count[-1] == int((net(x).argmax(1) == y).sum())


def test_finished_images_cost_nothing_more() -> None:
    """Linear, so one step does; every image that is backwarded again would show."""
    net = linear(3)
    x, y = greys(net, 20)
    with counted(net) as passes:
        deepfool(net, x, y, exact=True)
    assert (passes.forward, passes.backward) == (20 + 3 * 20, 2 * 20)
    y[:5] = (y[:5] + 1) % 3  # five are misread: the other 15 go on without them
    with counted(net) as passes:
        deepfool(net, x, y, exact=True)
    assert (passes.forward, passes.backward) == (20 + 3 * 15, 2 * 15)


# --- the way back ---------------------------------------------------------------------------------


def test_bisection_comes_nearer_and_still_fools() -> None:
    net, x, y = some(48)
    with counted(net) as before:
        plain = deepfool(net, x, y, overshoot=1.0)  # so far that there is a way back
    with counted(net) as after:
        nearer = deepfool(net, x, y, overshoot=1.0, bisect=8)
    hit = fooled(net, x, y, plain)
    assert torch.equal(fooled(net, x, y, nearer), hit)
    assert torch.equal(nearer[~hit], x[~hit])
    assert (length(nearer - x) <= length(plain - x) + 1e-6).all()
    assert float(length(nearer - x).median()) < 0.8 * float(length(plain - x).median())
    assert after.forward - before.forward == 8 * int(hit.sum())
    assert after.backward == before.backward
    back = x[hit] + 0.99 * (nearer - x)[hit]  # 1 % nearer still, and they are what they were
    assert float((net(back).argmax(1) == y[hit]).float().mean()) > 0.9


def test_bisection_by_hand() -> None:
    """The border lies at 0.3 of the way; 3 halvings find 3/8, the first eighth beyond it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    net[1].weight.data = torch.tensor([[0.0], [1.0]])
    net[1].bias.data = torch.tensor([0.0, -0.3])
    x, x_adv = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    y = torch.tensor([0, 0])
    for times, expected in ((0, 1.0), (1, 0.5), (3, 0.375)):
        got = room.halve_the_way(net, x, x_adv, y, times)
        assert got.flatten().tolist() == [expected, 0.0]


# --- the batch ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.sampled_from([1, 3]), size=st.integers(1, 9),
    seed=st.integers(0, 99), black_and_white=st.booleans(), steps=st.integers(1, 6),
    exact=st.booleans(), bisect=st.integers(0, 3), overshoot=st.floats(0, 10),
)  # fmt: skip
def test_results_are_other_classes_in_the_unit_range_or_the_originals(
    n: int, channels: int, size: int, seed: int, black_and_white: bool, steps: int, exact: bool,
    bisect: int, overshoot: float,
) -> None:  # fmt: skip
    net, (x, y) = network(channels, size, seed).eval(), batch(n, channels, size, seed)
    x = x.round() if black_and_white else x
    before = x.clone()
    got = deepfool(net, x, y, steps=steps, exact=exact, bisect=bisect, overshoot=overshoot)
    assert (got.shape, got.dtype, got.requires_grad) == (x.shape, x.dtype, False)
    assert 0 <= float(got.min()) <= float(got.max()) <= 1
    moved = (got != x).flatten(1).any(dim=1)
    logits = net(got)
    gap = logits.max(dim=1).values - logits.gather(1, y[:, None])[:, 0]
    assert (gap[moved] > -1e-6).all()
    assert (moved <= (net(x).argmax(1) == y)).all()
    assert torch.equal(x, before)
    assert got.data_ptr() != x.data_ptr()


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    net, x, y = some(96)
    whole = deepfool(net, x, y)
    for i in (0, 63, 64, 95):  # on both sides of a chunk's edge
        one = deepfool(net, x[i : i + 1], y[i : i + 1])
        assert torch.allclose(one, whole[i : i + 1], atol=1e-4)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(deepfool(net, x[order], y[order]), whole[order], atol=1e-4)
    assert not torch.allclose(whole[order], whole, atol=1e-4)


def test_bits_repeat_and_the_random_state_stays() -> None:
    net, (x, y) = network(), batch(40)
    before = torch.get_rng_state()
    first = deepfool(net, x, y)
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.rand(9)
    other = torch.Generator().manual_seed(4)
    assert torch.equal(deepfool(net, x, y, generator=other), first)
    with torch.no_grad():
        assert torch.equal(deepfool(net, x.clone().requires_grad_(True), y), first)


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be >= 1, not 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, not 1\.5"),
        ({"overshoot": -0.1}, ValueError, r"overshoot must be >= 0, not -0\.1"),
        ({"overshoot": float("nan")}, ValueError, "overshoot must be >= 0, not nan"),
        ({"classes": 1}, ValueError, "classes must be >= 2, not 1"),
        ({"bisect": -1}, ValueError, "bisect must be >= 0, not -1"),
        ({"bisect": 0.5}, TypeError, r"bisect must be a whole number, not 0\.5"),
        ({"target": next_class(batch()[1])}, ValueError,
         "deepfool takes no target, because it goes to the nearest class: leave target out, or"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_value_and_remedy(
    settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    x, y = batch()
    assert y.max() < CLASSES
    with pytest.raises(kind, match=message):
        deepfool(network(), x, y, **settings)
