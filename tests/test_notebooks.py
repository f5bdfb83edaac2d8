"""The runner of notebooks, on small notebooks of its own, and the gates built on it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import gates
from unfool import cli, notebooks, report, running
from unfool.notebooks import Result, Stop, UsageError, execute, find, validate_parameters

PARAMETERS = 'profile = "classroom"\nseed = 0\nepsilons = [0.1, 0.2]\nfast = True'
SEEDED = "import random\nprint('check ok   draws', random.Random(seed).random() < 2, seed)"
UNSEEDED = "import random\nprint(random.random())"
PICTURE = """from IPython.display import display
display({"text/plain": "a picture", "image/png": "%s"}, raw=True)"""
SAME_PICTURE, OTHER_PICTURE = PICTURE % "AAAA", PICTURE.replace('"%s"', "f'{random.random()}'")


def make(path: Path, *sources: str, printed: str = "") -> Path:
    """Write a notebook with a title, a parameters cell and one code cell for each source."""
    cells = [new_markdown_cell("# A question?"), new_code_cell(PARAMETERS)]
    cells[1].metadata["tags"] = ["parameters"]
    cells += [new_code_cell(source) for source in sources]
    if printed:
        cells[-1].outputs = [new_output("stream", name="stdout", text=printed)]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": notebooks.KERNELSPEC, "language_info": notebooks.LANGUAGE_INFO}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def printing(*lines: str) -> NotebookNode:
    cell = new_code_cell("", outputs=[new_output("stream", name="stdout", text="\n".join(lines))])
    return new_notebook(cells=[cell])


# ------------------------------------------------------------------------------ names, parameters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("01_first", "02_second", "90_unit"):
        make(tmp_path / "notebooks" / f"{name}.ipynb", "1")
    return tmp_path / "notebooks"


def test_find(folder: Path) -> None:
    assert [path.stem for path in find((), folder)] == ["01_first", "02_second"]
    assert [path.stem for path in find(("2", "01"), folder)] == ["02_second", "01_first"]
    assert [path.stem for path in find(("90", "90_unit.ipynb"), folder)] == ["90_unit"]


def test_find_unknown(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown notebook '7x': there are 01_first, 02_second"):
        find(("7x",), folder)
    with pytest.raises(UsageError, match="no notebooks in"):
        find((), tmp_path)


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}"])
def test_no_notebook(tmp_path: Path, text: str) -> None:
    (tmp_path / "01_a.ipynb").write_text(text)
    with pytest.raises(UsageError, match=r"cannot read .*01_a.ipynb as a notebook"):
        validate_parameters(tmp_path / "01_a.ipynb", {})


def test_parameters_are_read_as_the_notebook_has_them(folder: Path) -> None:
    given = {"profile": "3", "seed": "3", "epsilons": "[0.3]", "fast": "False"}
    expected = {"profile": "3", "seed": 3, "epsilons": [0.3], "fast": False}
    assert validate_parameters(folder / "01_first.ipynb", given) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sead", "3", "01_first has no parameter 'sead': it has profile, seed, epsilons, fast"),
        ("seed", "three", "parameter 'seed' must be a number, such as 0; got 'three'"),
        ("fast", "1", "must be a boolean"),
        ("epsilons", "0.1", "must be a list"),
    ],
)
def test_bad_parameters(folder: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_parameters(folder / "01_first.ipynb", {name: value})


# ------------------------------------------------------------------------- check lines, cleaning


def test_drift() -> None:
    old = printing("check ok   one", "a number 3", "check ok   two", "check ok   three")
    same = printing("check ok   one", "a number 4", "check ok   two", "check ok   three")
    other = printing("check ok   one", "check ok   2", "check ok   three", "check ok   four")
    assert notebooks.drift(old, same) == []
    assert notebooks.drift(old, other) == [
        "check ok   two → check ok   2",
        "(nothing) → check ok   four",
    ]


def dirty() -> NotebookNode:
    streams = [("stdout", "a"), ("stderr", "careful"), ("stdout", "b\n")]
    shown = [new_output("stream", name=name, text=text) for name, text in streams]
    shown.append(new_output("display_data", data={notebooks.WIDGET: {}, "text/plain": "0 %"}))
    cell = new_code_cell("1", execution_count=1, outputs=shown, id="kept")
    cell.metadata = nbformat.from_dict({"tags": ["check"], "papermill": {"duration": 1}})
    return new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {"x": 1}})


def test_clean() -> None:
    once = notebooks.clean(dirty())
    (cell,) = once.cells
    assert (cell.id, cell.metadata) == ("kept", {"tags": ["check"]})
    assert [output.text for output in cell.outputs] == ["ab\n"]
    assert set(once.metadata) == {"kernelspec", "language_info"}
    assert notebooks.clean(once) == once


def test_clean_refuses() -> None:
    injected = dirty()
    injected.cells[0].metadata["tags"] = ["injected-parameters"]
    with pytest.raises(ValueError, match="run with parameters"):
        notebooks.clean(injected)
    stale = dirty()
    stale.cells[0].execution_count = 4
    with pytest.raises(ValueError, match=r"not run freshly .* \[4\]"):
        notebooks.clean(stale)


def test_half_a_notebook_is_never_kept(tmp_path: Path) -> None:
    running, output = tmp_path / ".a.running.ipynb", tmp_path / "a.ipynb"
    text = make(tmp_path / "whole.ipynb", "1").read_text()
    running.write_text(text[: len(text) // 2])
    assert not notebooks._keep(running, output)
    assert not output.exists()
    assert not running.exists()
    running.write_text(text)
    assert notebooks._keep(running, output)
    assert read(output).cells


# ------------------------------------------------------------------------------------ real kernels


WRITE_RECORD = """import json, os, sys
record = {"schema": 1, "dataset": "d", "classifier": "c", "attack": "fgsm", "defense": None,
          "n_attacked": 7,
          "attack_success": 0.5, "end_to_end_accuracy": 0.25, "end_to_end_low": 0.1,
          "end_to_end_high": 0.4}
