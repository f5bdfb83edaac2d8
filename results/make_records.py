"""Make the committed records anew: what the tables show and no notebook has time for.

    .venv/bin/python results/make_records.py ablations --seeds 0 1 2

Each case is measured once per seed; a case that is in the file already is left alone, so a run that
was stopped goes on where it was. What is trained is kept in the store, as always.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unfool.artifacts import REPO
from unfool.attacks import ATTACKS, AttackSettings, paper_attacks
from unfool.defenses.pix2pix import GUIDES
from unfool.evaluation import AdversarialSet, Record, counted, predict, read_records
from unfool.lab import Lab
from unfool.profiles import PROFILES

FOLDER = REPO / "results" / "records"


@dataclass(frozen=True)
class Case:
    """One defence before one classifier under some attacks; by default all is that classifier's."""

    dataset: str
    classifier: str
    defense: str
    settings: dict[str, Any] = field(default_factory=dict)
    profile: str = "classroom"
    attacks: int = 4  # the first so many of `paper_attacks`
    under: tuple[AttackSettings, ...] = ()  # instead of these
    learns: tuple[
        str, ...
    ] = ()  # what learns from attacks, from these; else from the first so many
    made_on: str = ""  # the attacks are made on another classifier
    trained_for: str = ""  # the defence is another classifier's
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


def colour_unseen() -> Iterator[Case]:
    """Notebook 08: the same defences under the paper's two other attacks, unseen in training."""
    _, _, *others = paper_attacks("mnist-m")
    for name, settings in (
        ("none", {}), ("bits", {"bits": 3}), ("jpeg", {"quality": 75}), ("denoiser", {}),
        ("finetuned", {}), ("pix2pix", {}), ("pix2pix", {"mu": 1.0}),
    ):  # fmt: skip
        yield Case("mnist-m", "resnet8", name, settings, attacks=2, under=tuple(others))


def colour_curves() -> Iterator[Case]:
    """Notebook 08: every epoch with and without the guided loss (the paper's Figure 6)."""
    for epoch in range(1, PROFILES["classroom"].purifier.epochs + 1):
        for mu in (0.0, 1.0):
            settings = {"mu": mu, "after": epoch}
            yield Case("mnist-m", "resnet8", "pix2pix", settings, attacks=2)


def colour_crossed() -> Iterator[Case]:
    """Notebook 08: purifiers guided by one network or by none, put before another, in colour."""
    three = ("resnet8", "bnet", "densenet40")
    for owner in three:
        for mu in (0.0, 1.0):
            for reader in three:
                other = owner if owner != reader else ""
                settings = {"mu": mu} if mu else {}
                yield Case("mnist-m", reader, "pix2pix", settings, attacks=2, trained_for=other)


def trial() -> Iterator[Case]:
    """What 2,000 images of each attack make of notebook 07's purifier, and the washers."""
    for name, settings in WASHED:
        yield Case("mnist5k", "anet", name, settings)
    yield Case("mnist5k", "anet", "pix2pix", {"images": 2000})


def curves() -> Iterator[Case]:
    """Notebook 07: every epoch of the purifier before bnet (the paper's Figure 5)."""
    for epoch in range(1, PROFILES["classroom"].purifier.epochs + 1):
        yield Case("mnist5k", "bnet", "pix2pix", {"after": epoch})


def frontier() -> Iterator[Case]:
    """What Carlini's own schedule finds on notebook 03's digits, and what it costs."""
    original = AttackSettings("carlini_wagner_l2", {"preset": "original"})
    yield Case("mnist5k", "anet", "none", under=(original,), images=16)


STRENGTHS = (
    *(AttackSettings("fgsm", {"eps": eps}) for eps in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)),
    *(
        AttackSettings("carlini_wagner_l2", {"kappa": k, "preset": "fast", "target": "random"})
        for k in (0.0, 5.0, 10.0)
    ),
)
UNSEEN = (AttackSettings("pgd", {"eps": 0.15}), AttackSettings("ead"))


def crossed(
    dataset: str, a: str, b: str, profile: str, beside: Iterable[str] = ("none", "threshold")
) -> Iterator[Case]:
    """Table 4: images made on one classifier, the purifier of the other, read by either."""
    for made_on, trained_for in ((a, b), (b, a)):
        for reader in (a, b):
            for name in beside:
                yield Case(dataset, reader, name, {}, profile, made_on=made_on)
            for purifiers in (trained_for, made_on):
                yield Case(
                    dataset, reader, "pix2pix", {}, profile, made_on=made_on, trained_for=purifiers
                )


