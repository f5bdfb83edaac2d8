"""A learner's own images: a folder with one folder per class, or a zip of one, decoded once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unfool.artifacts import Store
from unfool.datasets.base import (
    Bytes,
    Dataset,
    Labels,
    balanced_order,
    read_decoded,
    stratified_cut,
    write_decoded,
)
from unfool.progress import Progress, silent

VERSION = 1  # raise it when the same folder would give other images, labels or splits
SEED = 2020  # of the splits and of the order
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1  # cut from all images; from what is left to train
SMALLEST = 8  # pixels
DEEPEST = 16  # folders within folders; more is a link that leads back up
LARGEST = 256_000_000  # bytes of one image file
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
USE_MNIST = "use dataset='mnist' with UNFOOL_DATA=<the folder above MNIST/raw>"
GREY = ("1", "L", "LA")  # Pillow's modes of images without colour

Parts = tuple[str, ...]  # of a path below the folder: ("cats", "1.png")
Files = dict[Parts, tuple[str, int, int]]  # name to read it by, bytes, crc or time of change
Images = list[tuple[str, str]]  # (name, class)
Read = Callable[[str], bytes]


@dataclass(frozen=True)
class _Listing:
    """What lies in the folder or zip."""

    images: Files
    folders: set[Parts]
    left_out: list[Parts]  # files that are not images


@dataclass(frozen=True)
class _Plan:
    """The images in their final order: train, then validation, then test."""

    classes: tuple[str, ...]
    names: list[str]
    labels: Labels
    counts: tuple[int, int, int]


def image_folder(path: Path, size: int, store: Store, progress: Progress | None) -> Dataset:
    """Return the images under `path` as (C, size, size); C is 1 if all of them are grey, else 3.

    The short side is resized to `size` and the middle cut out. `train/` and `test/` (and, if there,
    `validation/` or `val/`) on top are kept; else a fifth of each class is cut off for the test.
    Without `validation/`, a tenth of each training class is held back for it.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged, unsafe or ambiguous; the
            message names it and says what to do. A zip is never extracted.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST:
        raise ValueError(f"size is {size!r}: it must be a whole number, at least {SMALLEST}")
    listing = _listing(path)
    plan = _plan(listing, path)
    config = {"name": path.stem, "version": VERSION, "size": size, "listing": _digest(listing)}

    def build(folder: Path) -> None:
        with _reader(path) as read:
            _decode(read, plan, size, folder, progress or silent)

    needs = len(plan.names) * 3 * size * size
    folder = store.get("dataset", config, build, needs_bytes=needs, progress=progress)
    splits, fingerprint = read_decoded(folder)
    channels = splits[0].pixels.shape[1]
    name, shape = f"folder:{path.resolve().name}", (channels, size, size)
    return Dataset(name, plan.classes, shape, *splits, fingerprint, _note(listing, path))


def _digest(listing: _Listing) -> str:
    return hashlib.sha256(json.dumps(sorted(listing.images.values())).encode()).hexdigest()


def _note(listing: _Listing, path: Path) -> str:
    kinds = {_suffix(parts).lstrip(".") for parts in listing.images}
    names = sorted({{"jpg": "jpeg", "tif": "tiff"}.get(kind, kind).upper() for kind in kinds})
    note = f"{len(listing.images):,} {'/'.join(names)} images of {path.name}"
    return f"{note}; {len(listing.left_out):,} other files left out" if listing.left_out else note


# What is there


def _listing(path: Path) -> _Listing:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; dataset='folder:PATH' wants a folder with one folder of "
            "images per class, or a zip of one"
        )
    files, folders = _walk(path) if path.is_dir() else _members(path)
    files = {parts: facts for parts, facts in files.items() if not _hidden(parts)}
    images = {parts: facts for parts, facts in files.items() if _suffix(parts) in SUFFIXES}
    left_out = [parts for parts in files if parts not in images]
    if not images:
        idx = next((parts[-1] for parts in left_out if _is_idx_name(parts[-1])), None)
        hint = (
            f"{idx} is an idx file: {USE_MNIST}" if idx else f"known: {' '.join(sorted(SUFFIXES))}"
        )
        raise ValueError(f"{path} holds no images ({len(left_out)} other files); {hint}")
    # Every folder, also those that a zip names only as a part of a longer path.
    folders = {parts[:i] for parts in folders for i in range(len(parts) + 1)}
    return _Listing(images, {parts for parts in folders if not _hidden(parts)}, left_out)


