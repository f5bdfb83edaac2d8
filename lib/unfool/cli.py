"""The command `unfool`: what can be done with the course from a terminal. No logic lives here."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

REPO = Path(__file__).resolve().parents[2]
PROFILES = ("smoke", "classroom", "desk", "paper")  # as in profiles.py, which imports torch
RUN_EXAMPLES = """examples:
  unfool run                         every lesson, as committed
  unfool run 02 07                   two of them
  unfool run --profile smoke         a quick look at whether they run at all
  unfool run 02 -p seed 3 -p eps 0.2
  unfool run 02 --update             write the executed notebook back, cleaned

Executed notebooks, logs, records and the HTML report go to --out. The exit status is 1 when a
notebook failed; drifted check lines are shown, and are not a failure.
"""
EVALUATE_EXAMPLES = """examples:
  unfool evaluate --defense my_module:MyPurifier
  unfool evaluate --defense my_module:MyPurifier --classifier my_module:net --dataset folder:PATH
  unfool evaluate --defense pix2pix --eps 0.1 0.15 --images 50
  unfool evaluate --defense threshold --bpda identity
  unfool evaluate --defense my_module:Noisy --eot 10

my_module.py lies in the current folder, or in --path. MyPurifier is an nn.Module, its class, or a
function without arguments that makes one, in eval mode: images (N, C, H, W) in [0, 1] -> images in
[0, 1], perhaps with rejects(images) -> (N,) bool. A classifier returns logits. Its weights are its
own affair. A run that was stopped goes on where it was when it is started again.
"""

BATCH_EXAMPLES = """examples:
  unfool batch smoke --dry-run             jobs and expected hours
  unfool batch smoke                       on this machine
  unfool batch table2 --profile slurm --partition long
  unfool batch --resume                    the batch that was run last, after a kill

Records and pages go to build/batch/GRID; workflow/README.md tells more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 good, 1 something failed, 2 misused."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = options.command(options)
    except KeyboardInterrupt:
        print("\nunfool: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        return _misused(f"{error.strerror or error}: {error.filename}" if error.filename else error)
    except ValueError as error:
        from unfool.notebooks import UsageError

        if not isinstance(error, UsageError):
            raise
        return _misused(error)
    return status


def _misused(error: object) -> int:
    print(f"unfool: {error}", file=sys.stderr)
    return 2


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # so that the notebooks are ended as with Ctrl-C


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unfool",
        description="A course on adversarial examples: run its notebooks, judge defences.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_evaluate(commands)
    doctor = commands.add_parser("doctor", help="say what this machine has, and what is missing")
    doctor.set_defaults(command=_doctor)
    workspace = commands.add_parser(
        "workspace", help="copy notebooks and exercises to work/; never overwrites your changes"
    )
    workspace.set_defaults(command=_workspace)
    exercises = commands.add_parser(
        "exercises", help="make exercises/ from solutions/, byte for byte the same every time"
    )
    exercises.add_argument(
        "--run", action="store_true", help="first execute the solutions and write them back"
    )
    exercises.set_defaults(command=_exercises)
    _add_grade(commands)
    _add_batch(commands)
    for name, what in (("tables", "tables"), ("figures", "figures by epoch")):
        made = commands.add_parser(
            name, help=f"build the paper's {what} from the committed records, under results/"
        )
        made.add_argument(
            "--records", type=Path, nargs="+", default=[], metavar="FILE",
            help="more records, such as build/batch/table2/records.jsonl",
        )  # fmt: skip
        made.set_defaults(command=_tables if name == "tables" else _figures)
    _add_capstone(commands)
    slides = commands.add_parser("slides", help="slides of the lessons, as pages that need nothing")
    slides.add_argument("names", nargs="*", metavar="NN", help="number or name; none: every lesson")
    where = REPO / "build" / "slides"
    slides.add_argument("--out", type=Path, default=where, metavar="DIR", help="(build/slides)")
    slides.set_defaults(command=_slides)
    report = commands.add_parser("report", help="build the HTML report of the last run again")
    _add_out(report)
    report.set_defaults(command=_report)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="run notebooks without a browser and build a report",
        description="Run notebooks from top to bottom, without a browser, and build a report.",
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("names", nargs="*", metavar="NN", help="number or name; none: every lesson")
    run.add_argument("--profile", choices=PROFILES, help="scale; default: as in the notebook")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebook, its value as JSON; may be repeated",
    )
    _add_out(run)
    run.add_argument("-j", "--jobs", type=int, metavar="N", help="run N at once (2; 1 on one core)")
    run.add_argument("--update", action="store_true", help="write executed notebooks back")
    run.add_argument("--no-report", action="store_true", help="build no HTML report")
    run.add_argument("--timeout", type=float, metavar="S", help="seconds that a notebook may take")
    run.set_defaults(command=_run)