def transfer() -> Iterator[Case]:
    """Notebook 09: another classifier's images and purifier (the paper's Table 4)."""
    yield from crossed("mnist5k", "anet", "bnet", "classroom")


def transfer_curves() -> Iterator[Case]:
    """Notebook 09: the same for every epoch (the paper's Figure 9)."""
    for epoch in range(1, PROFILES["classroom"].purifier.epochs + 1):
        for a, b in (("anet", "bnet"), ("bnet", "anet")):
            yield Case("mnist5k", a, "pix2pix", {"after": epoch}, made_on=a, trained_for=b)


def unseen() -> Iterator[Case]:
    """Notebook 09: purifiers of one attack, of all but one, of all; under these and two others."""
    for name in ("none", "threshold", "denoiser"):
        yield Case("mnist5k", "anet", name)
        yield Case("mnist5k", "anet", name, under=UNSEEN)
    four = paper_attacks("mnist5k")
    ones, threes = [(a,) for a in four], [tuple(b for b in four if b != a) for a in four]
    for learns in (*ones, *threes, four):
        yield Case("mnist5k", "anet", "pix2pix", learns=learns)
        yield Case("mnist5k", "anet", "pix2pix", learns=learns, under=UNSEEN)


def strengths() -> Iterator[Case]:
    """Notebook 09: FGSM's epsilon and Carlini and Wagner's kappa off the value trained on."""
    for name in ("none", "threshold", "denoiser", "pix2pix"):
        yield Case("mnist5k", "anet", name, under=STRENGTHS)


RIVALS = (
    "none", "threshold", "denoiser", "defense_gan", "magnet", "adversarial_fgsm",
    "adversarial_pgd", "finetuned", "ape_gan", "pix2pix",
)  # fmt: skip


def rivals() -> Iterator[Case]:
    """Notebook 10: every defence of the course before anet, under the paper's attacks."""
    for name in RIVALS:
        yield Case("mnist5k", "anet", name)


def rivals_unseen() -> Iterator[Case]:
    """Notebook 10: the others that learn from attacks, under the one that they were not shown."""
    four = paper_attacks("mnist5k")
    for name in ("ape_gan", "finetuned"):
        for left_out in four:
            learns = tuple(attack for attack in four if attack != left_out)
            yield Case("mnist5k", "anet", name, learns=learns, under=(left_out,))


def table6() -> Iterator[Case]:
    """Notebook 10: Defense-GAN's classifiers, FGSM with eps 0.3 and C&W (the paper's Table 6)."""
    _, _, _, carlini_wagner = paper_attacks("mnist5k")
    two = (AttackSettings("fgsm", {"eps": 0.3}), carlini_wagner)
    for classifier in ("d", "a", "c", "b"):
        for name in RIVALS:
            settings = {"eps": 0.3} if name.startswith("adversarial") else {}
            yield Case("mnist5k", classifier, name, settings, under=two, learns=two)


def desk_crossed() -> Iterator[Case]:
    """Table 4 on full MNIST: another classifier's images and purifier."""
    beside = "none", "threshold", "denoiser"
    yield from crossed("mnist", "anet-mnist", "bnet-mnist", "desk", beside)


def desk_curves() -> Iterator[Case]:
    """Figure 9's first half on full MNIST: Anet's images, every epoch of Bnet's purifier."""
    a, b = "anet-mnist", "bnet-mnist"
    for epoch in range(1, PROFILES["desk"].purifier.epochs):  # the last is in desk-table4
        yield Case("mnist", a, "pix2pix", {"after": epoch}, "desk", made_on=a, trained_for=b)


def desk_magnet() -> Iterator[Case]:
    """MagNet on full MNIST: what it refuses, of attacks and of all 10,000 clean test images.

    Ten passes instead of its authors' hundred: the thresholds, not these, fix what is refused.
    """
    fgsm, *others = paper_attacks("mnist")
    for share in (0.01, 0.05):
        case = Case(
            "mnist", "anet-mnist", "magnet", {"false_positives": share, "epochs": 10}, "desk"
        )
        yield replace(case, under=(fgsm,), images=10_000)
        yield replace(case, under=tuple(others))


