"""AutoAttack through its authors' package: a known answer, what it refuses, what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import victims
from unfool.attacks import apgd, autoattack
from unfool.evaluation import predict
from unfool.inputs import uniform_noise

EPS = 0.05


class Affine(nn.Module):
    """Logits W x; whether an image can be turned is known: see `holds`."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T

    def holds(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """No class overtakes y even in its best corner; exact where x ± eps lies in [0, 1]."""
        logits = self(x).detach()
        ahead = logits.gather(1, y[:, None]) - logits
        reach = eps * (self.weight[y][:, None] - self.weight).abs().sum(dim=2)
        others = torch.ones_like(ahead).scatter(1, y[:, None], 0).bool()
        return ((ahead - reach).detach().masked_fill(~others, 1) > 0).all(dim=1)


def middling(n: int = 40) -> Tensor:
    return 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_who_holds_out_against_an_affine_model_is_known() -> None:
    model, x = Affine(), middling()
    y = predict(model, x)
    wanted = model.holds(x, y, EPS)
    assert 5 < int(wanted.sum()) < 35  # some of both
    made = autoattack(model, x, y, eps=EPS)
    assert torch.equal(predict(model, made) == y, wanted)
    assert float((made - x).abs().max()) <= EPS + 1e-6
    assert torch.equal(made[wanted], x[wanted])
    assert torch.equal(autoattack(model, x, y, eps=EPS), made)  # the same seed


def test_the_model_and_the_random_state_come_back() -> None:
    model, x = nn.Sequential(Affine(), nn.Dropout(0.5)).train(), middling(4)
    y = predict(model, x)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    autoattack(model, x, y, eps=EPS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_is_wrong_already_is_left_alone() -> None:
    model, x = Affine(), middling(6)
    wrong = (predict(model, x) + 1) % 5
    assert torch.equal(autoattack(model, x, wrong, eps=EPS), x)


def test_probabilities_and_few_classes_are_refused() -> None:
    model, x = Affine(), middling(3)
    y = predict(model, x)
    with pytest.warns(match="sum to 1"), pytest.raises(ValueError, match="give it logits"):
        autoattack(nn.Sequential(model, nn.Softmax(1)), x, y, eps=EPS)
    with pytest.raises(ValueError, match="3 classes, but AutoAttack's targeted loss compares 4"):
        autoattack(Affine(3), x, y.clamp(max=2), eps=EPS)
    with pytest.raises(ValueError, match=r"version .*'plus'"):
        autoattack(model, x, y, eps=EPS, version="plus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no target"):
        autoattack(model, x, y, eps=EPS, target=(y + 1) % 5)
    with pytest.raises(ValueError, match="eps"):
        autoattack(model, x, y, eps=-0.1)


class Shaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.rand_like(x)


def test_what_it_says_of_a_random_model_is_a_warning() -> None:
    model, x = nn.Sequential(Shaky(), Affine()).eval(), middling(2)
    y = predict(Affine(), x)
    with pytest.warns(UserWarning, match="AutoAttack: it seems to be a randomized defense"):
        autoattack(model, x, y, eps=EPS)


def test_ours_leaves_as_many_on_a_small_network() -> None:
    net, (x, *_) = victims.small_net(), victims.digits(12, small=True)
    y = predict(net, x)

    def left(made: Tensor) -> int:
        return int((predict(net, made) == y).sum())

    theirs = left(autoattack(net, x, y, eps=0.08))
    assert abs(left(apgd(net, x, y, eps=0.08)) - theirs) <= 1
    noise = uniform_noise(x, 0.08, torch.Generator().manual_seed(0))
    assert left((x + noise).clamp(0, 1)) > theirs + 5  # the control
