"""Measure each defence of the course against attackers who know more and more of it.

    .venv/bin/python results/make_threats.py --defenses pix2pix none --seeds 0

Writes results/threats.jsonl, a row per defence, level of knowledge and eps; lesson 11 shows them.
A defence whose rows are there is left alone, so a run that was stopped goes on where it was.
What is trained is kept in the store, as always.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfool import guards
from unfool.artifacts import REPO
from unfool.attacks import AttackSettings, bpda
from unfool.evaluation import append_rows, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions
from unfool.threats import Attackers, Threats, threat_levels

PATH = REPO / "results" / "threats.jsonl"
EPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.55)  # at the last any pixel can cross 0.5: 0 is expected
LEVELS = ("noise", "transfer", "black-box", "white-box", "worst of all")


def attackers(queries: int = 300, **white_box: Any) -> Attackers:
    """Return everybody's attack: PGD, Square, and a quick APGD unless told otherwise."""
    return Attackers(
        draws=10,
        transfer=AttackSettings("pgd", {"steps": 40}),
        black_box=AttackSettings("square", {"queries": queries}),
        white_box=AttackSettings("apgd", white_box or {"steps": 40, "targets": 3}),
    )


@dataclass(frozen=True)
class Case:
    """A defence before anet, on the first so many test images of mnist5k.

    Attributes:
        defense: as `Lab.defense` knows it.
        stand_ins: what takes the defence's place where it has no gradient, of `STAND_INS`; an image
            must withstand an attack through each.
        guarded: whether all guards are asked, or only those that compare accuracies.
        note: what a reader of the rows must know.
    """

    defense: str
    stand_ins: tuple[str, ...] = ()
    by: Attackers = field(default_factory=attackers)
    images: int = 100
    eps: tuple[float, ...] = EPS
    guarded: bool = True
    note: str = ""


STAND_INS = {
    "bpda(identity)": lambda defense: bpda(defense),
    "bpda(sigmoid)": lambda defense: bpda(defense, lambda x: torch.sigmoid(10 * (x - 0.5))),
}
CASES = {
    case.defense: case
    for case in (
        Case("pix2pix"),
        Case("none"),
        Case("threshold", ("bpda(identity)", "bpda(sigmoid)")),
        Case("adversarial_pgd"),
        Case("adversarial_fgsm"),
        Case("denoiser"),
        Case("magnet", note="its reformer alone: what its detectors refuse counts as read"),
        Case("finetuned"),
        Case("ape_gan"),
        Case(
            "defense_gan", ("bpda(identity)",), attackers(20, steps=20, losses=["ce"]),
            images=30, eps=(0.15, 0.3, 0.55), guarded=False,
            note="a pass is a search of its own, so few images, queries and steps",
        ),
    )
}  # fmt: skip


def main() -> None:
    """Measure the defences that were asked for, with each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--defenses", nargs="+", choices=CASES, default=list(CASES), metavar="NAME",
        help=f"by default all: {', '.join(CASES)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    options = parser.parse_args()
    for seed in options.seeds:
        lab = Lab(profile="classroom", dataset="mnist5k", seed=seed)
        for name in options.defenses:
            measure(lab, CASES[name], PATH)


def measure(lab: Lab, case: Case, path: Path) -> None:
    """Append a row per level and eps that the file does not have yet."""
    about = {
        "defense": case.defense, "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "n": case.images,
    }  # fmt: skip
    missing = set_of_missing(about, case, path)
    if not missing:
        return
    sizes = tuple(eps for eps in case.eps if any(eps == size for _, size in missing))
    case = replace(case, eps=sizes, guarded=case.guarded and sizes == case.eps)
    net, part = lab.classifier("anet"), lab.data.test.first(case.images)
    defense = lab.defense(case.defense, classifier="anet")
    stand_ins = [nn.Sequential(STAND_INS[name](defense), net) for name in case.stand_ins]
    found = threat_levels(
        net, defense, part.images, part.labels, eps=case.eps, attacked=stand_ins,
        attackers=case.by, guarded=case.guarded, seed=lab.seed, progress=say,
    )  # fmt: skip
    about |= {
        "settings": lab.settings_of(defense), "clean": int(found.clean.sum()) / len(found.clean),
        "note": case.note, "versions": versions(), "git": git_commit(),
    }  # fmt: skip
    rows = [about | row for row in rows_of(found, case) if (row["level"], row["eps"]) in missing]
    append_rows(rows, path)
    best = [f"{float(r.float().mean()):.0%}" for r in found.right["white-box"]]
    print(f"{case.defense} seed {lab.seed}: white box leaves {', '.join(best)}", flush=True)


def set_of_missing(about: dict[str, Any], case: Case, path: Path) -> set[tuple[str, float]]:
    """Return the levels and sizes that no row of the file is about."""
    wanted = {(level, eps) for level in LEVELS for eps in case.eps}
    return wanted - {(row["level"], row["eps"]) for row in rows_about(path, about)}


def rows_of(found: Threats, case: Case) -> list[dict[str, Any]]:
    """Return the table with intervals, and with what each attacker did."""
    by = case.by
    white = asdict(by.white_box) | ({"through": list(case.stand_ins)} if case.stand_ins else {})
    attacks: dict[str, dict[str, Any]] = {
        "noise": {"name": "noise", "settings": {"draws": by.draws}},
        "transfer": asdict(by.transfer), "black-box": asdict(by.black_box), "white-box": white,
        "worst of all": {},
    }  # fmt: skip
    rows = []
    for row in found.table():
        right, n = round(row["accuracy"] * row["n"]), row["n"]
        low, high = wilson(right, n)
        row |= {"accuracy": right / n, "low": low, "high": high, "attack": attacks[row["level"]]}
        if row["level"] == "white-box":
            row |= {
                "guards": "all" if case.guarded else "accuracies only",
                "warnings": list(found.warnings if case.guarded else seen(found)),
            }
        rows.append(row)
    return rows


def seen(found: Threats) -> list[str]:
    """Return what the guards say that need nothing but the accuracies."""
    said = (
        guards.weaker_attacker_wins(found.right, found.eps),
        guards.more_succeeds_less(list(found.right["white-box"]), found.eps),
    )
    return [warning for warning in said if warning]


def say(done: int, total: int, level: str) -> None:
    """Print how far a defence is."""
    print(f"  {done} of {total}: {level}", flush=True)


if __name__ == "__main__":
    main()
