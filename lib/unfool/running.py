"""Run many notebooks by one command: a line for each, a table of results, a report.

Nothing here imports torch: the notebooks do.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import nbformat
from nbformat import NotebookNode

from unfool.files import write_text
from unfool.notebooks import (
    REPO,
    Result,
    Stop,
    UsageError,
    cells_begun,
    clean,
    defaults,
    drift,
    execute,
    find,
    validate_parameters,
    write,
)
from unfool.report import as_text, build, joined, read_records, results_table, skipped_lines


@dataclass
class Task:
    """One notebook that is to be run: where from, where to, with what."""

    path: Path
    output: Path
    parameters: dict[str, Any]
    source: bytes  # the file as it was when the run began

    @property
    def log(self) -> Path:
        """What papermill says."""
        return self.output.parent.parent / "logs" / f"{self.path.stem}.log"

    @property
    def progress(self) -> Path:
        """What long work in the notebook says of itself."""
        return self.log.with_suffix(".progress")

    @property
    def records(self) -> Path:
        """What the notebook measured."""
        return self.log.with_suffix(".jsonl")


def run(
    names: Sequence[str] = (),
    profile: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    out: Path | None = None,
    update: bool = False,
    jobs: int | None = None,
    *,
    timeout: float | None = None,
    report: bool = True,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> list[Result]:
    """Run notebooks, print one line for each as it ends, then a table and the report's path.

    Args:
        names: numbers or stems; none for every lesson.
        profile: passed to the notebooks whose own profile is another one.
        parameters: passed to every notebook that is run; each must have all of them.
        out: folder that gets `executed/`, `logs/`, `records.jsonl`, `run.json` and `report/`.
        update: write the executed notebooks, cleaned, back to where they came from.
        jobs: how many run at once, by default two where there are two cores; they share the cores
            evenly, because threads that outnumber them wait for each other.
        folder: where the notebooks are, by default `notebooks/` of the checkout.
        env: added to the environment of each notebook.

    Raises:
        UsageError: before anything is run.
    """
    out, stream = (out or REPO / "build" / "run").resolve(), stream or sys.stdout
    paths = find(names, folder)
    given = [_parameters_for(path, profile, parameters or {}) for path in paths]
    if update and any(given):
        raise UsageError("--update writes what is committed: run it without --profile and -p")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs must be 1 or more; got {jobs}")
    jobs = min(jobs or min(2, os.cpu_count() or 1), len(paths))
    started = time.time()
    with sole_user(out):
        _clear(out)
        tasks = [
            Task(path, out / "executed" / path.name, own, path.read_bytes())
            for path, own in zip(paths, given, strict=True)
        ]
        results = _run_all(tasks, out, update, jobs, timeout, dict(env or {}), stream)
        about = _about(started, profile, parameters or {})
        write_text(out / "run.json", _as_json({**about, "results": [asdict(r) for r in results]}))
        _conclude(results, out, about if report else None, stream)
    return results


def _parameters_for(
    path: Path, profile: str | None, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    wanted = dict(parameters)
    own = defaults(path).get("profile")
    if profile is not None and own is not None and own != profile:
        wanted["profile"] = profile
    return validate_parameters(path, wanted)


@contextmanager
def sole_user(out: Path) -> Iterator[None]:
    """Hold a folder for one run.

    Raises:
        UsageError: another run holds it.
    """
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise UsageError(f"another run is writing to {out}: wait for it or give --out") from None


def _clear(out: Path) -> None:
    # Only what an earlier run wrote: `out` may be any folder of the user.
    (out / "records.jsonl").unlink(missing_ok=True)
    (out / "run.json").unlink(missing_ok=True)
    for old in (*(out / "executed").glob("*.ipynb"), *(out / "executed").glob(".*.ipynb")):
        old.unlink()
    for pattern in ("*.log", "*.progress", "*.jsonl", "*.jsonl.lock"):
        for old in (out / "logs").glob(pattern):
            old.unlink()


def _run_all(
    tasks: list[Task],
    out: Path,
    update: bool,
    jobs: int,
    timeout: float | None,
    env: dict[str, str],
    stream: TextIO,
) -> list[Result]:
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    width = max(len(task.path.stem) for task in tasks)
    stop, results = Stop(), {}
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(_run_one, task, env, timeout, update, stop): task for task in tasks}
        order = list(pending.values())
        try:
            for future in _as_they_end(pending, stop, stream):
                result = future.result()
                results[result.name] = result
                _gather(order, out / "records.jsonl")
                print(_line(result, width), file=stream, flush=True)
        except BaseException:
            stop.now()
            pool.shutdown(cancel_futures=True)
            raise
    return [results[task.path.stem] for task in order]


def _run_one(
    task: Task, env: dict[str, str], timeout: float | None, update: bool, stop: Stop
) -> Result:
    if stop.asked:
        return Result(task.path.stem, 0.0, ok=False, error="not begun")
    task.log.parent.mkdir(parents=True, exist_ok=True)
    own = {"UNFOOL_PROGRESS": str(task.progress), "UNFOOL_RECORDS": str(task.records), **env}
    result = execute(task.path, task.output, task.parameters, own, timeout, stop=stop, log=task.log)
    # With other parameters other claims are made: there is nothing to compare them with.
    if result.ok and not task.parameters:
        executed = nbformat.read(task.output, as_version=4)
        committed = nbformat.reads(task.source.decode("utf-8"), as_version=4)
        result.drift = drift(committed, executed)
        if update:
            result.note = _update(task, executed)
    return result


def _gather(tasks: Sequence[Task], path: Path) -> None:
    # In the order of the lessons, whichever ends first: the table's rows don't depend on luck.
    write_text(path, joined([task.records for task in tasks]))


def _update(task: Task, executed: NotebookNode) -> str:
    if task.path.read_bytes() != task.source:
        return "not updated: it was edited while it ran"
    try:
        cleaned = clean(executed)
    except ValueError as error:
        return f"not updated: {error}"
    write(cleaned, task.path)
    return "updated"


def _as_they_end(
    pending: dict[Future[Result], Task], stop: Stop, stream: TextIO
) -> Iterator[Future[Result]]:
    left = set(pending)
    live = stream.isatty()
    while left:
        done, left = wait(left, timeout=0.3 if live else None, return_when=FIRST_COMPLETED)
        if live:
            print("\r\x1b[2K", end="", file=stream)
        yield from done
        if live and left:
            running = [pending[f] for f in pending if f in left and f.running()]
            print(_live_line(running), end="", file=stream, flush=True)


def _live_line(running: list[Task]) -> str:
    parts = []
    for task in running:
        cells = len(nbformat.reads(task.source.decode("utf-8"), as_version=4).cells)
        cells += bool(task.parameters)
        parts.append(f"{task.path.stem}: cell {cells_begun(task.log)} of {cells}")
        parts[-1] += _last_line(task.progress)
    return "  |  ".join(parts)[: shutil.get_terminal_size().columns - 1]


def _last_line(progress: Path) -> str:
    try:
        lines = progress.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return f", {lines[-1]}" if lines else ""


def _line(result: Result, width: int) -> str:
    head = f"{result.name:<{width}}  {result.seconds:7.1f} s  {'ok' if result.ok else 'FAILED':<6}"
    if not result.ok:
        kept = f"    as far as it came: {result.executed}" if result.executed else ""
        return "\n".join([head.rstrip(), f"    {result.error}", *filter(None, [kept])])
    if result.parameters:
        told = ", ".join(f"{key}={value}" for key, value in result.parameters.items())
    else:
        told = f"{len(result.drift)} check lines drifted"
    note = f"  ({result.note})" if result.note else ""
    return "\n".join([f"{head}  {told}{note}", *(f"    {line}" for line in result.drift)])


def _about(started: float, profile: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
        "took": f"{time.time() - started:.0f} s",
        "profile": profile or "as committed",
        "parameters": dict(parameters),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}",
    }


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _conclude(
    results: list[Result], out: Path, about: Mapping[str, Any] | None, stream: TextIO
) -> None:
    records, skipped = read_records(out / "records.jsonl")
    if table := results_table(records):
        print(f"\n{as_text(table)}", file=stream)
    if skipped:
        print("", *skipped_lines(skipped), sep="\n", file=stream)
    failed = sum(not result.ok for result in results)
    print(f"\n{len(results) - failed} ok, {failed} FAILED", file=stream)
    if about is not None:
        page = build(results, out / "executed", out / "records.jsonl", out / "report", about)
        print(f"report: {page}", file=stream)
