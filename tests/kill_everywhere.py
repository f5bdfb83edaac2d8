"""Kill an action of `fault_actions` just before each of its file operations, and take it up again.

    python tests/kill_everywhere.py ACTION FOLDER all|N

Prints how many operations there are, at how many it was killed, and a line for each fault.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fault_actions import ACTIONS, problems

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


def run(action: str, root: Path, trace: Trace, at: int = 0) -> tuple[int, list[str]]:
    """Do the action in a child; return how it ended, and the operations that it came to."""
    file = root.with_suffix(".trace")
    file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        trace.at, trace.log = at, os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            ACTIONS[action](root)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status, file.read_text().splitlines()


def fresh(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()


def main(action: str, root: Path, wanted: str) -> None:
    trace = Trace(root)
    sys.addaudithook(trace)
    fresh(root)
    status, operations = run(action, root, trace)
    assert status == 0, "it does not even end unbroken"
    whole, n = problems(action, root, None), len(operations)
    chosen = (
        range(n)
        if wanted == "all"
        else [i * (n - 1) // (int(wanted) - 1) for i in range(int(wanted))]
    )
    faults = []
    for k in chosen:
        name = f"{k + 1}, {operations[k]}"
        fresh(root)
        status, _ = run(action, root, trace, k + 1)
        if not os.WIFSIGNALED(status):
            faults.append(f"{name}: was not killed")
        faults += [f"killed before {name}: {p}" for p in problems(action, root, "half")]
        status, _ = run(action, root, trace)
        if status:
            faults.append(f"killed before {name}: cannot be taken up again")
        faults += [f"taken up after {name}: {p}" for p in problems(action, root, whole)]
    print(n, len(chosen), *faults, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
