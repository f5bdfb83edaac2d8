"""Run one command, and end it with all that it started when it breaks a limit or ends.

    python -m unfool.grading.warden '{"seconds": 120, "memory": 2000, "processes": 64}' command …

Says on standard error, as one line of JSON, how the command ended. What the command starts stays a
descendant of this process, whatever sessions it makes: orphans are handed to the nearest subreaper.
POSIX only; subreapers are Linux's, elsewhere an orphan escapes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType

import psutil  # type: ignore[import-untyped]

POLL = 0.1  # seconds; a process that takes 2 GB a second overshoots its limit by 0.4 GB
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class End:
    """How a command ended: `reason` is "" if by itself; its exit status, its largest memory."""

    reason: str = ""
    status: int | None = None
    megabytes: int = 0


def main(arguments: list[str]) -> int:
    """Watch over one command."""
    limits = json.loads(arguments[0])
    _adopt_orphans()
    signal.signal(signal.SIGTERM, _stopped)
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(arguments[1:], stderr=quiet, start_new_session=True)
    found = End()
    try:
        _watch(child.pid, limits, found)
    finally:
        end_all()
    print(json.dumps(asdict(found)), file=sys.stderr, flush=True)
    return 0


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a grader that is killed takes us along


def _stopped(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(pid: int, limits: dict[str, float], found: End) -> None:
    """Return when the command has ended or has broken a limit; says so in `found`."""
    started = time.monotonic()
    while not found.reason:
        found.status = _reaped().get(pid)
        if found.status is not None:
            return
        tree = psutil.Process().children(recursive=True)
        megabytes = held(tree, limits["memory"])
        found.megabytes = max(found.megabytes, round(megabytes))
        if time.monotonic() - started > limits["seconds"]:
            found.reason = f"stopped after {limits['seconds']:g} s"
        elif megabytes > limits["memory"]:
            found.reason = f"stopped at {megabytes:.0f} MB, {limits['memory']:g} are allowed"
        elif len(tree) > limits["processes"]:
            found.reason = f"stopped at {len(tree)} processes, {limits['processes']:g} are allowed"
        else:
            time.sleep(POLL)


def held(processes: Sequence[psutil.Process], limit: float) -> float:
    """Return the MB that processes hold; over the limit, the least of two looks.

    A child that was just forked shows its parent's memory as its own until it runs its program.
    """
    megabytes = sum(map(resident, processes)) / 1e6
    if megabytes > limit:
        time.sleep(POLL)
        megabytes = min(megabytes, sum(map(resident, processes)) / 1e6)
    return megabytes


def resident(process: psutil.Process) -> int:
    """Return a process's memory in bytes, 0 if it has gone."""
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _reaped() -> dict[int, int]:
    """Collect all children that have ended: pid → exit status."""
    ended = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def end_all() -> None:
    """End every descendant; one that keeps forking is frozen first, generation by generation."""
    while tree := psutil.Process().children(recursive=True):
        frozen: set[int] = set()
        while new := [p for p in tree if p.pid not in frozen]:
            for process in new:
                frozen.add(process.pid)
                with suppress(psutil.Error):
                    process.suspend()
            tree = psutil.Process().children(recursive=True)
        for process in tree:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)
        _reaped()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
