"""The store: made once, found again, never read half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from unfool import artifacts
from unfool.artifacts import (
    Store,
    artifact_key,
    default_root,
    load_checkpoint,
    load_tensors,
    load_weights,
    save_tensors,
)
from unfool.files import write_text

CONFIG: Mapping[str, Any] = {"name": "a thing", "seed": 3, "settings": {"eps": 0.15}}
CONTENT = bytes(range(256)) * 4


class Builder:
    """Writes one file, and counts how often it was asked to."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "data.bin").write_bytes(self.content)


def sealed(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.glob("thing/*/*"))


# --- sealing --------------------------------------------------------------------------------------


def test_an_artifact_is_built_once_and_sealed(store: Store) -> None:
    build = Builder()
    folder = store.get("thing", CONFIG, build)
    assert folder == store.root / "thing" / artifact_key(CONFIG)
    assert store.get("thing", CONFIG, build) == folder
    assert Store(store.root).get("thing", CONFIG, build) == folder
    assert build.calls == 1
    assert store.manifest(folder) == {
        "kind": "thing",
        "config": CONFIG,
        "files": {"data.bin": {"size": 1024, "sha256": hashlib.sha256(CONTENT).hexdigest()}},
    }


def test_nothing_stands_in_place_while_it_is_built(store: Store) -> None:
    seen: list[list[str]] = []

    def build(folder: Path) -> None:
        (folder / "data.bin").write_bytes(CONTENT)
        seen.append(sealed(store.root))

    folder = store.get("thing", CONFIG, build)
    assert seen == [[]]
    assert sorted(p.name for p in folder.iterdir()) == ["data.bin", "manifest.json"]
    assert list((store.root / "building").iterdir()) == []


def test_a_builder_that_fails_seals_nothing_and_can_go_on(store: Store) -> None:
    def fails(folder: Path) -> None:
        (folder / "checkpoint.bin").write_bytes(b"half")
        raise RuntimeError("broken off")

    def resumes(folder: Path) -> None:
        assert (folder / "checkpoint.bin").read_bytes() == b"half"
        (folder / "data.bin").write_bytes(CONTENT)

    with pytest.raises(RuntimeError, match="broken off"):
        store.get("thing", CONFIG, fails)
    assert sealed(store.root) == []
    folder = store.get("thing", CONFIG, resumes)
    assert sorted(p.name for p in folder.iterdir()) == ["data.bin", "manifest.json"]