def desk_defense_gan() -> Iterator[Case]:
    """Defense-GAN on full MNIST before its model A: 200 steps from 10 starts, 500 images.

    The purifier beside it saw this attack in training, and nothing else.
    """
    strong = (AttackSettings("fgsm", {"eps": 0.3}),)
    for name in ("none", "threshold", "denoiser", "pix2pix", "defense_gan"):
        learns = strong if name == "pix2pix" else ()
        yield Case("mnist", "a", name, {}, "desk", under=strong, learns=learns, images=500)
    quick = {"steps": 50}
    yield Case("mnist", "a", "defense_gan", quick, "desk", under=strong, images=500)


def desk() -> Iterator[Case]:
    """Table 2 on full MNIST: the committed classifiers, every epoch of the purifier, the rivals."""
    for classifier in ("anet-mnist", "bnet-mnist"):
        for name, settings in WASHED:
            yield Case("mnist", classifier, name, settings, "desk")
        for epoch in range(1, 21):
            yield Case("mnist", classifier, "pix2pix", {"after": epoch}, "desk")


def cifar() -> Iterator[Case]:
    """CIFAR-10's JPEG copy, committed resnet20, two of the four attacks, 5,000 images of each.

    The copy is `cifar10-jpeg.zip` in $UNFOOL_DATA: a class per folder, not CIFAR-10 to the bit. The
    classifier trained further sees the purifier's pairs, and as many images in all.
    """
    copy = f"folder:{os.environ.get('UNFOOL_DATA', REPO / 'data')}/cifar10-jpeg.zip"
    net, some = "resnet20-cifar10-jpeg", {"images": 5000}
    for name, settings in WASHED:
        yield Case(copy, net, name, settings, "desk", attacks=2)
    for mu in (1.0, 0.0):
        yield Case(copy, net, "pix2pix", some | {"mu": mu}, "desk", attacks=2)
    yield Case(copy, net, "finetuned", some, "desk", attacks=2)


FILES: dict[str, Callable[[], Iterator[Case]]] = {
    "washers": washers, "ablations": ablations, "trial": trial, "curves": curves,
    "frontier": frontier,
    "colour": colour, "colour-unseen": colour_unseen, "colour-curves": colour_curves,
    "colour-crossed": colour_crossed,
    "transfer": transfer, "transfer-curves": transfer_curves, "unseen": unseen,
    "strengths": strengths, "rivals": rivals, "rivals-unseen": rivals_unseen, "table6": table6,
    "desk-table2": desk, "desk-table4": desk_crossed, "desk-figure9": desk_curves,
    "desk-magnet": desk_magnet, "desk-defense-gan": desk_defense_gan, "cifar": cifar,
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
    learned = case.learns or some
    seen = {"attacks": learned} if case.defense in ("pix2pix", "finetuned", "ape_gan") else {}
    owner = case.trained_for or case.classifier
    defense = lab.defense(case.defense, classifier=owner, **seen, **case.settings)
    wanted = {
        "dataset": lab.data.name, "classifier": case.classifier, "profile": case.profile,
        "seed": lab.seed, "defense": case.defense, "defense_settings": lab.settings_of(defense),
    }  # fmt: skip
    if seen:
        wanted |= {"trained_for": owner, "learned_from": [attack.name for attack in learned]}
    for attack in case.under or some:
        records = read_records(path) if path.exists() else []
        if not any(is_there(r, case, attack, wanted) for r in records):
            made, passes = attacked(lab, case, attack)
            got = lab.evaluate(
                defense, made, classifier=case.classifier, passes=passes,
                transfer=bool(case.made_on or case.trained_for),
            )  # fmt: skip
            label = f"{case.classifier} {case.defense} {case.settings} seed {lab.seed}"
            print(f"{label}: {attack.name} {got.recovered_accuracy or 0:.1%} recovered", flush=True)


def is_there(record: Record, case: Case, attack: AttackSettings, wanted: dict[str, Any]) -> bool:
    """Whether a record is of this attack and case; what older ones leave unsaid is as usual."""
    unsaid = {"trained_for": "", "learned_from": []}
    return (
        all(getattr(record, k) in (v, unsaid.get(k, v)) for k, v in wanted.items())
        and record.made_on in ("", case.made_on or case.classifier)
        and record.attack == attack.name
        and all(record.attack_settings.get(k) == v for k, v in attack.settings.items())
    )


def attacked(lab: Lab, case: Case, attack: AttackSettings) -> tuple[AdversarialSet, int | None]:
    """Return the attack's images and, where only a few are attacked, the passes that it took."""
    if not case.images:
        return lab.adversarial_set(attack, classifier=case.made_on or case.classifier), None
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
