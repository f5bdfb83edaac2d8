"""What a comparison says: which images count, ratios of pairs, share of the bound, the table.

Pure: nothing here measures, prints or reads a clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn

from unfool.evaluation import distortion, predict

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA = 1
TOLERANCE = 1e-4  # a fortieth of an 8-bit step: rounding may carry an image so far over its limits
SAME = 1e-5  # two images are the same where no pixel differs by more


@dataclass
class Side:
    """One library's part of a row; its images and their number are those of the row.

    Attributes:
        batch: images per call.
        seconds: of each repetition, for all images.
        ms: median milliseconds per image.
        success: share of the images that count; see `counted`.
        l2, l0, linf, l1: medians over those, None where there are none.
        left, black: images that left [0, 1] or the ball, and images returned black.
        forward, backward: images passed through the model either way, per image attacked.
        mib: growth of memory during the attack, or None where it was not measured.
        share: of the time, what the passes alone cost at the best batch; see `bound`.
    """

    batch: int
    seconds: list[float] = field(default_factory=list)
    ms: float = 0.0
    success: float = 0.0
    l2: float | None = None
    l0: float | None = None
    linf: float | None = None
    l1: float | None = None
    left: int = 0
    black: int = 0
    forward: float = 0.0
    backward: float = 0.0
    mib: float | None = None
    share: float | None = None


@dataclass
class Row:
    """One peer beside ours, on the same images.

    Attributes:
        key: what decides the result: a row with the same key is not measured again.
        settings: the same in words, see `Bench.settings`.
        way: "best": each at its best batch, ours the whole set in one call; else the batch of both.
        ratio: their time over ours: median, smallest and largest of the pairs.
        same: images that both made the same; both: that count on both sides.
        l2_both: median L2 of ours and of theirs over the latter.
        error: why there are no numbers.
        made: where, when and from what.
    """

    key: str
    attack: str
    peer: str
    way: str
    n: int
    settings: dict[str, Any]
    ours: Side | None = None
    theirs: Side | None = None
    ratio: tuple[float, float, float] | None = None
    same: int = 0
    both: int = 0
    l2_both: tuple[float, float] | None = None
    error: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


# --- which images count ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What becomes of each image, (N,) each: does it count; has it left its limits; is it black?"""

    counts: Tensor
    left: Tensor
    black: Tensor


def counted(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, target: Tensor | None, eps: float | None
) -> Judged:
    """Return which images fool the plain model and are legal.

    An image counts where the model sees the target (without one: not y), every pixel is finite, in
    [0, 1] and within eps of x, and it is not black: a library that returns black images where it
    fails would else be praised for them. All tensors on the CPU; x, x_adv (N, C, H, W).
    """
    legal = x_adv.isfinite() & (x_adv >= -TOLERANCE) & (x_adv <= 1 + TOLERANCE)
    if eps is not None:
        legal &= (x_adv - x).abs() <= eps + TOLERANCE
    left = ~legal.flatten(1).all(dim=1)
    black = (x_adv == 0).flatten(1).all(dim=1) & (x != 0).flatten(1).any(dim=1)
    read = predict(model, x_adv.where(x_adv.isfinite(), x))  # what was not finite counts no more
    hit = read != y if target is None else read == target
    return Judged(hit & ~left & ~black, left, black)


def describe(side: Side, x: Tensor, x_adv: Tensor, judged: Judged) -> Side:
    """Fill in success and distortion."""
    counts = judged.counts
    side.success = float(counts.float().mean())
    side.left, side.black = int(judged.left.sum()), int(judged.black.sum())
    sizes = distortion(x[counts], x_adv[counts])
    side.l2, side.l0, side.linf = (middle(sizes[norm]) for norm in ("l2", "l0", "linf"))
    side.l1 = middle(sizes["l1"] * x[0].numel())  # the sum: `distortion` gives the mean
    return side


def middle(values: Tensor) -> float | None:
    """Return the median (the mean of the two in the middle), or None of nothing."""
    return float(median(values.tolist())) if len(values) else None


def compare(row: Row, x: Tensor, ours: tuple[Tensor, Judged], theirs: tuple[Tensor, Judged]) -> Row:
    """Fill in what needs the images of both sides."""
    mine, their = ours[0], theirs[0]
    row.same = int(((mine - their).abs() <= SAME).flatten(1).all(dim=1).sum())
    both = ours[1].counts & theirs[1].counts
    row.both = int(both.sum())
    if row.both:
        l2 = [middle(distortion(x[both], made[both])["l2"]) or 0.0 for made in (mine, their)]
        row.l2_both = (l2[0], l2[1])
    return row


# --- times ----------------------------------------------------------------------------------------


