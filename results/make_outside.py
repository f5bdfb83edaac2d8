"""Put our strongest attack beside AutoAttack, on the same images: an outside judge.

    python results/make_outside.py --images 500

AutoAttack is its authors' (pyautoattack), version "standard"; ours is APGD with its defaults.
Writes results/outside.jsonl, a row per classifier and 50 images, so a run that was stopped goes on
where it was. At the end it prints both accuracies, and the images per hour.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unfool.artifacts import REPO
from unfool.attacks import apgd, autoattack
from unfool.evaluation import append_rows, defended, predict, read_rows, rows_about, wilson
from unfool.lab import Lab
from unfool.provenance import git_commit, versions

PATH = REPO / "results" / "outside.jsonl"
CLASSIFIERS = {"none": "undefended", "adversarial_pgd": "PGD-trained", "pix2pix": "purified"}
EPS, CHUNK, STEPS, TARGETS = 0.15, 50, 100, 9


def main() -> None:
    """Measure what is not there yet of the images that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--defenses", nargs="+", choices=CLASSIFIERS, default=list(CLASSIFIERS), metavar="NAME",
        help=f"by default all: {', '.join(CLASSIFIERS)}",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=500, metavar="N", help="the first N")
    options = parser.parse_args()
    lab = Lab(profile="classroom", dataset="mnist5k", seed=0)
    for defense in options.defenses:
        for start in range(0, options.images, CHUNK):
            measure(lab, defense, range(start, min(start + CHUNK, options.images)), PATH)
        print(told(defense, read_rows(PATH)))


def measure(lab: Lab, defense: str, images: range, path: Path, steps: int = STEPS) -> None:
    """Append the row of some test images if the file does not have it yet."""
    about: dict[str, Any] = {
        "defense": defense, "classifier": "anet", "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint, "profile": lab.profile.name, "seed": lab.seed,
        "eps": EPS, "first": images.start, "n": len(images),
        "ours": {"name": "apgd", "steps": steps, "targets": TARGETS},
        "theirs": {"name": "autoattack", "version": "standard"},
    }  # fmt: skip
    if rows_about(path, about):
        return
    rows = slice(images.start, images.stop)
    x, y = lab.data.test.images[rows], lab.data.test.labels[rows]
    whole = defended(lab.classifier("anet"), lab.defense(defense, classifier="anet")).eval()
    clean, spent = predict(whole, x) == y, []
    right = []
    for attack in (lambda: apgd(whole, x, y, eps=EPS, steps=steps, targets=TARGETS),
                   lambda: autoattack(whole, x, y, eps=EPS)):  # fmt: skip
        began = time.perf_counter()
        made = attack()
        spent.append(time.perf_counter() - began)
        inside = float((made - x).abs().max()) <= EPS + 1e-5
        assert inside, "an attack left its ball"
        right.append(clean & (predict(whole, made) == y))
    row = about | {
        "clean": int(clean.sum()), "right_ours": int(right[0].sum()),
        "right_theirs": int(right[1].sum()), "right_both": int((right[0] & right[1]).sum()),
        "seconds": [round(s, 1) for s in spent], "versions": versions(), "git": git_commit(),
    }  # fmt: skip
    append_rows([row], path)
    print(defense, images, row["right_ours"], row["right_theirs"], row["seconds"], flush=True)


def told(defense: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return what a defence's rows say together, as a line."""
    own = [row for row in rows if row["defense"] == defense]
    n = sum(row["n"] for row in own)
    said = []
    for k, name in enumerate(("ours", "theirs")):
        right = sum(row[f"right_{name}"] for row in own)
        low, high = wilson(right, n)
        rate = n / max(1e-9, sum(row["seconds"][k] for row in own)) * 3600
        said.append(f"{name} {right / n:.1%} [{low:.1%}, {high:.1%}], {rate:.0f} images an hour")
    return f"{CLASSIFIERS[defense]}, {n} images: {'; '.join(said)}"


if __name__ == "__main__":
    main()
