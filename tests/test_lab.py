"""`Lab`: unknown names, what it refuses to measure, the same bits each time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unfool import attacks, building, classifiers, committed, training
from unfool.artifacts import Store, artifact_key, load_tensors, save_tensors
from unfool.attacks import ATTACKS, AttackSettings, paper_attacks
from unfool.committed import (
    commit_purifier,
    commit_weights,
    committed_purifiers,
    committed_weights,
)
from unfool.defenses import pix2pix
from unfool.evaluation import AdversarialSet, Record, predict, read_records
from unfool.figures import bars
from unfool.lab import Lab, find_device
from unfool.progress import silent

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Built:
    """All that a smoke notebook asks of a lab."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.lab = Lab("smoke", seed=seed, store=Store(root))
        self.net = self.lab.classifier("anet")
        self.adversarial = self.lab.adversarial_set("fgsm")
        pure = self.lab.defense("pix2pix")
        assert pure is not None
        self.pure = pure

    def bits(self) -> dict[str, Tensor]:
        weights = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        weights |= {f"pure.{k}": v for k, v in self.pure.state_dict().items()}
        one = self.adversarial
        return weights | {"x_adv": one.x_adv, "success": one.success, "attacked": one.attacked}

    def record(self) -> Record:
        return self.lab.evaluate(self.pure, self.adversarial)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab") / "store"


