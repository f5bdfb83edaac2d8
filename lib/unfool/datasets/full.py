"""MNIST and CIFAR-10 whole: found in `$UNFOOL_DATA` or `data/`, else downloaded into the store."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unfool.artifacts import REPO, Store
from unfool.datasets.base import Bytes, Dataset, Split, read_decoded, write_decoded
from unfool.datasets.digits import DIGITS
from unfool.progress import Progress, silent

# Name of each idx file: (size in bytes, sha256) of what it holds when unpacked.
MNIST_FILES = {
    "train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
MNIST_FINGERPRINT = "eaadd17b040558a001b8347b9140d2b92345409412d64907c5c632a48b8131a5"
MNIST_VALIDATION = 5_000  # the last of the 60,000 training images

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # stated on the data set's page
CIFAR10_BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR10_COUNTS = (45_000, 5_000, 10_000)  # validation is the last 5,000 training images
CIFAR10_VERSION = 1  # raise it when the images decoded from the same files change
ROWS = 10_000  # images in a batch file
ROW = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes

TIMEOUT = 30  # seconds without an answer before a download is given up


def roots() -> list[Path]:
    """Return the folders where full data sets are looked for: `$UNFOOL_DATA`, then `data/`.

    Raises:
        FileNotFoundError: `$UNFOOL_DATA` is set to something that is not a folder.
    """
    given = os.environ.get("UNFOOL_DATA")
    if given and not Path(given).is_dir():
        raise FileNotFoundError(
            f"UNFOOL_DATA is {given!r}, which is not a folder; set it to the folder that holds "
            "MNIST/raw or cifar-10-batches-bin, or unset it"
        )
    return [*([Path(given)] if given else []), REPO / "data"]


# MNIST


def mnist(store: Store, progress: Progress | None) -> Dataset:
    """Return MNIST: 55,000 digits to train, 5,000 to validate, 10,000 to test; (1, 28, 28).

    Plain idx files are memory-mapped where they lie; gzipped ones are read into memory.

    Raises:
        FileNotFoundError: a file is missing, or none is there and there is no network.
        ValueError: a file is cut short, altered or no idx file.
    """
    folder = _mnist_folder() or _mnist_download(store, progress or silent)
    train_x, train_y, test_x, test_y = (_read_idx(folder, name) for name in MNIST_FILES)
    cut = len(train_x) - MNIST_VALIDATION
    return Dataset(
        "mnist",
        DIGITS,
        (1, 28, 28),
        _split(train_x[:cut], train_y[:cut]),
        _split(train_x[cut:], train_y[cut:]),
        _split(test_x, test_y),
        MNIST_FINGERPRINT,  # need not be computed: each file's own checksum was right
        "MNIST",
    )


def _split(images: Bytes, labels: Bytes) -> Split:
    return Split(images[:, None], labels.astype(np.int64))


def _mnist_folder() -> Path | None:
    """Return the first folder that holds idx files; it must then hold all four."""
    for root in roots():
        for folder in (root / "MNIST" / "raw", root):
            there = [name for name in MNIST_FILES if _plain_or_gz(folder, name)]
            if len(there) == len(MNIST_FILES):
                return folder
            if there:
                missing = [name for name in MNIST_FILES if name not in there]
                raise FileNotFoundError(
                    f"{folder} lacks {' and '.join(missing)} (plain or .gz): put it beside "
                    f"{there[0]}, or move those away to have all four downloaded"
                )
    return None


def _plain_or_gz(folder: Path, name: str) -> Path | None:
    found = (path for path in (folder / name, folder / f"{name}.gz") if path.is_file())
    return next(found, None)


def _read_idx(folder: Path, name: str) -> Bytes:
    """Return the array of an idx file, mapped if it is plain: uint8 (N, H, W) or (N,)."""
    path = _plain_or_gz(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder / name} has just disappeared")
    size, sha256 = MNIST_FILES[name]
    remedy = f"fetch it again, or delete all four files in {folder} to have them downloaded"
    content = _unpacked(path, remedy)
    if len(content) != size:
        fault = "is cut short: it has" if len(content) < size else "is too long: it has"
        raise ValueError(f"{path} {fault} {len(content)} bytes, it needs {size}; {remedy}")
    head = bytes(content[:4])
    images = "images" in name
    if head != bytes([0, 0, 8, 3 if images else 1]):
        raise ValueError(f"{path} is no idx file of {name}: it begins with {head.hex()}; {remedy}")
    if hashlib.sha256(content.data).hexdigest() != sha256:
        raise ValueError(f"{path} was altered: it has the right size, but not MNIST's; {remedy}")
    return content[16:].reshape(-1, 28, 28) if images else content[8:]


def _unpacked(path: Path, remedy: str) -> Bytes:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is cut short: it is empty; {remedy}")
    if path.suffix != ".gz":
        return np.memmap(path, np.uint8, mode="r")
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); {remedy}") from error


def _mnist_download(store: Store, progress: Progress) -> Path:
    """Return the folder with MNIST's four files, downloaded with torchvision's list of them."""

    def build(folder: Path) -> None:
        from torchvision.datasets import MNIST

        for name, md5 in MNIST.resources:
            urls = [mirror + name for mirror in MNIST.mirrors]
            _download(urls, folder / name, md5, _mnist_remedy(), progress)
            plain = folder / name.removesuffix(".gz")
            plain.write_bytes(gzip.decompress((folder / name).read_bytes()))
            (folder / name).unlink()

    config = {"name": "mnist", "sha256": [sha256 for _, sha256 in MNIST_FILES.values()]}
    return store.get("download", config, build, needs_bytes=70_000_000, progress=progress)


def _mnist_remedy() -> str:
    names = ", ".join(MNIST_FILES)
    places = " or ".join(str(root / "MNIST" / "raw") for root in roots())
    return (
        f"put these four files, plain or .gz, into {places}: {names}. "
        "(dataset='mnist5k' needs no download.)"
    )


# CIFAR-10


def cifar10(store: Store, progress: Progress | None) -> Dataset:
    """Return CIFAR-10: 45,000 images to train, 5,000 to validate, 10,000 to test; (3, 32, 32).

    Only the binary version is read, from `cifar-10-batches-bin/` or `cifar-10-binary.tar.gz`:
    the other version is pickles, which run code when they are opened.

    Raises:
        FileNotFoundError: it is not there and there is no network.
        ValueError: a file is cut short or altered.
    """
    folder = next((f for r in roots() if (f := r / "cifar-10-batches-bin").is_dir()), None)
    config: dict[str, Any] = {"name": "cifar10", "version": CIFAR10_VERSION}
    config["source"] = _batches_listing(folder) if folder else CIFAR10_MD5

    def build(out: Path) -> None:
        if folder:
            files = (_read_rows((folder / name).open("rb"), name) for name in CIFAR10_BATCHES)
            _decode_cifar10(files, out)
        else:
            _decode_cifar10(_batches_in(_cifar10_archive(out, progress or silent)), out)

    path = store.get("dataset", config, build, needs_bytes=360_000_000, progress=progress)
    splits, fingerprint = read_decoded(path)
    return Dataset("cifar10", CIFAR10_CLASSES, (3, 32, 32), *splits, fingerprint, "CIFAR-10")


def _cifar10_archive(out: Path, progress: Progress) -> Path:
    """Return the whole archive: the one at hand, else one downloaded into `out`."""
    found = next((p for r in roots() if (p := r / "cifar-10-binary.tar.gz").is_file()), None)
    if found is None:
        archive = out / "checkpoint.tar.gz"  # a scratch name: the store removes it
        _download([CIFAR10_URL], archive, CIFAR10_MD5, _cifar10_remedy(), progress)
        return archive
    if _md5(found) != CIFAR10_MD5:
        raise ValueError(
            f"{found} ({found.stat().st_size} bytes) is cut short or altered: its md5 is not "
            f"{CIFAR10_MD5}; fetch it again, or delete it to have it downloaded"
        )
    return found


def _batches_listing(folder: Path) -> list[list[Any]]:
    """Return name, size and time of each batch file; all six must be whole."""
    listing: list[list[Any]] = []
    for name in CIFAR10_BATCHES:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {_cifar10_remedy()}")
        stat = path.stat()
        if stat.st_size != ROWS * ROW:
            fault = "cut short" if stat.st_size < ROWS * ROW else "too long"
            raise ValueError(
                f"{path} is {fault}: it has {stat.st_size} bytes, it needs {ROWS * ROW}; "
                f"unpack cifar-10-binary.tar.gz (md5 {CIFAR10_MD5}) again"
            )
        listing.append([name, stat.st_size, stat.st_mtime_ns])
    return listing


def _batches_in(archive: Path) -> Iterator[Bytes]:
    """Read the six batch files out of the archive's bytes; nothing is extracted."""
    with tarfile.open(archive, "r:gz") as tar:
        members = {Path(member.name).name: member for member in tar if member.isfile()}
        for name in CIFAR10_BATCHES:
            file = tar.extractfile(members[name]) if name in members else None
            if file is None:
                raise ValueError(f"{archive} does not hold {name}: it is another archive")
            yield _read_rows(file, name)


