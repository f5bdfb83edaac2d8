"""The classifier trained further: it learns its pairs, and the one it came from stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unfool.artifacts import Store
from unfool.attacks import fgsm, paper_attacks
from unfool.building import labelled_pairs
from unfool.defenses.finetuned import Finetuned, Settings, train
from unfool.evaluation import AdversarialSet, accuracy, defended, measure, recovered
from unfool.lab import Lab
from unfool.training import Recipe, recipe_for

RECIPE = Recipe(rate=0.02, batch_size=32, shift=0)


def problem(net: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the same attacked, and the class that the network gave before."""
    x = torch.rand(128, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x).argmax(1)
    return fgsm(net, x, y, eps=0.1), x, y


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def test_it_learns_the_attacked_images_and_keeps_the_clean_ones() -> None:
    net = small()
    attacked, clean, y = problem(net)
    before = accuracy(net, attacked, y)
    made, history = train(net, attacked, clean, y, RECIPE, Settings(epochs=20, rate=1.0))
    assert before < 0.5
    assert accuracy(made, attacked, y) > before + 0.2
    assert accuracy(made, clean, y) > 0.8
    assert len(history) == 20
    assert not made.training


def test_the_classifier_that_it_came_from_stays_as_it_was() -> None:
    net = small()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    train(net, *problem(net), RECIPE, Settings(epochs=2))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not net.training


def test_the_rate_is_a_share_of_the_recipes() -> None:
    net = small()
    data = problem(net)

    def moved(rate: float) -> float:
        made, _ = train(net, *data, RECIPE, Settings(epochs=1, rate=rate))
        pairs = zip(made.net.parameters(), net.parameters(), strict=True)
        return sum(float((a - b).detach().norm()) for a, b in pairs)

    assert moved(0.0) == 0
    assert 0 < 3 * moved(0.1) < moved(1.0)


def test_it_takes_the_classifiers_place() -> None:
    net, other = small(), small(1)
    attacked, clean, y = problem(net)
    everywhere = torch.ones(len(y), dtype=torch.bool)
    with torch.no_grad():
        success = net(attacked).argmax(1) != y
    one = AdversarialSet(clean, attacked, y, everywhere, success)
    taught = Finetuned(other)
    assert defended(net, taught) is taught
    assert defended(net, None) is net
    assert isinstance(defended(net, nn.Identity()), nn.Sequential)
    found = measure(net, taught, one)
    assert found["defended_clean_accuracy"] == pytest.approx(accuracy(other, clean, y))
    assert found["clean_accuracy"] == 1.0
    assert recovered(net, taught, one) == pytest.approx(
        accuracy(other, attacked[success], y[success])
    )


@pytest.mark.parametrize(("kept", "labels"), [(0, 0), (4, 3), (4, 5)])
def test_pairs_without_a_class_each_are_refused(kept: int, labels: int) -> None:
    net = small()
    attacked, clean, y = problem(net)
    with pytest.raises(ValueError, match="a class for each are needed"):
        train(net, attacked[:kept], clean[:kept], y[:labels], RECIPE, Settings())


@pytest.mark.parametrize(("field", "value"), [("epochs", 0), ("epochs", 1.5), ("rate", -0.1)])
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{field} must be"):
        replace(Settings(), **{field: value})


def test_the_lab_trains_it_once_and_records_name_it(tmp_path: Path) -> None:
    lab = Lab("smoke", store=Store(tmp_path / "store"))
    one, again = (lab.defense("finetuned", epochs=1) for _ in range(2))
    assert isinstance(one, Finetuned)
    assert isinstance(again, Finetuned)
    pairs = zip(one.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    record = lab.evaluate(one, lab.adversarial_set("fgsm"))
    assert (record.defense, record.defense_settings) == ("finetuned", {"epochs": 1, "rate": 0.1})
    assert record.saw_attack_in_training
    few = lab.defense("finetuned", epochs=1, images=4)
    x, y, labels = labelled_pairs(lab, "anet", paper_attacks("mnist5k"), 4)
    net, recipe = lab.classifier("anet"), recipe_for("anet", "mnist5k")
    made, _ = train(net, x, y, labels, recipe, Settings(epochs=1))
    assert all(torch.equal(v, few.state_dict()[k]) for k, v in made.state_dict().items())
    assert lab.settings_of(few)["images"] == 4
    usual = lab.profile.images("fgsm", "train")
    most = lab.defense("finetuned", epochs=1, images=usual)
    assert all(torch.equal(v, one.state_dict()[k]) for k, v in most.state_dict().items())
    assert len(list(lab.store.root.glob("classifier/finetuned-*"))) == 2
    with pytest.raises(ValueError, match="images must be >= 1, not 0"):
        lab.defense("finetuned", images=0)
    assert lab.defense("finetuned") is not None
    named = lab.settings_of(lab.defense("finetuned"))
    assert named["epochs"] == lab.profile.purifier.epochs // 2
