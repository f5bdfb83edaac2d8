"""A full disk: who is told what, and lines that are appended whole; `test_faults.py` fills one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_faults import environment, tmpfs
from unfool.disk import DiskFullError, append, is_full, told_if_full


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_spent_quota_are_told_with_the_folder(number: int) -> None:
    with pytest.raises(DiskFullError) as caught, told_if_full(Path("there"), "then go on"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == "the disk under there is full; free some, then go on"
    assert caught.value.errno == errno.ENOSPC


def test_other_errors_and_what_is_told_already_pass() -> None:
    for error in (
        PermissionError(errno.EACCES, "not yours"),
        DiskFullError("of another folder"),
        ValueError("no"),
    ):
        with pytest.raises(type(error)) as caught, told_if_full(Path("here"), "then go on"):
            raise error
        assert caught.value is error


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "8k") as disk:
        path = disk / "lines.txt"
        append(path, "a\n")
        with pytest.raises(OSError, match="No space left") as caught:
            append(path, "b" * 9000 + "\n")  # the first 8 kB would have found room
        assert caught.value.errno == errno.ENOSPC
        assert path.read_text() == "a\n"
        append(path, "b\n")
        assert path.read_text() == "a\nb\n"


def test_half_a_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("ha")
    append(path, "b\n")
    append(path, "c\n")
    assert path.read_text() == "ha\nb\nc\n"


def test_whether_a_disk_is_full(tmp_path: Path) -> None:
    assert not is_full(tmp_path)
    with tmpfs(tmp_path / "disk", "200k") as disk:
        assert not is_full(disk)
        (disk / "filler").write_bytes(bytes(150_000))
        assert is_full(disk)
        assert [p.name for p in disk.iterdir()] == ["filler"]  # it leaves nothing behind


def test_nothing_slow_is_imported() -> None:
    code = "import sys, unfool.disk; print(*{'torch', 'nbformat'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout) == (0, "\n")
