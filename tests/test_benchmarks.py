"""The benchmark: what counts, pairs, resuming, the table; and a small run with real libraries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import attacks, measure, overhead, peers, scoring
from benchmarks.overhead import Spent
from benchmarks.scoring import Row, Side
from unfool.artifacts import REPO
from unfool.grids import Job, dump, plan

HERE = "mnist5k"


class Brightness(nn.Module):
    """Class 1 for images brighter than a half on average, class 0 for the others."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)


def row(peer: str = "foolbox", way: str = "best", **more: Any) -> Row:
    """A row whose numbers are easy to find again."""
    ours = Side(
        8, [2.0, 2.0], 10.0, 1.0, 1.5, 40.0, 0.3, 12.0, forward=40, backward=40, mib=5, share=0.5
    )
    theirs = replace(ours, batch=16, seconds=[4.0, 6.0], ms=25.0, success=0.75, l2=1.75)
    return Row(
        "key", "pgd", peer, way, 8, {"peer_version": "1"}, ours, theirs, (2.5, 2.0, 3.0), **more
    )


# --- which images count ---------------------------------------------------------------------------

dark, light = torch.full((1, 1, 4, 4), 0.2), torch.full((1, 1, 4, 4), 0.8)
FAULTS: dict[str, Callable[[Tensor], None]] = {
    "left": lambda image: image[0, 0].fill_(1.01),
    "below": lambda image: image[0, 0].fill_(-0.01),
    "NaN": lambda image: image[0, 0].fill_(torch.nan),
    "out of the ball": lambda image: image[0, 0].fill_(0.99),
    "not fooled": lambda image: image.fill_(0.4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_image_with_a_fault_does_not_count(fault: str) -> None:
    x, y = dark.repeat(2, 1, 1, 1), torch.tensor([0, 0])
    made = light.repeat(2, 1, 1, 1)
    assert scoring.counted(Brightness(), x, made, y, None, 0.61).counts.tolist() == [True, True]
    FAULTS[fault](made[1])
    judged = scoring.counted(Brightness(), x, made, y, None, 0.61)
    assert judged.counts.tolist() == [True, False]
    assert judged.left.tolist() == [False, fault != "not fooled"]


def test_a_black_image_is_no_success_unless_it_was_black() -> None:
    x, black = torch.cat([light, light * 0]), torch.zeros(2, 1, 4, 4)
    judged = scoring.counted(Brightness(), x, black, torch.tensor([1, 1]), None, None)
    assert judged.counts.tolist() == [False, True]  # the model is fooled by both
    assert judged.black.tolist() == [True, False]
    assert scoring.describe(Side(2), x, black, judged).success == 0.5


def test_a_targeted_success_is_the_target() -> None:
    x, y, target = dark, torch.tensor([0]), torch.tensor([1])
    assert scoring.counted(Brightness(), x, light, y, target, None).counts.all()
    assert not scoring.counted(Brightness(), x, light, y, target + 1, None).counts.any()
    assert scoring.counted(Brightness(), x, light, y, None, None).counts.all()


def test_no_success_has_no_distortion() -> None:
    judged = scoring.counted(Brightness(), dark, dark, torch.tensor([0]), None, None)
    side = scoring.describe(Side(1), dark, dark, judged)
    assert (side.success, side.l2, side.l0, side.linf) == (0, None, None, None)


def test_l1_is_a_sum() -> None:
    x, made = dark.repeat(2, 1, 1, 1), light.repeat(2, 1, 1, 1)
    made[1] += 0.1
    judged = scoring.counted(Brightness(), x, made, torch.tensor([0, 0]), None, None)
    found = scoring.describe(Side(2), x, made, judged)
    assert found.l1 == pytest.approx(16 * 0.65)  # 16 pixels; a mean would say 0.65
    assert (found.l0, found.l2) == (16, pytest.approx(2.6))


def test_comparing_images_of_both_sides() -> None:
    x, y = dark.repeat(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64)
    mine, their = light.repeat(3, 1, 1, 1), light.repeat(3, 1, 1, 1)
    their[1] += 0.1
    their[2] = 0.2  # it failed
    judged = [scoring.counted(Brightness(), x, made, y, None, None) for made in (mine, their)]
    found = scoring.compare(row(), x, (mine, judged[0]), (their, judged[1]))
    assert (found.same, found.both) == (1, 2)
    assert found.l2_both == pytest.approx((2.4, 2.6))


# --- times ----------------------------------------------------------------------------------------


def test_the_ratio_is_taken_pair_by_pair() -> None:
    """The machine is three times as slow in the last pair: a ratio of sums would say 2.6."""
    ours, theirs = [1.0, 1.0, 3.0], [2.0, 2.0, 9.0]
    assert scoring.ratio_of_pairs(ours, theirs) == (2.0, 2.0, 3.0)
    assert sum(theirs) / sum(ours) == pytest.approx(2.6)
    assert scoring.ratio_of_pairs(theirs, ours)[0] == 0.5
    for wrong in ([], [1.0, 2.0]):
        with pytest.raises(ValueError, match="as many times of each"):
            scoring.ratio_of_pairs(wrong, [1.0])


def test_bound_by_hand() -> None:
    assert scoring.bound(40, 41, (2.0, 3.0)) == 40 * 2 + 41 * 3


# --- the file of finished rows --------------------------------------------------------------------


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.jsonl"
    scoring.append(path, row(l2_both=(1.0, 2.0)))
    assert scoring.finished(path) == {"key": row(l2_both=(1.0, 2.0))}
    assert scoring.finished(tmp_path / "none") == {}


def test_half_a_line_and_a_failure_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    scoring.append(path, row())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:99])  # killed while it wrote
    scoring.append(path, replace(row(), key="second"))
    scoring.append(path, Row("third", "pgd", "art", "best", 8, {}, error="ValueError: no"))
    assert list(scoring.finished(path)) == ["key", "second"]
    scoring.append(path, replace(row(), n=9))
    assert scoring.finished(path)["key"].n == 9  # the last one
    scoring.append(path, replace(row(), schema=99))
    assert scoring.finished(path)["key"].n == 9


