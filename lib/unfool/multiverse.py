"""What the paper leaves open, crossed: what each printed number could have been, what moves it.

A reading settles each thing that the paper does not say. `workflow/grids/multiverse.yaml` measures
combinations at a small scale, others are among the committed records; how they are scored comes on
top, from the same records. Nothing is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from unfool.attacks import paper_attacks
from unfool.evaluation import Record
from unfool.profiles import PROFILES
from unfool.report import markdown_table

NEAR = 0.01  # what the tables take for the same number
SCORES: dict[str, Callable[[Record], float | None]] = {
    "over fooled images": lambda r: r.recovered_accuracy,
    "over all images": lambda r: r.end_to_end_accuracy,
    "off the target": lambda r: (
        1 - r.targeted_outcome["target"] / r.n_success
        if r.targeted_outcome and r.n_success
        else None
    ),
}
OURS = {
    "λ": "100", "μ": "0", "PatchGAN": "1 layer", "learned from": "all attacks",
    "last layer": "logits", "batch norm": "running", "attack": "ours", "training": "desk",
    "read by": "made on", "scored": "over fooled images",
}  # fmt: skip
SCORED = {"6": "over all images"}  # in a printed table; else as in `OURS`
TABLES = {"2": "purifier", "4": "purifier", "6": "our method"}  # that are crossed, and their column
STRONGER = {
    "deepfool": {"overshoot": 0.2}, "jsma": {"gamma": 0.3}, "carlini_wagner_l2": {"kappa": 5.0},
}  # fmt: skip
IMAGES = 400  # of each attack; what the grid's purifiers learn from
Section = tuple[tuple[str, ...], list[tuple[str, ...]]]  # a table's head and its rows
TITLE = "What the paper leaves open"
FIGURES = f"figures/README.md#{TITLE.lower().replace(' ', '-')}"
NOTE = """\
Each printed number of Tables 2 and 4, and of the paper's own column of Table 6, beside all that a
reader of the paper could have measured for it. Crossed are the weight of L1 (λ), of the guided loss
(μ), the depth of the PatchGAN, a purifier for each attack or one for all of the table's, Anet's
last layer (the paper prints a ReLU on the logits), the statistics that batch norm takes (running
ones, or those of 64 images at a time), the strength of the attack under test (DeepFool with
overshoot 0.2 instead of 0.02, JSMA with γ = 0.3 instead of 0.145, C&W with κ = 5 instead of 0;
FGSM's ε is printed), and how it is scored: over the images that the attack fooled, over all test
images, or, of a targeted attack, by what no longer lies on the target. In Table 4, where Anet/Bnet
are images made on Anet and purified by Bnet's, it is also open who reads them: the classifier that
they were made on, or the purifier's own.

Most readings are small: 5,000 digits, at most 400 images of each attack to learn from (a purifier
for one attack sees no others), a U-Net of width 8, 4 passes, one seed, 200 test images (FGSM:
1,000). Those of the other records are beside them, where only what is named here differs:
"classroom" learns from 3,600 images of FGSM and 400 of each other attack in 6 passes at width 16,
"desk" from 10,000 of each in 20. Table 6 has two attacks, FGSM with ε = 0.3 and C&W, and is scored
over all images (our reading, as Defense-GAN's). The ReLU was crossed with less than the rest, and
not for C&W nor before Bnet; Table 4's purifiers learned from all four attacks. A number that lies
within the range can be had by some reading; one that lies outside might be had with more training.
A reading is no result, and none is chosen for it.

The small readings of Anet's row come from another training of the classifiers than those of Bnet's
row and of Table 4 (same seed, another kind of processor), on which FGSM fools 426 and 456 of 976
images. So do D's in Table 6.

In the tables of choices a mean is over readings that differ in nothing else.

Left out, because they were not run: Tables 3 and 5 on CIFAR-10 (8 numbers each). Each would need
attacked images and purifiers of its own for every combination, before residual networks in colour.
"""


@dataclass(frozen=True)
class Reading:
    """One way to fill what is not said, and the share in [0, 1] that it gives."""

    choices: Mapping[str, str]
    share: float


@dataclass(frozen=True)
class Cell:
    """A printed share in [0, 1], and what the readings make of it.

    Attributes:
        table, row: where it is printed: "2" and "Anet", "4" and "Anet/Bnet".
        attack: its name in records.
    """

    table: str
    row: str
    attack: str
    printed: float
    readings: tuple[Reading, ...]

    @property
    def title(self) -> str:
        """Return what its row is called."""
        return f"Table {self.table}, {self.row}"

    @property
    def shares(self) -> list[float]:
        """Return the readings' shares, from the lowest to the highest."""
        return sorted(r.share for r in self.readings)

    @property
    def within(self) -> bool:
        """Whether the printed share lies between the lowest and the highest reading."""
        return self.shares[0] <= self.printed <= self.shares[-1]

    @property
    def near(self) -> int:
        """Return how many readings lie within one point of the printed share."""
        return sum(abs(s - self.printed) <= NEAR for s in self.shares)

    @property
    def ours(self) -> float | None:
        """Return the share of the reading that the tables take, if it is there."""
        taken = {**OURS, "scored": SCORED.get(self.table, OURS["scored"])}
        found = [r.share for r in self.readings if r.choices == taken]
        return found[0] if found else None

    def levels(self, choice: str) -> dict[str, float]:
        """Return the mean share for each value of a choice, in order of their appearance.

        Only readings count that are there with every value of it, all else alike: not all
        combinations were measured.
        """
        values = dict.fromkeys(r.choices[choice] for r in self.readings)
        alike: dict[tuple[str, ...], dict[str, float]] = {}
        for r in self.readings:
            rest = tuple(v for name, v in r.choices.items() if name != choice)
            alike.setdefault(rest, {})[r.choices[choice]] = r.share
        whole = [shares for shares in alike.values() if len(shares) == len(values)]
        return {v: fmean(shares[v] for shares in whole) for v in values} if whole else {}

    def effects(self) -> dict[str, float]:
        """Return how far each choice moves the mean share, the largest first."""
        spans = {}
        for choice in self.readings[0].choices:
            means = self.levels(choice).values()
            spans[choice] = max(means, default=0.0) - min(means, default=0.0)
        return dict(sorted(spans.items(), key=lambda item: -item[1]))


def cells(records: Iterable[Record], printed: Sequence[Mapping[str, str]]) -> list[Cell]:
    """Return the cells of `TABLES` with their readings, those that have any.

    Args:
        records: of which those are taken that differ in nothing but what is crossed.
        printed: see `unfool.paper.printed`.
    """
    mine = [r for r in records if _is_reading(r)]
    found = []
    for cell in printed:
        if TABLES.get(cell["table"]) == cell["column"]:
            readings = _readings([r for r in mine if _is_of(r, cell)])
            if readings:
                share = float(cell["percent"]) / 100
                found.append(Cell(cell["table"], cell["row"], cell["attack"], share, readings))
    return found


def by_row(found: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each printed row, by its title."""
    rows: dict[str, list[Cell]] = {}
    for cell in found:
        rows.setdefault(cell.title, []).append(cell)
    return rows


def _is_of(record: Record, cell: Mapping[str, str]) -> bool:
    """Whether attack and purifier are of the cell's classifiers; which of them reads is open."""
    networks = _networks(record)
    plain = tuple(re.split("[-+]", name)[0] for name in networks)
    endings = {name.removeprefix(of) for name, of in zip(networks, plain, strict=True)}
    return (
        record.attack == cell["attack"]
        and plain == (cell["made_on"], cell["trained_for"])
        and record.classifier in networks
        and len(endings) == 1  # "-mnist" or "+relu": what one has, the other has, too
    )


def _networks(record: Record) -> tuple[str, str]:
    """The classifiers that the images were made on and the purifier trained for."""
    return record.made_on or record.classifier, record.trained_for or record.classifier


def _is_reading(record: Record) -> bool:
    """Whether it is a purifier before digits with nothing unusual but what is crossed."""
    own = record.defense_settings
    if record.defense != "pix2pix" or record.seed or not record.dataset.startswith("mnist"):
        return False
    usual = PROFILES[record.profile].purifier.named()
    all_attacks = len(_attacks(record))
    crossed = {"lam", "mu", "guide", "patch_layers", "statistics", "images"}
    small = {"width", "discriminator_width", "epochs"} if "images" in own else set()
    return (
        own.get("images", IMAGES) == IMAGES  # not the trial with more
        and own["lam"] in (10.0, 100.0)
        and _strength(record) != ""
        and (not record.learned_from or record.attack in record.learned_from)
        and len(record.learned_from) in (0, 1, all_attacks)
        and record.saw_attack_in_training
        and all(usual.get(k) == v for k, v in own.items() if k not in crossed | small)
    )


def _attacks(record: Record) -> dict[str, dict[str, Any]]:
    """The attacks, with settings, of the table that a record's classifier stands in."""
    usual = {a.name: dict(a.settings) for a in paper_attacks(record.dataset)}
    if record.classifier.split("+")[0] in ("a", "b", "c", "d"):  # Table 6
        return {"fgsm": {"eps": 0.3}, "carlini_wagner_l2": usual["carlini_wagner_l2"]}
    return usual


def _strength(record: Record) -> str:
    """Whether the attack is as ours, stronger as in the grid, or "" for neither."""
    usual = _attacks(record)
    if record.attack not in usual:
        return ""
    stronger = {**usual[record.attack], **STRONGER.get(record.attack, {})}
    given = {**usual[record.attack], **record.attack_settings}  # older records name less
    return "ours" if given == usual[record.attack] else "stronger" if given == stronger else ""


def _readings(records: Sequence[Record]) -> tuple[Reading, ...]:
    """All records' readings; of records that make the same one, the last's."""
    made = {}
    for r in records:
        for name, score in SCORES.items():
            share = score(r)
            if share is not None:
                reading = Reading({**_choices(r), "scored": name}, share)
                made[tuple(reading.choices.items())] = reading
    return tuple(made.values())


def _choices(record: Record) -> dict[str, str]:
    own = record.defense_settings
    deep = own["patch_layers"]
    return {
        "λ": f"{own['lam']:g}",
        "μ": f"{own['mu']:g}",
        "PatchGAN": f"{deep} layer{'s' if deep > 1 else ''}",
        "learned from": "this attack" if len(record.learned_from) == 1 else "all attacks",
        "last layer": "ReLU" if record.classifier.endswith("+relu") else "logits",
        "batch norm": own.get("statistics", "running"),
        "attack": _strength(record),
        "training": "small" if "images" in own else record.profile,
        "read by": "made on" if record.classifier == _networks(record)[0] else "purifier's own",
    }


# -------------------------------------------------------------------------------------- the page


def markdown(found: Sequence[Cell], names: Mapping[str, str]) -> str:
    """Return the page of the multiverse; `names` are the attacks' names for people."""
    parts = [f"# {TITLE}\n", NOTE, f"As pictures: [figures](../{FIGURES}).\n"]
    parts += [markdown_table(head, rows) for head, rows in sections(found, names)]
    return "\n".join(parts)


def sections(found: Sequence[Cell], names: Mapping[str, str]) -> list[Section]:
    """Return the head and the rows of each table: the ranges, then what each choice does.

    Of the latter there is one for each printed row; it leaves out what is the same in all of its
    readings.
    """
    head = ("printed in", "attack", "readings", "lowest", "median", "highest", "our reading",
            "paper", "within", "within 1 point of it", "moved most by", "points")  # fmt: skip
    ranges: list[tuple[str, ...]] = []
    for cell in found:
        choice, span = next(iter(cell.effects().items()))
        ours = "–" if cell.ours is None else _percent(cell.ours)
        ranges.append((
            cell.title, names[cell.attack], str(len(cell.shares)), _percent(cell.shares[0]),
            _percent(median(cell.shares)), _percent(cell.shares[-1]), ours,
            f"{100 * cell.printed:.2f}", "yes" if cell.within else "no", str(cell.near),
            choice, _percent(span),
        ))  # fmt: skip
    made: list[Section] = [(head, ranges)]
    for title, row in by_row(found).items():
        moved: list[tuple[str, ...]] = [
            (name, *(_moved(cell, name) for cell in row)) for name in OURS
        ]
        moved = [line for line in moved if set(line[1:]) != {"–"}]
        made.append(((title, *(names[cell.attack] for cell in row)), moved))
    return made


def _moved(cell: Cell, choice: str) -> str:
    """The mean share for each value of a choice."""
    means = cell.levels(choice)
    if len(means) < 2:
        return "–"
    return ", ".join(f"{value}: {_percent(mean)}" for value, mean in means.items())


def sentence(found: Sequence[Cell]) -> str:
    """Return what the READMEs say of it, or "" where nothing was measured."""
    if not found:
        return ""
    total, inside = sum(len(c.shares) for c in found), sum(c.within for c in found)
    return (
        f"\n[{TITLE}](tables/multiverse.md), crossed: {total:,} readings of Tables 2, 4 and 6, "
        f"most at a small scale; {inside} of their {len(found)} numbers lie within what they reach "
        f"([figures]({FIGURES})). Not crossed, because not run: Tables 3 and 5.\n"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
