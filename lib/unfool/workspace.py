"""The learner's copy under work/: brought up to date without ever touching what was changed there.

A file counts as changed when it is not what was handed out; the checksums of that are remembered in
`work/.handed-out.json`. Folders keep their names, so that links between notebooks go on working.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from unfool.files import write_bytes, write_text

FOLDERS = ("notebooks", "exercises")
RECORD = ".handed-out.json"

Handed = dict[str, str]  # name relative to work/ → sha256 of what was handed out under it


def sync(source: Path, work: Path) -> list[str]:
    """Bring the copies of notebooks/ and exercises/ in `work` up to date.

    A file that the learner has not changed is replaced; one that was changed stays, and a newer
    version is put beside it as `NAME.new.ipynb`. What is deleted in `work` is handed out afresh.

    Returns:
        What happened, a line for each file that is new, updated or kept, then a summary.
    """
    handed = _read_record(work / RECORD)
    lines, kept = [], 0
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        line, is_kept = _hand_out(path.read_bytes(), name, work, handed)
        lines += [line] if line else []
        kept += is_kept
    text = json.dumps(handed, indent=1, sort_keys=True) + "\n"
    write_text(work / RECORD, text)
    total = f"{len(lines)} change{'s' if len(lines) > 1 else ''}" if lines else "up to date"
    yours = f"; kept as you changed them: {kept}" if kept else ""
    return [*lines, f"{work}: {total}{yours}"]


def _hand_out(new: bytes, name: str, work: Path, handed: Handed) -> tuple[str, bool]:
    """Bring one file up to date; returns a line, or '', and whether the learner's was kept."""
    before, latest, have = handed.get(name), _sha256(new), _sha256_of(work / name)
    if have == latest:
        handed[name] = latest
        return "", False
    if have is None or have == before:
        write_bytes(work / name, new)
        handed[name] = latest
        return f"{'new     ' if have is None else 'updated '} {name}", False
    if latest == before:
        return "", True
    beside = _put_beside(new, name, work, handed)
    handed[name] = latest
    return f"kept     {name}, which you changed; the new version is {beside}", True


def _put_beside(new: bytes, name: str, work: Path, handed: Handed) -> str:
    """Write the new version next to the changed file, but not over one that was worked in."""
    path, number = Path(name), 1
    beside = path.with_name(f"{path.stem}.new{path.suffix}")
    while _sha256_of(work / beside) not in (None, handed.get(beside.as_posix()), _sha256(new)):
        number += 1
        beside = path.with_name(f"{path.stem}.new{number}{path.suffix}")
    write_bytes(work / beside, new)
    handed[beside.as_posix()] = _sha256(new)
    return beside.name


def _files(source: Path) -> Iterator[Path]:
    """Every file that is handed out; hidden ones, Python's caches and READMEs are not."""
    for folder in FOLDERS:
        for path in sorted((source / folder).rglob("*")):
            parts = path.relative_to(source).parts
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.is_file() and not hidden and path.name != "README.md":
                yield path


def _read_record(path: Path) -> Handed:
    """Return what was handed out; nothing when the record is lost, and then no file is replaced."""
    try:
        handed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in handed.items()} if isinstance(handed, dict) else {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(path: Path) -> str | None:
    return _sha256(path.read_bytes()) if path.is_file() else None