def _add_grade(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    where = REPO / "work" / "grading"
    grade = commands.add_parser(
        "grade",
        help="grade a folder of exercises: points, tables, a feedback page for each student",
        description="Grade SUBMISSIONS/STUDENT/exNN_….ipynb by nbgrader. What was graded is not "
        "graded again unless it, its exercise, a check or a limit changed.",
    )
    grade.add_argument("submissions", type=Path, metavar="SUBMISSIONS")
    grade.add_argument("--out", type=Path, default=where, metavar="DIR", help="(work/grading)")
    grade.add_argument("--seconds", type=float, default=120, help="for a notebook (120)")
    grade.add_argument("--memory", type=int, default=2000, help="MB, all its processes (2000)")
    grade.add_argument("--output", type=int, default=200, help="kB of text that is kept (200)")
    grade.add_argument("--processes", type=int, default=64, help="at once (64)")
    grade.add_argument("-j", "--jobs", type=int, default=2, metavar="N", help="judge N at once (2)")
    grade.add_argument("--seed", type=int, help="of the checks' inputs; default: as before, or new")
    grade.add_argument(
        "--students", type=Path, metavar="CSV", help="columns id,first_name,last_name,email"
    )
    grade.add_argument("--again", action="store_true", help="grade all of them again")
    grade.set_defaults(command=_grade)


def _add_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="run a grid of experiments with Snakemake, here or on Slurm; takes up what was killed",
        description="Run the experiments of a grid that are not done yet, here or on Slurm.",
        epilog=BATCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("grid", nargs="?", metavar="GRID", help="name in workflow/grids/, or a path")
    batch.add_argument("--profile", default="local", metavar="NAME", help="local or slurm")
    batch.add_argument("--cores", type=int, metavar="N", help="here: cores; on Slurm: jobs queued")
    batch.add_argument("--partition", default="", metavar="NAME", help="of Slurm")
    batch.add_argument("--out", type=Path, metavar="DIR", help="default: build/batch/GRID")
    batch.add_argument("--dry-run", action="store_true", help="jobs and expected hours only")
    batch.add_argument("--resume", action="store_true", help="take up the batch that was run last")
    batch.set_defaults(command=_batch)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="judge a defence, a classifier or data of your own; writes an HTML page",
        description="Take a defence before a classifier through the whole ladder of attackers.",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluate.add_argument
    add("--defense", required=True, metavar="D", help="my_module:attribute, or a name: pix2pix")
    add("--classifier", default="anet", metavar="C", help="the same, by default anet")
    add("--dataset", default="mnist5k", metavar="DATA", help="a name (mnist5k), or folder:PATH")
    add("--images", type=int, default=100, metavar="N", help="test images to attack (100)")
    add(
        "--eps",
        type=float,
        nargs="+",
        metavar="E",
        help="sizes, growing, up to 1 (grey .05 .1 .15 .3)",
    )
    add("--bpda", choices=["identity"], default="", help="for a defence without gradient")
    add("--eot", type=int, metavar="S", help="draws to average, for a randomised defence")
    add("--surrogate", metavar="D", help="like --defense: a copy that an attacker trained")
    add("--profile", choices=PROFILES, default="classroom", help="scale (classroom)")
    add("--seed", type=int, default=0, metavar="N", help="of all attacks (0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or auto (cpu)")
    add("--path", type=Path, metavar="DIR", help="folder of my_module (the current one)")
    add("--out", type=Path, metavar="DIR", help="folder of records and page (results/local)")
    evaluate.set_defaults(command=_evaluate)


def _add_capstone(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    where = REPO / "work" / "capstone"
    capstone = commands.add_parser(
        "capstone",
        help="a purifier for each student to break; score their attacks",
        description="make: a folder for each student. score: run their attacks, apart, on images "
        "that they don't have. See solutions/capstone.md.",
    )
    steps = capstone.add_subparsers(metavar="STEP", required=True)
    make = steps.add_parser("make", help="train a purifier for each student")
    make.add_argument("--students", type=Path, required=True, metavar="FILE", help="an id per line")
    make.add_argument("--profile", choices=PROFILES, default="classroom")
    make.set_defaults(command=_capstone_make)
    score = steps.add_parser("score", help="run what was handed in: FOLDER/STUDENT/capstone.ipynb")
    score.add_argument("submissions", type=Path, metavar="SUBMISSIONS")
    score.add_argument("--seconds", type=float, default=240, help="for a notebook (240)")
    score.add_argument("--memory", type=int, default=2000, help="MB, all its processes (2000)")
    score.set_defaults(command=_capstone_score)
    for step in (make, score):
        step.add_argument("--out", type=Path, default=where, metavar="DIR", help="(work/capstone)")


def _add_out(parser: argparse.ArgumentParser) -> None:
    where = REPO / "build" / "run"
    parser.add_argument(
        "--out", type=Path, default=where, metavar="DIR", help="folder of the run (build/run)"
    )


def _run(options: argparse.Namespace) -> int:
    from unfool.running import run

    results = run(
        options.names,
        options.profile,
        dict(options.parameter),
        options.out,
        options.update,
        options.jobs,
        timeout=options.timeout,
        report=not options.no_report,
    )
    return 0 if all(result.ok for result in results) else 1


def _batch(options: argparse.Namespace) -> int:
    from unfool import batch
    from unfool.notebooks import UsageError

    if options.resume:
        return batch.resume(options.out, say=_say)
    if not options.grid:
        raise UsageError("no grid: name one of workflow/grids/, such as `unfool batch smoke`")
    if options.cores is not None and options.cores < 1:
        raise UsageError(f"--cores must be 1 or more; got {options.cores}")
    return batch.run(
        options.grid,
        options.profile,
        cores=options.cores,
        partition=options.partition,
        dry=options.dry_run,
        out=options.out,
        say=_say,
    )


def _tables(options: argparse.Namespace) -> int:
    from unfool.paper import VERDICTS, write_tables

    made, skipped, paths = write_tables(options.records)
    for table in made:
        counts = ", ".join(f"{table.verdicts[v]} {v}" for v in VERDICTS if table.verdicts[v])
        _say(f"Table {table.number}: {counts}")
    _tell(skipped, paths)
    return 0


def _figures(options: argparse.Namespace) -> int:
    from unfool.paper import write_figures

    _tell(*write_figures(options.records))
    return 0


def _tell(skipped: Sequence[str], paths: Sequence[Path]) -> None:
    from unfool.report import skipped_lines

    for line in skipped_lines(skipped):
        _say(line)
    for path in paths:
        _say(f"wrote {path.relative_to(REPO) if path.is_relative_to(REPO) else path}")


def _say(line: str) -> None:
    print(line, flush=True)


def _evaluate(options: argparse.Namespace) -> int:
    from unfool.own_page import evaluate

    asked = vars(options)
    asked.pop("command")
    print(evaluate(**asked))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from unfool.doctor import as_text, report

    lines = report()
    print(as_text(lines))
    return 0 if all(line.ok for line in lines) else 1


def _workspace(options: argparse.Namespace) -> int:
    from unfool.workspace import sync

    for line in sync(REPO, REPO / "work"):
        print(line)
    return 0


def _exercises(options: argparse.Namespace) -> int:
    from unfool.exercises import generate, run_solution, sources

    for path in sources() if options.run else []:
        run_solution(path, REPO / "build" / "solutions")
        print(f"executed {path.name}", flush=True)
    for line in generate():
        print(line)
    return 0


def _grade(options: argparse.Namespace) -> int:
    from unfool.grading.run import grade
    from unfool.grading.sandbox import Limits

    limits = Limits(options.seconds, options.memory, options.output, options.processes)
    grade(
        options.submissions,
        options.out,
        limits,
        jobs=options.jobs,
        seed=options.seed,
        students=options.students,
        again=options.again,
    )
    return 0


def _capstone_make(options: argparse.Namespace) -> int:
    from unfool.capstone import make, roll
    from unfool.lab import Lab

    make(Lab(options.profile), roll(options.students), options.out.resolve(), stream=sys.stdout)
    return 0


def _capstone_score(options: argparse.Namespace) -> int:
    from unfool.capstone import score
    from unfool.grading.sandbox import Limits

    limits = Limits(options.seconds, options.memory)
    score(options.submissions.resolve(), options.out.resolve(), limits, stream=sys.stdout)
    return 0


def _slides(options: argparse.Namespace) -> int:
    from unfool.slides import export

    for page in export(options.names, options.out.resolve()):
        print(page)
    return 0


def _report(options: argparse.Namespace) -> int:
    from unfool.report import rebuild

    print(rebuild(options.out.resolve()))
    return 0
