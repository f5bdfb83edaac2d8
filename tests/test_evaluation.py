"""Measures against known answers, intervals and tests against scipy and hand-worked values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

from unfool import evaluation
from unfool.evaluation import (
    DETECTION,
    AdversarialSet,
    Record,
    accuracy,
    append_record,
    by_change,
    distortion,
    drift,
    holm,
    margin,
    mcnemar,
    mean_of_seeds,
    measure,
    paired_difference,
    predict,
    read_records,
    recovered,
    reproduced,
    wilson,
)

Make = Callable[[int], nn.Module]


# --- how sure we are ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, share: float, confidence: float) -> None:
    right = round(share * n)
    theirs = binomtest(right, n).proportion_ci(confidence, method="wilson")
    assert wilson(right, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    for right, n in ((-1, 5), (6, 5), (1, 0)):
        with pytest.raises(ValueError, match=f"not {right} of {n}"):
            wilson(right, n)


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[Tensor, Tensor]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a, dtype=torch.bool), torch.tensor(b, dtype=torch.bool)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 / 2
        (5, 0, 2 / 32),
        (9, 1, 22 / 1024),  # 2 (1 + 10) / 2^10
        (8, 2, 112 / 1024),  # 2 (1 + 10 + 45) / 2^10
        (5, 5, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    a, b = answers(30, only_a, only_b, 7)
    assert mcnemar(a, b) == pytest.approx(p, abs=1e-12)
    assert mcnemar(b, a) == pytest.approx(p, abs=1e-12)
    assert mcnemar(*answers(3000, only_a, only_b, 0)) == pytest.approx(p)  # concordant: no say


def test_paired_difference_by_hand() -> None:
    # Bonett and Price with n = 100, 12 and 4 discordant: p = 13/102, q = 5/102.
    value, low, high = paired_difference(*answers(70, 12, 4, 14))
    half = 1.959963985 * math.sqrt((13 / 102 + 5 / 102 - (8 / 102) ** 2) / 102)
    assert (value, low, high) == pytest.approx((0.08, 8 / 102 - half, 8 / 102 + half), abs=1e-9)


def test_mean_of_seeds_by_hand() -> None:
    # Student's 97.5 % quantile for two degrees of freedom is 4.3027.
    mean, low, high = mean_of_seeds([0.1, 0.2, 0.3])
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
    assert mean_of_seeds([0.1, 0.2, 0.3], confidence=0.9)[1] > low
    with pytest.raises(ValueError, match="needs two or more, not 1"):
        mean_of_seeds([0.1])


@settings(max_examples=40, deadline=None)
@given(cells=st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_paired_difference_is_symmetric_and_in_range(cells: tuple[int, int, int, int]) -> None:
    a, b = answers(*cells)
    value, low, high = paired_difference(a, b)
    assert -1 <= low <= value <= high <= 1
    assert paired_difference(b, a) == pytest.approx((-value, -high, -low), abs=1e-12)
    assert value == pytest.approx(float(a.float().mean() - b.float().mean()), abs=1e-6)


def test_paired_difference_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        cells = rng.multinomial(60, [0.7, 0.15, 0.05, 0.1])
        _, low, high = paired_difference(*answers(*cells.tolist()))
        covered += low <= 0.10 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_answers_that_cannot_be_compared_are_refused() -> None:
    a, b = answers(3, 1, 1, 1)
    for x, y in ((a, b[:-1]), (a.float(), b), (a, b.long())):
        for compare in (mcnemar, paired_difference):
            with pytest.raises(ValueError, match="two bool tensors"):
                compare(x, y)
    with pytest.raises(ValueError, match="no images"):
        paired_difference(a[:0], b[:0])


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 -> 4 x .005, 3 x .01, 2 x .03, then 1 x .04 raised to .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


# --- sizes of perturbations -----------------------------------------------------------------------


def test_distortion_is_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 4, 6, generator=generator)
    changed = torch.rand(5, 1, 4, 6, generator=generator) < 0.4
    one_channel = torch.rand(5, 3, 4, 6, generator=generator) < 0.5
    x_adv = torch.where(changed & one_channel, 1 - x, x)
    got = {k: v.numpy() for k, v in distortion(x, x_adv).items()}
    delta = (x_adv - x).numpy()
    flat = delta.reshape(5, -1)
    assert got["l0"].tolist() == (delta != 0).any(axis=1).sum(axis=(1, 2)).tolist()
    assert got["l0"].max() < (flat != 0).sum(axis=1).max()  # channels do not count apart
    assert np.allclose(got["l1"], np.abs(flat).mean(axis=1))
    assert np.allclose(got["l2"], np.linalg.norm(flat, axis=1))
    assert np.allclose(got["linf"], np.abs(flat).max(axis=1))
    assert all(not v.any() for v in distortion(x, x).values())
    assert all(len(v) == 0 for v in distortion(x[:0], x[:0]).values())


# --- predictions ----------------------------------------------------------------------------------


def test_predict_moves_nothing_and_comes_out_of_eval_mode(tiny: Make) -> None:
    net, x = tiny(0).train(), torch.rand(10, 1, 8, 8)
    net[1].eval()  # mixed modes: a plain net.train() would not do
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    got = predict(net, x)
    assert [m.training for m in net] == [True, False, True, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert got.dtype == torch.int64
    assert torch.equal(got, net.eval()(x).argmax(1))


def test_modes_come_back_after_an_error(tiny: Make) -> None:
    net = tiny(0).train()
    with pytest.raises(RuntimeError):
        predict(net, torch.rand(2, 5, 8, 8))
    assert net.training


def test_chunks_do_not_change_a_prediction(tiny: Make) -> None:
    net, x = tiny(0), torch.rand(10, 1, 8, 8)
    assert torch.equal(predict(net, x, chunk=3), predict(net, x))
    assert predict(net, x[:0]).tolist() == []


def test_passes_are_counted_image_by_image(tiny: Make, toy: tuple[Tensor, Tensor]) -> None:
    net, x = tiny().eval(), toy[0][:3]
    with evaluation.counted(net) as passes:
        evaluation.predict(net, x)
        assert (passes.forward, passes.backward, passes.total) == (3, 0, 3)
        images = x.clone().requires_grad_(True)
        logits = net(images)
        torch.autograd.grad(logits[:, 0].sum(), images, retain_graph=True)
        torch.autograd.grad(logits[:, 1].sum(), images)
        assert (passes.forward, passes.backward, passes.total) == (6, 6, 12)
    evaluation.predict(net, x)  # the control: nobody counts any more
    assert passes.total == 12


def test_counting_ends_with_an_error(tiny: Make, toy: tuple[Tensor, Tensor]) -> None:
    net = tiny().eval()
    with pytest.raises(RuntimeError, match="broke"), evaluation.counted(net):
        raise RuntimeError("it broke")
    assert not net._forward_hooks


def test_accuracy_is_a_share(tiny: Make, toy: tuple[Tensor, Tensor]) -> None:
    net, (x, _) = tiny(0), toy
    y = predict(net, x)
    assert accuracy(net, x, y) == 1.0
    assert accuracy(net, x, torch.cat([y[:45], y[45:] + 1])) == 0.75
    with pytest.raises(ValueError, match="the split is empty"):
        accuracy(net, x[:0], y[:0])


# --- one evaluation, by hand ----------------------------------------------------------------------


class Lookup(nn.Module):
    """A classifier that reads its answer: pixel value 0.1 k is class k."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x.flatten(1)[:, 0] * 10).round().long(), 10).float()