def test_another_setting_is_another_key() -> None:
    settings = {"attack": "pgd", "n": 8}
    assert scoring.key_of(settings) == scoring.key_of({"n": 8, "attack": "pgd"})
    assert scoring.key_of(settings) != scoring.key_of({**settings, "n": 9})
    assert scoring.key_of(settings) != scoring.key_of({**settings, "repeat": 5})


# --- the table ------------------------------------------------------------------------------------


def test_table() -> None:
    slower = row("art")
    assert slower.ours
    slower.ours.ms = 14.0
    lines = scoring.table([row(), slower]).splitlines()
    assert lines[2].startswith("| **unfool** | 8 | 12 |")  # the median of 10 and 14
    wanted = "25 | 10 | **2.50** [2.00, 3.00] | 75.0 % | 1.75 | 12 | 40 | 0.3 | 40 | 40 | 5 | 50 %"
    assert lines[3] == f"| foolbox, at its best | 16 | {wanted} |"
    assert lines[4].startswith("| art, at its best | 16 | 25 | 14 |")
    assert len({line.count("|") for line in lines}) == 1


def test_table_names_faults() -> None:
    black = row()
    assert black.theirs
    black.theirs.black, black.theirs.left = 2, 3
    failed = Row("k", "pgd", "art", "64", 8, {}, error="ValueError: no")
    text = scoring.table([black, failed])
    assert "- foolbox, batch 16: 2 of 8 images came back black." in text
    assert "- foolbox, batch 16: 3 of 8 images left [0, 1] or the ball." in text
    assert "- art (64) failed: ValueError: no" in text
    clean = scoring.table([row()])
    assert not any(word in clean for word in ("black", "left", "failed"))


def test_numbers_are_short() -> None:
    shown = [scoring.number(value) for value in (None, 0.0, 0.12346, 12.346, 5000.2)]
    assert shown == ["", "0", "0.1235", "12.35", "5,000"]


# --- the command line -----------------------------------------------------------------------------


def options(*arguments: str) -> Any:
    return attacks.parser().parse_args(arguments)


