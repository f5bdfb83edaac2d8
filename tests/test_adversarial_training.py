"""Adversarial training: it buys robustness where there is some to buy, and resumes bit-equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unfool.artifacts import Store
from unfool.attacks import fgsm, pgd
from unfool.defenses import AdversariallyTrained, adversarial_training
from unfool.defenses.adversarial_training import Settings, attacked, train
from unfool.evaluation import accuracy, defended
from unfool.lab import Lab
from unfool.training import Recipe, train_classifier

RECIPE = Recipe(rate=0.02, batch_size=32, shift=0)
EPS = 0.1


def problem(n: int = 256) -> tuple[Tensor, Tensor]:
    """Two classes. A tenth of the pixels tell them apart by far, for 9 of 10 images; all others
    tell them apart by less than eps, for all images: the better and the more fragile feature.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    sign = (2 * y - 1).view(-1, 1, 1, 1).float()
    x = 0.5 + 0.03 * sign + 0.02 * torch.randn(n, 1, 8, 8, generator=generator)
    lies = torch.where(torch.rand(n, generator=generator) < 0.1, -1.0, 1.0).view(-1, 1, 1, 1)
    x[:, :, 0, :6] = 0.5 + 0.35 * (sign * lies)[:, :, 0]
    return x.clamp(0, 1), y


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(16, 2),
        )  # fmt: skip


def under_attack(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return accuracy(net, pgd(net, x, y, eps=EPS, steps=20), y)


# --- what it buys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "gain"), [("pgd", 0.6), ("fgsm", 0.3)])
def test_it_is_more_robust_than_plain_training(kind: str, gain: float) -> None:
    x, y = problem()
    plain = small()
    train_classifier(plain, x, y, RECIPE, epochs=12)
    assert accuracy(plain, x, y) > 0.97
    assert under_attack(plain, x, y) < 0.25
    settings = Settings(kind, EPS, steps=5, warmup=0.5, epochs=12)
    made, history = train(small(), x, y, RECIPE, settings)
    assert under_attack(made, x, y) > under_attack(plain, x, y) + gain
    assert accuracy(made, x, y) > 0.85
    assert len(history) == 12
    assert not made.training


def test_without_eps_it_is_plain_training() -> None:
    x, y = problem(64)
    plain = Modes()
    train_classifier(plain, x, y, RECIPE, epochs=1)
    for kind, eps, same in [("pgd", 0.0, True), ("fgsm", 0.0, True), ("pgd", EPS, False)]:
        made, _ = train(Modes(), x, y, RECIPE, Settings(kind, eps, steps=1, epochs=1))
        assert torch.allclose(made.net.inner.weight, plain.inner.weight, atol=1e-5) is same


# --- the attacks ----------------------------------------------------------------------------------


def test_fgsm_in_training_is_the_attack() -> None:
    (x, y), net = problem(32), small().eval()
    made = attacked(net, x, y, Settings("fgsm"), EPS)
    assert torch.equal(made, fgsm(net, x, y, eps=EPS))
    assert not torch.equal(made, fgsm(net, x, y, eps=EPS / 2))


def test_pgd_in_training_stays_in_the_ball_and_starts_at_random() -> None:
    (x, y), net = problem(32), small().eval()
    with torch.random.fork_rng(devices=[]):
        one, two = (attacked(net, x, y, Settings(steps=1, reach=0.0), EPS) for _ in range(2))
        far = attacked(net, x, y, Settings(steps=5, reach=4.0), EPS)
    assert not torch.equal(one, two)
    for made in (one, far):
        assert float((made - x).abs().max()) <= EPS + 1e-6
        assert 0 <= float(made.min()) <= float(made.max()) <= 1
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(net(made), y) for made in (one, far)]
    assert losses[0] < losses[1]


