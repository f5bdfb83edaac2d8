"""`results/make_tables.py`: the paper's table beside the records, with a verdict for each cell."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from unfool.artifacts import REPO
from unfool.evaluation import Record, read_records


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", REPO / "results/make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def purified(recovered: float, **change: object) -> Record:
    one = read_records(REPO / "results" / "records" / "classroom.jsonl")[0]
    fields: dict[str, Any] = dict(
        classifier="anet-mnist", defense="pix2pix", defense_settings={"epochs": 20},
        n_success=2000, recovered_accuracy=recovered,
    )  # fmt: skip
    return replace(one, **(fields | change))


def cells(table: str, attack: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()
            if line.startswith(f"| {attack} |")]  # fmt: skip


def test_a_cell_has_what_was_measured_and_the_verdict(made: ModuleType) -> None:
    near, off = made.TABLE_2["anet"]["fgsm"] - 0.001, made.TABLE_2["anet"]["jsma"] - 0.2
    table = made.table_2(
        [
            purified(near, attack="fgsm"),
            purified(off, attack="jsma", l0_median=41.0),
            purified(0.5, attack="fgsm", defense="threshold", defense_settings={}),
            purified(0.1, attack="fgsm", defense_settings={"epochs": 20, "after": 3}),
        ]
    )
    anet, bnet = cells(table, "FGSM")
    assert anet[-1] == "reproduced"
    assert anet[5].startswith(f"{near:.2%}")
    assert anet[3] == "50.0%"
    assert cells(table, "JSMA")[0][2] == "41 pixels"
    assert cells(table, "JSMA")[0][-1] == "differs"
    assert cells(table, "C&W")[0][-1] == bnet[-1] == "not run"
    assert len({len(row) for row in cells(table, "FGSM") + cells(table, "C&W")}) == 1
    assert "Clean accuracy" in table


def test_an_unfinished_purifier_is_no_result(made: ModuleType) -> None:
    early = purified(0.98, attack="fgsm", defense_settings={"epochs": 20, "after": 3})
    short = purified(0.98, attack="fgsm", defense_settings={"epochs": 6})
    assert cells(made.table_2([early, short]), "FGSM")[0][-1] == "not run"


def test_both_readings_of_a_cell_stand_beside_the_raw_images(made: ModuleType) -> None:
    claim = made.TABLE_4["bnet", "anet"]["deepfool"]
    of = {"attack": "deepfool", "made_on": "bnet-mnist"}
    rows = [
        purified(claim, **of, trained_for="anet-mnist", classifier="bnet-mnist"),
        purified(claim - 0.3, **of, trained_for="anet-mnist"),
        purified(0.99, **of, trained_for="bnet-mnist"),  # not the other's purifier
        *(purified(0.75, **of, defense=d, defense_settings={}) for d in ("none", "threshold")),
        *(
            purified(0.25, **of, defense=d, defense_settings={}, classifier="bnet-mnist")
            for d in ("none", "threshold")
        ),
    ]
    forth, _, home, away = cells(made.table_4(rows), "DeepFool")
    assert forth[-1] == "untested at this scale"
    assert (home[1], home[2], home[-1]) == ("bnet", "25.0%", "reproduced")
    assert (away[1], away[2], away[-1]) == ("anet", "75.0%", "differs")