class Repair(nn.Module):
    """A purifier that looks up what an image becomes: answer before -> answer after."""

    def __init__(self, table: dict[int, int]) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        answers = (x.flatten(1)[:, 0] * 10).round().long().tolist()
        after = torch.tensor([self.table.get(a, a) / 10 for a in answers])
        return after.view(-1, 1, 1, 1).expand_as(x)


def pictures(answers: list[int]) -> Tensor:
    return (torch.tensor(answers) / 10).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)


#   image        0  1  2  3  4  5  6  7
TRUTH = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
CLEAN = [0, 1, 2, 3, 4, 5, 6, 9]  # 7 is wrong from the start: nothing to attack
ATTACKED = [8, 8, 9, 9, 4, 5, 8, 1]  # 0, 1, 2, 3 and 6 are fooled; 4 and 5 hold


def hand_made(attacked: list[int] = ATTACKED, **more: Any) -> AdversarialSet:
    x, x_adv = pictures(CLEAN), pictures(attacked)
    right, now = torch.tensor(CLEAN) == TRUTH, torch.tensor(attacked)
    success = right & (now != TRUTH)
    if "target" in more:
        success = right & (now == more["target"])
    return AdversarialSet(x, x_adv, TRUTH, right, success, attack="by hand", split="test", **more)


