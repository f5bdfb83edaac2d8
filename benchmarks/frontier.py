"""The frontier: how near the border attacks come with how many passes, ours and the libraries'.

`python3 course.py bench frontier` makes the environment .venv-bench and runs this; in an
environment that holds only some of the libraries, `python -m benchmarks.frontier` does with those.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.attacks import LOCAL, SAVED, Misuse, answered, present, unknown, warn_if_busy
from benchmarks.measure import (
    CLASSIFIERS,
    Bench,
    best_batch,
    circumstances,
    clock,
    device_name,
    look,
    open_bench,
)
from benchmarks.peers import ADV, FOOL, Call, Comparison, version, with_adv_lib, with_foolbox
from benchmarks.scoring import SCHEMA, Side, append, finished_of, key_of, number
from unfool import attacks, figures
from unfool.attacks import ATTACKS, AttackSettings
from unfool.evaluation import distortion
from unfool.progress import Progress, shown

BUDGETS = (10, 20, 50, 100, 200, 500, 1000)
OURS = "unfool"
FRESH = 100  # as many rightly read test images are skipped: our settings were found beside those
IMAGES = 64
LIMIT = 1.02  # our best is to lie within 2 % of the best peer's
JUDGE = Comparison("nearest error in L2", IMAGES, AttackSettings("ddn"), {})  # any error counts

EXAMPLES = """examples:
  course.py bench frontier --quick             does it run? 4 images, two small budgets
  course.py bench frontier                     all of it; 20 to 40 minutes on two cores
  course.py bench frontier --budgets 10 20 50 100 --curves ddn fmn
  course.py bench frontier --save              and write the table and the figure that are committed

A budget is how many times each image may pass through the classifier. Every finished point is kept
in DIR/frontier.jsonl: the same call takes up where it was stopped.
"""


@dataclass(frozen=True)
class Curve:
    """An attack whose number of passes can be chosen, or one that needs as many as it needs.

    Attributes:
        library: "unfool" or a peer.
        attack: its name there.
        made: budget → the call and its settings in words; None for an attack without a budget.
        alone: the call and the settings of such an attack.
    """

    library: str
    attack: str
    made: Callable[[int], tuple[Call, str]] | None = None
    alone: tuple[Call, str] | None = None

    @property
    def name(self) -> str:
        return f"{self.library} {self.attack}"

    def at(self, budget: int) -> tuple[Call, str]:
        """Return the call with this budget (0: there is none to choose) and its settings."""
        found = self.made(budget) if self.made else self.alone
        assert found
        return found


# --- who takes part -------------------------------------------------------------------------------


def curves() -> dict[str, Curve]:
    """Return every curve by its name; a step of each is a forward and a backward pass."""
    listed = (
        Curve(OURS, "ddn", lambda budget: ours("ddn", **ddn_settings(budget))),
        Curve(OURS, "fmn", lambda budget: ours("fmn", steps=budget - 1)),
        Curve(OURS, "deepfool", alone=ours("deepfool")),
        Curve(OURS, "cw-fast", alone=ours("carlini_wagner_l2", preset="fast")),
        Curve(ADV, "ddn", lambda budget: adv_lib("ddn", steps=budget, levels=None)),
        Curve(ADV, "fmn", lambda budget: adv_lib("fmn", norm=2, steps=budget)),
        Curve(ADV, "alma", lambda budget: adv_lib("alma", num_steps=budget)),
        Curve(ADV, "alma-paper", lambda budget: adv_lib("alma", **alma_settings(budget))),
        Curve(ADV, "pdgd", lambda budget: adv_lib("pdgd", num_steps=budget)),
        Curve(FOOL, "ddn", lambda budget: foolbox("DDNAttack", steps=budget - 1)),
        Curve(FOOL, "fmn", lambda budget: foolbox("L2FMNAttack", steps=budget - 1)),
    )
    return {curve.name: curve for curve in listed}


def ddn_settings(budget: int) -> dict[str, Any]:
    """Return ours, found on training images: the fewer steps, the longer they begin.

    Where passes abound, other walks lead nearer than longer ones: to 3 or 4 rivals.
    """
    if budget < 200:
        gamma, radius = (0.3, 2.0) if budget < 20 else (0.2, 2.0) if budget < 50 else (0.1, 1.0)
        return {"steps": budget - 1, "gamma": gamma, "gamma_last": 0.001, "radius": radius}
    rivals = 3 if budget < 500 else 4
    steps = (budget - 2) // (rivals + 1)  # 2: the right ones are sought, and their rivals
    gamma = 0.1 if steps < 150 else 0.05
    return {"steps": steps, "gamma": gamma, "gamma_last": 0.001, "rivals": rivals}


def alma_settings(budget: int) -> dict[str, Any]:
    """Return its authors': a first step of length 1, and α by how many steps there are."""
    return {"num_steps": budget, "init_lr_distance": 1, "α": 0.5 if budget <= 100 else 0.9}


