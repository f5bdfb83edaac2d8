"""Weights that ship with the course: `results/weights/`, written once and found by name.

They are bfloat16 to be small and used in float32. Their metadata say what they were made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unfool import classifiers, training
from unfool.artifacts import REPO, load_tensors, save_tensors, sha256_of
from unfool.attacks import paper_attacks
from unfool.datasets import Dataset
from unfool.defenses import pix2pix
from unfool.evaluation import accuracy
from unfool.provenance import versions

if TYPE_CHECKING:
    from unfool.lab import Lab

WEIGHTS = REPO / "results" / "weights"
PURIFIER = "pix2pix-"  # how the names of committed purifiers begin


# --- what is there --------------------------------------------------------------------------------


def committed_weights() -> list[str]:
    """Return the names of the classifiers whose weights ship with the course."""
    names = (path.stem for path in WEIGHTS.glob("*.safetensors"))
    return sorted(name for name in names if not name.startswith(PURIFIER))


def committed_purifiers() -> list[str]:
    """Return the names of the classifiers whose purifier ships with the course."""
    found = WEIGHTS.glob(f"{PURIFIER}*.safetensors")
    return sorted(path.stem.removeprefix(PURIFIER) for path in found)


def key_of(name: str) -> str:
    """Return what all that is made from committed weights is found again by.

    It changes with the file: what was made from other weights of the same name is not taken.
    """
    return f"committed:{name}:{sha256_of(WEIGHTS / f'{name}.safetensors')[:16]}"


def load_classifier(name: str, data: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """Return a classifier of `committed_weights` and what it was made from.

    Raises:
        ValueError: the file is damaged, or it takes other images or tells other classes apart than
            those of `data`.
    """
    path = WEIGHTS / f"{name}.safetensors"
    again = "write it anew with unfool.committed.commit_weights, or restore it with git"
    tensors, made = _read(path, {"classifier", "shape", "classes", "dataset"}, again)
    if tuple(made["shape"]) != data.shape:
        raise ValueError(
            f"{name} takes images of shape {tuple(made['shape'])}, but {data.name} has "
            f"{data.shape}: choose one of CLASSIFIERS, which is trained here"
        )
    if made["classes"] != len(data.classes):
        raise ValueError(
            f"{name} tells {made['classes']} classes apart, but {data.name} has "
            f"{len(data.classes)}: choose one of CLASSIFIERS, which is trained here"
        )
    net = classifiers.build(made["classifier"], data.shape, made["classes"])
    what = (
        f"weights of {made['classifier']!r} for images {data.shape} and {made['classes']} classes"
    )
    _fill(net, tensors, path, what, again)
    return net, made


def load_purifier(classifier: str, data: Dataset) -> tuple[pix2pix.UNet, dict[str, Any]]:
    """Return the purifier of a committed classifier and what it was made from.

    Raises:
        ValueError: there is none, the file is damaged, or it has learned from other data.
    """
    if classifier not in committed_purifiers():
        raise ValueError(
            f"no purifier of {classifier!r} ships with the course: choose classifier from "
            f"{', '.join(committed_purifiers()) or 'none'}, or train one without committed=True"
        )
    path = WEIGHTS / f"{PURIFIER}{classifier}.safetensors"
    again = "write it anew with unfool.committed.commit_purifier, or restore it with git"
    tensors, made = _read(path, {"settings", "attacks", "dataset", "fingerprint"}, again)
    if made["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"the committed purifier of {classifier!r} has learned from {made['dataset']!r}, "
            f"and this lab holds {data.name!r}: take Lab(dataset={made['dataset']!r}), or "
            "train one without committed=True"
        )
    settings = pix2pix.Settings(**made["settings"])
    with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
        generator = pix2pix.UNet(data.shape[0], settings.width, settings.skips)
    _fill(generator, tensors, path, f"purifier of width {settings.width}", again)
    return generator, made


def _read(path: Path, needed: set[str], again: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, made = load_tensors(path)
    if missing := needed - made.keys():
        raise ValueError(f"{path} does not say its {', '.join(sorted(missing))}: {again}")
    return _in_float32(tensors), made


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path, what: str, again: str
) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds no {what} ({' '.join(str(error).split())[:200]}): {again}"
        ) from error


# --- how it is written ----------------------------------------------------------------------------


def commit_weights(lab: Lab, classifier: str) -> Path:
    """Write a trained classifier to `results/weights/CLASSIFIER-DATASET.safetensors`.

    Of a data set that is somebody's folder only its last name is kept. The metadata say how well
    the rounded weights do on the test split, too.
    """
    net = lab.classifier(classifier)
    small = _in_bfloat16(net.state_dict())
    rounded = classifiers.build(classifier, lab.data.shape, len(lab.data.classes))
    rounded.load_state_dict(_in_float32(small))
    made = _made_by(lab, net) | {
        "classifier": classifier,
        "shape": lab.data.shape,
        "classes": len(lab.data.classes),
        "recipe": training.recipe_for(classifier, lab.data.name).as_key(),
        "test_accuracy": accuracy(rounded, lab.data.test.images, lab.data.test.labels),
    }
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    short = lab.data.name.removeprefix("folder:").removesuffix(".zip")
    path = WEIGHTS / f"{classifier}-{short}.safetensors"
    save_tensors(path, small, made)
    return path


def commit_purifier(lab: Lab, classifier: str) -> Path:
    """Write a committed classifier's purifier, of the lab's profile, to `results/weights/`.

    `Lab.defense("pix2pix", classifier=..., committed=True)` loads it.

    Raises:
        ValueError: the classifier's own weights are not committed, so nobody could use it.
    """
    if classifier not in committed_weights():
        raise ValueError(
            f"the weights of {classifier!r} are not committed: choose from "
            f"{', '.join(committed_weights()) or 'none'}, or commit it first (commit_weights)"
        )
    seen = paper_attacks(lab.dataset)
    net = lab.defense("pix2pix", classifier=classifier, attacks=seen)
    assert net is not None
    made = _made_by(lab, net) | {
        "classifier": classifier,
        "settings": lab.settings_of(net),
        "attacks": [attack.name for attack in seen],
    }
    path = WEIGHTS / f"{PURIFIER}{classifier}.safetensors"
    save_tensors(path, _in_bfloat16(net.state_dict()), made)
    return path


def _made_by(lab: Lab, net: nn.Module) -> dict[str, Any]:
    return {
        "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint,
        "profile": lab.profile.name,
        "seed": lab.seed,
        "history": lab.history(net),
        "device": str(lab.device),
        "versions": versions(),
    }


def _in_bfloat16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}


def _in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