def test_what_a_kill_left_behind_is_not_sealed(store: Store) -> None:
    # Killed inside save_tensors: a part; killed between the manifest and the rename: a manifest.
    workshop = store.root / "building" / f"thing.{artifact_key(CONFIG)}"
    workshop.mkdir(parents=True)
    (workshop / ".checkpoint.bin.x1.part").write_bytes(b"half")
    (workshop / ".tmp8jsCuG").write_bytes(b"half")  # of safetensors, killed in its own write
    (workshop / "manifest.json").write_text("{}")
    folder = store.get("thing", CONFIG, Builder())
    assert sorted(p.name for p in folder.iterdir()) == ["data.bin", "manifest.json"]
    assert list(store.manifest(folder)["files"]) == ["data.bin"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store(store.root).get("thing", CONFIG, Builder())


def test_the_key_says_what_it_is_and_depends_on_everything() -> None:
    assert artifact_key(CONFIG).startswith("a-thing-")
    same = {"settings": {"eps": 0.15}, "seed": 3, "name": "a thing"}
    assert artifact_key(same) == artifact_key(CONFIG)
    others = [{**CONFIG, "seed": 4}, {**CONFIG, "settings": {"eps": 0.2}}, {**CONFIG, "new": None}]
    assert len({artifact_key(c) for c in [CONFIG, *others]}) == 4
    assert len(artifact_key({"seed": 1})) == 16


@pytest.mark.skipif(os.name == "nt", reason="rights of Unix")
def test_what_is_stored_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(1)}, {})
        write_text(tmp_path / "manifest.json", "{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_the_root_is_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(Store().root) == os.environ["UNFOOL_STORE"]
    monkeypatch.setenv("UNFOOL_STORE", "~/store")
    assert Store(shared=Path("~/shared")).shared == Path.home() / "shared"
    assert default_root() == Path.home() / "store"
    monkeypatch.delenv("UNFOOL_STORE")
    assert default_root() == artifacts.REPO / "data" / "store"


# --- damage ---------------------------------------------------------------------------------------


def alter(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def no_size(path: Path) -> None:
    path.write_text(path.read_text().replace('"size"', '"sizf"'))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(f / "data.bin", 1000), "data.bin has 1000 bytes, not 1024"),
    "altered": (lambda f: alter(f / "data.bin", 500), "data.bin has another checksum"),
    "file gone": (lambda f: (f / "data.bin").unlink(), "data.bin is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda f: os.truncate(f / "manifest.json", 20), "unreadable"),
    "empty": (lambda f: os.truncate(f / "manifest.json", 0), "unreadable"),
    "other JSON": (lambda f: (f / "manifest.json").write_text("[1]"), "unreadable"),
    "no size": (lambda f: no_size(f / "manifest.json"), "unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact_is_named_set_aside_and_rebuilt(store: Store, damage: str) -> None:
    break_it, fault = DAMAGE[damage]
    build = Builder()
    folder = store.get("thing", CONFIG, build)
    break_it(folder)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert Store(store.root).get("thing", CONFIG, build) == folder
    assert str(folder) in str(caught[0].message)
    assert fault in str(caught[0].message)
    assert build.calls == 2
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert len(list((store.root / "damaged").iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whole again
        Store(store.root).get("thing", CONFIG, build)
    assert build.calls == 2


# --- processes ------------------------------------------------------------------------------------

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(Path(artifacts.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
}
START = """
import sys, time
from pathlib import Path
from unfool.artifacts import Store

root = Path(sys.argv[1])
"""
BUILD_UNTIL_WAITED_FOR = (
    START
    + """
def build(folder):
    with (root.parent / "builds").open("a") as file:
        file.write("built\\n")
    (folder / "data.bin").write_bytes(b"begun")
    deadline = time.monotonic() + 60
    while not (root.parent / "waited").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder / "data.bin").write_bytes(bytes(range(256)))

def progress(done, total, note):
    (root.parent / "waited").write_text(note)

folder = Store(root).get("thing", {"name": "shared"}, build, progress=progress)
print(folder, (folder / "data.bin").read_bytes().hex())
"""
)
BUILD_FOR_EVER = (
    START
    + """
def build(folder):
    (folder / "checkpoint.bin").write_bytes(b"half")
    (folder / "data.bin").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(600)

Store(root).get("thing", {"name": "killed"}, build)
"""
)


def start(script: str, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    both = [start(BUILD_UNTIL_WAITED_FOR, tmp_path / "store") for _ in range(2)]
    said = [process.communicate(timeout=90)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert bytes(range(256)).hex() in said[0]
    assert (tmp_path / "builds").read_text() == "built\n"
    assert "another process is making this" in (tmp_path / "waited").read_text()


def test_kill_9_in_a_build_seals_nothing_and_the_next_call_resumes(store: Store) -> None:
    process = start(BUILD_FOR_EVER, store.root)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate(timeout=30)
    assert sealed(store.root) == []
    found: list[bytes] = []

    def build(folder: Path) -> None:
        found.append((folder / "checkpoint.bin").read_bytes())
        (folder / "data.bin").write_bytes(CONTENT)

    folder = store.get("thing", {"name": "killed"}, build)  # the dead hold no lock
    assert found == [b"half"]
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert sorted(p.name for p in folder.iterdir()) == ["data.bin", "manifest.json"]


# --- places that cannot be written ----------------------------------------------------------------


def test_a_store_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a file is no folder")
    build = Builder()
    for root in (file, file / "store"):
        with pytest.raises(PermissionError, match="set UNFOOL_STORE") as caught:
            Store(root).get("thing", CONFIG, build)
        assert str(root) in str(caught.value)
    assert build.calls == 0


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_store_is_named_with_a_remedy(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="set UNFOOL_STORE"):
            Store(root).get("thing", CONFIG, Builder())
    finally:
        root.chmod(0o700)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_disk_is_told_before_building(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Builder()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**8, 10**8))
    with pytest.raises(OSError, match=r"500 MB are needed and 100 MB are free.*UNFOOL_STORE") as e:
        store.get("thing", CONFIG, build, needs_bytes=500_000_000)
    assert e.value.errno == errno.ENOSPC
    assert build.calls == 0
    store.get("thing", CONFIG, build, needs_bytes=10_000_000)
    assert build.calls == 1


def test_a_disk_that_fills_up_is_explained_and_what_was_begun_is_kept(store: Store) -> None:
    def fills(folder: Path) -> None:
        (folder / "checkpoint.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"is full; free some, or set UNFOOL_STORE") as caught:
        store.get("thing", CONFIG, fills)
    assert caught.value.errno == errno.ENOSPC
    assert sealed(store.root) == []
    assert len(list(store.root.glob("building/*/checkpoint.bin"))) == 1


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "put it there"), PermissionError(errno.EACCES, "not yours")],
)
def test_a_builders_own_error_is_passed_on_unchanged(store: Store, error: OSError) -> None:
    def build(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        store.get("thing", CONFIG, build)
    assert caught.value is error


# --- a shared store -------------------------------------------------------------------------------


def everything(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_shared_store_is_used_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    shared, root, build = tmp_path / "shared", tmp_path / "mine", Builder()
    made = Store(shared).get("thing", CONFIG, build)
    before = everything(shared)
    if by_environment:
        monkeypatch.setenv("UNFOOL_SHARED_STORE", str(shared))
    store = Store(root) if by_environment else Store(root, shared)
    assert store.get("thing", CONFIG, build) == made
    assert not root.exists()
    assert store.get("thing", {"name": "other"}, build).is_relative_to(root)
    assert build.calls == 2
    assert everything(shared) == before


def test_a_damaged_shared_artifact_is_not_used(tmp_path: Path) -> None:
    shared, root = tmp_path / "shared", tmp_path / "mine"
    made = Store(shared).get("thing", CONFIG, Builder())
    alter(made / "data.bin", 7)
    before = everything(shared)
    with pytest.warns(UserWarning, match="is damaged"):
        folder = Store(root, shared).get("thing", CONFIG, Builder())
    assert folder.is_relative_to(root)
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert everything(shared) == before  # it is not ours to mend


# --- files ----------------------------------------------------------------------------------------


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.randn(3, 4).T, "n": torch.tensor(7), "b": torch.tensor([True, False])}
    save_tensors(path, tensors, {"history": [{"loss": 0.5}]})
    got, metadata = load_tensors(path)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())
    assert metadata == {"history": [{"loss": 0.5}]}
    layer = torch.nn.Linear(2, 3)
    save_tensors(path, layer.state_dict(), {"of": "layer"})
    other = torch.nn.Linear(2, 3)
    assert load_weights(other, path) == {"of": "layer"}
    assert torch.equal(other.weight, layer.weight)


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(2), "payload": Payload(mark)}, path)
    with pytest.raises(ValueError, match=r"(?s)weights\.pt.*never from pickles.*convert"):
        load_tensors(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload was live


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.zeros(100)}, {})
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_tensors(path)


@pytest.mark.parametrize("fault", ["full", "rename"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path, text = tmp_path / "a.safetensors", tmp_path / "a.json"
    save_tensors(path, {"w": torch.ones(3)}, {})
    write_text(text, "old")

    def full(tensors: object, temporary: Path, **_: object) -> None:
        temporary.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    if fault == "full":
        monkeypatch.setattr(artifacts, "save_file", full)
    else:
        monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(OSError, match=r"could not be written|denied") as caught:
        save_tensors(path, {"w": torch.zeros(3)}, {})
    assert caught.value.errno == (errno.ENOSPC if fault == "full" else errno.EACCES)
    if fault == "rename":
        with pytest.raises(OSError, match="denied"):
            write_text(text, "new")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    assert torch.equal(load_tensors(path)[0]["w"], torch.ones(3))
    assert text.read_text() == "old"


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", json.dumps({"ε": "×"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {"ε": "×"}


def test_a_lock_file_without_an_owner_keeps_nobody_waiting(store: Store) -> None:
    (store.root / "locks").mkdir(parents=True)
    (store.root / "locks" / f"thing.{artifact_key(CONFIG)}.lock").touch()
    start_time = time.monotonic()
    store.get("thing", CONFIG, Builder())
    assert time.monotonic() - start_time < 5


@pytest.mark.parametrize(
    ("said", "number"),
    [("I/O error: No space left on device (os error 28)", errno.ENOSPC),
     ("I/O error: Input/output error (os error 5)", errno.EIO)],
)  # fmt: skip
def test_only_a_full_disk_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, number: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise SafetensorError(said)

    monkeypatch.setattr(artifacts, "save_file", fails)
    with pytest.raises(OSError, match="could not be written") as caught:
        save_tensors(tmp_path / "a.safetensors", {}, {})
    assert caught.value.errno == number


def test_a_damaged_checkpoint_is_set_aside_and_does_not_reach_the_artifact(store: Store) -> None:
    def build(folder: Path) -> None:
        file = folder / "checkpoint.safetensors"
        assert load_checkpoint(file) is None
        save_tensors(file, {"w": torch.ones(3)}, {"epoch": 1})
        kept = load_checkpoint(file)  # the control
        assert kept is not None
        assert kept[1] == {"epoch": 1}
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.warns(UserWarning, match=r"checkpoint .* is damaged .*set aside as checkpoint"):
            assert load_checkpoint(file) is None
        assert [path.name[:30] for path in folder.iterdir()] == ["checkpoint.safetensors.damaged"]
        save_tensors(folder / "weights.safetensors", {}, {})

    folder = store.get("thing", {"name": "x"}, build)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "weights.safetensors"]
