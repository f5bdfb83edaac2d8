"""MagNet: thresholds at known places, planted detectors, what the autoencoders learn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from unfool.artifacts import Store
from unfool.defenses import MagNet, magnet
from unfool.defenses.magnet import Settings, autoencoders, divergence, thresholds, train
from unfool.lab import Lab

QUICK = Settings(epochs=2, batch_size=8)


def squares(n: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    clean = torch.zeros(n, channels, 12, 12)
    for i in range(n):
        top, left = torch.randint(1, 6, (2,), generator=generator).tolist()
        clean[i, :, top : top + 5, left : left + 5] = 1
    return clean


class Times(nn.Module):
    """An autoencoder whose errors are known: it redraws every pixel `factor` times as bright."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.factor


def grey(level: float, n: int = 1) -> Tensor:
    return torch.full((n, 1, 4, 4), level)


def levels(n: int = 100) -> Tensor:
    """Grey images, a hundredth brighter each."""
    return (torch.arange(n) / n).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()


def planted(**settings: float) -> MagNet:
    nets = nn.ModuleDict({"I": Times(0.5), "II": Times(0.0)})
    return MagNet(nets, levels(), **{"false_positives": 0.05, **settings})


# --- thresholds -----------------------------------------------------------------------------------


def test_each_detector_refuses_its_share() -> None:
    rising = torch.arange(100.0)
    scores = torch.stack([rising, 10 - rising], dim=1)
    found = thresholds(scores, 0.05, joint=False)
    assert found.tolist() == [95, 6]
    assert int((scores >= found).any(dim=1).sum()) == 10  # together twice the share: other images


@pytest.mark.parametrize(
    ("second", "k"), [(torch.arange(100.0), 5), (-torch.arange(100.0), 2)], ids=["same", "other"]
)
def test_joint_thresholds_keep_the_union_within_the_share(second: Tensor, k: int) -> None:
    scores = torch.stack([torch.arange(100.0), second], dim=1)
    found = thresholds(scores, 0.05, joint=True)
    refused = scores >= found
    assert refused.sum(dim=0).tolist() == [k, k]
    assert int(refused.any(dim=1).sum()) <= 5


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_the_share_asked_for_is_met_on_new_images(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(20_000, 2, generator=generator) for _ in range(2))

    def met(joint: bool) -> float:
        return float((new >= thresholds(old, share, joint=joint)).any(dim=1).float().mean())

    assert met(joint=True) == pytest.approx(share, abs=0.003)
    assert met(joint=False) > 1.8 * share  # the control: detectors that share no image


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, 0.009, float("nan")])
def test_shares_that_refuse_none_or_all_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="false_positives"):
        thresholds(torch.rand(100, 2), share, joint=False)
    assert len(thresholds(torch.rand(100, 2), 0.01, joint=False)) == 2


def test_detectors_that_cannot_share_say_how_many_images_they_need() -> None:
    scores = torch.stack([torch.arange(100.0), -torch.arange(100.0)], dim=1)
    with pytest.raises(ValueError, match=r"share 1 of 100 validation .*needs 200 images"):
        thresholds(scores, 0.01, joint=True)


# --- detectors and reformer -----------------------------------------------------------------------


def test_scores_of_planted_autoencoders() -> None:
    scores = planted().scores(grey(0.8))
    assert scores[0].tolist() == pytest.approx([0.4**2, 0.8])


def test_bright_images_are_refused_and_dark_ones_are_not() -> None:
    defense = planted()
    assert defense.thresholds.tolist() == pytest.approx([0.475**2, 0.95])
    images = torch.cat([grey(0.2), grey(0.96), grey(0.94)])
    assert defense.rejects(images).tolist() == [False, True, False]
    assert defense.rejects(images).dtype == torch.bool
    strict = planted(false_positives=0.5)
    assert strict.rejects(images).tolist() == [False, True, True]


def test_the_reformer_is_autoencoder_one_for_grey_images() -> None:
    assert torch.equal(planted()(grey(0.8)), grey(0.4))


class Fixed(nn.Module):
    """Logits that are the channels' means, times 20."""

    def forward(self, images: Tensor) -> Tensor:
        return 20 * images.mean(dim=(2, 3))


def test_in_colour_the_classifier_is_asked_at_two_temperatures() -> None:
    images = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classifier = Fixed().train()
    nets = nn.ModuleDict({"II": Times(0.5)})
    defense = MagNet(nets, images, false_positives=0.1, classifier=classifier)
    assert classifier.training
    assert torch.equal(defense(images), images / 2)
    logits = Fixed()(images)
    want = [(images / 2).flatten(1).mean(1)]
    want += [divergence(logits / t, logits / 2 / t) for t in (10, 40)]
    assert torch.allclose(defense.scores(images), torch.stack(want, dim=1), atol=1e-6)
    with pytest.raises(ValueError, match="ask the classifier: give classifier="):
        MagNet(nets, images, false_positives=0.1)


def test_divergence_is_jensens_and_shannons() -> None:
    a, b = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).double()
    want = [
        jensenshannon(p, q) ** 2 for p, q in zip(a.softmax(1), b.softmax(1), strict=True)
    ]  # scipy's is the root of it
    assert divergence(a, b).tolist() == pytest.approx(want)
    assert divergence(a, a).abs().max() < 1e-12
    far = torch.tensor([[60.0, 0.0]])
    assert float(divergence(far, -far)) == pytest.approx(math.log(2), abs=1e-5)
    assert not torch.allclose(divergence(a, b), divergence(a / 10, b / 10), rtol=0.1)  # control


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 3, 4, 4), (1, 4, 4)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    defense = planted()
    for ask in (defense, defense.rejects):
        with pytest.raises(ValueError, match=r"made for images \(N, 1, 4, 4\), not "):
            ask(torch.rand(shape))