with open(os.environ["UNFOOL_RECORDS"], "a") as file:
    file.write(json.dumps(record) + "\\n")
print("careful", os.getpid(), file=sys.stderr)"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result], str]:
    """One run of three notebooks from another working directory: folder, results, what it said."""
    root = tmp_path_factory.mktemp("ran")
    where = "from pathlib import Path\nprint('in', Path.cwd().name, Path('beside.txt').exists())"
    make(root / "notebooks" / "01_seeded.ipynb", SAME_PICTURE, SEEDED, printed="check ok   old\n")
    make(root / "notebooks" / "02_fails.ipynb", where, "1 / 0", "print('no')")
    make(root / "notebooks" / "03_unseeded.ipynb", UNSEEDED, OTHER_PICTURE, WRITE_RECORD)
    (root / "notebooks" / "beside.txt").touch()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        results = running.run(
            out=Path("out"), jobs=2, report=False, folder=root / "notebooks", stream=said
        )
    return root, results, said.getvalue()


Ran = tuple[Path, list[Result], str]


def test_run_from_another_working_directory(ran: Ran) -> None:
    root, results, _ = ran
    assert [(result.name, result.ok) for result in results] == [
        ("01_seeded", True),
        ("02_fails", False),
        ("03_unseeded", True),
    ]
    assert notebooks.printed(read(root / "out/executed/02_fails.ipynb")) == ["in notebooks True"]


def test_run_tells_drift(ran: Ran) -> None:
    _, results, said = ran
    assert results[0].drift == ["check ok   old → check ok   draws True 0"]
    assert "1 check lines drifted\n    check ok   old → check ok   draws True 0\n" in said


def test_failing_notebook_is_kept_and_names_the_cell(ran: Ran) -> None:
    root, results, said = ran
    assert results[1].error == "cell 4: ZeroDivisionError: division by zero"
    assert "FAILED\n    cell 4: ZeroDivisionError" in said
    assert notebooks.printed(read(root / "out/executed/02_fails.ipynb"))
    assert "2 ok, 1 FAILED" in said


