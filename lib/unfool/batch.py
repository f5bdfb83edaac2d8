"""The batch: a grid's jobs run by Snakemake, here or on Slurm; killed and resumed at will.

    build/batch/GRID/plan.json         the jobs, as `unfool.grids.plan` made them
                     records/JOB.jsonl an experiment's records: once this file is there, it is done
                     pages/JOB.ipynb   the notebook as it ran
                     made/JOB          a shared artifact is in the store
                     done/KIND/JOB     the same, for Snakemake, which deletes it when it is in doubt
                     logs/, benchmarks/, locks/, history.tsv
                     records.jsonl     all records of the grid, in its order

`python -m unfool.batch JOB` does one job; only what is not done yet imports torch.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unfool.disk import append, full, is_full, told_if_full
from unfool.files import write_text
from unfool.grids import KINDS, Job, dump, grid_path, load, makespan, plan
from unfool.notebooks import LESSONS, NEVER_STARTED, REPO, UsageError
from unfool.report import joined, read_records, skipped_lines

WORKFLOW = REPO / "workflow"
OUT = REPO / "build" / "batch"
WAIT_FOR_SLURM = 60.0  # seconds that cancelled jobs get to end
POLL = 0.25  # seconds between two looks at a job's memory
AGAIN = 1.0  # seconds until jobs that began after a signal are ended, too
AGAIN_WHEN_FREE = "then give the same command again (what is done stays)"
STOPPED = 130  # exit status, as a shell has it after Ctrl-C
Say = Callable[[str], None]


# ------------------------------------------------------------------------------------ one job


def one(name: str, folder: Path) -> None:
    """Do one job of the plan in `folder`, unless it is done already.

    A lock makes a second process for the same job wait: after a kill the first may still be at
    work. Whatever ends here in a file of the job's own is written under another name and renamed.
    """
    from filelock import FileLock

    job = load(folder / "plan.json")[name]
    with told_if_full(folder, AGAIN_WHEN_FREE):
        (folder / "locks").mkdir(exist_ok=True)
        with FileLock(folder / "locks" / f"{name}.lock"):
            if not result_of(job, folder).exists():
                _note(folder, name, "begun")
                _experiment(job, folder) if job.kind == "experiment" else _build(job, folder)
                _note(folder, name, "ended")
        write_text(folder / "done" / job.kind / name, "")


def process(name: str, folder: Path) -> None:
    """Do one job as all that this process is for: over the job's memory, it ends."""
    limit = load(folder / "plan.json")[name].mem_mb
    if limit:
        threading.Thread(target=_watch_memory, args=(name, limit), daemon=True).start()
    one(name, folder)


