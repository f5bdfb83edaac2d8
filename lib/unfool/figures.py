"""Every picture of the course, from tensors or records; nothing is computed here but layout.

Each function returns a `Figure` with `alt` (what it shows, in words, for who can't see it; its
numbers are compared when a notebook is replayed) and `caption` (one line under it). Nothing is told
by colour alone: marks, labels and line styles say it too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec

import matplotlib
import matplotlib.colors
import matplotlib.patches
import matplotlib.style
import numpy as np
from matplotlib import figure as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from unfool.evaluation import Record

INK, QUIET, GRID = "#1f2430", "#6b7280", "#e5e7eb"
RIGHT, WRONG = "#0b7a75", "#c1440e"
SERIES = ["#1f5fa8", "#c1440e", "#0b7a75", "#8a5a00", "#6d3fa0", "#4b5563"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = ["-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same picture everywhere
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
DPI = 110


class Figure(mpl.Figure):
    """A matplotlib figure that knows what it shows in words."""

    alt: str = ""
    caption: str = ""

    def png(self) -> str:
        """Return the picture as base64 text."""
        buffer = io.BytesIO()
        with matplotlib.style.context(["default", STYLE]):
            # No metadata: the same figure is the same bytes, whatever made it.
            self.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return base64.b64encode(buffer.getvalue()).decode()


P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the house style, whatever matplotlib's global settings are, and leave those alone."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def _new(width: float, height: float, alt: str, caption: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.alt, figure.caption = alt, caption
    return figure


@_styled
def images(
    rows: Mapping[str, Tensor],
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    right: Mapping[str, Sequence[bool]] | None = None,
    signed: Iterable[str] = (),
    alt: str = "",
    caption: str,
) -> Figure:
    """Draw rows of images, each row with its name at the left.

    Args:
        rows: name -> images (K, C, H, W) in [0, 1]; equal K.
        captions: name -> K short texts under the images.
        right: name -> K flags: a caption is marked with a tick or a cross and coloured.
        signed: names of rows that hold perturbations: any sign, grey is none.
        alt: see `Figure`; by default the rows' names and captions.
        caption: see `Figure`.
    """
    captions, right = captions or {}, right or {}
    alt = alt or "; ".join(
        f"{len(batch)} images, {name}"
        + (f": {', '.join(captions[name])}" if name in captions else "")
        for name, batch in rows.items()
    )
    columns = len(next(iter(rows.values())))
    heights = [1.34 if name in captions else 1.0 for name in rows]
    figure = _new(1.1 + 0.72 * columns, 0.72 * sum(heights) + 0.1, alt, caption)
    axes = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, (name, batch) in zip(axes, rows.items(), strict=True):
        for k, axis in enumerate(line):
            _image(axis, batch[k], name in signed)
            if name in captions:
                _verdict(axis, captions[name][k], right[name][k] if name in right else None)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def verdicts(
    rows: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
    truth: Tensor,
    classes: Sequence[str],
    *,
    signed: Iterable[str] = (),
    caption: str,
) -> Figure:
    """Draw rows of images with what a classifier reads under each, marked right or wrong.

    Args:
        rows: name -> images (K, C, H, W) in [0, 1].
        read: name -> predicted classes (K,); rows without are drawn without verdict.
        truth: true classes (K,).
        classes: names of the classes.
        signed, caption: see `images`.
    """
    return images(
        rows,
        captions={name: [classes[int(c)] for c in got] for name, got in read.items()},
        right={name: (got.cpu() == truth.cpu()).tolist() for name, got in read.items()},
        signed=signed,
        alt="; ".join(
            f"{name}: read as {', '.join(classes[int(c)] for c in got)}"
            for name, got in read.items()
        )
        + f"; true: {', '.join(classes[int(c)] for c in truth)}",
        caption=caption,
    )


@_styled
def gallery(
    clean: Tensor,
    attacked: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
    sizes: Mapping[str, Mapping[str, Tensor]],
    truth: Tensor,
    classes: Sequence[str],
    *,
    caption: str,
) -> Figure:
    """Draw attacks x images: each result beside its perturbation, what it is read as, and norms.

    Args:
        clean: images (K, C, H, W) in [0, 1].
        attacked: name of an attack -> its images, like `clean`.
        read: name -> predicted classes (K,).
        sizes: name -> what `evaluation.distortion` gives, (K,) each.
        truth: true classes (K,).
        classes: names of the classes.
        caption: see `Figure`.
    """
    alt = f"{len(clean)} images: {', '.join(classes[int(c)] for c in truth)}; " + "; ".join(
        f"{name}: "
        + ", ".join(
            f"read as {classes[int(read[name][k])]} ({_norms(size, k)})" for k in range(len(clean))
        )
        for name, size in sizes.items()
    )
    width, height = 1.02 + 1.46 * len(clean), 0.98 + 1.14 * len(attacked)  # inches
    figure = _new(width, height, alt, caption)
    figure.set_layout_engine("none")  # all places are known, and so many take it seconds

    def place(left: float, top: float, picture: Tensor, signed: bool = False) -> Axes:
        size = 0.68
        box = (left / width, 1 - (top + size) / height, size / width, size / height)
        axis: Axes = figure.add_axes(box)
        _image(axis, picture, signed)
        return axis

    tops = {"clean": 0.04} | {name: 1.0 + 1.14 * row for row, name in enumerate(attacked)}
    for name, top in tops.items():
        figure.text(0.92 / width, 1 - (top + 0.34) / height, name, ha="right", va="center")
    for k, image in enumerate(clean):
        left = 1.02 + 1.46 * k
        _verdict(place(left + 0.35, tops["clean"], image), classes[int(truth[k])], None)
        for name, batch in attacked.items():
            got = int(read[name][k])
            _verdict(place(left, tops[name], batch[k]), classes[got], got == int(truth[k]))
            change = place(left + 0.7, tops[name], batch[k] - image, signed=True)
            change.set_xlabel(_norms(sizes[name], k, "\n"), fontsize=7.5, labelpad=3)
    return figure


def _norms(sizes: Mapping[str, Tensor], k: int, between: str = ", ") -> str:
    """Say how large the change of image k is in each norm."""
    l0, l2, linf = (float(sizes[norm][k]) for norm in ("l0", "l2", "linf"))
    return between.join([f"L0 {l0:.0f}", f"L2 {l2:.2f}", f"L∞ {linf:.2f}"])


@_styled
def panels(
    pictures: Mapping[str, Tensor],
    *,
    signed: Iterable[str] = (),
    marked: Mapping[str, Tensor] | None = None,
    caption: str,
) -> Figure:
    """Draw a few images large, side by side, each under its title.

    Args:
        pictures: title -> image (C, H, W) in [0, 1].
        signed: titles of those that hold any sign; mid-grey is 0.
        marked: title -> pixels to mark with a cross, (H, W) bool.
        caption: see `Figure`.
    """
    signed, marked = set(signed), marked or {}
    alt = "; ".join(
        f"{title}: "
        + (f"from {x.min():.2f} to {x.max():.2f}" if title in signed else f"mean {x.mean():.3f}")
        + (f", {int(marked[title].sum())} pixels marked" if title in marked else "")
        for title, x in pictures.items()
    )
    figure = _new(1.75 * len(pictures) + 0.1, 1.98, alt, caption)
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        _image(axis, picture, title in signed)
        axis.set_title(title)
        if title in marked:
            row, column = marked[title].cpu().nonzero().T.numpy()
            axis.plot(column, row, "x", color=WRONG, ms=2.4, mew=0.9)
    return figure


def _image(axis: Axes, image: Tensor, signed: bool) -> None:
    array = image.detach().cpu().permute(1, 2, 0).numpy()
    if signed:
        top = max(float(np.abs(array).max()), 1e-9)
        array = (array / top + 1) / 2
    grey = array.shape[2] == 1
    axis.imshow(
        array[:, :, 0] if grey else array,
        cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest",
    )  # fmt: skip
    _framed(axis)


def _framed(axis: Axes) -> None:
    """Leave out the ticks, and draw all four sides."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)