def test_measures_of_no_defence_by_hand() -> None:
    got = measure(Lookup(), None, hand_made())
    assert got["n_images"] == 8
    assert got["n_attacked"] == 7
    assert got["n_success"] == 5
    assert got["attack_success"] == pytest.approx(5 / 7)
    assert got["clean_accuracy"] == got["defended_clean_accuracy"] == pytest.approx(7 / 8)
    assert got["recovered_accuracy"] == 0
    assert (got["recovered_low"], got["recovered_high"]) == pytest.approx(wilson(0, 5))
    assert got["end_to_end_accuracy"] == pytest.approx(2 / 8)
    assert got["clean_difference"] == 0
    assert got["clean_difference_low"] < 0 < got["clean_difference_high"]
    assert got["targeted_outcome"] is None
    # Answers moved by 8, 7, 7, 6, 2 tenths, in each of the 4 pixels.
    assert got["linf_median"] == pytest.approx(0.7)
    assert got["l2_median"] == pytest.approx(1.4)
    assert got["l0_median"] == 4


def test_measures_of_a_defence_by_hand() -> None:
    # 8 -> 0 mends image 0 (and not 1, 6); 9 -> 3 mends image 3 (and not 2); 5 -> 9 breaks image 5;
    # image 7 becomes 3, still wrong.
    got = measure(Lookup(), Repair({8: 0, 9: 3, 5: 9}), hand_made())
    assert got["recovered_accuracy"] == pytest.approx(2 / 5)
    assert (got["recovered_low"], got["recovered_high"]) == pytest.approx(wilson(2, 5))
    assert got["end_to_end_accuracy"] == pytest.approx(3 / 8)  # images 0, 3, 4
    assert (got["end_to_end_low"], got["end_to_end_high"]) == pytest.approx(wilson(3, 8))
    assert got["clean_accuracy"] == pytest.approx(7 / 8)
    assert got["defended_clean_accuracy"] == pytest.approx(6 / 8)
    assert got["clean_difference"] == pytest.approx(-1 / 8)


def test_an_image_that_was_wrong_is_met_clean() -> None:
    """Nobody attacks an image that is wrong anyway: image 7 counts as its clean self becomes."""
    got = measure(Lookup(), Repair({9: 7}), hand_made())
    assert got["end_to_end_accuracy"] == pytest.approx(3 / 8)  # 4, 5 and now 7
    attacked = measure(Lookup(), Repair({1: 7}), hand_made())  # mends only its attacked self
    assert attacked["end_to_end_accuracy"] == pytest.approx(2 / 8)


