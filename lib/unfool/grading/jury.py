"""Run a stranger's cells and call the checks, in a process that is thrown away.

Reads a job (JSON) from standard input and writes a line to standard output for each cell: the job's
token, then JSON. Started by `sandbox.judge` only, under a warden. The stranger's code and the
checks share this process, so that checks may look at gradients, networks and generators; hence:

* the checks' code and what they call is compared with what it was, after every call of an answer;
* an answer that is known to be wrong must fail each check, or the check has been tampered with;
* results of a subclass of Tensor are made plain ones.

Code that searches this process's memory for the token can still forge a line. Nothing in one
process stops that.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import wraps
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

WATCHED = ("builtins", "math", "inspect", "torch", "torch.autograd", "torch.nn.functional")
CLASSES = ("Tensor", "nn.Module", "nn.Linear", "nn.Sequential", "Generator")
LARGEST_FILE = 50 * 2**20  # bytes that a stranger's code may write into one file


class TimeUp(BaseException):
    """A cell has had its time. Not an Exception, which checks and learners catch."""


class Tampered(BaseException):
    """A check, or what it calls, is not what it was."""


# ------------------------------------------------------------------------------------- what changed


class Guard:
    """Knows what the checks were made of."""

    def __init__(self) -> None:
        self.checks = {n: m for n, m in sys.modules.items() if n.startswith("unfool.checks")}
        self.tools = {name: sys.modules[name] for name in WATCHED}
        self.before = dict(self._parts())

    def demand(self) -> None:
        """Raise `Tampered`, naming the first thing that was changed."""
        now = dict(self._parts())
        for name, thing in self.before.items():
            if now.get(name, self) is not thing:
                raise Tampered(name)
        for name in now.keys() - self.before.keys():
            if name.startswith("unfool.checks"):  # a global there hides a builtin
                raise Tampered(name)

    def _parts(self) -> Iterator[tuple[str, object]]:
        import torch

        for name, module in (self.checks | self.tools).items():
            yield f"sys.modules[{name}]", sys.modules.get(name)
            yield from _members(name, vars(module))
        for name in CLASSES:
            thing: Any = torch
            for part in name.split("."):
                thing = getattr(thing, part)
            yield from _members(f"torch.{name}", vars(thing))
        yield from _members("unfool.checks.TASKS", self.checks["unfool.checks._tools"].TASKS)


def _members(place: str, names: Any) -> Iterator[tuple[str, object]]:
    for name, thing in list(names.items()):
        yield f"{place}.{name}", thing
        if not place.startswith("unfool.checks"):
            continue
        if isinstance(thing, FunctionType):
            yield f"{place}.{name}'s code", thing.__code__
            yield f"{place}.{name}'s defaults", thing.__defaults__
        elif isinstance(thing, type) and thing.__module__.startswith("unfool.checks"):
            yield from _members(f"{place}.{name}", vars(thing))


def _guarded(function: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    @wraps(function)
    def call(*inputs: Any) -> Any:
        result = _plain(function(*inputs))
        guard.demand()
        return result

    return call


def _plain(result: Any) -> Any:
    """A result whose tensors are no subclasses: these could call themselves equal to anything."""
    from torch import Tensor

    if isinstance(result, Tensor) and type(result) is not Tensor:
        return result.as_subclass(Tensor)
    if type(result) in (tuple, list):
        return type(result)(_plain(one) for one in result)
    return result


# ---------------------------------------------------------------------------------------- cells


class Notes(io.TextIOBase):
    """Keeps the first `room` characters of what is printed, and whether there was more."""

    def __init__(self, room: int) -> None:
        self.room, self.text, self.full = room, "", False

    def write(self, text: str) -> int:
        self.text += text[: self.room]
        self.full |= len(text) > self.room
        self.room = max(0, self.room - len(text))
        return len(text)


@contextmanager
def _clock(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run(shell: Any, source: str, room: int, seconds: float) -> dict[str, Any]:
    """Run a learner's cell; what it printed and the exception that ended it."""
    notes, error = Notes(room), None
    with redirect_stdout(notes), redirect_stderr(notes):
        try:
            with _clock(seconds):
                done = shell.run_cell(source)
            error = done.error_before_exec or done.error_in_exec
        except BaseException as escaped:
            error = escaped
    return {"text": notes.text, "full": notes.full, "error": _told(error, seconds)}


def _told(error: BaseException | None, seconds: float) -> list[str] | None:
    if error is None:
        return None
    if isinstance(error, TimeUp):
        return ["TimeUp", f"stopped after {seconds:g} s"]
    said = "a text that can't be shown"
    with suppress(BaseException):
        said = str(error)[:500]
    return [type(error).__name__, said]


def _judge(job: dict[str, Any], cell: dict[str, Any], space: Any, guard: Guard) -> dict[str, Any]:
    """The verdict on one task."""
    from unfool.checks import verdict

    function = space.get(cell["function"])
    try:
        guard.demand()
        if verdict(cell["task"], lambda *inputs: None, job["seed"]).passed is not False:
            raise Tampered("a wrong answer passes")
        answer = _guarded(function, guard) if callable(function) else function
        with _clock(job["seconds"]), redirect_stdout(Notes(0)), redirect_stderr(Notes(0)):
            found = verdict(cell["task"], answer, job["seed"])
        guard.demand()
        return {"passed": found.passed is True, "message": found.message}
    except Tampered as error:
        return {"passed": False, "message": f"the checks were changed: {error}", "tampered": True}
    except TimeUp:
        return {"passed": False, "message": f"stopped after {job['seconds']:g} s"}
    except BaseException as error:
        return {"passed": False, "message": f"your function stops with {type(error).__name__}"}


def _attack(attack: Any, home: Path, eps: list[float], seconds: float) -> dict[str, Any]:
    """Run a capstone's attack; its images are judged elsewhere."""
    from unfool.capstone import run_attack

    try:
        with _clock(seconds), redirect_stdout(Notes(0)), redirect_stderr(Notes(0)):
            run_attack(attack, home, eps)
        return {"error": None}
    except BaseException as error:
        return {"error": _told(error, seconds)}


# ------------------------------------------------------------------------------------------ the job


def _shell() -> Any:
    """A bare IPython: magics, `await` and `display` work; no history, no colours, no tracebacks."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config)
    for name in ("showtraceback", "showsyntaxerror", "showindentationerror"):
        setattr(shell, name, lambda *things, **more: None)
    return shell


def main() -> None:
    """Run the job that standard input holds."""
    job = json.load(sys.stdin)
    token, own, channel, home = job.pop("token"), os.getpid(), os.dup(1), Path.cwd()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import unfool.checks  # noqa: F401 (before any of the stranger's code)

    shell, room = _shell(), job["output"]
    guard = Guard()
    for number, cell in enumerate(job["cells"]):
        if "task" in cell:
            said = _judge(job, cell, shell.user_ns, guard)
        elif "attack" in cell:
            said = _attack(shell.user_ns.get("attack"), home, cell["attack"], 3 * job["seconds"])
        else:
            said = _run(shell, cell["source"], room, job["seconds"])
            room = max(0, room - len(said["text"]))
        if os.getpid() != own:  # a cell forked: this is its child
            os._exit(0)
        _send(channel, f"{token}{json.dumps({'cell': number, **said})}\n".encode())
    _send(channel, f"{token}{json.dumps({'done': True})}\n".encode())
    os._exit(0)  # without waiting for threads and exit handlers of the stranger's


def _send(channel: int, line: bytes) -> None:
    while line:
        line = line[os.write(channel, line) :]


if __name__ == "__main__":
    main()
