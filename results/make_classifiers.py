"""Train Defense-GAN's A to D on full MNIST, with both readings of their dropout: clean accuracy.

    UNFOOL_DATA=FOLDER python results/make_classifiers.py --classifiers a b c d --seeds 0

Their code passed the printed rates to an argument that means the share that is kept ("as run").
Writes results/classifiers.jsonl, a row per classifier, reading and seed; a row that is there is
left alone, and a training that was stopped goes on at its last epoch. Those with the dropout as
printed are kept in the store, as always.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from unfool import classifiers, training
from unfool.artifacts import REPO
from unfool.evaluation import append_rows, predict, rows_about, wilson
from unfool.lab import Lab
from unfool.progress import shown
from unfool.provenance import git_commit, versions

PATH = REPO / "results" / "classifiers.jsonl"
NAMES = ("a", "b", "c", "d")
READINGS = ("printed", "as run")


def main() -> None:
    """Train the classifiers that were asked for, with each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--classifiers", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME",
        help=f"by default all: {', '.join(NAMES)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    options = parser.parse_args()
    for seed in options.seeds:
        lab = Lab(profile="desk", dataset="mnist", seed=seed)
        for name in options.classifiers:
            for dropout in READINGS:
                measure(lab, name, dropout, PATH)


def measure(lab: Lab, name: str, dropout: str, path: Path) -> None:
    """Append a classifier's row if the file does not have it yet."""
    profile, data = lab.profile, lab.data
    recipe = training.recipe_for(name, data.name)
    images = profile.classifier_images or len(data.train)
    about: dict[str, Any] = {
        "classifier": name, "dropout": dropout, "dataset": data.name,
        "fingerprint": data.fingerprint, "profile": profile.name, "seed": lab.seed,
        "epochs": profile.classifier_epochs * recipe.longer, "images": min(images, len(data.train)),
    }  # fmt: skip
    if rows_about(path, about):
        return
    net = lab.classifier(name) if dropout == "printed" else as_run(lab, name, about, path)
    right = int((predict(net, data.test.images) == data.test.labels).sum())
    n = len(data.test)
    low, high = wilson(right, n)
    row = about | {
        "n": n, "accuracy": right / n, "low": low, "high": high,
        "versions": versions(), "git": git_commit(),
    }  # fmt: skip
    append_rows([row], path)
    share = f"{right / n:.2%} [{low:.2%}, {high:.2%}]"
    print(f"{name}, dropout {dropout}, seed {lab.seed}: {share} of {n}", flush=True)


def as_run(lab: Lab, name: str, about: dict[str, Any], path: Path) -> nn.Module:
    """Return a classifier trained as the lab trains it, but for its dropout."""
    data = lab.data
    net = classifiers.build(
        name, data.shape, len(data.classes), seed=lab.seed, literal_dropout=True
    )
    part = data.train.first(about["images"])
    checkpoint = path.with_name(f".{name}-as-run-{lab.seed}.safetensors")
    with shown(f"training {name}, dropout as run") as progress:
        training.train_classifier(
            net, part.images, part.labels, training.recipe_for(name, data.name),
            epochs=about["epochs"], seed=lab.seed, checkpoint=checkpoint, progress=progress,
        )  # fmt: skip
    checkpoint.unlink(missing_ok=True)
    return net.eval()


if __name__ == "__main__":
    main()
