"""Tables of attackers who know: K50 of known curves, its interval, what is missing stays empty."""

from __future__ import annotations

import math
from typing import Any

import pytest

from unfool.attacker_tables import (
    CLEAN,
    READ,
    TABLES,
    WEIGHTS,
    black_box_table,
    classifiers_table,
    defense_gan_table,
    in_z_table,
    interval,
    k50_table,
    madry_table,
    magnet_table,
    outside_table,
    redrawn_table,
    white_box_tables,
)


def point(n: int | None, accuracy: float, **changes: Any) -> dict[str, Any]:
    """A row of knowledge.jsonl; n None is the attacker with the weights."""
    usual = {
        "defense": "pix2pix", "eps": 0.3, "seed": 0, "n_images": 100, "changes": {},
        "attacker": "weights" if n is None else "surrogate" if n else "f", "n": n or 0,
        "accuracy": accuracy,
    }  # fmt: skip
    return usual | changes


def test_k50_of_a_table_is_that_of_the_mean_of_whole_seeds() -> None:
    """1, 1, 0 at 0, 3 and 15 images: half-way between 4 and 16 in log(1 + n), so at 7."""
    rows = [point(0, 1.0), point(3, 1.0), point(15, 0.0), point(None, 0.0)]
    cells = "| purifier | 0.3 | 100.0 | 0.0 |  | 0.0 | 7 [7, 7] | 7 [7, 7] | 1 | 100 |\n"
    table = k50_table(rows)
    assert table.endswith(cells)
    assert "15 images" in table.splitlines()[0]
    stopped = point(0, 0.2, seed=1)
    other = point(3, 0.0, changes={"width": 8})
    assert k50_table([*rows, stopped, other]) == table
    alike = point(15, 0.125, attacker="same start", seed=1)
    assert k50_table([*rows, alike]) == table.replace("| 0.0 |  |", "| 0.0 | 12.5 |")
    both = [*rows, *(row | {"seed": 1} for row in rows)]
    assert "| 2 | 100 |" in k50_table(both)
    fewer = [row | {"n_images": 50, "accuracy": 0.5} for row in rows]
    assert k50_table([*rows, *fewer]).startswith(table.removesuffix("| 1 | 100 |\n"))
    assert k50_table([*fewer, *rows]).startswith(table.removesuffix("| 1 | 100 |\n"))
    never = [point(0, 1.0), point(15, 1.0), point(None, 0.8)]
    assert "| > 15 [> 15, > 15] | > 15 [> 15, > 15] |" in k50_table(never)


def test_the_interval_shrinks_with_images_and_ends_where_nobody_was() -> None:
    curve = {0: 0.9, 3: 0.7, 15: 0.3, 63: 0.1, WEIGHTS: 0.0}
    wide, narrow = interval([curve], 50), interval([curve], 5000)
    assert wide[0] < narrow[0] < 8.51 < narrow[1] < wide[1]  # K50 is 4 ** 1.625 - 1
    assert interval([curve], 50) == wide  # the same again
    higher = interval([{0: 0.9, 15: 0.5, WEIGHTS: 0.4}], 50)
    assert math.isinf(higher[1])
    apart = [curve, {n: max(0.0, v - 0.2) for n, v in curve.items()}]
    seeds = interval(apart, 5000)
    assert seeds[1] - seeds[0] > narrow[1] - narrow[0]


def test_the_outside_judge_by_hand() -> None:
    row = {
        "defense": "none", "eps": 0.15, "n": 50, "right_ours": 10, "right_theirs": 8,
        "right_both": 7, "seconds": [10.0, 100.0],
    }  # fmt: skip
    table = outside_table([row, row | {"right_theirs": 10}])
    # 6 images only we left right, 4 only AutoAttack did: (6 - 4) / 100.
    assert "| nothing | 0.15 | 100 | 20.0 [13.3, 28.9] | 18.0 [11.7, 26.7] | +2.0 [" in table
    assert table.endswith("| 0.20 | 2.00 |\n")
    assert len(outside_table([row, row | {"defense": "pix2pix"}]).splitlines()) == 4


def test_the_white_box_by_hand() -> None:
    share = {"low": 0.31, "high": 0.58, "accuracy": 0.44}
    ball = {"defense": "none", "dataset": "mnist5k", "eps": 0.15, "restarts": 10} | share
    far = {
        "defense": "none", "dataset": "mnist5k", "norm": "linf", "fooled": 9, "of": 10,
        "low": 0.1, "high": None,
    }  # fmt: skip
    rows = [
        ball | {"attack": {"name": "apgd", "settings": {"losses": ["ce", "dlr"], "steps": 40}}},
        far | {"attack": {"name": "fmn", "settings": {}}, "median": 0.125},
    ]
    made = white_box_tables(rows)
    assert "APGD, ce and dlr, 40 steps × 10 |" in made
    assert "| nothing | 44 [31, 58] |\n\n| defence | FMN, L∞ |" in made
    assert made.endswith("| nothing | 0.12 (0.10 to ∞, 9 of 10) |\n")


