"""Grade a folder of submissions: a line for each, nobody's mishap touching another."""

from __future__ import annotations

import csv
import hashlib
import json
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from nbformat import NotebookNode

from unfool.exercises import SOLUTIONS, sources
from unfool.files import write_text
from unfool.grading.gradebook import Book
from unfool.grading.sandbox import Limits, Report, judge, namespaces
from unfool.grading.submissions import (
    NAME,
    Submission,
    Unreadable,
    code_cells,
    find,
    mend,
    read,
)
from unfool.notebooks import REPO, UsageError

OUT = REPO / "work" / "grading"


@dataclass
class Line:
    """What is said of one submission."""

    student: str
    exercise: str
    points: float = 0.0
    of: float = 0.0
    to_read: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    key: str = ""  # of everything that the grade depends on; "" is graded again

    def text(self) -> str:
        """In words, without names."""
        if not self.of:
            return f"not graded: {'; '.join(self.notes)}"
        read = f", {self.to_read} to read" if self.to_read else ""
        notes = f"  ({'; '.join(self.notes)})" if self.notes else ""
        return f"{self.points:g} of {self.of:g} points{read}{notes}"


def grade(
    submissions: Path,
    out: Path = OUT,
    limits: Limits | None = None,
    *,
    jobs: int = 2,
    seed: int | None = None,
    students: Path | None = None,
    again: bool = False,
    solutions: Path = SOLUTIONS,
    stream: TextIO | None = None,
) -> list[Line]:
    """Grade everything in a folder and write gradebook, tables and feedback pages to `out`.

    What was graded is not graded again unless the file, the exercise, a check or a limit changed.

    Args:
        submissions: a folder for each student.
        out: nbgrader's course folder; its gradebook.db also holds what readers entered by hand.
        jobs: how many are judged at once, each in up to `limits.memory`.
        seed: of the checks' inputs, the same for all; None keeps that of the last call, or draws.
        students: a CSV file with the columns id, first_name, last_name, email.
        again: grade all of them again.

    Raises:
        UsageError: nothing to grade, or a misused option; before anything is run.
    """
    stream, limits = stream or sys.stdout, limits or Limits()
    if jobs < 1 or min(asdict(limits).values()) <= 0:
        raise UsageError("--jobs and the limits must be above 0")
    known = {path.stem: path for path in sources(solutions)}
    if not known:
        raise UsageError(f"no solutions in {solutions}: grading needs them")
    found = find(submissions, list(known))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "gradebook.db").exists():  # deleted: nothing of it is graded any more
        (out / "graded.json").unlink(missing_ok=True)
    book, state = Book(out), _State(out / "graded.json", seed)
    book.register([{"id": one.student} for one in found if NAME.fullmatch(one.student)])
    book.register(_roll(students))
    blanks = {
        e: book.add_exercise(known[e]) for e in sorted({s.exercise for s in found} & set(known))
    }
    print(_heading(len(found), limits, state.seed), file=stream, flush=True)
    lines = _all(found, book, blanks, limits, state, jobs, again, known, stream)
    book.export()
    by_student: dict[str, dict[str, str]] = {}
    for line in lines:
        by_student.setdefault(line.student, {})[line.exercise] = line.text()
    book.pages({name: said for name, said in by_student.items() if NAME.fullmatch(name)})
    write_text(out / "report.txt", "".join(f"{_named(line)}\n" for line in lines))
    print(f"\n{_total(lines)}\ngrades, feedback and gradebook: {out}", file=stream)
    return lines


