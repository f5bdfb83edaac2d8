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


def at(made_on: str, trained_for: str, reader: str, **change: Any) -> Record:
    """A small record of Table 4, or with thrice the same name of Table 2."""
    return small(classifier=reader, made_on=made_on, trained_for=trained_for, **change)


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
    "read by": ({"made_on": "bnet"}, "purifier's own"),
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
        {"made_on": "anet+relu"},  # the purifier is of another last layer
        {"made_on": "bnet+relu"},
        {"classifier": "bnet"},  # made on anet, purified for anet, read by neither
        {"made_on": "a"},  # Table 6 crosses no classifiers
        {"attack_settings": {"eps": 0.3}},  # the paper prints 0.15
        {"defense": "denoiser"},
        {"dataset": "mnist-m", "classifier": "resnet8"},
    ],
)
def test_what_differs_in_more_is_no_reading(change: dict[str, Any]) -> None:
    assert readings(small(**change)) == []


OF_TABLE_6: dict[str, Any] = dict.fromkeys(("classifier", "made_on", "trained_for"), "d") | {
    "attack_settings": {"eps": 0.3}, "learned_from": ["fgsm", "carlini_wagner_l2"],
}  # fmt: skip


def test_table_6_has_its_own_attacks_and_is_scored_over_all_images() -> None:
    desk = {"defense_settings": PROFILES["desk"].purifier.named(), "profile": "desk"}
    (cell,) = cells([small(0.5, **OF_TABLE_6, **desk, dataset="mnist")], paper.printed())
    assert (cell.title, cell.printed, cell.ours) == ("Table 6, D", 0.983, 0.75)
    assert {r.choices["learned from"] for r in cell.readings} == {"all attacks"}
    assert readings(small(**OF_TABLE_6 | {"learned_from": ["fgsm"]}))
    for other in ({"attack_settings": {"eps": 0.15}}, {"learned_from": list(FOUR)}):
        assert readings(small(**OF_TABLE_6 | other)) == []


def crossed() -> Cell:
    """λ moves the share by 0.2, μ by 0.1; one combination is missing."""
    found = [
        Reading({**multiverse.OURS, "λ": lam, "μ": mu, "training": "small"}, share)
        for (lam, mu), share in zip(
            product(("10", "100"), ("0", "1")), (0.5, 0.6, 0.7, 0.8), strict=True
        )
    ]
    ours = Reading(multiverse.OURS, 0.9)
    return Cell("2", "Anet", "fgsm", 0.6, (*found, ours))


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
    other = replace(crossed(), table="4", row="Bnet/Anet", printed=0.95)
    page = multiverse.markdown([crossed(), other], paper.ATTACKS)
    row = "FGSM | 5 | 50.0 | 70.0 | 90.0 | 90.0 |"
    assert f"| Table 2, Anet | {row} 60.00 | yes | 1 | training | 20.0 |" in page
    assert f"| Table 4, Bnet/Anet | {row} 95.00 | no | 0 | training | 20.0 |" in page
    assert page.count("| μ | 0: 60.0, 1: 70.0 |") == 2
    assert "| Table 4, Bnet/Anet | FGSM |" in page  # its own table of choices
    assert "| attack | –" not in page  # it was not varied
    said = multiverse.sentence([crossed(), other])
    assert "10 readings of Tables 2, 4 and 6" in said
    assert "1 of their 2 numbers lie within" in said
    assert multiverse.sentence([]) == ""


def test_a_record_lands_in_the_cell_of_its_classifiers() -> None:
    records = [
        at("anet", "anet", "anet"),
        at("bnet", "bnet", "bnet", share=0.25),
        at("anet", "bnet", "anet"),
        at("anet", "bnet", "bnet", share=0.25),
        at("bnet", "anet", "bnet", attack="deepfool"),
    ]
    found = cells(records, paper.printed())
    assert [(c.title, c.attack, len(c.readings)) for c in found] == [
        ("Table 2, Anet", "fgsm", 2), ("Table 2, Bnet", "fgsm", 2),
        ("Table 4, Anet/Bnet", "fgsm", 4), ("Table 4, Bnet/Anet", "deepfool", 2),
    ]  # fmt: skip
    assert [c.shares[0] for c in found[:2]] == [0.5, 0.25]
    assert found[2].levels("read by") == {"made on": 0.625, "purifier's own": 0.375}
    assert found[2].effects()["read by"] == pytest.approx(0.25)
    assert found[0].effects()["read by"] == 0  # one classifier, which reads its own
    assert list(multiverse.by_row(found)) == [c.title for c in found]


def test_the_page_counts_the_printed_cells_that_are_left_out() -> None:
    """All that the paper measured of a purifier, but Tables 2, 4 and 6."""
    mine = [c for c in paper.printed() if c["column"] in ("purifier", "our method")]
    assert Counter(c["table"] for c in mine) == dict.fromkeys("23456", 8)
    assert multiverse.TABLES.keys() == {"2", "4", "6"}
    assert "not run: Tables 3 and 5 on CIFAR-10 (8 numbers each)." in multiverse.markdown(
        [crossed()], paper.ATTACKS
    )
    assert "not run: Tables 3 and 5." in multiverse.sentence([crossed()])


SMALL_ALONE = {"λ", "μ", "PatchGAN", "learned from", "last layer", "batch norm", "attack"}
STILL = {  # what a row, or an attack, does not vary
    "Table 2, Anet": {"read by"},
    "Table 2, Bnet": {"read by"} | SMALL_ALONE,
    "Table 4, Anet/Bnet": SMALL_ALONE,
    "Table 4, Bnet/Anet": SMALL_ALONE,
    **{f"Table 6, {network}": {"read by", "last layer"} for network in "ABCD"},
    "Table 6, A": {"read by", "last layer", "training"},  # its desk purifier knows FGSM alone
    "fgsm": {"attack"},
    "carlini_wagner_l2": {"last layer"},
}


def whole_problems(found: list[Cell]) -> list[str]:
    """What of the committed multiverse is not as many readings as it is to be."""
    problems = []
    for c in found:
        name = f"{c.title}, {c.attack}"
        if len(c.readings) < (64 if c.row == "Anet" or c.table == "6" else 4):
            problems.append(f"{name}: {len(c.readings)} readings")
        allowed = STILL[c.title] | STILL.get(c.attack, set())
        still = [choice for choice, moved in c.effects().items() if moved == 0]
        problems += [f"{name}: {choice} is not varied" for choice in still if choice not in allowed]
    missing = {f"{row}, {attack}" for row in STILL if row[:7] in ("Table 2", "Table 4")
               for attack in FOUR}  # fmt: skip
    missing |= {
        f"Table 6, {row}, {attack}" for row in "ABCD" for attack in OF_TABLE_6["learned_from"]
    }
    missing -= {f"{c.title}, {c.attack}" for c in found}
    return problems + [f"{name} is missing" for name in sorted(missing)]


def test_the_committed_records_cross_what_is_open() -> None:
    records, _ = paper.gather()
    assert whole_problems(cells(records, paper.printed())) == []
    pooled = [r for r in records if len(r.learned_from) != 1]  # the control
    lost = whole_problems(cells(pooled, paper.printed()))
    assert {f"Table 2, Anet, {a}: learned from is not varied" for a in FOUR} <= set(lost)
    own = [r for r in records if r.made_on == r.classifier]
    lost = whole_problems(cells(own, paper.printed()))
    assert {f"Table 4, Anet/Bnet, {a}: read by is not varied" for a in FOUR} <= set(lost)
