"""Files that appear whole or not at all. Nothing here imports torch: notebooks are written, too."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # ends the temporary name of a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there takes the place of `path`.

    A kill, a full disk or an error leaves the file that was there before, and no other.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    temporary.touch(exist_ok=False)
    rights = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(rights)  # safetensors puts a private file of its own in this place
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a loss of power could leave the new name empty
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and the folders above it where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8 with the line ends that it is given; see `write_bytes`."""
    write_bytes(path, text.encode())