# --- training -------------------------------------------------------------------------------------


def test_the_autoencoders_are_the_authors() -> None:
    nets = autoencoders(1)
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    first, inner, last = 3 * 9 + 3, 3 * 3 * 9 + 3, 3 * 9 + 1
    assert count == {"I": first + 3 * inner + last, "II": first + inner + last}
    assert list(autoencoders(3)) == ["II"]
    for net in nets.values():
        assert net(squares(2)).shape == (2, 1, 12, 12)
    shapes = [tuple(out.shape[1:]) for out in nets["I"].activities(squares(2))]
    assert shapes == [(3, 12, 12), (3, 6, 6), (3, 6, 6), (3, 12, 12), (1, 12, 12)]


def test_they_learn_to_redraw_clean_images_and_nothing_else() -> None:
    nets, history = train(squares(64), Settings(epochs=30, batch_size=16, rate=0.03))
    assert not nets.training
    assert len(history) == 30
    assert history[-1]["II"] < 0.2 * history[0]["II"]
    defense = MagNet(nets, squares(64), false_positives=0.05)
    noise = torch.rand(20, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert defense.rejects(noise).all()
        # Some squares are there several times, and alike images are refused together.
        assert float(defense.rejects(squares(64)).float().mean()) < 0.25


def test_activity_is_held_down_by_its_weight() -> None:
    def activity(weight: float) -> float:
        settings = Settings(epochs=20, batch_size=16, rate=0.02, activity=weight)
        net = train(squares(), settings)[0]["II"]
        with torch.no_grad():
            return sum(float(out.square().mean()) for out in net.activities(squares()))

    assert activity(1e-3) < 0.6 * activity(1e-9)


@pytest.mark.parametrize(("channels", "size"), [(1, 0.1), (3, 0.025)])
def test_the_noise_is_the_authors(
    channels: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[float] = []
    real = magnet.noisy

    def spy(images: Tensor, noise: str, size: float) -> Tensor:
        met.append(size)
        return real(images, noise, size)

    monkeypatch.setattr(magnet, "noisy", spy)
    train(squares(8, channels), QUICK)
    train(squares(8, channels), replace(QUICK, noise=0.3))
    assert set(met) == {size, 0.3}


def state(nets: nn.Module) -> list[Tensor]:
    return [v.clone() for v in nets.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path: Path) -> None:
    clean, path = squares(), tmp_path / "checkpoint.safetensors"
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole, history = train(clean, QUICK, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    cut, _ = train(clean, replace(QUICK, epochs=1), seed=1, checkpoint=path)
    assert not equal(state(cut), state(whole))  # the control: the second epoch counts
    resumed, again = train(clean, QUICK, seed=1, checkpoint=path)
    assert equal(state(resumed), state(whole))
    assert again == history
    assert not equal(state(train(clean, QUICK, seed=2)[0]), state(whole))


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="12x11 pixels cannot be halved"):
        train(squares()[..., :11], QUICK)
    with pytest.raises(ValueError, match="nothing to train on"):
        train(squares()[:0], QUICK)
    with pytest.raises(ValueError, match="epochs must be >= 1"):
        Settings(epochs=0)
    with pytest.raises(ValueError, match="noise must be from 0 to 1"):
        Settings(noise=2.0)


# --- in the lab -----------------------------------------------------------------------------------


def never(*_: object, **__: object) -> None:
    raise AssertionError("no training and no attack is needed")


def test_the_lab_trains_once_for_all_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab("smoke", store=Store(tmp_path / "store"))
    with monkeypatch.context() as patch:
        patch.setattr(lab, "adversarial_set", never)
        patch.setattr(lab, "classifier", never)  # grey images ask no classifier
        usual = lab.defense("magnet")
    assert isinstance(usual, MagNet)
    monkeypatch.setattr(magnet, "train", never)
    strict = lab.defense("magnet", false_positives=0.05)
    assert equal(state(usual.nets), state(strict.nets))
    refused = [int(d.rejects(lab.data.validation.images).sum()) for d in (usual, strict)]
    assert 0 < refused[0] <= 4 < refused[1] <= 20  # of 400
    with pytest.raises(AssertionError, match="no training"):
        lab.defense("magnet", epochs=2)  # the control: these autoencoders are not there
    with pytest.raises(ValueError, match="of 400 validation images is none"):
        lab.defense("magnet", false_positives=0.001, joint=False)  # the authors', on few images
    record = lab.evaluate(strict, lab.adversarial_set("fgsm"))
    assert (record.defense, record.saw_attack_in_training) == ("magnet", False)
    assert record.defense_settings["false_positives"] == 0.05
    assert record.false_positive_rate is not None


def test_scores_that_are_no_number_set_no_threshold() -> None:
    scores = torch.rand(10, 2)
    assert magnet.thresholds(scores, 0.2, joint=False).isfinite().all()  # the control
    scores[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite.*look at the images"):
        magnet.thresholds(scores, 0.2, joint=False)
