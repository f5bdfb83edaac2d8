"""Tables of rows under results/: attackers who know, Defense-GAN's classifiers, MagNet's alarms.

`unfool tables` writes them into results/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unfool.evaluation import paired_difference, wilson
from unfool.report import markdown_table
from unfool.threats import k50

DRAWS = 1000  # of the bootstrap
WEIGHTS = -1  # where a curve holds the accuracy that the attacker with the weights leaves
NAMES = {
    "none": "nothing", "threshold": "`x > 0.5`", "pix2pix": "purifier", "ape_gan": "APE-GAN",
    "denoiser": "denoiser", "magnet": "MagNet's reformer", "adversarial_pgd": "PGD-trained",
    "defense_gan": "Defense-GAN",
}  # fmt: skip
ATTACKS = {"square": "Square", "spsa": "SPSA", "hop_skip_jump": "HopSkipJump"}
PAPER = {"fgsm": "FGSM", "deepfool": "DeepFool", "jsma": "JSMA", "carlini_wagner_l2": "C&W"}
WHITE = {"pgd": "PGD", "apgd": "APGD", "carlini_wagner_l2": "C&W", "fmn": "FMN"}
NORMS = {"l2": "L2", "linf": "L∞"}
IN_Z = {
    "f": "PGD on the classifier alone", "bpda": "PGD through BPDA",
    "z-space": "towards misread G(z)",
}  # fmt: skip
SHARES = ("accuracy", "low", "high")
READ = ("end_to_end_accuracy", "end_to_end_low", "end_to_end_high")
CLEAN = ("defended_clean_accuracy", "defended_clean_low", "defended_clean_high")
# Clean accuracy on MNIST, %: Samangouei et al. 2018, what the paper's Table 6 takes over.
REPORTED = {"a": 99.7, "b": 96.2, "c": 99.6, "d": 99.2}
Rows = Sequence[Mapping[str, Any]]


def k50_table(rows: Rows) -> str:
    """Return K50 by defence and eps with its interval, as Markdown; "" without rows.

    Rows of surrogates of another design than the defender's are left out. Those of one that starts
    from the defender's first weights have a column of their own.
    """
    same = [row for row in rows if row["attacker"] == "same start" and not row["changes"]]
    started = {(row["defense"], row["eps"], row["n"]): row["accuracy"] for row in same}
    alike = [row for row in rows if row["attacker"] != "same start" and not row["changes"]]
    cells = sorted({(row["defense"], row["eps"]) for row in alike}, key=lambda c: (c[1], c[0]))
    lines = []
    for defense, eps in cells:
        own = [row for row in alike if (row["defense"], row["eps"]) == (defense, eps)]
        curves, images = _curves(own), {row["n_images"] for row in own}
        mean = _mean(curves)
        counts = [n for n in sorted(mean) if n >= 0]
        left = [f"{100 * mean[n]:.1f}" for n in (0, counts[-1], WEIGHTS)]
        found = [_told(curves, max(images), floor, counts[-1]) for floor in (False, True)]
        told = started.get((defense, eps, counts[-1]))
        left.insert(2, "" if told is None else f"{100 * told:.1f}")
        lines.append([NAMES[defense], f"{eps:g}", *left, *found, str(len(curves)),
                      ", ".join(map(str, sorted(images)))])  # fmt: skip
    most = max((row["n"] for row in alike), default=0)
    head = ["defence", "ε", "0 images", f"{most:,} images", "same start", "weights", "K50",
            "half-way to the weights", "seeds", "n"]  # fmt: skip
    return markdown_table(head, lines, right=True) if lines else ""


def _curves(rows: Rows) -> list[dict[int, float]]:
    """Return for each seed the accuracy by the attacker's images; under `WEIGHTS` with these.

    A seed that was measured on more and on fewer images counts once, with the more.
    """
    curves: dict[tuple[int, int], dict[int, float]] = {}
    for row in rows:
        n = WEIGHTS if row["attacker"] == "weights" else row["n"]
        curves.setdefault((row["seed"], row["n_images"]), {})[n] = row["accuracy"]
    whole = max(map(len, curves.values()))
    kept: dict[int, tuple[int, dict[int, float]]] = {}
    for (seed, images), curve in curves.items():
        if len(curve) == whole and images > kept.get(seed, (0,))[0]:  # none that was stopped
            kept[seed] = images, curve
    return [curve for _, curve in kept.values()]


def _mean(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {n: sum(curve[n] for curve in curves) / len(curves) for n in curves[0]}


def _found(curve: Mapping[int, float], floor: bool) -> float:
    """Return K50 of a curve, infinite where it is not reached."""
    points = {n: accuracy for n, accuracy in curve.items() if n != WEIGHTS}
    found = k50(points, floor=curve[WEIGHTS] if floor else 0.0)
    return math.inf if found is None else found


def interval(
    curves: Sequence[Mapping[int, float]], images: int, *, floor: bool = False, seed: int = 0
) -> tuple[float, float]:
    """Return a 95 % bootstrap interval of K50 over seeds and images; it may end in infinity.

    Seeds are drawn with replacement, and how many of the images are right at each point from its
    binomial. As the points share their images, the interval is rather too wide.

    Args:
        curves: for each seed the accuracy by the attacker's images.
        images: how many each accuracy is of.
        floor: half-way to the weights instead of to half.
    """
    drawn = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        chosen = [curves[k] for k in drawn.integers(len(curves), size=len(curves))]
        noisy = [
            {n: drawn.binomial(images, accuracy) / images for n, accuracy in curve.items()}
            for curve in chosen
        ]
        found.append(_found(_mean(noisy), floor))
    found.sort()
    return found[int(0.025 * DRAWS)], found[int(0.975 * DRAWS)]


def _told(curves: Sequence[Mapping[int, float]], images: int, floor: bool, most: int) -> str:
    value = _found(_mean(curves), floor)
    low, high = interval(curves, images, floor=floor)
    return f"{_count(value, most)} [{_count(low, most)}, {_count(high, most)}]"


def _count(value: float, most: int) -> str:
    return f"> {most:,}" if math.isinf(value) else f"{value:,.0f}"


def black_box_table(rows: Rows) -> str:
    """Return what those who only ask leave of each defence, as Markdown; "" without rows."""
    cells = {(row["defense"], row["attack"]["name"], row["eps"]): row for row in rows}
    lines = [
        [NAMES[defense], f"{eps:g}", *(_share(cells.get((defense, name, eps))) for name in ATTACKS)]
        for defense, eps in dict.fromkeys((row["defense"], row["eps"]) for row in rows)
    ]
    head = ["defence", "ε", *ATTACKS.values()]
    return markdown_table(head, lines, right=True) if lines else ""


def in_z_table(rows: Rows) -> str:
    """Return what attackers leave of Defense-GAN by distance, as Markdown; "" without rows."""
    cells = {(row["attacker"], row["distance"]): row for row in rows}
    distances = sorted({row["distance"] for row in rows})
    lines = [
        [f"{distance:g}", *(_share(cells.get((attacker, distance))) for attacker in IN_Z)]
        for distance in distances
    ]
    head = ["normalised L2", *IN_Z.values()]
    return markdown_table(head, lines, right=True) if lines else ""


def outside_table(rows: Rows) -> str:
    """Return what our APGD and AutoAttack leave of each classifier, as Markdown; "" without rows.

    The difference is paired: by how many points of the same images ours leaves more.
    """
    lines = []
    for defense in dict.fromkeys(row["defense"] for row in rows):
        own = [row for row in rows if row["defense"] == defense]
        n, eps = sum(row["n"] for row in own), {row["eps"] for row in own}
        ours, theirs, both = (
            sum(row[f"right_{who}"] for row in own) for who in ("ours", "theirs", "both")
        )
        held = torch.zeros(2, n, dtype=torch.bool)
        held[0, :ours] = True
        held[1, ours - both : ours - both + theirs] = True
        gap, low, high = (100 * share for share in paired_difference(*held))
        seconds = [sum(row["seconds"][k] for row in own) / n for k in (0, 1)]
        lines.append([
            NAMES[defense], ", ".join(f"{e:g}" for e in sorted(eps)), str(n),
            _of(ours, n), _of(theirs, n),
            f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]",
            *(f"{s:.2f}" for s in seconds),
        ])  # fmt: skip
    head = ["classifier", "ε", "n", "APGD", "AutoAttack", "difference", "APGD, s", "AutoAttack, s"]
    return markdown_table(head, lines, right=True) if lines else ""


def white_box_tables(rows: Rows) -> str:
    """Return what each white-box attack leaves, and how far the nearest errors lie, as Markdown."""
    rows = [row for row in rows if row["dataset"] != "mnist"]
    in_a_ball = [row for row in rows if "eps" in row]
    nearest = [row for row in rows if "norm" in row]
    made = (_by_attack(in_a_ball, _share), _by_attack(nearest, _distance))
    return "\n".join(table for table in made if table)


def madry_table(rows: Rows) -> str:
    """Return what attacks leave of PGD training on full MNIST, as Markdown; "" without rows."""
    lines = [
        [_attack(row), f"{row['eps']:g}", f"{row['n']:,}", _points(row, SHARES)]
        for row in rows
        if row["dataset"] == "mnist" and row["defense"] == "adversarial_pgd"
    ]
    return markdown_table(["attack", "ε", "n", "left"], lines, right=True) if lines else ""


def _by_attack(rows: Rows, told: Callable[[Mapping[str, Any] | None], str]) -> str:
    """Return a table of a line per defence and a column per attack; "" without rows."""
    cells = {(row["defense"], _attack(row)): row for row in rows}
    attacks = dict.fromkeys(map(_attack, rows))
    lines = [
        [NAMES[defense], *(told(cells.get((defense, attack))) for attack in attacks)]
        for defense in dict.fromkeys(row["defense"] for row in rows)
    ]
    return markdown_table(["defence", *attacks], lines, right=True) if lines else ""


def _attack(row: Mapping[str, Any]) -> str:
    """Return the head of an attack's column."""
    attack, name = row["attack"]["settings"], row["attack"]["name"]
    if "norm" in row:
        return f"{WHITE[name]}, {NORMS[row['norm']]}"
    losses = f", {' and '.join(attack['losses'])}" if name == "apgd" else ""
    return f"{WHITE[name]}{losses}, {attack['steps']} steps × {row['restarts']}"


