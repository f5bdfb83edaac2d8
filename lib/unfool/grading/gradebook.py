"""nbgrader, headless: the teacher's cells, the points, the feedback pages, the tables.

nbgrader runs no code here. Its step that executes a notebook is replaced by one that writes in what
the jury said, so that a stranger's code is never in the process that holds the gradebook.
"""

from __future__ import annotations

import html
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateAssignment, GenerateFeedback
from nbgrader.coursedir import CourseDirectory
from nbgrader.plugins import CsvExportPlugin
from nbgrader.preprocessors import (
    CheckCellMetadata,
    DeduplicateIds,
    OverwriteCells,
    SaveAutoGrades,
)
from nbgrader.utils import setenv
from traitlets.config import Config

from unfool.exercises import CODE_STUB, TEACHERS, TEXT_STUB
from unfool.files import write_text
from unfool.grading.exports import Canvas, Moodle
from unfool.grading.sandbox import Report
from unfool.grading.submissions import locked
from unfool.notebooks import write
from unfool.report import without_network

LOG = logging.getLogger("unfool.grading")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False  # nbgrader warns of each cell that it puts back; our own lines say it


@dataclass(frozen=True)
class Points:
    """What a submission earned by the checks, of how many, and what waits for a reader."""

    earned: float
    checked: float
    to_read: int


