"""Attack Defense-GAN through the identity and through its own generator, at a stated distance.

    .venv/bin/python results/make_in_z.py --seeds 0

Athalye et al. 2018 report 55 % read rightly at a normalised L2 of .005, the mean of the squared
changes of the pixels. Writes results/in_z.jsonl, a row per attacker and distance:

- "f": PGD in L2 on anet alone;
- "bpda": the same through Defense-GAN, its search taken for the identity on the way back;
- "z-space": images G(z) near to x that anet misreads (`misread_by_generator`). What is shown is not
  G(z), which lies farther off than most distances asked for, but x moved by the distance from what
  the defence makes of x towards G(z): the shortest way across the border between the two. An image
  falls if one start's fools the defence.

Every image is judged by the defence itself. Rows that are there are left alone, so a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from unfool.artifacts import REPO
from unfool.attacks import bpda, misread_by_generator, pgd
from unfool.defenses.defense_gan import DefenseGAN
from unfool.evaluation import append_rows, defended, predict, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions

PATH = REPO / "results" / "in_z.jsonl"
DISTANCES = (0.0025, 0.005, 0.01)
ATTACKERS = {"f": DISTANCES, "z-space": DISTANCES, "bpda": DISTANCES[1:2]}
IMAGES, STARTS = 100, 3
STEPS = {"f": 40, "bpda": 20, "z-space": 150}  # a step of BPDA is a search of the defence's own


def main() -> None:
    """Measure with each seed what is not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    for seed in parser.parse_args().seeds:
        measure(Lab(profile="classroom", dataset="mnist5k", seed=seed), PATH)


def measure(lab: Lab, path: Path, images: int = IMAGES) -> None:
    """Append a row per attacker and distance that the file does not have yet."""
    net, defense = lab.classifier("anet"), lab.defense("defense_gan", classifier="anet")
    assert isinstance(defense, DefenseGAN)
    part = lab.data.test.first(images)
    x, y = part.images, part.labels
    made, apart = defense.reconstruct(x)
    clean = predict(net, made) == y
    about = {
        "defense": "defense_gan", "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "n": images,
    }  # fmt: skip

    @cache
    def aims() -> Tensor:
        return misread_by_generator(
            defense.generator, net, x, y, starts=STARTS, steps=STEPS["z-space"], seed=lab.seed
        )

    for attacker, distances in ATTACKERS.items():
        alike = about | {"attacker": attacker, "steps": STEPS[attacker]}
        done = [row["distance"] for row in rows_about(path, alike)]
        for distance in (d for d in distances if d not in done):
            size = length(distance, x)
            if attacker == "z-space":
                shown = [towards(x, aim - made, size) for aim in aims()]
            else:
                model = net if attacker == "f" else nn.Sequential(bpda(defense), net)
                generator, steps = Generator().manual_seed(lab.seed), STEPS[attacker]
                shown = [pgd(model, x, y, eps=size, steps=steps, norm="l2", generator=generator)]
            whole = defended(net, defense)
            right = clean & torch.stack([predict(whole, one) == y for one in shown]).all(dim=0)
            low, high = wilson(int(right.sum()), images)
            row = alike | {
                "distance": distance, "accuracy": int(right.sum()) / images, "low": low,
                "high": high, "clean": int(clean.sum()) / images,
                "off_the_manifold": float(apart.median()), "settings": lab.settings_of(defense),
                "versions": versions(), "git": git_commit(),
            }  # fmt: skip
            append_rows([row], path)
            print(attacker, distance, row["accuracy"], flush=True)


def length(distance: float, x: Tensor) -> float:
    """Return the L2 of a change whose mean square is `distance`."""
    return math.sqrt(distance * x[0].numel())


def towards(x: Tensor, direction: Tensor, size: float) -> Tensor:
    """Return x moved along a direction by an L2 of `size`, and put back into [0, 1]."""
    norm = direction.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return (x + size * direction / norm).clamp(0, 1)


if __name__ == "__main__":
    main()
