"""Our attacks beside the public libraries': time, success, distortion, passes, memory.

`python3 course.py bench` makes the environment .venv-bench and runs this; in an environment that
holds only some of the libraries, `python -m benchmarks.attacks` compares with those.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from benchmarks import measure, scoring
from benchmarks.measure import CLASSIFIERS, WAYS, Bench, device_name, open_bench
from benchmarks.peers import PEERS, Comparison, comparisons, installed
from benchmarks.scoring import Row, append, finished, key_of
from unfool.artifacts import REPO
from unfool.progress import shown

LOCAL = REPO / "results" / "local"
SAVED = REPO / "benchmarks" / "results"
ATTACK_NAMES = tuple(comparisons("mnist5k"))

EXAMPLES = """examples:
  course.py bench --quick                      does it run? 2 to 8 images, a pair each; minutes
  course.py bench --attacks pgd deepfool       these two, with every library
  course.py bench --attacks cw --peers adv-lib foolbox --images 32 --repeat 3
  course.py bench --dataset mnist-m            colour: resnet8 on MNIST-M
  course.py bench --device cuda
  course.py bench --save                       and write the committed tables, benchmarks/results/

Every finished row is kept in DIR/bench.jsonl: the same call takes up where it was stopped, and a
call with --save of what has been measured only writes. Timings are worth something only on a
machine that does nothing else.
"""


class Misuse(ValueError):
    """What the caller can mend; only its text is shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, 1 where a library failed, 2 when misused, 130 when stopped."""
    options = parser().parse_args(arguments)

    def work() -> int:
        if options.memory:
            return tell_memory(options)
        check(options)
        return compare_all(options)

    return answered("bench", work)


def answered(name: str, work: Callable[[], int]) -> int:
    """Return what `work` does; 130 when it is stopped, 2 when misused, with a line that says so."""
    if not sys.stderr.isatty():
        os.environ.setdefault("UNFOOL_PROGRESS", "off")  # a log needs no bars
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\n{name}: stopped. The same command takes up where it was.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="course.py bench",
        description="Our attacks beside the public libraries', in one run on the same images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--attacks", nargs="+", metavar="A", default=ATTACK_NAMES, help=", ".join(ATTACK_NAMES))
    add("--peers", nargs="+", metavar="P", default=tuple(PEERS), help=", ".join(PEERS))
    add("--dataset", choices=CLASSIFIERS, default="mnist5k", help="default: %(default)s")
    add("--classifier", metavar="NAME", help="default: anet for mnist5k, resnet8 for mnist-m")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or auto; default: %(default)s")
    add("--images", type=int, metavar="N", help="images per attack; default: 32 to 256, see README")
    add("--repeat", type=int, default=5, metavar="K", help="pairs of timings; default: %(default)s")
    add("--quick", action="store_true", help="does it run? 2 to 8 images, one pair, one batch")
    add("--fresh", action="store_true", help="measure again what has been measured")
    add("--save", action="store_true", help="write the tables to benchmarks/results/, too")
    add("--out", type=Path, default=LOCAL, metavar="DIR", help="default: results/local")
    add("--memory", nargs=3, help=argparse.SUPPRESS)  # how the benchmark calls itself
    return top


def check(options: argparse.Namespace) -> None:
    """Refuse names that there are not and numbers that measure nothing."""
    for kind, names, known in (
        ("attack", options.attacks, ATTACK_NAMES),
        ("library", options.peers, tuple(PEERS)),
    ):
        unknown(kind, names, known)
    for flag in ("images", "repeat"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise Misuse(f"--{flag} must be at least 1, not {value}")
    if options.quick and options.save:
        raise Misuse("--quick shows that it runs, not how fast: --save needs a run without it")


def unknown(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the first name that is not known, with the one that may have been meant."""
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise Misuse(f"unknown {kind} {name!r}: choose from {', '.join(known)}{hint}")


def tell_memory(options: argparse.Namespace) -> int:
    """Print the growth of memory of one attack: this is the fresh process."""
    attack, library, n = options.memory
    bench = open_bench(options.dataset, options.classifier, "cpu", int(n), 1, True)
    print(measure.growth(bench, attack, library, int(n)))
    return 0


# --- all rows -------------------------------------------------------------------------------------

Job = tuple[str, str, str, int]
"""Attack, peer, way and number of images."""


