"""Make the committed records anew: what the tables show and no notebook has time for.

    .venv/bin/python results/make_records.py ablations --seeds 0 1 2

Each case is measured once per seed; a case that is in the file already is left alone, so a run that
was stopped goes on where it was. What is trained is kept in the store, as always.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unfool.artifacts import REPO
from unfool.attacks import ATTACKS, AttackSettings, paper_attacks
from unfool.defenses.pix2pix import GUIDES
from unfool.evaluation import AdversarialSet, counted, predict, read_records
from unfool.lab import Lab
from unfool.profiles import PROFILES

FOLDER = REPO / "results" / "records"


@dataclass(frozen=True)
class Case:
    """One defence before one classifier, under the paper's attacks of a data set, or `only` one."""

    dataset: str
    classifier: str
    defense: str
    settings: dict[str, Any] = field(default_factory=dict)
    profile: str = "classroom"
    attacks: int = 4  # the first so many of `paper_attacks`; what learns from attacks, from these
    only: AttackSettings | None = None
    images: int = 0  # if only so many are attacked, the passes are counted


WASHED: list[tuple[str, dict[str, Any]]] = [
    ("none", {}), ("threshold", {}), ("bits", {"bits": 3}), ("median", {"size": 3}),
    ("blur", {"sigma": 1.0}), ("jpeg", {"quality": 75}), ("denoiser", {}),
]  # fmt: skip
TAKEN_AWAY: list[dict[str, Any]] = [
    {}, {"lam": 0.0}, {"lam": 10.0}, {"lam": 1000.0}, {"adversarial": False}, {"skips": False},
    {"identity": True},
]  # fmt: skip


def washers() -> Iterator[Case]:
    """Notebook 05: what needs no attack to learn from, on digits and in colour."""
    for name, settings in WASHED:
        yield Case("mnist5k", "anet", name, settings)
    for name, settings in WASHED:
        yield Case("mnist-m", "resnet8", name, settings, attacks=2)


def ablations() -> Iterator[Case]:
    """Notebook 07: the purifier with one thing changed."""
    for settings in TAKEN_AWAY:
        yield Case("mnist5k", "anet", "pix2pix", settings)


GUIDED: list[dict[str, Any]] = [
    {}, {"mu": 0.1}, {"mu": 1.0}, {"mu": 10.0},
    *({"mu": 1.0, "guide": kind} for kind in GUIDES if kind != "clean"),
]  # fmt: skip


def colour() -> Iterator[Case]:
    """Notebook 08: the classifier-guided loss in colour, its weight and its readings; controls."""
    for name in ("none", "denoiser", "finetuned"):
        yield Case("mnist-m", "resnet8", name, attacks=2)
    for settings in GUIDED:
        yield Case("mnist-m", "resnet8", "pix2pix", settings, attacks=2)


def curves() -> Iterator[Case]:
    """Notebook 07: every epoch of the purifier before bnet (the paper's Figure 5)."""
    for epoch in range(1, PROFILES["classroom"].purifier.epochs + 1):
        yield Case("mnist5k", "bnet", "pix2pix", {"after": epoch})


def frontier() -> Iterator[Case]:
    """What Carlini's own schedule finds on notebook 03's digits, and what it costs."""
    original = AttackSettings("carlini_wagner_l2", {"preset": "original"})
    yield Case("mnist5k", "anet", "none", only=original, images=16)


def desk() -> Iterator[Case]:
    """Table 2 on full MNIST: the committed classifiers, every epoch of the purifier, the rivals."""
    for classifier in ("anet-mnist", "bnet-mnist"):
        for name in ("none", "threshold", "denoiser"):
            yield Case("mnist", classifier, name, {}, "desk")
        for epoch in range(1, 21):
            yield Case("mnist", classifier, "pix2pix", {"after": epoch}, "desk")


FILES: dict[str, Callable[[], Iterator[Case]]] = {
    "washers": washers, "ablations": ablations, "curves": curves, "frontier": frontier,
    "colour": colour,
    "desk-table2": desk,
}  # fmt: skip


def main() -> None:
    """Measure every case of a file with every seed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="Files: " + "; ".join(f"{k}: {v.__doc__}" for k, v in FILES.items()),
    )
    parser.add_argument("file", choices=FILES, help="which file of results/records/ to fill")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--classifier", help="only the cases of this classifier")
    options = parser.parse_args()
    path = FOLDER / f"{options.file}.jsonl"
    os.environ["UNFOOL_RECORDS"] = str(path)
    labs: dict[tuple[str, str], Lab] = {}
    for seed in options.seeds:
        for case in FILES[options.file]():
            if options.classifier in (None, case.classifier):
                key = (case.profile, case.dataset)
                if key not in labs or labs[key].seed != seed:
                    labs[key] = Lab(profile=case.profile, dataset=case.dataset, seed=seed)
                measure(labs[key], case, path)


def measure(lab: Lab, case: Case, path: Path) -> None:
    """Append a record per attack that the file does not have yet."""
    some = paper_attacks(case.dataset)[: case.attacks]
    seen = {"attacks": some} if case.defense in ("pix2pix", "finetuned") else {}
    defense = lab.defense(case.defense, classifier=case.classifier, **seen, **case.settings)
    wanted = {
        "dataset": case.dataset, "classifier": case.classifier, "profile": case.profile,
        "seed": lab.seed, "defense": case.defense, "defense_settings": lab.settings_of(defense),
    }  # fmt: skip
    records = read_records(path) if path.exists() else []
    there = {r.attack for r in records if all(getattr(r, k) == v for k, v in wanted.items())}
    for attack in [case.only] if case.only else some:
        if attack.name not in there:
            made, passes = attacked(lab, case, attack)
            got = lab.evaluate(defense, made, classifier=case.classifier, passes=passes)
            label = f"{case.classifier} {case.defense} {case.settings} seed {lab.seed}"
            print(f"{label}: {attack.name} {got.recovered_accuracy or 0:.1%} recovered", flush=True)


def attacked(lab: Lab, case: Case, attack: AttackSettings) -> tuple[AdversarialSet, int | None]:
    """Return the attack's images and, where only a few are attacked, the passes that it took."""
    if not case.images:
        return lab.adversarial_set(attack, classifier=case.classifier), None
    net, part = lab.classifier(case.classifier), lab.data.test.first(case.images)
    with counted(net) as passes:
        x_adv = ATTACKS[attack.name](net, part.images, part.labels, **attack.settings)
    right = predict(net, part.images) == part.labels
    made = AdversarialSet(
        part.images, x_adv, part.labels, right, right & (predict(net, x_adv) != part.labels),
        attack=attack.name, attack_settings=attack.settings, classifier=case.classifier,
        dataset=lab.data.name, fingerprint=lab.data.fingerprint, split="test", seed=lab.seed,
    )  # fmt: skip
    return made, passes.total


if __name__ == "__main__":
    main()
