"""The frontier: budgets are really kept, failures count, who is nearest, resuming; a small run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import attacks, frontier, measure, peers, scoring
from benchmarks.frontier import Curve, Point
from benchmarks.scoring import Side
from unfool.artifacts import REPO

BUDGETED = [name for name, curve in frontier.curves().items() if curve.made]


class Brightness(nn.Module):
    """Class 1 for images brighter than a half on average, class 0 for the others."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)


def bench(n: int = 4, repeat: int = 1, quick: bool = True) -> measure.Bench:
    """Dark images, all of class 0, before a model that looks at the brightness."""

    class Lab:
        device, dataset = torch.device("cpu"), "mnist5k"

    x, y = torch.full((n, 1, 4, 4), 0.2), torch.zeros(n, dtype=torch.int64)
    lab: Any = Lab()
    return measure.Bench(lab, "toy", repeat, quick, Brightness(), x, y, y + 1, "weights")


def point(
    curve: str, budget: int, l2: float | None, success: float = 1.0, passes: int = 0
) -> Point:
    """A point whose numbers are easy to find again."""
    side = Side(8, [2.0], 12.5, success, l2, forward=passes or budget, backward=budget)
    settings = {
        "classifier": "toy", "dataset": "mnist5k", "threads": 1, "torch": "2", "version": "1.5",
        "skipped": 100, "settings": f"steps={budget}",
    }  # fmt: skip
    return Point(f"{curve} {budget}", curve, budget, 8, settings, side, l2)


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", frontier.BUDGETS)
@pytest.mark.parametrize("name", ["unfool ddn", "unfool fmn"])
def test_our_budgets_are_kept(name: str, budget: int) -> None:
    """A pass for each step and those before them: none more than the budget, and few less."""
    torch.manual_seed(0)
    net = measure.Counting(nn.Sequential(nn.Flatten(), nn.Linear(16, 10))).eval()
    x = torch.rand(2, 1, 4, 4)
    y = net(x).argmax(dim=1)
    net.forward_passes = 0
    frontier.curves()[name].at(budget)[0](net, x, y, y)
    passes = net.forward_passes
    assert 0.98 * budget <= passes / 2 <= budget
    assert net.backward_passes <= net.forward_passes


def test_rivals_are_sought_where_passes_abound() -> None:
    rivals = {budget: frontier.ddn_settings(budget).get("rivals", 0) for budget in frontier.BUDGETS}
    assert rivals == {10: 0, 20: 0, 50: 0, 100: 0, 200: 3, 500: 4, 1000: 4}
    gammas = [frontier.ddn_settings(budget)["gamma"] for budget in frontier.BUDGETS]
    assert gammas == [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05]


@pytest.mark.parametrize("name", BUDGETED)
def test_every_curve_says_its_settings(name: str) -> None:
    """Two budgets that looked alike would be one point in the file."""
    curve = frontier.curves()[name]
    said = [curve.at(budget)[1] for budget in frontier.BUDGETS]
    assert len(set(said)) == len(said)


# --- one point ------------------------------------------------------------------------------------


def attack_of(*levels: float) -> Curve:
    """A curve of a peer that makes image k all as bright as the k-th level."""

    def call(model: nn.Module, x: Tensor, *_: Tensor) -> Tensor:
        model(x)
        return torch.ones_like(x) * torch.tensor(levels).view(-1, 1, 1, 1)

    return Curve("foolbox", "fmn", lambda budget: (call, f"steps={budget}"))


def measured(curve: Curve, budget: int = 10, **more: Any) -> Point:
    return frontier.measure(bench(**more), curve, budget, 4, {}, lambda *_: None)


def test_failures_are_infinitely_far() -> None:
    found = measured(attack_of(0.6, 0.7, 0.9, 0.3))  # the last one does not fool it
    assert found.side
    assert found.side.success == 0.75
    assert found.side.l2 == pytest.approx(4 * 0.5)  # the median of three: 4 times 0.4, 0.5, 0.7
    assert found.l2_all == pytest.approx(4 * 0.6)  # of four: between 0.5 and 0.7
    all_fool = measured(attack_of(0.6, 0.7, 0.9, 0.6))
    assert all_fool.side
    assert all_fool.l2_all == pytest.approx(all_fool.side.l2)
    assert measured(attack_of(0.6, 0.6, 0.3, 0.3)).l2_all is None  # infinite: no JSON can hold it
    assert found.side.forward == 1  # counted, whatever the budget is called


