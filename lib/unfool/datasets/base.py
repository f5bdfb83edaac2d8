"""What data sets are made of: splits, fingerprints, fair orders, the file they decode to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unfool.files import write_text

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]

CHUNK = 256  # images hashed at a time, so that a mapped file need not fit into memory


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        pixels: uint8 (N, C, H, W); may be memory-mapped, so that nothing is read before it is used.
        labels_array: int64 (N,).
    """

    pixels: Bytes
    labels_array: Labels

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise ValueError(
                f"pixels are {self.pixels.dtype} of shape {self.pixels.shape}; "
                "they must be uint8 of shape (N, C, H, W)"
            )
        if self.labels_array.dtype != np.int64 or self.labels_array.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"labels are {self.labels_array.dtype} of shape {self.labels_array.shape}; "
                f"they must be int64 of shape ({len(self.pixels)},)"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def images(self) -> Tensor:
        """All images as float32 (N, C, H, W) in [0, 1], made once; don't change them in place."""
        return torch.from_numpy(self.pixels.astype(np.float32)).div_(255)

    @cached_property
    def labels(self) -> Tensor:
        """All labels as int64 (N,)."""
        return torch.from_numpy(self.labels_array.copy())

    def first(self, n: int) -> Split:
        """Return the first `n` images, without converting the others.

        The embedded set and image folders are ordered so that this is a fair sample.

        Raises:
            ValueError: `n` is negative, or more than there are.
        """
        if not 0 <= n <= len(self):
            raise ValueError(f"first({n}) of {len(self)} images: n must be from 0 to {len(self)}")
        return Split(self.pixels[:n], self.labels_array[:n])


Splits = tuple[Split, Split, Split]  # train, validation, test


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set in three splits; no image is in two of them.

    Attributes:
        name: as given to `load`, but a folder's path is cut to its last part.
        classes: what the labels 0, 1, … mean.
        shape: (C, H, W) of one image.
        fingerprint: sha256 (hex) of the pixels and labels of all splits.
        note: where the images come from and what was done to them, in a few words.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    note: str = ""


def fingerprint_of(splits: Sequence[Split]) -> str:
    """Return the sha256 (hex) of the shapes, pixels and labels of the splits, in their order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(str(split.pixels.shape).encode())
        for start in range(0, len(split), CHUNK):
            digest.update(np.ascontiguousarray(split.pixels[start : start + CHUNK]).data)
        digest.update(np.ascontiguousarray(split.labels_array, dtype="<i8").data)
    return digest.hexdigest()


def balanced_order(labels: NDArray[Any], seed: int) -> Labels:
    """Return a random order (indices) of which every beginning holds each class's fair share.

    Each class is shuffled and spread evenly, with a little jitter, over the whole length.
    """
    rng = np.random.default_rng(seed)
    luck, jitter = rng.random(len(labels)), rng.random(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank = np.argsort(np.argsort(luck[members]))
        place[members] = (rank + jitter[members]) / len(members)
    return np.argsort(place, kind="stable").astype(np.int64)


def stratified_cut(labels: NDArray[Any], share: float, seed: int) -> tuple[Labels, Labels]:
    """Cut off `share` of each class, at least one image of it: (indices of the rest, of the cut).

    Both come in a balanced order.
    """
    order = balanced_order(labels, seed)
    cut = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        cut[members[: max(1, round(share * len(members)))]] = True
    return order[~cut[order]], order[cut[order]]


def write_decoded(
    folder: Path,
    blocks: Iterable[Bytes],
    shape: tuple[int, int, int, int],
    labels: NDArray[Any],
    counts: Sequence[int],
) -> None:
    """Write decoded images into the artifact's folder, block by block, and their fingerprint.

    Args:
        folder: an artifact under construction.
        blocks: uint8 arrays that, one after the other, are the images of `shape` (N, C, H, W):
            first those of train, then of validation, then of test.
        labels: (N,), in the same order.
        counts: images in train, validation and test.
    """
    # Plain writes: on a full disk a write into a mapped file would kill the process.
    with (folder / "pixels.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    facts = {"counts": list(counts), "fingerprint": fingerprint_of(_mapped(folder, counts))}
    write_text(folder / "splits.json", json.dumps(facts))


def read_decoded(folder: Path) -> tuple[Splits, str]:
    """Return the splits that `write_decoded` wrote, mapped, and their fingerprint."""
    facts: dict[str, Any] = json.loads((folder / "splits.json").read_text("utf-8"))
    return _mapped(folder, facts["counts"]), facts["fingerprint"]


def _mapped(folder: Path, counts: Sequence[int]) -> Splits:
    pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    train, kept = counts[0], counts[0] + counts[1]
    return (
        Split(pixels[:train], labels[:train]),
        Split(pixels[train:kept], labels[train:kept]),
        Split(pixels[kept:], labels[kept:]),
    )
