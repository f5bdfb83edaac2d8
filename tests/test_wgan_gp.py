"""WGAN-GP: shapes, the penalty's exact values, who learns in a step, training on toy images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from unfool.artifacts import Store, load_tensors
from unfool.datasets import Split
from unfool.defenses import wgan_gp
from unfool.defenses.wgan_gp import (
    Critic,
    Generator,
    Settings,
    critic_loss,
    gradient_penalty,
    train,
    train_step,
)
from unfool.lab import Lab

SMALL = Settings(latent=8, width=2, epochs=2, batch_size=4)


def bands(n: int = 24, side: int = 16) -> Tensor:
    """Black images with one white column, at a place of their own."""
    images = torch.zeros(n, 1, side, side)
    for i in range(n):
        images[i, :, :, 2 + i % (side - 4)] = 1
    return images


def state(net: nn.Module) -> list[Tensor]:
    return [v.clone() for v in net.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 16, 24)])
def test_the_generator_makes_images_and_the_critic_scores_them(shape: tuple[int, int, int]) -> None:
    net = Generator(shape, latent=8, width=2)
    with torch.no_grad():
        made = net(100 * net.noise(5, torch.Generator().manual_seed(0)))
        assert made.shape == (5, *shape)
        assert 0 <= float(made.min()) < 0.5 < float(made.max()) <= 1
        assert not torch.equal(made[0], made[1])
        assert Critic(shape, 2)(made).shape == (5, 1)


def test_widths_are_defense_gans() -> None:
    net, critic = Generator((1, 28, 28)), Critic((1, 28, 28))
    assert net.start.weight.shape == (4 * 4 * 4 * 64, 128)
    layers = [*net.grow, net.last]
    assert [m.out_channels for m in layers if isinstance(m, nn.ConvTranspose2d)] == [128, 64, 1]
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256]
    assert not any("Norm" in type(m).__name__ for m in [*net.modules(), *critic.modules()])


@pytest.mark.parametrize("side", [30, 36, 0])
def test_sides_that_cannot_be_made_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 4 up to 32, not {side}x{side}: pad or"):
        Generator((1, side, side))


def test_noise_comes_from_the_generator_that_is_given() -> None:
    net = Generator((1, 16, 16), latent=3, width=2)
    a, b, c = (net.noise(4, torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert a.shape == (4, 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- losses ---------------------------------------------------------------------------------------


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (x.flatten(1) @ weight)[:, None]


def one_axis(critic: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """The fault of a well-known code: the norm over the first axis of a sample alone."""
    x = (0.5 * real + 0.5 * made).requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(x).sum(), x)
    return ((slope.norm(dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
def test_the_penalty_of_a_known_slope(shape: tuple[int, ...], length: float) -> None:
    real, made = torch.rand(6, *shape), torch.rand(6, *shape)
    weight = torch.randn(real[0].numel(), generator=torch.Generator().manual_seed(1))
    critic: nn.Module = linear(length * weight / weight.norm())  # type: ignore[assignment]
    assert float(gradient_penalty(critic, real, made)) == pytest.approx((length - 1) ** 2, abs=1e-5)
    if len(shape) > 1:  # the control: over one axis only it is another number
        assert abs(float(one_axis(critic, real, made)) - (length - 1) ** 2) > 0.05


def test_the_penalty_is_each_samples_own() -> None:
    """Slopes 0 and 2: the mean of squares is 1, although the mean slope is 1."""
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    critic: nn.Module = lambda p: 2 * p[:, :1].relu()  # type: ignore[assignment]  # noqa: E731
    assert float(gradient_penalty(critic, x, x).detach()) == pytest.approx(1.0)


def test_the_penalty_looks_between_real_and_made() -> None:
    seen: list[Tensor] = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.sum(1, keepdim=True)

    gradient_penalty(critic, torch.zeros(500, 2), torch.ones(500, 2))  # type: ignore[arg-type]
    (points,) = seen
    assert torch.equal(points[:, 0], points[:, 1])  # one t for all numbers of a sample
    assert 0 <= float(points.min()) < 0.05
    assert 0.95 < float(points.max()) <= 1
    assert float(points.mean()) == pytest.approx(0.5, abs=0.06)


def test_the_penalty_teaches_the_critic() -> None:
    critic = Critic((1, 16, 16), 2)
    gradient_penalty(critic, bands(4), torch.rand(4, 1, 16, 16)).backward()
    weight = critic.net[0].weight
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0


def test_the_critics_terms() -> None:
    critic, real = Critic((1, 16, 16), 2), bands(4)
    made = torch.rand(4, 1, 16, 16).requires_grad_(True)
    terms = critic_loss(critic, real, made, penalty=0.0)
    gap = critic(made).mean() - critic(real).mean()
    assert torch.equal(terms["gap"], gap)
    assert float(terms["penalty"].detach()) == 0
    terms["gap"].backward()
    assert made.grad is None  # this step must not move the generator
    gap.backward()
    assert made.grad is not None  # the control


# --- a step ---------------------------------------------------------------------------------------


def duel(g_rate: float = 1e-3, d_rate: float = 1e-3) -> tuple[Generator, Critic, dict]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        generator, critic = Generator((1, 16, 16), 8, 2), Critic((1, 16, 16), 2)
    optimizers: dict[str, Optimizer] = {
        "generator": Adam(generator.parameters(), g_rate),
        "critic": Adam(critic.parameters(), d_rate),
    }
    return generator, critic, optimizers


def test_a_step_updates_the_critic_more_often_than_the_generator() -> None:
    generator, critic, optimizers = duel()
    sizes: list[int] = []

    def noise(n: int) -> Tensor:
        sizes.append(n)
        return generator.noise(n)

    losses = train_step(generator, critic, optimizers, bands(20), noise)
    assert sizes == [4, 4, 4, 4, 4, 4]  # five for the critic, one for the generator
    counts = {k: int(next(iter(o.state.values()))["step"]) for k, o in optimizers.items()}
    assert counts == {"critic": 5, "generator": 1}
    assert losses.keys() == {"gap", "penalty", "generator"}
    assert not any(loss.requires_grad for loss in losses.values())
    assert all(p.requires_grad for p in critic.parameters())


@pytest.mark.parametrize("frozen", ["generator", "critic"])
def test_each_player_learns_by_its_own_optimizer(frozen: str) -> None:
    rates = {"g_rate": 0.0} if frozen == "generator" else {"d_rate": 0.0}
    generator, critic, optimizers = duel(**rates)
    nets = {"generator": generator, "critic": critic}
    before = {name: state(net) for name, net in nets.items()}
    train_step(generator, critic, optimizers, bands(20), generator.noise)
    assert [name for name, net in nets.items() if equal(state(net), before[name])] == [frozen]


def test_the_generators_step_leaves_the_critics_gradient_alone() -> None:
    generator, critic, optimizers = duel(g_rate=0.0)
    torch.manual_seed(0)
    train_step(generator, critic, optimizers, bands(4), generator.noise, critic_steps=1)
    found = [p.grad for p in critic.parameters()]
    generator, critic, _ = duel()
    torch.manual_seed(0)
    terms = critic_loss(critic, bands(4), generator(generator.noise(4)))
    (terms["gap"] + terms["penalty"]).backward()
    for grad, parameter in zip(found, critic.parameters(), strict=True):
        assert grad is not None
        assert parameter.grad is not None
        assert torch.allclose(grad, parameter.grad, atol=1e-7)


# --- training -------------------------------------------------------------------------------------


def test_it_learns_where_the_white_is() -> None:
    """Images whose left half is white: what is made comes to be whiter there."""
    images = torch.zeros(64, 1, 16, 16)
    images[..., :8] = torch.rand(64, 1, 1, 1, generator=torch.Generator().manual_seed(4)) / 2 + 0.5

    def whiter(net: Generator) -> float:
        with torch.no_grad():
            made = net(net.noise(50, torch.Generator().manual_seed(5)))
        return float(made[..., :8].mean() - made[..., 8:].mean())

    settings = replace(SMALL, width=4, critic_steps=2, rate=5e-3, batch_size=8, epochs=15)
    net, history = train(images, settings)
    assert len(history) == 15
    assert whiter(net) > 0.4
    assert abs(whiter(train(images, replace(settings, epochs=0))[0])) < 0.1  # the control
    assert not net.training


def test_seed_and_global_random_state() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one = state(train(bands(), SMALL, seed=1)[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert equal(state(train(bands(), SMALL, seed=1)[0]), one)
    assert not equal(state(train(bands(), SMALL, seed=2)[0]), one)


class Killed(Exception):
    pass


def test_a_killed_training_ends_bit_equal(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"

    def kill(done: int, net: Generator) -> None:
        if done == 2:
            raise Killed

    settings = replace(SMALL, epochs=3)
    with pytest.raises(Killed):
        train(bands(), settings, checkpoint=path, after_epoch=kill)
    heads = {"/".join(key.split("/")[:2]) for key in load_tensors(path)[0]}
    parts = {"module", "optimizer"}
    assert heads == {f"{part}/{net}" for part in parts for net in ("generator", "critic")}
    whole, history = train(bands(), settings)
    resumed, same = train(bands(), settings, checkpoint=path)
    assert equal(state(whole), state(resumed))
    assert history == same
    path.unlink()  # the control: another training than the checkpoint's
    assert not equal(state(whole), state(train(bands(), settings, seed=1, checkpoint=path)[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 0}, "latent must be >= 1, not 0"),
        ({"critic_steps": 0}, "critic_steps must be >= 1, not 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, not 0"),
        ({"penalty": -1.0}, "penalty must be >= 0, not -1.0: it keeps slopes near 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(bands(), Settings(**{**vars(SMALL), **change}))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (bands()[:0], "N > 0, not (0, 1, 16, 16)"),
        (bands()[0], "images must be (N, C, H, W) with N > 0, not (1, 16, 16)"),
        (2 * bands() - 1, "must lie in [0, 1], not [-1, 1]: the generator ends in a sigmoid"),
        (bands() / 0, "must lie in [0, 1], not [nan, nan]"),
    ],
)
def test_images_that_cannot_be_learned_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(images, SMALL)


# --- through Lab ----------------------------------------------------------------------------------


def test_lab_trains_one_and_finds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOOL_PROGRESS", "off")
    lab = Lab("smoke", store=Store(tmp_path / "store"))
    net = lab.gan(epochs=1)
    assert (lab.profile.gan.width, len(lab.history(net))) == (4, 1)
    assert not net.training
    longer = lab.gan(epochs=2)  # another artifact

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this is in the store")

    monkeypatch.setattr(wgan_gp, "train", never)
    monkeypatch.setattr(Split, "images", property(never))  # nor is any image converted
    again = Lab("smoke", store=Store(tmp_path / "store")).gan(epochs=1)
    assert equal(state(again), state(net))
    assert not equal(state(longer), state(net))
    with pytest.raises(AssertionError, match="in the store"):
        Lab("smoke", seed=1, store=Store(tmp_path / "store")).gan(epochs=1)