def spelt(settings: Mapping[str, Any]) -> str:
    """Return settings in words."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as it comes"


def ours(name: str, **settings: Any) -> tuple[Call, str]:
    """Return a call of ours."""
    return lambda model, x, y, _: ATTACKS[name](model, x, y, **settings), spelt(settings)


def adv_lib(name: str, **settings: Any) -> tuple[Call, str]:
    """Return a call of adv-lib."""
    return with_adv_lib(name, **settings), spelt(settings)


def foolbox(name: str, **settings: Any) -> tuple[Call, str]:
    """Return a call of foolbox, which looks at its images once more when it is done."""
    return with_foolbox(name, **settings), spelt(settings)


# --- one point ------------------------------------------------------------------------------------


@dataclass
class Point:
    """What one attack reaches with one budget.

    Attributes:
        key, settings, error, made: as a benchmark row's; see `Row`.
        curve: its name; library and attack.
        budget: passes that were allowed; 0 where an attack takes as many as it needs.
        side: what was measured, see `Side`.
        l2_all: median L2 over all images, a failure being infinitely far; None where that is the
            median: where half of them fail.
    """

    key: str
    curve: str
    budget: int
    n: int
    settings: dict[str, Any]
    side: Side | None = None
    l2_all: float | None = None
    error: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def is_ours(self) -> bool:
        return self.curve.startswith(f"{OURS} ")


def point_of(fields: dict[str, Any]) -> Point:
    """Return a point from what `asdict` made of it."""
    return Point(**{**fields, "side": Side(**fields["side"]) if fields["side"] else None})


def settings_of(bench: Bench, curve: Curve, budget: int, n: int) -> dict[str, Any]:
    """Return all that decides a point: another value of any makes another point."""
    ours_is = curve.library == OURS
    return {
        "curve": curve.name, "budget": budget, "n": n, "repeat": bench.repeat,
        "quick": bench.quick, "settings": curve.at(budget)[1], "skipped": FRESH,
        "dataset": bench.lab.dataset, "classifier": bench.classifier, "weights": bench.weights,
        "version": attacks.VERSIONS[our_name(curve)] if ours_is else version(curve.library),
        "torch": torch.__version__, "device": device_name(bench.device),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def our_name(curve: Curve) -> str:
    """Return the name of our attack in `ATTACKS`."""
    return "carlini_wagner_l2" if curve.attack == "cw-fast" else curve.attack


def measure(
    bench: Bench, curve: Curve, budget: int, n: int, batches: dict[str, int], progress: Progress
) -> Point:
    """Return a point; where the peer fails, it says so. `batches` remembers each one's best."""
    settings = settings_of(bench, curve, budget, n)
    point = Point(key_of(settings), curve.name, budget, n, settings, made=circumstances())
    call = curve.at(budget)[0]
    try:
        if curve.name not in batches:  # ours cuts up the images itself
            is_fixed = curve.library == OURS or bench.quick
            shortest = curve.at(BUDGETS[0])[0]
            batches[curve.name] = n if is_fixed else best_batch(bench, shortest, n, progress)
        progress(0, bench.repeat, f"budget {budget or 'free'}")
        seen = look(bench, JUDGE, call, batches[curve.name], n)
    except Exception as error:
        if curve.library == OURS:
            raise  # a fault of ours is no result
        point.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return point
    more = [clock(bench, call, seen.side.batch, n) for _ in range(bench.repeat - 1)]
    seen.side.seconds = [seen.seconds, *more]
    seen.side.ms = 1000 * median(seen.side.seconds) / n
    l2 = distortion(bench.x[:n].cpu(), seen.images)["l2"].masked_fill(~seen.judged.counts, math.inf)
    point.side, point.l2_all = seen.side, finite(median(l2.tolist()))
    return point


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if math.isfinite(value) else None