def _verdict(axis: Axes, text: str, right: bool | None) -> None:
    mark = "" if right is None else (" ✓" if right else " ✗")
    colour = INK if right is None else (RIGHT if right else WRONG)
    axis.set_xlabel(text + mark, color=colour, labelpad=3, fontweight="bold" if mark else "normal")


@_styled
def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    xlabel: str,
    ylabel: str,
    percent: bool = True,
    marks: Mapping[float, str] | None = None,
    caption: str,
) -> Figure:
    """Draw one curve per series, labelled at its end, with its interval as a band.

    Each has its own dashes and marks, so that of two that coincide both are seen.

    Args:
        x: positions.
        series: name -> values, as many as x; shares in [0, 1] where `percent`; NaN is left out.
        intervals: name -> (low, high), as many as x.
        xlabel, ylabel: with units.
        percent: show the y axis from 0 to 100 %.
        marks: x position -> text of a dotted vertical line.
        caption: see `Figure`.
    """
    spell = "{:.1%}" if percent else "{:.3g}"
    alt = f"{ylabel} against {xlabel} = {', '.join(f'{v:g}' for v in x)}. " + "; ".join(
        f"{name}: {', '.join('none' if np.isnan(v) else spell.format(v) for v in values)}"
        for name, values in series.items()
    )
    figure = _new(6.6, 3.6, alt, caption)
    axis = figure.subplots()
    scale = 100 if percent else 1
    for k, (name, values) in enumerate(series.items()):
        colour, y = SERIES[k % len(SERIES)], scale * np.asarray(values)
        axis.plot(
            x, y, color=colour, ls=DASHES[k % len(DASHES)], marker=MARKERS[k % len(MARKERS)],
            ms=4.5, lw=1.8, label=name,
        )  # fmt: skip
        if intervals and name in intervals:
            low, high = scale * np.asarray(intervals[name]).T
            axis.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
    for position, text in (marks or {}).items():
        axis.axvline(position, color=QUIET, ls=":", lw=1.2)
        axis.annotate(
            text, (position, 1), xycoords=("data", "axes fraction"), color=QUIET,
            xytext=(4, -4), textcoords="offset points", va="top", fontsize=8.5,
        )  # fmt: skip
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", color=GRID)
    if all(float(v).is_integer() for v in x):  # no half epochs
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axis.set_ylim(-2, 102)
    if len(series) > 1:
        _label_ends(axis)
    return figure