def test_plan_leaves_out_batches_that_are_too_large() -> None:
    def ways(*arguments: str) -> list[tuple[str, str]]:
        jobs = attacks.plan(options("--attacks", "deepfool", *arguments), list(peers.PEERS))
        return [(peer, way) for _, peer, way, _ in jobs if peer in ("adv-lib", "torchattacks")]

    single = [("torchattacks", "best")]  # an image at a time
    assert ways() == [("adv-lib", way) for way in ("best", "64", "256")] + single
    assert ways("--images", "64") == [("adv-lib", "best"), ("adv-lib", "64"), *single]
    assert ways("--quick") == [("adv-lib", "best"), *single]
    assert attacks.plan(options("--attacks", "deepfool"), []) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks", "pdg"], "unknown attack 'pdg'.*did you mean 'pgd'"),
        (["--peers", "advlib"], "unknown library 'advlib'.*did you mean 'adv-lib'"),
        (["--images", "0"], "--images must be at least 1, not 0"),
        (["--repeat", "-1"], "--repeat must be at least 1, not -1"),
        (["--quick", "--save"], "--save needs a run without it"),
        (["--attacks", "jsma-pair", "--peers", "foolbox"], "nothing to compare"),
        (["--quick", "--device", "cuda:99", "--peers", "foolbox"], "GPU"),
        (["--images", "1001", "--classifier", "anet-mnist", "--peers", "foolbox"], "ask for fewer"),
    ],
)
def test_misuse_is_answered(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attacks.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ")
    assert len(error.splitlines()) == 1
    assert re.search(said, error)


def test_help_names_attacks_and_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attacks.main(["--help"])
    text = capsys.readouterr().out
    for name in (*attacks.ATTACK_NAMES, *peers.PEERS, "--fresh", "--save"):
        assert name in text


@pytest.mark.parametrize("dataset", measure.CLASSIFIERS)
def test_comparisons_name_what_there_is(dataset: str) -> None:
    found = peers.comparisons(dataset)
    assert len({comparison.title for comparison in found.values()}) == len(found)
    for comparison in found.values():
        assert set(comparison.peers) <= set(peers.PEERS)
        assert comparison.one_by_one <= set(comparison.peers)
        assert "target" not in comparison.ours.settings
        assert comparison.eps == comparison.ours.settings.get("eps")


# --- measuring ------------------------------------------------------------------------------------


class FakeLab:
    """As much of a lab as a bench asks for."""

    dataset, device = HERE, torch.device("cpu")


def bench(n: int = 4, repeat: int = 3, quick: bool = True) -> measure.Bench:
    target = torch.ones(n, dtype=torch.int64)
    x, net = dark.repeat(n, 1, 1, 1), Brightness()
    lab: Any = FakeLab()
    return measure.Bench(lab, "toy", repeat, quick, net, x, target - 1, target)


def only(monkeypatch: pytest.MonkeyPatch, theirs: peers.Call, ours: peers.Call) -> None:
    """Make FGSM the one comparison, with these two calls."""

    class Plain(peers.Comparison):
        def call_ours(self, *arguments: Any) -> Tensor:
            return ours(*arguments)

    fgsm = peers.fgsm(0.61)
    plain = Plain(**{**vars(fgsm), "peers": {"foolbox": theirs}})
    monkeypatch.setattr(measure, "comparisons", lambda _: {"fgsm": plain})
    monkeypatch.setattr(attacks, "comparisons", lambda _: {"fgsm": plain})


def silent(*_: Any) -> None:
    """Show no progress."""


def test_ours_and_theirs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def call(name: str) -> peers.Call:
        def attack(model: nn.Module, x: Tensor, *_: Any) -> Tensor:
            calls.append(name)
            assert len(x) == 4
            return model(x).sum() * 0 + light.repeat(len(x), 1, 1, 1)

        return attack

    only(monkeypatch, call("theirs"), call("ours"))
    found = measure.measure(bench(), "fgsm", "foolbox", "best", 4, silent)
    assert calls == ["theirs", "ours"] + ["ours", "theirs"] * 3  # one look each, then the pairs
    assert found.ratio
    assert found.ours
    assert found.theirs
    assert len(found.ours.seconds) == len(found.theirs.seconds) == 3
    assert (found.theirs.success, found.same, found.theirs.forward) == (1, 4, 1)


def test_both_are_called_with_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, set[int]] = {"ours": set(), "theirs": set()}

    def call(name: str) -> peers.Call:
        def attack(model: nn.Module, x: Tensor, *_: Any) -> Tensor:
            sizes[name].add(len(x))
            return x

        return attack

    only(monkeypatch, call("theirs"), call("ours"))
    measure.measure(bench(128, 1), "fgsm", "foolbox", "64", 128, silent)
    assert sizes == {"ours": {64}, "theirs": {64}}
    measure.measure(bench(128, 1), "fgsm", "foolbox", "best", 128, silent)
    assert sizes == {"ours": {64, 128}, "theirs": {64, 128}}


