"""The paper's tables and figures from records: ours beside what is printed, with a verdict.

`paper.csv` holds the printed cells. Nothing is measured here; what no record says is "untested at
this scale". The same records give the same bytes.
"""

from __future__ import annotations

import csv
import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from unfool import attacker_tables, figures, multiverse
from unfool.artifacts import REPO
from unfool.attacks import paper_attacks
from unfool.evaluation import Record, read_rows, read_sound_records, reproduced
from unfool.figures import Figure
from unfool.files import write_text
from unfool.profiles import PROFILES
from unfool.report import markdown_table, page, skipped_html, table_html

CELLS = Path(__file__).with_name("paper.csv")
RESULTS = REPO / "results"
SCALES = ("paper", "desk")  # profiles whose results are compared with the paper's, best first
JPEG = "folder:cifar10-jpeg.zip"  # CIFAR-10 as JPEG files: not to the bit the paper's data
STAND_IN = {"mnist": ("classroom", "mnist5k"), "cifar10": ("desk", JPEG)}  # shown, not compared
SMALLER = {"resnet18": "resnet20"}  # what stands in for a network on JPEG
COLOUR = {"cifar10": ("classroom", "mnist-m")}  # in Figure 6 alone: other classes altogether
SHORT = {"anet": "Anet", "bnet": "Bnet", "resnet18": "Rnet", "densenet100": "Dnet"}
ATTACKS = {"fgsm": "FGSM", "deepfool": "DeepFool", "jsma": "JSMA", "carlini_wagner_l2": "C&W"}
DEFENSES = {  # a column of Table 6 -> the defence's name in records
    "no attack": "none", "no defense": "none", "Defense-GAN": "defense_gan", "MagNet": "magnet",
    "Adv.Tr": "adversarial_fgsm", "our method": "pix2pix",
}  # fmt: skip
OURS_ONLY = {  # what stands below Table 6: its defences that the paper's table doesn't have
    "undefended": "none", "x > 0.5": "threshold", "denoiser": "denoiser",
    "PGD-trained": "adversarial_pgd", "trained further": "finetuned", "APE-GAN": "ape_gan",
    "purifier": "pix2pix",
}  # fmt: skip
LEARN = ("finetuned", "ape_gan", "pix2pix")  # those of them that learn from Table 6's two attacks
WASHED = {  # a washer -> its name with its strength
    "threshold": "x > {level}", "bits": "{bits} bits", "median": "median {size}",
    "blur": "blur {sigma}", "jpeg": "JPEG {quality}",
}  # fmt: skip
UNTESTED, APART = "untested at this scale", "not comparable"
VERDICTS = ("reproduced", "differs", "undecided", APART, UNTESTED)
TITLES = {
    1: "The classifiers, clean accuracy",
    2: "The purifier on MNIST",
    3: "The purifier on CIFAR-10",
    4: "Another classifier's purifier on MNIST",
    5: "Another classifier's purifier on CIFAR-10",
    6: "Beside other defences, MNIST",
}
KEY = """\
Shares in %. "Ours" is the mean over the seeds with its 90 % interval; "reproduced": the interval
lies within one point of the paper's figure (two one-sided tests), "differs": outside, "undecided":
a foot in both, so more images or seeds are needed. "Not comparable": measured on other data or at a
smaller scale (profile `classroom`, 5,000 digits; CIFAR-10 as JPEG files, with a smaller network),
or a number that the paper copied from elsewhere. The paper names neither the settings of its
attacks nor how many images they fooled; ours are in the records. Size: median L2 of the images that
were fooled; for JSMA, how many pixels were changed.
"""
NOTES = {
    1: "The paper ends Anet and Bnet with a ReLU on the logits; ours end without.",
    2: "Recovered accuracy: of the test images that the attack turned wrong, the share that is "
    "read rightly again. `x > 0.5`, the best washer (of those measured, the one that recovers most "
    "of these very images, which favours it) and the denoiser have seen no attack.",
    3: "Recovered accuracy, as in Table 2; with the classifier-guided loss. Best washer: of those "
    "measured (`x > 0.5` means little in colour), the one that recovers most of these very images, "
    "which favours it. Trained further: the classifier itself, on attacked images and their clean "
    "ones; how many is in `results/README.md`.",
    4: "Images made on one classifier, purified by the purifier of the other. Recovered accuracy, "
    "of the images that fooled the classifier they were made on. The paper doesn't say which "
    "classifier reads the purified images, so both do; raw is what it reads without a purifier. "
    "`x > 0.5` and the denoiser have seen no attack; – is not measured.",
    5: "As Table 4.",
    6: "Accuracy over all test images, attacked where the classifier was right; FGSM with "
    "ε = 0.3. Ours: the attacker doesn't know the defence. The paper copied all columns but its "
    "own from Samangouei et al. 2018, where the attacker knew it: these stand beside ours and are "
    "not compared. Below: washers and rivals that the paper's table lacks.",
}
BESIDE = """\
Ours only: accuracy over all test images, as above, for defences that the paper's table does not
have; – is not measured. `x > 0.5` and the denoiser have seen no attack. The PGD-trained network
learned from PGD; the classifier trained further, APE-GAN and the purifier from FGSM's and C&W's
images. Attacks are made on the undefended classifier, so they reach the PGD-trained and the one
trained further as mere transfer.
"""