def test_an_attack_that_never_succeeds_leaves_recovery_undefined() -> None:
    got = measure(Lookup(), Repair({}), hand_made(CLEAN))
    assert got["n_success"] == 0
    assert got["attack_success"] == 0
    assert got["recovered_accuracy"] is None
    assert (got["recovered_low"], got["recovered_high"]) == (0.0, 1.0)
    assert got["l0_median"] is got["l2_median"] is got["linf_median"] is None
    assert got["end_to_end_accuracy"] == pytest.approx(7 / 8)
    assert "NaN" not in json.dumps(got)


def test_the_first_images_of_a_set() -> None:
    whole = hand_made(target=torch.arange(len(ATTACKED)))
    few = whole.first(3)
    assert len(few) == 3
    for part in ("x", "x_adv", "y", "attacked", "success", "target"):
        assert torch.equal(getattr(few, part), getattr(whole, part)[:3])
    assert few.attack == whole.attack
    assert len(hand_made().first(10**6)) == len(whole)


class Refusing(Repair):
    """A purifier that refuses the images of some answers."""

    def __init__(self, table: dict[int, int], refused: set[int]) -> None:
        super().__init__(table)
        self.refused = refused

    def rejects(self, x: Tensor) -> Tensor:
        answers = (x.flatten(1)[:, 0] * 10).round().long().tolist()
        return torch.tensor([a in self.refused for a in answers], dtype=torch.bool)


def test_a_detecting_defence_is_scored_twice() -> None:
    """Successes 0, 1, 2, 3, 6 are met as 8, 8, 9, 9, 8; clean images as 0 … 6 and 9."""
    repaired = measure(Lookup(), Repair({8: 0, 9: 3}), hand_made())
    got = measure(Lookup(), Refusing({8: 0, 9: 3}, refused={9, 5}), hand_made())
    for name in ("recovered_accuracy", "end_to_end_accuracy", "defended_clean_accuracy"):
        assert got[name] == repaired[name]  # as if it refused none
    assert got["rejected"] == 2  # 2 and 3; 7, seen clean as 9, and 5 are no successes
    assert got["recovered_or_rejected"] == pytest.approx(3 / 5)  # 0 is mended, 2 and 3 refused
    assert got["false_positive_rate"] == pytest.approx(2 / 8)  # 5 and 7
    assert got["accepted_clean_accuracy"] == pytest.approx(6 / 8)  # 0 … 4 and 6
    assert repaired["rejected"] == 0
    assert not set(DETECTION) & repaired.keys()


def test_refusing_all_earns_nothing_on_clean_images() -> None:
    got = measure(Lookup(), Refusing({}, refused=set(range(10))), hand_made())
    assert got["recovered_or_rejected"] == got["false_positive_rate"] == 1
    assert got["accepted_clean_accuracy"] == 0
    nothing = measure(Lookup(), Refusing({}, refused={8}), hand_made(CLEAN))
    assert (nothing["rejected"], nothing["recovered_or_rejected"]) == (0, None)


def test_records_from_before_detection_are_read_and_keep_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    new = append_record(record(), path)
    old = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k not in DETECTION}
    path.write_text(json.dumps(old) + "\n", encoding="utf-8")
    assert read_records(path) == [new]
    counted = {k: v for k, v in old.items() if k not in ("seconds", "git", "versions", "device")}
    text = json.dumps(counted | {"id": ""}, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == new.id
    detecting = append_record(record(false_positive_rate=0.01), path)
    assert detecting.id != new.id
    assert read_records(path)[1].false_positive_rate == 0.01


def test_where_targeted_successes_end() -> None:
    target = torch.tensor([8, 8, 9, 9, 0, 0, 0, 0])  # hit by images 0 to 3
    adversarial = hand_made(target=target)
    assert adversarial.success.tolist() == [True] * 4 + [False] * 4
    assert measure(Lookup(), None, adversarial)["targeted_outcome"] == {
        "target": 4, "true": 0, "other": 0,
    }  # fmt: skip
    got = measure(Lookup(), Repair({8: 0, 9: 5}), adversarial)["targeted_outcome"]
    assert got == {"target": 0, "true": 1, "other": 3}
    hit = measure(Lookup(), Repair({8: 1}), adversarial)["targeted_outcome"]
    assert hit == {"target": 2, "true": 1, "other": 1}


def test_measuring_leaves_both_networks_in_eval_mode(tiny: Make) -> None:
    net, purifier = tiny(0).eval(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)).eval()
    x = torch.rand(6, 1, 8, 8)
    adversarial = AdversarialSet(
        x, 1 - x, predict(net, x), torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    )
    first = measure(net, purifier, adversarial)
    assert not any(m.training for m in [*net.modules(), *purifier.modules()])
    assert measure(net, purifier, adversarial) == first


