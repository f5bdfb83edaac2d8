"""Grading: each submission gets what it earned, and none can hurt another or help itself."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from unfool import checks
from unfool.checks import one_step, verdict
from unfool.exercises import EXERCISES, SOLUTIONS
from unfool.grading import run, sandbox, warden
from unfool.grading.jury import Guard, Tampered
from unfool.grading.run import Line, grade
from unfool.grading.sandbox import Limits, judge
from unfool.grading.submissions import Unreadable, find, grade_id_of, mend, read
from unfool.notebooks import UsageError

EX = "ex02_one_step"
ALL, HALF = 12, 5  # points of the checked tasks of ex02, and of its first three


def blank() -> NotebookNode:
    return nbformat.read(EXERCISES / f"{EX}.ipynb", as_version=4)


def solved(tasks: int = 6) -> NotebookNode:
    """The exercise with the first tasks solved."""
    answers = {
        grade_id_of(cell): cell.source
        for cell in nbformat.read(SOLUTIONS / f"{EX}.ipynb", as_version=4).cells
    }
    nb, left = blank(), tasks
    for cell in nb.cells:
        name = grade_id_of(cell)
        if name and cell.cell_type == "code" and not name.endswith("_check") and left:
            cell.source, left = answers[name], left - 1
    return nb


def with_cell(nb: NotebookNode, source: str) -> NotebookNode:
    """The notebook with a cell of the learner's own before the first task."""
    nb.cells.insert(3, new_code_cell(source))
    return nb


def place(nb: NotebookNode, name: str) -> int:
    return next(i for i, cell in enumerate(nb.cells) if grade_id_of(cell) == name)


def edited(nb: NotebookNode, name: str, source: str) -> NotebookNode:
    nb.cells[place(nb, name)].source = source
    return nb


def without(nb: NotebookNode, *names: str) -> NotebookNode:
    nb.cells = [cell for cell in nb.cells if grade_id_of(cell) not in names]
    return nb


def doubled(nb: NotebookNode, name: str) -> NotebookNode:
    nb.cells.insert(4, copy.deepcopy(nb.cells[place(nb, name)]))
    return nb


# -------------------------------------------------------------------------------- what is handed in

FORK_BOMB = "import os\nwhile True:\n    os.fork()"
PATCH = """import unfool.checks as c
c.verdict = lambda *a, **k: c.Verdict(True)
c.check = c.demand = lambda *a, **k: print("right")"""
DROP = """def nothing(lines):
    return []
get_ipython().input_transformers_cleanup.append(nothing)"""
LATE = """def fgsm(model, x, y, eps):
    from unfool.checks import one_step
    kept = one_step.same
    def fake(*a, **k):
        one_step.same = kept
    one_step.same = fake
    return x"""
LIAR = """def fgsm(model, x, y, eps):
    class Liar(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.isclose:
                return torch.ones(5, 1, 4, 4, dtype=torch.bool)
            return super().__torch_function__(func, types, args, kwargs or {})
    return x.as_subclass(Liar)"""
LOOP = "def fgsm(model, x, y, eps):\n    while True:\n        pass"
DAEMON = """import subprocess
subprocess.Popen(["setsid", "sleep", "98765"], start_new_session=True)"""


@dataclass
class Case:
    """A submission, the points that it must get (None: it can't be graded), what must be said."""

    content: NotebookNode | str
    points: float | None
    said: str = ""
    name: str = f"{EX}.ipynb"