def test_a_peer_that_fails_says_so_and_a_fault_of_ours_is_raised() -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no\nluck")

    found = measured(Curve("foolbox", "fmn", lambda _: (fails, "s")))
    assert (found.error, found.side) == ("RuntimeError: no", None)
    with pytest.raises(RuntimeError):
        measured(Curve("unfool", "fmn", lambda _: (fails, "s")))


def test_timings_are_repeated() -> None:
    found = measured(attack_of(0.6, 0.7, 0.9, 0.3), repeat=3)
    assert found.side
    assert len(found.side.seconds) == 3
    middle = sorted(found.side.seconds)[1]
    assert found.side.ms == pytest.approx(1000 * middle / 4)


def test_a_point_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "frontier.jsonl"
    kept, failed = point("foolbox ddn", 10, None, 0.25), point("foolbox fmn", 10, 1.0)
    scoring.append(path, kept)
    scoring.append(path, replace(failed, error="ValueError: no"))
    scoring.append(path, replace(kept, key="old", schema=99))
    assert scoring.finished_of(path, frontier.point_of) == {kept.key: kept}


# --- who is nearest -------------------------------------------------------------------------------


def test_the_nearest_of_each_budget() -> None:
    points = [
        point("unfool ddn", 10, 2.0), point("unfool fmn", 10, 1.0, 0.9),
        point("adv-lib ddn", 10, 1.6), point("foolbox fmn", 10, 1.5, 0.75),
        point("unfool ddn", 100, 1.55), point("unfool deepfool", 0, 1.4, passes=20),
        point("foolbox fmn", 100, None, 0.25),
    ]  # fmt: skip
    lines = frontier.nearest_table(points).splitlines()
    # ours at 10 must fool all; the peer that may fail is another
    assert lines[2] == (
        "| 10 | unfool ddn: 2 | adv-lib ddn: 1.6 | 1.250 | foolbox fmn: 1.5, fools 75.0 % | 1.333 |"
    )
    assert lines[3] == "| 100 | unfool deepfool: 1.4 | none |  | none |  |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(("value", "said"), [(1.02, "**1.020**"), (1.03, "1.030")])
def test_the_limit_is_in_bold(value: float, said: str) -> None:
    assert frontier.ratio(point("unfool ddn", 10, value), point("adv-lib ddn", 10, 1.0)) == said


def test_an_attack_without_a_budget_counts_from_the_passes_it_took() -> None:
    points = [point("unfool deepfool", 0, 1.4, passes=20), point("adv-lib ddn", 10, 1.6)]
    assert frontier.within(points, 10) == points[1:]
    assert frontier.within(points, 20) == points[:1]


def test_the_page_tells_all() -> None:
    failed = replace(point("adv-lib alma", 20, 1.0), side=None, error="ValueError: no")
    points = [point("unfool ddn", 10, 1.5), point("foolbox ddn", 10, None, 0.25), failed]
    text = frontier.as_page(points, "a machine", "figure.png", "what it shows")
    assert "foolbox 1.5" in text
    assert "unfool 1.5" not in text  # our attacks have versions of their own
    assert "after the first 100" in text
    assert "![what it shows](figure.png)" in text
    assert "| 10 | **unfool ddn** | 100.0 % | 1.5 | 1.5 | 10 | 10 | 12.5 | 8 | steps=10 |" in text
    assert "| 10 | foolbox ddn | 25.0 % |  |  | 10 | 10 |" in text
    assert "| 20 | adv-lib alma | failed: ValueError: no |" in text
    table = [line for line in text.splitlines() if line.startswith("|")][-4:]
    assert len({line.count("|") for line in table}) == 1