class Book:
    """A course folder of nbgrader: source/, submitted/, autograded/, feedback/, gradebook.db."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = f"sqlite:///{folder / 'gradebook.db'}"
        bin_folder = Path(sys.executable).parent  # a new gradebook calls `alembic` by its name
        with setenv(PATH=os.pathsep.join([str(bin_folder), os.environ.get("PATH", "")])):
            Gradebook(self.database).close()

    def add_exercise(self, solution: Path) -> NotebookNode:
        """File an exercise's cells, points and hidden tests; returns what learners get of it."""
        nb = nbformat.read(solution, as_version=4)
        nb.cells = [c for c in nb.cells if not TEACHERS & set(c.metadata.get("tags", []))]
        name = solution.stem
        write(nb, self.folder / "source" / name / solution.name)
        self._convert(GenerateAssignment, name)
        released = self.folder / "release" / name / solution.name
        return nbformat.read(released, as_version=4)

    def sanitised(self, nb: NotebookNode, exercise: str, student: str) -> NotebookNode:
        """The notebook as it is graded: edited checks replaced, by their checksums."""
        about = {"student": student, "assignment": exercise, "notebook": exercise}
        resources = {"nbgrader": {**about, "db_url": self.database}}
        for step in (DeduplicateIds, OverwriteCells, CheckCellMetadata):
            nb, resources = step(log=LOG).preprocess(nb, resources)
        return nb

    def file(self, nb: NotebookNode, exercise: str, student: str, report: Report) -> Points:
        """Put a judged notebook into the gradebook and write its feedback page."""
        write(nb, self.folder / "submitted" / student / exercise / f"{exercise}.ipynb")

        def fill(nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
            write_in(nb, report)
            return nb, resources

        steps = [fill, SaveAutoGrades, CheckCellMetadata]
        self._convert(Autograde, exercise, student, autograde_preprocessors=steps)
        self._convert(GenerateFeedback, exercise, student)
        page = self.folder / "feedback" / student / exercise / f"{exercise}.html"
        write_text(page, without_network(page.read_text("utf-8"), exercise))
        return self.points(exercise, student)

    def points(self, exercise: str, student: str) -> Points:
        """What the gradebook says of a submission."""
        with Gradebook(self.database) as book:
            (notebook,) = book.find_submission(exercise, student).notebooks
            grades = [(g.cell.cell_type, g.auto_score, g.max_score) for g in notebook.grades]
            waiting = sum(g.needs_manual_grade and g.manual_score is None for g in notebook.grades)
        code = [(score or 0.0, most) for kind, score, most in grades if kind == "code"]
        return Points(sum(s for s, _ in code), sum(m for _, m in code), waiting)

    def register(self, students: Sequence[dict[str, str]]) -> None:
        """Enter students; each has an `id`, and may have `first_name`, `last_name`, `email`."""
        with Gradebook(self.database) as book:
            for student in students:
                book.update_or_create_student(student.pop("id"), **student)

    def export(self) -> None:
        """Write grades.csv, moodle.csv and canvas.csv."""
        with Gradebook(self.database) as book, chdir(self.folder):
            for exporter in (CsvExportPlugin, Moodle, Canvas):
                exporter(log=LOG).export(book)

    def pages(self, lines: dict[str, dict[str, str]]) -> None:
        """Write one page per student, which leads to the feedback on each exercise.

        Args:
            lines: student → exercise → what is said of it.
        """
        for student, said in lines.items():
            rows = "".join(self._row(student, exercise, text) for exercise, text in said.items())
            page = PAGE.format(student=html.escape(student), rows=rows)
            write_text(self.folder / "feedback" / student / "index.html", page)

    def _row(self, student: str, exercise: str, text: str) -> str:
        there = (self.folder / "feedback" / student / exercise / f"{exercise}.html").exists()
        name = html.escape(exercise)
        link = f'<a href="{name}/{name}.html">{name}</a>' if there else name
        return f"<tr><td>{link}</td><td>{html.escape(text)}</td></tr>\n"

    def _convert(
        self, converter: Callable[..., Any], exercise: str, student: str = "*", **traits: Any
    ) -> None:
        config = Config()
        config.CourseDirectory.root = str(self.folder)
        config.CourseDirectory.db_url = self.database
        config.CourseDirectory.assignment_id = exercise
        config.CourseDirectory.student_id = student
        config.ClearSolutions.code_stub = {"python": CODE_STUB}
        config.ClearSolutions.text_stub = TEXT_STUB
        config.HTMLExporter.sanitize_html = True  # a stranger's markdown runs no script
        course = CourseDirectory(config=config, log=LOG)
        step = converter(coursedir=course, config=config, log=LOG, force=True)
        for name, value in traits.items():
            setattr(step, name, value)
        with warnings.catch_warnings():  # SQLAlchemy's, of nbgrader's way with its sessions
            warnings.simplefilter("ignore")
            step.start()


def write_in(nb: NotebookNode, report: Report) -> None:
    """Give each code cell the outputs that the jury reported; a check without a verdict fails."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code):
        said = report.cells[number] if number < len(report.cells) else None
        cell.execution_count = number + 1 if said else None
        cell.outputs = list(_outputs(cell, said, report.reason))


def _outputs(cell: NotebookNode, said: dict[str, Any] | None, reason: str) -> list[NotebookNode]:
    if locked(cell) and cell.metadata["nbgrader"].get("grade"):
        if said and said.get("passed") is True:
            return [new_output("stream", name="stdout", text="right\n")]
        return [_error("NotYet", str((said or {}).get("message") or reason or "no verdict"))]
    if said is None:
        return []
    text = str(said.get("text") or "") + ("\n[cut here]\n" if said.get("full") else "")
    found = [new_output("stream", name="stdout", text=text)] if text else []
    return [*found, _error(*map(str, said["error"]))] if said.get("error") else found


def _error(name: str, value: str) -> NotebookNode:
    lines = textwrap.wrap(f"{name}: {value}", 80, break_long_words=False)
    return new_output("error", ename=name, evalue=value, traceback=lines)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Feedback: {student}</title>
<meta name="viewport" content="width=device-width">
<style>body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem; color: #222; background: #fff }}
td, th {{ text-align: left; padding: .4rem 1rem .4rem 0; vertical-align: top;
border-bottom: 1px solid #ccc }}</style></head>
<body><main><h1>{student}</h1>
<table><thead><tr><th>exercise</th><th>result</th></tr></thead><tbody>
{rows}</tbody></table></main></body></html>
"""
