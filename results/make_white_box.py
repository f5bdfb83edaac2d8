"""Measure the attacker who knows everything, attack by attack: losses, restarts, nearest errors.

    .venv/bin/python results/make_white_box.py --defenses pix2pix none --seeds 0
    UNFOOL_DATA=FOLDER .venv/bin/python results/make_white_box.py --full

Writes results/white_box.jsonl, rows per defence before anet, on the first 100 test images. Attacks
in a ball say which images withstand every restart; attacks without one look for the nearest error,
in L2 or L-infinity. --full measures PGD training as its authors judged it: anet on full MNIST, eps
0.3, the first 2,000 test images. Rows that are there are left alone, so a run that was stopped goes
on where it was. What is trained is kept in the store, as always.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from unfool.artifacts import REPO
from unfool.attacks import ATTACKS
from unfool.evaluation import append_rows, defended, predict, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions

PATH = REPO / "results" / "white_box.jsonl"
DEFENSES = ("none", "pix2pix", "denoiser", "ape_gan", "adversarial_pgd")
IN_A_BALL: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("pgd", 1, {"steps": 40}),
    ("pgd", 10, {"steps": 40}),
    *(("apgd", 10, {"steps": 40, "losses": [loss]}) for loss in ("ce", "margin", "dlr")),
    ("apgd", 1, {"steps": 100, "losses": ["ce", "dlr-t"], "targets": 9}),
)
"""Name, restarts, settings; the last is `apgd` with its defaults, which adds aimed runs."""
NEAREST: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("carlini_wagner_l2", "l2", {"preset": "fast"}),
    ("fmn", "l2", {"norm": "l2", "steps": 200}),
    ("fmn", "linf", {"norm": "linf", "steps": 200}),
)
"""Name, what is small, settings."""


@dataclass(frozen=True)
class Setting:
    """Where the attacks are run, and which: the course's by default.

    Attributes:
        images: the first so many test images.
        eps: of the attacks in a ball, and what adversarial training learns from.
    """

    profile: str = "classroom"
    dataset: str = "mnist5k"
    images: int = 100
    eps: float = 0.15
    in_a_ball: tuple[tuple[str, int, dict[str, Any]], ...] = IN_A_BALL
    nearest: tuple[tuple[str, str, dict[str, Any]], ...] = NEAREST

    def wanted(self) -> list[dict[str, Any]]:
        """Return what a row says of each attack."""
        balls = [
            {"attack": {"name": name, "settings": settings}, "restarts": restarts, "eps": self.eps}
            for name, restarts, settings in self.in_a_ball
        ]
        return balls + [
            {"attack": {"name": name, "settings": settings}, "norm": norm}
            for name, norm, settings in self.nearest
        ]


MADRY = Setting(
    "desk", "mnist", 2000, 0.3,
    tuple(one for one in IN_A_BALL if one[0] == "pgd" or one[1] == 1), nearest=(),
)  # fmt: skip
"""Madry et al. 2018, Table 1: 40 steps, from one start and the worst of ten; APGD beside."""


def main() -> None:
    """Measure the defences that were asked for, with each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--defenses", nargs="+", choices=DEFENSES, default=list(DEFENSES), metavar="NAME",
        help=f"by default all: {', '.join(DEFENSES)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--full", action="store_true", help="PGD training on full MNIST")
    options = parser.parse_args()
    setting = MADRY if options.full else Setting()
    for seed in options.seeds:
        lab = Lab(profile=setting.profile, dataset=setting.dataset, seed=seed)
        for defense in ["adversarial_pgd"] if options.full else options.defenses:
            measure(lab, defense, PATH, setting)


def measure(lab: Lab, defense: str, path: Path, setting: Setting) -> None:
    """Append a row per attack that the file does not have yet."""
    part = lab.data.test.first(setting.images)
    x, y = part.images, part.labels
    learned = {"eps": setting.eps} if defense.startswith("adversarial") else {}
    made = lab.defense(defense, classifier="anet", **learned)
    # what takes the classifier's place needs none
    whole = (made if learned else defended(lab.classifier("anet"), made)).eval()
    clean = predict(whole, x) == y
    about = {
        "defense": defense, "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "n": setting.images,
    }  # fmt: skip
    for about_attack in setting.wanted():
        row = about | about_attack
        if rows_about(path, row):
            continue
        found = in_a_ball if "eps" in row else nearest
        row |= found(whole, x, y, clean, row) | {
            "clean": int(clean.sum()) / setting.images, "versions": versions(), "git": git_commit(),
        }  # fmt: skip
        append_rows([row], path)
        told = row["accuracy"] if "eps" in row else row["median"]
        print(defense, lab.seed, about_attack, told, flush=True)


def in_a_ball(
    whole: nn.Module, x: Tensor, y: Tensor, clean: Tensor, row: dict[str, Any]
) -> dict[str, Any]:
    """Return the share of all images that is right unattacked and after every restart."""
    left = clean.clone()
    for restart in range(row["restarts"]):
        rest = left.nonzero().flatten()
        if not len(rest):
            break
        generator = Generator().manual_seed(restart)
        attack, settings = ATTACKS[row["attack"]["name"]], row["attack"]["settings"]
        made = attack(whole, x[rest], y[rest], eps=row["eps"], generator=generator, **settings)
        inside = float((made - x[rest]).abs().max()) <= row["eps"] + 1e-6
        assert inside, "an attack left its ball"
        left[rest] = predict(whole, made) == y[rest]
    low, high = wilson(int(left.sum()), len(x))
    return {"accuracy": int(left.sum()) / len(x), "low": low, "high": high}


def nearest(
    whole: nn.Module, x: Tensor, y: Tensor, clean: Tensor, row: dict[str, Any]
) -> dict[str, Any]:
    """Return how far the nearest errors lie, over images that are right unattacked.

    An image that the attack can't fool counts as infinitely far: a quartile that falls on one is
    None.
    """
    made = ATTACKS[row["attack"]["name"]](whole, x, y, **row["attack"]["settings"])
    order = 2 if row["norm"] == "l2" else torch.inf
    length = (made - x).flatten(1).norm(order, dim=1)
    fooled = predict(whole, made) != y
    length = torch.where(fooled, length, torch.inf)[clean].sort().values
    at = {name: length[int(share * (len(length) - 1))].item()
          for name, share in (("low", 0.25), ("median", 0.5), ("high", 0.75))}  # fmt: skip
    return {"fooled": int((fooled & clean).sum()), "of": int(clean.sum())} | {
        name: value if value < torch.inf else None for name, value in at.items()
    }


if __name__ == "__main__":
    main()
