"""Ask what limits Defense-GAN: the search, what the generator can draw, or the goal.

    UNFOOL_DATA=FOLDER .venv/bin/python results/make_redrawn.py --seeds 0

Model A, full MNIST, FGSM with eps 0.3, the first 100 test images. Each is redrawn clean and
attacked. If the drawing of the clean digit is nearer to the attacked image than what the search
found, the search has missed it; if it is further away, the search was led off by its goal. Writes
results/redrawn.jsonl, a row per seed; a row that is there is left alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unfool.artifacts import REPO
from unfool.attacks import fgsm
from unfool.defenses.defense_gan import DefenseGAN
from unfool.evaluation import append_rows, predict, rows_about
from unfool.lab import Lab
from unfool.provenance import git_commit, versions

PATH = REPO / "results" / "redrawn.jsonl"
IMAGES, EPS = 100, 0.3


def main() -> None:
    """Redraw with each seed's generator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    for seed in parser.parse_args().seeds:
        measure(Lab(profile="desk", dataset="mnist", seed=seed), "a", PATH)


def measure(lab: Lab, classifier: str, path: Path, images: int = IMAGES) -> None:
    """Append a row if the file does not have it yet."""
    about: dict[str, Any] = {
        "classifier": classifier, "dataset": lab.data.name, "fingerprint": lab.data.fingerprint,
        "profile": lab.profile.name, "seed": lab.seed, "eps": EPS, "n": images,
    }  # fmt: skip
    if rows_about(path, about):
        return
    net, part = lab.classifier(classifier), lab.data.test.first(images)
    x_adv = fgsm(net, part.images, part.labels, eps=EPS)
    search = lab.defense("defense_gan")
    assert isinstance(search, DefenseGAN)
    found = redrawn(net, search, part.images, x_adv, part.labels)
    append_rows([about | found | {"versions": versions(), "git": git_commit()}], path)
    print(found, flush=True)


def redrawn(
    net: nn.Module, search: DefenseGAN, x: Tensor, x_adv: Tensor, y: Tensor
) -> dict[str, Any]:
    """Return counts of images, and mean squared errors per pixel.

    Returns:
        "right_clean", "right_attacked": read rightly once redrawn; "nearer": the drawing of the
        attacked image is nearer to it than the drawing of the clean one is; "error_clean",
        "error_attacked": from what was to be drawn; "error_crossed": from the attacked image to
        the drawing of the clean one.
    """
    clean, error_clean = search.reconstruct(x)
    attacked, error_attacked = search.reconstruct(x_adv)
    crossed = ((clean - x_adv) ** 2).flatten(1).mean(1)
    return {
        "right_clean": int((predict(net, clean) == y).sum()),
        "right_attacked": int((predict(net, attacked) == y).sum()),
        "nearer": int((error_attacked < crossed).sum()),
        "error_clean": float(error_clean.mean()),
        "error_attacked": float(error_attacked.mean()),
        "error_crossed": float(crossed.mean()),
    }


if __name__ == "__main__":
    main()