def ratio_of_pairs(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median, smallest and largest of theirs / ours, pair by pair.

    The two times of a pair were taken one after the other, so what slows the machine down for a
    while slows both.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"pairs need as many times of each: {len(ours)} and {len(theirs)}")
    ratios = [their / mine for mine, their in zip(ours, theirs, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def bound(forward: float, backward: float, costs: tuple[float, float]) -> float:
    """Return the seconds per image that the passes alone would take.

    Args:
        forward, backward: passes per image.
        costs: seconds per image of one forward and of one input gradient (without its forward),
            each measured at its best batch.
    """
    return forward * costs[0] + backward * costs[1]


# --- the file of finished rows --------------------------------------------------------------------


class Keyed(Protocol):
    """What the file of finished rows must know of one."""

    key: str
    error: str
    schema: int


Kept = TypeVar("Kept", bound=Keyed)


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a short name of the settings; the order of their names does not matter."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def append(path: Path, row: DataclassInstance) -> None:
    """Append a row as one line, under a lock, whatever half line a killed run may have left."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(row), sort_keys=True, ensure_ascii=False) + "\n"
    with FileLock(f"{path}.lock"), path.open("ab+") as file:
        file.seek(max(0, file.seek(0, 2) - 1))
        torn = file.read() not in (b"", b"\n")
        file.write((b"\n" if torn else b"") + line.encode())


def finished(path: Path) -> dict[str, Row]:
    """Return the rows of the file that hold numbers, by key; of several the last one.

    Rows with an error, half lines and rows of another schema are left out: they are made again.
    """
    return finished_of(path, row_of)


def finished_of(path: Path, made_of: Callable[[dict[str, Any]], Kept]) -> dict[str, Kept]:
    """Return what `made_of` makes of the lines of a file, as `finished` does for rows."""
    rows: dict[str, Kept] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            row = made_of(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        if row.schema == SCHEMA and not row.error:
            rows[row.key] = row
    return rows


def row_of(fields: dict[str, Any]) -> Row:
    """Return a row from what `asdict` made of it."""
    for side in ("ours", "theirs"):
        fields[side] = Side(**fields[side]) if fields[side] else None
    for pair in ("ratio", "l2_both"):
        fields[pair] = tuple(fields[pair]) if fields[pair] else None
    return Row(**fields)


# --- the table ------------------------------------------------------------------------------------

HEAD = (
    "library", "batch", "ms/image", "ours beside it", "times ours", "success", "L2", "L1", "L0",
    "L∞", "forward", "backward", "MiB", "of the bound",
)  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table of the rows of one attack: ours first, then each peer.

    `ours` is timed anew beside every peer; its own lines show the median of those times.
    """
    rows = list(rows)
    done = [row for row in rows if row.ours and row.theirs]
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    for way in dict.fromkeys(row.way for row in done):
        lines.append(line_of(ours_of([row for row in done if row.way == way]), "**unfool**"))
    lines += [line_of(row.theirs, row.peer, row) for row in done if row.theirs]
    notes = [note for row in rows for note in notes_on(row)]
    return "\n".join(lines + [""] * bool(notes) + list(dict.fromkeys(notes)))


def ours_of(rows: Sequence[Row]) -> Side:
    """Return our side, with the medians of what was measured beside each peer."""
    sides = [row.ours for row in rows if row.ours]
    shares = [side.share for side in sides if side.share is not None]
    merged = Side(**{**asdict(sides[0]), "ms": median(side.ms for side in sides)})
    merged.share = median(shares) if shares else None
    return merged


def line_of(side: Side, name: str, row: Row | None = None) -> str:
    """Return one line of the table."""
    beside = row.ours if row else None
    ratio = row.ratio if row else None
    cells = (
        name + (", at its best" if row and row.way == "best" else ""),
        str(side.batch),
        number(side.ms),
        number(beside.ms if beside else None),
        f"**{ratio[0]:.2f}** [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio else "",
        f"{100 * side.success:.1f} %",
        number(side.l2),
        number(side.l1),
        number(side.l0),
        number(side.linf),
        number(side.forward),
        number(side.backward),
        number(side.mib),
        "" if side.share is None else f"{100 * side.share:.0f} %",
    )
    return "| " + " | ".join(cells) + " |"


def number(value: float | None) -> str:
    """Return four significant digits at most, and no exponent for what is measured here."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def notes_on(row: Row) -> list[str]:
    """Return what a reader of the table must know about a row, as list items."""
    if row.error:
        return [f"- {row.peer} ({row.way}) failed: {row.error}"]
    notes = []
    for name, side in (("unfool", row.ours), (row.peer, row.theirs)):
        where = f"- {name}, batch {side.batch}:" if side else ""
        if side and side.left:
            notes.append(f"{where} {side.left} of {row.n} images left [0, 1] or the ball.")
        if side and side.black:
            notes.append(f"{where} {side.black} of {row.n} images came back black.")
    if row.l2_both and row.way == "best":
        l2 = f"median L2 there {number(row.l2_both[0])} (ours) and {number(row.l2_both[1])}"
        notes.append(
            f"- {row.peer}: {row.both} of {row.n} images count on both sides, {l2}; "
            f"{row.same} of {row.n} are the same."
        )
    return notes