def small() -> dict[str, Case]:
    """One of each kind."""
    return {
        "right": Case(solved(), ALL),
        "half": Case(solved(3), HALF),
        "blank": Case(blank(), 0),
        "nojson": Case('{"cells": [', None, "not JSON"),
        "other": Case((EXERCISES / "ex01_classifier.ipynb").read_text("utf-8"), None, "another"),
        "cells": Case(
            doubled(without(solved(), "ex02_bim", "ex02_fgsm_check"), "ex02_fgsm"),
            ALL - 3,
            "ex02_fgsm stands twice; ex02_fgsm_check, ex02_bim missing",
        ),
        "edits": Case(edited(blank(), "ex02_fgsm_check", "pass"), 0, "ex02_fgsm_check edited"),
        "patch": Case(with_cell(blank(), PATCH), 0, "changes the checks"),
        "loop": Case(edited(solved(), "ex02_fgsm", LOOP), ALL - 2),
        "bomb": Case(with_cell(solved(), FORK_BOMB), 0, "stopped at"),
    }


def large() -> dict[str, Case]:
    """Twenty: four right, three half, two blank, and every kind of broken."""
    flood = "for _ in range(50):\n    print('x' * 10**6)"
    stored = solved()
    stored.cells[2].outputs = [nbformat.v4.new_output("stream", text="x" * 50_000_000)]
    return small() | {
        "right2": Case(solved(), ALL, name="ex02_mine (1).ipynb"),
        "right3": Case(with_cell(solved(), DAEMON), ALL),
        "stored": Case(stored, ALL),
        "half2": Case(solved(4), 7),
        "flood": Case(with_cell(solved(), flood), ALL, "prints more than is kept"),
        "exit": Case(with_cell(solved(), "import sys\nsys.exit()"), ALL, "SystemExit"),
        "end": Case(with_cell(solved(), "import os\nos._exit(0)"), 0, "process ended"),
        "drop": Case(with_cell(blank(), DROP), 0, "look at it"),
        "late": Case(edited(blank(), "ex02_fgsm", LATE), 0, "changes the checks"),
        "liar": Case(edited(blank(), "ex02_fgsm", LIAR), 0),
    }


def hand_in(cases: dict[str, Case], folder: Path) -> Path:
    for student, case in cases.items():
        path = folder / student / case.name
        path.parent.mkdir(parents=True)
        text = case.content if isinstance(case.content, str) else nbformat.writes(case.content)
        path.write_text(text, encoding="utf-8")
    return folder


def problems(cases: dict[str, Case], lines: list[Line]) -> list[str]:
    """Which submissions did not get what they must get."""
    found = {line.student: line for line in lines}
    wrong = [f"{student}: no line" for student in cases.keys() - found.keys()]
    for student, line in found.items():
        case = cases[student]
        points = line.points if line.of else None
        if points != case.points or case.said not in line.text():
            wrong.append(f"{student}: {line.text()}, expected {case.points} {case.said}")
    return wrong


@dataclass
class Graded:
    cases: dict[str, Case]
    handed: Path
    out: Path
    lines: list[Line]
    printed: str


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Graded:
    folder, stream = tmp_path_factory.mktemp("grading"), StringIO()
    cases = small()
    handed = hand_in(cases, folder / "handed")
    out = folder / "out"
    lines = grade(handed, out, Limits(seconds=60), seed=11, stream=stream)
    return Graded(cases, handed, out, lines, stream.getvalue())


# ------------------------------------------------------------------------------- what is promised


def test_each_gets_what_it_earned(graded: Graded) -> None:
    assert problems(graded.cases, graded.lines) == []
    swapped = {**graded.cases, "right": graded.cases["half"], "half": graded.cases["right"]}
    assert len(problems(swapped, graded.lines)) == 2  # the control


def test_a_line_for_each_with_progress(graded: Graded) -> None:
    for number in range(1, len(graded.cases) + 1):
        assert f"[{number:3}/{len(graded.cases)}]" in graded.printed
    report = (graded.out / "report.txt").read_text("utf-8").splitlines()
    assert [line.split()[0] for line in report] == sorted(graded.cases)