def _suffix(parts: Parts) -> str:
    return os.path.splitext(parts[-1])[1].lower()


def _hidden(parts: Parts) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _walk(path: Path) -> tuple[Files, set[Parts]]:
    files: Files = {}
    folders: set[Parts] = set()
    for folder, _, names in os.walk(path, followlinks=True):
        above = Path(folder).relative_to(path).parts
        if len(above) > DEEPEST:
            raise ValueError(f"{folder} is {len(above)} folders deep: does a link lead back up?")
        folders.add(above)
        for name in names:
            try:
                facts = os.stat(os.path.join(folder, name))
                size, changed = facts.st_size, facts.st_mtime_ns
            except OSError:  # a link to nothing: it is counted when it is read
                size, changed = 0, 0
            files[*above, name] = ("/".join((*above, name)), size, changed)
    return files, folders


def _members(path: Path) -> tuple[Files, set[Parts]]:
    with _open_zip(path) as archive:
        members = archive.infolist()
    files: Files = {}
    folders: set[Parts] = set()
    for member in members:
        _refuse_unsafe(member, path)
        parts = tuple(part for part in member.filename.split("/") if part not in ("", "."))
        if member.is_dir():
            folders.add(parts)
        elif parts:
            files[parts] = (member.filename, member.file_size, member.CRC)
            folders.add(parts[:-1])
    return files, folders


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        pass
    with path.open("rb") as file:
        head = file.read(4)
    if head in (b"\0\0\x08\x01", b"\0\0\x08\x03") or _is_idx_name(path.name):
        raise ValueError(f"{path} is an idx file, not a folder of images: {USE_MNIST}")
    if head[:2] == b"PK" or path.suffix.lower() == ".zip":
        size = path.stat().st_size
        raise ValueError(f"{path} is a broken zip ({size} bytes): fetch or pack it again")
    raise ValueError(
        f"{path} is a file, neither a folder nor a zip; unpack it, or give the folder of images"
    )


def _is_idx_name(name: str) -> bool:
    return re.search(r"-idx[13]-ubyte(\.gz)?$", name) is not None


def _refuse_unsafe(member: zipfile.ZipInfo, path: Path) -> None:
    """Refuse names that would lead out of a folder, although nothing is ever extracted."""
    name = member.orig_filename
    parts = re.split(r"[\\/]", name)
    fault = ""
    if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name):
        fault = "leads out of the zip's own folder"
    elif stat.S_ISLNK(member.external_attr >> 16):
        fault = "is a link"
    elif member.flag_bits & 1:
        fault = "is encrypted"
    elif member.file_size > LARGEST:
        fault = f"unpacks to {member.file_size:,} bytes (at most {LARGEST:,})"
    if fault:
        raise ValueError(
            f"{path} is refused: its member {name!r} {fault}; "
            "pack the class folders again with a tool that you trust"
        )


# What it means


def _plan(listing: _Listing, path: Path) -> _Plan:
    """Find the classes and lay out the splits."""
    placed = _placed(listing, path)
    _check_classes(placed, path)
    if "test" not in placed:
        placed["train"], placed["test"] = _cut(placed["train"], TEST_SHARE)
    if "validation" not in placed:
        placed["train"], placed["validation"] = _cut(placed["train"], VALIDATION_SHARE)
    classes = tuple(sorted({label for _, label in placed["train"]}))
    number = {label: i for i, label in enumerate(classes)}
    rows = []
    for part in ("train", "validation", "test"):
        found = placed[part]
        order = balanced_order(np.array([label for _, label in found]), SEED)
        rows += [found[i] for i in order]
    counts = (len(placed["train"]), len(placed["validation"]), len(placed["test"]))
    labels = np.array([number[label] for _, label in rows], dtype=np.int64)
    return _Plan(classes, [name for name, _ in rows], labels, counts)


def _cut(found: Images, share: float) -> tuple[Images, Images]:
    rest, cut = stratified_cut(np.array([label for _, label in found]), share, SEED)
    return [found[i] for i in rest], [found[i] for i in cut]


