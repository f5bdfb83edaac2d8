"""The batch: real runs of a small grid, killed with -9 and taken up again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import fault_actions
from test_faults import tmpfs
from unfool import batch, grids
from unfool.disk import DiskFullError
from unfool.evaluation import Record, read_records
from unfool.lab import Lab
from unfool.notebooks import REPO, UsageError

FOUR = """# four experiments and what they share
common: {profile: smoke, attacks: [fgsm]}
rows:
  - {defense: [none, threshold, bits, median]}
"""
LIMIT = 300.0  # seconds, on a loaded machine


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "four.yaml"
    path.write_text(FOUR)
    return path


def start(grid: Path, out: Path, *more: str, said: Path | None = None) -> subprocess.Popen[str]:
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unfool", "batch", str(grid), "--out", str(out), *more]
    paths = os.pathsep.join([str(REPO / "lib"), os.environ.get("PYTHONPATH", "")])
    with (said or out / "said.txt").open("a") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, text=True, env={**os.environ, "PYTHONPATH": paths}
        )


def until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT
    while not there():
        assert process.poll() is None, "the batch ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def history(out: Path, what: str) -> Counter[str]:
    path = out / "history.tsv"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(name for _, name, now, _ in (li.split("\t") for li in lines) if now == what)


def problems(out: Path) -> list[str]:
    """What is lost, doubled or unfinished in a batch that says that it is done."""
    jobs = grids.load(out / "plan.json")
    found = [
        f"{name} is not done" for name, j in jobs.items() if not batch.result_of(j, out).exists()
    ]
    records = read_records(out / "records.jsonl")
    wanted = sum(job.records for job in jobs.values())
    if len(records) != wanted or len({r.id for r in records}) != wanted:
        found.append(
            f"{len(records)} records, {len({r.id for r in records})} different, not {wanted}"
        )
    found += [f"{n} ended {k} times" for n, k in history(out, "ended").items() if k != 1]
    found += [
        f"left behind: {p.name}"
        for p in out.glob("*/.*")
        if p.name != ".lock" and p.parent.name in ("records", "pages")
    ]
    return found


def ids_of_an_unbroken_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The same measurements in this process; an id is a digest of a record but for its timings."""
    monkeypatch.setenv("UNFOOL_RECORDS", str(tmp_path / "unbroken.jsonl"))
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "unbroken"))
    lab = Lab("smoke")
    made = lab.adversarial_set("fgsm")
    names = ("none", "threshold", "bits", "median")
    return sorted(lab.evaluate(lab.defense(name), made).id for name in names)


