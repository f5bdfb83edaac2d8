"""What a job of the batch costs beside its work: Snakemake, papermill, its kernel, torch's import.

    .venv/bin/python benchmarks/overhead.py --help

The same jobs are done three times, on one core, each from an empty store: the notebook's cells in a
plain process; each job as Snakemake calls it, but without Snakemake; and the whole batch. A cost is
the difference of two of them. Snakemake's start is a second batch that finds everything done.
Beside the clock's seconds stand those of the processor, which stay nearly the same where others
use the machine, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unfool.artifacts import REPO, write_text
from unfool.grids import Job, dump, grid_path, load, plan
from unfool.notebooks import LESSONS, UsageError

TINY = "rows: [{profile: smoke, attacks: [fgsm], defense: [none, threshold]}]\n"
WANTED = 3.0  # seconds a job that Snakemake and papermill may take
IMPORT = "import unfool.lab, unfool.figures"  # what the unit imports
BARE = (
    "from pathlib import Path; from benchmarks.overhead import bare; bare(Path('plan.json'), {!r})"
)


@dataclass(frozen=True)
class Spent:
    """Seconds of the clock, and of the processor."""

    clock: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.clock + other.clock, self.processor + other.processor)

    def __sub__(self, other: Spent) -> Spent:
        return self + Spent(-other.clock, -other.processor)

    def __truediv__(self, n: int) -> Spent:
        return Spent(self.clock / n, self.processor / n)


@dataclass
class Runs:
    """What the jobs took, each in a fresh process.

    Attributes:
        imports: Python's start and what the unit imports, and nothing else.
        bare: experiments whose cells are run without papermill and kernel.
        alone: all jobs as Snakemake calls them, one after another.
        batch: all of them by Snakemake.
        nothing: a batch that finds everything done.
    """

    imports: Spent = Spent()
    bare: dict[str, Spent] = field(default_factory=dict)
    alone: dict[str, Spent] = field(default_factory=dict)
    batch: Spent = Spent()
    nothing: Spent = Spent()


def main(given: Sequence[str] | None = None) -> int:
    options = parser().parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "tiny.yaml"
        grid.write_text(TINY)
        try:
            grid = grid_path(options.grid) if options.grid else grid
            jobs = plan(grid)
            if not any(job.kind == "experiment" and job.records >= 0 for job in jobs):
                raise UsageError(f"grid {grid.stem} runs lessons: give one of the batch's unit")
        except UsageError as error:
            print(f"overhead: {error}", file=sys.stderr)
            return 2
        load, cores = circumstances()
        text = table(jobs, measured(jobs, grid, Path(folder)))
    text += f"The machine's load was {load:.1f} on {cores} cores as it began.\n"
    if options.out:
        write_text(options.out, text)
    print(text, end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="Takes a minute or two on a machine that does nothing else; use such a one.",
    )
    made.add_argument("--grid", default="", metavar="GRID", help="name or path; default: 4 jobs")
    made.add_argument("--out", type=Path, metavar="FILE", help="keep the table, too")
    return made


def circumstances() -> tuple[float, int]:
    """Return the load before anything is run, NaN where the system tells none, and the cores."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return load, os.cpu_count() or 1


def measured(jobs: Sequence[Job], grid: Path, folder: Path) -> Runs:
    """Run everything; each part has a folder of its own under `folder`."""
    runs, python = Runs(), [sys.executable, "-c"]
    imports = [spent([*python, IMPORT], folder) for _ in range(4)][1:]  # files are read once before
    runs.imports = Spent(
        statistics.median(i.clock for i in imports), statistics.median(i.processor for i in imports)
    )
    alone, bare, batch = (folder / name for name in ("alone", "bare", "batch"))
    experiments = [job for job in jobs if job.kind == "experiment"]
    alone.mkdir()
    write_text(alone / "plan.json", dump(jobs))
    for job in jobs:
        if job in experiments and not bare.exists():  # what is shared is made: for both
            shutil.copytree(alone, bare)
        runs.alone[job.name] = spent([sys.executable, "-m", "unfool.batch", job.name], alone)
    for job in experiments:
        runs.bare[job.name] = spent([*python, BARE.format(job.name)], bare)
    batch.mkdir()
    command = [sys.executable, "-m", "unfool", "batch", str(grid), "--cores", "1"]
    runs.batch, runs.nothing = (spent([*command, "--out", str(batch)], batch) for _ in range(2))
    return runs


def spent(command: Sequence[str], folder: Path) -> Spent:
    """Return what a process and its children took; its store is in `folder`, where it runs.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    paths = os.pathsep.join([str(REPO / "lib"), str(REPO)])
    env = {
        **os.environ, "PYTHONPATH": paths, "UNFOOL_STORE": str(folder / "store"),
        "UNFOOL_RECORDS": str(folder / "records.jsonl"), "UNFOOL_PROGRESS": "off",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    env.pop("UNFOOL_SHARED_STORE", None)
    before = os.times()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    children = [t.children_user + t.children_system for t in (before, after)]
    return Spent(after.elapsed - before.elapsed, children[1] - children[0])


def bare(path: Path, name: str) -> None:
    """Run the cells of an experiment's notebook in this process, with its parameters."""
    job = load(path)[name]
    notebook = json.loads((LESSONS / f"{job.notebook}.ipynb").read_text("utf-8"))
    scope: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
            if "parameters" in cell["metadata"].get("tags", []):
                scope.update(job.parameters)


def parts(jobs: Sequence[Job], runs: Runs) -> dict[str, Spent]:
    """Return what each part costs, a job, an experiment or a batch."""
    total = sum(runs.alone.values(), Spent())
    whole = {**runs.alone, **runs.bare}  # without papermill
    work = sum(whole.values(), Spent()) / len(jobs) - runs.imports
    papermill = sum((runs.alone[name] - runs.bare[name] for name in runs.bare), Spent())
    snakemake = (runs.batch - runs.nothing - total) / len(jobs)
    return {
        "the work itself, a job": work,
        "start of Python, import of torch and the library, a job": runs.imports,
        "papermill and its kernel, an experiment": papermill / len(runs.bare),
        "Snakemake, a job": snakemake,
        "Snakemake and papermill, a job": snakemake + papermill / len(jobs),
        "`unfool batch` with nothing to do, a batch": runs.nothing,
    }


def table(jobs: Sequence[Job], runs: Runs) -> str:
    """Return the parts as Markdown."""
    lines = ["| part | seconds | of the processor |", "|---|---:|---:|"]
    found: Mapping[str, Spent] = parts(jobs, runs)
    lines += [f"| {name} | {s.clock:.1f} | {s.processor:.1f} |" for name, s in found.items()]
    both = found["Snakemake and papermill, a job"].clock
    lines += [
        "",
        f"{len(jobs)} jobs, {len(runs.bare)} of them experiments, one after another on one core. "
        f"Snakemake and papermill take {both:.1f} s a job; at most {WANTED:.0f} were wanted.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
