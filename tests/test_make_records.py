"""`results/make_records.py`: its cases exist, and a run that was stopped goes on where it was."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from unfool import classifiers
from unfool.artifacts import REPO, Store
from unfool.attacks import AttackSettings, paper_attacks
from unfool.committed import committed_weights
from unfool.datasets import NAMES
from unfool.defenses import DEFENSES
from unfool.evaluation import read_records
from unfool.lab import Lab
from unfool.profiles import PROFILES


@pytest.fixture(scope="module")
def made() -> ModuleType:
    path = REPO / "results" / "make_records.py"
    spec = importlib.util.spec_from_file_location("make_records", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_records"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def unknown(case: object) -> list[str]:
    """The names of a case that nothing is known by."""
    known = {
        "dataset": [*NAMES, "folder"], "defense": DEFENSES, "profile": PROFILES,
        "classifier": [*classifiers.CLASSIFIERS, *committed_weights()],
    }  # fmt: skip
    for name in ("made_on", "trained_for"):
        known[name] = ["", *known["classifier"]]
    return [name for name, names in known.items() if getattr(case, name).split(":")[0] not in names]


def test_every_case_can_be_measured(made: ModuleType) -> None:
    cases = [case for file in made.FILES.values() for case in file()]
    assert len(cases) > 50
    assert [unknown(case) for case in cases] == [[]] * len(cases)
    assert unknown(replace(cases[0], defense="soap", dataset="mnist6k")) == ["dataset", "defense"]


def test_a_run_that_was_stopped_goes_on(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lab = tmp_path / "some.jsonl", Lab("smoke", store=Store(tmp_path / "store"))
    monkeypatch.setenv("UNFOOL_RECORDS", str(path))
    case = made.Case("mnist5k", "anet", "bits", {"bits": 3}, "smoke", attacks=2)
    made.measure(lab, case, path)
    first = path.read_text("utf-8")
    assert [r.attack for r in read_records(path)] == ["fgsm", "deepfool"]
    made.measure(lab, case, path)
    assert path.read_text("utf-8") == first
    path.write_text(first.splitlines()[0] + "\n", "utf-8")  # stopped in between
    made.measure(lab, case, path)
    assert [r.attack for r in read_records(path)] == ["fgsm", "deepfool"]
    made.measure(lab, replace(case, settings={"bits": 4}), path)
    assert len(read_records(path)) == 4


def test_few_images_are_attacked_anew_and_the_passes_counted(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lab = tmp_path / "some.jsonl", Lab("smoke", store=Store(tmp_path / "store"))
    monkeypatch.setenv("UNFOOL_RECORDS", str(path))
    step = AttackSettings("fgsm", {"eps": 0.3})
    case = made.Case("mnist5k", "anet", "none", {}, "smoke", under=(step,), images=5)
    for _ in range(2):  # the second time it is there
        made.measure(lab, case, path)
    (few,) = read_records(path)
    assert (few.attack, few.attack_settings, few.n_images) == ("fgsm", {"eps": 0.3}, 5)
    assert few.passes is not None
    assert 10 <= few.passes <= 12  # there and back, and a look at the model
    made.measure(lab, replace(case, images=0, under=(AttackSettings("deepfool"),)), path)
    assert read_records(path)[1].passes is None  # the control: those came from the store


def test_images_of_one_classifier_meet_the_purifier_of_another(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lab = tmp_path / "some.jsonl", Lab("smoke", store=Store(tmp_path / "store"))
    monkeypatch.setenv("UNFOOL_RECORDS", str(path))
    case = made.Case(
        "mnist5k", "d", "pix2pix", {}, "smoke", attacks=1, made_on="anet", trained_for="d"
    )
    for wanted in (case, replace(case, made_on=""), replace(case, trained_for="anet")):
        for _ in range(2):  # the second time it is there
            made.measure(lab, wanted, path)
    made.measure(lab, replace(case, attacks=2, learns=paper_attacks("mnist5k")[:1]), path)
    rows = [(r.made_on, r.trained_for, r.classifier, r.attack) for r in read_records(path)]
    assert rows == [
        ("anet", "d", "d", "fgsm"), ("d", "d", "d", "fgsm"), ("anet", "anet", "d", "fgsm"),
        ("anet", "d", "d", "deepfool"),  # it learned from FGSM alone, as the first one did
    ]  # fmt: skip
    assert [r.saw_attack_in_training for r in read_records(path)] == [True] * 3 + [False]
    assert read_records(path)[0].learned_from == ["fgsm"]


def test_another_strength_is_another_case(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lab = tmp_path / "some.jsonl", Lab("smoke", store=Store(tmp_path / "store"))
    monkeypatch.setenv("UNFOOL_RECORDS", str(path))
    steps = tuple(AttackSettings("fgsm", {"eps": eps}) for eps in (0.1, 0.3))
    case = made.Case("mnist5k", "anet", "threshold", {}, "smoke", under=steps)
    for _ in range(2):
        made.measure(lab, case, path)
    assert [r.attack_settings["eps"] for r in read_records(path)] == [0.1, 0.3]