def test_kill_9_and_resume(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    out = tmp_path / "out"
    master = start(grid, out, "--cores", "2")

    def in_flight() -> bool:
        begun, ended = (sum(history(out, what).values()) for what in ("begun", "ended"))
        return any((out / "records").glob("*.jsonl")) and begun > ended

    until(in_flight, master)
    os.kill(master.pid, signal.SIGKILL)
    master.wait()
    ended = history(out, "ended")
    assert 0 < len(ended) < len(grids.load(out / "plan.json"))
    again = start(grid, out, "--resume")
    assert again.wait(LIMIT) == 0, (out / "said.txt").read_text()
    assert problems(out) == []
    begun = history(out, "begun")
    assert all(begun[name] == 1 for name in ended)  # what had ended was not run again
    records = read_records(out / "records.jsonl")
    assert sorted(r.id for r in records) == ids_of_an_unbroken_run(monkeypatch, tmp_path)
    # The control: a record that is lost, and one that is doubled, are seen.
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    for doctored in (lines[1:], [*lines, lines[0]]):
        (out / "records.jsonl").write_text("".join(doctored))
        assert len(problems(out)) == 1


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_master_that_is_asked_to_stop_ends_its_jobs(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The signal goes to the master alone, as `kill` or a scheduler sends it."""
    grid, out = tmp_path / "one.yaml", tmp_path / "out"
    grid.write_text("rows: [{profile: smoke, defense: none}]\n")  # three jobs
    master = start(grid, out, "--cores", "2")
    until(lambda: bool(history(out, "begun")), master)
    jobs = psutil.Process(master.pid).children(recursive=True)
    assert jobs
    master.send_signal(number)
    assert master.wait(30) == batch.STOPPED, (out / "said.txt").read_text()
    _, alive = psutil.wait_procs(jobs, timeout=5)
    assert alive == []
    said = (out / "said.txt").read_text()
    assert re.search(r"stopped: \d of 3 jobs done\ngo on with: make batch-resume\n$", said)
    assert "FAILED" not in said
    assert not held_locks(out)
    assert start(grid, out, "--resume").wait(LIMIT) == 0
    assert problems(out) == []


def test_a_signal_is_heard_whatever_handler_is_put_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Snakemake puts one; on Slurm the queue's jobs are cancelled. Other signals are no stop."""
    ended: list[str] = []
    monkeypatch.setattr(batch, "_cancel", lambda prefix, say: ended.append(prefix))
    monkeypatch.setattr(batch, "AGAIN", 0.02)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with batch._stoppable(lambda: batch._end_jobs(tmp_path, "slurm", print)) as heard:
            for number in before:
                signal.signal(number, lambda *_: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert heard == ended == []
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        assert heard == [signal.SIGTERM]
        assert len(ended) > 1  # again, for a job that begins just after the first time
        assert set(ended) == {batch._prefix(tmp_path)}
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert signal.set_wakeup_fd(-1) == -1  # none is left behind


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_job_says_how_to_go_on_too(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    import snakemake.cli

    def main(command: list[str]) -> None:
        os.kill(os.getpid(), number)
        time.sleep(9)

    said: list[str] = []
    monkeypatch.setattr(snakemake.cli, "main", main)
    # As `unfool` has them; what runs in the background of a shell has inherited a deaf SIGINT.
    both = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.signal(n, signal.default_int_handler) for n in both}
    try:
        status = batch.run(str(grid), out=tmp_path / "out", say=said.append)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert status == batch.STOPPED
    assert said[1:] == ["stopped: 0 of 6 jobs done", "go on with: make batch-resume"]


def held_locks(out: Path) -> list[str]:
    """Which locks are still held."""
    from filelock import FileLock, Timeout

    held = []
    for path in (out / ".lock", *(out / "locks").iterdir()):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            held.append(path.name)
    return held


def test_the_control_a_held_lock_is_seen(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "one.lock"):
        assert held_locks(tmp_path) == ["one.lock"]
    assert held_locks(tmp_path) == []


def test_a_job_that_is_done_and_the_kernel_of_the_unit_import_nothing_slow() -> None:
    """What a job needs is imported when it is known that it has to be done."""
    slow = "print(*{'nbformat', 'papermill', 'snakemake', 'torch'} & {*sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    for first, wanted in (("unfool.batch, unfool.grids", ""), ("nbformat", "nbformat")):
        code = f"import sys, {first}; {slow}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == wanted, done.stderr


HUNGRY = """
import sys, time
from unfool.batch import _watch_memory
import subprocess, threading
threading.Thread(target=_watch_memory, args=("hungry", int(sys.argv[1])), daemon=True).start()
subprocess.run([sys.executable, "-c", "x = bytearray(400_000_000); import time; time.sleep(2)"])
"""


def test_a_job_may_not_hold_more_memory_than_it_asked_for() -> None:
    """Its children count."""
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    for limit, status in ((200, 1), (2000, 0)):
        done = subprocess.run(
            [sys.executable, "-c", HUNGRY, str(limit)], capture_output=True, text=True, env=env,
            check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        said = r"MemoryError: hungry held \d+ MB and may hold 200: raise `resources: \{mem_mb: 400"
        assert bool(re.search(said, done.stderr)) is (limit == 200)


def test_a_job_over_its_memory_fails_and_says_so(tmp_path: Path) -> None:
    path, out = tmp_path / "big.yaml", tmp_path / "out"
    row = {"profile": "smoke", "defense": "none"}
    path.write_text(json.dumps({"rows": [row], "resources": {"mem_mb": 120}}))  # torch needs more
    assert start(path, out, "--cores", "1").wait(LIMIT) == 1
    (failed,) = [li for li in (out / "said.txt").read_text().splitlines() if "FAILED a" in li]
    assert "MB and may hold 120: raise `resources: {mem_mb: 240}` in the grid" in failed


def test_a_job_that_fails_is_named_with_its_cause(tmp_path: Path) -> None:
    """The attack runs out of its range in the kernel; the others are done all the same."""
    path, out = tmp_path / "bad.yaml", tmp_path / "out"
    row = {"profile": "smoke", "defense": "threshold", "attacks": ["fgsm"]}
    rows = [{**row, "settings": {"level": level}} for level in (0.5, -7.0)]
    path.write_text(json.dumps({"rows": rows}))
    assert start(path, out, "--cores", "2").wait(LIMIT) == 1
    said = (out / "said.txt").read_text().splitlines()
    failed = [line for line in said if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "-7" in failed[0]
    assert "3 of 4 jobs done, 1 FAILED, 0 not begun; 1 records" in said[-2]
    assert "batch-resume" in said[-1]


def test_a_dry_run_counts_what_is_left_and_writes_nothing(grid: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    assert batch.run(str(grid), dry=True, out=out, cores=2, say=said.append) == 0
    assert not out.exists()
    assert "experiment        4      4" in said[0]
    job = next(j for j in grids.plan(grid) if j.kind == "experiment")
    batch.result_of(job, out).parent.mkdir(parents=True)
    batch.result_of(job, out).write_text("")
    batch.run(str(grid), dry=True, out=out, say=said.append)
    assert "experiment        4      3" in said[1]


def test_a_second_batch_in_the_same_folder_is_refused(grid: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(UsageError, match="another batch is at work"):
        batch.run(str(grid), out=out)


def test_what_cannot_be_run_is_told_first(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="unknown profile 'cloud': there are local, slurm"):
        batch.run(str(grid), "cloud", out=tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sinfo is not there: is this a machine of a Slurm"):
        batch.run(str(grid), "slurm", out=tmp_path / "out")
    with pytest.raises(UsageError, match="no batch to resume: begin one"):
        batch.resume(tmp_path)
    assert not (tmp_path / "out").exists()


def test_records_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment whose notebook leaves too few records is not done."""
    (job,) = [j for j in grids.plan("smoke") if j.kind == "experiment"][:1]
    (tmp_path / "plan.json").write_text(grids.dump([job]))
    line = Path(REPO / "results/records/classroom.jsonl").read_text().splitlines()[0] + "\n"

    def papermill(path: Path, output: Path, parameters: dict[str, object]) -> None:
        output.write_text("{}")
        Path(os.environ["UNFOOL_RECORDS"]).write_text(line * lines)

    monkeypatch.setattr(batch, "_papermill", papermill)
    lines = 1
    with pytest.raises(RuntimeError, match="left 1 records, not 2"):
        batch.one(job.name, tmp_path)
    assert not batch.result_of(job, tmp_path).exists()
    lines = 2
    before = threading.active_count()
    batch.one(job.name, tmp_path)
    batch.one(job.name, tmp_path)  # is done: not run again
    assert threading.active_count() == before, "a watcher of memory outlives the job"
    assert isinstance(read_records(batch.result_of(job, tmp_path))[0], Record)
    assert history(tmp_path, "begun")[job.name] == 2
    assert (tmp_path / "done" / "experiment" / job.name).exists()


def test_damaged_records_of_a_job_are_named_and_counted(tmp_path: Path) -> None:
    jobs = [j for j in grids.plan("smoke") if j.kind == "experiment"][:2]
    line = Path(REPO / "results/records/classroom.jsonl").read_text().splitlines()[0]
    said: list[str] = []
    for text, told in ((f"{line}\n{line[:40]}", 1), (f"{line}\n", 0)):  # the second: the control
        for job, own in zip(jobs, (text, f"{line}\n"), strict=True):
            batch.result_of(job, tmp_path).parent.mkdir(parents=True, exist_ok=True)
            batch.result_of(job, tmp_path).write_text(own)
        said.clear()
        assert batch._conclude(jobs, tmp_path, said.append) == 0
        assert "2 of 2 jobs done, 0 FAILED, 0 not begun; 2 records in" in said[0]
        assert ["line 2 is no record" in one for one in said[1:]] == [True, False][: 2 * told]


@pytest.mark.long
def test_the_smoke_grid_is_killed_five_times(tmp_path: Path) -> None:
    """24 experiments; the master is killed at moments that come of its progress."""
    out = tmp_path / "out"
    for target in (1, 5, 12, 20, 35):
        master = start(Path("smoke"), out)
        until(lambda: sum(history(out, "ended").values()) >= target, master)  # noqa: B023
        os.kill(master.pid, signal.SIGKILL)
        master.wait()
    assert start(Path("smoke"), out).wait(1800) == 0
    assert problems(out) == []


# --- the grid on a full disk ---------------------------------------------------------------------


def room(disk: Path, pages: int) -> None:
    """Leave so many pages on a small disk."""
    stat = os.statvfs(disk)
    size = (stat.f_blocks - stat.f_bfree + pages) * stat.f_bsize
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize(
    ("when", "pages"),
    [
        ("begun", 2),
        *(
            pytest.param(when, pages, marks=pytest.mark.long)
            for when, pages in (("begun", 0), ("begun", 9), ("planned", 0), ("planned", 3))
        ),
    ],
)
def test_a_disk_that_fills_up_while_a_grid_runs(
    when: str, pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Its experiment or, before it begins, Snakemake is left with so many pages of 4 kB."""
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "store"))
    grid, said = tmp_path / "one.yaml", tmp_path / "said.txt"
    grid.write_text("rows: [{profile: smoke, attacks: [fgsm], defense: none}]\n")
    *shared, experiment = grids.plan(grid)
    with tmpfs(tmp_path / "disk", "16m") as disk:
        out = disk / "out"
        out.mkdir()
        (out / "plan.json").write_text(grids.dump([*shared, experiment]))
        for job in shared:
            batch.one(job.name, out)
        before = finished(out)
        assert len(before) == len(shared)
        master = start(grid, out, said=said)
        begun = {
            "planned": (out / "again.json").exists,
            "begun": lambda: history(out, "begun")[experiment.name] == 1,
        }[when]
        until(begun, master)
        room(disk, pages)
        assert master.wait(LIMIT) == 2, said.read_text()
        *_, count, last = said.read_text().splitlines()
        assert count.startswith("2 of 3 jobs done, ")
        assert last.startswith(f"unfool: the disk under {out} is full; free some, then give the")
        assert "Traceback" not in said.read_text()
        assert finished(out) == before
        assert not list((out / "pages").glob("[!.]*"))
        room(disk, 1000)
        assert start(grid, out, said=said).wait(LIMIT) == 0, said.read_text()
        assert problems(out) == []
        assert {name: history(out, "begun")[name] for name in before} == before
        (record,) = read_records(out / "records.jsonl")
    lab = Lab("smoke")
    assert record.id == lab.evaluate(None, lab.adversarial_set("fgsm")).id


def test_a_batch_on_a_full_disk_says_so_and_begins_nothing(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    ran: list[int] = []
    monkeypatch.setattr(batch, "_snakemake", lambda *_: ran.append(1))
    with tmpfs(tmp_path / "disk", "1m") as disk:
        room(disk, 3)  # a plan would find room
        with pytest.raises(DiskFullError, match=f"the disk under {disk}/out is full; free some"):
            batch.run(str(grid), out=disk / "out", say=said.append)
        assert (ran, said) == ([], [])
        room(disk, 200)  # the control
        assert batch.run(str(grid), out=disk / "out", say=said.append) == 1
        assert ran == [1]
        assert "0 of 6 jobs done, 0 FAILED, 6 not begun" in said[1]


# --- the grid, killed by the clock ----------------------------------------------------------------


def begin(out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the four experiments with a store of their own, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "four.yaml").write_text(FOUR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFOOL_STORE", str(out / "store"))
        patch.delenv("UNFOOL_SHARED_STORE", raising=False)
        return start(out / "four.yaml", out, "--cores", "2", *more)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, Any]:
    """The four experiments without a kill: their folder, their seconds, and what they leave."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    begun = time.monotonic()
    assert begin(out).wait(LIMIT) == 0
    return out, time.monotonic() - begun, fault_actions.problems("grid", out, None)


def finished(out: Path) -> dict[str, int]:
    """The jobs that are done, and how often each was begun."""
    if not (out / "plan.json").exists():
        return {}
    begun, jobs = history(out, "begun"), grids.load(out / "plan.json")
    return {name: begun[name] for name, j in jobs.items() if batch.result_of(j, out).exists()}


def half_written(out: Path, whole: Any) -> list[str]:
    """Which artifacts and records are there and are not those of the unbroken run."""
    left = fault_actions.problems("grid", out, None)
    left["records"].pop("records.jsonl", None)  # of a batch that ended unfinished: a part
    return [
        name for kind in left for name, got in left[kind].items() if whole[kind].get(name) != got
    ]


def differs(out: Path, whole: Any, before: dict[str, int]) -> list[str]:
    """What is lost, doubled, other than in the unbroken run, or was finished and ran again."""
    after = finished(out)
    found = [f"{name} ran again" for name, n in before.items() if after.get(name) != n]
    return found + problems(out) + fault_actions.problems("grid", out, whole)


def strike(master: subprocess.Popen[str], moment: float, who: str, draw: random.Random) -> str:
    """Kill the master or one of its workers after so many seconds; say which, "" if it had ended.

    A worker is the process of a job or its kernel. The master goes on without it, to its end.
    """
    with suppress(subprocess.TimeoutExpired):
        master.wait(moment)
    while master.poll() is None:
        with suppress(psutil.NoSuchProcess):
            victims = [psutil.Process(master.pid)]
            if who == "worker":
                under = victims[0].children(recursive=True)
                ours = {"unfool.batch", "ipykernel_launcher"}
                victims = [process for process in under if ours & {*process.cmdline()}]
            if victims:
                victim = draw.choice(victims)
                said = " ".join(victim.cmdline()[1:4])
                victim.kill()
                master.wait(LIMIT)
                return said
        time.sleep(0.02)
    return ""


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_of_the_grid_at_a_random_moment(
    seed: int, tmp_path: Path, unbroken: tuple[Path, float, Any]
) -> None:
    """Of the master or of a worker, as the seed draws; seeds 0 to 9 draw both."""
    _, takes, whole = unbroken
    draw, out, killed = random.Random(seed), tmp_path / "out", ""
    who = draw.choice(["master", "worker"])
    while not killed:  # a run that was faster than the unbroken one may have ended before
        shutil.rmtree(out, ignore_errors=True)
        moment = draw.uniform(0, takes)
        killed = strike(begin(out), moment, who, draw)
    before = finished(out)
    print(f"{who} killed at {moment:.1f} of {takes:.1f} s, {len(before)} jobs done: {killed}")
    assert half_written(out, whole) == []
    again = ["--resume"] if (out / "again.json").exists() else []  # not yet: the same command
    assert begin(out, *again).wait(LIMIT) == 0, (out / "said.txt").read_text()
    assert differs(out, whole, before) == []


@pytest.mark.long
def test_the_control_of_the_grid_what_is_not_as_unbroken_is_seen(
    tmp_path: Path, unbroken: tuple[Path, float, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record doubled, lost or other, a damaged artifact, a resume that forgets what was done."""
    made, _, whole = unbroken
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "out" / "store"))

    def doctored(doctor: Callable[[Path], object]) -> tuple[list[str], list[str]]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
        before = finished(out)
        doctor(out)
        return half_written(out, whole), differs(out, whole, before)

    def rewrite(pattern: str, change: Callable[[str], str]) -> Callable[[Path], object]:
        def doctor(out: Path) -> None:
            path = next(out.glob(pattern))
            path.write_text(change(path.read_text()))

        return doctor

    def forget(out: Path) -> None:
        """A finished job is begun again, as by a resume that does not look."""
        name = next(name for name, j in grids.load(out / "plan.json").items() if not j.needs)
        (out / "made" / name).unlink()
        batch.one(name, out)  # the store has it: nothing is computed

    def cut(out: Path) -> None:
        weights = next((out / "store" / "classifier").glob("*/weights.safetensors"))
        os.truncate(weights, weights.stat().st_size // 2)

    assert doctored(lambda out: None) == ([], [])
    for half, doctor, told in (
        (False, rewrite("records.jsonl", lambda text: text + text.splitlines()[0] + "\n"), "5 rec"),
        (True, rewrite("records/*.jsonl", lambda text: ""), "instead of"),
        (True, rewrite("records/*.jsonl", lambda text: text.replace('"seed": 0', '"seed": 1')),
         "instead of"),
        (True, cut, "instead of"),
        (False, forget, "ran again"),
    ):  # fmt: skip
        corrupt, other = doctored(doctor)
        assert bool(corrupt) is half
        assert any(told in line for line in other)