def _label_ends(axis: Axes) -> None:
    """Write each curve's name at its end, moved up or down where names would overlap.

    One that ends in NaN has no end, and hence no name.
    """
    low, high = axis.get_ylim()
    curves = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
    curves = [line for line in curves if not np.isnan(np.asarray(line.get_ydata())[-1])]
    ends = [float(np.asarray(line.get_ydata())[-1]) for line in curves]
    for line, end in zip(curves, _apart(ends, 0.048 * (high - low), high), strict=True):
        axis.annotate(
            f" {line.get_label()}", (np.asarray(line.get_xdata())[-1], end), color=line.get_color(),
            va="center", xytext=(4, 0), textcoords="offset points", annotation_clip=False,
        )  # fmt: skip


def _apart(values: Sequence[float], least: float, top: float) -> list[float]:
    """Return the values, moved up (below `top`: down) where they are not `least` apart.

    Of equal ones the first comes on top.
    """
    order = sorted(range(len(values)), key=lambda k: (values[k], -k))
    placed = list(values)
    for below, k in pairwise(order):
        placed[k] = max(placed[k], placed[below] + least)
    for k in reversed(order):
        placed[k] = min(placed[k], top)
        top = placed[k] - least
    return placed


@_styled
def frontier(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    apart: Iterable[str] = (),
    top: float | None = None,
    caption: str,
) -> Figure:
    """Draw what each attack costs against what it reaches, the cost on a logarithmic axis.

    Args:
        points: name -> (cost > 0, value) from the cheapest to the dearest; several are joined. A
            value that is infinite, or no number, is left out.
        xlabel, ylabel: with units.
        apart: names drawn thin, with hollow marks: those of others, or measured elsewhere.
        top: the axis ends at this many times the least value, so that what lies near it can be
            told apart; what is larger is left out.
        caption: see `Figure`.
    """
    alt = f"{ylabel} against {xlabel}. " + "; ".join(
        f"{name}: " + ", ".join(f"{value:.2f} at {cost:,.0f}" for cost, value in curve)
        for name, curve in points.items()
    )
    figure = _new(7.2, 3.7, alt, caption)
    axis = figure.subplots()
    apart = set(apart)
    for k, (name, curve) in enumerate(points.items()):
        colour, (cost, value) = SERIES[k % len(SERIES)], np.asarray(curve, dtype=float).T
        axis.plot(
            cost, np.where(np.isfinite(value), value, np.nan), color=colour, label=name,
            ls=DASHES[k % len(DASHES)] if len(curve) > 1 else "none",
            marker=MARKERS[k % len(MARKERS)], ms=6 if name in apart else 7, mew=1.6,
            lw=1.1 if name in apart else 1.8, mfc="white" if name in apart else colour,
        )  # fmt: skip
    if top is not None:
        least = min(v for curve in points.values() for _, v in curve if np.isfinite(v))
        axis.set_ylim(0.985 * least, top * least)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda cost, _: f"{cost:,.0f}")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(color=GRID)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)
    return figure


@_styled
def intervals(
    rows: Sequence[str],
    panels: Mapping[str, Sequence[tuple[float, float, float] | None]],
    *,
    caption: str,
) -> Figure:
    """Draw shares with their intervals as dots with whiskers, one panel per measure.

    Args:
        rows: names, such as defences, from top to bottom.
        panels: title -> (share, low, high) in [0, 1] for each row, or None where undefined.
        caption: see `Figure`.
    """
    alt = "; ".join(
        f"{title}: " + ", ".join(f"{row} {_spelt(v)}" for row, v in zip(rows, values, strict=True))
        for title, values in panels.items()
    )
    figure = _new(2.9 * len(panels) + 0.8, 0.5 * len(rows) + 0.95, alt, caption)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for k, value in enumerate(values):
            if value is None:
                axis.annotate("not defined", (50, k), ha="center", va="center", color=QUIET)
                continue
            share, low, high = (100 * v for v in value)
            colour, marker = SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]
            axis.plot([low, high], [k, k], color=colour, lw=3, solid_capstyle="round", alpha=0.45)
            axis.plot(share, k, marker, color=colour, ms=7)
            axis.annotate(
                f"{share:.1f}", (share, k), xytext=(0, 7), textcoords="offset points",
                ha="center", color=INK, fontsize=9,
            )  # fmt: skip
        axis.set_title(title, loc="left")
        axis.set_xlim(-4, 106)
        axis.set_ylim(len(rows) - 0.5, -0.75)
        axis.set_xlabel("% of images")
        axis.grid(axis="x", color=GRID)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(rows)), rows)
    return figure


