"""The exercises: made from the solutions, leaking nothing, with checks that can't be fooled."""

from __future__ import annotations

import contextlib
import copy
import doctest
import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import anatomy
from classroom import Task, all_tasks, leaks, read, secrets, tags, tasks_of, words_of
from mutants import mutants
from unfool import checks
from unfool.checks import TASKS, demand, judging, verdict
from unfool.exercises import (
    COMMAND,
    EXERCISES,
    exercise,
    generate,
    run_solution,
    sources,
    stale,
    text_of,
)
from unfool.notebooks import REPO, UsageError, clean, write
from unfool.workspace import sync

SEEDS = range(100, 120)  # twenty that no notebook uses
ALL = all_tasks()
NOTEBOOKS = {path.name: path for path in sources()}
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")

task = pytest.mark.parametrize("name", ALL)
notebook = pytest.mark.parametrize("name", NOTEBOOKS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny tensors: a second thread only costs."""


# ------------------------------------------------------------------------------------- the pipeline


def test_exercises_are_what_the_solutions_make() -> None:
    assert stale() == [], f"exercises/ is out of date: run `{COMMAND}`"


def test_there_are_enough_tasks() -> None:
    assert len(NOTEBOOKS) >= 10
    assert len(ALL) >= 30
    assert sum(len(one.wrong) for one in ALL.values()) >= 90
    assert ALL.keys() == TASKS.keys(), "a task without a check, or a check without a task"


def test_generating_twice_is_the_same_and_mends_what_is_stale(tmp_path: Path) -> None:
    generate(exercises=tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert stale(exercises=tmp_path) == []
    name = next(iter(first))
    (tmp_path / name).write_bytes(first[name].replace(b"your code here", b"your code"))
    (tmp_path / "ex99_gone.ipynb").write_bytes(first[name])
    assert stale(exercises=tmp_path) == [name, "ex99_gone.ipynb"]
    lines = generate(exercises=tmp_path)
    assert lines[0] == f"wrote    {name}"
    assert lines[1] == "removed  ex99_gone.ipynb"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


CELL = """def f(x):
    y = x
    ### BEGIN SOLUTION
    y = 2 * x
    ### END SOLUTION
    return y"""


def test_what_stands_between_the_delimiters_goes() -> None:
    grading = {"grade": False, "grade_id": "f", "locked": False, "solution": True}
    hidden = "check()\n### BEGIN HIDDEN TESTS\nassert f(1) == 2\n### END HIDDEN TESTS"
    cells = [
        new_code_cell(CELL, metadata={"nbgrader": grading}, execution_count=1),
        new_code_cell(hidden, metadata={"nbgrader": {"grade": True, "locked": True}}),
        new_code_cell("def wrong(x): ...", metadata={"tags": ["wrong-answer"]}),
        new_markdown_cell("Say:\n### BEGIN SOLUTION\nSecret.\n### END SOLUTION"),
    ]
    made = exercise(new_notebook(cells=cells))
    code, check, text = (cell.source for cell in made.cells)
    assert code == "def f(x):\n    y = x\n    # your code here\n    return y"
    assert check == "check()"
    assert text == "Say:\n*Your answer here.*"
    assert made.cells[0].execution_count is None
    assert made.cells[1].metadata["editable"] is False
    assert "editable" not in made.cells[0].metadata
    assert cells[0].source == CELL  # the solution is left alone


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    ### END SOLUTION\n", ""),
        ("    ### BEGIN SOLUTION\n", ""),
        ("    y = 2 * x\n", "    ### BEGIN SOLUTION\n"),
        ("SOLUTION", "ANSWER"),
    ],
)
def test_delimiters_without_partner_are_refused(old: str, new: str) -> None:
    grading = {"solution": True}
    cell = new_code_cell(CELL.replace(old, new), metadata={"nbgrader": grading})
    with pytest.raises(ValueError, match=r"without|has no"):
        exercise(new_notebook(cells=[cell]))


def test_learners_get_the_exercises_in_work(tmp_path: Path) -> None:
    sync(REPO, tmp_path)
    handed = {path.name for path in (tmp_path / "exercises").iterdir()}
    assert handed == set(NOTEBOOKS)
    for path in (tmp_path / "exercises").iterdir():
        for link in re.findall(r"\]\((\.\./[^)]+)\)", words_of(read(path))):
            assert (path.parent / link).is_file(), link


def test_a_solution_that_fails_is_not_written_back(tmp_path: Path) -> None:
    nb = new_notebook(cells=[new_code_cell("1 / 0")])
    path = tmp_path / "ex01_zero.ipynb"
    write(nb, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        run_solution(path, tmp_path / "build")
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------- what a notebook is


def notebook_problems(nb: NotebookNode) -> list[str]:
    """What in a solution notebook is not as graders and learners expect it."""
    grading = [c.metadata["nbgrader"] for c in nb.cells if "nbgrader" in c.metadata]
    names = [g["grade_id"] for g in grading]
    problems = [f"grade_id {n} twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    keys = {"grade", "grade_id", "locked", "schema_version", "solution", "task"}
    problems += [f"{g['grade_id']}: metadata" for g in grading if not keys <= set(g)]
    problems += [f"{g['grade_id']}: no points" for g in grading if g["grade"] and not g["points"]]
    essays = [g for g in grading if g["grade"] and g["solution"]]
    problems += [] if len(essays) == 1 else [f"{len(essays)} written questions, one is asked"]
    texts = [c.source for c in nb.cells if c.source.startswith("## ")]
    stated = [re.match(r"## \d+\. .+ \((\d+) points?, (\d+) min\)\n", t) for t in texts]
    problems += [
        f"no points and minutes: {t[:40]!r}" for t, s in zip(texts, stated, strict=True) if not s
    ]
    points = [int(g["points"]) for g in grading if g["grade"]]
    if points != [int(s[1]) for s in stated if s]:
        problems.append("the points in the headings are not those of the cells")
    total = (
        f"{len(texts)} tasks, {sum(points)} points, about {sum(int(s[2]) for s in stated if s)} m"
    )
    problems += [] if total in nb.cells[1].source else [f"the second cell must say: {total}"]
    rubrics = [re.findall(r"^\| (\d) \|", t, re.MULTILINE) for t in texts]
    levels = [r for r in rubrics if r]
    problems += [] if [len(r) for r in levels] == [4] else ["a rubric has four levels"]
    return problems


def task_problems(one: Task) -> list[str]:
    """What a task lacks: a short idea, an example, a stub, three wrong answers."""
    idea = one.text.split("\n", 1)[1].split(f"`{one.function}(")[0]
    problems = [] if 5 <= anatomy.words(idea) <= 60 else [f"idea of {anatomy.words(idea)} words"]
    problems += [] if f"`{one.function}(" in one.text else ["no signature"]
    example = one.text.split(f"`{one.function}(")[-1]
    problems += [] if len(re.findall(r"\d", example)) >= 2 else ["no example with numbers"]
    above = one.code.source.split("### BEGIN SOLUTION")[0]
    problems += [] if re.search(r"^ {4}\w.* = ", above, re.MULTILINE) else ["no live stub"]
    problems += [] if len(one.wrong) >= 3 else [f"{len(one.wrong)} wrong answers"]
    lines = one.code.source.split("### BEGIN SOLUTION")[1].split("### END")[0].strip()
    return problems + ([] if lines.count("\n") < 15 else ["a long solution"])


@notebook
def test_notebook_is_complete(name: str) -> None:
    nb = anatomy.read(NOTEBOOKS[name])
    assert notebook_problems(nb) == []
    assert {one.name: p for one in tasks_of(nb) if (p := task_problems(one))} == {}


@notebook
def test_solution_is_committed_freshly_run(name: str) -> None:
    nb = anatomy.read(NOTEBOOKS[name])
    assert clean(nb) == nb, "run `unfool exercises --run`"
    for rule in ("plain", "network", "absolute_paths", "kernel", "committed", "counts", "errors"):
        assert anatomy.RULES[rule](nb) == [], rule
    for one in tasks_of(nb):
        assert anatomy.printed_lines(one.check) == [f"right: {one.name}"]
        for cell in one.wrong:
            (line,) = anatomy.printed_lines(cell)
            assert line.startswith(f"not yet: {one.name}: ")
    made = read(EXERCISES / name)
    assert len(NOTEBOOKS[name].read_bytes()) < 100_000
    assert all(not cell.get("outputs") for cell in made.cells)
    assert anatomy.RULES["kernel"](made) == []


def test_notebook_rules_bite() -> None:
    good = read(next(iter(NOTEBOOKS.values())))

    def doctored(change: Callable[[NotebookNode], Any]) -> list[str]:
        nb = copy.deepcopy(good)
        change(nb)
        return notebook_problems(nb)

    first = next(i for i, c in enumerate(good.cells) if c.metadata.get("nbgrader", {}).get("grade"))
    assert doctored(lambda nb: nb.cells.append(nb.cells[first])) != []
    assert doctored(lambda nb: nb.cells[first].metadata["nbgrader"].update(points=9)) != []
    assert doctored(lambda nb: nb.cells[first].metadata["nbgrader"].pop("locked")) != []
    one = copy.deepcopy(tasks_of(good)[0])
    assert task_problems(one) == []
    one.wrong, one.text = [], f"## 1. x\n\n{'word ' * 70}"
    one.code.source = "def f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION"
    assert len(task_problems(one)) == 5


def table_of(nb: NotebookNode) -> list[str]:
    """The rows that a notebook's tasks have in the teacher's table, what they teach left out."""
    rows = []
    for text, cell in pairwise(nb.cells):
        found = re.match(r"## \d+\. .+ \((\d+) points?, (\d+) min\)", text.source)
        if found:
            rows.append(f"| `{cell.metadata.nbgrader.grade_id}` | {found[2]} | {found[1]} |")
    return rows


def test_teachers_table_is_that_of_the_notebooks() -> None:
    guide = (REPO / "solutions" / "README.md").read_text("utf-8")
    table = re.findall(r"^(\| `ex\d\d_\w+` \|) [^|]{10,} (\|.*)$", guide, re.MULTILINE)
    rows = [row for path in NOTEBOOKS.values() for row in table_of(read(path))]
    assert [f"{name[:-2]} {rest}" for name, rest in table] == rows
    assert f"Twelve notebooks, {len(rows)} tasks ({len(ALL)} checked" in guide
    points = sum(int(row.split("|")[-2]) for row in rows)
    assert f"{points} points" in guide


@task
def test_worked_example_holds(name: str) -> None:
    one = ALL[name]
    space = {one.function: one.defined(one.code.source), "torch": torch}
    shown = "\n".join(re.findall(r"^```python\n(.*?)^```", one.text, re.DOTALL | re.MULTILINE))
    found = doctest.DocTestParser().get_doctest(shown, space, name, None, 0)
    report = io.StringIO()
    failed, _ = doctest.DocTestRunner(verbose=False).run(found, out=report.write)
    assert not failed, report.getvalue()


# ----------------------------------------------------------------------------- right, blank, wrong


@task
def test_solution_is_right_under_every_seed(name: str) -> None:
    function = ALL[name].defined(ALL[name].code.source)
    found = {seed: verdict(name, function, seed).message for seed in SEEDS}
    assert {seed: message for seed, message in found.items() if message} == {}


def by_backward(model: Any, x: Any, y: Any, eps: float) -> Any:
    image = torch.nn.Parameter(x.clone())
    torch.nn.functional.cross_entropy(model(image), y, reduction="sum").backward()
    return torch.clip(image + torch.sign(image.grad) * eps, 0.0, 1.0)


def all_pairs(alpha: Any, beta: Any) -> Any:
    gain, loss = alpha[:, None] + alpha, -(beta[:, None] + beta)
    score = torch.where((gain > 0) & (loss > 0), gain * loss, 0).triu(diagonal=1)
    return torch.tensor(divmod(int(score.argmax()), len(alpha)))


def uniform(x: Any, eps: float, generator: Any) -> Any:
    return (x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)).clip(0, 1)


def by_counting(clean: Any, attacked: Any, purified: Any) -> Any:
    lost = clean & ~attacked
    return [float(lost.sum() / clean.sum()), (lost & purified).sum() / lost.sum()]


OTHER_WAYS: list[tuple[str, Callable[..., Any]]] = [
    ("ex01_confidence", lambda z: torch.exp(z.amax(1) - z.logsumexp(1))),
    ("ex01_cross_entropy", lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none")),
    ("ex01_confusion", lambda y, p, k: torch.bincount(k * y + p, minlength=k * k).view(k, k)),
    ("ex02_fgsm", by_backward),
    ("ex02_project_linf", lambda a, x, eps: torch.max(torch.min(a, x + eps), x - eps)),
    ("ex02_project_l2", lambda a, x, eps: x + torch.renorm(a - x, 2, 0, eps)),
    ("ex02_random_start", uniform),
    ("ex03_to_image", lambda w: torch.sigmoid(2 * w)),
    ("ex03_to_w", lambda x: torch.logit(x, eps=1e-6) / 2),
    ("ex04_jacobian", lambda f, x: torch.autograd.functional.jacobian(f, x).view(-1, x.numel())),
    ("ex04_best_pair", all_pairs),
    ("ex05_can_flip", lambda x, eps: torch.where(x > 0.5, x - eps <= 0.5, x + eps > 0.5)),
    ("ex06_generator_loss", lambda z: torch.nn.functional.softplus(-z).mean().item()),
    ("ex07_recovered", by_counting),
    ("ex10_threshold", lambda s, r: s.topk(int(r * len(s)) + 1).values.min().item()),
    ("ex11_worst_case", lambda right: 1 - (~right).any(0).double().mean().item()),
    ("ex12_masking_signs", lambda r: [n for n, holds in judging.SIGNS.items() if holds(r)]),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(OTHER_WAYS)))
def test_other_right_answers_pass_as_well(place: int) -> None:
    name, function = OTHER_WAYS[place]
    assert [found.message for seed in SEEDS if not (found := verdict(name, function, seed))] == []


@notebook
def test_blank_exercise_runs_to_its_end_and_gets_nothing(name: str) -> None:
    made = read(EXERCISES / name)
    space: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in made.cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
    lines = printed.getvalue().splitlines()
    tasks = tasks_of(read(NOTEBOOKS[name]))
    assert [line.split(": ")[:2] for line in lines] == [["not yet", one.name] for one in tasks]
    assert all(len(line.split(": ", 2)[2]) > 20 for line in lines)
    for one in tasks:
        assert not any(verdict(one.name, space[one.function], seed) for seed in SEEDS), one.name


@task
def test_wrong_answers_are_caught_with_the_intended_message(name: str) -> None:
    missed = []
    for phrase, function in ALL[name].wrong_answers():
        for seed in SEEDS:
            found = verdict(name, function, seed)
            if found.passed or phrase not in found.message:
                missed.append((phrase, seed, found.message))
    assert missed == []


def test_graded_run_raises_and_its_seed_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(ALL))
    demand(name, ALL[name].defined(ALL[name].code.source))
    (_, wrong), *_ = ALL[name].wrong_answers()
    monkeypatch.setenv("UNFOOL_CHECK_SEED", "77")
    with pytest.raises(AssertionError, match=f"{name}, seed 77: "):
        demand(name, wrong)
    monkeypatch.delenv("UNFOOL_CHECK_SEED")
    drawn = set()
    for _ in range(3):
        with pytest.raises(AssertionError) as raised:
            demand(name, wrong)
        drawn.add(str(raised.value).split(":")[0])
    assert len(drawn) == 3


# ------------------------------------------------------------------------- functions from strangers


def leave(*inputs: Any) -> None:
    raise SystemExit


def shout(*inputs: Any) -> Any:
    print("x" * 1000)
    return inputs[0]


STRANGERS: dict[str, Callable[..., Any]] = {
    "raises": lambda *inputs: 1 / 0,
    "leaves": leave,
    "returns nothing": lambda *inputs: None,
    "wants no inputs": lambda: 1,
    "a string": lambda *inputs: "fgsm",
    "an empty tuple": lambda *inputs: (),
    "a pair of objects": lambda *inputs: (object(), object()),
    "NaN": lambda *inputs: torch.full((2, 3), torch.nan),
    "an odd shape": lambda *inputs: torch.zeros(7, 0, 2),
    "another type": lambda *inputs: torch.zeros(3, dtype=torch.complex64),
    "a huge number": lambda *inputs: 10**400,
    "its own input": shout,
    "a function": lambda *inputs: lambda *more: None,
}


@task
def test_strange_functions_become_a_verdict(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    for kind, function in STRANGERS.items():
        found = verdict(name, function)
        assert not found.passed, kind
        assert 10 < len(found.message) < 400, (kind, found.message)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(state, torch.random.get_rng_state())


@task
def test_a_function_that_changes_its_inputs_is_told(name: str) -> None:
    right = ALL[name].defined(ALL[name].code.source)
    touched = []

    def vandal(*inputs: Any) -> Any:
        result = right(*inputs)
        for one in inputs:
            if isinstance(one, torch.Tensor) and one.numel() and not one.requires_grad:
                one.copy_(one.logical_not() if one.dtype == torch.bool else one + 1)
                touched.append(one)
        return result

    found = verdict(name, vandal)
    assert not touched or "in place" in found.message, found.message


def test_what_is_no_function_and_no_task() -> None:
    name = next(iter(ALL))
    assert "without" not in verdict(name, 3).message  # type: ignore[arg-type]
    assert "give the function itself" in verdict(name, 3).message  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no task 'ex99_x': there are ex"):
        checks.check("ex99_x", print)


# -------------------------------------------------------------------------------------- the mutants


class TooLong(BaseException):
    """A mutant that never ends; no Exception, so that no check takes it for one."""


@contextlib.contextmanager
def seconds(limit: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    if not hasattr(signal, "setitimer"):  # Windows: no mutant here loops for ever
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survives(one: Task, source: str) -> bool:
    """Whether a mutant passes the check under three seeds."""
    try:
        with seconds(5):
            function = one.defined(source)
            return all(verdict(one.name, function, seed) for seed in SEEDS[:3])
    except (TooLong, Exception):
        return False


def test_mutants_are_caught_or_mean_the_same() -> None:
    equivalent: dict[str, dict[str, str]] = json.loads(EQUIVALENT.read_text("utf-8"))
    count, survivors = 0, set()
    for name, one in ALL.items():
        for what, source in mutants(one.code.source).items():
            count += 1
            if survives(one, source):
                survivors.add((name, what))
    known = {(name, what) for name, of in equivalent.items() for what in of}
    assert sorted(survivors - known) == [], "mend the check, or file the reason"
    assert sorted(known - survivors) == [], "filed as equivalent, yet caught or gone"
    assert count >= 500
    assert len(survivors) <= 0.03 * count, f"{len(survivors)} of {count}"


def test_mutator_knows_its_operators() -> None:
    source = (
        "def f(x, n):\n    y = 0\n    ### BEGIN SOLUTION\n    if n < 2:\n        y = -x.abs() + n\n"
        "    ### END SOLUTION\n    return y"
    )
    made = {what.split(" | ")[1] for what in mutants(source)}
    assert {"n < 2 -> n <= 2", "2 -> 3", "-x.abs() -> x.abs()", "x.abs() -> x"} <= made
    assert {"-x.abs() + n -> -x.abs() - n", "y = -x.abs() + n -> pass"} <= made
    assert not any(what.startswith("y = 0") for what in made)  # the stub is no answer


# ------------------------------------------------------------------------------------ the leak gate


def test_no_exercise_leaks() -> None:
    for name, path in NOTEBOOKS.items():
        secret = secrets(read(path))
        assert len(secret) > 20
        assert leaks(words_of(read(EXERCISES / name)), secret) == [], name
        assert leaks((EXERCISES / name).read_text("utf-8"), secret) == [], name


def test_nothing_else_that_learners_get_holds_a_solution() -> None:
    texts = {p: p.read_text("utf-8") for p in (REPO / "lib/unfool/checks").glob("*.py")}
    texts |= {p: p.read_text("utf-8") for p in EXERCISES.glob("*")}
    for name, source in NOTEBOOKS.items():
        long = [line for line in secrets(read(source)) if len(line) >= 30]
        for path, text in texts.items():
            assert leaks(text, long) == [], f"{path.name} holds lines of {name}"


@notebook
def test_planted_leaks_are_found(name: str) -> None:
    solution = read(NOTEBOOKS[name])
    made, secret = words_of(exercise(solution)), secrets(solution)
    assert leaks("\n".join([made, *secret]), secret) == secret
    for line in secret[::5]:
        assert line in leaks(f"{made}\n  # {line.replace(' ', '   ')}  ", secret)
    for cell in solution.cells:
        if "wrong-answer" in tags(cell) or "### BEGIN SOLUTION" in cell.source:
            assert leaks(f"{made}\n{cell.source}", secret) != []


def test_written_file_is_the_text() -> None:
    for name, path in NOTEBOOKS.items():
        assert (EXERCISES / name).read_text("utf-8") == text_of(exercise(nbformat.read(path, 4)))