def plan(options: argparse.Namespace, peers: Sequence[str]) -> list[Job]:
    """Return what to measure, in order. A batch larger than the images is left out."""
    jobs: list[Job] = []
    for attack, comparison in comparisons(options.dataset).items():
        if attack not in options.attacks:
            continue
        usual = max(2, comparison.images // 32) if options.quick else comparison.images
        n = options.images or usual
        for peer in comparison.peers:
            alone = options.quick or peer in comparison.one_by_one
            ways = [way for way in WAYS if way == "best" or (not alone and int(way) <= n)]
            jobs += [(attack, peer, way, n) for way in ways if peer in peers]
    return jobs


def compare_all(options: argparse.Namespace) -> int:
    """Measure what is not there yet, a line for each row; write the tables."""
    there = present(options.peers)
    jobs = plan(options, there)
    if not jobs:
        raise Misuse("none of these libraries has any of these attacks: nothing to compare")
    images, repeat = max(n for *_, n in jobs), 1 if options.quick else options.repeat
    bench = open_bench(
        options.dataset, options.classifier, options.device, images, repeat, options.quick
    )
    warn_if_busy()
    path = options.out / "bench.jsonl"
    known = {} if options.fresh else finished(path)
    rows = []
    for number, job in enumerate(jobs, start=1):
        row = known.get(key_of(bench.settings(*job)))
        again = row is not None
        if row is None:
            with shown(f"{job[0]}, {job[1]}") as progress:
                row = measure.measure(bench, *job, progress)
            append(path, row)
        rows.append(row)
        print(f"[{number}/{len(jobs)}] {in_short(row)}{' (from before)' * again}", flush=True)
    write(bench, all_rows(bench, options, there, finished(path), rows), options)
    return 1 if any(row.error for row in rows) else 0


def present(peers: Sequence[str]) -> list[str]:
    """Return the peers that are installed, and say how to get the others."""
    there = [peer for peer in peers if installed(peer)]
    for peer in peers:
        if peer not in there:
            package = PEERS[peer][1]
            print(f"{peer} is not installed here and left out: `python3 course.py bench` has it,")
            print(f"    or install {package} into this environment.")
    return there


def all_rows(
    bench: Bench, options: argparse.Namespace, peers: Sequence[str], known: dict[str, Row],
    rows: Sequence[Row],
) -> list[Row]:  # fmt: skip
    """Return the rows, and those that earlier calls made of other attacks and peers.

    So that a table is whole whichever part of it was measured last. Of rows that differ in nothing
    but pairs and images, this call's comes first, then the one of most pairs, then most images.
    """
    mine = {row.key for row in rows}
    order = sorted(
        [*known.values(), *rows],
        key=lambda row: (row.key in mine, row.settings["repeat"], row.n),
    )
    best = {alike(row.settings): row for row in order}
    everything = argparse.Namespace(**{**vars(options), "attacks": ATTACK_NAMES})
    others = [peer for peer in PEERS if peer in peers or installed(peer)]
    wanted = [alike(bench.settings(*job)) for job in plan(everything, others)]
    return [best[key] for key in wanted if key in best]


def alike(settings: Mapping[str, Any]) -> str:
    """Return what two rows share that differ at most in their number of pairs and of images."""
    return key_of({k: v for k, v in settings.items() if k not in ("repeat", "n")})


def warn_if_busy() -> None:
    """Say so if others use the machine: then the timings mean little."""
    load, cores = measure.circumstances()["load"], os.cpu_count() or 1
    if load is not None and load > cores / 2:
        print(f"The machine is busy (load {load:.1f} on {cores} cores): timings will mean little.")


def in_short(row: Row) -> str:
    """Return one line about a row."""
    name = f"{row.attack:<10} {row.peer:<13} {row.way:>4}"
    if row.error or not (row.ours and row.theirs and row.ratio):
        return f"{name}  failed: {row.error}"
    times = f"{row.theirs.ms:>9.3f} ms/image, ours {row.ours.ms:>9.3f}"
    middle, low, high = row.ratio
    return f"{name}  {times}, ratio {middle:.2f} [{low:.2f}, {high:.2f}]"


# --- what is written ------------------------------------------------------------------------------


def write(bench: Bench, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the rows as JSON and as Markdown, and say where."""
    name = f"attacks-{options.dataset}-{bench.classifier}-{bench.device.type}"
    for folder in [options.out, *([SAVED] if options.save else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        body = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(body + "\n", encoding="utf-8")
        page = as_page(rows, device_name(bench.device), comparisons(options.dataset))
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        print(f"Tables: {folder / name}.md")


def as_page(rows: Sequence[Row], machine: str, known: dict[str, Comparison]) -> str:
    """Return the Markdown page: a heading with the circumstances, a table for each attack."""
    first, pairs = rows[0].settings, span(row.settings["repeat"] for row in rows)
    libraries = {row.peer: row.settings["peer_version"] for row in rows}
    lines = [
        f"# Attacks on {first['classifier']}, {first['dataset']}",
        "",
        f"{machine}, threads: {first['threads']}, torch {first['torch']}; "
        + ", ".join(f"{name} {version}" for name, version in libraries.items())
        + f". Seed 0. Ours and the peer's timed in turn, {pairs} pairs; of their ratios the median "
        "[smallest, largest]. What the columns mean: `benchmarks/README.md`.",
    ]
    for attack in dict.fromkeys(row.attack for row in rows):
        part = [row for row in rows if row.attack == attack]
        head = f"## {attack}: {known[attack].title}"
        lines += [
            "",
            head,
            "",
            f"n = {span(row.n for row in part)}. {known[attack].note}".strip(),
            "",
        ]
        lines.append(scoring.table(part))
    return "\n".join(lines) + "\n"


def span(numbers: Iterable[int]) -> str:
    """Return "5", or "3 to 5"."""
    found = sorted(set(numbers))
    return " to ".join(f"{n}" for n in dict.fromkeys([found[0], found[-1]]))


if __name__ == "__main__":
    sys.exit(main())