def _spelt(value: tuple[float, float, float] | None) -> str:
    if value is None:
        return "not defined"
    return f"{value[0]:.1%} ({value[1]:.1%} to {value[2]:.1%})"


def defenses(records: Mapping[str, Record], *, caption: str = "") -> Figure:
    """Draw the three accuracies of records, by name of the defence, with their 95 % intervals."""
    panels: dict[str, list[tuple[float, float, float] | None]] = {
        "recovered": [
            None
            if r.recovered_accuracy is None
            else (r.recovered_accuracy, r.recovered_low, r.recovered_high)
            for r in records.values()
        ],
        "end to end": [
            (r.end_to_end_accuracy, r.end_to_end_low, r.end_to_end_high) for r in records.values()
        ],
        "defended clean": [
            (r.defended_clean_accuracy, r.defended_clean_low, r.defended_clean_high)
            for r in records.values()
        ],
    }
    one = next(iter(records.values()))
    default = (
        f"three accuracies with 95 % intervals; {one.attack} fooled {one.n_success} of "
        f"{one.n_attacked} attacked images."
    )
    return intervals(list(records), panels, caption=caption or default)


def comparison(
    rows: Mapping[str, Sequence[Record]],
    attacks: Mapping[str, str],
    *,
    reported: Mapping[str, Mapping[str, float]] | None = None,
    caption: str,
) -> Figure:
    """Draw defended clean and recovered accuracy as a table, each the mean over the seeds.

    Args:
        rows: name -> records of one defence, of any attacks and seeds. Clean accuracy is taken
            from the attack with the most images.
        attacks: name of an attack in records -> heading of its column.
        reported: name -> recovered accuracy by attack, as printed elsewhere; set apart.
        caption: see `Figure`.
    """
    table: dict[str, list[float | None]] = {}
    for name, records in rows.items():
        most = max(r.n_images for r in records)
        clean = [r.defended_clean_accuracy for r in records if r.n_images == most]
        table[name] = [sum(clean) / len(clean)]
        for attack in attacks:
            got = [r.recovered_accuracy for r in records if r.attack == attack]
            known = [v for v in got if v is not None]
            table[name].append(sum(known) / len(known) if known else None)
    for name, printed in (reported or {}).items():
        table[name] = [None, *(printed.get(attack) for attack in attacks)]
    columns = ["clean", *attacks.values()]
    return heatmap(table, columns, apart=reported or {}, caption=caption)


@_styled
def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    highlight: int | None = None,
    xlabel: str,
    percent: bool = True,
    caption: str,
) -> Figure:
    """Draw one horizontal bar per name; `highlight` is drawn hatched and in the warning colour."""
    spell = "{:.1%}" if percent else "{:.3g}"
    alt = f"{xlabel}: " + ", ".join(
        f"{name} {spell.format(value)}" for name, value in zip(names, values, strict=True)
    )
    figure = _new(5.2, 0.28 * len(names) + 0.8, alt, caption)
    axis = figure.subplots()
    shown = [100 * v if percent else v for v in values]
    drawn = axis.barh(range(len(names)), shown, color=SERIES[0], height=0.7)
    if highlight is not None:
        drawn[highlight].set(color=WRONG, hatch="//", edgecolor="white")
    for k, value in enumerate(shown):
        axis.annotate(
            f"{value:.0f}" if percent else f"{value:.2g}", (value, k), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel(xlabel)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    if percent:
        axis.set_xlim(0, 112)
    return figure


@_styled
def heatmap(
    rows: Mapping[str, Sequence[float | None]],
    columns: Sequence[str],
    *,
    apart: Iterable[str] = (),
    caption: str,
) -> Figure:
    """Draw a table of shares, its cells shaded: the darker, the larger.

    Args:
        rows: name -> a share in [0, 1] for each column, or None or NaN where there is none.
        columns: names of the columns.
        apart: names of rows that come from elsewhere: in italics, not shaded.
        caption: see `Figure`.
    """
    apart = set(apart)
    rows = {k: [None if v is None or np.isnan(v) else v for v in row] for k, row in rows.items()}
    alt = f"table of {', '.join(columns)}. " + "; ".join(
        f"{name}: " + ", ".join("none" if v is None else f"{v:.1%}" for v in values)
        for name, values in rows.items()
    )
    figure = _new(1.6 + 0.95 * len(columns), 0.55 + 0.33 * len(rows), alt, caption)
    axis = figure.subplots()
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["#f4f6fa", SERIES[0]])
    for k, (name, values) in enumerate(rows.items()):
        for j, value in enumerate(values):
            shade = "white" if value is None or name in apart else shades(value)
            cell = (j - 0.5, k - 0.5)
            axis.add_patch(
                matplotlib.patches.Rectangle(cell, 1, 1, facecolor=shade, edgecolor="white", lw=2)
            )
            axis.annotate(
                "–" if value is None else f"{100 * value:.1f}", (j, k), ha="center", va="center",
                color="white" if shade != "white" and value and value > 0.65 else INK,
                fontstyle="italic" if name in apart else "normal",
            )  # fmt: skip
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, labelcolor=INK, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    return figure