def test_recovered_is_what_measure_says() -> None:
    adversarial = hand_made()
    for purifier in (Repair({8: 0}), nn.Identity()):
        share = measure(Lookup(), purifier, adversarial)["recovered_accuracy"]
        assert recovered(Lookup(), purifier, adversarial) == pytest.approx(share)
    nobody = replace(adversarial, success=torch.zeros_like(adversarial.success))
    with pytest.warns(UserWarning, match="by hand fooled none of .*: make it stronger") as told:
        assert math.isnan(recovered(Lookup(), Repair({8: 0}), nobody))
    assert [one.filename for one in told] == [__file__]


def test_margin_is_paired_and_over_the_best_rival() -> None:
    adversarial = hand_made()
    wrong = adversarial.success
    ways = [
        (int(a), int(b))
        for a, b in zip(adversarial.x_adv[wrong, 0, 0, 0] * 10 + 0.5, TRUTH[wrong], strict=True)
    ]
    whole, first = Repair(dict(ways)), Repair(dict(ways[:1]))
    share = recovered(Lookup(), whole, adversarial), recovered(Lookup(), first, adversarial)
    assert 0 < share[1] < share[0]
    rivals = {"nothing": nn.Identity(), "first": first}
    name, gap, low, high = margin(Lookup(), whole, rivals, adversarial)
    assert (name, gap) == ("first", pytest.approx(share[0] - share[1]))
    assert low < gap < high
    assert margin(Lookup(), first, {"whole": whole}, adversarial)[1] == pytest.approx(-gap)
    assert margin(Lookup(), whole, {"whole": whole}, adversarial)[1] == 0
    nobody = replace(adversarial, success=torch.zeros_like(adversarial.success))
    with pytest.raises(ValueError, match="nothing to recover"):
        margin(Lookup(), whole, rivals, nobody)
    with pytest.raises(ValueError, match="at least one"):
        margin(Lookup(), whole, {}, adversarial)


def seeds_of(*shares: float, n: int = 4000) -> list[Record]:
    return [record(seed=k, recovered_accuracy=share, n_success=n) for k, share in enumerate(shares)]


def test_reproduced_needs_the_interval_within_a_point() -> None:
    verdict, mean, low, high = reproduced(seeds_of(0.98), 0.98)
    assert (verdict, mean) == ("reproduced", 0.98)
    assert (low, high) == pytest.approx(wilson(3920, 4000, 0.9))
    assert reproduced(seeds_of(0.98), 0.95)[0] == "differs"
    assert reproduced(seeds_of(0.98), 0.999)[0] == "differs"
    assert reproduced(seeds_of(0.98), 0.988)[0] == "undecided"
    assert reproduced(seeds_of(0.98, n=50), 0.98)[0] == "undecided"  # too few images
    assert reproduced(seeds_of(0.95, 0.98, 0.995), 0.975)[0] == "undecided"  # seeds disagree
    assert reproduced(seeds_of(0.979, 0.98, 0.981), 0.98)[0] == "reproduced"
    assert reproduced(seeds_of(0.98), 0.95, margin=0.05)[0] == "reproduced"


