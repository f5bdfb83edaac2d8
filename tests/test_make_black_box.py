"""`make_black_box.py` and its like: whole rows, and a run that was stopped goes on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unfool.artifacts import REPO, Store
from unfool.evaluation import read_rows, wilson
from unfool.lab import Lab


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPO / "results" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab("smoke", store=Store(tmp_path_factory.mktemp("store")))


def problems(rows: list[dict[str, Any]], key: tuple[str, ...], wanted: set[Any]) -> list[str]:
    """What in a file is not one row per cell, or contradicts itself."""
    at = {tuple(row[k] for k in key): row for row in rows}
    found = [f"{cell} is missing" for cell in sorted(wanted - set(at))]
    found += ["a row is there twice"] if len(at) < len(rows) else []
    for cell, row in at.items():
        if (row["low"], row["high"]) != wilson(round(row["accuracy"] * row["n"]), row["n"]):
            found.append(f"{cell}: another interval than Wilson's")
        if row["accuracy"] > row["clean"]:
            found.append(f"{cell}: more right than unattacked")
    return found


def asked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"name": row["attack"]["name"]} for row in rows]


def test_a_black_box_run_goes_on(lab: Lab, tmp_path: Path) -> None:
    made, path = script("make_black_box"), tmp_path / "some.jsonl"
    made.measure(lab, "none", path, images=3, queries=60)
    first = path.read_text("utf-8")
    cells = {(name, eps) for name in made.SETTINGS for eps in made.EPS}
    rows = read_rows(path)
    assert problems(asked(rows), ("name", "eps"), cells) == []
    assert {row["access"] for row in rows} == {"scores", "labels"}
    assert problems(asked(rows)[1:], ("name", "eps"), cells) != []  # the control
    lines = first.splitlines(keepends=True)
    path.write_text("".join(lines[:3]), "utf-8")  # killed within an attack
    made.measure(lab, "none", path, images=3, queries=60)
    assert [(r["attack"], r["eps"], r["accuracy"]) for r in read_rows(path)] == [
        (r["attack"], r["eps"], r["accuracy"]) for r in rows
    ]
    made.measure(lab, "none", path, images=3, queries=60)
    assert len(read_rows(path)) == len(lines)


def test_a_run_in_z_goes_on(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = script("make_in_z"), tmp_path / "some.jsonl"
    monkeypatch.setattr(made, "STEPS", {"f": 2, "bpda": 1, "z-space": 3})
    made.measure(lab, path, images=3)
    rows = read_rows(path)
    cells = {(name, d) for name, sizes in made.ATTACKERS.items() for d in sizes}
    assert problems(rows, ("attacker", "distance"), cells) == []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-2]), "utf-8")
    made.measure(lab, path, images=3)
    assert [r["accuracy"] for r in read_rows(path)] == [r["accuracy"] for r in rows]
    assert len(read_rows(path)) == len(lines)


def test_a_step_in_z_is_as_long_as_it_says() -> None:
    made = script("make_in_z")
    x = torch.full((2, 1, 4, 4), 0.5)
    direction = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = made.towards(x, direction, made.length(0.01, x))
    assert (moved - x).square().mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.01, 0.01])
    clipped = made.towards(x, direction, made.length(1.0, x))
    assert 0 <= float(clipped.min()) <= float(clipped.max()) <= 1
    assert torch.equal(made.towards(x, 0 * direction, 1.0), x)  # no direction, no step


def test_an_outside_judge_takes_the_same_images(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = script("make_outside"), tmp_path / "some.jsonl"
    monkeypatch.setattr(made, "autoattack", lambda model, x, y, eps: x.clone())
    for part in (range(0, 3), range(3, 5), range(0, 3)):
        made.measure(lab, "none", part, path, steps=1)
    rows = read_rows(path)
    assert [(row["first"], row["n"]) for row in rows] == [(0, 3), (3, 2)]
    for row in rows:  # theirs does nothing here, so all stays right that was
        assert row["right_both"] <= row["right_ours"] <= row["right_theirs"] == row["clean"]
    assert made.told("none", rows).startswith("undefended, 5 images: ours ")
    monkeypatch.setattr(made, "autoattack", lambda model, x, y, eps: (x + 0.3).clamp(0, 1))
    with pytest.raises(AssertionError, match="left its ball"):
        made.measure(lab, "none", range(5, 7), path, steps=1)


def test_a_white_box_run_goes_on(lab: Lab, tmp_path: Path) -> None:
    made, path = script("make_white_box"), tmp_path / "some.jsonl"
    small = made.Setting(
        images=6, in_a_ball=(("pgd", 1, {"steps": 3}), ("pgd", 3, {"steps": 3})),
        nearest=(("fmn", "linf", {"norm": "linf", "steps": 20}),),
    )  # fmt: skip
    made.measure(lab, "none", path, small)
    once, thrice, near = rows = read_rows(path)
    assert thrice["accuracy"] <= once["accuracy"] <= once["clean"]  # the first start is the same
    assert near["fooled"] <= near["of"] == round(6 * near["clean"])
    assert near["low"] <= near["median"]
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text(lines[0] + lines[2], "utf-8")
    made.measure(lab, "none", path, small)
    assert read_rows(path) == [once, near, thrice | {"git": read_rows(path)[2]["git"]}]
    assert len(rows) == 3


def test_who_is_never_fooled_is_infinitely_far() -> None:
    made = script("make_white_box")
    x, y = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    stone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    with torch.no_grad():
        stone[1].weight.fill_(1e-3)
        stone[1].bias.copy_(torch.tensor([9.0, 0.0]))
    row = {"attack": {"name": "fmn", "settings": {"norm": "linf", "steps": 20}}, "norm": "linf"}
    clean = torch.tensor([True, True, True, False])
    found = made.nearest(stone, x, y, clean, row)
    assert found == {"fooled": 0, "of": 3, "low": None, "median": None, "high": None}
    with torch.no_grad():  # class 0 while the sum is above 7.2
        stone[1].weight[0], stone[1].weight[1] = 1.0, -1.0
        stone[1].bias.copy_(torch.tensor([-7.2, 7.2]))
    found = made.nearest(stone, x, y, clean, row)
    assert found["fooled"] == found["of"] == 3
    assert found["median"] == pytest.approx(0.05, rel=1e-3)


def test_the_white_box_rows_that_are_committed_are_whole() -> None:
    made, rows = script("make_white_box"), Lab("smoke").committed_rows("white_box")

    def missing(rows: list[dict[str, Any]]) -> list[str]:
        return [
            f"{defense} {wanted}"
            for defense in made.DEFENSES
            for wanted in made.Setting().wanted()
            if not any(
                row["defense"] == defense
                and row["n"] >= 100
                and all(row.get(k) == v for k, v in wanted.items())
                for row in rows
            )
        ]

    assert missing(rows) == []
    assert len(missing(rows[1:])) == 1  # the control
    assert max(row["restarts"] for row in rows if "eps" in row) >= 10


def test_a_run_of_classifiers_goes_on(lab: Lab, tmp_path: Path) -> None:
    made, path = script("make_classifiers"), tmp_path / "some.jsonl"
    for dropout in (*made.READINGS, "printed"):
        made.measure(lab, "b", dropout, path)
    printed, as_run = rows = read_rows(path)
    assert [row["dropout"] for row in rows] == list(made.READINGS)
    for row in rows:
        assert (row["low"], row["high"]) == wilson(round(row["accuracy"] * row["n"]), row["n"])
    assert printed["accuracy"] != as_run["accuracy"]  # B's two readings are two networks
    assert not list(tmp_path.glob(".*.safetensors"))  # no checkpoint is left behind


def test_defense_gans_b_is_explained_by_what_its_code_did() -> None:
    rows = Lab("smoke").committed_rows("classifiers")
    at = {(row["classifier"], row["dropout"]): row for row in rows}
    assert {name for name, _ in at} >= {"a", "b", "d"}
    assert at["b", "as run"]["low"] <= 0.962 <= at["b", "as run"]["high"]
    assert at["b", "printed"]["low"] > 0.962


def test_what_is_committed_is_whole() -> None:
    box, z = script("make_black_box"), script("make_in_z")
    rows = asked(Lab("smoke").committed_rows("black_box"))
    left = {(row["defense"], row["name"], row["eps"]): row["accuracy"] for row in rows}
    assert all(left[d, "square", e] <= accuracy for (d, _, e), accuracy in left.items())  # 11
    cells = {(d, n, e) for d in box.DEFENSES for n in box.SETTINGS for e in box.EPS}
    assert problems(rows, ("defense", "name", "eps"), cells) == []
    assert {(row["n"], row["queries"]) for row in rows} == {(box.IMAGES, box.QUERIES)}
    assert len(problems(rows[1:], ("defense", "name", "eps"), cells)) == 1  # the control
    rows = Lab("smoke").committed_rows("in_z")
    cells = {(name, d) for name, sizes in z.ATTACKERS.items() for d in sizes}
    assert problems(rows, ("attacker", "distance"), cells) == []
    flattered = [rows[0] | {"high": 1.01}, *rows[1:]]
    assert problems(flattered, ("attacker", "distance"), cells) != []  # the control


def test_ours_is_at_most_two_points_weaker_than_the_outside_judge() -> None:
    made, rows = script("make_outside"), Lab("smoke").committed_rows("outside")

    def weaker(rows: list[dict[str, Any]]) -> list[str]:
        return [
            name
            for name in made.CLASSIFIERS
            for own in [[row for row in rows if row["defense"] == name]]
            if sum(row["n"] for row in own) < 500
            or sum(row["right_ours"] - row["right_theirs"] for row in own) > 0.02 * 500
        ]

    assert weaker(rows) == []
    assert weaker(rows[1:]) == [rows[0]["defense"]]  # the control: too few
    assert weaker([rows[0] | {"right_ours": rows[0]["right_theirs"] + 20}, *rows[1:]]) != []


def test_redrawing_tells_a_goal_that_misleads_from_a_search_that_misses() -> None:
    made = script("make_redrawn")
    x, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    x_adv = torch.full_like(x, 0.3)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with torch.no_grad():  # class 0 while the mean is below 0.2
        net[1].weight.copy_(torch.tensor([[-0.25] * 4, [0.25] * 4]))
        net[1].bias.copy_(torch.tensor([0.2, -0.2]))

    class Search:
        def __init__(self, drawn: float) -> None:
            self.drawn = drawn  # of what was to be drawn

        def reconstruct(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            made = images * self.drawn
            return made, ((made - images) ** 2).flatten(1).mean(1)

    led_off = made.redrawn(net, Search(0.9), x, x_adv, y)
    assert (led_off["right_clean"], led_off["right_attacked"], led_off["nearer"]) == (2, 0, 2)
    assert led_off["error_crossed"] == pytest.approx(0.09)
    missed = made.redrawn(net, Search(-2.0), x, x_adv, y)
    assert missed["nearer"] == 0