def test_the_best_batch_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(_: Any, call: Any, batch: int, n: int, loops: int = 1) -> float:
        return n * {16: 3.0, 32: 1.0, 64: 2.0, 100: 4.0}[batch]

    monkeypatch.setattr(measure, "clock", clock)
    assert measure.best_batch(bench(100), lambda *_: dark, 100, silent) == 32


def test_a_peer_that_fails_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2\nshapes")

    only(monkeypatch, fails, lambda _, x, *__: x)
    found = measure.measure(bench(), "fgsm", "foolbox", "best", 4, silent)
    assert found.error == "RuntimeError: mat1 and mat2"
    assert found.ours is None
    only(monkeypatch, lambda _, x, *__: x, fails)
    with pytest.raises(RuntimeError):  # a fault of ours is no result
        measure.measure(bench(), "fgsm", "foolbox", "best", 4, silent)


def test_what_a_library_leaves_in_the_model_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    messy = replace(bench(), net=net)

    def attack(model: nn.Module, x: Tensor, *_: Any) -> Tensor:
        torch.rand(3)
        model.train()(x).sum().backward()
        model.requires_grad_(False)
        return torch.rand(x.shape)

    first = measure.run(messy, attack, 4, 4)
    assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
    assert not net.training
    assert torch.equal(measure.run(messy, attack, 4, 4), first)  # from the same random state


def test_passes_are_counted_also_layer_by_layer() -> None:
    net = measure.Counting(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    x = dark.repeat(3, 1, 1, 1).requires_grad_(True)
    logits = net(x)
    for k in range(2):
        torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)
    with torch.no_grad():
        net(x[:1])
    assert (net.forward_passes, net.backward_passes) == (4, 6)
    assert not isinstance(net, nn.Sequential)  # ART would go around it


def test_the_bound_is_filled_in() -> None:
    found = bench(4, quick=False)
    found = replace(found, net=nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), costs={})
    filled = row()
    found.costs["pgd"] = (1e-4, 2e-4)
    measure.hold_against_bound(found, filled)
    assert filled.ours
    assert filled.ours.share == pytest.approx(40 * 3e-4 / 10e-3)
    forward, gradient = measure.pass_costs(found)
    assert forward > 0
    assert gradient > 0
    assert all(weight.requires_grad for weight in found.net.parameters())


def test_growth_of_memory_is_seen() -> None:
    with measure.highest() as idle:
        pass
    with measure.highest() as peak:
        block = np.ones(2**23)  # 64 MiB
        block += 1
    assert 60 < (peak[1] - peak[0]) / 2**20 < 100
    assert (idle[1] - idle[0]) / 2**20 < 30


# --- resuming, and libraries that are not there ---------------------------------------------------


def counted_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str
) -> tuple[list[tuple[str, str]], int]:
    """Run the command line with a measurement that only counts its calls."""
    done: list[tuple[str, str]] = []

    def fake(bench: measure.Bench, attack: str, peer: str, way: str, n: int, _: Any) -> Row:
        settings = bench.settings(attack, peer, way, n)
        done.append((attack, peer))
        error = "ValueError: no" if peer == "cleverhans" else ""
        sides = {} if error else {"ours": row().ours, "theirs": row().theirs, "ratio": (1, 1, 1)}
        return Row(scoring.key_of(settings), attack, peer, way, n, settings, error=error, **sides)

    monkeypatch.setattr(measure, "measure", fake)
    monkeypatch.setattr(attacks, "open_bench", lambda *_: bench())
    code = attacks.main(["--quick", "--attacks", "fgsm", "--out", str(tmp_path), *arguments])
    return done, code


def test_finished_rows_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = ["--peers", "foolbox", "art", "cleverhans"]
    first, code = counted_run(monkeypatch, tmp_path, *theirs)
    assert first == [("fgsm", "foolbox"), ("fgsm", "art"), ("fgsm", "cleverhans")]
    assert code == 1  # one failed
    assert "from before" not in capsys.readouterr().out
    again, _ = counted_run(monkeypatch, tmp_path, *theirs)
    assert again == [("fgsm", "cleverhans")]  # what failed is tried again
    assert capsys.readouterr().out.count("from before") == 2
    assert counted_run(monkeypatch, tmp_path, *theirs, "--fresh")[0] == first
    assert len(counted_run(monkeypatch, tmp_path, *theirs, "--images", "7")[0]) == 3
    monkeypatch.setitem(measure.attacks.VERSIONS, "fgsm", 99)
    assert counted_run(monkeypatch, tmp_path, *theirs)[0] == first


