"""How the cost of a batch grows with images, attacks, classifiers and seeds, over a decade each.

    .venv/bin/python benchmarks/scale.py            measure, and draw
    .venv/bin/python benchmarks/scale.py --draw     draw what was measured

What is measured is processor time of this one process, not the clock's: on a machine that others
use, too, it is what stays nearly the same. torch is imported before. Each row of
`benchmarks/results/scale.jsonl` is one point; the figure is `results/figures/scale.png`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unfool import figures
from unfool.artifacts import REPO, Store
from unfool.attacks import paper_attacks
from unfool.defenses.pix2pix import Settings, train
from unfool.evaluation import read_rows
from unfool.figures import Figure
from unfool.files import write_text
from unfool.lab import Lab

ROWS = REPO / "benchmarks" / "results" / "scale.jsonl"
PICTURE = REPO / "results" / "figures" / "scale.png"
IMAGES = (20, 50, 100, 200)
COUNTS = (1, 2, 5, 10)
CLASSIFIERS = ("anet", "bnet", "a", "b", "c", "d", "e", "f", "resnet8", "resnet20")
Row = dict[str, Any]


def main() -> None:
    options = arguments()
    if not options.draw:
        torch.set_num_threads(1)
        os.environ["UNFOOL_PROGRESS"] = "off"
        with tempfile.TemporaryDirectory() as folder:
            rows = list(measured(Path(folder)))
        write_text(ROWS, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    figure = draw(read_rows(ROWS))
    PICTURE.write_bytes(base64.b64decode(figure.png()))
    print(figure.alt)


def arguments() -> argparse.Namespace:
    """Whether to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


def measured(folder: Path) -> Iterator[Row]:
    """Measure every point; the unit along the last three axes is a cell at the size of `smoke`."""
    cell(folder / "warm", "anet", 99)  # what is loaded on first use is nobody's cost
    lab = Lab("classroom", store=Store(folder / "images"))
    lab.classifier("anet")
    for name in ("deepfool", "jsma"):
        for n in IMAGES:
            seconds = spent(partial(lab.adversarial_set, name, images=n))
            yield {"axis": f"images, {name}", "n": n, "seconds": seconds}
    settings = Settings(width=8, discriminator_width=8, epochs=2, batch_size=10)
    for n in IMAGES:
        x = lab.data.train.images[:n]
        seconds = spent(partial(train, x, x, settings))
        yield {"axis": "images, purifier's training", "n": n, "seconds": seconds}
    lab = Lab("smoke", store=Store(folder / "attacks"))
    lab.classifier("anet")
    overshoots = (0.02 * k for k in range(1, 11))  # of one kind: others cost more or less
    deepfools = (
        partial(lab.adversarial_set, "deepfool", images=16, overshoot=o) for o in overshoots
    )
    yield from summed("attacks", deepfools)
    nets = (partial(cell, folder / "classifiers", name, 0) for name in CLASSIFIERS)
    yield from summed("classifiers", nets)
    seeds = (partial(cell, folder / "seeds", "anet", seed) for seed in range(10))
    yield from summed("seeds", seeds)


def cell(folder: Path, classifier: str, seed: int) -> None:
    """Train a classifier, attack it, train a purifier on the attack, measure it."""
    lab = Lab("smoke", seed=seed, store=Store(folder))
    made = lab.adversarial_set("deepfool", classifier=classifier)
    seen = paper_attacks(lab.dataset)[:2]
    purifier = lab.defense("pix2pix", classifier=classifier, attacks=seen)
    lab.evaluate(purifier, made, classifier=classifier, append=False)


def summed(axis: str, parts: Iterable[Callable[[], object]]) -> Iterator[Row]:
    """The cost of the first 1, 2, 5 and 10 parts."""
    total = 0.0
    for n, part in enumerate(parts, 1):
        total += spent(part)
        if n in COUNTS:
            yield {"axis": axis, "n": n, "seconds": round(total, 3)}


def spent(work: Callable[[], object]) -> float:
    """Return the processor seconds of this process that a call takes."""
    start = time.process_time()
    work()
    return round(time.process_time() - start, 3)


def draw(rows: list[Row]) -> Figure:
    """Return the figure of measured rows."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["axis"], []).append((row["n"], row["seconds"]))
    panels = {
        "images": {k: v for k, v in curves.items() if k.startswith("images, ")},
        "parts of a grid": {k: v for k, v in curves.items() if not k.startswith("images, ")},
    }
    named = {
        title: {name.removeprefix("images, "): curve for name, curve in some.items()}
        for title, some in panels.items()
    }
    return figures.scaling(
        named,
        ylabel="processor seconds",
        caption="Processor time of one process on one thread. Left: one part on more images; "
        "right: a grid of more parts, each as small as in profile smoke.",
    )


if __name__ == "__main__":
    main()