@pytest.fixture(scope="module")
def cold(root: Path) -> Iterator[Built]:
    """A lab that found an empty store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFOOL_PROGRESS", "off")
        yield Built(root)


# --- the same bits --------------------------------------------------------------------------------


def test_a_warm_store_gives_the_bits_of_a_cold_one(
    cold: Built, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("this is in the store")

    monkeypatch.setattr(training, "train_classifier", never)
    monkeypatch.setattr(pix2pix, "train", never)
    monkeypatch.setitem(ATTACKS, "fgsm", never)
    warm = Built(root)
    assert same(warm.bits(), cold.bits())
    one, other = warm.record(), cold.record()
    assert one.id == other.id
    assert warm.lab.history(warm.net) == cold.lab.history(cold.net)
    assert replace(one, seconds=0) == replace(other, seconds=0)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    cold: Built, tmp_path: Path
) -> None:
    torch.rand(17)  # the global random state has no say
    again = Built(tmp_path / "again")
    assert same(again.bits(), cold.bits())
    assert again.record().id == cold.record().id
    other = Lab("smoke", seed=1, store=Store(tmp_path / "again")).adversarial_set("fgsm")
    assert not torch.equal(other.x_adv, cold.adversarial.x_adv)


def test_the_global_random_state_stays(cold: Built, root: Path) -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    Built(root)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_built_comes_in_eval_mode_and_is_kept(cold: Built) -> None:
    assert cold.lab.classifier("anet") is cold.net
    for module in [*cold.net.modules(), *cold.pure.modules()]:
        assert not module.training
    assert len(cold.lab.history(cold.net)) == cold.lab.profile.classifier_epochs
    assert "loss" in cold.lab.history(cold.net)[0]


def test_other_settings_are_another_artifact(cold: Built) -> None:
    weak = cold.lab.adversarial_set("fgsm", eps=0.01)
    assert weak.attack_settings == {"eps": 0.01}
    assert float((weak.x_adv - weak.x).abs().max()) == pytest.approx(0.01, abs=1e-6)
    assert cold.adversarial.attack_settings == {"eps": 0.15}
    asked = cold.lab.adversarial_set(AttackSettings("fgsm", {"eps": 0.01}))
    assert torch.equal(asked.x_adv, weak.x_adv)


def test_a_purifier_as_it_was_after_an_epoch(cold: Built) -> None:
    lab, seen = cold.lab, []
    early = lab.defense("pix2pix", after=1)
    assert isinstance(early, nn.Module)
    pix2pix.train(
        *lab.pairs(paper_attacks("mnist5k")), lab.profile.purifier,
        after_epoch=lambda _, net: seen.append({k: v.clone() for k, v in net.state_dict().items()}),
    )  # fmt: skip
    assert same(early.state_dict(), seen[0])
    assert same(cold.pure.state_dict(), seen[1])
    assert not same(seen[0], seen[1])
    assert not early.training
    assert lab.history(early) == lab.history(cold.pure)[:1]
    assert lab.evaluate(early, cold.adversarial).defense_settings["after"] == 1
    assert "after" not in lab.evaluate(cold.pure, cold.adversarial).defense_settings


def test_statistics_of_the_batch_make_an_answer_depend_on_its_neighbours(cold: Built) -> None:
    lab, x = cold.lab, cold.adversarial.x_adv
    batch = lab.defense("pix2pix", statistics="batch")
    assert isinstance(batch, nn.Module)
    with torch.no_grad():
        for net, alike in ((cold.pure, True), (batch, False)):
            assert torch.allclose(net(x)[:4], net(x[:4]), atol=1e-4) is alike
    assert len(list(lab.store.root.glob("purifier/pix2pix-anet*"))) == 1  # nothing was trained
    assert cold.pure.state_dict().keys() > batch.state_dict().keys()  # and nothing lost
    assert lab.evaluate(batch, cold.adversarial).defense_settings["statistics"] == "batch"
    assert "statistics" not in lab.evaluate(cold.pure, cold.adversarial).defense_settings
    with pytest.raises(ValueError, match="statistics must be one of running, batch, not 'both'"):
        lab.defense("pix2pix", statistics="both")


def test_a_purifier_learns_from_so_many_images_of_each_attack(cold: Built) -> None:
    lab, fgsm = cold.lab, paper_attacks("mnist5k")[:1]
    few = lab.defense("pix2pix", attacks=fgsm, images=16)
    assert isinstance(few, nn.Module)
    x, y = (part[:16] for part in lab.pairs(fgsm))
    made, _ = pix2pix.train(x, y, lab.profile.purifier)
    assert same(few.state_dict(), made.state_dict())
    assert lab.evaluate(few, cold.adversarial).defense_settings["images"] == 16
    more = lab.defense("pix2pix", attacks=fgsm, images=48)  # the profile has 32
    assert isinstance(more, nn.Module)
    made = lab.adversarial_set("fgsm", split="train", images=48)
    best, _ = pix2pix.train(made.x_adv, made.x, lab.profile.purifier)
    assert same(more.state_dict(), best.state_dict())
    assert not same(more.state_dict(), few.state_dict())
    with pytest.raises(ValueError, match="images must be >= 1, not 0"):
        lab.defense("pix2pix", images=0)


def test_the_papers_last_layer_has_a_name(cold: Built) -> None:
    net = cold.lab.classifier("anet+relu")
    assert net is cold.lab.classifier("anet", relu_logits=True)
    assert net is not cold.net
    images = cold.adversarial.x
    with torch.no_grad():
        assert float(net(images).min()) == 0 > float(cold.net(images).min())
    made = cold.lab.adversarial_set("fgsm", classifier="anet+relu")
    assert cold.lab.evaluate(None, made, classifier="anet+relu").classifier == "anet+relu"


def test_committed_records_are_found_by_name(cold: Built) -> None:
    records = cold.lab.committed_records("washers")
    assert {r.defense for r in records} >= {"threshold", "denoiser"}
    with pytest.raises(ValueError, match=r"no committed records 'wash': choose from .*washers"):
        cold.lab.committed_records("wash")


def test_settings_are_those_that_the_records_name(cold: Built) -> None:
    lab = cold.lab
    assert lab.settings_of(None) == {}
    assert lab.settings_of(nn.Identity()) == {}
    assert lab.settings_of(lab.defense("bits", bits=4)) == {"bits": 4}
    made = lab.evaluate(cold.pure, cold.adversarial)
    assert lab.settings_of(cold.pure) == made.defense_settings
    assert made.defense_settings["width"] == lab.profile.purifier.width


def test_defences_are_compared_on_every_set(cold: Built) -> None:
    lab, half = cold.lab, cold.lab.adversarial_set("fgsm", eps=0.3)
    grid = lab.compare({"none": None, "pure": cold.pure}, {"weak": cold.adversarial, "0.3": half})
    assert {name: list(row) for name, row in grid.items()} == {
        "none": ["weak", "0.3"], "pure": ["weak", "0.3"],
    }  # fmt: skip
    assert (grid["pure"]["0.3"].defense, grid["none"]["0.3"].defense) == ("pix2pix", "none")
    assert grid["none"]["weak"].attack_settings == {"eps": 0.15}
    assert grid["none"]["0.3"].attack_settings == {"eps": 0.3}


@pytest.mark.parametrize("after", [0, 3])
def test_an_epoch_that_never_was_is_refused(cold: Built, after: int) -> None:
    with pytest.raises(ValueError, match=rf"after={after} is no epoch .* choose 1 to 2"):
        cold.lab.defense("pix2pix", after=after)


def test_the_adversarial_set_is_what_it_says(cold: Built) -> None:
    one = cold.adversarial
    assert len(one) == cold.lab.profile.images("fgsm", "test")
    assert torch.equal(one.x, cold.lab.data.test.images[: len(one)])
    assert torch.equal(one.attacked, predict(cold.net, one.x) == one.y)
    assert torch.equal(one.success, one.attacked & (predict(cold.net, one.x_adv) != one.y))
    assert (one.classifier, one.dataset, one.split) == ("anet", "mnist5k", "test")


@pytest.mark.parametrize(
    ("name", "settings"), [("bim", {"steps": 3}), ("square", {"queries": 3})]
)  # fmt: skip
def test_an_attack_that_was_killed_takes_up_where_it_was(
    name: str, settings: dict[str, Any], cold: Built, root: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = AttackSettings(name, {"target": "random", **settings})
    monkeypatch.setattr(attacks, "SIGN_FAMILY", ())  # as an attack that takes its time
    monkeypatch.setattr(building, "BLOCK", 7)
    whole = Lab("smoke", store=cold.lab.store).adversarial_set(wanted)
    asked: list[int] = []

    def stops(net: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
        if sum(asked) == 14 and not resumed:
            raise KeyboardInterrupt
        asked.append(len(x))
        return real(net, x, y, **settings)

    real, resumed = ATTACKS[name], False
    monkeypatch.setitem(ATTACKS, name, stops)
    copy = Store(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        Lab("smoke", store=copy).adversarial_set(wanted)
    assert asked == [7, 7]
    resumed = True
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(
        building, "shown", lambda _: nullcontext(lambda a, b, _: told.append((a, b)))
    )
    taken_up = Lab("smoke", store=copy).adversarial_set(wanted)
    assert asked == [7, 7, 2]
    assert told[-1] == (16, 16)
    assert torch.equal(taken_up.x_adv, whole.x_adv)
    assert torch.equal(taken_up.success, whole.success)
    assert not list(copy.root.rglob("checkpoint*.safetensors"))


def test_progress_goes_to_the_file_asked_for(cold: Built) -> None:
    cold.lab.adversarial_set("fgsm", eps=0.02)
    log = Path(os.environ["UNFOOL_PROGRESS"])
    assert "fgsm on anet, test: 16/16" in log.read_text("utf-8")


# --- the record -----------------------------------------------------------------------------------

SCHEMA_1 = """schema, id, dataset, fingerprint, profile, classifier, defense, attack,
attack_settings, knowledge, access, seed, n_images, n_attacked, attack_success,
l0_median, l2_median, linf_median,
clean_accuracy, recovered_accuracy, recovered_low, recovered_high, end_to_end_accuracy,
defended_clean_accuracy, rejected, targeted_outcome, seconds, passes, device, versions, git,
warnings"""


def test_a_record_has_every_field_of_schema_1(cold: Built) -> None:
    record = cold.record()
    path = Path(os.environ["UNFOOL_RECORDS"])
    line = json.loads(path.read_text("utf-8").splitlines()[-1])
    assert set(re.findall(r"\w+", SCHEMA_1)) <= line.keys()
    assert read_records(path)[-1] == record == cold.lab.records[-1]
    assert line["schema"] == 1
    assert (line["dataset"], line["profile"], line["classifier"]) == ("mnist5k", "smoke", "anet")
    assert (line["defense"], line["attack"]) == ("pix2pix", "fgsm")
    assert line["fingerprint"] == cold.lab.data.fingerprint
    assert line["saw_attack_in_training"] is True
    assert line["seconds"] > 0
    assert {"unfool", "torch", "python"} <= line["versions"].keys()
    assert "only" in line["warnings"][0]  # 16 images are few


def test_each_defence_is_named_in_its_record(cold: Built) -> None:
    nothing = cold.lab.evaluate(cold.lab.defense("none"), cold.adversarial)
    washed = cold.lab.evaluate(cold.lab.defense("threshold", level=0.4), cold.adversarial)
    own = cold.lab.evaluate(nn.Identity(), cold.adversarial)
    assert [r.defense for r in (nothing, washed, own)] == ["none", "threshold", "Identity"]
    assert washed.defense_settings == {"level": 0.4}
    strength = {
        name: cold.lab.evaluate(cold.lab.defense(name), cold.adversarial).defense_settings
        for name in ("threshold", "bits", "median", "blur", "jpeg")
    }
    assert strength == {  # where the default is taken, the record still says how strong it was
        "threshold": {"level": 0.5}, "bits": {"bits": 3}, "median": {"size": 3},
        "blur": {"sigma": 1.0}, "jpeg": {"quality": 75},
    }  # fmt: skip
    assert not washed.saw_attack_in_training
    assert nothing.recovered_accuracy == own.recovered_accuracy == 0
    assert nothing.clean_difference == 0
    assert len({r.id for r in (nothing, washed, own)}) == 3


# --- names that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "classrom"}, "unknown profile 'classrom': choose from smoke, classroom"),
        ({"dataset": "minst"}, "unknown data set 'minst'; did you mean 'mnist'"),
        ({"seed": -1}, "seed must be >= 0, not -1"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5 (float)"),
        ({"seed": "1"}, "seed must be a whole number, not '1' (str)"),
        ({"seed": True}, "seed must be a whole number, not True (bool)"),
        ({"device": "gpu"}, "unknown device 'gpu': choose auto, cpu or cuda"),
    ],
)
def test_a_lab_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Lab(**{"profile": "smoke", **arguments})


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_no_silent_cpu(device: str) -> None:
    with pytest.raises(
        ValueError, match=rf"device='{device}'.*torch sees no GPU: use device='cpu'"
    ):
        Lab("smoke", device=device)
    assert find_device("auto") == torch.device("cpu")


def test_unknown_names_list_those_there_are(cold: Built) -> None:
    lab = cold.lab
    for ask, message in [
        (lambda: lab.classifier("annet"), "unknown classifier 'annet': choose from anet"),
        (lambda: lab.defense("pix3pix"), "unknown defence 'pix3pix': choose from none, threshold"),
        (lambda: lab.adversarial_set("fgms"), "unknown attack 'fgms': choose from fgsm"),
        (lambda: lab.adversarial_set("fgsm", split="tset"), "unknown split 'tset': choose from tr"),
        (lambda: lab.split("all"), "unknown split 'all'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(TypeError, match="epsilon"):
        lab.adversarial_set("fgsm", epsilon=0.1)
    with pytest.raises(TypeError, match="bit"):
        lab.defense("bits", bit=3)
    with pytest.raises(ValueError, match="bits is a whole number from 1 to 8, not 12"):
        lab.defense("bits", bits=12)
    with pytest.raises(ValueError, match="unknown noise 'pepper'"):
        lab.defense("denoiser", noise="pepper")


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (torch.tensor([1, 2, 3]), r"a tensor of shape \(3,\)"), (3, "3"), ([1, 2], r"\[1, 2\]"),
        ("rnadom", "rnadom"),
    ],
)  # fmt: skip
def test_a_target_of_ones_own_is_refused_with_the_remedy(
    cold: Built, target: Any, named: str
) -> None:
    message = rf'must be "random" or None, not {named}: .* unfool\.attacks\.bim\(net, x, y, target='
    with pytest.raises(ValueError, match=message):
        cold.lab.adversarial_set("bim", target=target)
    with pytest.raises(ValueError, match=message):
        cold.lab.adversarial_set(AttackSettings("bim", {"target": target}))


def test_a_random_target_and_none_are_let_through(cold: Built) -> None:
    """The control: the refusal sees what is given, not that there is a target."""
    aimed = cold.lab.adversarial_set("bim", target="random", steps=1)
    assert aimed.target is not None
    assert (aimed.target != aimed.y).all()
    assert cold.lab.adversarial_set("bim", target=None, steps=1).target is None


# --- what must not be measured --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": "bnet"}, "made on 'bnet', not on 'anet': pass transfer=True"),
        ({"seed": 1}, "with seed 1, on another 'anet' than that of seed 0: pass transfer=True"),
        ({"dataset": "mnist-m", "fingerprint": "x"}, "made from 'mnist-m', not from 'mnist5k'.*tr"),
    ],
)
def test_a_set_of_others_needs_to_be_meant(
    cold: Built, change: dict[str, Any], message: str
) -> None:
    foreign: AdversarialSet = replace(cold.adversarial, **change)
    with pytest.raises(ValueError, match=message):
        cold.lab.evaluate(None, foreign)
    record = cold.lab.evaluate(None, foreign, transfer=True)
    assert record.n_images == len(foreign)
    assert (record.dataset, record.fingerprint) == (foreign.dataset, foreign.fingerprint)


def test_a_set_of_other_classes_fits_no_lab(cold: Built) -> None:
    foreign = replace(cold.adversarial, dataset="pets", classes=("cat", "dog", "emu", "yak"))
    message = r"4 classes \(cat, dog, emu, …\), and mnist5k of 10 .*\(0, 1, 2, …\).*lab of 'pets'"
    with pytest.raises(ValueError, match=message):
        cold.lab.evaluate(None, foreign, transfer=True)
    assert cold.adversarial.classes == cold.lab.data.classes  # the control: it is measured


class Bad(nn.Module):
    """A purifier that returns whatever it is told to."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> Tensor:
        return self.make(images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:, :, 1:], r"Bad returns \(4, 1, 27, 28\).*a purifier keeps both"),
        (lambda x: x + 1, r"Bad leaves \[0, 1\], to .*end it with clamp"),
        (lambda x: x / 0 * 0, r"Bad returns NaN at \d+ pixels"),
        (lambda x: x @ x[:, :, 1:], r"Bad fails on images \(4, 1, 28, 28\).*RuntimeError"),
    ],
)
def test_a_module_of_ones_own_is_tried_before_it_is_measured(
    cold: Built, make: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cold.lab.evaluate(Bad(make), cold.adversarial)
    assert cold.lab.evaluate(Bad(lambda x: x), cold.adversarial).defense == "Bad"


class Counts(nn.Module):
    """A purifier that answers otherwise from call to call."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images / self.calls


def test_a_module_with_a_state_is_not_measured(cold: Built) -> None:
    norm, before = nn.Sequential(nn.BatchNorm2d(1), nn.Sigmoid()), len(cold.lab.records)
    for module, message in (
        (Counts().eval(), "Counts holds a state between calls"),
        (norm, r"Sequential is in train mode: call Sequential\.eval\(\) first"),
        (nn.Conv2d(1, 1, 1).to("meta"), r"Conv2d is on meta and x on cpu: .*\.to\(device"),
    ):
        with pytest.raises(ValueError, match=message):
            cold.lab.evaluate(module, cold.adversarial)
    assert len(cold.lab.records) == before
    assert cold.lab.evaluate(norm.eval(), cold.adversarial).defense == "Sequential"  # the control


def test_nan_at_an_image_that_was_not_tried_is_told_as_well(cold: Built) -> None:
    late = Bad(lambda x: x.where(x != x[-1:], torch.nan) if len(x) > 4 else x)
    with pytest.raises(ValueError, match=r"returns NaN for \d+ of 16 images: look for"):
        cold.lab.evaluate(late, cold.adversarial)


def test_a_defence_of_others_needs_to_be_meant(cold: Built, root: Path) -> None:
    lab = cold.lab
    other = lab.adversarial_set("fgsm", classifier="bnet")
    with pytest.raises(ValueError, match="trained for 'anet', not for 'bnet': pass transfer=True"):
        lab.evaluate(cold.pure, other, classifier="bnet")
    assert lab.evaluate(cold.pure, other, classifier="bnet", transfer=True).trained_for == "anet"
    near = Lab("smoke", store=Store(root))
    near.data = replace(near.data, name="near", fingerprint="another")  # of the same size
    here = replace(cold.adversarial, dataset="near", fingerprint="another")
    with pytest.raises(ValueError, match="trained on 'mnist5k', not on 'near': pass transfer=True"):
        near.evaluate(cold.pure, here)
    assert near.evaluate(cold.pure, here, transfer=True).defense == "pix2pix"


def test_nothing_to_attack_is_told(cold: Built) -> None:
    lab, none = cold.lab, torch.zeros(16, dtype=torch.bool)
    for images, error in (
        (0, "images must be >= 1, not 0"),
        (1.5, "images must be a whole number"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            lab.adversarial_set("fgsm", images=images)
    with pytest.raises(ValueError, match="holds no images: nothing can be measured"):
        lab.evaluate(None, cold.adversarial.first(0))
    lost = lab.evaluate(None, replace(cold.adversarial, attacked=none, success=none))
    assert lost.recovered_accuracy is None
    assert any("gets no image right" in warning for warning in lost.warnings)
    whole = lab.evaluate(None, cold.adversarial)  # the control
    assert not any("gets no image right" in warning for warning in whole.warnings)


def test_images_of_another_size_fit_no_lab(cold: Built) -> None:
    wide = replace(cold.adversarial, x=torch.rand(16, 3, 32, 32), x_adv=torch.rand(16, 3, 32, 32))
    with pytest.raises(ValueError, match=r"holds images \(3, 32, 32\), but mnist5k has \(1, 28"):
        cold.lab.evaluate(None, wide, transfer=True)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of committed weights: one bfloat16 anet, by its word trained on two data sets."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(committed, "WEIGHTS", folder)
    net = classifiers.build("anet", (1, 28, 28), seed=3)
    half = {k: v.bfloat16() for k, v in net.state_dict().items()}
    for dataset in ("mnist", "mnist5k"):
        made = {"classifier": "anet", "classes": 10, "shape": [1, 28, 28], "dataset": dataset}
        save_tensors(folder / f"anet-{dataset}.safetensors", half, made | {"history": []})
    return folder


def test_a_model_that_has_seen_the_test_digits_is_refused(weights: Path, root: Path) -> None:
    lab = Lab("smoke", store=Store(root))
    honest = lab.adversarial_set("fgsm", classifier="anet-mnist5k")  # the control: same weights
    assert 0 <= lab.accuracy("anet-mnist5k") <= 1
    assert lab.evaluate(None, honest, classifier="anet-mnist5k").classifier == "anet-mnist5k"
    for measured in (
        lambda: lab.accuracy("anet-mnist"),
        lambda: lab.adversarial_set("fgsm", classifier="anet-mnist"),
        lambda: lab.evaluate(None, honest, classifier="anet-mnist", transfer=True),
    ):
        with pytest.raises(ValueError, match="'mnist' has seen the test digits of 'mnist5k'"):
            measured()
    larger = Lab("smoke", store=Store(root))
    larger.dataset = "mnist"  # it is the set's images that were seen, whatever the lab's are
    with pytest.raises(ValueError, match="'mnist' has seen the test digits of 'mnist5k'"):
        larger.evaluate(None, honest, classifier="anet-mnist", transfer=True)
    assert len(lab.adversarial_set("fgsm", classifier="anet-mnist", split="train")) == 32


def test_committed_weights_are_listed_and_used_in_float32(weights: Path, root: Path) -> None:
    assert committed_weights() == ["anet-mnist", "anet-mnist5k"]
    net = Lab("smoke", store=Store(root)).classifier("anet-mnist5k")
    fresh = classifiers.build("anet", (1, 28, 28), seed=3).state_dict()
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, fresh[name].bfloat16().float())
    (weights / "anet-mnist.safetensors").unlink()
    assert committed_weights() == ["anet-mnist5k"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 7}, "tells 7 classes apart, but mnist5k has 10: choose one"),
        ({"shape": [3, 32, 32]}, r"takes images of shape \(3, 32, 32\), but mnist5k has \(1, 28"),
        ({"classifier": "bnet"}, "holds no weights of 'bnet' for images .*commit_weights.*git"),
        ({"classes": None}, "does not say its classes: write it anew"),
        ({}, ""),
    ],
)
def test_committed_weights_of_something_else_are_one_clear_error(
    weights: Path, root: Path, change: dict[str, Any], message: str
) -> None:
    path = weights / "anet-mnist5k.safetensors"
    tensors, made = load_tensors(path)
    save_tensors(path, tensors, {k: v for k, v in (made | change).items() if v is not None})
    lab = Lab("smoke", store=Store(root))
    if not message:  # the control
        assert lab.classifier("anet-mnist5k")
        return
    with pytest.raises(ValueError, match=message):
        lab.classifier("anet-mnist5k")


def test_weights_are_committed_with_what_they_were_made_from(
    cold: Built, weights: Path, root: Path
) -> None:
    for path in weights.iterdir():
        path.unlink()
    path = commit_weights(cold.lab, "anet")
    tensors, made = load_tensors(path)
    assert path == weights / "anet-mnist5k.safetensors"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (made["dataset"], made["fingerprint"]) == ("mnist5k", cold.lab.data.fingerprint)
    lab = Lab("smoke", seed=5, store=Store(root))
    assert lab.accuracy("anet-mnist5k") == made["test_accuracy"]  # seed 5 trains nothing


def test_weights_from_somebodys_folder_name_no_path(
    cold: Built, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold.lab.classifier("anet")
    monkeypatch.setattr(cold.lab, "data", replace(cold.lab.data, name="folder:pets.zip"))
    monkeypatch.setattr(cold.lab, "dataset", "folder:/home/me/pets.zip")
    path = commit_weights(cold.lab, "anet")
    assert path == weights / "anet-pets.safetensors"
    assert b"/home/me" not in path.read_bytes()
    assert load_tensors(path)[1]["dataset"] == "folder:pets.zip"


def test_committed_weights_of_another_shape_are_refused(weights: Path, root: Path) -> None:
    net = classifiers.build("anet", (3, 32, 32))
    made = {"classifier": "anet", "classes": 10, "shape": [3, 32, 32], "dataset": "cifar10"}
    save_tensors(weights / "anet-cifar10.safetensors", net.state_dict(), made)
    with pytest.raises(ValueError, match=r"takes images of shape \(3, 32, 32\), but mnist5k has"):
        Lab("smoke", store=Store(root)).classifier("anet-cifar10")


def test_a_purifier_is_committed_with_what_it_was_made_from(weights: Path, root: Path) -> None:
    lab = Lab("smoke", store=Store(root))
    own = lab.defense("pix2pix", classifier="anet-mnist5k")
    assert own is not None
    path = commit_purifier(lab, "anet-mnist5k")
    tensors, made = load_tensors(path)
    assert path == weights / "pix2pix-anet-mnist5k.safetensors"
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    assert (made["profile"], made["fingerprint"]) == ("smoke", lab.data.fingerprint)
    assert (committed_purifiers(), committed_weights()) == (
        ["anet-mnist5k"],
        ["anet-mnist", "anet-mnist5k"],  # a purifier is no classifier
    )
    other = Lab("smoke", seed=5, store=Store(root))  # of seed 5 the store holds no purifier
    ready = other.defense("pix2pix", classifier="anet-mnist5k", committed=True)
    assert ready is not None
    ours = own.state_dict()
    for name, tensor in ready.state_dict().items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor, ours[name].to(tensors[name].dtype).to(tensor.dtype))
    attacked = other.adversarial_set("fgsm", classifier="anet-mnist5k")
    record = other.evaluate(ready, attacked, classifier="anet-mnist5k")
    assert record.defense_settings == lab.settings_of(own) | {"committed": True}
    assert (record.trained_for, record.saw_attack_in_training) == ("anet-mnist5k", True)
    assert record.learned_from == [attack.name for attack in paper_attacks("mnist5k")]


def test_a_committed_purifier_is_taken_as_it_is_or_refused(weights: Path, root: Path) -> None:
    lab = Lab("smoke", store=Store(root))

    def ready(**settings: Any) -> nn.Module | None:
        return lab.defense("pix2pix", classifier="anet-mnist5k", committed=True, **settings)

    with pytest.raises(ValueError, match=r"no purifier of 'anet-mnist5k' ships.*from none, or"):
        ready()
    with pytest.raises(ValueError, match="weights of 'anet' are not committed: choose from anet-"):
        commit_purifier(lab, "anet")
    path = commit_purifier(lab, "anet-mnist5k")
    assert ready() is not None  # the control
    for settings, word in (
        ({"epochs": 2}, "epochs"),
        ({"attacks": paper_attacks("mnist5k")}, "attacks"),
    ):
        with pytest.raises(ValueError, match=f"as it ships, so {word} can't be set: leave it out"):
            ready(**settings)
    tensors, made = load_tensors(path)
    for change, message in (
        ({"fingerprint": "x", "dataset": "emnist"}, r"from 'emnist', and this lab .*Lab\(dataset="),
        ({"settings": None}, "does not say its settings: write it anew with .*commit_purifier"),
        ({"settings": made["settings"] | {"width": 4}}, "holds no purifier of width 4.*with git"),
    ):
        changed = {k: v for k, v in (made | change).items() if v is not None}
        save_tensors(path, tensors, changed)
        with pytest.raises(ValueError, match=message):
            ready()


# --- what is shown --------------------------------------------------------------------------------


def test_claims_are_asserted_where_they_can_hold(
    cold: Built, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    smoke, classroom = cold.lab, Lab("classroom", store=Store(tmp_path / "none"))
    smoke.check("the net is good", False)
    smoke.check("seeds are equal", True, always=True)
    classroom.check("the net is good", torch.tensor(True))
    assert capsys.readouterr().out.splitlines() == [
        "check seen the net is good",
        "check ok   seeds are equal",
        "check ok   the net is good",
    ]
    for lab, always in ((classroom, False), (smoke, True)):
        with pytest.raises(AssertionError, match="does not hold here: the net is good"):
            lab.check("the net is good", False, always=always)
    assert capsys.readouterr().out == ""


def test_a_figure_is_shown_with_its_words(
    cold: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **more: shown.append((data, more)))
    figure = bars(["3", "8"], [0.25, 0.75], xlabel="confidence", caption="what it believes")
    cold.lab.show(figure)
    ((data, more),) = shown
    assert data == {"image/png": figure.png(), "text/plain": figure.alt}
    assert more["metadata"] == {"image/png": {"alt": figure.alt}}
    assert more["raw"] is True
    assert capsys.readouterr().out == "Figure: what it believes\n"


def test_the_setup_line_is_one_line_and_tells_no_path(cold: Built) -> None:
    line = repr(cold.lab)
    assert "\n" not in line
    assert "/" not in line
    for part in ("smoke", "mnist5k", "1x28x28", "seed 0", "cpu"):
        assert part in line


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configs of what is asked of the store by `_from_store`; nothing is trained."""
    seen: list[dict[str, Any]] = []

    def note(_: Lab, kind: str, config: dict[str, Any], *__: object, **___: object) -> object:
        seen.append(config)
        return {"key": artifact_key(config), "history": []}

    monkeypatch.setattr(building, "_from_store", note)
    return seen


def folder_set(path: Path) -> str:
    """A data set of two classes of 20 colour images each."""
    for c, name in enumerate(("cat", "dog")):
        (path / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (32, 32), (i * 5, c * 100, 0)).save(path / name / f"{i}.png")
    return f"folder:{path}"


def test_a_folder_that_was_moved_gives_the_same_key(
    tmp_path: Path, keyed: list[dict[str, Any]]
) -> None:
    store = Store(tmp_path / "store")
    for place in ("here", "cifar10-course"):
        lab = Lab("smoke", dataset=folder_set(tmp_path / place / "pets"), store=store)
        lab.classifier("resnet8")
    assert keyed[0] == keyed[1]
    assert keyed[0]["dataset"] == "folder:pets"
    assert "flip" not in keyed[1]["recipe"]  # a folder above them makes no photographs of them
    Lab("smoke", dataset=folder_set(tmp_path / "cifar10-small"), store=store).classifier("resnet8")
    assert keyed[2]["recipe"]["flip"]


def test_the_keys_of_named_sets_stay(root: Path, keyed: list[dict[str, Any]]) -> None:
    lab = Lab("smoke", store=Store(root))
    lab.classifier("anet")
    lab.data = replace(lab.data, fingerprint="f")
    lab.classifier("b")
    assert keyed[0]["dataset"] == "mnist5k"
    assert artifact_key(keyed[1]) == "b-mnist5k-5d7360d24aa0523a"


def test_a_name_with_relu_has_the_recipe_of_the_name_without(
    root: Path, keyed: list[dict[str, Any]]
) -> None:
    lab = Lab("smoke", store=Store(root))
    recipes = {}
    for name in ("anet", "anet+relu", "b"):
        lab.defense("finetuned", classifier=name)
        recipes[name] = keyed[-1]["recipe"]
        lab.defense("adversarial_fgsm", classifier=name)
        assert keyed[-1]["classifier"] == name.removesuffix("+relu")
    assert recipes["anet"] == recipes["anet+relu"] != recipes["b"]


def test_in_colour_magnet_belongs_to_the_classifier_that_it_asks(
    tmp_path: Path, root: Path, keyed: list[dict[str, Any]]
) -> None:
    colour = Lab("smoke", dataset=folder_set(tmp_path / "pets"), store=Store(tmp_path / "store"))
    for lab, belongs in ((colour, "resnet8"), (Lab("smoke", store=Store(root)), "")):
        defense = lab.defense("magnet", classifier="resnet8", joint=False, false_positives=0.5)
        assert defense is not None
        assert lab._known[defense]["classifier"] == belongs


def test_committed_weights_take_the_papers_last_layer(weights: Path, root: Path) -> None:
    lab = Lab("smoke", store=Store(root))
    plain, clipped = (lab.classifier("anet-mnist5k", relu_logits=relu) for relu in (False, True))
    assert clipped is lab.classifier("anet-mnist5k+relu")
    x = lab.data.test.images[:8]
    with torch.no_grad():
        assert torch.equal(clipped(x), plain(x).relu())
        assert float(plain(x).min()) < 0
    keys = [lab._known[net]["key"] for net in (plain, clipped)]
    assert keys == [keys[0], f"{keys[0]}+relu"]


def test_what_was_made_from_other_committed_weights_is_not_taken(weights: Path, root: Path) -> None:
    def attacked_images() -> Tensor:
        made = Lab("smoke", store=Store(root)).adversarial_set("fgsm", classifier="anet-mnist5k")
        return made.x_adv

    first = attacked_images()
    assert torch.equal(attacked_images(), first)  # the control
    tensors, made = load_tensors(weights / "anet-mnist5k.safetensors")
    upside_down = {k: -v if k == "0.weight" else v for k, v in tensors.items()}
    save_tensors(weights / "anet-mnist5k.safetensors", upside_down, made)
    assert not torch.equal(attacked_images(), first)


def test_a_damaged_block_of_an_attack_is_made_anew(cold: Built, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-0.safetensors").write_bytes(b"half")
    wanted, part = AttackSettings("fgsm", {"eps": 0.15}), cold.lab.data.test.first(4)
    with pytest.warns(UserWarning, match="is damaged"):
        made = building.attacked(cold.lab, cold.net, wanted, part, tmp_path, silent)
    assert torch.equal(made["x_adv"], cold.adversarial.x_adv[:4])


def test_what_was_not_trained_has_no_history(cold: Built) -> None:
    washer = cold.lab.defense("bits")
    assert washer is not None
    for module in (washer, nn.Identity()):
        with pytest.raises(ValueError, match="has no history of losses: ask for that of a classif"):
            cold.lab.history(module)
    assert cold.lab.history(cold.pure)  # the control
