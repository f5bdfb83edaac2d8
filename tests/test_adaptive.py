"""What attackers of defences use: BPDA, EOT, Square and APGD, each against a known answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import victims
from attack_tools import batch, fooled, network, next_class
from test_defense_gan import Plane
from unfool.attacks import apgd, bpda, eot, pgd, square, with_refusal
from unfool.attacks.adaptive import misread_by_generator
from unfool.attacks.apgd import LOSSES, Objective, checkpoints, spread
from unfool.attacks.square import side_of
from unfool.defenses import Threshold
from unfool.evaluation import counted

SMALL = (1, 4, 4)


def linear(weight: Tensor, bias: float = 0.0) -> nn.Module:
    """Two classes; class 1 leads by weight @ x - bias."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 2))
    net[1].weight.data = torch.stack([torch.zeros_like(weight), weight])
    net[1].bias.data = torch.tensor([bias, 0.0])
    return net


def images(n: int) -> Tensor:
    """Far from black and white, where clipping would make corners alike."""
    return 0.2 + 0.6 * torch.rand(n, *SMALL, generator=torch.Generator().manual_seed(1))


def weights(n: int = 16) -> Tensor:
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(0))
    return drawn + drawn.sign()  # none near 0


def best_corner(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Where in the ball and in [0, 1] a linear model's class 1 leads most."""
    return (x + eps * weight.sign().view(1, *SMALL)).clamp(0, 1)


def out_of_reach(x: Tensor, weight: Tensor, eps: float, by: float) -> nn.Module:
    """A linear model that only images within `by` of the best corner's score could fool."""
    best = float((best_corner(x, weight, eps).flatten(1) @ weight).max())
    return linear(weight, best - by)


# --- BPDA -----------------------------------------------------------------------------------------


def gradient(function: Any, x: Tensor, weight: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad((weight * function(x)).sum(), x)
    return found


def test_bpda_is_the_module_forwards_and_the_stand_in_backwards() -> None:
    x, weight = images(3), weights(48).view(3, *SMALL)
    hard = Threshold(0.4)

    def soft(images: Tensor) -> Tensor:
        return torch.sigmoid(8 * (images - 0.4))

    assert not hard(x.clone().requires_grad_(True)).requires_grad  # the control
    for wrapped in (bpda(hard), bpda(hard, soft)):
        assert torch.equal(wrapped(x), hard(x))
    assert torch.equal(gradient(bpda(hard), x, weight), weight)
    slope = 8 * soft(x) * (1 - soft(x))
    assert torch.allclose(gradient(bpda(hard, soft), x, weight), weight * slope, atol=1e-6)
    assert not torch.allclose(weight * slope, weight, atol=0.1)


def test_bpda_refuses_a_stand_in_of_another_shape() -> None:
    x = images(2)
    with pytest.raises(ValueError, match=r"identity returns \(2, 1, 4, 4\) and Flatten \(2, 16\)"):
        bpda(nn.Flatten())(x)
    with pytest.raises(
        ValueError, match=r"backward returns \(2, 16\) and Threshold \(2, 1, 4, 4\)"
    ):
        bpda(Threshold(), nn.Flatten())(x)
    assert bpda(nn.Flatten(), lambda images: images.flatten(1))(x).shape == (2, 16)


def test_through_bpda_a_threshold_falls() -> None:
    net, (x, y) = network(), batch(24)
    whole = nn.Sequential(bpda(Threshold()), net).eval()
    y = whole(x).argmax(1)
    left = [
        float(fooled(whole, x, y, pgd(whole, x, y, eps=eps)).float().mean()) for eps in (0, 0.3)
    ]
    assert left[0] == 0
    assert left[1] > 0.8
    with pytest.raises(ValueError, match=r"Threshold \(0\) stops it"):
        pgd(nn.Sequential(Threshold(), net), x, y)


# --- EOT ------------------------------------------------------------------------------------------


class RandomAffine(nn.Module):
    """Logits (A + N) x + n with standard normal N and n, drawn once per call; also in eval mode."""

    def __init__(self, size: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.mean = torch.randn(classes, size, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(self.mean.shape)
        return x.flatten(1) @ (self.mean + noise).T + torch.randn(len(self.mean))


def slopes(model: nn.Module) -> Tensor:
    """The gradient of each logit, (classes, size)."""
    x = torch.zeros(1, *SMALL, requires_grad=True)
    logits = model(x)[0]
    rows = [torch.autograd.grad(z, x, retain_graph=True)[0].flatten() for z in logits]
    return torch.stack(rows)


def test_eots_gradient_is_the_gradient_of_the_expectation() -> None:
    """The error of 48 means of `samples` draws is a sum of squares of known expectation."""
    model = RandomAffine()
    for samples in (4, 64, 1024):
        error = (slopes(eot(model, samples, seed=0)) - model.mean).square().sum() * samples / 48
        assert 0.4 < float(error) < 1.8  # 1 expected, 0.2 its deviation
    few = (slopes(eot(model, 4, seed=0)) - model.mean).abs().max()
    assert float(few) > 0.3  # the control: it is the samples that bring it near


def test_eot_draws_anew_and_a_seed_makes_it_repeat() -> None:
    model, x = RandomAffine(), images(2)
    before = torch.get_rng_state()
    seeded = eot(model, 3, seed=7)
    first, second = seeded(x), seeded(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    again = eot(model, 3, seed=7)
    assert torch.equal(again(x), first)
    assert torch.equal(again(x), second)
    assert not torch.equal(eot(model, 3, seed=8)(x), first)
    with torch.random.fork_rng(devices=[]):
        free = eot(model, 3)
        assert not torch.equal(free(x), free(x))
        assert not torch.equal(torch.get_rng_state(), before)


def test_eot_is_the_mean_of_so_many_draws() -> None:
    model, x = RandomAffine(), images(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        by_hand = torch.stack([model(x) for _ in range(5)]).mean(dim=0)
        torch.manual_seed(3)
        assert torch.allclose(eot(model, 5)(x), by_hand, atol=1e-5)
        torch.manual_seed(3)
        assert not torch.allclose(eot(model, 4)(x), by_hand, atol=1e-2)


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_eot_needs_a_draw(samples: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="samples must be"):
        eot(RandomAffine(), samples)


# --- Square ---------------------------------------------------------------------------------------


class TwoPixels(nn.Module):
    """Class 1 where the first pixel is over 0.5, else class 0; class 2 never."""

    def forward(self, x: Tensor) -> Tensor:
        lead = 10 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-lead, lead, torch.full_like(lead, -20.0)], dim=1)


def suspicion(x: Tensor) -> Tensor:
    """Refuse where the first pixel is brighter than the second by 0.1."""
    return (x[:, 0, 0, 0] - x[:, 0, 0, 1] - 0.1) / 0.1


def test_with_refusal_finds_what_passes_the_detector() -> None:
    x = torch.full((4, 1, 1, 2), 0.4)
    y = torch.zeros(4, dtype=torch.int64)
    joint, aim = with_refusal(TwoPixels(), suspicion), torch.ones_like(y)
    x_adv = apgd(joint, x, y, eps=0.15, steps=20, losses=["margin"], target=aim)
    assert (TwoPixels()(x_adv).argmax(dim=1) == 1).all()
    assert (suspicion(x_adv) < 0).all()
    assert (joint(x_adv).argmax(dim=1) == 1).all()
    # The controls: who does not know the detector is caught; where it can't be passed, nobody is.
    caught = x + torch.tensor([0.15, -0.15])
    assert (TwoPixels()(caught).argmax(dim=1) == 1).all()
    assert (suspicion(caught) > 0).all()
    assert (joint(caught).argmax(dim=1) == 3).all()
    never = with_refusal(TwoPixels(), lambda x: x[:, 0, 0, 0] - 0.45)
    x_adv = apgd(never, x, y, eps=0.15, steps=20, losses=["margin"], target=aim)
    assert not (never(x_adv).argmax(dim=1) == 1).any()


def test_with_refusal_needs_one_number_per_image() -> None:
    with pytest.raises(ValueError, match=r"returns \(4, 2\) for 4 images"):
        with_refusal(TwoPixels(), lambda x: x[:, 0, 0])(torch.rand(4, 1, 1, 2))


# --- z-space --------------------------------------------------------------------------------------


def test_the_nearest_misread_image_of_a_plane_is_found() -> None:
    """On a plane of images and before a linear reader it is known where the border lies."""
    plane, weight = Plane(latent=3, side=4), weights()
    x = images(5)
    inside = plane.nearest(x).flatten(1)
    bias = float((inside @ weight).max()) + 0.3
    along = (weight @ plane.q).detach().norm()
    offside = (x.flatten(1) - inside).square().sum(dim=1)
    known = (offside + ((bias - inside @ weight) / along) ** 2) / 16
    y = torch.zeros(5, dtype=torch.int64)
    how: Any = {"starts": 2, "steps": 400, "rate": 0.01, "weight": 0.1, "lead_by": 0.02}
    made = misread_by_generator(plane, linear(weight, bias), x, y, **how)
    assert made.shape == (2, 5, 1, 4, 4)
    apart = (made - x).square().flatten(2).mean(dim=2)
    assert bool((apart > known - 1e-5).all())
    assert bool((apart < 1.1 * known + 1e-4).all())
    for images_of_one_start in made:
        assert torch.allclose(plane.nearest(images_of_one_start), images_of_one_start, atol=1e-5)
        assert bool((linear(weight, bias)(images_of_one_start).argmax(dim=1) == 1).all())
    # The control: where no image of the plane is misread, the images come back.
    never = misread_by_generator(plane, linear(0 * weight, 1.0), x, y, **how | {"steps": 20})
    assert torch.equal(never, x.expand(2, *x.shape))


def test_a_search_in_z_leaves_what_it_uses_as_it_was() -> None:
    plane, net, x = Plane(latent=3, side=4), linear(weights()), images(2)
    net.train()
    before = torch.get_rng_state()
    y = torch.zeros(2, dtype=torch.int64)
    first = misread_by_generator(plane, net, x, y, steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert plane.q.requires_grad
    assert plane.q.grad is None
    assert torch.equal(misread_by_generator(plane, net, x, y, steps=5), first)
    for wrong in ({"starts": 0}, {"steps": 0}, {"rate": 0.0}, {"weight": 0.0}, {"lead_by": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            misread_by_generator(plane, net, x, y, **wrong)
    with pytest.raises(ValueError, match="divide by 255"):
        misread_by_generator(plane, net, 255 * x, y)


class NoGradients(nn.Module):
    """Raises when somebody asks for a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x.requires_grad
        logits: Tensor = self.inner(x)
        return logits


def test_square_never_asks_for_a_gradient() -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(20, small=True)
    got = square(NoGradients(net), x, y, eps=0.2, queries=40)
    assert int(fooled(net, x, y, got).sum()) > 10
    with pytest.raises(AssertionError):
        pgd(NoGradients(net), x, y)


def test_square_reaches_the_best_corner_of_a_linear_model() -> None:
    x, weight, eps = images(1), weights(), 0.1
    y = torch.zeros(1, dtype=torch.int64)
    best = best_corner(x, weight, eps)
    never = out_of_reach(x, weight, eps, by=-1.0)
    assert torch.equal(square(never, x, y, eps=eps, queries=1500), best)
    assert not torch.equal(square(never, x, y, eps=eps, queries=5), best)
    # And the score of the last pixel decides: who gets all but the smallest weight does not fool.
    smallest = 2 * eps * float(weight.abs().min())
    hard = out_of_reach(x, weight, eps, by=smallest / 2)
    assert bool(fooled(hard, x, y, square(hard, x, y, eps=eps, queries=1500)))
    beyond = out_of_reach(x, weight, eps, by=-0.01)
    assert not bool(fooled(beyond, x, y, square(beyond, x, y, eps=eps, queries=1500)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("attack", [square, apgd])
def test_results_lie_in_the_ball_and_in_the_unit_range(attack: Any, channels: int) -> None:
    net, (x, y) = network(channels), batch(30, channels)
    x[:5] = x[:5].round()
    more = {"queries": 60} if attack is square else {"steps": 8, "targets": 2}
    for eps in (0.0, 0.05, 1.0):
        got = attack(net, x, y, eps=eps, **more)
        assert 0 <= float(got.min()) <= float(got.max()) <= 1
        assert float((got - x).abs().max()) <= eps + 1e-6
        assert (float((got - x).abs().max()) > eps - 1e-3) or eps == 1  # it is used


def test_squares_shrink_on_the_authors_schedule() -> None:
    """p is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 of 10,000 queries."""
    shares = {1: 1, 10: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 4001: 128, 8001: 512}
    for query, divisor in shares.items():
        side = max(1, round((0.8 / divisor * 1024) ** 0.5))
        assert side_of(query, 10_000, 0.8, (32, 32)) == side
        assert side_of(query * 2, 20_000, 0.8, (32, 32)) == side
    assert side_of(1, 10_000, 1.0, (4, 9)) == 4  # never larger than the image


def test_square_spends_no_more_than_its_queries_and_stops_where_it_won() -> None:
    x, y = images(20), torch.zeros(20, dtype=torch.int64)
    never = out_of_reach(x, weights(), 0.1, by=-1.0)
    with counted(never) as passes:
        square(never, x, y, eps=0.1, queries=30)
    assert (passes.forward, passes.backward) == (31 * 20, 0)
    net, (x, y, _) = victims.small_net(), victims.digits(20, small=True)
    with counted(net) as passes:
        got = square(net, x, y, eps=0.2, queries=30)
    assert int(fooled(net, x, y, got).sum()) > 10
    assert passes.forward < 31 * 20 - 10 * 10


# --- APGD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_apgd_finds_the_best_corner_of_a_linear_model(loss: str) -> None:
    x, weight, eps = images(3), weights(), 0.1
    y = torch.zeros(3, dtype=torch.int64)
    never = out_of_reach(x, weight, eps, by=-1.0)
    got = apgd(never, x, y, eps=eps, steps=20, losses=[loss])
    assert torch.allclose(got, best_corner(x, weight, eps), atol=1e-6)
    back = apgd(never, x, y, eps=eps, steps=20, losses=[loss], target=torch.ones_like(y))
    assert torch.allclose(back, got, atol=1e-6)
    assert not torch.allclose(apgd(never, x, y, eps=eps / 2, steps=20), got, atol=1e-3)


def test_apgd_judges_its_step_when_the_paper_says() -> None:
    assert checkpoints(100) == {22, 41, 57, 70, 80, 87, 93, 99}
    assert checkpoints(10) == {3, 5, 6, 7, 8, 9, 10}
    assert checkpoints(1) == {1}


def test_apgds_losses_by_hand() -> None:
    z = torch.tensor([[5.0, 3.0, 1.0, 0.0, -2.0]])
    y, aim = torch.tensor([0]), torch.tensor([2])

    def value(name: str, aimed: bool = False, logits: Tensor = z) -> float:
        return float(Objective(nn.Identity(), name, aimed).value(logits, y, aim))

    assert value("margin") == -2
    assert value("margin", aimed=True) == -4
    assert value("dlr") == pytest.approx(-2 / (5 - 1))
    assert value("dlr-t") == pytest.approx(-4 / (5 - 0.5))
    assert value("ce") == pytest.approx(float(torch.logsumexp(z, 1)) - 5, abs=1e-5)
    assert value("ce", aimed=True) == pytest.approx(1 - float(torch.logsumexp(z, 1)))
    for name in ("dlr", "dlr-t"):  # neither scale nor shift matters to them
        assert value(name, logits=100 * z + 7) == pytest.approx(value(name))
    assert value("ce", logits=100 * z) != pytest.approx(value("ce"), abs=1e-3)
    assert spread(z[:, :2], 1).tolist() == [1]
    assert spread(z[:, :3], 2).tolist() == [4]


class Loud(nn.Module):
    """Logits a thousand times too large: the softmax saturates and its gradient is 0."""

    def forward(self, logits: Tensor) -> Tensor:
        return 1000 * logits


def test_a_scale_of_the_logits_does_not_mask_the_ratio() -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(24, small=True)
    loud = nn.Sequential(net, Loud())
    right = net(x).argmax(1) == y
    plain = apgd(net, x, y, eps=0.2, steps=15, targets=3)
    assert int(fooled(net, x, y, plain).sum()) == int(right.sum())
    masked = apgd(loud, x, y, eps=0.2, steps=15, losses=["ce"])
    seen = apgd(loud, x, y, eps=0.2, steps=15, losses=["dlr-t"], targets=3)
    assert int(fooled(net, x, y, masked).sum()) < int(right.sum()) / 2
    assert int(fooled(net, x, y, seen).sum()) == int(right.sum())


def test_apgd_costs_a_pass_each_way_per_step_and_run() -> None:
    x, y = images(20), torch.zeros(20, dtype=torch.int64)
    never = out_of_reach(x, weights(), 0.1, by=-1.0)
    for settings, made in (
        ({"losses": ["ce"]}, 1), ({}, 2), ({"restarts": 3}, 6), ({"losses": ["ce", "dlr"]}, 2),
    ):  # fmt: skip
        with counted(never) as passes:
            apgd(never, x, y, eps=0.1, steps=7, **settings)
        assert (passes.forward, passes.backward) == (20 * (1 + 8 * made), 20 * 8 * made)
    net, (x, y) = network().eval(), batch(20)  # three classes: a run for each of the other two
    y = net(x).argmax(1)
    with counted(net) as passes:
        apgd(net, x, y, eps=0.0, steps=7)
    assert passes.backward == 20 * 8 * 3
    with counted(net) as passes:  # who is fooled leaves
        apgd(net, x, y, eps=0.5, steps=7)
    assert passes.backward < 20 * 8


@pytest.mark.parametrize("losses", ["ce", [], ["ce", "entropy"], [1]])
def test_apgd_refuses_losses_it_does_not_know(losses: Any) -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="losses must be"):
        apgd(network(), x, y, losses=losses)


@pytest.mark.parametrize("attack", [square, apgd])
def test_a_target_is_reached_and_what_is_wrong_already_stays(attack: Any) -> None:
    net, (x, y) = network().eval(), batch(30)
    more = {"queries": 300} if attack is square else {"steps": 20}
    aim = next_class(y)
    hit = net(attack(net, x, y, eps=0.6, target=aim, **more)).argmax(1) == aim
    assert float(hit.float().mean()) > 0.6
    free = net(attack(net, x, y, eps=0.6, **more)).argmax(1) == aim
    assert int(free.sum()) < int(hit.sum())
    wrong = net(x).argmax(1) != y
    assert wrong.any()
    got = attack(net, x, y, eps=0.3, **more)
    assert torch.equal(got[wrong], x[wrong])
    assert not torch.equal(got[~wrong], x[~wrong])


@pytest.mark.parametrize("attack", [square, apgd])
def test_an_image_draws_its_own_numbers(attack: Any) -> None:
    """So neighbours that leave the batch, or do not, change nothing."""
    net, (x, y, _) = victims.Rows().eval(), victims.row_batch(70)
    more = {"queries": 25} if attack is square else {"steps": 5, "losses": ["ce", "dlr"]}
    whole = attack(net, x, y, eps=0.02, **more)
    for n in (1, 33, 69):
        assert torch.equal(attack(net, x[:n], y[:n], eps=0.02, **more), whole[:n])
    other = attack(net, x, y, eps=0.02, generator=torch.Generator().manual_seed(1), **more)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("attack", [square, apgd])
def test_what_holds_out_is_nearer_to_an_error(attack: Any) -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(32, small=True)
    more = {"queries": 100} if attack is square else {"steps": 10, "losses": ["margin"]}
    got = attack(net, x, y, eps=0.03, **more)
    margins = [Objective(net, "margin", False).value(net(i), y, y).detach() for i in (x, got)]
    held = margins[1] < 0
    assert held.any()
    assert bool((margins[1] > margins[0])[held].all())


def test_apgd_beats_pgd_at_equal_passes() -> None:
    net, (x, y, _) = victims.small_net(), victims.digits(200, small=True)
    for eps in (0.04, 0.06):
        plain = pgd(net, x, y, eps=eps, steps=64)
        ours = apgd(net, x, y, eps=eps, steps=15, targets=3)
        assert int(fooled(net, x, y, ours).sum()) >= int(fooled(net, x, y, plain).sum())
        one = pgd(net, x, y, eps=eps, steps=1)
        assert int(fooled(net, x, y, one).sum()) < int(fooled(net, x, y, ours).sum())  # control


@pytest.mark.long
@pytest.mark.parametrize("eps", [0.05, 0.08, 0.1])
def test_apgd_beats_pgd_on_anet_at_equal_passes(eps: float) -> None:
    net, (x, y, _) = victims.anet(), victims.digits(200)
    ours = apgd(net, x, y, eps=eps, steps=30)
    theirs = pgd(net, x, y, eps=eps, steps=310)
    one = pgd(net, x, y, eps=eps, steps=2)
    counts = [int(fooled(net, x, y, images).sum()) for images in (one, theirs, ours)]
    assert counts[0] < counts[1] <= counts[2]
