"""A full disk is told by the folder that lies on it, with what to do; and lines are appended whole.

Nothing here imports torch: every process of a batch comes by.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

FULL = (errno.ENOSPC, errno.EDQUOT)  # of the disk, or of this user's share of it
PROBE_BYTES = 100_000  # about what a job's log, page and records take


class DiskFullError(OSError):
    """No room is left; the message names the folder and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def told_if_full(folder: Path, remedy: str) -> Iterator[None]:
    """Say which folder lies on a full disk, and what to do, where the system only says a number.

    Args:
        folder: where the block writes.
        remedy: follows "the disk under FOLDER is full; free some, ".

    Raises:
        DiskFullError: in place of the system's error.
    """
    try:
        yield
    except DiskFullError:  # told already, perhaps of another folder
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full(folder, remedy) from error


def full(folder: Path, remedy: str) -> DiskFullError:
    """Return the error that says so; see `told_if_full`."""
    return DiskFullError(f"the disk under {folder} is full; free some, {remedy}")


def is_full(folder: Path) -> bool:
    """Whether a folder takes no 100 kB any more; tried, as free bytes do not tell of a quota."""
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in FULL
    return False


def append(path: Path, lines: str) -> None:
    """Append whole lines to a file, all of them or, where the disk is full, none.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    text = lines.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if not _ends_whole(path):  # a killed writer may have left half a line
            text = b"\n" + text
        if file.write(text) < len(text):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
