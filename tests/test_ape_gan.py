"""APE-GAN: two steps against one, what its losses weigh, that it learns to clean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unfool.artifacts import Store, load_tensors
from unfool.attacks import paper_attacks
from unfool.defenses import ApeGAN
from unfool.defenses.ape_gan import Settings, discriminator, train
from unfool.lab import Lab

SMALL = Settings(width=4, epochs=2, batch_size=8)


def squares(n: int = 16) -> tuple[Tensor, Tensor]:
    """Clean images, and the same with noise."""
    generator = torch.Generator().manual_seed(2)
    clean = torch.zeros(n, 1, 12, 12)
    for i in range(n):
        top, left = torch.randint(1, 6, (2,), generator=generator).tolist()
        clean[i, :, top : top + 5, left : left + 5] = 1
    noise = 0.6 * torch.rand(clean.shape, generator=generator) - 0.3
    return (clean + noise).clamp(0, 1), clean


def state(net: nn.Module) -> list[Tensor]:
    return [v.clone() for v in net.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_learns_to_clean() -> None:
    noisy, clean = squares(64)
    net, history = train(noisy, clean, Settings(width=8, epochs=20, batch_size=16, rate=5e-3))
    assert history[-1]["mse"] < 0.3 * history[0]["mse"]
    assert set(history[0]) == {"d", "mse", "gan"}
    assert not net.training
    with torch.no_grad():
        made = net(noisy)
    assert float((made - clean).square().mean()) < 0.7 * float((noisy - clean).square().mean())
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_the_generator_takes_two_steps_for_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"

    def steps(settings: Settings) -> dict[str, float]:
        path.unlink(missing_ok=True)
        train(*squares(), settings, checkpoint=path)
        tensors, _ = load_tensors(path)
        return {n: float(tensors[f"optimizer/{n}/0/step"]) for n in ("generator", "discriminator")}

    assert steps(SMALL) == {"generator": 8, "discriminator": 4}  # 2 epochs of 2 batches
    assert steps(replace(SMALL, generator_steps=3)) == {"generator": 12, "discriminator": 4}


def test_the_weights_of_the_losses_count() -> None:
    noisy, clean = squares()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = ApeGAN(1, 4)
    for name, moves in [("mse", True), ("gan", True), ("none", False)]:
        weights = {"mse": 0.0, "gan": 0.0} | ({} if name == "none" else {name: 1.0})
        net, history = train(noisy, clean, replace(SMALL, **weights))
        same = equal([*net.parameters()], [*start.parameters()])
        assert same is not moves
        assert (history[0]["mse"] > 0) is (name == "mse")


def test_the_networks_are_the_authors() -> None:
    net = ApeGAN(1)
    widths = [
        m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    assert widths == [64, 128, 64, 1]
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 1, 28, 28)
    assert discriminator((3, 32, 32), 4)(torch.rand(2, 3, 32, 32)).shape == (2, 1)
    with pytest.raises(ValueError, match="multiples of 4, not 30x28"):
        net(torch.rand(1, 1, 30, 28))


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path: Path) -> None:
    pairs, path = squares(), tmp_path / "checkpoint.safetensors"
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole, history = train(*pairs, SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    cut, _ = train(*pairs, replace(SMALL, epochs=1), seed=1, checkpoint=path)
    assert not equal(state(cut), state(whole))  # the control: the second epoch counts
    resumed, again = train(*pairs, SMALL, seed=1, checkpoint=path)
    assert equal(state(resumed), state(whole))
    assert again == history
    assert not equal(state(train(*pairs, SMALL, seed=2)[0]), state(whole))


def test_what_cannot_be_is_refused() -> None:
    noisy, clean = squares(4)
    for x, y in [(noisy[:0], clean[:0]), (noisy[:2], clean)]:
        with pytest.raises(ValueError, match="pairs of equal shape"):
            train(x, y, SMALL)
    with pytest.raises(ValueError, match="mse must be >= 0"):
        Settings(mse=-1.0)
    with pytest.raises(ValueError, match="generator_steps must be >= 1"):
        Settings(generator_steps=0)


def test_the_lab_trains_it_on_the_purifiers_pairs(tmp_path: Path) -> None:
    lab = Lab("smoke", store=Store(tmp_path / "store"))
    fgsm = paper_attacks("mnist5k")[:1]
    one, again = (lab.defense("ape_gan", attacks=fgsm) for _ in range(2))
    assert isinstance(one, ApeGAN)
    assert equal(state(one), state(again))
    assert len(lab.history(one)) == 2
    record = lab.evaluate(one, lab.adversarial_set("fgsm"))
    assert (record.defense, record.saw_attack_in_training) == ("ape_gan", True)
    assert record.defense_settings["mse"] == 0.7