def test_run_shows_the_records(ran: Ran) -> None:
    root, _, said = ran
    assert "c           fgsm    –        7  50.0       –            25.0 [10.0, 40.0]" in said
    assert "skipped" not in said  # the control of the next test
    assert len(report.read_records(root / "out/records.jsonl")[0]) == 1
    assert json.loads((root / "out/run.json").read_text())["results"][1]["ok"] is False


def test_damaged_records_are_named_and_counted_and_spoil_no_other(tmp_path: Path) -> None:
    """A notebook that was killed while it wrote, one of another schema, one as it should be."""
    cut = """import os
with open(os.environ["UNFOOL_RECORDS"], "a") as file:
    file.write('{"schema": 2, "dataset": "other"}\\n{"schema": 1, "dataset": "cut sh')"""
    make(tmp_path / "notebooks" / "01_cut.ipynb", cut)
    make(tmp_path / "notebooks" / "02_whole.ipynb", WRITE_RECORD)
    said, out = io.StringIO(), tmp_path / "out"
    running.run(out=out, jobs=1, folder=tmp_path / "notebooks", stream=said)
    records, skipped = report.read_records(out / "records.jsonl")
    assert [record["dataset"] for record in records] == ["d"]
    page = (out / "report" / "index.html").read_text("utf-8")
    for text in (said.getvalue(), page):
        assert "records.jsonl, line 1 is no record of schema 1: schema 2, not 1" in text
        assert "records.jsonl, line 2 is no record of schema 1: Unterminated string" in text
        assert "2 lines skipped: mend them or delete them" in text
    assert len(skipped) == 2


def test_two_at_once_by_default_and_records_in_the_lessons_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    wait = "import os, time\nwhile not os.path.exists('second.txt'):\n    time.sleep(0.1)"
    threads = "print(os.environ['OMP_NUM_THREADS'])"
    first, second = (WRITE_RECORD.replace('"c"', f'"{name}"') for name in ("first", "second"))
    make(tmp_path / "notebooks" / "01_waits.ipynb", wait, first, threads)
    make(tmp_path / "notebooks" / "02_ends.ipynb", second, "open('second.txt', 'w').close()")
    out = tmp_path / "out"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    running.run(out=out, report=False, folder=tmp_path / "notebooks", timeout=60)
    records, _ = report.read_records(out / "records.jsonl")
    assert [record["classifier"] for record in records] == ["first", "second"]
    assert notebooks.printed(read(out / "executed/01_waits.ipynb")) == ["3"]


def test_nothing_unfinished_is_left(ran: Ran) -> None:
    assert list((ran[0] / "out").rglob("*running*")) == []


def test_replay_fails_on_what_is_not_seeded(ran: Ran, tmp_path: Path) -> None:
    executed = [ran[0] / "out/executed" / f"{n}.ipynb" for n in ("01_seeded", "03_unseeded")]
    code, text = gates.replay(executed, tmp_path / "replay")
    cells = ElementTree.parse(tmp_path / "replay/cells.xml").iter("testcase")
    broken = [cell for cell in cells if cell.find("failure") is not None]
    failed = [(str(c.get("classname")).split("executed.")[-1], c.get("name")) for c in broken]
    assert code == 1, text
    assert failed == [("03_unseeded.ipynb", "Cell 1"), ("03_unseeded.ipynb", "Cell 2")], text
    assert gates.replay_counts(tmp_path / "replay", executed) == (2, 4)


def test_stop_ends_the_kernel_and_leaves_a_whole_notebook(tmp_path: Path) -> None:
    import psutil

    sleeper = "import os, time\nprint(os.getpid(), flush=True)"
    path = make(tmp_path / "01_sleeps.ipynb", sleeper, "time.sleep(600)")
    output, stop, results = tmp_path / "out" / "01.ipynb", Stop(), []
    thread = threading.Thread(target=lambda: results.append(execute(path, output, stop=stop)))
    thread.start()
    deadline = time.monotonic() + 60
    while notebooks.cells_begun(output.with_suffix(".log")) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    stop.now()
    thread.join(30)
    assert (results[0].ok, results[0].error) == (False, "stopped in cell 4")
    assert [p.name for p in output.parent.iterdir() if p.suffix == ".ipynb"] == ["01.ipynb"]
    assert not psutil.pid_exists(int(notebooks.printed(read(output))[0]))