def test_pgd_training_on_full_mnist_has_a_table_of_its_own() -> None:
    row = {
        "defense": "adversarial_pgd", "dataset": "mnist", "eps": 0.3, "n": 2000, "restarts": 10,
        "attack": {"name": "pgd", "settings": {"steps": 40}},
        "accuracy": 0.9, "low": 0.886, "high": 0.912,
    }  # fmt: skip
    table = madry_table([row, row | {"dataset": "mnist5k"}])
    assert table.splitlines()[2:] == ["| PGD, 40 steps × 10 | 0.3 | 2,000 | 90.0 [88.6, 91.2] |"]
    assert white_box_tables([row]) == ""


def test_a_search_stands_beside_what_is_cheaper() -> None:
    row = {
        "defense": "pix2pix", "defense_settings": {}, "n_images": 500, "seconds": 2.0,
        **dict.fromkeys(READ, 0.9), **dict.fromkeys(CLEAN, 0.95),
    }  # fmt: skip
    searched = {"defense": "defense_gan", "defense_settings": {"steps": 200, "restarts": 10}}
    first, second = defense_gan_table([row, row | searched]).splitlines()[2:]
    assert first == "| purifier | 500 | 90.0 [90.0, 90.0] | 95.0 [95.0, 95.0] | 2 |"
    assert second.startswith("| Defense-GAN, L = 200, R = 10 | 500 |")


def test_a_drawing_beside_that_of_the_clean_image() -> None:
    row = {
        "n": 100, "right_clean": 99, "right_attacked": 50, "nearer": 98, "error_clean": 0.0034,
        "error_attacked": 0.03, "error_crossed": 0.04,
    }  # fmt: skip
    clean, attacked = redrawn_table([row]).splitlines()[2:]
    assert clean == "| clean | 99.0 [94.6, 99.8] | 0.0034 |  |  |"
    assert attacked == "| attacked | 50.0 [40.4, 59.6] | 0.0300 | 0.0400 | 98 of 100 |"


def test_two_readings_of_a_dropout_side_by_side() -> None:
    row = {"classifier": "b", "dropout": "printed", "accuracy": 0.991, "low": 0.989, "high": 0.9925}
    table = classifiers_table([row])
    assert table.endswith("| B | 99.10 [98.90, 99.25] |  | 96.2 |\n")
    both = [row, row | {"dropout": "as run", "accuracy": 0.5}, row | {"accuracy": 0.992}]
    assert classifiers_table(both).endswith("| B | 99.10, 99.20 | 50.00 [98.90, 99.25] | 96.2 |\n")


def test_both_scorings_of_a_detector_stand_side_by_side() -> None:
    row = {
        "attack": "jsma", "defense_settings": {"false_positives": 0.05}, "n_success": 200,
        "n_images": 2000, "false_positive_rate": 0.046, "rejected": 150,
        "recovered_accuracy": 0.5, "recovered_or_rejected": 0.9,
    }  # fmt: skip
    older = row | {"rejected": 0}
    table = magnet_table([older, row, row | {"defense_settings": {"false_positives": 0.01}}])
    first, second = table.splitlines()[2:]
    assert first.startswith("| 1 | 4.60 of 2,000 | JSMA | 200 |")
    assert second.startswith("| 5 | 4.60 of 2,000 | JSMA | 200 | 75.0 [")  # the last counts
    assert "| 50.0 [43.1, 56.9] | 90.0 [" in second
    assert magnet_table([]) == ""


def test_what_was_not_measured_stays_empty() -> None:
    asked = {"low": 0.31, "high": 0.58, "accuracy": 0.44, "defense": "none", "eps": 0.15}
    table = black_box_table([asked | {"attack": {"name": "spsa"}}])
    assert table.endswith("| nothing | 0.15 |  | 44 [31, 58] |  |\n")
    near = asked | {"distance": 0.005, "attacker": "z-space"}
    assert in_z_table([near]).endswith("| 0.005 |  |  | 44 [31, 58] |\n")
    assert {table([]) for _, table in TABLES.values()} == {""}
    with pytest.raises(KeyError, match="soap"):
        k50_table([point(n, 0.5, defense="soap") for n in (0, 3, None)])