def _all(
    found: list[Submission],
    book: Book,
    blanks: dict[str, NotebookNode],
    limits: Limits,
    state: _State,
    jobs: int,
    again: bool,
    known: dict[str, Path],
    stream: TextIO,
) -> list[Line]:
    lines: dict[tuple[str, str], Line] = {}

    def done(line: Line) -> None:
        lines[line.student, line.exercise] = line
        print(f"[{len(lines):3}/{len(found)}] {_named(line)}", file=stream, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        pending = {}
        for one in found:
            line, nb = _prepared(one, book, blanks, known, limits, state)
            before = state.line(one)
            if nb is None:
                done(line)
            elif before and before.key == line.key and not again:
                done(before)
            else:
                pending[pool.submit(judge, code_cells(nb), state.seed, limits)] = (line, nb)
        for future in as_completed(pending):  # nbgrader works in this thread only
            line, nb = pending[future]
            _file(line, nb, future.result(), book)
            state.keep(line)
            done(line)
    return [lines[s.student, s.exercise] for s in found]


def _prepared(
    one: Submission,
    book: Book,
    blanks: dict[str, NotebookNode],
    known: dict[str, Path],
    limits: Limits,
    state: _State,
) -> tuple[Line, NotebookNode | None]:
    """A line with the submission's key, and the notebook to judge; None if it can't be."""
    line = Line(one.student, one.exercise)
    try:
        if one.problem:
            raise Unreadable(one.problem)
        nb, line.notes = mend(read(one.path), blanks[one.exercise])
        nb = book.sanitised(nb, one.exercise, one.student)
    except Unreadable as error:
        line.notes = [str(error)]
        return line, None
    parts = [one.path.read_bytes(), known[one.exercise].read_bytes(), _checks()]
    parts.append(repr((state.seed, limits)).encode())
    line.key = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()
    return line, nb


def _file(line: Line, nb: NotebookNode, report: Report, book: Book) -> None:
    """Enter what the jury said of a submission; sets the line's points and notes."""
    if any(cell.get("tampered") for cell in report.cells):
        line.notes.append("it changes the checks")
    if any(cell.get("full") for cell in report.cells):
        line.notes.append("prints more than is kept")
    ended = [c["error"][0] for c in report.cells if c.get("error")]
    if ended:
        line.notes.append(f"cells end with {', '.join(dict.fromkeys(ended))}")
    if report.reason:
        line.notes.append(report.reason)
    points = book.file(nb, line.exercise, line.student, report)
    line.points, line.of, line.to_read = points.earned, points.checked, points.to_read
    line.seconds = round(report.seconds, 1)


class _State:
    """What was graded, in a file beside the gradebook: written after every submission."""

    def __init__(self, path: Path, seed: int | None) -> None:
        self.path = path
        stored = _stored(path)
        self.lines: dict[str, Any] = stored.get("lines", {})
        drawn = stored.get("seed", secrets.randbelow(2**31))
        self.seed = int(drawn if seed is None else seed)

    def line(self, one: Submission) -> Line | None:
        found = self.lines.get(f"{one.student}/{one.exercise}")
        return Line(**found) if found else None

    def keep(self, line: Line) -> None:
        self.lines[f"{line.student}/{line.exercise}"] = asdict(line)
        text = json.dumps({"seed": self.seed, "lines": self.lines}, indent=1, sort_keys=True)
        write_text(self.path, text + "\n")


def _stored(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _checks() -> bytes:
    folder = Path(__file__).parents[1] / "checks"  # not imported: it needs torch
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def _roll(path: Path | None) -> list[dict[str, str]]:
    if path is None:
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("id", "first_name", "last_name", "email")
    if not rows or not rows[0].get("id"):
        raise UsageError(f"{path} needs a first line with: {','.join(names)}")
    return [{name: row[name] for name in names if row.get(name)} for row in rows]


def _heading(count: int, limits: Limits, seed: int) -> str:
    kept = "no network, own processes only" if namespaces() else "NOT cut off from the network"
    return (
        f"{count} notebooks; each has {limits.seconds:g} s, {limits.memory} MB, "
        f"{limits.processes} processes, {limits.output} kB of output; {kept}; seed {seed}"
    )


def _named(line: Line) -> str:
    return f"{line.student:<16} {line.exercise:<20} {line.seconds:6.1f} s  {line.text()}"


def _total(lines: list[Line]) -> str:
    good = [line for line in lines if line.of]
    share = sum(line.points for line in good) / max(1e-9, sum(line.of for line in good))
    return f"{len(good)} graded, {len(lines) - len(good)} not; {share:.0%} of the points"