def test_reproduced_widens_with_the_seeds_spread() -> None:
    _, _, low, high = reproduced(seeds_of(0.97, 0.98, 0.99), 0.98)
    half = 2.91999 * 0.01 / 3**0.5  # Student's t, 2 degrees of freedom, one-sided 5 %
    one_low, one_high = wilson(3920, 4000, 0.9)
    assert low == pytest.approx(0.98 - ((0.98 - one_low) ** 2 + half**2) ** 0.5, abs=1e-6)
    assert high == pytest.approx(
        min(1.0, 0.98 + ((one_high - 0.98) ** 2 + half**2) ** 0.5), abs=1e-6
    )


def test_reproduced_refuses_what_cannot_be_averaged() -> None:
    one, two = seeds_of(0.98, 0.97)
    with pytest.raises(ValueError, match="unknown measure 'x': choose from recovered, end_to_end"):
        reproduced([one, two], 0.98, measure="x")
    with pytest.raises(ValueError, match="0 records"):
        reproduced([], 0.98)
    with pytest.raises(ValueError, match="2 kinds"):
        reproduced([one, replace(two, attack="jsma")], 0.98)
    for name in ("attack_settings", "defense_settings"):
        with pytest.raises(ValueError, match="2 kinds"):
            reproduced([one, replace(two, **{name: {"eps": 0.3}})], 0.98)
    with pytest.raises(ValueError, match="1 of them without a success"):
        reproduced([one, replace(two, recovered_accuracy=None)], 0.98)
    with pytest.raises(ValueError, match=r"seeds \[0, 0\]"):
        reproduced([one, one], 0.98)


def test_drift_is_the_mean_distance_of_fooled_images_from_the_clean() -> None:
    x, success = torch.full((3, 1, 2, 2), 0.25), torch.tensor([True, False, True])
    x_adv = x + torch.tensor([0.5, 0.75, 0.25]).view(3, 1, 1, 1)
    one = AdversarialSet(x, x_adv, torch.zeros(3, dtype=torch.int64), success, success)
    assert drift(nn.Identity(), one) == pytest.approx(0.375)
    assert drift(Shift(-0.25), one) == pytest.approx(0.125)
    with pytest.warns(UserWarning, match="the attack fooled none of 2 attacked images"):
        assert math.isnan(drift(nn.Identity(), replace(one, success=torch.zeros_like(success))))


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


# --- records --------------------------------------------------------------------------------------


def record(**change: Any) -> Record:
    measured = measure(Lookup(), Repair({8: 0}), hand_made())
    return replace(
        Record(
            dataset="mnist5k", fingerprint="f", profile="smoke", classifier="anet",
            defense="threshold", attack="fgsm", attack_settings={"eps": 0.15}, knowledge="f",
            access="gradients", seed=0, seconds=1.0, passes=None, device="cpu",
            versions={"torch": "2"}, git="abc", warnings=["so ε"], **measured,
        ),
        **change,
    )  # fmt: skip


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "records.jsonl"
    first = append_record(record(), path)
    second = append_record(record(seed=1, recovered_accuracy=None), path)
    assert read_records(path) == [first, second]
    assert replace(first, id="") == record()
    assert len(path.read_text("utf-8").splitlines()) == 2
    assert second.recovered_accuracy is None


