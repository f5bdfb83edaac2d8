"""The multiverse: which records are readings, what a cell makes of them, what moves it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from unfool import multiverse, paper
from unfool.artifacts import REPO
from unfool.attacks import paper_attacks
from unfool.evaluation import Record, read_records
from unfool.multiverse import Cell, Reading, cells
from unfool.profiles import PROFILES

FOUR = {a.name: dict(a.settings) for a in paper_attacks("mnist5k")}
SMALL = {"width": 8, "discriminator_width": 8, "epochs": 4, "images": 400}


def small(share: float = 0.5, attack: str = "fgsm", **change: Any) -> Record:
    """A record as the grid leaves it."""
    own = {**PROFILES["classroom"].purifier.named(), **SMALL, **change.pop("settings", {})}
    fields: dict[str, Any] = dict(
        dataset="mnist5k", profile="classroom", classifier="anet", made_on="anet",
        trained_for="anet", defense="pix2pix", defense_settings=own, attack=attack,
        attack_settings=FOUR[attack], learned_from=list(FOUR), saw_attack_in_training=True, seed=0,
        recovered_accuracy=share, end_to_end_accuracy=share + 0.25, n_success=40,
        targeted_outcome=None,
    )  # fmt: skip
    one = read_records(REPO / "results" / "records" / "classroom.jsonl")[0]
    return replace(one, **(fields | change))


def readings(*records: Record) -> list[Reading]:
    return [r for cell in cells(records, paper.printed()) for r in cell.readings]


def test_a_record_is_a_reading_for_each_scoring_rule() -> None:
    over_fooled, over_all = readings(small())
    assert (over_fooled.share, over_all.share) == (0.5, 0.75)
    assert over_fooled.choices == {**multiverse.OURS, "training": "small"}
    outcome = {"target": 4, "true": 30, "other": 6}
    jsma = small(0.75, "jsma", targeted_outcome=outcome)
    assert [r.share for r in readings(jsma)] == [0.75, 1.0, 0.9]
    assert len(readings(small(), small(0.25))) == 2  # the same reading twice: the last counts
    assert readings(small(), small(0.25))[0].share == 0.25


CROSSED = {
    "λ": ({"settings": {"lam": 10.0}}, "10"),
    "μ": ({"settings": {"mu": 1.0}}, "1"),
    "PatchGAN": ({"settings": {"patch_layers": 3}}, "3 layers"),
    "batch norm": ({"settings": {"statistics": "batch"}}, "batch"),
    "learned from": ({"learned_from": ["fgsm"]}, "this attack"),
    "last layer": (
        dict.fromkeys(("classifier", "made_on", "trained_for"), "anet+relu"), "ReLU",
    ),
    "attack": (
        {"attack": "deepfool", "attack_settings": {"overshoot": 0.2, "steps": 50}}, "stronger",
    ),
    "training": (
        {"defense_settings": PROFILES["desk"].purifier.named(), "profile": "desk",
         "dataset": "mnist"}, "desk",
    ),
}  # fmt: skip


@pytest.mark.parametrize("choice", CROSSED)
def test_each_choice_is_read_from_the_record(choice: str) -> None:
    change, value = CROSSED[choice]
    assert readings(small(**change))[0].choices == {
        **multiverse.OURS, "training": "small", choice: value,
    }  # fmt: skip


def test_every_choice_is_tested() -> None:
    assert CROSSED.keys() | {"scored"} == multiverse.OURS.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"settings": {"adversarial": False}},  # an ablation, no reading
        {"settings": {"after": 2}},  # not its end
        {"settings": {"images": 2000}},  # the trial
        {"learned_from": ["deepfool"], "saw_attack_in_training": False},
        {"made_on": "bnet"},
        {"attack_settings": {"eps": 0.3}},  # the paper prints 0.15
        {"defense": "denoiser"},
        {"dataset": "mnist-m", "classifier": "resnet8"},
    ],
)
def test_what_differs_in_more_is_no_reading(change: dict[str, Any]) -> None:
    assert readings(small(**change)) == []


def crossed() -> Cell:
    """λ moves the share by 0.2, μ by 0.1; one combination is missing."""
    found = [
        Reading({**multiverse.OURS, "λ": lam, "μ": mu, "training": "small"}, share)
        for (lam, mu), share in zip(
            product(("10", "100"), ("0", "1")), (0.5, 0.6, 0.7, 0.8), strict=True
        )
    ]
    ours = Reading(multiverse.OURS, 0.9)
    return Cell("fgsm", 0.6, (*found, ours))


def test_a_cell_tells_its_range_and_what_moves_it() -> None:
    cell = crossed()
    assert (cell.shares[0], cell.shares[-1], cell.ours) == (0.5, 0.9, 0.9)
    assert (cell.within, cell.near) == (True, 1)
    assert not replace(cell, printed=0.95).within
    effects = cell.effects()
    assert next(iter(effects)) == "training"  # 0.7 → 0.9 at λ 100, μ 0
    assert effects["training"] == pytest.approx(0.2)
    assert effects["λ"] == pytest.approx(0.2)
    assert effects["μ"] == pytest.approx(0.1)
    assert effects["attack"] == 0  # it was not varied
    # Unpaired, the largest share would count for λ = 100 alone.
    assert cell.levels("λ") == {"10": pytest.approx(0.55), "100": pytest.approx(0.75)}


def test_the_page_names_each_cell_and_the_readmes_count_them() -> None:
    page = multiverse.markdown([crossed()], paper.ATTACKS)
    assert "| FGSM | 5 | 50.0 | 70.0 | 90.0 | 90.0 | 60.00 | yes | 1 | training | 20.0 |" in page
    assert "| μ | 0: 60.0, 1: 70.0 |" in page
    assert "| attack | – |" in page
    said = multiverse.sentence([crossed()])
    assert "5 readings of Table 2's Anet row" in said
    assert "1 of its 1 numbers lie within" in said
    assert multiverse.sentence([]) == ""


def test_the_page_counts_the_printed_cells_that_are_left_out() -> None:
    """All that the paper measured of a purifier, but Table 2's Anet row."""
    mine = [c for c in paper.printed() if c["column"] in ("purifier", "our method")]
    rows = [(c["table"], c["classifier"] == "bnet") for c in mine if c["classifier"] != "anet"]
    assert Counter(rows) == {("2", True): 4} | {(n, False): 8 for n in "3456"}
    left = "Table 2's Bnet row (4 numbers), Table 4 (8), Tables 3 and 5 on\nCIFAR-10 (8 each) and"
    assert left in multiverse.markdown([crossed()], paper.ATTACKS)
    assert "Bnet's row, Tables 3 to 6" in multiverse.sentence([crossed()])


def whole_problems(found: list[Cell]) -> list[str]:
    """What of the committed multiverse is not as many readings as it is to be."""
    problems = [f"{c.attack}: {len(c.readings)} readings" for c in found if len(c.readings) < 64]
    for c in found:
        still = [name for name, moved in c.effects().items() if moved == 0]
        allowed = {"fgsm": {"attack"}, "carlini_wagner_l2": {"last layer"}}.get(c.attack, set())
        problems += [f"{c.attack}: {name} is not varied" for name in still if name not in allowed]
    missing = {a for a in FOUR} - {c.attack for c in found}
    return problems + [f"{attack} is missing" for attack in sorted(missing)]


def test_the_committed_records_cross_what_is_open() -> None:
    records, _ = paper.gather()
    assert whole_problems(cells(records, paper.printed())) == []
    pooled = [r for r in records if len(r.learned_from) != 1]  # the control
    lost = whole_problems(cells(pooled, paper.printed()))
    assert {f"{attack}: learned from is not varied" for attack in FOUR} <= set(lost)
