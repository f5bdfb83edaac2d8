"""Checks of the exercises: is this function right, and if not, where to look?

    check("ex02_fgsm", fgsm)          prints "right: …" or "not yet: …", and never stops a notebook
    verdict("ex02_fgsm", fgsm, 7)     the same as a `Verdict`, on the inputs of seed 7
    demand("ex02_fgsm", fgsm)         raises AssertionError; for the graded run, on a fresh seed

Nothing here is a secret: a learner may read how an answer is judged. Each check compares with a
reference that is written in another way than the solution, on inputs that are drawn anew.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from unfool.checks._tools import TASKS, Answer, Draw, Wrong

ROUNDS = 3  # how many times a verdict draws inputs

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right; if not, `message` says where to look."""

    passed: bool
    message: str = ""

    def __bool__(self) -> bool:
        return self.passed


def verdict(task: str, function: Any, seed: int = 0) -> Verdict:
    """Judge a learner's function on inputs drawn from `seed`.

    Whatever the function does, short of ending the process or never returning, becomes a verdict.

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: there are {', '.join(sorted(TASKS))}")
    if not callable(function):
        return Verdict(False, f"give the function itself, not a {type(function).__name__}")
    with torch.random.fork_rng(devices=[]):  # the notebook's random state stays as it was
        for place in range(ROUNDS):
            try:
                TASKS[task](Answer(function), Draw(seed * ROUNDS + place))
            except Wrong as wrong:
                return Verdict(False, str(wrong))
            except Exception as error:  # a result so odd that comparing it failed
                return Verdict(False, f"what your function returns can't be compared: {error}")
    return Verdict(True)


def check(task: str, function: Any) -> None:
    """Print whether an answer is right, in one line; always on the inputs of seed 0."""
    found = verdict(task, function)
    print(f"right: {task}" if found else f"not yet: {task}: {found.message}")


def demand(task: str, function: Any) -> None:
    """Raise AssertionError unless an answer is right; what the hidden tests of a graded run call.

    The seed is `UNFOOL_CHECK_SEED`, so that a grade can be repeated, else a fresh one.
    """
    seed = int(os.environ.get("UNFOOL_CHECK_SEED") or secrets.randbelow(2**31))
    found = verdict(task, function, seed)
    assert found, f"{task}, seed {seed}: {found.message}"
