"""The tasks of a solution notebook, taken apart for the tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from unfool.exercises import sources

CHECK = re.compile(r'^check\("(ex\d\d_\w+)", (\w+)\)$', re.MULTILINE)
BEGIN, END = "### BEGIN SOLUTION\n", "### END SOLUTION"
HIDDEN = re.compile(r"### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS", re.DOTALL)


@dataclass
class Task:
    """One graded task: the text, the code with its answer, the check, the wrong answers."""

    name: str
    function: str
    setup: str
    text: str
    code: NotebookNode
    check: NotebookNode
    wrong: list[NotebookNode] = field(default_factory=list)

    def defined(self, source: str, function: str | None = None) -> Callable[..., Any]:
        """Return the function that a cell's source defines after the notebook's set-up."""
        space: dict[str, Any] = {}
        exec(compiled(self.setup), space)
        exec(compile(source, f"<{self.name}>", "exec"), space)
        found: Callable[..., Any] = space[function or self.function]
        return found

    def wrong_answers(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yield each wrong answer's key phrase and function."""
        for cell in self.wrong:
            phrase = cell.source.splitlines()[0].removeprefix("# Caught by: ")
            yield phrase, self.defined(cell.source.split("\n\n\ncheck(")[0], "wrong")


@cache
def compiled(source: str) -> Any:
    return compile(source, "<setup>", "exec")


def read(path: Path) -> NotebookNode:
    nb: NotebookNode = nbformat.read(path, as_version=4)
    return nb


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def tasks_of(nb: NotebookNode) -> list[Task]:
    """The graded tasks of a notebook, in order."""
    setup = next(cell.source for cell in nb.cells if "setup" in tags(cell))
    found: list[Task] = []
    for text, code, check in zip(nb.cells, nb.cells[1:], nb.cells[2:], strict=False):
        named = CHECK.search(check.source) if check.cell_type == "code" else None
        if named and check.metadata.get("nbgrader", {}).get("grade"):
            found.append(Task(named[1], named[2], setup, text.source, code, check))
    for cell in nb.cells:
        if "wrong-answer" in tags(cell):
            name = CHECK.findall(cell.source)[-1][0]
            next(task for task in found if task.name == name).wrong.append(cell)
    return found


def all_tasks() -> dict[str, Task]:
    return {task.name: task for path in sources() for task in tasks_of(read(path))}


# ------------------------------------------------------------------------------------ the leak gate


def regions(cell: NotebookNode) -> tuple[str, str]:
    """What of a solution cell is open to learners, and what is not."""
    if {"wrong-answer", "teacher"} & set(tags(cell)):
        return "", cell.source
    secret = re.findall(f"{BEGIN}(.*?){END}|{HIDDEN.pattern}", cell.source, re.DOTALL)
    hidden = HIDDEN.findall(cell.source)
    shown = HIDDEN.sub("", re.sub(f"{BEGIN}.*?{END}", "", cell.source, flags=re.DOTALL))
    return shown, "\n".join([*secret, *hidden])


def secrets(solution: NotebookNode, least: int = 12) -> list[str]:
    """Lines that only teachers may see: answers, wrong answers, hidden tests, outputs.

    A line that also stands where learners may read it is none, nor is one of few characters.
    """
    shown, hidden = zip(*map(regions, solution.cells), strict=True)
    printed = [o.get("text", "") for c in solution.cells for o in c.get("outputs", [])]
    open_lines = {bare(line) for line in "\n".join(shown).splitlines()}
    lines = dict.fromkeys(line.strip() for line in "\n".join([*hidden, *printed]).splitlines())
    return [line for line in lines if len(line) >= least and bare(line) not in open_lines]


def leaks(text: str, secret: list[str]) -> list[str]:
    """The secret lines that a text holds, spaces aside."""
    stripped = bare(text)
    return [line for line in secret if bare(line) in stripped]


def words_of(nb: NotebookNode) -> str:
    """Sources and printed outputs of a notebook."""
    printed = [o.get("text", "") for cell in nb.cells for o in cell.get("outputs", [])]
    return "\n".join([cell.source for cell in nb.cells] + printed)


def bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
