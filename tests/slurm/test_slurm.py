"""The batch on a real Slurm: four experiments, the master killed with -9 in flight, taken up again.

Skipped, with the reason, where no cluster of one node can be set up (see `cluster.why_not`).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import cluster, why_not

from test_batch import FOUR, LIMIT, history, ids_of_an_unbroken_run, problems, start, until
from unfool import batch, grids
from unfool.evaluation import read_records

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of one node for these tests."""
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield


def queued() -> list[str]:
    done = subprocess.run(["squeue", "-h", "-o", "%i %j %T"], capture_output=True, text=True)
    return done.stdout.splitlines()


def build_what_is_shared(grid: Path, out: Path) -> None:
    """Do the shared jobs here: on Slurm, each wave of jobs would cost half a minute of asking."""
    jobs = grids.plan(grid)
    out.mkdir()
    (out / "plan.json").write_text(grids.dump(jobs))
    for job in jobs:
        if job.kind != "experiment":
            batch.one(job.name, out)


def test_kill_9_of_the_master_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    grid, out = tmp_path / "four.yaml", tmp_path / "out"
    grid.write_text(FOUR)
    build_what_is_shared(grid, out)
    master = start(grid, out, "--profile", "slurm")

    def in_flight() -> bool:
        begun, ended = (sum(history(out, what).values()) for what in ("begun", "ended"))
        running = any("RUNNING" in line for line in queued())
        return any((out / "records").glob("*.jsonl")) and begun > ended and running

    until(in_flight, master)
    os.kill(master.pid, signal.SIGKILL)
    master.wait()
    ended = history(out, "ended")
    assert queued(), "the control: the dead master's jobs live on"
    again = start(grid, out, "--resume")
    assert again.wait(LIMIT) == 0, (out / "said.txt").read_text()
    said = (out / "said.txt").read_text()
    assert "of an earlier run" in said
    assert problems(out) == []
    begun = history(out, "begun")
    assert all(begun[name] == 1 for name in ended), "what had ended ran again"
    ids = sorted(r.id for r in read_records(out / "records.jsonl"))
    assert ids == ids_of_an_unbroken_run(monkeypatch, tmp_path)
    assert len(grids.load(out / "plan.json")) == 6
    assert queued() == []


def test_a_partition_that_does_not_exist_is_told_first(tmp_path: Path) -> None:
    grid, out = tmp_path / "four.yaml", tmp_path / "out"
    grid.write_text(FOUR)
    refused = start(grid, out, "--profile", "slurm", "--partition", "nowhere")
    assert refused.wait(LIMIT) == 2
    said = (out / "said.txt").read_text().splitlines()
    assert said == ["unfool: unknown partition 'nowhere': this cluster has main"]


def test_a_job_over_its_memory_is_told(tmp_path: Path) -> None:
    grid, out = tmp_path / "small.yaml", tmp_path / "out"
    grid.write_text(
        "resources: {mem_mb: 200}\nrows: [{profile: smoke, attacks: [fgsm], defense: none}]\n"
    )
    refused = start(grid, out, "--profile", "slurm", "--partition", "main")
    assert refused.wait(LIMIT) == 1
    said = (out / "said.txt").read_text()
    assert "FAILED anet-mnist5k-s0" in said
    # Slurm and the job's own watcher race; whoever ends it, the limit is told.
    assert "more memory than the 200 MB" in said or "MB and may hold 200" in said
    assert "raise `resources: {mem_mb" in said