def test_a_missing_library_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, "art", ("no_such_module", "some-package"))
    done, code = counted_run(monkeypatch, tmp_path, "--peers", "foolbox", "art")
    output = capsys.readouterr().out
    assert (done, code) == ([("fgsm", "foolbox")], 0)
    assert "art is not installed here" in output
    assert "course.py bench" in output
    assert "some-package" in output


def test_saved_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attacks, "SAVED", tmp_path / "saved")
    counted_run(monkeypatch, tmp_path / "out", "--peers", "foolbox")
    assert not (tmp_path / "saved").exists()
    monkeypatch.setattr(attacks, "check", lambda _: None)  # it refuses --quick --save
    counted_run(monkeypatch, tmp_path / "out", "--peers", "foolbox", "--save")
    name = "attacks-mnist5k-toy-cpu"
    text = (tmp_path / "saved" / f"{name}.md").read_text("utf-8")
    assert text == (tmp_path / "out" / f"{name}.md").read_text("utf-8")
    assert "## fgsm: FGSM, ε 0.3" in text
    assert "foolbox 3." in text
    rows = json.loads((tmp_path / "saved" / f"{name}.json").read_text("utf-8"))
    assert [fields["peer"] for fields in rows] == ["foolbox"]
    assert f"{name}.md" in capsys.readouterr().out


def test_tables_are_whole_whichever_part_was_measured_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "attacks-mnist5k-toy-cpu.md"
    counted_run(monkeypatch, tmp_path, "--peers", "foolbox", "art")
    counted_run(monkeypatch, tmp_path, "--peers", "foolbox", "--attacks", "deepfool")
    text = page.read_text("utf-8")
    assert text.index("## fgsm") < text.index("| art") < text.index("## deepfool")
    counted_run(monkeypatch, tmp_path, "--peers", "foolbox", "--images", "7")
    text = page.read_text("utf-8")
    assert "## deepfool" in text
    sizes = [row["n"] for row in json.loads(page.with_suffix(".json").read_text("utf-8"))]
    assert 7 in sizes  # this call's rows come before those of more images
    assert len(set(sizes)) > 1
    assert f"n = {min(sizes)} to {max(sizes)}." in text


def test_weights_have_a_checksum() -> None:
    net = nn.Linear(2, 2)
    before = measure.checksum(net)
    assert measure.checksum(net) == before
    net.weight.data[0, 0] += 1
    assert measure.checksum(net) != before


def test_a_batch_that_does_not_fit_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(_: Any, call: Any, batch: int, n: int, loops: int = 1) -> float:
        if batch > 32:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return n / batch

    monkeypatch.setattr(measure, "clock", clock)
    assert measure.best_batch(bench(100), lambda *_: dark, 100, silent) == 32


# --- the real thing, small ------------------------------------------------------------------------


def test_a_small_run_with_real_libraries(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--quick", "--images", "8", "--classifier", "anet-mnist", "--out", str(tmp_path),
        "--attacks", "fgsm", "deepfool", "jsma-top2",
        "--peers", "foolbox", "cleverhans", "art",
    ]  # fmt: skip
    assert attacks.main(arguments) == 0
    rows = list(scoring.finished(tmp_path / "bench.jsonl").values())
    assert len(rows) == 3 + 2 + 1
    for found in rows:
        assert found.theirs
        assert found.ours
        assert found.theirs.forward >= 1, found.peer
        assert found.theirs.backward >= 1, found.peer
        assert found.both > 0 or found.theirs.success == 0
        assert (found.theirs.left, found.theirs.black, found.ours.left) == (0, 0, 0)
    same = {(found.attack, found.peer): found.same for found in rows}
    assert [same["fgsm", peer] for peer in ("foolbox", "cleverhans", "art")] == [8, 8, 8]
    assert same["deepfool", "art"] < 8  # the control: other images are not the same
    assert str(REPO) not in (tmp_path / "bench.jsonl").read_text("utf-8")  # it gets committed
    capsys.readouterr()
    assert attacks.main(arguments) == 0
    assert capsys.readouterr().out.count("(from before)") == 6


