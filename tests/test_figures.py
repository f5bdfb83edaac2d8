"""Figures: not blank, told in words, the same bytes each time, no global change."""

from __future__ import annotations

import base64
import inspect
import io
import sys
from collections.abc import Callable
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from unfool import figures
from unfool.evaluation import Record
from unfool.figures import Figure


def pictures(n: int = 3, channels: int = 1) -> Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def record(recovered: float | None) -> Record:
    three = {
        f"{name}_{end}": value
        for name in ("recovered", "end_to_end", "defended_clean")
        for end, value in (("low", 0.4), ("high", 0.6))
    }
    return Record(
        dataset="mnist5k", fingerprint="f", profile="smoke", classifier="anet", defense="none",
        attack="fgsm", attack_settings={}, knowledge="f", access="gradients", seed=0, n_images=20,
        n_attacked=18, n_success=12, attack_success=2 / 3, l0_median=1, l2_median=1, linf_median=1,
        clean_accuracy=0.9, recovered_accuracy=recovered, end_to_end_accuracy=0.5,
        defended_clean_accuracy=0.55, clean_difference=0, clean_difference_low=0,
        clean_difference_high=0, targeted_outcome=None, rejected=0, seconds=1, passes=None,
        device="cpu", versions={}, git="", warnings=[], **three,
    )  # fmt: skip