def test_the_figure_leaves_out_what_is_infinite() -> None:
    drawn = frontier.draw([point("unfool ddn", 10, 1.5), point("foolbox ddn", 10, None, 0.25)])
    assert "unfool ddn: 1.50 at 10" in drawn.alt
    assert "foolbox" not in drawn.alt


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--curves", "dnd"], "unknown curve 'dnd'.*did you mean 'ddn'"),
        (["--peers", "art"], "unknown library 'art': choose from adv-lib, foolbox"),
        (["--budgets", "1"], "--budgets must be at least 2, not 1"),
        (["--images", "0"], "--images must be at least 1, not 0"),
        (["--repeat", "0"], "--repeat must be at least 1, not 0"),
        (["--quick", "--save"], "--save needs a run without it"),
        (
            ["--images", "950", "--classifier", "anet-mnist", "--peers", "foolbox"],
            "after the first 100",
        ),
    ],
)
def test_misuse_is_answered(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frontier.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("frontier: ")
    assert len(error.splitlines()) == 1
    assert re.search(said, error)


def test_help_names_curves_and_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        frontier.main(["--help"])
    text = capsys.readouterr().out
    for name in ("alma-paper", "pdgd", "10 20 50 100 200 500 1000", "--fresh", "--save"):
        assert name in text


def options(*arguments: str) -> Any:
    found = frontier.parser().parse_args(arguments)
    frontier.check(found)
    return found


def test_plan_goes_budget_by_budget() -> None:
    jobs = frontier.plan(options("--budgets", "50", "20", "50", "--curves", "fmn"), ["foolbox"])
    assert [(curve.name, budget) for curve, budget in jobs] == [
        ("unfool fmn", 20), ("foolbox fmn", 20), ("unfool fmn", 50), ("foolbox fmn", 50),
    ]  # fmt: skip
    assert len(frontier.plan(options(), ["adv-lib", "foolbox"])) == 2 + 9 * 7
    alone = frontier.plan(options("--curves", "deepfool"), [])
    assert [(curve.name, budget) for curve, budget in alone] == [("unfool deepfool", 0)]


def test_other_images_than_those_our_settings_were_found_beside() -> None:
    first = measure.open_bench("mnist5k", "anet-mnist", "cpu", 8, 1, True)
    later = measure.open_bench("mnist5k", "anet-mnist", "cpu", 4, 1, True, skip=4)
    assert torch.equal(first.x[4:], later.x)
    assert torch.equal(first.target[4:], later.target)
    assert not torch.equal(first.x[:4], later.x)


def test_a_small_run_with_a_real_library(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--quick", "--classifier", "anet-mnist", "--out", str(tmp_path), "--peers", "foolbox",
        "--curves", "ddn", "fmn", "deepfool",
    ]  # fmt: skip
    assert frontier.main(arguments) == 0
    path = tmp_path / "frontier.jsonl"
    found = {
        (point.curve, point.budget): point
        for point in scoring.finished_of(path, frontier.point_of).values()
    }
    assert len(found) == 1 + 4 * 2
    for (_, budget), one in found.items():
        assert one.side
        assert not budget or budget - 1 <= one.side.forward <= budget + 1 / one.n
        assert (one.n, one.side.left, one.side.black) == (4, 0, 0)
    assert all(found["unfool ddn", k].side.success == 1 for k in (10, 20))  # type: ignore[union-attr]
    assert str(REPO) not in path.read_text("utf-8")  # it gets committed
    name = "frontier-mnist5k-anet-mnist-cpu"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / f"{name}.json").read_text("utf-8"))) == 9
    assert "| 10 | unfool ddn: " in (tmp_path / f"{name}.md").read_text("utf-8")
    capsys.readouterr()
    assert frontier.main(arguments) == 0
    assert capsys.readouterr().out.count("(from before)") == 9
    assert frontier.main([*arguments, "--images", "3"]) == 0
    assert "(from before)" not in capsys.readouterr().out  # the control: other images


def test_a_missing_library_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, "adv-lib", ("no_such_module", "some-package"))
    assert attacks.present(["adv-lib", "foolbox"]) == ["foolbox"]
    assert "adv-lib is not installed here" in capsys.readouterr().out
