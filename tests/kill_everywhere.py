"""Kill an action of `fault_actions` just before each of its file operations, and take it up again.

    python tests/kill_everywhere.py ACTION FOLDER all|N|seed=S

With N, before so many of them, evenly spread; with a seed, once, at a random moment of the clock.
What `BEFORE` holds of an action is done first, once, and not killed. Prints how many operations
there are, how often it was killed, and a line for each fault.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fault_actions import ACTIONS, BEFORE, problems

Action = Callable[[Path], object]
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
    action: Action, root: Path, trace: Trace, at: int = 0, after: float = 0.0
) -> tuple[int, list[str]]:
    """Do the action in a child; return how it ended, and the operations that it came to.

    It is killed before the operation `at`, or when `after` seconds have passed; at 0, not at all.
    """
    file = root.with_suffix(".trace")
    file.write_text("")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        trace.at, trace.log = at, os.open(file, os.O_WRONLY | os.O_APPEND)
        try:
            action(root)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, file.read_text().splitlines()


def fresh(root: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(root.with_suffix(".before"), root)


def killed_before(
    action: Action, root: Path, trace: Trace, operations: list[str], wanted: str
) -> Iterator[str]:
    """Kill it before its operations, all or so many, each time from the start; say before which."""
    n = len(operations)
    some = range(n if wanted == "all" else int(wanted))
    for k in some if wanted == "all" else [i * (n - 1) // (len(some) - 1) for i in some]:
        point = f"{k + 1}, {operations[k]}"
        fresh(root)
        status, _ = run(action, root, trace, k + 1)
        assert os.WIFSIGNALED(status), f"was not killed before {point}"
        yield f"before {point}"


def killed_at(
    action: Action, root: Path, trace: Trace, takes: float, draw: random.Random
) -> Iterator[str]:
    """Kill it at a random moment of what it takes; one that it does not live to see is no kill."""
    status = 0
    while not os.WIFSIGNALED(status):
        moment = draw.uniform(0, takes)
        fresh(root)
        status, operations = run(action, root, trace, after=moment)
    yield f"at {moment:.2f} of {takes:.2f} s, after {len(operations)} operations"


def main(name: str, root: Path, wanted: str) -> None:
    trace, action = Trace(root), ACTIONS[name]
    sys.addaudithook(trace)
    root.mkdir()
    assert name not in BEFORE or run(BEFORE[name], root, trace)[0] == 0
    shutil.copytree(root, root.with_suffix(".before"))
    begun = time.monotonic()
    status, operations = run(action, root, trace)
    takes = time.monotonic() - begun
    assert status == 0, "it does not even end unbroken"
    whole, killed, faults = problems(name, root, None), 0, []
    kind, _, seed = wanted.partition("=")
    for point in (
        killed_at(action, root, trace, takes, random.Random(int(seed)))
        if kind == "seed"
        else killed_before(action, root, trace, operations, wanted)
    ):
        killed += 1
        print(f"{name}: killed {point}", file=sys.stderr)
        faults += [f"killed {point}: {p}" for p in problems(name, root, "half")]
        status, _ = run(action, root, trace)
        if status:
            faults.append(f"killed {point}: cannot be taken up again")
        faults += [f"taken up, killed {point}: {p}" for p in problems(name, root, whole)]
    print(len(operations), killed, *faults, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
