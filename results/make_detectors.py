"""Attack MagNet's reader and its detectors at once: is what fools the one refused by the others?

    .venv/bin/python results/make_detectors.py --seeds 0

Writes results/detectors.jsonl, a row per share of false positives, attacker and eps. Rows that are
there are left alone, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from unfool.artifacts import REPO
from unfool.attacks import apgd, with_refusal
from unfool.attacks.apgd import plan
from unfool.defenses.magnet import MagNet
from unfool.evaluation import append_rows, defended, predict, rejected, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions

PATH = REPO / "results" / "detectors.jsonl"
EPS = (0.05, 0.1, 0.15, 0.2, 0.3)
SHARES = (0.01, 0.05)  # of clean images that all detectors together may refuse
ATTACKERS = ("reader", "reader and detectors")
IMAGES, STEPS, TARGETS = 200, 100, 3


def main() -> None:
    """Measure with each seed what is not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    for seed in parser.parse_args().seeds:
        measure(Lab(profile="classroom", dataset="mnist5k", seed=seed), PATH)


def measure(lab: Lab, path: Path, images: int = IMAGES, steps: int = STEPS) -> None:
    """Append a row per share, attacker and eps that the file does not have yet."""
    part, net = lab.data.test.first(images), lab.classifier("anet")
    about = {
        "defense": "magnet", "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "n": len(part.labels), "attack": {"name": "apgd", "steps": steps, "targets": TARGETS},
    }  # fmt: skip
    there = [
        (row["false_positives"], row["attacker"], row["eps"]) for row in rows_about(path, about)
    ]
    for share in SHARES:
        defense = lab.defense("magnet", classifier="anet", false_positives=share)
        assert isinstance(defense, MagNet)
        for attacker in ATTACKERS:
            for eps in (e for e in EPS if (share, attacker, e) not in there):
                found = attacked(net, defense, part.images, part.labels, attacker, eps, steps)
                row = about | {"false_positives": share, "attacker": attacker, "eps": eps} | found
                append_rows([row | {"versions": versions(), "git": git_commit()}], path)
                print(
                    {k: row[k] for k in ("false_positives", "attacker", "eps", *found)}, flush=True
                )


def attacked(
    net: torch.nn.Module, defense: MagNet, x: Tensor, y: Tensor, attacker: str, eps: float,
    steps: int,
) -> dict[str, float]:  # fmt: skip
    """Return what an attack leaves: an image falls to any target that is misread and accepted.

    `accuracy` counts images that are right or refused; `right` those that are right and accepted;
    `accepted` is the share of the attack's images, misread where it found such, that is accepted.
    """
    whole = defended(net, defense)
    model = whole if attacker == "reader" else with_refusal(whole, lambda z: suspicion(defense, z))
    best = x.clone()
    fallen = misread(whole, x, y) & ~rejected(defense, x)
    with torch.no_grad():
        runs = list(plan(whole(x), y, None, ["dlr-t"], TARGETS, 1))
    for _, aim in runs:
        left = (~fallen).nonzero().flatten()
        made = apgd(
            model, x[left], y[left], eps=eps, steps=steps, losses=["margin"], target=aim[left]
        )
        wrong, refused = misread(whole, made, y[left]), rejected(defense, made)
        fallen[left] = wrong & ~refused
        best[left[wrong]] = made[wrong]
    accepted = ~rejected(defense, best)
    right = accepted & ~misread(whole, best, y)
    low, high = wilson(int((~fallen).sum()), len(x))
    shares = {"accuracy": ~fallen, "right": right, "accepted": accepted}
    rows = {name: int(each.sum()) / len(x) for name, each in shares.items()}
    return rows | {"low": low, "high": high}


def suspicion(defense: MagNet, x: Tensor) -> Tensor:
    """Return how far the most suspicious detector is above its threshold, (N,), 0 at it."""
    return (defense.scores(x) / defense.thresholds - 1).amax(dim=1)


def misread(whole: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return which images are read as another class, (N,) bool."""
    return predict(whole, x) != y.cpu()


if __name__ == "__main__":
    main()