@dataclass(frozen=True)
class Table:
    """One table: what it shows, its columns and rows as text, and its verdicts.

    Below it stand `told`, in words, and `beside`, head and rows of measurements that no printed
    cell asks for and that have no verdict.
    """

    number: int
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    told: str = ""
    beside: tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None = None

    @property
    def verdicts(self) -> Counter[str]:
        """Count the cells by verdict."""
        return Counter(row[-1] for row in self.rows)

    def markdown(self) -> str:
        """Return the table as a page of Markdown."""
        lines = [f"# The paper's Table {self.number}: {TITLES[self.number]}", ""]
        lines += [NOTES[self.number], "", KEY]
        made = "\n".join(lines) + "\n" + markdown_table(self.head, self.rows)
        if self.told:
            made += f"\n{self.told}\n"
        if self.beside:
            made += f"\n{BESIDE}\n{markdown_table(*self.beside)}"
        return made

    def html(self) -> str:
        """Return the table as a section of a page."""
        title = f"<h2>Table {self.number}: {html.escape(TITLES[self.number])}</h2>"
        note = f"<p>{_prose(NOTES[self.number])}</p>"
        made = f"{title}\n{note}\n{_table(self.head, self.rows)}\n"
        if self.told:
            made += f"<p>{_prose(self.told)}</p>\n"
        if self.beside:
            made += f"<p>{_prose(BESIDE)}</p>\n{_table(*self.beside)}\n"
        return made


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = ["".join(f"<td>{_cell(text)}</td>" for text in row) for row in rows]
    return table_html(f"<tr>{titles}</tr>", [f"<tr>{line}</tr>" for line in lines])


def _cell(text: str) -> str:
    """A cell's HTML: its interval is not broken over two lines."""
    return re.sub(r"\[.*?\]", lambda found: found[0].replace(" ", "&nbsp;"), html.escape(text))


def _prose(text: str) -> str:
    """Markdown's code as HTML's; there is no other mark-up in the notes."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))


# ------------------------------------------------------------------------------------ records


def gather(paths: Sequence[Path] = ()) -> tuple[list[Record], list[str]]:
    """Return the committed records and those of `paths`, and what was skipped.

    Returns:
        The records, and a line for each that is damaged or of another schema.
    """
    records: list[Record] = []
    skipped: list[str] = []
    for path in (*sorted((RESULTS / "records").glob("*.jsonl")), *paths):
        found, problems = read_sound_records(path)
        # Records from before the field are of attacks on the very classifier.
        records += [r if r.made_on else replace(r, made_on=r.classifier) for r in found]
        skipped += problems
    return records, skipped


def printed() -> list[dict[str, str]]:
    """Return the paper's cells: a dict of the columns of `paper.csv` for each."""
    with CELLS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def short(classifier: str) -> str:
    """Return "anet" for "anet-mnist", the committed weights."""
    return classifier.split("-")[0]