# --- the command line -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the frontier; returns 0, 1 where a library failed, 2 when misused, 130 when stopped."""
    options = parser().parse_args(arguments)

    def work() -> int:
        check(options)
        return trace(options)

    return answered("frontier", work)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="course.py bench frontier",
        description="How near attacks come in L2 with how many passes, on the same test images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(dict.fromkeys(curve.attack for curve in curves().values()))
    add = top.add_argument
    add("--curves", nargs="+", metavar="A", help=f"these attacks only, of all: {names}")
    add("--peers", nargs="+", metavar="P", default=(ADV, FOOL), help=f"default: {ADV} {FOOL}")
    add(
        "--budgets",
        nargs="+",
        type=int,
        metavar="B",
        help=f"default: {' '.join(map(str, BUDGETS))}",
    )
    add("--dataset", choices=CLASSIFIERS, default="mnist5k", help="default: %(default)s")
    add("--classifier", metavar="NAME", help="default: anet for mnist5k, resnet8 for mnist-m")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or auto; default: %(default)s")
    add("--images", type=int, metavar="N", help=f"default: {IMAGES}")
    add("--repeat", type=int, default=1, metavar="K", help="timings; default: %(default)s")
    add("--quick", action="store_true", help="does it run? 4 images, budgets 10 and 20")
    add("--fresh", action="store_true", help="measure again what has been measured")
    add("--save", action="store_true", help="write to benchmarks/results/, too")
    add("--out", type=Path, default=LOCAL, metavar="DIR", help="default: results/local")
    return top


def check(options: argparse.Namespace) -> None:
    """Refuse names that there are not and numbers that measure nothing; fill in the defaults."""
    known = tuple(dict.fromkeys(curve.attack for curve in curves().values()))
    for kind, names, there in (
        ("curve", options.curves or (), known),
        ("library", options.peers, (ADV, FOOL)),
    ):
        unknown(kind, names, there)
    options.budgets = sorted(set(options.budgets or (BUDGETS[:2] if options.quick else BUDGETS)))
    options.images = IMAGES if options.images is None else options.images
    if options.quick:
        options.images = min(options.images, 4)
    for flag in ("images", "repeat"):
        if getattr(options, flag) < 1:
            raise Misuse(f"--{flag} must be at least 1, not {getattr(options, flag)}")
    if options.budgets[0] < 2:
        raise Misuse(f"--budgets must be at least 2, not {options.budgets[0]}: one pass looks")
    if options.quick and options.save:
        raise Misuse("--quick shows that it runs, not how near: --save needs a run without it")


Job = tuple[Curve, int]


def plan(options: argparse.Namespace, peers: Sequence[str]) -> list[Job]:
    """Return what to measure: budget by budget, so that a run cut short is whole so far."""
    chosen = [
        curve
        for curve in curves().values()
        if curve.library in (OURS, *peers) and curve.attack in (options.curves or [curve.attack])
    ]
    jobs = [(curve, budget) for budget in options.budgets for curve in chosen if curve.made]
    return jobs + [(curve, 0) for curve in chosen if curve.made is None]


def trace(options: argparse.Namespace) -> int:
    """Measure what is not there yet, a line for each point; write table and figure."""
    jobs = plan(options, present(options.peers))
    bench = open_bench(
        options.dataset, options.classifier, options.device, options.images, options.repeat,
        options.quick, skip=FRESH,
    )  # fmt: skip
    warn_if_busy()
    path = options.out / "frontier.jsonl"
    known = {} if options.fresh else finished_of(path, point_of)
    points, batches = [], dict[str, int]()
    for count, (curve, budget) in enumerate(jobs, start=1):
        point = known.get(key_of(settings_of(bench, curve, budget, options.images)))
        again = point is not None
        if point is None:
            with shown(curve.name) as progress:
                point = measure(bench, curve, budget, options.images, batches, progress)
            append(path, point)
        points.append(point)
        print(f"[{count}/{len(jobs)}] {in_short(point)}{' (from before)' * again}", flush=True)
    write(bench, points, options)
    return 1 if any(point.error for point in points) else 0


def in_short(point: Point) -> str:
    """Return one line about a point."""
    name = f"{point.curve:<18} {point.budget or '':>5}"
    if point.side is None:
        return f"{name}  failed: {point.error}"
    side = point.side
    l2 = "none" if side.l2 is None else f"{side.l2:.4f}"
    fooled = f"{100 * side.success:.1f} %"
    return f"{name}  {fooled:>8}, L2 {l2}, {side.forward:.1f} passes, {side.ms:.2f} ms/image"


# --- what is written ------------------------------------------------------------------------------


