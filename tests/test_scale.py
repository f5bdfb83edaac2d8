"""How cost grows: what was measured is committed, over a decade each, and drawn as it is."""

from __future__ import annotations

import base64
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import scale
from unfool.artifacts import REPO
from unfool.evaluation import read_rows


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Which axes are not measured over a decade, or do not grow."""
    axes: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        axes.setdefault(row["axis"], []).append((row["n"], row["seconds"]))
    found = [f"{a} is missing" for a in ("attacks", "classifiers", "seeds") if a not in axes]
    found += ["no images"] if not any(a.startswith("images") for a in axes) else []
    for axis, points in axes.items():
        sizes, costs = zip(*points, strict=True)
        if max(sizes) < 10 * min(sizes):
            found.append(f"{axis}: no decade")
        if list(costs) != sorted(costs) or min(costs) <= 0:
            found.append(f"{axis}: more costs less")
    return found


def test_every_axis_was_measured_over_a_decade() -> None:
    rows = read_rows(scale.ROWS)
    assert problems(rows) == []
    assert problems([r for r in rows if r["axis"] != "seeds"]) == ["seeds is missing"]
    assert problems([r for r in rows if r["axis"] != "seeds" or r["n"] < 9]) == ["seeds: no decade"]


def test_the_picture_is_drawn_from_the_rows_and_the_readme_has_its_slopes() -> None:
    rows = read_rows(scale.ROWS)
    figure = scale.draw(rows)
    assert base64.b64decode(figure.png()) == scale.PICTURE.read_bytes(), "run scale.py --draw"
    doctored = [{**r, "seconds": r["seconds"] * r["n"]} for r in rows]  # the control
    assert base64.b64decode(scale.draw(doctored).png()) != scale.PICTURE.read_bytes()
    slopes = [float(text) for text in re.findall(r": (\d\.\d\d)", figure.alt)]
    assert len(slopes) == len({r["axis"] for r in rows})
    readme = (REPO / "workflow" / "README.md").read_text("utf-8")
    assert f"slopes between {min(slopes)} and {max(slopes)}" in readme
    assert Path(scale.PICTURE).name in readme


def test_parts_are_added_up() -> None:
    calls: list[int] = []
    rows = list(scale.summed("parts", [partial(calls.append, k) for k in range(10)]))
    assert [row["n"] for row in rows] == [1, 2, 5, 10]
    assert calls == list(range(10))
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))
