"""Exporters for nbgrader: a table that Moodle imports, and one that Canvas imports.

`make grade` writes both; by hand: `nbgrader export --exporter=unfool.grading.exports.Moodle`.
A student without a submission gets 0, as in nbgrader's own export.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.plugins import ExportPlugin

from unfool.files import write_text


class _Table(ExportPlugin):
    default_name = ""

    def export(self, gradebook: Gradebook) -> None:
        """Write the table to `--to`, by default in the current folder."""
        rows = list(self.rows(gradebook, self._assignments(gradebook), self._students(gradebook)))
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        write_text(Path(self.to or self.default_name), text.getvalue())

    def rows(self, gradebook: Any, assignments: list[Any], students: list[Any]) -> Iterable[Any]:
        """The table, its head first."""
        raise NotImplementedError

    def _assignments(self, gradebook: Any) -> list[Any]:
        return [
            a for a in gradebook.assignments if not self.assignment or a.name in self.assignment
        ]

    def _students(self, gradebook: Any) -> list[Any]:
        found = [s for s in gradebook.students if not self.student or s.id in self.student]
        return sorted(found, key=lambda student: student.id)


class Moodle(_Table):
    """Moodle: Grades → Import → CSV file; match "ID number" or "Email address"."""

    default_name = "moodle.csv"

    def rows(self, gradebook: Any, assignments: list[Any], students: list[Any]) -> Iterable[Any]:
        """One row per student, a column of points per exercise."""
        yield ["ID number", "First name", "Last name", "Email address"] + [
            f"{a.name} (out of {a.max_score:g})" for a in assignments
        ]
        for s in students:
            about = [s.id, s.first_name or "", s.last_name or "", s.email or ""]
            yield about + [points(gradebook, a.name, s.id) for a in assignments]


class Canvas(_Table):
    """Canvas: Gradebook → Import; its second row says what each exercise is worth."""

    default_name = "canvas.csv"

    def rows(self, gradebook: Any, assignments: list[Any], students: list[Any]) -> Iterable[Any]:
        """One row per student, a column of points per exercise."""
        head = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
        yield head + [a.name for a in assignments]
        yield ["    Points Possible", "", "", "", ""] + [f"{a.max_score:g}" for a in assignments]
        for s in students:
            name = ", ".join(filter(None, [s.last_name, s.first_name])) or s.id
            about = [name, "", s.id, s.id, ""]  # the empty ID is Canvas's own number
            yield about + [points(gradebook, a.name, s.id) for a in assignments]


def points(gradebook: Any, assignment: str, student: str) -> str:
    """A student's points in an exercise, as text; "0" without a submission."""
    try:
        return f"{gradebook.find_submission(assignment, student).score:g}"
    except MissingEntry:
        return "0"