def test_tables(graded: Graded) -> None:
    def table(name: str) -> list[dict[str, str]]:
        with (graded.out / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    wanted = {student: case.points or 0 for student, case in graded.cases.items()}
    grades = {r["student_id"]: float(r["score"]) for r in table("grades.csv")}
    moodle = {r["ID number"]: float(r[f"{EX} (out of 16)"]) for r in table("moodle.csv")}
    canvas = {r["SIS User ID"]: float(r[EX]) for r in table("canvas.csv")}
    assert canvas.pop("") == 16  # the points possible
    assert grades == moodle == canvas == wanted


def test_feedback(graded: Graded) -> None:
    for student, case in graded.cases.items():
        page = (graded.out / "feedback" / student / "index.html").read_text("utf-8")
        there = (graded.out / "feedback" / student / EX / f"{EX}.html").exists()
        assert there == (case.points is not None) == (f'href="{EX}/' in page)
    page = (graded.out / "feedback" / "loop" / EX / f"{EX}.html").read_text("utf-8")
    assert "stopped after 15 s" in page
    assert "Score: 10.0" in page
    assert "<math" in page  # formulas are seen without a network
    assert 'src="http' not in page


def test_the_teachers_checks_are_back(graded: Graded) -> None:
    for student in ("edits", "cells"):
        path = graded.out / "autograded" / student / EX / f"{EX}.ipynb"
        nb = nbformat.read(path, as_version=4)
        source = nb.cells[place(nb, "ex02_fgsm_check")].source
        assert 'demand("ex02_fgsm", fgsm)' in source  # with its hidden test
    handed = read(graded.handed / "edits" / f"{EX}.ipynb")
    assert handed.cells[place(handed, "ex02_fgsm_check")].source == "pass"


def test_graded_ones_are_not_graded_again(graded: Graded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(cells: list[dict[str, str]], seed: int, limits: Limits) -> sandbox.Report:
        asked.append(seed)
        return sandbox.Report()

    monkeypatch.setattr(run, "judge", counted)
    limits = Limits(seconds=60)
    again = grade(graded.handed, graded.out, limits, stream=StringIO())
    assert asked == []
    assert again == graded.lines
    path = graded.handed / "blank" / f"{EX}.ipynb"
    path.write_text(nbformat.writes(with_cell(blank(), "1")), encoding="utf-8")
    grade(graded.handed, graded.out, limits, stream=StringIO())
    assert asked == [11]  # this one, with the seed of the first call
    grade(graded.handed, graded.out, limits, again=True, stream=StringIO())
    (graded.out / "gradebook.db").unlink()
    grade(graded.handed, graded.out, limits, seed=11, stream=StringIO())
    assert len(asked) == 1 + 2 * sum(case.points is not None for case in graded.cases.values())


@pytest.mark.long
def test_twenty_submissions(tmp_path: Path) -> None:
    cases = large()
    assert len(cases) == 20
    started = time.monotonic()
    lines = grade(hand_in(cases, tmp_path / "in"), tmp_path / "out", Limits(seconds=60))
    assert problems(cases, lines) == []
    assert time.monotonic() - started < 240
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 98765" not in left.stdout


# ------------------------------------------------------------------------------------ the sandbox

SETUP = {"source": "import torch"}
TASK = {"task": "ex02_worst_gain", "function": "worst_gain"}
ANSWER = {"source": "def worst_gain(w, eps):\n    return eps * w.abs().flatten(1).sum(dim=1)"}


def test_without_namespaces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `unshare` is not allowed the warden ends everything by itself."""
    monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    cells = [{"source": DAEMON.replace("98765", "87654")}, SETUP, ANSWER, TASK]
    assert judge(cells, 1, Limits(60)).cells[-1]["passed"] is True
    ended = judge([{"source": FORK_BOMB}, SETUP, ANSWER, TASK], 1, Limits(60))
    assert "stopped at" in ended.reason
    names = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [name for name in names if "sleep 87654" in name or "grading.jury" in name]


def test_a_child_that_was_just_forked_does_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows its parent's memory as its own, until it runs its own program a moment later."""
    monkeypatch.setattr(warden, "resident", lambda process: looks.pop(0) * 10**6)
    for seen, wanted in (
        ([900, 900, 900, 5], 905.0),
        ([900, 900, 900, 900], 1800.0),  # the control: it does hold that much
        ([900, 5], 905.0),  # one look, as nothing is over the limit
    ):
        looks = list(seen)
        assert warden.held([psutil.Process()] * 2, 1500) == wanted
        assert looks == []


def test_memory_and_time() -> None:
    hungry = {"source": "kept = [torch.ones(10**7) for _ in range(200)]"}
    ended = judge([SETUP, hungry, ANSWER, TASK], 1, Limits(seconds=60, memory=1500))
    assert "1500 are allowed" in ended.reason
    assert all("passed" not in cell for cell in ended.cells)
    stubborn = {"source": "import signal, time\nsignal.pthread_sigmask(0, [14])\ntime.sleep(99)"}
    slow = judge([SETUP, stubborn, ANSWER, TASK], 1, Limits(seconds=6))
    assert slow.reason == "stopped after 6 s"


def test_guard() -> None:
    guard = Guard()
    guard.demand()  # the control
    kept = one_step.same
    try:
        one_step.same = lambda *a, **k: None  # type: ignore[assignment]
        assert verdict("ex02_fgsm", lambda model, x, y, eps: x)  # what it would be worth
        with pytest.raises(Tampered, match="same"):
            guard.demand()
    finally:
        one_step.same = kept
    guard.demand()
    try:
        checks.TASKS["ex02_fgsm"], before = (lambda a, d: None), checks.TASKS["ex02_fgsm"]
        with pytest.raises(Tampered, match="TASKS"):
            guard.demand()
    finally:
        checks.TASKS["ex02_fgsm"] = before
    assert not verdict("ex02_fgsm", lambda model, x, y, eps: x)


def test_forged_lines_are_dropped() -> None:
    good = json.dumps({"cell": 0, "passed": True}).encode()
    lines = b"\n".join([good, b"x" + good, b"tok" + good, b"tok" + good, b"tok{"])
    assert len(list(sandbox._messages(lines, "tok"))) == 1


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"cells": 3, "nbformat": 4}', "[" * 100_000, '{"nbformat": 3}', "\x00"]
)
def test_what_is_no_notebook(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text(text, encoding="utf-8")
    with pytest.raises(Unreadable):
        read(tmp_path / "a.ipynb")
    (tmp_path / "b.ipynb").write_text(nbformat.writes(blank()), encoding="utf-8")
    assert len(read(tmp_path / "b.ipynb").cells) == len(blank().cells)


def test_names_and_links(tmp_path: Path) -> None:
    handed = hand_in({"a": Case(blank(), 0), "=b()": Case(blank(), 0)}, tmp_path / "in")
    (handed / "c").mkdir()
    (handed / "c" / f"{EX}.ipynb").symlink_to(handed / "a" / f"{EX}.ipynb")
    (handed / "d").mkdir()
    (handed / "d" / "essay.ipynb").write_text("{}", encoding="utf-8")
    said = {one.student: one.problem for one in find(handed, [EX])}
    assert said["a"] == ""
    assert "no student's" in said["=b()"]
    assert "a link" in said["c"]
    assert "of no exercise" in said["d"]
    with pytest.raises(UsageError, match="no folder"):
        find(tmp_path / "none", [EX])
    with pytest.raises(UsageError, match="no notebooks"):
        find(EXERCISES, [EX])


def test_edited_points_are_the_teachers() -> None:
    nb = blank()
    nb.cells[place(nb, "ex02_fgsm_check")].metadata["nbgrader"]["points"] = 999
    mended, odd = mend(nb, blank())
    assert mended.cells[place(mended, "ex02_fgsm_check")].metadata["nbgrader"]["points"] == 2
    assert odd == []
    with pytest.raises(Unreadable, match="no cell of this exercise"):
        mend(nbformat.read(EXERCISES / "ex01_classifier.ipynb", as_version=4), blank())
