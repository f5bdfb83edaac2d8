"""`results/make_threats.py`: a run that was stopped goes on; what is committed is whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unfool.artifacts import REPO, Store
from unfool.defenses import DEFENSES
from unfool.evaluation import read_rows, wilson
from unfool.lab import Lab

SCRIPT = REPO / "results" / "make_threats.py"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_threats", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_threats"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab("smoke", store=Store(tmp_path_factory.mktemp("store")))


def small(made: ModuleType, defense: str, **changes: Any) -> Any:
    by = made.attackers(5, steps=2, losses=["ce"])
    usual = {"by": by, "images": 6, "eps": (0.1, 0.3), "guarded": False}
    return replace(made.CASES[defense], **(usual | changes))


def test_every_case_is_a_defence_and_every_stand_in_is_known(made: ModuleType) -> None:
    assert set(made.CASES) < set(DEFENSES)
    assert {s for case in made.CASES.values() for s in case.stand_ins} == set(made.STAND_INS)
    assert all(case.eps == made.EPS for name, case in made.CASES.items() if name != "defense_gan")
    assert "soap" not in DEFENSES


def test_a_run_that_was_stopped_goes_on(made: ModuleType, lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    case = small(made, "threshold")
    made.measure(lab, case, path)
    first = path.read_text("utf-8")
    assert len(read_rows(path)) == 2 * len(made.LEVELS)
    made.measure(lab, case, path)
    assert path.read_text("utf-8") == first
    lines = first.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20], "utf-8")  # killed within a line
    with pytest.raises(ValueError, match="line 4 is no JSON object"):
        made.measure(lab, case, path)
    path.write_text("".join(lines[:3]), "utf-8")  # killed between two
    made.measure(lab, case, path)
    again = read_rows(path)
    assert path.read_text("utf-8").startswith("".join(lines[:3]))
    alike = [sorted(cell(row) for row in rows) for rows in (again, map(json.loads, lines))]
    assert alike[0] == alike[1]
    cells = [(row["level"], row["eps"]) for row in again]
    assert len(cells) == len(set(cells)) == 2 * len(made.LEVELS)
    made.measure(lab, small(made, "threshold", images=7), path)  # the control: another case
    assert len(read_rows(path)) == 4 * len(made.LEVELS)


def cell(row: dict[str, Any]) -> tuple[str, float, float]:
    return row["level"], row["eps"], row["accuracy"]


def test_rows_say_what_was_measured(made: ModuleType, lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    made.measure(lab, small(made, "threshold"), path)
    made.measure(lab, small(made, "none"), path)
    rows = read_rows(path)
    assert problems(rows, {n: small(made, n) for n in ("threshold", "none")}) == []
    white = [row for row in rows if row["level"] == "white-box"]
    assert white[0]["attack"]["through"] == ["bpda(identity)", "bpda(sigmoid)"]
    assert white[0]["attack"]["settings"] == {"losses": ["ce"], "steps": 2}
    assert "through" not in white[2]["attack"]
    assert {row["guards"] for row in white} == {"accuracies only"}
    assert white[0]["settings"] == {"level": 0.5}


def test_unknown_names_are_refused_before_anything_runs(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(made, "Lab", lambda **settings: built.append(settings))
    monkeypatch.setattr(made, "measure", lambda *case: None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--defenses", "pix2pix", "soap"])
    with pytest.raises(SystemExit):
        made.main()
    assert "invalid choice: 'soap'" in capsys.readouterr().err
    assert built == []
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--defenses", "pix2pix", "--seeds", "3"])
    made.main()
    assert [settings["seed"] for settings in built] == [3]  # the control


def problems(rows: list[dict[str, Any]], cases: dict[str, Any]) -> list[str]:
    """What in a file is not one row per defence, level and eps, or contradicts itself."""
    at = {(r["defense"], r["level"], r["eps"]): r for r in rows}
    wanted = {
        (name, level, eps)
        for name, case in cases.items()
        for level in ("noise", "transfer", "black-box", "white-box", "worst of all")
        for eps in case.eps
    }
    found = [f"{cell} is missing" for cell in sorted(wanted - set(at))]
    found += ["a row is there twice"] if len(at) < len(rows) else []
    for cell, row in at.items():
        if not 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1:
            found.append(f"{cell}: {row['accuracy']} within {row['low']} to {row['high']}")
            continue
        if (row["low"], row["high"]) != wilson(round(row["accuracy"] * row["n"]), row["n"]):
            found.append(f"{cell}: another interval than Wilson's")
        if row["accuracy"] > row["clean"]:
            found.append(f"{cell}: more right than unattacked")
        if (row["level"] == "white-box") != ("warnings" in row):
            found.append(f"{cell}: warnings belong to the white box")
    for (name, level, eps), row in at.items():
        if row["accuracy"] < at.get((name, "worst of all", eps), row)["accuracy"]:
            found.append(f"{name} eps {eps}: {level} is below the worst")
    return found


def test_what_is_committed_is_whole(made: ModuleType) -> None:
    rows = Lab("smoke").committed_rows("threats")
    assert problems(rows, made.CASES) == []
    assert {row["seed"] for row in rows} == {0}
    purifier = {(r["level"], r["eps"]): r["accuracy"] for r in rows if r["defense"] == "pix2pix"}
    for eps in made.EPS:
        assert purifier["white-box", eps] <= purifier["transfer", eps]
    assert purifier["white-box", 0.15] < purifier["transfer", 0.15]
    # Where any pixel can cross 0.5, an attack that leaves anything is broken.
    far = {(r["level"], r["defense"]): r["accuracy"] for r in rows if r["eps"] == max(made.EPS)}
    assert {far["white-box", name] for name in made.CASES} == {0}
    # the controls
    assert problems(rows[1:], made.CASES) != []
    assert problems([*rows, rows[0]], made.CASES) == ["a row is there twice"]
    flattered = [rows[0] | {"accuracy": 1.2}, *rows[1:]]
    assert any("within" in problem for problem in problems(flattered, made.CASES))