class Modes(nn.Module):
    """Notes in which mode it was called, and with how many images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(64, 2), []
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.training, len(images)))
        return self.inner(images.flatten(1))


@pytest.mark.parametrize(
    ("kind", "calls"),
    [("fgsm", [(False, 32), (True, 64)]), ("pgd", [(False, 32)] * 3 + [(True, 32)])],
)  # fmt: skip
def test_attacks_meet_the_network_in_eval_mode(kind: str, calls: list[tuple[bool, int]]) -> None:
    x, y = problem(64)
    net = Modes().eval()
    made, _ = train(net, x, y, RECIPE, Settings(kind, EPS, steps=3, epochs=1))
    assert made.net.seen == calls * 2  # two batches of 32; FGSM learns from both halves
    assert net.seen == []
    assert not made.net.training


def test_eps_grows_over_the_warm_up() -> None:
    settings = Settings(eps=0.4, warmup=0.5)
    assert [settings.eps_at(done) for done in (0, 0.25, 0.5, 1)] == pytest.approx(
        [0, 0.2, 0.4, 0.4]
    )
    assert Settings(eps=0.4).eps_at(0) == 0.4


def spied(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    met: list[float] = []

    def spy(net: nn.Module, x: Tensor, y: Tensor, settings: Settings, eps: float) -> Tensor:
        met.append(eps)
        return attacked(net, x, y, settings, eps)

    monkeypatch.setattr(adversarial_training, "attacked", spy)
    return met


def test_the_warm_up_goes_on_where_a_run_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met, path = spied(monkeypatch), tmp_path / "checkpoint.safetensors"
    x, y = problem(64)
    settings = Settings("pgd", 0.4, steps=1, warmup=1.0, epochs=2)

    def stop(done: int, total: int, note: str) -> None:
        if path.exists():  # at the first step after the first epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), x, y, RECIPE, settings, checkpoint=path, progress=stop)
    train(small(), x, y, RECIPE, settings, checkpoint=path)
    assert met == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.3])  # the third step was made twice


# --- determinism ----------------------------------------------------------------------------------


def state(net: nn.Module) -> list[Tensor]:
    return [v.clone() for v in net.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_a_resumed_run_ends_like_one_that_was_not_cut(kind: str, tmp_path: Path) -> None:
    x, y = problem(64)
    path = tmp_path / "checkpoint.safetensors"
    settings = Settings(kind, EPS, steps=2, warmup=1.0, epochs=2)
    recipe = replace(RECIPE, shift=1, schedule="constant")

    def killed_after_an_epoch(done: int, total: int, note: str) -> None:
        if path.exists():
            raise KeyboardInterrupt

    net = small()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole, history = train(net, x, y, recipe, settings, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyboardInterrupt):
        train(net, x, y, recipe, settings, seed=1, checkpoint=path, progress=killed_after_an_epoch)
    resumed, again = train(net, x, y, recipe, settings, seed=1, checkpoint=path)
    assert equal(state(resumed), state(whole))
    assert again == history
    assert not equal(state(train(net, x, y, recipe, settings, seed=2)[0]), state(whole))
    assert equal(state(net), state(small()))  # the one that was given stays as it was
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "bim"}, "kind must be one of fgsm, pgd, not 'bim'"),
        ({"eps": -0.1}, "eps must be >= 0"), ({"eps": 8.0}, "for 8 of 255 levels"),
        ({"steps": 0}, "steps must be >= 1"), ({"reach": -1}, "reach must be >= 0"),
        ({"warmup": 2}, "warmup must be from 0 to 1"), ({"epochs": 0}, "epochs must be >= 1"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_images_without_a_class_each_are_refused() -> None:
    x, y = problem(8)
    with pytest.raises(ValueError, match="equal lengths"):
        train(small(), x, y[:4], RECIPE, Settings(epochs=1))
    with pytest.raises(ValueError, match="nothing to train on"):
        train(small(), x[:0], y[:0], RECIPE, Settings(epochs=1))


# --- in the lab -----------------------------------------------------------------------------------


def never(*_: object, **__: object) -> None:
    raise AssertionError("neither training nor an attack on the classifier is needed")


def test_the_lab_trains_it_once_and_records_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab("smoke", store=Store(tmp_path / "store"))
    with monkeypatch.context() as patch:
        patch.setattr(lab, "classifier", never)
        patch.setattr(lab, "adversarial_set", never)
        one = lab.defense("adversarial_fgsm")
    assert isinstance(one, AdversariallyTrained)
    assert defended(nn.Identity(), one) is one
    with monkeypatch.context() as patch:
        patch.setattr(adversarial_training, "train", never)
        again = lab.defense("adversarial_fgsm")
        assert equal(state(again), state(one))
        with pytest.raises(AssertionError, match="neither training"):
            lab.defense("adversarial_fgsm", eps=0.3)  # the control: this one is not there
    seen = {a: lab.evaluate(again, lab.adversarial_set(a)) for a in ("fgsm", "pgd")}
    assert seen["fgsm"].defense == "adversarial_fgsm"
    assert seen["fgsm"].defense_settings["eps"] == 0.15  # the paper's for digits
    assert [r.saw_attack_in_training for r in seen.values()] == [True, False]
    other = lab.defense("adversarial_pgd", steps=1)
    assert lab.settings_of(other)["kind"] == "pgd"
    assert lab.evaluate(other, lab.adversarial_set("pgd")).saw_attack_in_training