DRAW: dict[str, Callable[[], Figure]] = {
    "images": lambda: figures.images(
        {"clean": pictures(), "change": pictures() - 0.5}, captions={"clean": ["3", "5", "8"]},
        right={"clean": [True, False, True]}, signed=["change"], caption="three digits",
    ),
    "images, colour": lambda: figures.images({"photo": pictures(2, 3)}, caption="two photographs"),
    "verdicts": lambda: figures.verdicts(
        {"clean": pictures(2), "attacked": pictures(2)},
        {"attacked": torch.tensor([1, 0])}, torch.tensor([0, 0]), ("cat", "dog"), caption="pets",
    ),
    "gallery": lambda: figures.gallery(
        pictures(2), {"jsma": pictures(2).flip(0), "fgsm": pictures(2)},
        {"jsma": torch.tensor([1, 0]), "fgsm": torch.tensor([0, 0])},
        {name: {"l0": torch.tensor([64, 3]), "l2": torch.tensor([2.5, 1.0]),
                "linf": torch.tensor([0.75, 1.0])} for name in ("jsma", "fgsm")},
        torch.tensor([0, 0]), ("cat", "dog"), caption="two attacks, two pets",
    ),
    "panels": lambda: figures.panels(
        {"clean": torch.full((1, 8, 8), 0.5), "alpha": pictures(1)[0] - torch.ones(8, 8)},
        signed=["alpha"], marked={"clean": torch.eye(8) > 0}, caption="where it would push",
    ),
    "lines": lambda: figures.lines(
        [0.0, 0.1, 0.2], {"fgsm": [0.0, 0.5, 0.9], "noise": [0.0, 0.1, 0.125]},
        intervals={"fgsm": [(0, 0.1), (0.4, 0.6), (0.8, 1)]}, xlabel="eps", ylabel="success",
        marks={0.15: "the paper's"}, caption="success against eps",
    ),
    "frontier": lambda: figures.frontier(
        {"walk": [(10, 2.0), (100, 1.5), (1000, 1.25)], "step": [(20, 1.75)],
         "elsewhere": [(5000, 1.25)], "lost": [(30, float("inf"))]},
        xlabel="passes", ylabel="length", apart=["elsewhere"], top=1.5, caption="what a pass buys",
    ),
    "intervals": lambda: figures.intervals(
        ["nothing", "threshold"], {"recovered": [None, (0.5, 0.4, 0.625)]}, caption="two defences",
    ),
    "defenses": lambda: figures.defenses({"nothing": record(None), "threshold": record(0.25)}),
    "bars": lambda: figures.bars(
        ["3", "8"], [0.25, 0.75], highlight=1, xlabel="confidence", caption="what it believes",
    ),
    "comparison": lambda: figures.comparison(
        {
            "pure": [
                record(0.5),
                replace(record(1.0), seed=1, defended_clean_accuracy=0.65),
                replace(record(0.25), attack="jsma", n_images=5, defended_clean_accuracy=0.0),
            ]
        },
        {"fgsm": "FGSM", "jsma": "JSMA"}, reported={"paper": {"jsma": 0.9825}}, caption="means",
    ),
    "framework": lambda: figures.framework((1, 28, 28), (12, 12), caption="c"),
    "heatmap": lambda: figures.heatmap(
        {"threshold": [0.25, None], "paper": [0.5, 0.75]}, ["fgsm", "jsma"], apart=["paper"],
        caption="two defences, two attacks",
    ),
    "crossings": lambda: figures.crossings(
        {"step": (torch.tensor([0.0, 0.25, 0.75, 1.0]), torch.tensor([0.75, 0.75, 0.25, 1.0]))},
        caption="where pixels went",
    ),
    "unet": lambda: figures.unet(
        [(1, 32, 32), (4, 16, 16), (8, 8, 8), (4, 16, 16), (1, 32, 32)], caption="down and up",
    ),
    "regions": lambda: figures.regions(
        {"split": (torch.arange(8) >= 4).long().expand(8, 8)},
        {"split": [(0.25, 0.5), (0.75, 0.5)]}, classes=["left", "right"], caption="two halves",
    ),
    "field": lambda: figures.field(
        {"start": torch.linspace(0.2, 0.75, 8).expand(8, 8)}, torch.eye(2),
        {"start": torch.zeros(3, 2)}, extent=1.5, caption="what D thinks",
    ),
    "field, points": lambda: figures.field(
        {}, pictures(1)[0, 0].view(32, 2), {"one": torch.zeros(3, 2), "two": -torch.eye(2)},
        extent=1.5, legend=("clean", "moved"), caption="two runs",
    ),
    "footprints": lambda: figures.footprints(
        {"one layer": torch.nn.functional.pad(torch.ones(4, 4), [2] * 4)}, 3, caption="seen",
    ),
    "specifications": lambda: figures.specifications(
        {"FGSM": [({"a": "1"}, 0.5), ({"a": "2"}, 0.75)], "JSMA": [({"b": "1"}, 0.25)]},
        {"FGSM": 0.6, "JSMA": 0.3}, caption="three readings",
    ),
    "scaling": lambda: figures.scaling(
        {"images": {"line": [(1, 2.0), (10, 20.0)], "square": [(1, 1.0), (10, 100.0)]}},
        ylabel="seconds", caption="what more costs",
    ),
}  # fmt: skip

WORDS = {
    "images": ["3 images, clean: 3, 5, 8", "change"],
    "images, colour": ["2 images, photo"],
    "verdicts": ["attacked: read as dog, cat", "true: cat, cat"],
    "gallery": [
        "2 images: cat, cat; jsma: read as dog (L0 64, L2 2.50, L∞ 0.75), read as cat (L0 3, L2",
        "; fgsm: read as cat",
    ],
    "panels": ["clean: mean 0.500, 8 pixels marked", "alpha: from -"],
    "lines": ["eps = 0, 0.1, 0.2", "fgsm: 0.0%, 50.0%, 90.0%", "noise"],
    "frontier": [
        "length against passes. walk: 2.00 at 10, 1.50 at 100, 1.25 at 1,000; step: 1.75 at 20",
        "lost: inf at 30",
    ],
    "intervals": ["nothing not defined", "threshold 50.0% (40.0% to 62.5%)"],
    "defenses": ["recovered: nothing not defined", "defended clean", "55.0% (40.0% to 60.0%)"],
    "bars": ["confidence: 3 25.0%, 8 75.0%"],
    "heatmap": ["of fgsm, jsma", "threshold: 25.0%, none", "paper: 50.0%, 75.0%"],
    "crossings": ["crossed 0.5", "step: 66.7% upwards, 33.3% downwards"],
    "regions": ["split: left 50%, right 50%; path (0.25, 0.50) → (0.75, 0.50)"],
    "field": ["start: D from 0.20 to 0.75, 2 points real, 3 made"],
    "field, points": ["one: 32 points clean, 3 moved; two: 32 points clean, 2 moved"],
    "footprints": ["one layer: 4 × 4 pixels seen; image 3 × 3"],
    "specifications": [
        "FGSM: 2 readings from 50.0% to 75.0%, printed 60.00%",
        "JSMA: 1 readings from 25.0%",
    ],
    "scaling": ["seconds", "images, line: 1.00; images, square: 2.00"],
    "comparison": ["clean, FGSM, JSMA", "pure: 60.0%, 75.0%, 25.0%", "paper: none, none, 98.2%"],
    "framework": ["1×28×28", "12×12 logits"],
    "unet": ["1×32×32 → 4×16×16 → 8×8×8"],
}


