"""`results/make_knowledge.py`: attackers share no image with the defender; what is committed."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unfool.artifacts import REPO, Store
from unfool.evaluation import append_rows, read_rows, wilson
from unfool.lab import Lab
from unfool.threats import k50

SCRIPT = REPO / "results" / "make_knowledge.py"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_knowledge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_knowledge"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    lab = Lab("smoke", store=Store(tmp_path_factory.mktemp("store")))
    yield made.Bench(lab, made.Sizes(defender=40, attacker=48, test=8, updates=4))
    torch.set_num_threads(before)


def test_k50_of_points_on_a_line() -> None:
    """Linear in log(1 + n) between 3 and 15, so half-way lies at 1 + n = 8."""
    assert k50({0: 0.8, 3: 0.6, 15: 0.2}) == pytest.approx(7)
    assert k50({15: 0.2, 0: 0.8, 3: 0.6}) == pytest.approx(7)
    assert k50({0: 0.8, 3: 0.4, 15: 0.2}) == pytest.approx(3)
    assert k50({0: 0.8, 3: 0.0}) == pytest.approx(1)  # log 4 half-way is log 2
    assert k50({0: 0.8, 3: 0.6, 15: 0.41}) is None
    assert k50({0: 0.8}) is None
    assert k50({0: 0.8, 3: 0.7, 15: 0.6}) is None
    assert k50({0: 0.8, 3: 0.7, 15: 0.6}, floor=0.5) == pytest.approx(7)  # to 0.65
    assert k50({0: 0.0, 3: 0.0}) == 0
    with pytest.raises(ValueError, match=r"\[3, 15\] lack it"):
        k50({3: 0.6, 15: 0.2})


def test_attackers_learn_from_other_images_than_the_defender(bench: Any) -> None:
    theirs = {image.numpy().tobytes() for image in bench.defenders.x}
    others = {image.numpy().tobytes() for image in bench.attackers.x}
    tested = {image.numpy().tobytes() for image in bench.test.images}
    assert not theirs & others
    assert not (theirs | others) & tested
    assert (len(theirs), len(others)) == (40, 48)
    adversarial, clean, once = bench.attackers.some(16, seed=1)
    assert {image.numpy().tobytes() for image in clean} <= others
    assert (adversarial - clean).abs()[:16].amax() == pytest.approx(0.15)
    assert len(once) == 16 <= len(clean) == len(adversarial) <= 20
    more = {image.numpy().tobytes() for image in bench.attackers.some(32, seed=1)[2]}
    few = {image.numpy().tobytes() for image in once}
    assert few < more
    other = {image.numpy().tobytes() for image in bench.attackers.some(16, seed=2)[2]}
    assert other != few  # the control


def test_what_is_trained_does_not_depend_on_how_many_are_tested(made: ModuleType) -> None:
    usual = made.learning(made.Sizes())
    assert made.learning(made.Sizes(test=7)) == usual
    assert made.learning(made.Sizes(updates=7)) != usual  # the control


def test_few_images_are_gone_through_more_often(made: ModuleType, bench: Any) -> None:
    few, settings, updates = bench.surrogate(made.Case("pix2pix", "surrogate", 4), 0)
    usual = bench.lab.profile.purifier
    assert settings.epochs == 4 == updates > usual.epochs  # one batch each
    assert not few.training
    _, settings, updates = bench.surrogate(made.Case("pix2pix", "surrogate", 48), 0)
    assert (settings.epochs, updates) == (usual.epochs, 2 * math.ceil(updates / 2))
    changes = (("width", 4), ("skips", False))
    plain, settings, _ = bench.surrogate(made.Case("pix2pix", "surrogate", 4, changes), 0)
    assert (plain.skips, few.skips) == (False, True)
    assert (settings.width, usual.width) == (4, 8)


def test_a_run_that_was_stopped_goes_on(made: ModuleType, bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    cases = [made.Case("pix2pix", "f"), made.Case("pix2pix", "surrogate", 8)]
    cases.append(made.Case("pix2pix", "weights"))
    for case in cases:
        made.measure(bench, case, 1, 0.15, path)
    first = path.read_text("utf-8")
    for case in cases:
        made.measure(bench, case, 1, 0.15, path)
    assert path.read_text("utf-8") == first
    lines = first.splitlines(keepends=True)
    path.write_text(lines[0], "utf-8")
    for case in cases:
        made.measure(bench, case, 1, 0.15, path)
    again = read_rows(path)
    assert [(row["attacker"], row["n"]) for row in again] == [
        ("f", 0), ("surrogate", 8), ("weights", 0)
    ]  # fmt: skip
    path.write_text(first, "utf-8")
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in read_rows(path)]
    made.measure(bench, cases[1], 0, 0.15, path)  # the control: another seed is another case
    made.measure(bench, cases[0], 1, 0.3, path)
    more = [(row["attacker"], row["seed"], row["eps"]) for row in read_rows(path)[3:]]
    assert more == [("same start", 0, 0.15), ("f", 1, 0.3)]
    images = bench.sizes.test
    told = made.halved(path, "pix2pix", 1, 0.15, images)
    assert told.startswith("K50")
    append_rows([row | {"n_images": images + 1, "accuracy": 0.0} for row in read_rows(path)], path)
    assert made.halved(path, "pix2pix", 1, 0.15, images) == told  # of these images alone


def test_what_other_versions_made_is_not_taken_for_ours(
    made: ModuleType, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a defence in the store nor a row; a row that names no versions is from before."""

    def kept() -> int:
        return len(list((bench.lab.store.root / "purifier").iterdir()))

    path, case = tmp_path / "some.jsonl", made.Case("pix2pix", "surrogate", 12)
    made.measure(bench, case, 1, 0.15, path)
    first, before = path.read_text("utf-8"), kept()
    made.measure(bench, case, 1, 0.15, path)
    bench.surrogate(case, 1)
    assert (path.read_text("utf-8"), kept()) == (first, before)  # the control
    monkeypatch.setitem(made.VERSIONS, "deepfool", 99)
    bench.surrogate(case, 1)
    assert kept() == before + 1
    with pytest.raises(ValueError, match=r"by other versions than .*99.*delete the rows of pix2pi"):
        made.measure(bench, case, 1, 0.15, path)
    (row,) = read_rows(path)
    row.pop("made_by")
    old = tmp_path / "old.jsonl"
    append_rows([row], old)
    made.measure(bench, case, 1, 0.15, old)
    assert len(read_rows(old)) == 1