def test_time_limit(tmp_path: Path) -> None:
    path = make(tmp_path / "01_sleeps.ipynb", "import time", "time.sleep(600)")
    result = execute(path, tmp_path / "out.ipynb", timeout=0.3)
    assert result.error == "stopped after 0.3 s in cell 0: give it more time with --timeout"


def test_update_writes_back_what_is_committed(tmp_path: Path) -> None:
    path = make(tmp_path / "notebooks" / "01_a.ipynb", SEEDED, printed="check ok   old\n")
    out, said = tmp_path / "out", io.StringIO()
    with pytest.raises(UsageError, match="--update"):
        running.run(profile="smoke", update=True, out=out, folder=path.parent)
    running.run(update=True, out=out, report=False, folder=path.parent, stream=said)
    assert "(updated)" in said.getvalue()
    assert notebooks.check_lines(read(path)) == ["check ok   draws True 0"]
    assert notebooks.clean(read(path)) == read(path)


def test_update_spares_a_notebook_edited_meanwhile(tmp_path: Path) -> None:
    path = make(tmp_path / "01_a.ipynb", "1")
    task = running.Task(path, tmp_path / "out" / path.name, {}, source=b"as it was")
    before = path.read_bytes()
    assert "edited while it ran" in running._update(task, read(path))
    assert path.read_bytes() == before


def test_two_runs_into_one_folder(folder: Path, tmp_path: Path) -> None:
    with (
        running.sole_user(tmp_path / "out"),
        pytest.raises(UsageError, match="another run is writing"),
    ):
        running.run(out=tmp_path / "out", folder=folder)


def test_only_a_kernel_that_never_started_is_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    died = "RuntimeError: Kernel died before replying to kernel_info"
    for text, again in [
        (died, True),
        (f"Executing Cell 1---\n{died}", False),
        ("NoSuchKernel: python3", False),
    ]:
        log.write_text(text)
        assert notebooks._kernel_never_started(log) is again


# -------------------------------------------------------------------------------------------- gates


def test_counts_gate_needs_something_counted(tmp_path: Path) -> None:
    path = make(tmp_path / "notebooks" / "01_a.ipynb", "1")
    passage = gates.Gates(tmp_path / "build", path.parent)
    assert len(passage.counts()) == 3
    passage.executed, passage.replayed, passage.compared = [path], 1, 1
    assert passage.counts() == []
    assert "no notebooks" in gates.Gates(tmp_path, tmp_path / "none").counts()[0]


def test_differences() -> None:
    def nb(text: str, png: str) -> NotebookNode:
        picture = new_output("display_data", data={"image/png": png})
        error = new_output("stream", name="stderr", text=f"warning {text}")
        printed = new_output("stream", name="stdout", text=text)
        return new_notebook(
            cells=[new_code_cell(outputs=[printed]), new_code_cell(outputs=[error, picture])]
        )

    assert gates.differences(nb("a", "x"), nb("a", "x")) == []
    assert gates.differences(nb("a", "x"), nb("b", "x")) == ["code cell 1: 'a' → 'b'"]
    assert gates.differences(nb("a", "x"), nb("a", "y")) == ["code cell 2: image/png differs"]


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "7x"],
        ["run", "01", "-p", "sead", "1"],
        ["run", "01", "--jobs", "0"],
        ["run", "01", "--update", "--profile", "smoke"],
        ["report"],
    ],
)
def test_user_mistakes_are_one_line(
    arguments: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(notebooks, "LESSONS", folder)
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("unfool: ")
    assert said.err.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, unfool.cli; print({'torch', 'nbformat', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_profiles_offered_are_those_there_are() -> None:
    from unfool import profiles

    assert tuple(profiles.PROFILES) == cli.PROFILES