def of_scale(
    records: Sequence[Record],
    dataset: str,
    stand_in: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> tuple[list[Record], bool]:
    """Return those of the best scale that was run, and whether the paper's data are theirs."""
    for profile in SCALES:
        found = [r for r in records if (r.profile, r.dataset) == (profile, dataset)]
        if found:
            return found, True
    wanted = {**STAND_IN, **stand_in}.get(dataset)
    return [r for r in records if (r.profile, r.dataset) == wanted], False


def whole(record: Record) -> bool:
    """Whether this is a purifier as its profile trains it, to its end and with nothing changed.

    In colour the guided loss is the paper's; its 40 epochs are free.
    """
    usual, colour = PROFILES[record.profile].purifier.named(), record.dataset in ("cifar10", JPEG)
    if colour and not record.defense_settings.get("mu"):
        return False
    free = {"mu", "guide", "epochs", "images"} if colour else set()
    return record.defense == "pix2pix" and all(
        key in free or usual.get(key) == value for key, value in record.defense_settings.items()
    )


def usual_attack(record: Record, eps: float | None = None) -> bool:
    """Whether the attack has the settings adopted for the paper's, or another eps for FGSM."""
    settings = {a.name: a.settings for a in paper_attacks(record.dataset)}.get(record.attack)
    if settings is None:
        return False
    if eps is not None and record.attack == "fgsm":
        settings = {"eps": eps}
    return all(settings.get(key) == value for key, value in record.attack_settings.items())


def one_per_seed(records: Sequence[Record]) -> list[Record]:
    """Return one record for each seed, the last, in the order of the seeds.

    Of records that differ in more, such as a setting that older ones leave unsaid, those of the
    kind with the most seeds.
    """
    kinds: dict[str, dict[int, Record]] = {}
    for r in records:
        kind = repr((r.classifier, sorted(r.attack_settings.items()),
                     sorted(r.defense_settings.items()), r.learned_from))  # fmt: skip
        kinds.setdefault(kind, {})[r.seed] = r
    by_seed = max(kinds.values(), key=len, default={})
    return [by_seed[seed] for seed in sorted(by_seed)]


# ------------------------------------------------------------------------------------- tables


def tables(records: Sequence[Record]) -> list[Table]:
    """Return the paper's Tables 1 to 6 with what the records say."""
    cells = printed()
    of = {n: [c for c in cells if c["table"] == str(n)] for n in TITLES}
    usual = [r for r in records if usual_attack(r)]
    strong = [r for r in records if usual_attack(r, eps=0.3)]
    made = [_classifiers(of[1], usual)]
    for number, head in ((2, PURIFIED), (3, COLOURED)):
        made.append(Table(number, head, tuple(_purified(c, usual) for c in of[number])))
    for number in (4, 5):
        rows = [_crossed(c, reader, usual) for c in of[number] for reader in _readers(c)]
        made.append(Table(number, CROSSED, tuple(rows)))
    rivals = tuple(_rival(c, strong) for c in of[6])
    made.append(Table(6, RIVALS, rivals, _refused(of[6], strong), _ours_only(of[6], strong)))
    return made


PURIFIED = ("classifier", "attack", "fooled", "size", "x > 0.5", "best washer", "denoiser", "ours",
            "seeds", "scale", "paper", "verdict")  # fmt: skip
COLOURED = ("classifier", "attack", "fooled", "size", "best washer", "denoiser", "trained further",
            "ours", "seeds", "scale", "paper", "verdict")  # fmt: skip
CROSSED = ("made on / purifier of", "attack", "read by", "fooled", "size", "raw", "x > 0.5",
           "denoiser", "ours", "seeds", "scale", "paper", "verdict")  # fmt: skip
RIVALS = ("attack", "classifier", "column", "fooled", "size", "ours", "seeds", "scale", "paper",
          "verdict")  # fmt: skip


def _classifiers(cells: Sequence[Mapping[str, str]], records: Sequence[Record]) -> Table:
    rows = []
    for cell in cells:
        mine = [r for r in records if _stands_for(r, cell["classifier"])]
        mine = [r for r in mine if r.defense == "none" and r.attack == "fgsm" and _home(r)]
        found, same = of_scale(mine, cell["dataset"])
        ours, verdict, seeds = _judged(found, cell, same, "clean")
        n = str(found[0].n_images) if found else "–"
        rows.append((cell["row"], cell["dataset"], n, ours, seeds, _scale(found),
                     f"{float(cell['percent']):.2f}", verdict))  # fmt: skip
    head = ("classifier", "data", "test images", "ours", "seeds", "scale", "paper", "verdict")
    return Table(1, head, tuple(rows))


def _purified(cell: Mapping[str, str], records: Sequence[Record]) -> tuple[str, ...]:
    """A row of Tables 2 and 3: the purifier, what has seen no attack, and in colour a control."""
    mine = [r for r in records if _stands_for(r, cell["classifier"])]
    mine = [r for r in mine if r.attack == cell["attack"] and _home(r)]
    last, same = of_scale([r for r in mine if whole(r) and _pooled(r)], cell["dataset"])
    ours, verdict, seeds = _judged(last, cell, same)
    beside = [_best_washer(mine, last), _mean(_like(mine, last, "denoiser"))]
    if cell["table"] == "2":
        beside.insert(0, _mean(_like(mine, last, "threshold")))
    else:
        beside.append(_mean(_like([r for r in mine if _pooled(r)], last, "finetuned")))
    return (
        cell["row"], ATTACKS[cell["attack"]], *_strength(last), *beside,
        ours, seeds, _scale(last), f"{float(cell['percent']):.2f}", verdict,
    )  # fmt: skip


def _readers(cell: Mapping[str, str]) -> tuple[str, str]:
    return cell["made_on"], cell["trained_for"]


def _crossed(cell: Mapping[str, str], reader: str, records: Sequence[Record]) -> tuple[str, ...]:
    """A row of Tables 4 and 5: one reading of a cell."""
    mine = [
        r for r in records
        if r.attack == cell["attack"] and short(r.classifier) == reader
        and short(r.made_on or r.classifier) == cell["made_on"]
    ]  # fmt: skip
    through = [r for r in mine if whole(r) and _pooled(r)]
    through = [r for r in through if short(r.trained_for) == cell["trained_for"]]
    last, same = of_scale(through, cell["dataset"])
    ours, verdict, seeds = _judged(last, cell, same)
    return (
        cell["row"], ATTACKS[cell["attack"]], SHORT[reader], *_strength(last),
        *(_mean(_like(mine, last, defense)) for defense in ("none", "threshold", "denoiser")),
        ours, seeds, _scale(last), f"{float(cell['percent']):.2f}", verdict,
    )  # fmt: skip


def _rival(cell: Mapping[str, str], records: Sequence[Record]) -> tuple[str, ...]:
    """A row of Table 6, whose measure is over all images."""
    found, same = of_scale(_before(cell, DEFENSES[cell["column"]], records), cell["dataset"])
    measure = "clean" if cell["column"] == "no attack" else "end_to_end"
    ours, verdict, seeds = _judged(found, cell, same and cell["origin"] == "paper", measure)
    return (
        ATTACKS[cell["attack"]], cell["row"], cell["column"], *_strength(found), ours, seeds,
        _scale(found), f"{float(cell['percent']):.1f}", verdict,
    )  # fmt: skip


def _before(cell: Mapping[str, str], defense: str, records: Sequence[Record]) -> list[Record]:
    """A defence's records under the attack on the classifier of a cell of Table 6."""
    mine = [
        r for r in records
        if r.attack == cell["attack"] and short(r.classifier) == cell["classifier"] and _home(r)
        and r.defense == defense
    ]  # fmt: skip
    if defense in LEARN:
        mine = [r for r in mine if set(r.learned_from) == {"fgsm", "carlini_wagner_l2"}]
    if defense == "defense_gan":  # a shorter search is another defence
        usual = {name: asdict(profile.defense_gan) for name, profile in PROFILES.items()}
        return [r for r in mine if r.defense_settings == usual[r.profile]]
    return [r for r in mine if whole(r)] if defense == "pix2pix" else mine


def _ours_only(
    cells: Sequence[Mapping[str, str]], records: Sequence[Record]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None:
    """Head and rows of what was measured besides for Table 6; None where nothing was."""
    rows = []
    for cell in [c for c in cells if c["column"] == "no defense"]:
        found = [_before(cell, defense, records) for defense in OURS_ONLY.values()]
        for scale in [*((name, cell["dataset"]) for name in SCALES), STAND_IN[cell["dataset"]]]:
            here = [[r for r in some if (r.profile, r.dataset) == scale] for some in found]
            told = [_judged(some, cell, False, "end_to_end") for some in here]
            if not any(here):
                continue
            seeds = sorted({count for _, _, count in told} - {"–"})
            images = sorted({r.n_images for some in here for r in some})
            rows.append((
                ATTACKS[cell["attack"]], cell["row"], ", ".join(map(str, images)),
                *(ours for ours, _, _ in told), ", ".join(seeds), ", ".join(scale),
            ))  # fmt: skip
    head = ("attack", "classifier", "test images", *OURS_ONLY, "seeds", "scale")
    return (head, tuple(rows)) if rows else None


def _refused(cells: Sequence[Mapping[str, str]], records: Sequence[Record]) -> str:
    """What MagNet's cells in Table 6 leave out, in words; "" where it was not measured."""
    mine = {
        attack: [
            r for c in cells if c["column"] == "MagNet" and c["attack"] == attack
            for r in one_per_seed(of_scale(_before(c, "magnet", records), c["dataset"])[0])
            if r.recovered_or_rejected is not None
        ]
        for attack in ATTACKS
    }  # fmt: skip
    mine = {attack: some for attack, some in mine.items() if some}
    if not mine:
        return ""
    every = [r for some in mine.values() for r in some]
    asked = sorted({r.defense_settings["false_positives"] for r in every})
    alarms = sorted(r.false_positive_rate or 0.0 for r in every)
    told = []
    for attack, some in mine.items():
        fooled = sum(r.n_success for r in some)
        stopped = sum((r.recovered_or_rejected or 0.0) * r.n_success for r in some) / fooled
        told.append(
            f"{sum(r.rejected for r in some):,} of {fooled:,} of {ATTACKS[attack]}'s "
            f"({100 * stopped:.1f} % right or refused)"
        )
    return (
        "MagNet's cells count only images that are read rightly. It may also refuse an image: "
        f"with {' and '.join(f'{100 * share:g}' for share in asked)} % of false alarms asked for "
        f"({100 * alarms[0]:.1f} to {100 * alarms[-1]:.1f} % of these clean images), of the images "
        f"that fooled the classifiers it refused {' and '.join(told)}. At 1 % and at 5 % on full "
        "MNIST: `results/README.md`."
    )


def _stands_for(record: Record, classifier: str) -> bool:
    """Whether this is the paper's network, or on the JPEG copy the smaller one in its place."""
    name = short(record.classifier)
    return name == classifier or (record.dataset == JPEG and name == SMALLER.get(classifier))


def _home(record: Record) -> bool:
    """Whether attack and defence were made for the very classifier that is measured."""
    return record.made_on in ("", record.classifier) and record.trained_for in (
        "", record.classifier,
    )  # fmt: skip


def _pooled(record: Record) -> bool:
    """Whether the purifier learned from all of the paper's attacks that its data set is given."""
    if record.profile == "classroom" and not record.learned_from:
        return record.saw_attack_in_training  # from before the field, when nothing else was run
    two = record.dataset in ("mnist-m", JPEG)
    return set(record.learned_from) == ({"fgsm", "deepfool"} if two else set(ATTACKS))


def _judged(
    records: Sequence[Record], cell: Mapping[str, str], same: bool, measure: str = "recovered"
) -> tuple[str, str, str]:
    """Return ours with its interval, the verdict, and how many seeds."""
    found = one_per_seed(records)
    found = [r for r in found if measure != "recovered" or r.recovered_accuracy is not None]
    if not found:
        return "–", UNTESTED, "–"
    verdict, mean, low, high = reproduced(found, float(cell["percent"]) / 100, measure=measure)
    ours = f"{100 * mean:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    return ours, verdict if same else APART, str(len(found))


def _like(records: Sequence[Record], last: Sequence[Record], defense: str) -> list[Record]:
    """Return another defence's records of the same scale and seeds."""
    seeds = {(r.profile, r.dataset, r.seed) for r in last}
    return one_per_seed(
        [r for r in records if r.defense == defense and (r.profile, r.dataset, r.seed) in seeds]
    )


def _best_washer(records: Sequence[Record], last: Sequence[Record]) -> str:
    """Return the name and the share of the washer that recovers most, at the scale of `last`."""
    seeds = {(r.profile, r.dataset, r.seed) for r in last}
    kinds: dict[str, list[float]] = {}
    for r in records:
        if r.defense in WASHED and (r.profile, r.dataset, r.seed) in seeds:
            name = WASHED[r.defense].format(**r.defense_settings)
            kinds.setdefault(name, []).append(r.recovered_accuracy or 0.0)
    if not kinds:
        return "–"
    best = max(kinds, key=lambda name: fmean(kinds[name]))
    return f"{best}: {100 * fmean(kinds[best]):.1f}"


def _mean(records: Sequence[Record]) -> str:
    shares = [r.recovered_accuracy for r in records if r.recovered_accuracy is not None]
    return f"{100 * fmean(shares):.1f}" if shares else "–"


def _strength(records: Sequence[Record]) -> tuple[str, str]:
    """How many the attack fooled, and by how much it changed them."""
    found = one_per_seed(records)
    if not found:
        return "–", "–"
    fooled = f"{100 * fmean(r.attack_success for r in found):.1f} of {found[0].n_attacked}"
    if found[0].attack == "jsma":
        return fooled, f"{fmean(r.l0_median or 0 for r in found):.0f} pixels"
    return fooled, f"{fmean(r.l2_median or 0 for r in found):.2f}"


def _scale(records: Sequence[Record]) -> str:
    if not records:
        return "–"
    one = records[0]
    smaller = f", {short(one.classifier)}" if one.dataset == JPEG else ""
    return f"{one.profile}, {one.dataset.removeprefix('folder:')}{smaller}"


# ------------------------------------------------------------------------------------ figures


def paper_figures(records: Sequence[Record]) -> dict[str, Figure | str]:
    """Return the paper's Figures 3 to 10 by number; where no records are, the reason, as text.

    Beside them stands what each number of Tables 2 and 4 could have been, a figure for each row:
    "multiverse-anet", … "multiverse-bnet-anet".
    """
    usual = [r for r in records if usual_attack(r)]
    made: dict[str, Figure | str] = {}
    pictures = "images, which no record holds; notebook {} draws it"
    made["3"], made["4"] = pictures.format("07"), pictures.format("08, on mnist-m,")
    for panel, name in (("5a", "anet"), ("5b", "bnet")):
        mine = [r for r in usual if short(r.classifier) == name and _home(r)]
        made[panel] = _curves(mine, "mnist", f"Purifier before {SHORT[name]}, by epoch")
    for panel, mu in (("6a", 0.0), ("6b", 1.0)):
        mine = [r for r in usual if _home(r) and r.defense_settings.get("mu") == mu]
        mine = [r for r in mine if r.dataset in ("cifar10", "mnist-m")]
        made[panel] = _curves(mine, "cifar10", f"Purifier in colour, μ = {mu:g}, by epoch", COLOUR)
    made["7"] = "mean L1, which no record holds; notebook 07 draws it for Anet"
    made["8"] = f"mean L1 on CIFAR-10: {UNTESTED}; notebook 08 draws it on mnist-m"
    for panel, made_on, other in (("9a", "anet", "bnet"), ("9b", "bnet", "anet")):
        mine = [
            r for r in usual
            if short(r.made_on) == made_on == short(r.classifier) and short(r.trained_for) == other
        ]  # fmt: skip
        title = f"Made on {SHORT[made_on]}, purified by {SHORT[other]}'s, by epoch"
        made[panel] = _curves(mine, "mnist", title)
    made["10"] = f"CIFAR-10: {UNTESTED}"
    return made | open_figures(multiverse.cells(records, printed()))


def open_figures(found: Sequence[multiverse.Cell]) -> dict[str, Figure | str]:
    """Return all readings of the cells that the paper leaves open, beside what it prints."""
    if not found:
        return {"multiverse": f"readings of the paper: {UNTESTED}"}
    return {
        f"multiverse-{re.sub('[^a-z]+', '-', row[0].row.lower())}": figures.specifications(
            {ATTACKS[c.attack]: [(r.choices, r.share) for r in c.readings] for c in row},
            {ATTACKS[c.attack]: c.printed for c in row},
            caption=f"{title}: every reading of the paper that was measured, sorted, and under it "
            "what it chooses; most at a small scale. Dashed: the paper's number.",
        )
        for title, row in multiverse.by_row(found).items()
    }


def _curves(
    records: Sequence[Record], dataset: str, title: str,
    stand_in: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> Figure | str:  # fmt: skip
    """Recovered accuracy after every epoch, a line for each attack; one seed."""
    purified = [r for r in records if r.defense == "pix2pix" and _pooled(r) and _any_epoch(r)]
    early = [r for r in purified if "after" in r.defense_settings]
    found, _ = of_scale(early, dataset, stand_in)
    if not found:
        return f"{title[0].lower()}{title[1:]}: {UNTESTED}"
    one = found[0]
    like = [r for r in purified if r.profile == one.profile and r.dataset == one.dataset]
    like = [r for r in like if (r.seed, r.classifier) == (one.seed, one.classifier)]
    at = {
        (r.attack, int(r.defense_settings.get("after", r.defense_settings["epochs"]))): r
        for r in like
    }
    epochs = sorted({e for _, e in at})
    names = [a for a in ATTACKS if all((a, e) in at for e in epochs)]
    return figures.lines(
        [float(e) for e in epochs],
        {ATTACKS[a]: [at[a, e].recovered_accuracy or 0.0 for e in epochs] for a in names},
        intervals={
            ATTACKS[a]: [(at[a, e].recovered_low, at[a, e].recovered_high) for e in epochs]
            for a in names
        },
        xlabel="epoch", ylabel="recovered, %",
        caption=f"{title}; profile {one.profile}, {one.dataset}, "
        f"{one.classifier}, seed {one.seed}; 95 % intervals.",
    )  # fmt: skip


def _any_epoch(record: Record) -> bool:
    """Whether this is the profile's purifier, perhaps before its end."""
    usual = PROFILES[record.profile].purifier.named()
    free = {"after", "mu", "guide"}
    return all(usual.get(k) == v for k, v in record.defense_settings.items() if k not in free)


# -------------------------------------------------------------------------------------- files


def summary(made: Sequence[Table]) -> str:
    """Return how many cells of each table have which verdict, as Markdown."""
    lines = []
    for table in made:
        counts = [str(table.verdicts[v]) if table.verdicts[v] else "" for v in VERDICTS]
        link = f"[Table {table.number}](tables/table{table.number}.md)"
        lines.append([f"{link}: {TITLES[table.number]}", *counts])
    return markdown_table(["table", *VERDICTS], lines, right=True)


def file_of(figure: str) -> str:
    """Return the file name of a figure of `figure_files`."""
    return f"figure{figure}.png" if figure[0].isdigit() else f"{figure}.png"


def between(text: str, mark: str, body: str, by: str = "") -> str:
    """Return the text with what stands between two marks replaced; `by`: the command, if another.

    Raises:
        ValueError: the marks are not there.
    """
    begin = f"<!-- {mark}: made by `unfool {by or mark}` -->\n"
    end = f"<!-- end of {mark} -->"
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"put these two lines where {mark} are to stand: {begin}{end}")
    return re.sub(pattern, lambda _: f"{begin}{body}{end}", text, count=1, flags=re.DOTALL)


def table_files(
    made: Sequence[Table], open_cells: Sequence[multiverse.Cell], skipped: Sequence[str] = ()
) -> dict[str, str]:
    """Return the text of every file that `unfool tables` writes, by its path under results/."""
    files = {f"tables/table{t.number}.md": t.markdown() for t in made}
    key = f"<p>{_prose(KEY)}</p>\n"
    body = "<h1>The paper's tables, ours beside them</h1>\n" + key + "".join(t.html() for t in made)
    files["tables/index.html"] = page(
        "The paper's tables", body + _open_html(open_cells) + skipped_html(skipped), kind="index"
    )
    files["tables/multiverse.md"] = multiverse.markdown(open_cells, ATTACKS)
    readme = (RESULTS / "README.md").read_text("utf-8")
    told = summary(made) + multiverse.sentence(open_cells)
    linked = re.sub(r"\((tables|figures)/", r"(results/\1/", told)
    readme = between(readme, "tables", told)
    for mark, (file, table) in attacker_tables.TABLES.items():
        readme = between(readme, mark, table(_rows(file)), "tables")
    files["README.md"] = readme
    files["../README.md"] = between((REPO / "README.md").read_text("utf-8"), "tables", linked)
    return files


def _open_html(found: Sequence[multiverse.Cell]) -> str:
    parts = [f"<h2>{multiverse.TITLE}</h2>"]
    parts += [f"<p>{_prose(text)}</p>" for text in multiverse.NOTE.split("\n\n")]
    parts += [_table(head, rows) for head, rows in multiverse.sections(found, ATTACKS)]
    return "\n".join(parts) + "\n"


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return read_rows(path) if path.exists() else []


def figure_files(made: Mapping[str, Figure | str]) -> dict[str, str]:
    """Return what describes the figures: `figures/README.md`."""
    lines = ["# The paper's figures, from our records", ""]
    for number, figure in made.items():
        title = f"Figure {number}" if number[0].isdigit() else multiverse.TITLE
        heading = f"## {title}"
        lines += [heading, ""] if heading not in lines else []  # several stand under one
        if isinstance(figure, str):
            lines += [f"Not drawn: {figure}.", ""]
        else:
            lines += [f"![{figure.alt}]({file_of(number)})", "", figure.caption, ""]
    return {"figures/README.md": "\n".join(lines)}


def write_tables(paths: Sequence[Path] = ()) -> tuple[list[Table], list[str], list[Path]]:
    """Write the tables; return them, what was skipped, and the files."""
    records, skipped = gather(paths)
    made = tables(records)
    open_cells = multiverse.cells(records, printed())
    return made, skipped, _written(table_files(made, open_cells, skipped))


def write_figures(paths: Sequence[Path] = ()) -> tuple[list[str], list[Path]]:
    """Write the figures as PNG and what they show in words; return what was skipped, the files."""
    import base64

    records, skipped = gather(paths)
    made = paper_figures(records)
    folder = RESULTS / "figures"
    folder.mkdir(exist_ok=True)
    drawn = []
    for number, figure in made.items():
        path = folder / file_of(number)
        if isinstance(figure, str):
            path.unlink(missing_ok=True)
            continue
        data = base64.b64decode(figure.png())
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
        drawn.append(path)
    return skipped, [*drawn, *_written(figure_files(made))]


def _written(files: Mapping[str, Any]) -> list[Path]:
    paths = []
    for name, text in files.items():
        path = (RESULTS / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        paths.append(path)
    return paths
