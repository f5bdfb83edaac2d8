"""Run a notebook headless, say what came out, and write what is committed.

A notebook is run by papermill in a process of its own, so that it can be ended at a time limit and
several can run side by side. What it printed is compared with what is committed, by its `check`
lines only: they are the claims of the course, and stable ones.

Nothing here imports torch: the notebooks do. Nor does what reads no notebook import nbformat, which
takes a second, because every process of a batch and every kernel of its unit comes by here.
"""

from __future__ import annotations

import ast
import copy
import difflib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unfool.files import write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

REPO = Path(__file__).resolve().parents[2]
LESSONS = REPO / "notebooks"
BATCH_UNIT = "90"  # the notebook that the batch runs; no lesson, so left out unless asked for
KEPT_CELL_METADATA = {"tags", "nbgrader", "jupyter"}
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE_INFO = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
# Two kernels that start at once may draw the same free port; the second then dies before any cell.
NEVER_STARTED = ("Kernel died before replying", "Kernel didn't respond", "Address already in use")
GRACE = 10.0  # seconds that papermill gets to save the notebook when its kernel has been ended


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""


@dataclass
class Result:
    """What became of one notebook."""

    name: str
    seconds: float
    ok: bool
    error: str = ""
    drift: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    executed: str = ""  # path of the executed notebook; empty if there is none
    note: str = ""  # what happened beside the run, such as "updated"


# ---------------------------------------------------------------------------------------- finding


def lessons(folder: Path | None = None) -> list[Path]:
    """All numbered notebooks of `folder`, in order of their number, the batch's unit among them."""
    return sorted((folder or LESSONS).glob("[0-9][0-9]_*.ipynb"))