def write(bench: Bench, points: Sequence[Point], options: argparse.Namespace) -> None:
    """Write the points as JSON, as Markdown and as a figure, and say where."""
    name = f"frontier-{options.dataset}-{bench.classifier}-{bench.device.type}"
    body = json.dumps([asdict(point) for point in points], indent=1, ensure_ascii=False)
    drawn = draw(points)
    page = as_page(points, device_name(bench.device), f"{name}.png", drawn.alt)
    for folder in [options.out, *([SAVED] if options.save else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(body + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        (folder / f"{name}.png").write_bytes(base64.b64decode(drawn.png()))
        print(f"Table: {folder / name}.md")


def as_page(points: Sequence[Point], machine: str, picture: str, alt: str) -> str:
    """Return the Markdown page: the circumstances, who is nearest at each budget, all points."""
    first = points[0].settings
    libraries = {
        point.curve.split()[0]: point.settings["version"] for point in points if not point.is_ours
    }
    lines = [
        f"# Nearest errors in L2 at equal passes: {first['classifier']}, {first['dataset']}",
        "",
        f"{machine}, threads: {first['threads']}, torch {first['torch']}"
        + "".join(f"; {name} {version}" for name, version in libraries.items())
        + f". n = {points[0].n} test images that the classifier reads rightly, after the first "
        f"{first['skipped']}. What the columns mean: `benchmarks/README.md`.",
        "",
        f"![{alt}]({picture})",
        "",
        nearest_table(points),
        "",
        point_table(points),
    ]
    return "\n".join(lines) + "\n"


def best(points: Sequence[Point], *, is_ours: bool, all_fooled: bool) -> Point | None:
    """Return the point with the least median L2 over all images, failures infinitely far."""
    side = [
        point
        for point in points
        if point.is_ours == is_ours
        and point.side
        and point.l2_all is not None
        and (point.side.success == 1 or not all_fooled)
    ]
    return min(side, key=lambda point: point.l2_all or 0, default=None)


def within(points: Sequence[Point], budget: int) -> list[Point]:
    """Return the points of a budget, and those without one that took no more passes."""
    return [
        point
        for point in points
        if point.side
        and (point.budget == budget or (not point.budget and point.side.forward <= budget))
    ]


def nearest_table(points: Sequence[Point]) -> str:
    """Return a Markdown table: at each budget our best that fools all, and the best peers.

    The peer in the third column fools all images, too; that in the fifth has the least median
    whatever it fools.
    """
    lines = [
        "| passes | ours | best peer that fools all | ours / peer | best peer of all | ours / peer "
        "|",
        "|---:|---|---|---:|---|---:|",
    ]
    for budget in sorted({point.budget for point in points if point.budget}):
        there = within(points, budget)
        mine = best(there, is_ours=True, all_fooled=True)
        cells = [str(budget), told(mine)]
        for all_fooled in (True, False):
            peer = best(there, is_ours=False, all_fooled=all_fooled)
            cells += [told(peer), ratio(mine, peer)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(point: Point | None) -> str:
    """Return a point in a cell."""
    if point is None or point.side is None:
        return "none"
    fooled = "" if point.side.success == 1 else f", fools {100 * point.side.success:.1f} %"
    return f"{point.curve}: {number(point.l2_all)}{fooled}"


def ratio(mine: Point | None, peer: Point | None) -> str:
    """Return ours over theirs, in bold where ours is within the limit."""
    if not (mine and peer and mine.l2_all and peer.l2_all):
        return ""
    value = mine.l2_all / peer.l2_all
    return f"**{value:.3f}**" if value <= LIMIT else f"{value:.3f}"


def point_table(points: Sequence[Point]) -> str:
    """Return a Markdown table of all points, by budget."""
    lines = [
        "| budget | library, attack | success | L2 | L2, all | forward | backward | ms/image "
        "| batch | settings |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for point in sorted(points, key=lambda point: point.budget):
        name = f"**{point.curve}**" if point.is_ours else point.curve
        budget, side = str(point.budget or "free"), point.side
        if side is None:
            lines.append(f"| {budget} | {name} | failed: {point.error} |" + " |" * 7)
            continue
        cells = (
            budget, name, f"{100 * side.success:.1f} %", number(side.l2),
            "" if point.l2_all is None else number(point.l2_all), number(side.forward),
            number(side.backward), number(side.ms), str(side.batch), point.settings["settings"],
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: Sequence[Point]) -> figures.Figure:
    """Return the figure: median L2 over all images against the passes really made."""
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.side and point.l2_all is not None:
            series.setdefault(point.curve, []).append((point.side.forward, point.l2_all))
    for curve in series.values():
        curve.sort()
    return figures.frontier(
        series,
        apart=[name for name in series if not name.startswith(f"{OURS} ")],
        top=1.45,
        xlabel="forward passes per image",
        ylabel="median L2, failures infinitely far",
        caption="How near with how many passes?",
    )


if __name__ == "__main__":
    sys.exit(main())
