"""Named data sets as splits of images in [0, 1] with labels. `load` is the one door."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from unfool.artifacts import Store
from unfool.datasets.base import Dataset, Split, fingerprint_of
from unfool.datasets.digits import build_mnist5k, mnist5k, mnist_m
from unfool.datasets.full import cifar10, mnist
from unfool.progress import Progress

__all__ = [
    "NAMES",
    "Dataset",
    "Split",
    "build_mnist5k",
    "check_unseen",
    "fingerprint_of",
    "load",
]

FOLDER = "folder:"
SIZE = 32  # pixels a side that an image folder is brought to, unless told

_LOADERS: dict[str, Callable[[Store, Progress | None], Dataset]] = {
    "mnist5k": lambda store, progress: mnist5k(),
    "mnist-m": mnist_m,
    "mnist": mnist,
    "cifar10": cifar10,
}
NAMES = tuple(_LOADERS)  # and "folder:PATH"

# The digits of mnist5k, of which mnist-m is made, were all taken from MNIST's training images.
_HAS_SEEN = {"mnist": ("mnist5k", "mnist-m")}


def load(
    name: str, *, size: int = SIZE, store: Store | None = None, progress: Progress | None = None
) -> Dataset:
    """Return a data set by its name; the notebook 01 shows what is in it.

    Args:
        name: one of `NAMES`, or "folder:PATH" for a folder (or zip) of one folder per class.
        size: pixels a side, at least 8, of an image folder; the named sets have their own.
        store: where decoded and downloaded sets are kept; the default store, if not given.
        progress: told about decoding, downloading and waiting.

    Raises:
        ValueError: unknown name or size; a file that is damaged, altered or not what it should be.
        FileNotFoundError: a file is missing; the message says which to put where.
    """
    store = store or Store()
    if name.startswith(FOLDER):
        from unfool.datasets.folder import image_folder

        if name == FOLDER:
            raise ValueError("'folder:' lacks a path; write 'folder:PATH'")
        return image_folder(Path(name.removeprefix(FOLDER)).expanduser(), size, store, progress)
    if name not in _LOADERS:
        raise ValueError(_unknown(name))
    if size != SIZE:
        raise ValueError(
            f"size={size} goes with 'folder:PATH' only; {name!r} has its own: leave it out"
        )
    return _LOADERS[name](store, progress)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    if Path(name).exists():
        meant = f"for the path, write '{FOLDER}{name}'. "
    return f"unknown data set {name!r}; {meant}Known are {', '.join(NAMES)} and {FOLDER}PATH"


def check_unseen(trained_on: str, dataset: str) -> None:
    """Refuse to score a classifier on test images that it was trained on.

    Args:
        trained_on: name of the data set whose training split the classifier has seen.
        dataset: name of the one whose test split it is to be scored on.

    Raises:
        ValueError: it has seen them.
    """
    if dataset in _HAS_SEEN.get(trained_on, ()):
        raise ValueError(
            f"a classifier trained on {trained_on!r} has seen the test digits of {dataset!r}: they "
            f"are all taken from MNIST's training images; score it on {trained_on!r}, or train one "
            f"on {dataset!r}"
        )