def find(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Notebooks by number ("7", "07") or stem ("07_translator"); no names: every lesson.

    Raises:
        UsageError: for a name that is none of them, listing those there are.
    """
    known = lessons(folder)
    if not known:
        raise UsageError(f"no notebooks in {folder or LESSONS}: expected files such as 01_….ipynb")
    if not names:
        return [path for path in known if not path.name.startswith(BATCH_UNIT)]
    return list(dict.fromkeys(_find_one(name, known) for name in names))


def _find_one(name: str, known: list[Path]) -> Path:
    wanted = Path(name).name.removesuffix(".ipynb")
    number = wanted.zfill(2)
    for path in known:
        if path.stem == wanted or (number.isdigit() and path.name.startswith(f"{number}_")):
            return path
    listed = ", ".join(path.stem for path in known)
    raise UsageError(f"unknown notebook '{name}': there are {listed}")


# ------------------------------------------------------------------------------------- parameters


def defaults(path: Path) -> dict[str, Any]:
    """The parameters of a notebook and their values as committed, in order.

    Raises:
        UsageError: the file is no notebook, or names no kernel.
    """
    from nbformat import ValidationError
    from papermill import inspect_notebook

    try:
        found = inspect_notebook(_unformatted(path))
    except (ValueError, AttributeError, ValidationError) as error:
        raise UsageError(f"cannot read {path} as a notebook: {error}") from error
    return {name: _literal(parameter["default"]) for name, parameter in found.items()}


def validate_parameters(
    path: Path, parameters: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters with the types that the notebook expects; `known` are its `defaults`, if at hand.

    Text is read as JSON (or as a Python literal) unless the notebook's own value is a string.
    papermill itself accepts a misspelt name without a word, hence this.

    Raises:
        UsageError: a name that the notebook does not have, or a value of another type.
    """
    known = defaults(path) if known is None else known
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        listed = ", ".join(known) or "none"
        raise UsageError(f"{path.stem} has no parameter '{unknown[0]}': it has {listed}")
    return {name: _typed(path, name, value, known[name]) for name, value in parameters.items()}


def _typed(path: Path, name: str, value: Any, default: Any) -> Any:
    if isinstance(value, str) and not isinstance(default, str):
        value = _literal(value)
    if default is not None and _type_name(value) != _type_name(default):
        expected = f"{_type_name(default)}, such as {json.dumps(default)}"
        raise UsageError(f"{path.stem}: parameter '{name}' must be a {expected}; got {value!r}")
    return value


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    names: dict[type, str] = {str: "string", list: "list", tuple: "list", dict: "mapping"}
    return names.get(type(value), "null")


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _unformatted(path: Path) -> str:
    # papermill runs str.format over the paths it is given
    return str(path).replace("{", "{{").replace("}", "}}")


# -------------------------------------------------------------------------------------- execution


class Stop:
    """Ends all notebooks that were started with it: shared by the runs of one command."""

    def __init__(self) -> None:
        self.asked = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.add(process)
            if self.asked:
                end(process)

    def discard(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.discard(process)

    def now(self) -> None:
        self.asked = True
        with self._lock:
            for process in self._running:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End papermill: its kernels first, so that it still saves the notebook, then itself."""
    import psutil  # type: ignore[import-untyped]

    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    try:
        process.wait(GRACE if children else 0)
    except subprocess.TimeoutExpired:
        process.kill()


def execute(
    path: Path,
    output: Path,
    parameters: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    *,
    stop: Stop | None = None,
    log: Path | None = None,
) -> Result:
    """Run one notebook in its own folder and write the executed one to `output`.

    The executed notebook is written under another name and renamed, also when a cell failed. A
    kernel that never started is tried once more; nothing else is.

    Args:
        parameters: validated ones, see `validate_parameters`; {} leaves the notebook as committed.
        env: added to the environment, such as UNFOOL_PROGRESS, UNFOOL_RECORDS, UNFOOL_STORE.
        timeout: seconds for the whole notebook; None for no limit.
        log: what papermill says, by default `output` with the suffix `.log`.
    """
    output, log = output.resolve(), (log or output.with_suffix(".log")).resolve()
    log.parent.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    parameters, stop, started = dict(parameters or {}), stop or Stop(), time.monotonic()
    running = running_name(output)
    for _attempt in range(2):
        running.unlink(missing_ok=True)
        command = _command(path.resolve(), running, parameters)
        code, timed_out = _wait(command, log, {**_environment(), **(env or {})}, timeout, stop)
        if code == 0 or timed_out or stop.asked or not _kernel_never_started(log):
            break
    kept = _keep(running, output)
    error = "" if code == 0 else _reason(output if kept else None, log, timeout, timed_out, stop)
    return Result(
        name=path.stem,
        seconds=time.monotonic() - started,
        ok=code == 0 and kept,
        error=error,
        parameters=parameters,
        executed=str(output) if kept else "",
    )


def running_name(output: Path) -> Path:
    """Where papermill writes while the notebook runs."""
    return output.with_name(f".{output.stem}.running.ipynb")


def _command(path: Path, running: Path, parameters: Mapping[str, Any]) -> list[str]:
    import yaml

    command = [sys.executable, "-m", "papermill", _unformatted(path), _unformatted(running)]
    command += ["-k", "python3", "-l", "python", "--cwd", str(path.parent)]
    command += ["--no-progress-bar", "--log-output"]
    # YAML and not JSON: papermill reads JSON's 1e-07 as a string
    return command + (["-y", yaml.safe_dump(dict(parameters))] if parameters else [])


def _environment() -> dict[str, str]:
    own = {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    return {**os.environ, **own}


def _wait(
    command: list[str], log: Path, env: Mapping[str, str], timeout: float | None, stop: Stop
) -> tuple[int, bool]:
    # A session of its own: Ctrl-C reaches us only, and we end the children in good order.
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        stop.add(process)
        try:
            return process.wait(timeout), False
        except subprocess.TimeoutExpired:
            end(process)
            return process.wait(), True
        finally:
            stop.discard(process)


def _kernel_never_started(log: Path) -> bool:
    text = log.read_text(encoding="utf-8", errors="replace")
    return "Executing Cell" not in text and any(sign in text for sign in NEVER_STARTED)


def _keep(running: Path, output: Path) -> bool:
    import nbformat

    try:
        nbformat.read(running, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):
        running.unlink(missing_ok=True)  # killed while it was being written
        return False
    running.replace(output)
    return True


def _reason(
    executed: Path | None, log: Path, timeout: float | None, timed_out: bool, stop: Stop
) -> str:
    import nbformat

    at = f"in cell {cells_begun(log)}"
    if stop.asked:
        return f"stopped {at}"
    if timed_out:
        return f"stopped after {timeout:g} s {at}: give it more time with --timeout"
    raised = failing_cell(nbformat.read(executed, as_version=4)) if executed else ""
    if raised:
        return raised
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if "DeadKernelError" in text:
        return f"the kernel died {at}: out of memory, perhaps"
    return text.splitlines()[-1][:200] if text else "papermill ended without a word"


def failing_cell(nb: NotebookNode) -> str:
    """Number (from 1, as in the committed notebook) and exception of the first failed cell."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    cells = [c for c in nb.cells if not added & set(c.metadata.get("tags", []))]
    for number, cell in enumerate(cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                first = (str(output.evalue).strip().splitlines() or [""])[0]
                return f"cell {number}: {output.ename}: {first[:200]}"
    return ""


def cells_begun(log: Path) -> int:
    """How many cells papermill has begun, read from its log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    return len(re.findall(r"^Executing Cell \d+", text, flags=re.MULTILINE))


# ------------------------------------------------------------------------------ outputs and drift


def printed(nb: NotebookNode) -> list[str]:
    """All lines that the code cells printed, in order."""
    return [
        line
        for cell in nb.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
        for line in output.text.splitlines()
    ]


def check_lines(nb: NotebookNode) -> list[str]:
    """The printed lines that start with `check `: what the notebook claims."""
    return [line.rstrip() for line in printed(nb) if line.startswith("check ")]


def drift(committed: NotebookNode, executed: NotebookNode) -> list[str]:
    """How the check lines differ, readable: `committed → now`, one string per line that differs."""
    old, new = check_lines(committed), check_lines(executed)
    found: list[str] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for operation, i1, i2, j1, j2 in matcher.get_opcodes():
        if operation == "equal":
            continue
        before, now = old[i1:i2], new[j1:j2]
        for index in range(max(len(before), len(now))):
            left = before[index] if index < len(before) else "(nothing)"
            right = now[index] if index < len(now) else "(nothing)"
            found.append(f"{left} → {right}")
    return found


# -------------------------------------------------------------------------- what is committed


def clean(nb: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook as it is committed.

    Timings, widgets and standard error go; kernel and language are the same in every notebook;
    outputs and cell ids stay. Cleaning twice changes nothing more.

    Raises:
        ValueError: it holds injected parameters, or was not run freshly from top to bottom.
    """
    import nbformat

    nb = copy.deepcopy(nb)
    if any("injected-parameters" in c.metadata.get("tags", []) for c in nb.cells):
        raise ValueError("it was run with parameters: run it without any to commit it")
    counts = [c.execution_count for c in nb.cells if c.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        raise ValueError(f"not run freshly from top to bottom: its counts are {counts}")
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO})
    for cell in nb.cells:
        kept = {k: v for k, v in cell.metadata.items() if k in KEPT_CELL_METADATA and v}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = outputs(cell)
    return nb


def outputs(cell: NotebookNode) -> list[NotebookNode]:
    """Outputs of a code cell without standard error and widgets, printed text in one piece.

    The kernel cuts printed text where it happened to flush; that must not count as a difference.
    """
    kept: list[NotebookNode] = []
    for output in cell.outputs:
        last = kept[-1] if kept else None
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if last is not None and last.output_type == "stream":
                last.text += output.text
                continue
        elif WIDGET in output.get("data", {}):
            continue
        kept.append(copy.deepcopy(output))
    return kept


def write(nb: NotebookNode, path: Path) -> None:
    """Write a notebook under another name, then rename it: never half a file."""
    import nbformat

    nbformat.validate(nb)
    write_text(path, nbformat.writes(nb) + "\n")
