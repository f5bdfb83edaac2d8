"""The denoiser: its noise, its training, and that no attack takes part in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unfool.artifacts import Store
from unfool.attacks import ATTACKS
from unfool.defenses import UNet, denoiser
from unfool.defenses.denoiser import Settings, noisy, train
from unfool.lab import Lab

SMALL = Settings(width=4, epochs=2, batch_size=8)


def squares(n: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    clean = torch.zeros(n, 1, 28, 28)
    for i in range(n):
        top, left = torch.randint(2, 16, (2,), generator=generator).tolist()
        clean[i, :, top : top + 10, left : left + 10] = 1
    return clean


def state(net: nn.Module) -> list[Tensor]:
    return [v.clone() for v in net.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def drawn(noise: str, size: float, level: float = 0.5, seed: int = 0) -> Tensor:
    """Noise that was added to a grey image; the global random state is lent and given back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grey = torch.full((4, 1, 50, 50), level)
        return noisy(grey, noise, size) - grey


# --- the noise ------------------------------------------------------------------------------------


def test_gaussian_noise_is_as_long_as_a_step_of_epsilon() -> None:
    delta = drawn("gaussian", 0.1)
    step = torch.full_like(delta, 0.1)
    assert float(delta.norm()) == pytest.approx(float(step.norm()), rel=0.03)
    assert float(delta.mean()) == pytest.approx(0, abs=0.004)
    assert float((delta.abs() > 0.1).float().mean()) == pytest.approx(0.317, abs=0.02)
    assert float(drawn("uniform", 0.1).norm()) < 0.7 * float(step.norm())  # the control


def test_uniform_noise_stays_within_its_size() -> None:
    delta = drawn("uniform", 0.1)
    assert float(delta.abs().max()) <= 0.1 + 1e-6
    assert float(delta.min()) < -0.098
    assert float(delta.max()) > 0.098
    assert float(drawn("gaussian", 0.1).abs().max()) > 0.2  # the control


@pytest.mark.parametrize("noise", denoiser.NOISES)
def test_noisy_images_are_images(noise: str) -> None:
    for level in (0.0, 1.0):
        delta = drawn(noise, 0.3, level)
        assert float((delta + level).min()) >= 0
        assert float((delta + level).max()) <= 1
    assert not torch.equal(drawn(noise, 0.3, seed=1), drawn(noise, 0.3))


# --- training -------------------------------------------------------------------------------------


def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - y).abs().mean())


def test_it_learns_to_remove_noise() -> None:
    clean = squares(32)
    settings = Settings(width=8, epochs=20, batch_size=8, rate=2e-3)
    net, history = train(clean, settings)
    assert not net.training
    assert len(history) == 20
    assert history[-1]["l1"] < 0.5 * history[0]["l1"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        fresh = noisy(clean, "gaussian", 0.15)
    assert error(net, fresh, clean) < 0.8 * float((fresh - clean).abs().mean())
    assert error(UNet(1, 8).eval(), fresh, clean) > float((fresh - clean).abs().mean())  # untaught


def test_every_step_draws_fresh_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    real = noisy

    def spy(images: Tensor, noise: str, size: float) -> Tensor:
        met.append(real(images, noise, size) - images)
        return met[-1] + images

    monkeypatch.setattr(denoiser, "noisy", spy)
    train(torch.full((8, 1, 8, 8), 0.5), SMALL)
    assert len(met) == 2
    assert not torch.equal(met[0], met[1])


def test_seed_and_global_random_state() -> None:
    clean = squares(8)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one = state(train(clean, SMALL, seed=1)[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert equal(state(train(clean, SMALL, seed=1)[0]), one)
    assert not equal(state(train(clean, SMALL, seed=2)[0]), one)


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path: Path) -> None:
    clean, path = squares(8), tmp_path / "checkpoint.safetensors"
    whole, history = train(clean, SMALL)
    train(clean, Settings(**{**vars(SMALL), "epochs": 1}), checkpoint=path)
    resumed, again = train(clean, SMALL, checkpoint=path)
    assert equal(state(resumed), state(whole))
    assert again == history
    path.unlink()
    fresh, _ = train(clean, Settings(**{**vars(SMALL), "epochs": 1}), checkpoint=path)
    assert not equal(state(fresh), state(whole))  # the control: the second epoch counts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(noise="salt"), "unknown noise 'salt': choose from gaussian, uniform"),
        (lambda: Settings(size=0), "size of the noise is above 0 and at most 1, not 0"),
        (lambda: Settings(size=1.5), "size of the noise is above 0 and at most 1, not 1.5"),
        (lambda: Settings(size=float("nan")), "above 0 and at most 1, not nan"),
        (lambda: train(squares(4)[:0], SMALL), "nothing to train on"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- in the lab -----------------------------------------------------------------------------------


def never(*_: object, **__: object) -> None:
    raise AssertionError("a denoiser needs no attack and no classifier")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("UNFOOL_PROGRESS", "off")
    return Lab("smoke", store=Store(tmp_path / "store"))


def test_it_never_sees_an_adversarial_image(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adversarial_set", "classifier", "pairs"):
        monkeypatch.setattr(lab, name, never)
    for name in ATTACKS:
        monkeypatch.setitem(ATTACKS, name, never)
    assert isinstance(lab.defense("denoiser"), UNet)
    kinds = {path.name for path in lab.store.root.iterdir()} - {"building", "locks"}
    assert kinds == {"purifier"}  # no classifier, no adversarial set was built
    with pytest.raises(AssertionError, match="needs no attack"):
        lab.defense("pix2pix")  # the control: a purifier does need one


def test_it_is_found_again_and_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab.defense("denoiser", noise="uniform")
    assert made is not None
    assert not made.training
    other = lab.defense("denoiser", noise="uniform", size=0.3)
    assert other is not None
    assert not equal(state(made), state(other))
    monkeypatch.setattr(denoiser, "train", never)
    again = lab.defense("denoiser", noise="uniform", classifier="bnet")  # it depends on none
    assert again is not None
    assert equal(state(again), state(made))
    with pytest.raises(AssertionError, match="needs no attack"):
        lab.defense("denoiser", noise="uniform", size=0.2)  # the control: this one is not there
    record = lab.evaluate(again, lab.adversarial_set("fgsm"))
    assert record.defense == "denoiser"
    assert not record.saw_attack_in_training
    assert record.defense_settings["noise"] == "uniform"
    assert record.defense_settings["size"] == 0.15  # the paper's epsilon for digits
    assert record.defense_settings["width"] == lab.profile.purifier.width
    assert len(lab.history(again)) == lab.profile.purifier.epochs
