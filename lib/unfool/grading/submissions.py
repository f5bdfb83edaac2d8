"""Find what was handed in, read it without trusting it, and put the teacher's cells back.

`SUBMISSIONS/<student>/ex02_….ipynb`, or nbgrader's `<student>/<assignment>/….ipynb`.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from unfool.notebooks import KERNELSPEC, LANGUAGE_INFO, UsageError

LARGEST = 100 * 2**20  # bytes of a notebook file; beyond it nobody opens it
NAME = re.compile(r"\w[\w.@+-]{0,63}")  # of a student; also safe in a table and in a path
NUMBER = re.compile(r"ex\d\d")
CHECK = re.compile(r'^check\("(ex\d\d_\w+)", (\w+)\)$', re.MULTILINE)
ODD = re.compile(
    r"unfool\.(?:checks\.|attacks|defenses|grading)|_getframe|\bgc\.|\bctypes\b|\b_exit\b"
    r"|/proc/|os\.kill|settrace|get_ipython"
)  # what an honest answer has no use for; a reason to look, not to take points


class Unreadable(ValueError):
    """A file that can't be graded; the message says why."""


@dataclass(frozen=True)
class Submission:
    """One student's file for one exercise; `problem` says why it can't be graded, or is ""."""

    student: str
    exercise: str
    path: Path
    problem: str = ""


def find(folder: Path, exercises: list[str]) -> list[Submission]:
    """Everything that was handed in, by student and exercise.

    Args:
        exercises: the stems that there are, such as "ex02_one_step".

    Raises:
        UsageError: the folder is absent, or holds nothing.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: expected one with a folder for each student")
    found: dict[tuple[str, str], Submission] = {}
    for home in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if home.is_dir():
            files = {*home.glob("*.ipynb"), *home.glob("*/*.ipynb")}
            for path in sorted(p for p in files if ".ipynb_checkpoints" not in p.parts):
                one = _identified(home.name, path, exercises)
                found[one.student, one.exercise] = _chosen(
                    found.get((one.student, one.exercise)), one
                )
    if not found:
        raise UsageError(f"no notebooks in {folder}: expected {folder.name}/STUDENT/ex01_….ipynb")
    return [found[key] for key in sorted(found)]


def _identified(student: str, path: Path, exercises: list[str]) -> Submission:
    number = NUMBER.match(path.name)
    stem = next((e for e in exercises if number and e.startswith(f"{number[0]}_")), "")
    problem = ""
    if not NAME.fullmatch(student):
        problem = f"the folder's name {student!r} is no student's: letters, digits, . _ @ + -"
    elif not stem:
        problem = f"{path.name} is of no exercise: there are {exercises[0]} to {exercises[-1]}"
    elif path.is_symlink() or not path.is_file():
        problem = f"{path.name} is no file, but a link or a device"
    elif path.stat().st_size > LARGEST:
        problem = f"{path.name} has {path.stat().st_size / 1e6:.0f} MB: clear its outputs"
    return Submission(student, stem or path.stem, path, problem)


def _chosen(before: Submission | None, now: Submission) -> Submission:
    """Of two files for one exercise the one with the exercise's own name, else the newer one."""
    if before is None or before.problem:
        return now
    if now.problem or before.path.stem == now.exercise:
        return before
    newer = now.path.stat().st_mtime > before.path.stat().st_mtime
    return now if now.path.stem == now.exercise or newer else before


def read(path: Path) -> NotebookNode:
    """Return a notebook of which only sources and grade ids are kept.

    Raises:
        Unreadable: not JSON, or no notebook of format 4.
    """
    try:
        found = json.loads(path.read_bytes())
        cells = [_cell(cell) for cell in found["cells"]]
        if found["nbformat"] != 4:
            raise Unreadable(f"notebook format {found['nbformat']!r}: save it with JupyterLab")
    except Unreadable:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"JSON, but no notebook: {type(error).__name__}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}"[:200]) from None
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO})
    for place, cell in enumerate(nb.cells):
        cell.id = f"cell-{place}"
    return nb


