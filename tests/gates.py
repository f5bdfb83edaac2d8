"""The gates of the notebooks: they run, twice the same, whether the store is cold or warm.

    smoke   every notebook runs by papermill in profile smoke, from an empty store
    replay  nbval runs what papermill wrote again, from another empty store: same outputs
    counts  as many notebooks were run and replayed as there are, and cells were compared
    warm    a second run against the store of the first gives the same outputs

`python tests/gates.py` prints one line per gate and exits 1 if one failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import nbformat
from nbformat import NotebookNode

from unfool.notebooks import LESSONS, REPO, outputs
from unfool.running import run

TESTS = Path(__file__).resolve().parent
CELL_TIMEOUT = 300  # seconds
ENVIRONMENT = {
    "UNFOOL_PROGRESS": "off",
    "UNFOOL_SHARED_STORE": "",
    "OMP_NUM_THREADS": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
}


@dataclass
class Gates:
    """One passage through the gates, in folders of its own under `build`."""

    build: Path
    notebooks: Path = LESSONS
    executed: list[Path] = field(default_factory=list)
    replayed: int = 0
    compared: int = 0

    def smoke(self) -> list[str]:
        """Run every notebook cold."""
        problems = self._run("cold")
        self.executed = sorted((self.build / "cold" / "executed").glob("*.ipynb"))
        return problems

    def replay(self) -> list[str]:
        """Run again what was written, and compare."""
        if not self.executed:
            return ["there is nothing to replay"]
        code, text = replay(self.executed, self.build / "replay")
        self.replayed, self.compared = replay_counts(self.build / "replay", self.executed)
        return [] if code == 0 else [text]

    def counts(self) -> list[str]:
        """Nothing was left out: green with nothing tested is no green."""
        there = len(list(self.notebooks.glob("*.ipynb")))
        problems = [] if there else [f"no notebooks in {self.notebooks}"]
        for number, what in ((len(self.executed), "run"), (self.replayed, "replayed")):
            if number != there:
                problems.append(f"{number} notebooks {what}, {there} are there")
        return problems if self.compared else [*problems, "no cell with outputs was compared"]

    def warm(self) -> list[str]:
        """Run once more, with everything found in the store, and compare."""
        problems = self._run("warm")
        for path in self.executed:
            again = self.build / "warm" / "executed" / path.name
            if again.exists():
                differing = differences(_read(path), _read(again))
                problems += [f"{path.stem}, cold → warm: {line}" for line in differing]
        return problems

    def _run(self, name: str) -> list[str]:
        names = [path.stem for path in sorted(self.notebooks.glob("*.ipynb"))]
        env = {**ENVIRONMENT, "UNFOOL_STORE": str(self.build / "store")}
        results = run(
            names,
            profile="smoke",
            out=self.build / name,
            jobs=2,
            timeout=CELL_TIMEOUT,
            report=False,
            folder=self.notebooks,
            env=env,
        )
        return [f"{result.name}: {result.error}" for result in results if not result.ok]


def replay(executed: list[Path], work: Path) -> tuple[int, str]:
    """Run executed notebooks again with nbval, from an empty store in `work`; status and output."""
    work.mkdir(parents=True)
    (work / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # not the settings of ours
    command = [sys.executable, "-m", "pytest", "-c", str(work / "pytest.ini")]
    command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", str(CELL_TIMEOUT)]
    command += ["--dist", "loadfile", "-n", str(min(2, len(executed))), "-q", "--color=no"]
    command += ["-p", "no:cacheprovider", "-p", "replay_rules"]
    # Cells of notebooks outside the root bear no file name, and xdist would take them for the same.
    command += ["--rootdir", os.path.commonpath([work, *executed])]
    command += [f"--junitxml={work / 'cells.xml'}", *map(str, executed)]
    env = {**os.environ, **ENVIRONMENT, "UNFOOL_STORE": str(work / "store")}
    env["UNFOOL_RECORDS"] = str(work / "records.jsonl")
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, check=False)
    return done.returncode, f"{done.stdout}\n{done.stderr}".strip()


def replay_counts(work: Path, executed: list[Path]) -> tuple[int, int]:
    """How many notebooks had all their code cells replayed, and how many cells had outputs."""
    if not (work / "cells.xml").exists():
        return 0, 0
    cells = list(ElementTree.parse(work / "cells.xml").iter("testcase"))
    done = [cell for cell in cells if cell.find("skipped") is None]
    notebooks = compared = 0
    for path in executed:
        here = [c for c in done if (c.get("classname") or "").endswith(path.name)]
        code = [cell for cell in _read(path).cells if cell.cell_type == "code"]
        notebooks += len(here) == len(code)
        compared += sum(bool(outputs(cell)) for cell in code) if here else 0
    return notebooks, compared


def differences(one: NotebookNode, other: NotebookNode) -> list[str]:
    """Cells whose outputs differ (text, HTML, pictures; not standard error), readable."""
    cells = [[c for c in nb.cells if c.cell_type == "code"] for nb in (one, other)]
    if len(cells[0]) != len(cells[1]):
        return [f"{len(cells[0])} code cells → {len(cells[1])}"]
    found = []
    for number, (left, right) in enumerate(zip(*cells, strict=True), start=1):
        before, now = list(_shown(left)), list(_shown(right))
        if before != now:
            found.append(f"code cell {number}: {_first_difference(before, now)}")
    return found


def _shown(cell: NotebookNode) -> Iterator[tuple[str, str]]:
    for output in outputs(cell):
        if output.output_type == "stream":
            yield "text", output.text
        elif output.output_type == "error":
            yield "error", f"{output.ename}: {output.evalue}"
        else:
            yield from sorted((kind, str(data)) for kind, data in output.data.items())


def _first_difference(before: list[tuple[str, str]], now: list[tuple[str, str]]) -> str:
    if len(before) != len(now):
        return f"{len(before)} outputs → {len(now)}"
    left, right = next(pair for pair in zip(before, now, strict=True) if pair[0] != pair[1])
    if left[0] == right[0] and left[0].startswith("image/"):
        return f"{left[0]} differs"
    return f"{left[1][:200]!r} → {right[1][:200]!r}"


def _read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def passage(gates: Gates) -> bool:
    """Go through all gates, print a line for each, none hiding another; whether all passed."""
    shutil.rmtree(gates.build, ignore_errors=True)  # empty stores
    steps: list[Callable[[], list[str]]] = [gates.smoke, gates.replay, gates.counts, gates.warm]
    passed = True
    for step in steps:
        started = time.monotonic()
        problems = step()
        passed &= not problems
        verdict = "FAILED" if problems else "ok"
        print(f"gate {step.__name__:<7} {time.monotonic() - started:7.1f} s  {verdict}", flush=True)
        for problem in problems:
            print("    " + problem.replace("\n", "\n    "), flush=True)
    counted = f"{len(gates.executed)} run, {gates.replayed} replayed"
    print(f"notebooks: {counted}; {gates.compared} cells with outputs compared")
    return passed


if __name__ == "__main__":
    raise SystemExit(0 if passage(Gates(REPO / "build" / "gates")) else 1)
