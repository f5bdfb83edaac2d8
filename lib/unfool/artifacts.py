"""The store: what was expensive to make is made once, found again, and never read half-written.

An artifact is a folder of files sealed by a `manifest.json` that holds the configuration it was
made from and the size and sha256 of each file. The store does not know what an artifact means.

    root/<kind>/<key>/…              sealed artifacts
    root/building/<kind>.<key>/…     under construction; survives a kill: a builder can resume
    root/damaged/…                   set aside, never read again
    root/locks/…                     one lock per artifact: the second builder waits
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unfool.disk import FULL, DiskFullError, full, told_if_full
from unfool.files import PART, replacing, write_text
from unfool.progress import Progress, silent

REPO = Path(__file__).resolve().parents[2]
SCRATCH = "checkpoint"  # files of a builder whose name starts so are its own and are not sealed
PRIVATE = ".tmp*"  # what safetensors writes into first, before it takes the name that it was given
ELSEWHERE = "or set UNFOOL_STORE to a folder on another disk (what was begun is taken up again)"
SPARE_BYTES = 50_000_000  # left free beside what a builder says that it needs


def default_root() -> Path:
    """Folder of the store: `$UNFOOL_STORE`, else `data/store` of the checkout."""
    return Path(os.environ.get("UNFOOL_STORE") or REPO / "data" / "store").expanduser()


class Store:
    """Artifacts under `root`; a read-only `shared` store may lie under it.

    Args:
        root: folder, made on first use; by default `$UNFOOL_STORE`, else `data/store`.
        shared: folder of a store that is only read; by default `$UNFOOL_SHARED_STORE`, else none.
    """

    def __init__(self, root: Path | None = None, shared: Path | None = None) -> None:
        self.root = Path(root) if root else default_root()
        given = shared or os.environ.get("UNFOOL_SHARED_STORE")
        self.shared = Path(given).expanduser() if given else None
        self._verified: set[Path] = set()

    def get(
        self,
        kind: str,
        config: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        needs_bytes: int = 0,
        progress: Progress | None = None,
    ) -> Path:
        """Return the folder of the artifact, building it first where it is not there yet.

        Args:
            kind: what it is ("classifier", "dataset", …): a folder name.
            config: all that the content depends on, as JSON values. Equal configs, one artifact.
            build: writes the files into the folder it is given. It may find there what an
                interrupted run of itself left; files named `checkpoint*` are removed at the end.
            needs_bytes: how much `build` will write at most; checked against the free disk first.
            progress: told when another process is waited for.

        Raises:
            PermissionError: the store cannot be written; the message names the folder and a remedy.
            OSError: the disk has too little room, before or during the build.
        """
        key = artifact_key(config)
        if self.shared and self._sealed(self.shared / kind / key):
            return self.shared / kind / key
        folder = self.root / kind / key
        if self._sealed(folder):
            return folder
        self._make(self.root / "locks")
        with _locked(self.root / "locks" / f"{kind}.{key}.lock", progress or silent):
            if not self._sealed(folder):  # the process waited for may have built it
                self._set_aside(folder)
                self._check_room(needs_bytes)
                self._build(kind, key, config, build)
        return folder

    def manifest(self, folder: Path) -> dict[str, Any]:
        """Return what the artifact was made from and consists of."""
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
        return manifest

    def _build(
        self, kind: str, key: str, config: Mapping[str, Any], build: Callable[[Path], None]
    ) -> None:
        workshop = self.root / "building" / f"{kind}.{key}"
        self._make(workshop)
        # A kill in the middle of a write, or between the seal and the rename, leaves these.
        for left in (f".*{PART}", PRIVATE, "manifest.json"):
            for path in workshop.glob(left):
                path.unlink()
        with told_if_full(self.root, ELSEWHERE):
            build(workshop)
            for path in workshop.glob(f"{SCRATCH}*"):
                path.unlink()
            files = {p.name: _describe(p) for p in sorted(workshop.iterdir())}
            seal = {"kind": kind, "config": dict(config), "files": files}
            write_text(
                workshop / "manifest.json", json.dumps(seal, indent=1, sort_keys=True) + "\n"
            )
            (self.root / kind).mkdir(parents=True, exist_ok=True)
            workshop.rename(self.root / kind / key)
        self._verified.add(self.root / kind / key)

    def _sealed(self, folder: Path) -> bool:
        """Whether the folder holds a whole artifact; each is checked once per process."""
        if folder in self._verified:
            return True
        if not folder.is_dir():
            return False
        fault = self._fault(folder)
        if fault:
            warnings.warn(
                f"the artifact {folder} is damaged ({fault}); it is made anew", stacklevel=3
            )
            return False
        self._verified.add(folder)
        return True

    def _fault(self, folder: Path) -> str:
        try:
            files = self.manifest(folder)["files"].items()
            expected = [(name, file["size"], file["sha256"]) for name, file in files]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "manifest.json is missing or unreadable"
        for name, size, sha256 in expected:
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if sha256_of(path) != sha256:
                return f"{name} has another checksum than when it was made"
        return ""

    def _set_aside(self, folder: Path) -> None:
        if folder.exists():
            self._make(self.root / "damaged")
            aside = f"{folder.parent.name}.{folder.name}.{time.time_ns()}"
            folder.rename(self.root / "damaged" / aside)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explained(error, self.root) from error
        if not os.access(folder, os.W_OK):
            raise _explained(PermissionError(errno.EACCES, "not writable"), self.root)

    def _check_room(self, needs_bytes: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needs_bytes and free < needs_bytes + SPARE_BYTES:
            raise DiskFullError(
                f"too little disk under {self.root}: {needs_bytes / 1e6:.0f} MB are needed and "
                f"{free / 1e6:.0f} MB are free; free some, or set UNFOOL_STORE to a folder "
                "on another disk"
            )


def artifact_key(config: Mapping[str, Any]) -> str:
    """Return the folder name of a configuration: its "name", readable, and a digest of it all."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    slug = re.sub(r"[^a-z0-9]+", "-", str(config.get("name", "")).lower()).strip("-")[:40]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{slug}-{digest}" if slug else digest


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata as one safetensors file, all of it or nothing."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(plain, temporary, metadata={"json": json.dumps(metadata)})
    except SafetensorError as error:  # its way of saying that, say, the disk is full
        full = re.search(r"No space left|os error (28|112|122)\b", str(error))
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, f"{path} could not be written: {error}") from error


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        ValueError: the file is not a whole safetensors file. No pickle is ever read.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get("json", "{}"))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); weights are read from safetensors "
            "only, never from pickles such as .pt or .pth: convert the file, or fetch it again"
        ) from error
    return tensors, metadata


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what an interrupted run left, or return None; a damaged file is set aside."""
    try:
        return load_tensors(path) if path.exists() else None
    except ValueError as error:
        # It begins as before, so that the store takes it for a builder's own and drops it at last.
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(aside)
        warnings.warn(
            f"the checkpoint {path} is damaged ({error.__cause__ or error}): it is set aside as "
            f"{aside.name}, and what it held is made anew",
            stacklevel=2,
        )
        return None


def load_weights(module: torch.nn.Module, path: Path) -> dict[str, Any]:
    """Load a safetensors file into `module`, in the module's own precision; return the metadata."""
    tensors, metadata = load_tensors(path)
    module.load_state_dict(tensors)
    return metadata


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


class _locked:
    """Hold a file lock; tell once, through `progress`, that another process is waited for."""

    def __init__(self, path: Path, progress: Progress) -> None:
        from filelock import FileLock  # here: not every machine that imports us builds artifacts

        self._lock, self._path, self._progress = FileLock(path), path, progress

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._progress(0, 0, "waiting: another process is making this")
            self._lock.acquire()
        except OSError as error:
            raise _explained(error, self._path.parent.parent) from error

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _explained(error: OSError, root: Path) -> OSError:
    """Return the error with what to do about it."""
    if error.errno in FULL:
        return full(root, ELSEWHERE)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return PermissionError(
            error.errno,
            f"the store {root} cannot be written ({error.strerror}); set UNFOOL_STORE to a folder "
            "of yours",
        )
    return error
