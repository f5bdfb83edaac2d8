"""Expected hours of each grid, and of the whole paper with three seeds, from their job graphs.

    .venv/bin/python benchmarks/hours.py

Nothing is run: what a job costs comes from `lib/unfool/costs.yaml`. Prints the two tables that
`workflow/README.md` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from unfool.grids import GRIDS, Job, makespan, plan

DIGITS, COLOUR = ("table2", "table4", "table6"), ("table3", "table5")
EACH = ("table2", "table3", "table4", "table5", "table6", "figures", "multiverse")
NODES, CORES = 16, 2


def together(names: tuple[str, ...], **common: Any) -> list[Job]:
    """Return the jobs of several grids, each once; `common` replaces what the grids say."""
    found: dict[str, Job] = {}
    with TemporaryDirectory() as folder:
        for name in names:
            grid = yaml.safe_load((GRIDS / f"{name}.yaml").read_text("utf-8"))
            grid["common"] |= common
            path = Path(folder) / f"{name}.yaml"
            path.write_text(yaml.safe_dump(grid), "utf-8")
            found |= {job.name: job for job in plan(path)}
    return list(found.values())


def hours(jobs: list[Job], cores: int, gpus: int = 1) -> str:
    """Return the expected hours, with one digit after the point below ten."""
    spent = makespan(jobs, cores, gpus) / 3600
    return f"{spent:.1f}" if spent < 10 else f"{spent:.0f}"


def each() -> str:
    """Return the hours of each grid as Markdown."""
    lines = ["| grid | experiments | hours | on |", "|---|---:|---:|---|"]
    for name in EACH:
        jobs = plan(name)
        count = sum(job.kind == "experiment" for job in jobs)
        on = "GPU" if any(job.gpus for job in jobs) else "core"
        lines.append(f"| `{name}` | {count} | {hours(jobs, 1)} | {on} |")
    return "\n".join(lines) + "\n"


def table() -> str:
    """Return the hours of the whole paper as Markdown."""
    desk, cuda = {"profile": "desk", "device": "cpu"}, {"device": "cuda"}
    lines = [
        "| tables | one core after the other | 2 cores | one H200 (estimate) | 16 nodes |"
        " no faster than |",
        "|---|---:|---:|---:|---:|---:|",
        _row("2, 4, 6: digits, `desk`", DIGITS, {}, cuda, {}),
        _row("3, 5: CIFAR-10, `desk`; on GPUs `paper`", COLOUR, desk, {}, {}),
        _row("all", (*DIGITS, *COLOUR), desk, cuda, {}),
    ]
    return "\n".join(lines) + "\n"


def _row(
    title: str, names: tuple[str, ...], cpu: Mapping[str, Any], gpu: Mapping[str, Any],
    many: Mapping[str, Any],
) -> str:  # fmt: skip
    here, there, nodes = (together(names, **common) for common in (cpu, gpu, many))
    cells = (
        hours(here, 1), hours(here, CORES), hours(there, 1, 1), hours(nodes, NODES * CORES, NODES),
        hours(nodes, len(nodes), len(nodes)),
    )  # fmt: skip
    return f"| {title} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(each(), table(), sep="\n", end="")
