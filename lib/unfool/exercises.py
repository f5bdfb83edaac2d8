"""From the notebooks in solutions/ to those in exercises/, byte for byte the same every time.

A solution notebook is written by hand and committed executed. It holds, for each graded task, a
markdown cell, a code cell with the answer between nbgrader's delimiters and a live stub above them,
a locked check cell, and cells tagged `wrong-answer`. What learners get is made from it:

* what stands between `### BEGIN SOLUTION` and `### END SOLUTION` becomes one comment (in markdown
  cells one line of text), hidden tests and wrong answers are left out, outputs are cleared;
* a check cell calls `unfool.checks.check`, which prints and never raises: a blank exercise runs to
  its end. Its hidden tests call `unfool.checks.demand`, which raises; nbgrader puts them back when
  it grades, and gives the points of a cell that does not raise.

Nothing here imports torch.
"""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from unfool.files import write_text
from unfool.notebooks import (
    KERNELSPEC,
    LANGUAGE_INFO,
    REPO,
    UsageError,
    clean,
    execute,
    write,
)

SOLUTIONS = REPO / "solutions"
EXERCISES = REPO / "exercises"
COMMAND = "make exercises"
SECONDS = 120.0  # that a solution notebook may take; it takes about five
TEACHERS = {"wrong-answer", "teacher"}  # tags of cells that learners never get
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HIDDEN_BEGIN, HIDDEN_END = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
CODE_STUB, TEXT_STUB = "# your code here", "*Your answer here.*"


def sources(folder: Path = SOLUTIONS) -> list[Path]:
    """All solution notebooks, in order."""
    return sorted(folder.glob("ex[0-9][0-9]_*.ipynb"))


def exercise(solution: NotebookNode) -> NotebookNode:
    """Return what learners get of a solution notebook.

    Raises:
        ValueError: a delimiter without its partner, or a solution cell without any.
    """
    nb = copy.deepcopy(solution)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO})
    nb.cells = [cell for cell in nb.cells if not TEACHERS & set(cell.metadata.get("tags", []))]
    for cell in nb.cells:
        grading = cell.metadata.get("nbgrader", {})
        stub = CODE_STUB if cell.cell_type == "code" else TEXT_STUB
        if grading.get("solution") and BEGIN not in cell.source:
            raise ValueError(f"solution cell {cell.id} has no {BEGIN!r}: all of it would leak")
        cell.source = _cut(cell.source, BEGIN, END, stub)
        cell.source = _cut(cell.source, HIDDEN_BEGIN, HIDDEN_END, "")
        if grading:  # as nbgrader locks them: JupyterLab lets nobody delete or edit them
            cell.metadata["deletable"] = False
        if grading.get("locked"):
            cell.metadata["editable"] = False
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def _cut(source: str, begin: str, end: str, stub: str) -> str:
    """Replace each region between two delimiter lines by the stub, indented like the first."""
    kept: list[str] = []
    inside = False
    for line in source.splitlines():
        mark = line.strip()
        if mark in (begin, end) and inside == (mark == begin):
            raise ValueError(f"{mark!r} without its partner in: {source[:60]!r}")
        if mark == begin and stub:
            kept.append(line[: len(line) - len(line.lstrip())] + stub)
        if not inside and mark != begin:
            kept.append(line)
        inside = mark == begin or (inside and mark != end)
    if inside:
        raise ValueError(f"{begin!r} without {end!r} in: {source[:60]!r}")
    return "\n".join(kept).rstrip()


def text_of(nb: NotebookNode) -> str:
    """Return a notebook as it stands in its file."""
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"


def wanted(solutions: Path = SOLUTIONS) -> dict[str, str]:
    """Return file name → text of every exercise, made from the solutions."""
    return {path.name: text_of(exercise(nbformat.read(path, 4))) for path in sources(solutions)}


def generate(solutions: Path = SOLUTIONS, exercises: Path = EXERCISES) -> list[str]:
    """Write the exercises; remove those whose solution is gone. Returns a line for each change."""
    texts, lines = wanted(solutions), []
    for name in stale(solutions, exercises):
        if name in texts:
            write_text(exercises / name, texts[name])
            lines.append(f"wrote    {name}")
        else:
            (exercises / name).unlink()
            lines.append(f"removed  {name}")
    return [*lines, f"{exercises.name}: {len(texts)} notebooks, {len(lines)} written or removed"]


def stale(solutions: Path = SOLUTIONS, exercises: Path = EXERCISES) -> list[str]:
    """Return the exercises that are not, byte for byte, what the solutions make."""
    texts = wanted(solutions)
    there = {path.name: path.read_bytes() for path in exercises.glob("*.ipynb")}
    names = sorted(texts.keys() | there.keys())
    return [n for n in names if n not in texts or there.get(n) != texts[n].encode()]


def run_solution(path: Path, build: Path) -> None:
    """Execute a solution notebook and write it back, cleaned.

    Raises:
        UsageError: a cell failed.
    """
    result = execute(path, build / path.name, timeout=SECONDS)
    if not result.ok:
        raise UsageError(f"{path.name} failed: {result.error}")
    write(clean(nbformat.read(build / path.name, as_version=4)), path)
