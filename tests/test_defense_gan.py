"""Defense-GAN: what is nearest is known for simple generators; its cost; what it leaves alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unfool.artifacts import Store
from unfool.defenses import DefenseGAN, defense_gan
from unfool.defenses.defense_gan import SLOWER, Settings
from unfool.defenses.wgan_gp import Generator
from unfool.evaluation import counted
from unfool.lab import Lab


class Plane(nn.Module):
    """Images 0.5 + Qz, Q with orthonormal columns: the nearest one is a projection."""

    def __init__(self, latent: int = 3, side: int = 8) -> None:
        super().__init__()
        drawn = torch.randn(side * side, latent, generator=torch.Generator().manual_seed(1))
        self.q = nn.Parameter(torch.linalg.qr(drawn).Q)
        self.latent, self.side = latent, side

    def forward(self, z: Tensor) -> Tensor:
        return (0.5 + z @ self.q.T).view(-1, 1, self.side, self.side)

    def nearest(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) - 0.5
        return (0.5 + flat @ self.q @ self.q.T).view(x.shape).detach()


class Pixel(nn.Module):
    """One pixel, one number: 3z, or with `dead` nothing at all for z < 0, where no slope is."""

    latent = 1

    def __init__(self, dead: bool = False) -> None:
        super().__init__()
        self.slope, self.dead = nn.Parameter(torch.tensor(3.0)), dead

    def forward(self, z: Tensor) -> Tensor:
        made = self.slope * z.view(-1, 1, 1, 1)
        return torch.relu(made) if self.dead else made


def images(n: int = 6, side: int = 8) -> Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(2))


def small() -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Generator((1, 28, 28), latent=8, width=4)


# --- what is nearest ------------------------------------------------------------------------------


def test_it_finds_the_projection_onto_a_plane() -> None:
    plane, x = Plane(), images()
    made, errors = DefenseGAN(plane, Settings(restarts=2)).reconstruct(x)
    assert torch.allclose(made, plane.nearest(x), atol=1e-5)
    assert torch.allclose(errors, (plane.nearest(x) - x).square().flatten(1).mean(1), atol=1e-6)
    too_few = DefenseGAN(plane, Settings(steps=2, restarts=2))(x)  # the control
    assert not torch.allclose(too_few, plane.nearest(x), atol=1e-2)


def test_a_step_is_that_of_the_authors() -> None:
    """Momentum on the slope, and a tenth of the rate in the last fifth of the steps."""
    x, rate, momentum = 0.7, 0.02, 0.7

    def by_hand(steps: int, slower: float) -> float:
        z, step = float(defense.starts[0, 0]), 0.0
        for index in range(steps):
            step = momentum * step + 2 * 3 * (3 * z - x)
            z -= rate * (slower if index >= 8 else 1.0) * step
        return 3 * z

    defense = DefenseGAN(Pixel(), Settings(10, 1, rate, momentum))
    made = float(defense(torch.full((1, 1, 1, 1), x)))
    assert made == pytest.approx(by_hand(10, SLOWER), abs=1e-5)
    assert made != pytest.approx(by_hand(10, 1.0), abs=1e-3)  # the controls
    assert made != pytest.approx(by_hand(9, SLOWER), abs=1e-5)


def test_starts_have_the_variance_of_the_authors() -> None:
    starts = DefenseGAN(Plane(latent=128 // 2), Settings(restarts=500)).starts
    assert starts.shape == (500, 64)
    assert float(starts.std()) == pytest.approx(1 / 8, rel=0.02)
    other = DefenseGAN(Plane(latent=64), Settings(restarts=500), seed=1).starts
    assert not torch.equal(starts, other)


def test_the_start_that_ends_nearest_is_kept() -> None:
    x = torch.full((3, 1, 1, 1), 0.6)
    settings = {"steps": 100, "rate": 0.02}
    one = DefenseGAN(Pixel(dead=True), Settings(restarts=1, **settings), seed=6)
    assert float(one.starts) < 0  # it stands where there is no slope
    assert one.errors(x).tolist() == pytest.approx([0.36] * 3)
    many = DefenseGAN(Pixel(dead=True), Settings(restarts=8, **settings), seed=6)
    assert float(many.starts.max()) > 0
    assert many.errors(x).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert many(x).flatten().tolist() == pytest.approx([0.6] * 3, abs=1e-3)


def test_an_image_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defense_gan, "CPU_ROWS", 17)  # 3 images at once
    x = images(5, 28)
    defense = DefenseGAN(small(), Settings(steps=30, restarts=5))
    together, errors = defense.reconstruct(x)
    for i in range(len(x)):
        assert torch.allclose(defense(x[i : i + 1]), together[i : i + 1], atol=1e-4)
    turned, back = defense.reconstruct(x.flip(0))
    assert torch.allclose(turned.flip(0), together, atol=1e-4)
    assert torch.allclose(back.flip(0), errors, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-3  # the control: they do differ
    assert float(together.min()) >= 0
    assert float(together.max()) <= 1


# --- what it costs and leaves alone ---------------------------------------------------------------


def test_no_pass_is_wasted() -> None:
    plane = Plane()
    defense = DefenseGAN(plane, Settings(steps=7, restarts=3))
    with counted(plane) as passes:
        defense(images(50))
    assert (passes.forward, passes.backward) == (50 * 3 * 8, 50 * 3 * 7)


def test_the_generator_and_the_grad_mode_are_the_callers() -> None:
    generator, x = small().train(), images(2, 28)
    before = torch.get_rng_state()
    defense = DefenseGAN(generator, Settings(steps=3, restarts=2))
    with torch.no_grad():
        quiet = defense(x)
        assert not torch.is_grad_enabled()
    leaf = x.clone().requires_grad_(True)
    made = defense(leaf)
    assert torch.is_grad_enabled()
    assert torch.equal(made, quiet)
    assert not made.requires_grad
    assert leaf.grad is None
    assert generator.training
    assert all(p.requires_grad and p.grad is None for p in generator.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert float((made - generator(defense.starts[:1]).detach()).abs().max()) > 0  # it did move


# --- what cannot be -------------------------------------------------------------------------------


def test_a_search_that_diverges_says_so_and_one_that_ends_is_chosen() -> None:
    wild = {"steps": 60, "rate": 1e30}
    with pytest.raises(FloatingPointError, match=r"from all 2 starts for 4 of 4 .*rate 1e\+30"):
        DefenseGAN(Plane(), Settings(restarts=2, **wild))(images(4))
    x = torch.full((1, 1, 1, 1), 0.6)
    kept = DefenseGAN(Pixel(dead=True), Settings(restarts=8, **wild), seed=6)
    assert float(kept.starts.max()) > 0  # this start diverges; those below 0 stay
    assert kept.errors(x).tolist() == pytest.approx([0.36])


class Bounded(Plane):
    """As generators are: whatever z is, the pixels stay in [0, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        return (4 * (super().forward(z) - 0.5)).sigmoid()


def test_a_search_that_leaves_bounded_images_behind_is_noticed() -> None:
    bounded, x = Bounded(), images(8)
    with pytest.raises(FloatingPointError, match=r"2 starts for 8 of 8 images: lower the rate"):
        DefenseGAN(bounded, Settings(restarts=2, steps=20, rate=1e30))(x)
    with warnings.catch_warnings():  # the control
        warnings.simplefilter("error")
        DefenseGAN(bounded, Settings(restarts=2, steps=20, rate=1.0))(x)


def test_a_search_that_diverges_for_a_few_images_warns_of_their_share() -> None:
    class Steep(nn.Module):
        latent = 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, z: Tensor) -> Tensor:
            return self.weight * z.view(-1, 1, 1, 1)

    defense = DefenseGAN(Steep(), Settings(restarts=1, steps=9, rate=2.0, momentum=0.0))
    stays = defense.starts.view(1, 1, 1, 1)  # nothing pulls it away
    x = torch.cat([stays, stays, stays, stays + 0.1])
    with pytest.warns(UserWarning, match=r"diverged from all 1 starts for 1 of 4 images.*rate 2"):
        defense(x)
    with warnings.catch_warnings():  # the control
        warnings.simplefilter("error")
        defense(x[:3])


@pytest.mark.parametrize("shape", [(2, 1, 7, 8), (2, 3, 8, 8), (1, 8, 8)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"makes images \(N, 1, 8, 8\), not "):
        DefenseGAN(Plane())(torch.rand(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, not 0"), ({"restarts": 0}, "restarts must be >= 1"),
        ({"rate": 0}, "rate must be above 0"), ({"rate": -1.0}, "rate must be >= 0, not -1"),
        ({"momentum": 1.5}, "momentum must be from 0 to 1"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


# --- in the lab -----------------------------------------------------------------------------------


def test_the_lab_searches_its_own_gan_and_records_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, gan = Lab("smoke", store=Store(tmp_path / "store")), small()
    monkeypatch.setattr(lab, "gan", lambda: gan)
    defense = lab.defense("defense_gan", steps=3)
    assert isinstance(defense, DefenseGAN)
    theirs = gan.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in defense.generator.state_dict().items())
    record = lab.evaluate(defense, lab.adversarial_set("fgsm"))
    assert record.defense == "defense_gan"
    assert record.defense_settings == {"steps": 3, "restarts": 2, "rate": 10.0, "momentum": 0.7}
    assert not record.saw_attack_in_training