def shown(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"), dtype=float)


def blank(png: str) -> bool:
    """Whether hardly a pixel differs from the background, or all of it is one colour."""
    array = shown(png)
    return float((array < 200).mean()) < 0.004


def test_every_drawing_function_is_tested() -> None:
    public = {
        name
        for name, value in inspect.getmembers(figures, inspect.isfunction)
        if value.__module__ == figures.__name__ and not name.startswith("_")
    }
    assert public == {name.split(",")[0] for name in DRAW}
    assert WORDS.keys() == DRAW.keys()


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_shows_something_and_says_it_in_words(name: str) -> None:
    figure = DRAW[name]()
    assert isinstance(figure, Figure)
    png = figure.png()
    assert not blank(png)
    assert min(shown(png).shape) >= 80
    assert figure.caption
    for words in WORDS[name]:
        assert words in figure.alt


def test_a_blank_picture_is_recognised() -> None:
    empty = figures._new(4, 3, "nothing", "nothing")
    assert blank(empty.png())
    empty.subplots().set_axis_off()
    assert blank(empty.png())


@pytest.mark.parametrize("name", DRAW)
def test_the_same_input_gives_the_same_bytes_and_moves_no_setting(name: str) -> None:
    matplotlib.get_backend()  # resolved here, so that it does not count as a change
    before = dict(matplotlib.rcParams)
    first = DRAW[name]().png()
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 22, "axes.facecolor": "black", "figure.dpi": 30}):
        assert DRAW[name]().png() == first  # the reader's own settings have no say


def test_another_input_gives_another_picture() -> None:
    one = figures.bars(["3"], [0.25], xlabel="confidence", caption="c")
    other = figures.bars(["3"], [0.5], xlabel="confidence", caption="c")
    assert one.png() != other.png()
    assert one.alt != other.alt


def test_verdicts_are_told_without_colour() -> None:
    labels = [
        axis.get_xlabel()
        for axis in DRAW["verdicts"]().axes
        if axis.get_xlabel()
    ]  # fmt: skip
    assert labels == ["dog ✗", "cat ✓"]


def gallery_texts(figure: Figure) -> list[str]:
    return [axis.get_xlabel() for axis in figure.axes]


def test_a_gallery_puts_verdict_and_norms_under_their_pictures() -> None:
    one = ["cat", "dog ✗", "L0 64\nL2 2.50\nL∞ 0.75", "cat ✓", "L0 64\nL2 2.50\nL∞ 0.75"]
    other = ["cat", "cat ✓", "L0 3\nL2 1.00\nL∞ 1.00", "cat ✓", "L0 3\nL2 1.00\nL∞ 1.00"]
    figure = DRAW["gallery"]()
    assert gallery_texts(figure) == one + other
    assert [text.get_text() for text in figure.texts] == ["clean", "jsma", "fgsm"]
    grey = np.asarray(figure.axes[4].images[0].get_array())  # fgsm changed nothing
    assert (grey == 0.5).all()
    assert not (np.asarray(figure.axes[2].images[0].get_array()) == 0.5).all()  # the control