def test_memory_is_measured_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.open_bench(HERE, "anet-mnist", "cpu", 64, 1, False)
    found = measure.memory(real, "fgsm", "unfool", 64)
    assert found is not None
    assert 1 < found < 500
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Killed")
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: failed)
    assert measure.memory(real, "fgsm", "unfool", 64) is None


# --- what a job costs beside its work -------------------------------------------------------------


def seconds(clock: float) -> Spent:
    return Spent(clock, clock / 2)


def test_overhead_by_hand() -> None:
    """Two shared jobs of 7 s and two experiments of 9 s, 2 of them papermill's, in 41 s."""
    jobs = [Job(name, "experiment", "90_experiment", {}) for name in "abcd"]
    runs = overhead.Runs(
        imports=seconds(3), bare={name: seconds(7) for name in "cd"},
        alone={name: seconds(7 if name in "ab" else 9) for name in "abcd"},
        batch=seconds(41), nothing=seconds(5),
    )  # fmt: skip
    found = overhead.parts(jobs, runs)
    assert list(found.values()) == [seconds(s) for s in (4, 3, 2, 1, 2, 5)]
    lines = overhead.table(jobs, runs).splitlines()
    assert "| papermill and its kernel, an experiment | 2.0 | 1.0 |" in lines
    assert "4 jobs, 2 of them experiments" in lines[-1]
    assert "take 2.0 s a job; at most 3 were wanted" in lines[-1]


def test_overhead_does_the_same_jobs_in_each_of_its_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, str]] = []

    def spent(command: list[str], folder: Path) -> Spent:
        ran.append((folder.name, command[-1] if folder.name != "batch" else command[3]))
        return seconds(len(ran))

    monkeypatch.setattr(overhead, "spent", spent)
    assert overhead.main(["--out", str(tmp_path / "table.md")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text("utf-8") == said
    assert "4 jobs, 2 of them experiments" in said
    assert "The machine's load was" in said
    alone = [name for where, name in ran if where == "alone"]
    bare = [name for where, name in ran if where == "bare"]
    assert len(alone) == 4
    assert [name.split("'")[-2] for name in bare] == alone[2:]  # the experiments come last
    assert [name for where, name in ran if where == "batch"] == ["batch", "batch"]
    assert sum(name == overhead.IMPORT for _, name in ran) == 4


def test_overhead_answers_misuse_and_tells_of_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overhead.main(["--grid", "tabel2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("overhead: unknown grid 'tabel2': there are ")
    assert len(error.splitlines()) == 1
    lessons = tmp_path / "lessons.yaml"
    lessons.write_text("notebook: 01_classifier\nrows: [{profile: smoke}]\n")
    assert overhead.main(["--grid", str(lessons)]) == 2
    assert "runs lessons: give one of the batch's unit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        overhead.main(["--help"])
    assert "--grid" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"failed:\n(.*\n)*ValueError: why"):
        overhead.spent([sys.executable, "-c", "raise ValueError('why')"], tmp_path)


def test_overhead_counts_what_children_take(tmp_path: Path) -> None:
    work = "x = 0\nwhile x < 3_000_000: x += 1"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    idle, busy = (
        overhead.spent([sys.executable, "-c", code], tmp_path) for code in ("", child)
    )  # fmt: skip
    assert 0 < idle.processor < busy.processor
    assert busy.clock > 0


def test_overhead_runs_the_notebook_as_the_batch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Its cells without papermill leave the record that an experiment has to leave."""
    grid, left = tmp_path / "grid.yaml", tmp_path / "records.jsonl"
    grid.write_text("rows: [{profile: smoke, attacks: [fgsm], defense: threshold, seed: 1}]\n")
    jobs = plan(grid)
    (tmp_path / "plan.json").write_text(dump(jobs))
    monkeypatch.setenv("UNFOOL_RECORDS", str(left))
    overhead.bare(tmp_path / "plan.json", jobs[-1].name)
    (record,) = [json.loads(line) for line in left.read_text("utf-8").splitlines()]
    assert [record[k] for k in ("attack", "defense", "seed")] == ["fgsm", "threshold", 1]
