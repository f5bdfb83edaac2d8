"""Let the disk be full at each page and at each file that an action of `fault_actions` writes.

    python tests/full_everywhere.py DISK ACTION...

DISK is where a tmpfs is mounted: its size is changed. Room grows page by page, and then file by
file, from none until the action ends well. Each time it has to say that the disk is full, to leave
nothing half-written, and with room to end as if unbroken. Prints as JSON, for each action, how
often the disk was full, and a line for each fault.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch

from fault_actions import ACTIONS, problems
from unfool.evaluation import read_sound_records

TOLD = "is full; free some, "
PLENTY = 16_000  # pages, and files


def sized(disk: Path, pages: int, files: int) -> None:
    size = f"remount,size={pages * os.statvfs(disk).f_bsize},nr_inodes={files}"
    subprocess.run(["mount", "-o", size, str(disk)], check=True)


def taken(disk: Path) -> tuple[int, int]:
    """Pages and files."""
    now = os.statvfs(disk)
    return now.f_blocks - now.f_bfree, now.f_files - now.f_ffree


def run(name: str, root: Path) -> str:
    """Do the action in a child; return what it said as it failed, "" if it did not."""
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            ACTIONS[name](root)
        except BaseException as error:
            os.write(mouth, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(mouth)
    with os.fdopen(ear) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return said


def half_lines(root: Path) -> list[str]:
    files = [p for p in root.rglob("*.jsonl") if not p.name.startswith(".")]
    return [line for path in files for line in read_sound_records(path)[1]]


def full_everywhere(name: str, disk: Path) -> tuple[int, list[str]]:
    root = disk / "root"
    shutil.rmtree(root, ignore_errors=True)
    sized(disk, PLENTY, PLENTY)
    (disk / "first").write_text("a size of 0 pages would be no limit")
    root.mkdir()
    assert run(name, root) == "", "it does not even end unbroken"
    whole, found, times = problems(name, root, None), [], 0
    for what in ("pages", "files"):
        for room in count():
            shutil.rmtree(root)
            root.mkdir()
            pages, files = taken(disk)
            full = (pages + room, PLENTY) if what == "pages" else (PLENTY, files + room)
            sized(disk, *full)
            said = run(name, root)
            left = [*problems(name, root, "half"), *half_lines(root)]
            sized(disk, PLENTY, PLENTY)
            if not said:
                break
            times += 1
            point = f"with room for {room} {what}"
            print(f"{name} {point}: {said}", file=sys.stderr)
            found += [] if TOLD in said and str(disk) in said else [f"{point}: said {said}"]
            found += [f"{point}: {one}" for one in left]
            again = run(name, root)
            found += [f"taken up, {point}: {again}"] if again else []
            found += [f"taken up, {point}: {one}" for one in problems(name, root, whole)]
    return times, found


if __name__ == "__main__":
    print(json.dumps({name: full_everywhere(name, Path(sys.argv[1])) for name in sys.argv[2:]}))