def test_an_id_names_the_result_and_not_the_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"

    def identity(**change: Any) -> str:
        return append_record(record(**change), path).id

    first = identity()
    assert len(first) == 12
    assert identity() == first
    assert identity(seconds=99.0, git="def+", device="cuda", versions={"torch": "3"}) == first
    others = [
        {"seed": 1}, {"defense": "none"}, {"attack_settings": {"eps": 0.2}},
        {"recovered_accuracy": 0.5}, {"defense_settings": {"level": 0.4}},
    ]  # fmt: skip
    assert len({first, *(identity(**change) for change in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"schema": 1, "dat', "line 2"),
        ("", "line 2"),
        ("[1, 2]", "line 2"),
        ('{"schema": 2}', "schema 2, not 1"),
        ('{"schema": 1, "dataset": "mnist5k"}', "missing"),
        ("more", "nonsense"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "records.jsonl"
    whole = append_record(record(), path)
    if line == "more":
        line = json.dumps(asdict(whole) | {"nonsense": 1})
    with path.open("a") as file:
        file.write(line + "\n")
    append_record(record(), path)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2 is no record") as caught:
        read_records(path)
    assert why in str(caught.value)


def test_a_line_broken_off_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(record(), path)
    with path.open("a") as file:
        file.write('{"schema": 1, "da')  # killed in the middle of a write
    last = append_record(record(seed=7), path)
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n", encoding="utf-8")
    assert read_records(path)[1] == last


WRITER = """
import sys
import time
from dataclasses import replace
from pathlib import Path
from unfool.evaluation import Record, append_record, read_records

path, seed = Path(sys.argv[1]), int(sys.argv[2])
(one,) = read_records(path.with_name("one.jsonl"))
(path.parent / f"ready{seed}").touch()
while not all((path.parent / f"ready{k}").exists() for k in (1, 2)):
    time.sleep(0.01)
for k in range(40):
    append_record(replace(one, seed=1000 * seed + k, id=""), path)
"""


def test_two_processes_lose_no_line(tmp_path: Path) -> None:
    append_record(record(warnings=["x" * 20_000]), tmp_path / "one.jsonl")  # longer than a buffer
    path = tmp_path / "records.jsonl"
    library = os.pathsep.join(
        [str(Path(evaluation.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(seed)],
            env=os.environ | {"PYTHONPATH": library},
        )
        for seed in (1, 2)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    seeds = [one.seed for one in read_records(path)]
    assert sorted(seeds) == [1000 * seed + k for seed in (1, 2) for k in range(40)]


def test_a_record_is_appended_under_a_lock(tmp_path: Path) -> None:
    path, done = tmp_path / "records.jsonl", threading.Event()

    def write() -> None:
        append_record(record(), path)
        done.set()

    with FileLock(f"{path}.lock"):
        threading.Thread(target=write, daemon=True).start()
        assert not done.wait(0.3)
    assert done.wait(30)
    assert len(read_records(path)) == 1


def test_a_record_is_plain_json() -> None:
    assert {f.name for f in fields(Record)} == json.loads(json.dumps(asdict(record()))).keys()


def test_records_are_grouped_by_what_was_changed() -> None:
    first = record(defense_settings={"lam": 100.0, "skips": True})
    flat = replace(first, defense_settings={"lam": 100.0, "skips": False})
    both = replace(first, defense_settings={"lam": 0.0, "skips": False})
    again = replace(flat, seed=1)
    groups = by_change([first, flat, both, again])
    assert groups == {
        "unchanged": [first],
        "skips=False": [flat, again],
        "lam=0, skips=False": [both],
    }
    assert by_change([flat, first]).keys() == {"unchanged", "skips=True"}
    assert by_change([]) == {}
    early = replace(first, defense_settings={**first.defense_settings, "after": 1})
    assert by_change([early, first]) == {"unchanged": [early], "without after": [first]}
    assert by_change([first, early]).keys() == {"unchanged", "after=1"}


def test_rows_about_say_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert evaluation.rows_about(path, {"n": 1}) == []
    rows = [{"n": 1, "eps": 0.1}, {"n": 1, "eps": 0.2}, {"n": 2, "eps": 0.1}]
    evaluation.append_rows(rows, path)
    assert evaluation.rows_about(path, {"n": 1}) == rows[:2]
    assert evaluation.rows_about(path, {"n": 1, "eps": 0.2}) == rows[1:2]
    assert evaluation.rows_about(path, {"n": 3}) == []
    assert evaluation.rows_about(path, {}) == rows
