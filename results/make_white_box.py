"""Measure the attacker who knows everything, attack by attack: losses, restarts, nearest errors.

    .venv/bin/python results/make_white_box.py --defenses pix2pix none --seeds 0

Writes results/white_box.jsonl, rows per defence before anet, on the first 100 test images. Attacks
in a ball say which images withstand every restart; attacks without one look for the nearest error,
in L2 or L-infinity. Rows that are there are left alone, so a run that was stopped goes on where it
was. What is trained is kept in the store, as always.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from unfool.artifacts import REPO
from unfool.attacks import ATTACKS
from unfool.evaluation import append_rows, defended, predict, rows_about, wilson
from unfool.lab import Lab, git_commit, versions

PATH = REPO / "results" / "white_box.jsonl"
IMAGES, EPS = 100, 0.15
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


def main() -> None:
    """Measure the defences that were asked for, with each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--defenses", nargs="+", choices=DEFENSES, default=list(DEFENSES), metavar="NAME",
        help=f"by default all: {', '.join(DEFENSES)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    options = parser.parse_args()
    for seed in options.seeds:
        lab = Lab(profile="classroom", dataset="mnist5k", seed=seed)
        for defense in options.defenses:
            measure(lab, defense, PATH)


def measure(lab: Lab, defense: str, path: Path, images: int = IMAGES) -> None:
    """Append a row per attack that the file does not have yet."""
    part = lab.data.test.first(images)
    x, y = part.images, part.labels
    net = lab.classifier("anet")
    whole = defended(net, lab.defense(defense, classifier="anet")).eval()
    clean = predict(whole, x) == y
    about = {
        "defense": defense, "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "n": images,
    }  # fmt: skip
    for about_attack in wanted():
        row = about | about_attack
        if rows_about(path, row):
            continue
        found = in_a_ball if "eps" in row else nearest
        row |= found(whole, x, y, clean, row) | {
            "clean": int(clean.sum()) / images, "versions": versions(), "git": git_commit(),
        }  # fmt: skip
        append_rows([row], path)
        told = row["accuracy"] if "eps" in row else row["median"]
        print(defense, lab.seed, about_attack, told, flush=True)


def wanted() -> list[dict[str, Any]]:
    """Return what a row says of each attack."""
    balls = [
        {"attack": {"name": name, "settings": settings}, "restarts": restarts, "eps": EPS}
        for name, restarts, settings in IN_A_BALL
    ]
    return balls + [
        {"attack": {"name": name, "settings": settings}, "norm": norm}
        for name, norm, settings in NEAREST
    ]


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