def _read_rows(file: BinaryIO | Any, name: str) -> Bytes:
    with file:
        rows = np.frombuffer(file.read(), np.uint8).reshape(ROWS, ROW)
    counts = np.bincount(rows[:, 0], minlength=10)
    if len(counts) > 10 or (name == "test_batch.bin" and np.any(counts != ROWS // 10)):
        raise ValueError(
            f"{name} was altered: its labels are not CIFAR-10's (images of each class: "
            f"{counts.tolist()}); unpack cifar-10-binary.tar.gz (md5 {CIFAR10_MD5}) again"
        )
    return rows


def _decode_cifar10(batches: Iterator[Bytes], out: Path) -> None:
    labels = np.empty((len(CIFAR10_BATCHES), ROWS), np.uint8)

    def images() -> Iterator[Bytes]:
        for i, rows in enumerate(batches):
            labels[i] = rows[:, 0]
            yield rows[:, 1:].reshape(ROWS, 3, 32, 32)

    write_decoded(out, images(), (labels.size, 3, 32, 32), labels.reshape(-1), CIFAR10_COUNTS)


def _cifar10_remedy() -> str:
    """Say which file to put where, and what to do with other versions that lie there."""
    places = [str(root) for root in roots()]
    text = (
        f"fetch cifar-10-binary.tar.gz from {CIFAR10_URL} (md5 {CIFAR10_MD5}) and put it, as it is "
        f"or unpacked as cifar-10-batches-bin/, into {' or '.join(places)}"
    )
    for root in roots():
        for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz"):
            if (root / name).exists():
                text += (
                    f". {root / name} is the Python version: pickles, which can run code when they "
                    "are opened, and are never read here; the binary version has the same images"
                )
        if (root / "cifar10-jpeg.zip").is_file():
            text += (
                f". For the JPEG copy that lies there, use dataset='folder:{root}/cifar10-jpeg.zip'"
            )
    return text


# Downloads


def _download(urls: Sequence[str], path: Path, md5: str, remedy: str, progress: Progress) -> None:
    """Write what the first address that answers sends, if it is whole, to `path`.

    Raises:
        FileNotFoundError: no address sent the right file; the message says which file to put where.
    """
    reasons = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                _copy(answer, path, progress)
            if _md5(path) == md5:
                return
            reasons.append(f"{url}: {path.stat().st_size} bytes came, not those with md5 {md5}")
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            TimeoutError,
            ConnectionError,
        ) as error:
            reasons.append(f"{url}: {error}")
        path.unlink(missing_ok=True)
    name = urls[0].rsplit("/", 1)[1]
    raise FileNotFoundError(f"{name} could not be downloaded ({'; '.join(reasons)}): {remedy}")


def _copy(answer: Any, path: Path, progress: Progress) -> None:
    total = int(answer.headers.get("Content-Length") or 0)
    done = 0
    with path.open("wb") as file:
        while block := answer.read(1 << 20):
            file.write(block)
            done += len(block)
            progress(done, total, "bytes downloaded")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