@_styled
def crossings(
    pairs: Mapping[str, tuple[Tensor, Tensor]], *, level: float = 0.5, caption: str
) -> Figure:
    """Draw where changed pixel values went, before against after, and how many crossed `level`.

    Args:
        pairs: title of a panel -> images before and after, both (N, C, H, W) in [0, 1]; values
            that stayed the same are left out.
        level: a value; drawn as a dotted line in both directions.
        caption: see `Figure`.
    """
    crossed = {title: _crossed(a, b, level) for title, (a, b) in pairs.items()}
    alt = f"changed pixel values, before against after, that crossed {level:g}: " + "; ".join(
        f"{title}: {up:.1%} upwards, {down:.1%} downwards" for title, (up, down) in crossed.items()
    )
    figure = _new(2.2 * len(pairs) + 0.5, 2.75, alt, caption)
    axes = np.atleast_1d(figure.subplots(1, len(pairs), sharey=True))
    for axis, (title, (before, after)) in zip(axes, pairs.items(), strict=True):
        changed = before != after
        counts, _, _ = np.histogram2d(
            after[changed].numpy(), before[changed].numpy(), bins=40, range=[[0, 1], [0, 1]]
        )
        axis.imshow(
            np.log1p(counts), cmap="Greys", vmin=0, vmax=max(1.0, float(np.log1p(counts).max())),
            origin="lower", extent=(0, 1, 0, 1), interpolation="nearest",
        )  # fmt: skip
        axis.axvline(level, color=WRONG, ls=":", lw=1.4)
        axis.axhline(level, color=WRONG, ls=":", lw=1.4)
        up, down = crossed[title]
        for x, y, share in [(level / 2, (1 + level) / 2, up), ((1 + level) / 2, level / 2, down)]:
            axis.annotate(
                f"{share:.1%}", (x, y), ha="center", va="center", color=WRONG, fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
            )  # fmt: skip
        axis.set_title(title, loc="left")
        axis.set_xlabel("before")
        axis.set_xticks([0, level, 1])
        axis.set_yticks([0, level, 1])
    axes[0].set_ylabel("after")
    return figure


def _crossed(before: Tensor, after: Tensor, level: float) -> tuple[float, float]:
    """Of the values that changed, the shares that rose above `level`, and that fell below it."""
    changed = before != after
    n = max(1, int(changed.sum()))
    up = changed & (before <= level) & (after > level)
    down = changed & (before > level) & (after <= level)
    return int(up.sum()) / n, int(down.sum()) / n


@_styled
def unet(shapes: Sequence[tuple[int, int, int]], *, caption: str) -> Figure:
    """Draw a U-Net from the shapes (C, H, W) that its blocks put out, halving then doubling.

    Args:
        shapes: in order: input, the downs, the ups, output.
        caption: see `Figure`.
    """
    alt = "U-Net, input to output: " + " → ".join("×".join(map(str, shape)) for shape in shapes)
    figure = _new(7.6, 3.3, alt, caption)
    axis = figure.subplots()
    middle = len(shapes) // 2
    centres = []
    for k, (channels, height, _) in enumerate(shapes):
        level = min(k, len(shapes) - 1 - k)
        tall, wide = 0.35 + 0.09 * height, 0.16 + 0.055 * np.log2(channels + 1)
        y = -0.62 * level
        axis.add_patch(
            matplotlib.patches.Rectangle(
                (k - wide / 2, y - tall / 2), wide, tall, facecolor="#dbe7f5", edgecolor=SERIES[0]
            )
        )
        axis.annotate(
            f"{channels}×{height}×{height}", (k, y - tall / 2), xytext=(0, -3),
            textcoords="offset points", ha="center", va="top", fontsize=7.8,
        )  # fmt: skip
        centres.append((k, y, wide))
    for k in range(1, middle):
        (a, y, wide_a), (b, _, wide_b) = centres[k], centres[len(shapes) - 1 - k]
        axis.annotate(
            "", (b - wide_b / 2 - 0.04, y), (a + wide_a / 2 + 0.04, y),
            arrowprops={"arrowstyle": "->", "ls": "--", "color": WRONG, "lw": 1.2},
        )  # fmt: skip
    axis.annotate("skip connections", (middle, 0.1), ha="center", color=WRONG, fontsize=9)
    axis.annotate("adversarial", (0, 1.75), ha="center", fontweight="bold")
    axis.annotate("purified", (len(shapes) - 1, 1.75), ha="center", fontweight="bold")
    axis.set_xlim(-0.8, len(shapes) - 0.2)
    axis.set_ylim(-0.62 * middle - 0.75, 2.0)
    axis.set_axis_off()
    return figure