def _watch_memory(name: str, limit: int) -> None:
    """End this process, and the kernel that it started, when they hold more MB than they may.

    What is resident counts: a limit of the system's would count what torch maps and never touches.
    """
    import psutil  # type: ignore[import-untyped]

    from unfool.grading.warden import held

    me = psutil.Process()
    while True:
        tree = [me, *me.children(recursive=True)]
        megabytes = held(tree, limit)
        if megabytes > limit:
            print(
                f"MemoryError: {name} held {megabytes:.0f} MB and may hold {limit}: raise "
                f"`resources: {{mem_mb: {2 * limit}}}` in the grid",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            _kill(tree[1:])
            os._exit(1)
        time.sleep(POLL)


def _kill(processes: Sequence[Any]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def result_of(job: Job, folder: Path) -> Path:
    """Return the file that says that a job is done: its records, or a mark."""
    if job.kind == "experiment":
        return folder / "records" / f"{job.name}.jsonl"
    return folder / "made" / job.name


def _note(folder: Path, name: str, what: str) -> None:
    """Append a line to history.tsv: what was begun and ended, when, by whom."""
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}\t{name}\t{what}\t{os.getpid()}\n"
    append(folder / "history.tsv", line)


def _build(job: Job, folder: Path) -> None:
    """Have the lab make a shared artifact, which leaves it in the store."""
    from unfool.attacks import AttackSettings
    from unfool.grids import attack_list
    from unfool.lab import Lab

    own = dict(job.parameters)
    lab = Lab(own["profile"], own["dataset"], own["seed"], own["device"])
    if job.kind == "classifier":
        lab.classifier(own["classifier"])
    elif job.kind == "adversarial":
        attack = AttackSettings(own["attack"], own["settings"])
        lab.adversarial_set(attack, classifier=own["classifier"], split=own["split"])
    else:
        seen = attack_list(own["dataset"], own["attacks"]) if own["attacks"] else None
        lab.defense(own["defense"], classifier=own["classifier"], attacks=seen, **own["settings"])
    write_text(result_of(job, folder), json.dumps(job.parameters, sort_keys=True) + "\n")


def _experiment(job: Job, folder: Path) -> None:
    """Run the notebook; its page and then its records appear whole, or not at all."""
    records = result_of(job, folder)
    records.parent.mkdir(parents=True, exist_ok=True)
    part = records.with_name(f".{records.name}.part")
    part.unlink(missing_ok=True)
    os.environ["UNFOOL_RECORDS"] = str(part)  # what `Lab.evaluate` of the kernel appends to
    page = folder / "pages" / f"{job.name}.ipynb"
    page.parent.mkdir(parents=True, exist_ok=True)
    running = page.with_name(f".{page.stem}.running.ipynb")
    _papermill(LESSONS / f"{job.notebook}.ipynb", running, job.parameters)
    lines = part.read_text("utf-8").splitlines() if part.exists() else []
    if job.records not in (-1, len(lines)):
        raise RuntimeError(f"{job.name} left {len(lines)} records, not {job.records}")
    running.replace(page)
    if lines:
        with part.open("rb+") as file:  # on the disk before its name says that it is whole
            os.fsync(file.fileno())
        part.replace(records)
    else:
        write_text(records, "")
    Path(f"{part}.lock").unlink(missing_ok=True)


def _papermill(path: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute in this process: a papermill of its own would cost three seconds more.

    Two kernels that start at once may draw the same free port: that is tried once more.
    """
    import papermill

    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(path), str(output), parameters, kernel_name="python3", language="python",
                cwd=str(path.parent), progress_bar=False, log_output=True,
            )  # fmt: skip
        except RuntimeError as error:
            if attempt == 2 or not any(sign in str(error) for sign in NEVER_STARTED):
                raise
        else:
            return


# ------------------------------------------------------------------------------------- all jobs


def run(
    grid: str,
    profile: str = "local",
    *,
    cores: int | None = None,
    partition: str = "",
    dry: bool = False,
    out: Path | None = None,
    say: Say = print,
) -> int:
    """Run a grid, or what of it is not done yet; return 0 if all of it is done in the end.

    SIGINT (Ctrl-C) and SIGTERM end its jobs at once, and then 130 is returned.

    Args:
        grid: a name in `workflow/grids/`, or a path.
        profile: a folder of `workflow/profiles/`: "local" or "slurm".
        cores: how many to use here; how many jobs to have in the queue at most on Slurm.
        partition: of Slurm; "" for its default.
        dry: say what would be run, and for how long, and run nothing.
        out: folder of the run, by default `build/batch/GRID`.
        say: is told what happens, line by line.

    Raises:
        UsageError: a fault in the grid, an unknown profile or partition, or another batch that is
            at work in the same folder.
        DiskFullError: the disk of the run's folder is full; what is done stays.
    """
    from filelock import FileLock, Timeout

    _profile(profile)
    name, jobs = grid_path(grid).stem, plan(grid)
    out = (out or OUT / name).resolve()
    if dry:
        say(forecast(jobs, out, cores or os.cpu_count() or 1))
        return 0
    if profile == "slurm":
        _check_partition(partition)
    try:
        with told_if_full(out, AGAIN_WHEN_FREE):
            out.mkdir(parents=True, exist_ok=True)
        with told_if_full(out, AGAIN_WHEN_FREE), FileLock(out / ".lock", timeout=0):
            if is_full(out):
                raise full(out, AGAIN_WHEN_FREE)
            write_text(out / "plan.json", dump(jobs))
            again = {
                "grid": str(grid_path(grid)),
                "profile": profile,
                "cores": cores,
                "partition": partition,
            }
            write_text(out / "again.json", json.dumps(again) + "\n")
            if profile == "slurm":
                _cancel(_prefix(out), say)
            say(f"{name}: {len(jobs)} jobs, {len(left(jobs, out))} to do, in {out}")
            with _stoppable(lambda: _end_jobs(out, profile, say)) as heard:
                _snakemake(out, profile, cores, partition)
            return _stopped(jobs, out, say) if heard else _conclude(jobs, out, say)
    except Timeout:
        raise UsageError(f"another batch is at work in {out}: wait for it, or end it") from None


def resume(out: Path | None = None, *, say: Say = print) -> int:
    """Take up the batch of a folder, by default the one begun last; see `run`.

    Raises:
        UsageError: there is none.
    """
    begun = [out / "again.json"] if out else list(OUT.glob("*/again.json"))
    last = max((p for p in begun if p.exists()), key=lambda p: p.stat().st_mtime, default=None)
    if last is None:
        raise UsageError("no batch to resume: begin one with `make batch GRID=smoke`")
    again = json.loads(last.read_text("utf-8"))
    return run(**again, out=last.parent, say=say)


def left(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Return the jobs that are not done."""
    return [job for job in jobs if not result_of(job, out).exists()]


def forecast(jobs: Sequence[Job], out: Path, cores: int) -> str:
    """Return a table of jobs and expected hours, for people."""
    lines = [f"{'kind':<12} {'jobs':>6} {'to do':>6} {'hours':>8}"]
    todo, total = left(jobs, out), 0.0
    for kind in KINDS:
        some = [job for job in todo if job.kind == kind]
        hours = sum(job.seconds for job in some) / 3600
        total += hours
        lines.append(
            f"{kind:<12} {sum(j.kind == kind for j in jobs):>6} {len(some):>6} {hours:>8.2f}"
        )
    lines.append(f"{'all':<12} {len(jobs):>6} {len(todo):>6} {total:>8.2f} one after another")
    gpu = " and one GPU" if any(job.gpus for job in todo) else ""
    lines.append(f"expected: {makespan(todo, cores) / 3600:.2f} hours on {cores} cores{gpu}")
    return "\n".join(lines)


def _profile(name: str) -> None:
    there = sorted(path.parent.name for path in (WORKFLOW / "profiles").glob("*/config.yaml"))
    if name not in there:
        raise UsageError(f"unknown profile '{name}': there are {', '.join(there)}")


def _snakemake(out: Path, profile: str, cores: int | None, partition: str) -> None:
    """Run Snakemake in this process, which so is the master; what failed is found out afterwards.

    Its own lock would outlive a kill, and ours does not: hence --nolock.
    """
    command = [
        "--snakefile", str(WORKFLOW / "Snakefile"), "--directory", str(out), "--nolock",
        "--profile", str(WORKFLOW / "profiles" / profile),
    ]  # fmt: skip
    if profile == "slurm":
        command += ["--slurm-jobname-prefix", _prefix(out), "--slurm-logdir", str(out / "slurm")]
        command += ["--jobs", str(cores)] if cores else []
        command += ["--default-resources", f"slurm_partition={partition}"] if partition else []
    elif cores:
        command += ["--cores", str(cores)]
    logging.raiseExceptions = False  # its log on a full disk: no traceback for each line of it
    # It exits in any case; a signal before its jobs begin comes out as it is, and was heard.
    with suppress(SystemExit, KeyboardInterrupt):
        import snakemake.cli

        snakemake.cli.main(command)


@contextmanager
def _stoppable(end: Callable[[], None]) -> Iterator[list[int]]:
    """Call `end` once a signal asks this process to stop; yields the signals that were heard.

    Snakemake puts a handler of its own in place of ours, which waits for the jobs that run, for
    hours perhaps. So a thread listens: Python writes each signal's number into a pipe. `end` is
    called again and again until the block is left, because a job may begin just after it.
    """
    heard: list[int] = []
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def listen() -> None:
        while True:
            if select.select([ear], [], [], AGAIN if heard else None)[0]:
                number = os.read(ear, 1)
                if not number:
                    return
                heard.extend({*number} & {signal.SIGINT, signal.SIGTERM})
            if heard:
                end()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before, handler = signal.set_wakeup_fd(mouth), signal.getsignal(signal.SIGTERM)
    try:
        yield heard
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        os.close(mouth)
        thread.join()
        os.close(ear)


def _end_jobs(out: Path, profile: str, say: Say) -> None:
    """End what runs, here or on Slurm: at any moment nothing half done counts."""
    import psutil

    if profile == "slurm":
        _cancel(_prefix(out), say)
    else:
        _kill(psutil.Process().children(recursive=True))


def _stopped(jobs: Sequence[Job], out: Path, say: Say) -> int:
    _joined(jobs, out)
    say(f"stopped: {len(jobs) - len(left(jobs, out))} of {len(jobs)} jobs done")
    say("go on with: make batch-resume")
    return STOPPED


def _conclude(jobs: Sequence[Job], out: Path, say: Say) -> int:
    """Join the records, say what failed and where its log is; 0 if nothing did.

    On a full disk a job may have left neither a line of history nor a word in its log.
    """
    missing = left(jobs, out)
    no_room = bool(missing) and is_full(out)
    began = {name for name in _history(out) if name}
    failed = [job for job in missing if job.name in began or _log(job, out).exists()]
    for job in failed:
        say(f"FAILED {job.name}: {_reason(job, out, no_room)}")
    done, waiting = len(jobs) - len(missing), len(missing) - len(failed)
    told = f"{done} of {len(jobs)} jobs done, {len(failed)} FAILED, {waiting} not begun"
    if no_room:
        say(told)
        raise full(out, AGAIN_WHEN_FREE)
    records, skipped = _joined(jobs, out)
    say(f"{told}; {records} records in {out / 'records.jsonl'}")
    for line in skipped_lines(skipped):
        say(line)
    if missing and not failed:
        say("what kept them from beginning stands above, in Snakemake's own words")
    if missing:
        say("when the cause is mended, go on with: make batch-resume")
    return 1 if missing else 0


def _joined(jobs: Sequence[Job], out: Path) -> tuple[int, list[str]]:
    """Write all records of the grid into one file, in its order; how many, and what is none."""
    paths = [result_of(job, out) for job in jobs if job.kind == "experiment"]
    write_text(out / "records.jsonl", joined(paths))
    records, skipped = read_records(out / "records.jsonl")
    return len(records), skipped


def _history(out: Path) -> list[str]:
    path = out / "history.tsv"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [line.split("\t")[1] for line in lines if line.count("\t") == 3]


def _log(job: Job, out: Path) -> Path:
    return out / "logs" / job.kind / f"{job.name}.log"


def _reason(job: Job, out: Path, no_room: bool) -> str:
    """The last line of a job's log; one that was killed leaves no error there."""
    log = _log(job, out)
    text = log.read_text("utf-8", errors="replace").strip() if log.exists() else ""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if "Error" in last or "error" in last:
        return f"{last[:400]} (log: {log})"
    if no_room:
        return f"its last words found no room on the full disk (log: {log})"
    return (
        f"it was killed without a word, perhaps for more memory than the {job.mem_mb} MB or more "
        f"time than the {job.minutes} minutes that it asked for: raise `resources: {{mem_mb: …, "
        f"minutes: …}}` in the grid (log: {log})"
    )


# ----------------------------------------------------------------------------------------- Slurm


def _prefix(out: Path) -> str:
    """What the names of this folder's Slurm jobs begin with, so that they are found again."""
    grid = re.sub(r"[^A-Za-z0-9]+", "-", out.name)
    return f"unfool-{grid}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}"


def _slurm(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]} is not there: is this a machine of a Slurm cluster?")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.splitlines()


def _check_partition(name: str) -> None:
    there = [line.strip() for line in _slurm("sinfo", "--noheader", "--format", "%R")]
    if name and name not in there:
        raise UsageError(f"unknown partition '{name}': this cluster has {', '.join(there)}")


def _cancel(prefix: str, say: Say) -> None:
    """End what a killed master left in the queue: it would write the same files a second time."""

    def mine() -> list[str]:
        listed = _slurm("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i %j")
        rows = [line.split() for line in listed]
        return [row[0] for row in rows if len(row) == 2 and row[1].startswith(prefix)]

    orphans = mine()
    if not orphans:
        return
    say(f"ending {len(orphans)} jobs of an earlier run: {' '.join(orphans)}")
    _slurm("scancel", *orphans)
    until = time.monotonic() + WAIT_FOR_SLURM
    while mine():
        if time.monotonic() > until:
            raise UsageError(f"Slurm does not end the jobs {' '.join(mine())}: ask its operator")
        time.sleep(0.5)


if __name__ == "__main__":
    process(sys.argv[1], Path.cwd())