def _distance(row: Mapping[str, Any] | None) -> str:
    """Return the median, the quartiles, and how many were fooled at all if not all."""
    if row is None:
        return ""
    median, low, high = (
        "∞" if row[key] is None else f"{row[key]:.2f}" for key in ("median", "low", "high")
    )
    some = "" if row["fooled"] == row["of"] else f", {row['fooled']} of {row['of']}"
    return f"{median} ({low} to {high}{some})"


def classifiers_table(rows: Rows) -> str:
    """Return clean accuracy by classifier and reading of the dropout; "" without rows."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["classifier"], row["dropout"]), []).append(row)

    def told(some: Rows) -> str:
        if len(some) == 1:
            (row,) = some
            return "{:.2f} [{:.2f}, {:.2f}]".format(*(100 * row[k] for k in SHARES))
        return ", ".join(f"{100 * row['accuracy']:.2f}" for row in some)

    lines = [
        [name.upper(), *(told(cells.get((name, way), [])) for way in ("printed", "as run")),
         f"{REPORTED[name]:.1f}"]
        for name in sorted({row["classifier"] for row in rows})
    ]  # fmt: skip
    head = ["classifier", "dropout as printed", "dropout as run", "reported"]
    return markdown_table(head, lines, right=True) if lines else ""


def magnet_table(rows: Rows) -> str:
    """Return both scorings of MagNet by attack and by false alarms asked for; "" without rows.

    Args:
        rows: records of MagNet, as dicts; of those alike, the last counts.
    """
    cells = {(row["attack"], row["defense_settings"]["false_positives"]): row for row in rows}
    lines = []
    for (attack, asked), row in sorted(cells.items(), key=lambda cell: cell[0][1]):
        fooled, alarms = row["n_success"], row["false_positive_rate"]
        stopped = round(row["recovered_or_rejected"] * fooled)
        shares = (row["rejected"], round(row["recovered_accuracy"] * fooled), stopped)
        lines.append([
            f"{100 * asked:g}", f"{100 * alarms:.2f} of {row['n_images']:,}", PAPER[attack],
            f"{fooled:,}", *(_of(count, fooled) for count in shares),
        ])  # fmt: skip
    head = ["asked for", "false alarms", "attack", "fooled", "refused", "read rightly",
            "right or refused"]  # fmt: skip
    return markdown_table(head, lines, right=True) if lines else ""


def defense_gan_table(rows: Rows) -> str:
    """Return Defense-GAN beside cheaper defences on the same images, as Markdown; "" without rows.

    Seconds are those of a record, which reads every image clean and attacked.

    Args:
        rows: records, as dicts.
    """
    lines = []
    for row in rows:
        name, known = row["defense"], row["defense_settings"]
        search = f", L = {known['steps']}, R = {known['restarts']}" if name == "defense_gan" else ""
        lines.append([
            NAMES[name] + search, f"{row['n_images']:,}",
            *(_points(row, keys) for keys in (READ, CLEAN)),
            f"{1000 * row['seconds'] / 2 / row['n_images']:.3g}",
        ])  # fmt: skip
    head = ["defence", "n", "attacked", "clean", "ms an image"]
    return markdown_table(head, lines, right=True) if lines else ""


def redrawn_table(rows: Rows) -> str:
    """Return how near Defense-GAN's drawings come, as Markdown; "" without rows."""
    lines = [
        line
        for row in rows
        for line in (
            ["clean", _of(row["right_clean"], row["n"]), f"{row['error_clean']:.4f}", "", ""],
            ["attacked", _of(row["right_attacked"], row["n"]), f"{row['error_attacked']:.4f}",
             f"{row['error_crossed']:.4f}", f"{row['nearer']} of {row['n']}"],
        )
    ]  # fmt: skip
    head = ["image", "read rightly, %", "its drawing's error", "the clean one's drawing",
            "its own is nearer"]  # fmt: skip
    return markdown_table(head, lines, right=True) if lines else ""


def _of(count: int, total: int) -> str:
    """Return a share in % with Wilson's interval."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(
        *(100 * share for share in (count / total, *wilson(count, total)))
    )


def _points(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return a share and its interval in %; keys name the share and both ends."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * row[key] for key in keys))


def _share(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['accuracy']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "knowledge": ("knowledge", k50_table),
    "black_box": ("black_box", black_box_table),
    "in_z": ("in_z", in_z_table),
    "outside": ("outside", outside_table),
    "white_box": ("white_box", white_box_tables),
    "madry": ("white_box", madry_table),
    "classifiers": ("classifiers", classifiers_table),
    "magnet": ("records/desk-magnet", magnet_table),
    "defense_gan": ("records/desk-defense-gan", defense_gan_table),
    "redrawn": ("redrawn", redrawn_table),
}
"""By its block in results/README.md: the file of rows under results/, what makes the table."""