@pytest.mark.parametrize("defense", ["ape_gan", "denoiser", "magnet"])
def test_other_defences_are_trained_too(made: ModuleType, bench: Any, defense: str) -> None:
    row = made.result(bench, made.Case(defense, "surrogate", 8), 0, 0.15)
    assert 0 <= row["accuracy"] <= row["clean"] <= 1
    assert row["updates"] >= 4
    with pytest.raises(KeyError, match="soap"):
        made.result(bench, made.Case("soap", "surrogate", 8), 0, 0.15)


def test_unknown_names_are_refused_before_anything_runs(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(made, "Lab", lambda **settings: built.append(settings))
    for function in ("Bench", "measure", "halved"):
        monkeypatch.setattr(made, function, lambda *given: None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--defenses", "pix2pix", "soap"])
    with pytest.raises(SystemExit):
        made.main()
    assert "invalid choice: 'soap'" in capsys.readouterr().err
    assert built == []
    asked: list[Any] = []
    monkeypatch.setattr(made, "Bench", lambda lab, sizes: sizes)
    monkeypatch.setattr(made, "measure", lambda *given: asked.append(given))
    command = ["--defenses", "pix2pix", "--seeds", "3", "--eps", "0.3", "--images", "9"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    made.main()
    assert [settings["seed"] for settings in built] == [0]  # the control
    assert {(sizes.test, seed, eps) for sizes, _, seed, eps, _ in asked} == {(9, 3, 0.3)}


def changed(row: dict[str, Any]) -> str:
    return str(sorted(row["changes"].items()))


def problems(made: ModuleType, rows: list[dict[str, Any]], cases: list[Any]) -> list[str]:
    """What in a file is not one row per case, seed and eps, or contradicts itself."""
    wanted = {
        (made.named(c, seed), c.n, str(sorted(c.changes)), seed, eps)
        for c in cases
        for seed in {row["seed"] for row in rows}
        for eps in (0.15, 0.2, 0.3)
    }
    at = {(r["attacker"], r["n"], changed(r), r["seed"], r["eps"]): r for r in rows}
    found = [f"{cell} is missing" for cell in sorted(wanted - set(at))]
    found += ["a row is there twice"] if len(at) < len(rows) else []
    for cell, row in at.items():
        if not 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1:
            found.append(f"{cell}: {row['accuracy']} within {row['low']} to {row['high']}")
            continue
        if (row["low"], row["high"]) != wilson(
            round(row["accuracy"] * row["n_images"]), row["n_images"]
        ):
            found.append(f"{cell}: another interval than Wilson's")
        if row["attacker"] in ("surrogate", "same start") and row["updates"] < 300:
            found.append(f"{cell}: only {row['updates']} updates")
        if row["attacker"] == "weights" and row["accuracy"] > row["own_accuracy"]:
            found.append(f"{cell}: the defender is not what was attacked")
    return found


def whole(rows: list[dict[str, Any]]) -> dict[str, set[tuple[float, int]]]:
    """By defence, at which eps and of which seeds all cases are there."""
    found: dict[str, set[tuple[float, int]]] = {}
    for name, eps, seed in {(r["defense"], r["eps"], r["seed"]) for r in rows}:
        own = [r for r in rows if (r["defense"], r["eps"], r["seed"]) == (name, eps, seed)]
        plain = {(r["attacker"], r["n"]) for r in own if not r["changes"]}
        if len(plain) == 6 and ("same start", 2000) not in plain:
            found.setdefault(name, set()).add((eps, seed))
    return found


def test_four_defences_have_a_curve(made: ModuleType) -> None:
    rows = Lab("smoke").committed_rows("knowledge")
    found = whole(rows)
    assert set(found) == set(made.DEFENSES)
    assert all(found[name] >= {(0.15, s), (0.3, s)} for name in found for s in (1, 2, 3))
    assert found["pix2pix"] == {(eps, seed) for eps in made.EPS for seed in (1, 2, 3)}
    lost = [r for r in rows if (r["defense"], r["attacker"]) != ("magnet", "weights")]
    assert set(whole(lost)) == set(made.DEFENSES) - {"magnet"}  # the control


def test_what_is_committed_is_whole(made: ModuleType) -> None:
    everything = Lab("smoke").committed_rows("knowledge")
    rows = [row for row in everything if row["defense"] == "pix2pix"]
    cases = list(made.cases("pix2pix"))
    assert problems(made, rows, cases) == []
    left = {(r["attacker"], r["n"], r["seed"], r["eps"]): r["accuracy"]
            for r in rows if r["seed"] != made.DEFENDER}  # fmt: skip
    for (attacker, n, seed, eps), accuracy in left.items():
        if attacker == "weights":
            assert accuracy <= left["surrogate", 2000, seed, eps] < left["f", n, seed, eps]
    # the controls
    assert problems(made, rows[1:], cases) != []
    assert problems(made, [*rows, rows[0]], cases) == ["a row is there twice"]
    flattered = [rows[0] | {"accuracy": 1.2}, *rows[1:]]
    assert any("within" in problem for problem in problems(made, flattered, cases))
    with pytest.raises(ValueError, match=r"no committed rows 'know': choose from .*threats"):
        Lab("smoke").committed_rows("know")
