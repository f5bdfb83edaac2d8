"""Measure what each image is worth to an attacker who trains a defence of his own like the one met.

    .venv/bin/python results/make_knowledge.py --defenses pix2pix --seeds 1 2 3

The defender and the attacker both know anet. The defender trains on adversarial images of the first
1,600 training images, the attacker on those of n of the other 2,000; he attacks anet behind his own
defence, and the result meets the defender's. Writes results/knowledge.jsonl; lesson 11 shows it. A
case that is in the file is left alone, so a run that was stopped goes on where it was.

The defender's seed is 0. An attacker of seed 0 starts from the defender's own first weights, which
is knowledge, too, and worth much: such rows say "same start" instead of "surrogate".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from unfool import classifiers, training
from unfool.artifacts import REPO, load_tensors, save_tensors
from unfool.attacks import VERSIONS, deepfool, fgsm, paper_attacks, pgd
from unfool.defenses import ape_gan, denoiser, magnet, pix2pix
from unfool.evaluation import append_rows, defended, predict, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions
from unfool.threats import k50

PATH = REPO / "results" / "knowledge.jsonl"
EPS, STEPS = (0.15, 0.2, 0.3), 40
DEFENDER = 0  # its seed
TAUGHT = paper_attacks("mnist5k")[:2]  # FGSM and DeepFool: what defences learn from
Settings = Any  # of `pix2pix`, `ape_gan`, `denoiser` or `magnet`: a frozen dataclass


@dataclass(frozen=True)
class Sizes:
    """How many images go where, and how many updates a surrogate gets at least.

    DeepFool attacks every fourth image, as 400 of 1,600 are attacked in the classroom's profile.
    """

    defender: int = 1600
    attacker: int = 2000
    test: int = 200
    updates: int = 300


@dataclass(frozen=True)
class Case:
    """What the attacker has: "f" alone, a "surrogate" trained on n images, or the "weights".

    Attributes:
        changes: where the surrogate's design is not the defender's.
    """

    defense: str
    attacker: str
    n: int = 0
    changes: tuple[tuple[str, Any], ...] = ()


DEFENSES = ("pix2pix", "ape_gan", "denoiser", "magnet")
COUNTS = (25, 100, 500, 2000)


def cases(defense: str) -> Iterator[Case]:
    """Yield all cases of a defence."""
    yield Case(defense, "f")
    for n in COUNTS:
        yield Case(defense, "surrogate", n)
    yield Case(defense, "weights")
    if defense == "pix2pix":
        yield Case(defense, "surrogate", 500, (("width", 8), ("skips", False)))


@dataclass(frozen=True)
class Half:
    """Clean images and what the attacks on anet make of them; DeepFool's are of the first ones."""

    x: Tensor
    stepped: Tensor  # by FGSM
    crossed: Tensor  # by DeepFool, of the first quarter
    success: Tensor  # of DeepFool

    def some(self, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs (adversarial, clean) of n images, and these images, each once.

        A quarter of them is DeepFool's. Of one seed, fewer images are part of more.
        """
        generator, quarter = Generator().manual_seed(seed), len(self.crossed)
        few = torch.randperm(quarter, generator=generator)[: n // 4]
        rest = quarter + torch.randperm(len(self.x) - quarter, generator=generator)
        rows, few = torch.cat([few, rest[: n - len(few)]]), few[self.success[few]]
        adversarial = torch.cat([self.stepped[rows], self.crossed[few]])
        return adversarial, torch.cat([self.x[rows], self.x[few]]), self.x[rows]


@dataclass
class Bench:
    """The defender and all that attackers learn from, made once and used for every case."""

    lab: Lab
    sizes: Sizes

    def __post_init__(self) -> None:
        train, cut = self.lab.data.train, self.sizes.defender
        self.net = self.lab.classifier("anet")
        halves = slice(cut), slice(cut, cut + self.sizes.attacker)
        self.defenders, self.attackers = (
            self._attacked(train.images[rows], train.labels[rows]) for rows in halves
        )
        self.test = self.lab.data.test.first(self.sizes.test)

    def _attacked(self, x: Tensor, y: Tensor) -> Half:
        step, crossing = (attack.settings for attack in TAUGHT)
        quarter = len(x) // 4
        crossed = deepfool(self.net, x[:quarter], y[:quarter], **crossing)
        before, after = predict(self.net, x[:quarter]), predict(self.net, crossed)
        success = (before == y[:quarter]) & (after != y[:quarter])
        return Half(x, fgsm(self.net, x, y, **step), crossed, success)

    def defender(self, defense: str) -> nn.Module:
        """Return the defence that is met."""
        lessons = self.defenders.some(len(self.defenders.x), DEFENDER)
        whose = {"name": f"half-{defense}"}
        return self._kept(defense, lessons, usual(self.lab, defense), DEFENDER, whose)

    def surrogate(self, case: Case, seed: int) -> tuple[nn.Module, Settings, int]:
        """Return an attacker's own defence, its settings and the updates that it took.

        Few images are gone through more often, so that what a curve shows is their number and not
        the length of the training.
        """
        settings = replace(usual(self.lab, case.defense), **dict(case.changes))
        lessons = self.attackers.some(case.n, seed)
        batches = math.ceil(len(lessons[learns_from(case.defense)]) / settings.batch_size)
        epochs = max(settings.epochs, math.ceil(self.sizes.updates / batches))
        settings = replace(settings, epochs=epochs)
        whose = {"name": f"surrogate-{case.defense}", "n": case.n, "seed": seed}
        made = self._kept(case.defense, lessons, settings, seed, whose)
        return made, settings, epochs * batches

    def _kept(
        self, defense: str, lessons: tuple[Tensor, Tensor, Tensor], settings: Settings, seed: int,
        whose: dict[str, Any],
    ) -> nn.Module:  # fmt: skip
        """Return what is learned from these lessons; the store keeps it."""
        config = whose | {
            "name": f"{whose['name']}-anet-mnist5k", "settings": asdict(settings),
            "fingerprint": self.lab.data.fingerprint, "profile": self.lab.profile.name,
            "sizes": learning(self.sizes), "version": made_by(defense),
            "attacks": [asdict(attack) for attack in TAUGHT],
        }  # fmt: skip

        def build(folder: Path) -> None:
            made = learned(defense, lessons, settings, seed)
            save_tensors(folder / "weights.safetensors", made.state_dict(), {})

        folder = self.lab.store.get("purifier", config, build)
        # Hardly trained, to have the right shape; its weights are overwritten at once.
        empty = learned(defense, self.defenders.some(4, 0), replace(settings, epochs=1), 0)
        empty.load_state_dict(load_tensors(folder / "weights.safetensors")[0])
        return empty


MODULES: dict[str, Any] = {
    "pix2pix": pix2pix, "ape_gan": ape_gan, "denoiser": denoiser, "magnet": magnet,
}  # fmt: skip


def made_by(defense: str) -> list[int]:
    """Return the versions of all that decides what is learned, and of PGD, which attacks it."""
    parts = (MODULES[defense], pix2pix, classifiers, training)  # pix2pix: others take its parts
    names = (*(attack.name for attack in TAUGHT), "pgd")
    return [part.VERSION for part in parts] + [VERSIONS[name] for name in names]


def learning(sizes: Sizes) -> dict[str, int]:
    """Return the sizes that what is trained depends on: all but the number of test images."""
    return {name: size for name, size in asdict(sizes).items() if name != "test"}


def usual(lab: Lab, defense: str) -> Settings:
    """Return the profile's settings of a defence."""
    if defense != "denoiser":
        by_name = {"pix2pix": "purifier", "ape_gan": "ape_gan", "magnet": "magnet"}
        return getattr(lab.profile, by_name[defense])
    like = lab.profile.purifier
    shared = {key: getattr(like, key) for key in ("width", "epochs", "batch_size", "rate")}
    return denoiser.Settings(size=paper_attacks("mnist5k")[0].settings["eps"], **shared)


def learns_from(defense: str) -> int:
    """Return which of the tensors of `Half.some` is gone through: pairs, or clean images."""
    return 2 if defense in ("denoiser", "magnet") else 0


def learned(
    defense: str, lessons: tuple[Tensor, Tensor, Tensor], settings: Settings, seed: int
) -> nn.Module:
    """Train a defence; of MagNet, its reformer alone."""
    adversarial, clean, once = lessons
    given = (once,) if learns_from(defense) == 2 else (adversarial, clean)
    made: nn.Module = MODULES[defense].train(*given, settings, seed=seed)[0]
    return made["I"].eval() if isinstance(made, nn.ModuleDict) else made.eval()


def main() -> None:
    """Measure every case of the defences that were asked for, with each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--defenses", nargs="+", choices=DEFENSES, default=["pix2pix"], metavar="NAME",
        help=f"of {', '.join(DEFENSES)}; by default pix2pix",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], metavar="N",
        help="of the surrogate, of its images and of PGD; with the defender's, 0, it starts alike",
    )  # fmt: skip
    parser.add_argument(
        "--eps", type=float, nargs="+", default=EPS, metavar="E", help="by default %(default)s"
    )
    parser.add_argument(
        "--images", type=int, default=Sizes.test, metavar="N",
        help="test images that are attacked, the first ones; by default %(default)s",
    )  # fmt: skip
    options = parser.parse_args()
    sizes = Sizes(test=options.images)
    bench = Bench(Lab(profile="classroom", dataset="mnist5k", seed=0), sizes)
    for seed in options.seeds:
        for defense in options.defenses:
            for case in cases(defense):
                for eps in options.eps:
                    measure(bench, case, seed, eps, PATH)
            for eps in options.eps:
                found = halved(PATH, defense, seed, eps, sizes.test)
                print(f"{defense} seed {seed} eps {eps}: {found}")


def measure(bench: Bench, case: Case, seed: int, eps: float, path: Path) -> None:
    """Append the row of a case and an eps if the file does not have it yet.

    Raises:
        ValueError: it has one, made by other versions. A row that names none is taken as it is.
    """
    lab, settings = bench.lab, usual(bench.lab, case.defense)
    design = replace(settings, **dict(case.changes))
    about = {
        "defense": case.defense, "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": seed,
        "defender_seed": DEFENDER, "defender_images": bench.sizes.defender,
        "n_images": bench.sizes.test, "attacker": named(case, seed), "n": case.n,
        "width": getattr(design, "width", None), "skips": getattr(design, "skips", None),
        "changes": dict(case.changes), "eps": eps,
    }  # fmt: skip
    now = made_by(case.defense)
    there = rows_about(path, about)
    if any(row.get("made_by", now) != now for row in there):
        raise ValueError(
            f"{path} has a row of {case}, seed {seed}, eps {eps} by other versions than "
            f"{now}: delete the rows of {case.defense}, and run this again"
        )
    if there:
        return
    row = about | result(bench, case, seed, eps) | {"made_by": now}
    row |= {"settings": asdict(settings), "versions": versions(), "git": git_commit()}
    append_rows([row], path)
    print(f"{case} seed {seed} eps {eps}: {row['accuracy']:.1%} right", flush=True)


def named(case: Case, seed: int) -> str:
    """Return what a row calls an attacker."""
    alike = case.attacker == "surrogate" and seed == DEFENDER
    return "same start" if alike else case.attacker


def result(bench: Bench, case: Case, seed: int, eps: float) -> dict[str, Any]:
    """Attack anet behind what the attacker has, and return what the defender makes of it."""
    defender, updates, epochs = bench.defender(case.defense), None, None
    attacked = {"f": None, "weights": defender}.get(case.attacker)
    if case.attacker == "surrogate":
        attacked, settings, updates = bench.surrogate(case, seed)
        epochs = settings.epochs
    x, y = bench.test.images, bench.test.labels
    own, whole = defended(bench.net, attacked), defended(bench.net, defender)
    generator = Generator().manual_seed(seed)
    x_adv = pgd(own, x, y, eps=eps, steps=STEPS, generator=generator)
    clean = predict(whole, x) == y
    right = int((clean & (predict(whole, x_adv) == y)).sum())
    low, high = wilson(right, len(y))
    return {
        "attack": {"name": "pgd", "settings": {"steps": STEPS}}, "accuracy": right / len(y),
        "low": low, "high": high, "clean": int(clean.sum()) / len(y), "updates": updates,
        "epochs": epochs, "own_accuracy": int((predict(own, x_adv) == y).sum()) / len(y),
    }  # fmt: skip


def halved(path: Path, defense: str, seed: int, eps: float, images: int) -> str:
    """Return a seed's K50 as text, of surrogates like the defender, and the same to half-way.

    Half-way is between the accuracy at n = 0 and the one that the weights leave, which may be above
    half of the former.
    """
    about = {"defense": defense, "seed": seed, "eps": eps, "n_images": images, "changes": {}}
    rows = rows_about(path, about)
    points = {row["n"]: row["accuracy"] for row in rows if row["attacker"] != "weights"}
    (weights,) = (row["accuracy"] for row in rows if row["attacker"] == "weights")
    found = [k50(points), k50(points, floor=weights)]
    words = ["not reached" if n is None else f"{n:.0f} images" for n in found]
    return f"K50 {words[0]}, half-way to the weights {words[1]}"


if __name__ == "__main__":
    main()
