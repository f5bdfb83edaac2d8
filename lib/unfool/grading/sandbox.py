"""Start the process that runs a stranger's code, with limits, and read what it says."""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from unfool.notebooks import REPO

NAMESPACES = (
    "unshare", "--user", "--map-current-user", "--net", "--mount", "--mount-proc",
    "--pid", "--fork", "--kill-child",
)  # fmt: skip
GRACE = 20.0  # seconds beyond the limit after which the warden itself is taken for lost
MARK = "UNFOOL_SUBMISSION"


@dataclass(frozen=True)
class Limits:
    """What one submission may use.

    Attributes:
        seconds: for the whole notebook; a cell may take a quarter of it.
        memory: MB, resident size of all its processes together.
        output: kB of printed text that is kept.
        processes: how many it may have at once.
    """

    seconds: float = 120.0
    memory: int = 2000
    output: int = 200
    processes: int = 64


@dataclass
class Report:
    """What the jury said of one notebook: a message per code cell, as far as it came."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""  # why it was ended, if it was
    seconds: float = 0.0
    megabytes: int = 0


@cache
def namespaces() -> tuple[str, ...]:
    """The command that cuts off network and other processes, or () where it is not allowed."""
    if shutil.which(NAMESPACES[0]) is None:
        return ()
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False)
    return NAMESPACES if tried.returncode == 0 else ()


def judge(
    cells: Sequence[dict[str, Any]],
    seed: int,
    limits: Limits,
    *,
    files: Mapping[str, Path] | None = None,
    before: Callable[[Path], None] | None = None,
    after: Callable[[Path], None] | None = None,
) -> Report:
    """Run a notebook's code cells and judge its tasks, in processes that are all gone afterwards.

    Args:
        cells: `{"source": …}` for a learner's cell, `{"task": …, "function": …}` for a check.
            `{"attack": [0.1]}` runs a capstone's attack (see `unfool.capstone`).
        seed: of the inputs that the checks draw.
        files: name → what is copied into the scratch folder under it.
        before, after: called with the scratch folder, when it is filled and when all has ended.
    """
    token, started = secrets.token_hex(16), time.monotonic()
    job = {"token": token, "cells": cells, "seed": seed, "seconds": limits.seconds / 4}
    job["output"] = limits.output * 1000
    with tempfile.TemporaryDirectory(prefix="unfool-", ignore_cleanup_errors=True) as scratch:
        for name, path in (files or {}).items():
            shutil.copy(path, Path(scratch, name))
        if before:
            before(Path(scratch))
        lines, end = _run(json.dumps(job).encode(), token, scratch, limits)
        if after:
            after(Path(scratch))
    said = list(_messages(lines, token))
    report = Report([m for m in said if "cell" in m], end.get("reason", ""))
    report.seconds, report.megabytes = time.monotonic() - started, end.get("megabytes", 0)
    if not report.reason and not any(message.get("done") for message in said):
        report.reason = f"its process ended in code cell {len(report.cells) + 1}"
    return report


def _run(job: bytes, token: str, scratch: str, limits: Limits) -> tuple[bytes, dict[str, Any]]:
    """Everything that the jury wrote, and what the warden said at the end."""
    allowed = {"seconds": limits.seconds, "memory": limits.memory, "processes": limits.processes}
    python = [sys.executable, "-P", "-m"]
    command = [*python, "unfool.grading.warden", json.dumps(allowed)]
    command += [*namespaces(), *python, "unfool.grading.jury"]
    mark = token[::-1]  # the token itself is no business of the environment
    with tempfile.TemporaryFile() as file:
        file.write(job)
        file.seek(0)
        warden = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env=_environment(scratch, mark),
            start_new_session=True,
        )
    most = 8 * 1000 * limits.output + 2_000_000  # JSON may write six characters for one
    try:
        lines = _read(warden.stdout, most, time.monotonic() + limits.seconds + GRACE)
        with suppress(subprocess.TimeoutExpired):
            warden.wait(5)
    finally:
        _end(warden, mark)
    return lines, _last_words(warden, len(lines) >= most)


def _end(warden: subprocess.Popen[bytes], mark: str) -> None:
    if warden.poll() is None:
        warden.terminate()  # it ends all others before itself
        with suppress(subprocess.TimeoutExpired):
            warden.wait(GRACE)
    if warden.returncode is None or warden.returncode < 0:
        warden.kill()
        warden.wait()
        _sweep(mark)


def _environment(scratch: str, mark: str) -> dict[str, str]:
    """Nothing of ours but the way to Python; no home, no settings, no secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    folders = {name: scratch for name in ("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR")}
    path = os.pathsep.join(filter(None, [str(REPO / "lib"), os.environ.get("PYTHONPATH")]))
    python = {"PYTHONPATH": path, "PYTHONUTF8": "1", "PYTHONNOUSERSITE": "1", "MPLBACKEND": "Agg"}
    return {**kept, **folders, **python, "OMP_NUM_THREADS": "1", MARK: mark}


def _read(stream: BinaryIO | Any, most: int, deadline: float) -> bytes:
    """Read to the end, or until `most` bytes or the deadline."""
    found = bytearray()
    while len(found) < most:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            break
        piece = os.read(stream.fileno(), 65536)
        if not piece:
            break
        found += piece
    return bytes(found)


def _last_words(warden: subprocess.Popen[bytes], flooded: bool) -> dict[str, Any]:
    said = b""
    if warden.stderr and select.select([warden.stderr], [], [], 1.0)[0]:
        said = os.read(warden.stderr.fileno(), 65536)
    for stream in (warden.stdout, warden.stderr):
        if stream:
            stream.close()
    if flooded:
        return {"reason": "stopped: it floods the channel to the grader"}
    with suppress(ValueError, IndexError):
        end = json.loads(said.splitlines()[-1])
        return dict(end)
    return {"reason": "stopped: the process that watches over it was lost"}


def _sweep(mark: str) -> None:
    """End what bears the mark: for the case that a stranger's code killed its warden."""
    import psutil  # type: ignore[import-untyped]

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()


def _messages(lines: bytes, token: str) -> Iterator[dict[str, Any]]:
    """The messages that bear the token, in the order of the cells, each once."""
    wanted = 0
    for line in lines.split(b"\n"):
        if not line.startswith(token.encode()):
            continue
        with suppress(ValueError):
            message = json.loads(line[len(token) :])
            if message.get("done") or message.get("cell") == wanted:
                wanted += "cell" in message
                yield message
