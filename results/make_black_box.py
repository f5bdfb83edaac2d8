"""Measure attackers who only ask, with the same number of questions: Square, SPSA, HopSkipJump.

    .venv/bin/python results/make_black_box.py --defenses none pix2pix threshold --seeds 0

Writes results/black_box.jsonl, a row per defence before anet, attack and eps. Square and SPSA ask
for scores and attack at each eps anew; HopSkipJump asks for labels and looks for the nearest error
in L-infinity once, which counts at every eps that it lies within. Rows that are there are left
alone, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn

from unfool.artifacts import REPO
from unfool.attacks import ATTACKS
from unfool.evaluation import append_rows, defended, predict, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions
from unfool.threats import seeded

PATH = REPO / "results" / "black_box.jsonl"
EPS = (0.15, 0.3)
IMAGES, QUERIES, STARTS = 50, 1000, 100
DEFENSES = ("none", "pix2pix", "threshold")
SETTINGS: dict[str, dict[str, Any]] = {
    "square": {},
    "spsa": {"samples": 8, "delta": 0.2},
    "hop_skip_jump": {},
}
ACCESS = {"square": "scores", "spsa": "scores", "hop_skip_jump": "labels"}


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


def measure(
    lab: Lab, defense: str, path: Path, images: int = IMAGES, queries: int = QUERIES
) -> None:
    """Append a row per attack and eps that the file does not have yet."""
    about = {
        "defense": defense, "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "n": images, "queries": queries, "knowledge": "nothing",
    }  # fmt: skip
    part = lab.data.test.first(images)
    for name in SETTINGS:
        alike = about | {"attack": {"name": name, "settings": settings_of(name)}}
        done = [row["eps"] for row in rows_about(path, alike)]
        missing = [eps for eps in EPS if eps not in done]
        if not missing:
            continue
        whole = defended(lab.classifier("anet"), lab.defense(defense, classifier="anet"))
        clean = predict(whole, part.images) == part.labels
        rows = []
        for eps, right in attacked(lab, whole, name, part.images, part.labels, missing, queries):
            low, high = wilson(int(right.sum()), images)
            rows.append(
                alike
                | {
                    "access": ACCESS[name], "eps": eps, "accuracy": int(right.sum()) / images,
                    "low": low, "high": high, "clean": int(clean.sum()) / images,
                    "versions": versions(), "git": git_commit(),
                }
            )  # fmt: skip
        append_rows(rows, path)
        print(defense, name, {row["eps"]: row["accuracy"] for row in rows}, flush=True)


def settings_of(name: str) -> dict[str, Any]:
    """Return an attack's settings as its row says them."""
    return SETTINGS[name] | ({"starts": STARTS} if name == "hop_skip_jump" else {})


def attacked(
    lab: Lab, whole: nn.Module, name: str, x: Tensor, y: Tensor, eps: list[float], queries: int
) -> list[tuple[float, Tensor]]:
    """Return by eps which images are right unattacked and attacked, (N,) bool."""
    more = dict(SETTINGS[name], queries=queries)
    if name == "hop_skip_jump":
        more["starts"] = lab.data.train.images[:STARTS]
    clean, found = predict(whole, x) == y, []
    made: Tensor | None = None
    for size in eps:
        if made is None or name != "hop_skip_jump":
            at = {} if name == "hop_skip_jump" else {"eps": size}
            with seeded(lab.seed):
                generator = Generator().manual_seed(lab.seed)
                made = ATTACKS[name](whole, x, y, generator=generator, **more, **at)
        inside = (made - x).abs().flatten(1).amax(dim=1) <= size + 1e-6
        fooled = inside & (predict(whole, made) != y)
        found.append((size, clean & ~fooled))
    return found


if __name__ == "__main__":
    main()