@_styled
def framework(image: Sequence[int], patches: Sequence[int], *, caption: str) -> Figure:
    """Draw how the purifier is used and how it is trained (the paper's Figures 1 and 2).

    Args:
        image: shape (C, H, W) of an image.
        patches: shape (h, w) of what the discriminator puts out.
        caption: see `Figure`.
    """
    size, grid = "×".join(map(str, image)), "×".join(map(str, patches))
    alt = (
        f"In use: adversarial x ({size}), generator G, purified G(x) ({size}), classifier f, its "
        "class. In training: x goes through G to G(x); L1 compares G(x) with the clean y; the "
        f"discriminator D sees (x, y) and (x, G(x)) and gives {grid} logits, real or fake."
    )
    figure = _new(7.6, 4.1, alt, caption)
    axis = figure.subplots()
    axis.annotate("in use", (-0.5, 3.75), fontweight="bold")
    for x, text, kind in [
        (0.2, f"adversarial x\n{size}", "data"),
        (2.2, "generator G", "net"),
        (4.2, f"purified G(x)\n{size}", "data"),
        (6.2, "classifier f\n(as it is)", "fixed"),
    ]:
        _box(axis, x, 3.2, text, kind)
    for x in (0.2, 2.2, 4.2):
        _arrow(axis, (x + 0.72, 3.2), (x + 1.28, 3.2))
    _arrow(axis, (6.92, 3.2), (7.4, 3.2))
    axis.annotate("class", (7.45, 3.2), va="center")
    axis.plot([-0.6, 8.1], [2.62, 2.62], color=GRID, lw=1.5)
    axis.annotate("in training", (-0.5, 2.3), fontweight="bold")
    _box(axis, 0.2, 1.55, f"adversarial x\n{size}", "data")
    _box(axis, 2.2, 1.55, "generator G", "net")
    _box(axis, 4.2, 1.55, f"G(x)\n{size}", "data")
    _box(axis, 4.2, 0.0, f"clean y\n{size}", "data")
    _box(axis, 6.2, 0.8, "discriminator D", "net")
    _arrow(axis, (0.92, 1.55), (1.48, 1.55))
    _arrow(axis, (2.92, 1.55), (3.48, 1.55))
    axis.annotate(
        "", (4.2, 1.27), (4.2, 0.28), arrowprops={"arrowstyle": "<->", "color": WRONG, "lw": 1.4}
    )
    axis.annotate("L1", (4.08, 0.78), color=WRONG, ha="right", va="center", fontweight="bold")
    _arrow(axis, (4.92, 1.55), (5.7, 1.1))
    _arrow(axis, (4.92, 0.0), (5.7, 0.5))
    axis.annotate("(x, G(x))", (5.35, 1.5), ha="left", va="center", fontsize=8.5)
    axis.annotate("(x, y)", (5.35, 0.08), ha="left", va="center", fontsize=8.5)
    _arrow(axis, (6.92, 0.8), (7.35, 0.8))
    axis.annotate(f"{grid} logits:\nreal or fake", (7.4, 0.8), va="center", fontsize=8.5)
    axis.set_xlim(-0.7, 8.4)
    axis.set_ylim(-0.45, 4.0)
    axis.set_axis_off()
    return figure


def _box(axis: Axes, x: float, y: float, text: str, kind: str) -> None:
    """Draw a box: "data" plain, "net" filled, "fixed" filled with a dashed edge."""
    axis.annotate(
        text, (x, y), ha="center", va="center", fontsize=8.8,
        bbox={
            "boxstyle": "round,pad=0.45" if kind == "data" else "square,pad=0.55",
            "facecolor": "white" if kind == "data" else "#dbe7f5",
            "edgecolor": QUIET if kind == "data" else SERIES[0],
            "linestyle": "--" if kind == "fixed" else "-",
        },
    )  # fmt: skip


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.3})


@_styled
def regions(
    planes: Mapping[str, Tensor],
    paths: Mapping[str, Sequence[tuple[float, float]]],
    *,
    classes: Sequence[str],
    caption: str,
) -> Figure:
    """Draw which class a classifier of two numbers gives each point, and a path through it.

    Args:
        planes: title of a panel -> classes on an even grid over the unit square, (H, W) int64,
            the first row at the bottom.
        paths: title of a panel -> points (horizontal, vertical), from the start to the end.
        classes: names of the classes.
        caption: see `Figure`.
    """
    alt = "; ".join(
        f"{title}: {_areas(plane, classes)}; path "
        + " → ".join(f"({x:.2f}, {y:.2f})" for x, y in paths[title])
        for title, plane in planes.items()
    )
    figure = _new(3.5 * len(planes), 3.6, alt, caption)
    axes = np.atleast_1d(figure.subplots(1, len(planes)))
    colours = matplotlib.colors.ListedColormap(["#eef2f8", "#fbe9df", "#ddf0ee"])
    for axis, (title, plane) in zip(axes, planes.items(), strict=True):
        grid = plane.cpu().numpy()
        axis.imshow(
            grid % colours.N, cmap=colours, vmin=0, vmax=colours.N - 1, origin="lower",
            extent=(0, 1, 0, 1), interpolation="nearest",
        )  # fmt: skip
        for k, name in enumerate(classes):
            if (grid == k).any():
                if (grid != k).any():
                    axis.contour(
                        grid == k, levels=[0.5], colors=QUIET, linewidths=0.8, extent=(0, 1, 0, 1)
                    )
                row, column = _inside(grid == k)
                axis.annotate(
                    name, ((column + 0.5) / grid.shape[1], (row + 0.5) / grid.shape[0]),
                    ha="center", va="center", color=QUIET, fontsize=13, fontweight="bold",
                )  # fmt: skip
        x, y = zip(*paths[title], strict=True)
        axis.plot(x, y, color=WRONG, lw=1.8, marker="o", ms=4)
        axis.plot(x[0], y[0], "o", color=INK, ms=8)
        axis.set_title(title, loc="left")
        axis.set_xlabel("first pixel")
    axes[0].set_ylabel("second pixel")
    return figure


