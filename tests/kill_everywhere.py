"""Kill an action of `fault_actions` just before each of its file operations, and take it up again.

    python tests/kill_everywhere.py ACTION FOLDER all|N

What `BEFORE` holds of an action is done first, once, and not killed. Prints how many operations
there are, at how many it was killed, and a line for each fault.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fault_actions import ACTIONS, BEFORE, problems

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Trace:
    """Counts what the process does to files under `root`; dies before the operation `at`."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.at, self.count = str(root), -1, 0, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Be an audit hook of Python."""
        if self.log < 0 or event not in OPERATIONS or not arguments:
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        if not str(path).startswith(self.root):
            return
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        self.count += 1
        os.write(self.log, f"{event} {Path(str(path)).name}\n".encode())
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    action: Callable[[Path], object], root: Path, trace: Trace, at: int = 0
) -> tuple[int, list[str]]:
    """Do the action in a child; return how it ended, and the operations that it came to."""
    file = root.with_suffix(".trace")
    file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        trace.at, trace.log = at, os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            action(root)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status, file.read_text().splitlines()


def fresh(root: Path, before: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(before, root)


def main(name: str, root: Path, wanted: str) -> None:
    trace, action = Trace(root), ACTIONS[name]
    sys.addaudithook(trace)
    root.mkdir()
    assert name not in BEFORE or run(BEFORE[name], root, trace)[0] == 0
    before = root.with_suffix(".before")
    shutil.copytree(root, before)
    status, operations = run(action, root, trace)
    assert status == 0, "it does not even end unbroken"
    whole, n = problems(name, root, None), len(operations)
    chosen = (
        range(n)
        if wanted == "all"
        else [i * (n - 1) // (int(wanted) - 1) for i in range(int(wanted))]
    )
    faults = []
    for k in chosen:
        point = f"{k + 1}, {operations[k]}"
        fresh(root, before)
        status, _ = run(action, root, trace, k + 1)
        if not os.WIFSIGNALED(status):
            faults.append(f"{point}: was not killed")
        faults += [f"killed before {point}: {p}" for p in problems(name, root, "half")]
        status, _ = run(action, root, trace)
        if status:
            faults.append(f"killed before {point}: cannot be taken up again")
        faults += [f"taken up after {point}: {p}" for p in problems(name, root, whole)]
    print(n, len(chosen), *faults, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