def _placed(listing: _Listing, path: Path) -> dict[str, Images]:
    """Return the images of each split that the folder has, all under "train" where it has none."""
    top, layout = _layout(listing, path)
    depth = top + (2 if layout else 1)  # folders above an image, that of its class included
    placed: dict[str, Images] = {split: [] for split in layout.values()} or {"train": []}
    stray = []
    for parts, (name, _, _) in sorted(listing.images.items()):
        if len(parts) <= depth:
            stray.append(name)
        else:
            placed[layout.get(parts[top], "train")].append((name, parts[depth - 1]))
    if stray:
        raise ValueError(
            f"{path} has {len(stray)} images outside any class folder ({_some(stray)}): "
            "put each into the folder of its class, or take it out"
        )
    filled = {parts[:i] for parts in listing.images for i in range(top + 1, depth + 1)}
    empty = [f for f in listing.folders if top < len(f) <= depth and f not in filled]
    if empty:
        names = _some(sorted(map("/".join, empty)))
        raise ValueError(f"{path} has folders without images ({names}): fill or delete them")
    return placed


def _layout(listing: _Listing, path: Path) -> tuple[int, dict[str, str]]:
    """Return how many folders lie above the first that counts, and folder -> split, if split."""
    lowest = {parts[:-1] for parts in listing.images}
    lowest |= listing.folders - {parts[:-1] for parts in listing.folders if parts}
    shortest, top = min(map(len, lowest)), 0
    while top < shortest - 1 and len({parts[top] for parts in lowest}) == 1:
        top += 1
    tops = {parts[top] for parts in lowest if len(parts) > top}
    layout = {name: SPLITS[name.lower()] for name in tops if name.lower() in SPLITS}
    if not {"train", "test"} <= set(layout.values()):
        return top, {}  # a class may well be called "train"
    if len(set(layout.values())) < len(tops):
        raise ValueError(
            f"{path} has {_some(sorted(tops))} side by side; beside train/ and test/ there may "
            "only be validation/ (or val/): move the others away"
        )
    return top, layout


def _check_classes(placed: dict[str, Images], path: Path) -> None:
    count = Counter(label for _, label in placed["train"])
    for split, found in placed.items():
        unknown = sorted({label for _, label in found} - set(count))
        if unknown:
            raise ValueError(
                f"{path}: {split}/ has classes that train/ lacks ({_some(unknown)}): add images "
                "of them to train/, or take them out"
            )
    if len(count) < 2:
        raise ValueError(
            f"{path} has one class only ({next(iter(count))!r}); a classifier needs at least two: "
            "give the folder above the class folders"
        )
    cut = [split for split in ("validation", "test") if split not in placed]
    least, fewest = min((n, label) for label, n in count.items())
    if least <= len(cut):
        raise ValueError(
            f"{path}: class {fewest!r} has too few images ({least}); it needs at least "
            f"{len(cut) + 1}, one each for {' and '.join(['train', *cut])}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


# Decoding


@contextmanager
def _reader(path: Path) -> Iterator[Read]:
    """Yield a function from the name of an image to the bytes of its file."""
    if path.is_dir():
        yield lambda name: (path / name).read_bytes()
    else:
        with _open_zip(path) as archive:
            yield archive.read


def _decode(read: Read, plan: _Plan, size: int, folder: Path, progress: Progress) -> None:
    channels = 1 if all(_is_grey(read, name) for name in plan.names) else 3
    shape = (len(plan.names), channels, size, size)
    try:
        blocks = _fitted_images(read, plan.names, channels, size, progress)
        write_decoded(folder, blocks, shape, plan.labels, plan.counts)
    except ValueError:
        (folder / "pixels.npy").unlink(missing_ok=True)
        raise


def _is_grey(read: Read, name: str) -> bool:
    try:
        with Image.open(io.BytesIO(read(name))) as image:
            return image.mode in GREY
    except Exception:  # is counted, with all its like, when it is decoded
        return True


def _fitted_images(
    read: Read, names: Sequence[str], channels: int, size: int, progress: Progress
) -> Iterator[Bytes]:
    bad = []
    for i, name in enumerate(names):
        try:
            image = _fitted(read(name), channels, size)
        except Exception as error:  # Pillow's readers and zipfile raise many kinds
            unknown = isinstance(error, UnidentifiedImageError)
            bad.append(f"{name}: {'not an image' if unknown else error}")
            continue
        yield image
        if i % 500 == 499 or i + 1 == len(names):
            progress(i + 1, len(names), "images decoded")
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(names)} images cannot be read ({_some(sorted(bad))}): "
            "repair them or take them out"
        )


def _fitted(content: bytes, channels: int, size: int) -> Bytes:
    """Decode one image, upright, cut out its middle square and resize it: uint8 (C, size, size)."""
    with Image.open(io.BytesIO(content)) as source:
        if source.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {source.mode}; only 8 bits per channel are read")
        image = ImageOps.exif_transpose(source).convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