def _areas(plane: Tensor, classes: Sequence[str]) -> str:
    """Say which share of the plane each class has."""
    return ", ".join(
        f"{name} {(plane == k).float().mean().item():.0%}" for k, name in enumerate(classes)
    )


def _inside(mask: np.ndarray) -> tuple[int, int]:
    """Return a point of the region, (row, column): the one nearest to its centre of mass."""
    points = np.argwhere(mask)
    nearest = ((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin()
    return int(points[nearest][0]), int(points[nearest][1])


@_styled
def field(
    planes: Mapping[str, Tensor],
    real: Tensor,
    made: Mapping[str, Tensor],
    *,
    extent: float,
    levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    legend: tuple[str, str] = ("real", "made"),
    caption: str,
) -> Figure:
    """Draw a discriminator's verdict over the plane, with real and made points on it.

    Args:
        planes: title of a panel -> probability "real" on an even grid over
            [-extent, extent] x [-extent, extent], (H, W) in [0, 1], the first row at the bottom;
            empty where only points are to be seen.
        real: real points, (N, 2).
        made: title of a panel -> points that the generator made, (N, 2).
        extent: half the side of the square that is shown.
        levels: probabilities whose contour lines are drawn and labelled.
        legend: what the crosses (`real`) and the dots (`made`) are called.
        caption: see `Figure`.
    """
    alt = "; ".join(
        f"{title}: "
        + (f"D from {planes[title].min():.2f} to {planes[title].max():.2f}, " if planes else "")
        + f"{len(real)} points {legend[0]}, {len(points)} {legend[1]}"
        for title, points in made.items()
    )
    figure = _new(2.75 * len(made), 3.1, alt, caption)
    axes = np.atleast_1d(figure.subplots(1, len(made), sharey=True))
    for axis, (title, points) in zip(axes, made.items(), strict=True):
        if planes:
            grid, sides = (
                planes[title].cpu().numpy(),
                np.linspace(-extent, extent, len(planes[title])),
            )
            axis.imshow(
                grid, cmap="PuOr", vmin=-0.3, vmax=1.3, origin="lower",
                extent=(-extent, extent, -extent, extent), interpolation="bilinear",
            )  # fmt: skip
            if grid.min() < max(levels) and grid.max() > min(levels):
                lines = axis.contour(
                    sides, sides, grid, levels=levels, colors=QUIET, linewidths=0.7
                )
                axis.clabel(lines, fontsize=6.5, fmt="%.1f")
        axis.plot(*real.cpu().numpy().T, "+", color=INK, ms=4, mew=0.6, label=legend[0])
        axis.plot(
            *points.cpu().numpy().T, "o", color=WRONG, ms=2.6, mec="white", mew=0.3, label=legend[1]
        )
        axis.set(title=title, xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        _framed(axis)
    axes[0].legend(loc="upper left", fontsize=7.5, handletextpad=0.1, borderpad=0.3)
    return figure


@_styled
def footprints(planes: Mapping[str, Tensor], side: int, *, caption: str) -> Figure:
    """Draw which pixels one output of a network depends on, with the image's border over it.

    Args:
        planes: title of a panel -> size of the output's gradient, (H, W), 0 where it looks away.
        side: pixels along a side of the image, drawn dashed in the middle.
        caption: see `Figure`.
    """
    seen = {title: [int((p > 0).any(k).sum()) for k in (1, 0)] for title, p in planes.items()}
    alt = "; ".join(f"{title}: {h} × {w} pixels seen" for title, (h, w) in seen.items())
    alt += f"; image {side} × {side}"
    figure = _new(2.5 * len(planes), 2.9, alt, caption)
    axes = np.atleast_1d(figure.subplots(1, len(planes), sharey=True))
    for axis, (title, plane) in zip(axes, planes.items(), strict=True):
        grid = plane.cpu().numpy()
        # The gradient falls off so steeply that only its logarithm shows the edge.
        shade = np.log10(np.where(grid > 0, grid / grid.max(), np.nan)).clip(-4)
        axis.imshow(shade, cmap="Blues", vmin=-6, vmax=0, interpolation="nearest")
        low = (len(grid) - side) / 2 - 0.5
        axis.add_patch(
            matplotlib.patches.Rectangle(
                (low, low), side, side, fill=False, ec=WRONG, ls="--", lw=1.6
            )
        )
        axis.annotate(
            f"image {side} × {side}", (len(grid) / 2, low - 2.5), ha="center", color=WRONG,
            fontsize=8, bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1},
        )  # fmt: skip
        axis.set_title(title)
        _framed(axis)
    return figure


@_styled
def specifications(
    panels: Mapping[str, Sequence[tuple[Mapping[str, str], float]]],
    printed: Mapping[str, float],
    *,
    caption: str,
) -> Figure:
    """Draw a specification curve per panel: all readings, sorted, over the choices they make.

    What all readings choose alike is left out.

    Args:
        panels: title -> readings, each its choices by name and the share in [0, 1] that they give.
        printed: title -> the published share, drawn across.
        caption: see `Figure`.
    """
    alt = "; ".join(
        f"{title}: {len(readings)} readings from {min(s for _, s in readings):.1%} to "
        f"{max(s for _, s in readings):.1%}, printed {printed[title]:.2%}"
        for title, readings in panels.items()
    )
    levels = dict.fromkeys(
        (name, value) for one in panels.values() for chosen, _ in one for name, value in
        chosen.items()
    )  # fmt: skip
    named = [name for name, _ in levels]
    open_ones = [level for level in levels if named.count(level[0]) > 1]
    rows = sorted(open_ones, key=lambda level: named.index(level[0]))
    figure = _new(2.35 * len(panels) + 1.6, 3.2 + 0.15 * len(rows), alt, caption)
    ratios = [3, 0.15 * len(rows)]
    axes = figure.subplots(
        2, len(panels), sharex="col", sharey="row", squeeze=False,
        gridspec_kw={"height_ratios": ratios},
    )  # fmt: skip
    for k, (title, readings) in enumerate(panels.items()):
        curve, choices = axes[:, k]
        ordered = sorted(readings, key=lambda reading: reading[1])
        curve.plot([100 * share for _, share in ordered], ".", color=SERIES[0], ms=2.5)
        curve.axhline(100 * printed[title], color=WRONG, ls="--", lw=1.4)
        curve.annotate(
            f"paper {100 * printed[title]:.2f}", (0.02, 100 * printed[title]), color=WRONG,
            xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            fontsize=8.5,
        )  # fmt: skip
        curve.set_title(title, loc="left")
        curve.grid(axis="y", color=GRID)
        for y, (name, value) in enumerate(rows):
            taken = [x for x, (chosen, _) in enumerate(ordered) if chosen.get(name) == value]
            choices.plot(taken, [y] * len(taken), "|", color=INK, ms=5, mew=0.45)
        choices.tick_params(axis="both", length=0, labelsize=7.5, labelcolor=INK)
        choices.set_xlabel("readings, sorted")
        choices.set_xticks([])
        for side in ("left", "bottom"):
            choices.spines[side].set_visible(False)
    axes[0, 0].set_ylabel("% read rightly")
    axes[0, 0].set_ylim(top=103)
    axes[1, 0].set_yticks(range(len(rows)), [f"{name}: {value}" for name, value in rows])
    axes[1, 0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


@_styled
def scaling(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    ylabel: str,
    caption: str,
) -> Figure:
    """Draw how costs grow, both axes logarithmic, with the slope of each curve.

    Args:
        panels: label of an x axis -> curves by name, each of (size > 0, cost > 0).
        ylabel: what the cost is in.
        caption: see `Figure`.
    """
    slopes = {
        (label, name): _slope(curve)
        for label, curves in panels.items()
        for name, curve in curves.items()
    }
    alt = f"{ylabel}, slope on logarithmic axes. " + "; ".join(
        f"{label}, {name}: {slope:.2f}" for (label, name), slope in slopes.items()
    )
    figure = _new(3.9 * len(panels), 3.5, alt, caption)
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for k, (name, curve) in enumerate(curves.items()):
            axis.plot(
                *np.asarray(curve, dtype=float).T, color=SERIES[k % len(SERIES)],
                ls=DASHES[k % len(DASHES)], marker=MARKERS[k % len(MARKERS)], ms=5, lw=1.6,
                label=f"{name}: slope {slopes[label, name]:.2f}",
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
        axis.xaxis.set_minor_formatter(lambda size, _: "")
        axis.set_xticks(sorted({size for curve in curves.values() for size, _ in curve}))
        axis.yaxis.set_major_formatter(lambda cost, _: f"{cost:g}")
        axis.grid(color=GRID)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(ylabel)
    return figure


def _slope(curve: Sequence[tuple[float, float]]) -> float:
    """The exponent of the power law through the points, by least squares."""
    size, cost = np.log(np.asarray(curve, dtype=float)).T
    return float(np.polyfit(size, cost, 1)[0])