def test_nothing_in_a_gallery_overlaps() -> None:
    assert overlaps(DRAW["gallery"]()) == []
    crowded = DRAW["gallery"]()
    crowded.axes[2].set_xlabel("L0 64\n" * 8)  # the control: it runs into the next row
    assert overlaps(crowded)


def overlaps(figure: Figure) -> list[tuple[int, int]]:
    """Pairs of pictures, with what stands under them, and row names that cover each other."""
    FigureCanvasAgg(figure).draw()
    boxes = [item.get_tightbbox() for item in (*figure.axes, *figure.texts)]
    return [
        (i, j)
        for j, box in enumerate(boxes)
        for i in range(j)
        if box.overlaps(boxes[i])
    ]  # fmt: skip


def test_names_at_the_ends_of_curves_are_moved_apart_and_no_further() -> None:
    assert figures._apart([10.0, 50.0, 90.0], 5, 102) == [10, 50, 90]
    assert figures._apart([50.0, 50.0, 48.0], 5, 102) == [58, 53, 48]
    assert figures._apart([100.0, 100.0, 97.0, 20.0], 5, 102) == [102, 97, 92, 20]


def test_nan_is_left_empty_and_told_as_none() -> None:
    series = {"whole": [0.25, 0.5], "part": [0.25, np.nan]}
    curves = figures.lines([0, 1], series, xlabel="x", ylabel="y", caption="c")
    assert "part: 25.0%, none" in curves.alt
    assert [text.get_text() for text in curves.axes[0].texts] == [" whole"]
    table, other = (
        figures.heatmap({"rival": [0.5, none]}, ["fgsm", "jsma"], caption="c")
        for none in (np.nan, None)
    )
    assert table.alt == other.alt
    assert table.png() == other.png()


def test_curves_that_coincide_are_told_apart_without_colour() -> None:
    same = {"bim": [0.0, 0.5, 1.0], "pgd": [0.0, 0.5, 1.0], "noise": [0.0, 0.0, 0.1]}
    figure = figures.lines([0, 1, 2], same, xlabel="x", ylabel="y", caption="c")
    drawn = [(line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(drawn)) == len({style for style, _ in drawn}) == 3
    names = {text.get_text().strip(): text.xy[1] for text in figure.axes[0].texts}
    assert names.keys() == same.keys()
    assert names["bim"] - names["pgd"] > 4
    assert names["noise"] == pytest.approx(10)


def frontier_problems(figure: Figure) -> list[str]:
    """What of a frontier would not be read without colour, or lies off its axes."""
    (axis,) = figure.axes
    marks = [(line.get_marker(), line.get_linestyle()) for line in axis.lines]
    named = [text.get_text() for text in axis.get_legend().get_texts()]
    problems = [] if len(set(marks)) == len(marks) else ["two attacks look the same"]
    problems += [] if named == [line.get_label() for line in axis.lines] else ["not all named"]
    return problems + ([] if axis.get_xscale() == "log" else ["costs are not logarithmic"])


def test_a_frontier_is_read_without_colour() -> None:
    figure = DRAW["frontier"]()
    assert frontier_problems(figure) == []
    hollow = [line.get_markerfacecolor() == "white" for line in figure.axes[0].lines]
    assert hollow == [False, False, True, False]
    assert figure.axes[0].get_ylim() == pytest.approx((0.985 * 1.25, 1.5 * 1.25))
    for line in figure.axes[0].lines:  # the control
        line.set(marker="o", linestyle="none")
    figure.axes[0].set_xscale("linear")
    assert frontier_problems(figure) == ["two attacks look the same", "costs are not logarithmic"]


def test_drawing_opens_no_window_and_keeps_no_figure() -> None:
    plots = sys.modules.get("matplotlib.pyplot")
    before = plots.get_fignums() if plots else []
    for draw in DRAW.values():
        draw()
    plots = sys.modules.get("matplotlib.pyplot")
    assert (plots.get_fignums() if plots else []) == before