def _cell(cell: Any) -> NotebookNode:
    source = cell["source"]
    text = source if isinstance(source, str) else "".join(source)
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair can't be stored
    make = {
        "code": nbformat.v4.new_code_cell,
        "markdown": nbformat.v4.new_markdown_cell,
        "raw": nbformat.v4.new_raw_cell,
    }[cell["cell_type"]]
    made: NotebookNode = make(text)
    grade_id = grade_id_of(cell)
    if grade_id:
        made.metadata["nbgrader"] = {"grade_id": grade_id}
    return made


def grade_id_of(cell: Any) -> str:
    """A cell's grade id, or ""."""
    found = cell.get("metadata", {}).get("nbgrader", {}).get("grade_id", "")
    return found if isinstance(found, str) else ""


def mend(submitted: NotebookNode, blank: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """Return a submission with the teacher's metadata and missing cells, and what was odd about it.

    Of a doubled cell the last one counts. Deleted and edited checks become the exercise's; nbgrader
    then puts in the hidden tests, by checksum.

    Raises:
        Unreadable: it has no graded cell of this exercise.
    """
    nb, odd = copy.deepcopy(submitted), []
    known = {grade_id_of(cell): cell for cell in blank.cells if grade_id_of(cell)}
    if not known.keys() & {grade_id_of(cell) for cell in nb.cells}:
        raise Unreadable("no cell of this exercise in it: another exercise's, or a new notebook")
    seen: set[str] = set()
    for cell in reversed(nb.cells):
        name = grade_id_of(cell)
        if name in seen or (name and name not in known):
            odd.append(f"{name} {'stands twice' if name in seen else 'is not of this exercise'}")
            del cell.metadata["nbgrader"]
        elif name:
            seen.add(name)
            teachers = known[name]
            cell.metadata = copy.deepcopy(teachers.metadata)
            if cell.source.strip() != teachers.source.strip() and locked(teachers):
                odd.append(f"{name} edited")
            if locked(teachers) or cell.cell_type != teachers.cell_type:
                cell = _replaced(nb, cell, teachers)
    odd = [*reversed(odd), *_put_back(nb, blank, seen)]
    odd = [_together(odd, what) for what in dict.fromkeys(line.split(" ", 1)[1] for line in odd)]
    if any(ODD.search(cell.source) for cell in nb.cells if cell.cell_type == "code"):
        words = {w for c in nb.cells if c.cell_type == "code" for w in ODD.findall(c.source)}
        odd.append(f"look at it: {', '.join(sorted(words))}")
    return nb, odd


def _together(odd: list[str], what: str) -> str:
    names = [line.split(" ", 1)[0] for line in odd if line.split(" ", 1)[1] == what]
    return f"{', '.join(names)} {what}"


def locked(cell: NotebookNode) -> bool:
    """Whether it is a check cell, which learners don't edit."""
    return bool(cell.metadata.get("nbgrader", {}).get("locked"))


def _replaced(nb: NotebookNode, old: NotebookNode, teachers: NotebookNode) -> NotebookNode:
    new = copy.deepcopy(teachers)
    if not locked(teachers):
        new.source = old.source
    place = next(i for i, cell in enumerate(nb.cells) if cell is old)
    nb.cells[place] = new
    return new


def _put_back(nb: NotebookNode, blank: NotebookNode, seen: set[str]) -> list[str]:
    """Insert each missing graded cell behind the one that comes before it in the exercise."""
    odd, before = [], ""
    for cell in blank.cells:
        name = grade_id_of(cell)
        if name and name not in seen:
            places = [i for i, c in enumerate(nb.cells) if before and grade_id_of(c) == before]
            nb.cells.insert(places[0] + 1 if places else len(nb.cells), copy.deepcopy(cell))
            odd.append(f"{name} missing")
        before = name or before
    return odd


def code_cells(nb: NotebookNode) -> list[dict[str, Any]]:
    """What the jury is to do, a job for each code cell."""
    jobs: list[dict[str, Any]] = []
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        task = CHECK.search(cell.source) if locked(cell) else None
        if task:
            jobs.append({"task": task[1], "function": task[2]})
        else:
            jobs.append({"source": cell.source})
    return jobs
