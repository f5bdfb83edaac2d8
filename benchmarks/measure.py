"""Time, memory and passes of attacks: ours and a peer's in turn, on the same model and images."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import math
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from benchmarks.peers import Call, Comparison, comparisons, version
from benchmarks.scoring import (
    Judged,
    Row,
    Side,
    bound,
    compare,
    counted,
    describe,
    key_of,
    ratio_of_pairs,
)
from unfool import attacks
from unfool.artifacts import REPO
from unfool.attacks import random_targets
from unfool.evaluation import predict
from unfool.lab import Lab
from unfool.progress import Progress
from unfool.provenance import git_commit, versions

CLASSIFIERS = {"mnist5k": "anet", "mnist-m": "resnet8"}
WAYS = ("best", "64", "256")
BATCHES = {"cpu": (16, 32, 64, 128, 256), "cuda": (64, 256, 1024, 4096)}
SHORTEST = 0.5  # seconds: a shorter attack is repeated until it has taken as long
SEED = 0


@dataclass
class Look:
    """What one run of an attack shows, and the seconds it took with the passes being counted."""

    side: Side
    images: Tensor
    judged: Judged
    seconds: float


@dataclass
class Bench:
    """What all comparisons of one call share.

    Attributes:
        lab: gives the classifier and the data.
        net: the classifier under attack.
        x, y, target: images of the test split that it reads rightly, with another class for each.
        weights: their checksum.
        repeat: pairs of timings.
        quick: no search for the best batch, nothing repeated to fill time, no memory, no bound.
        seen: our own looks, by attack and batch: they are the same beside every peer.
        costs: seconds per image of a forward and of an input gradient, by attack.
    """

    lab: Lab
    classifier: str
    repeat: int
    quick: bool
    net: nn.Module
    x: Tensor
    y: Tensor
    target: Tensor
    weights: str = ""
    seen: dict[tuple[str, int], Look] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.lab.device

    def comparisons(self) -> dict[str, Comparison]:
        """Return what can be compared on this data set."""
        return comparisons(self.lab.dataset)

    def settings(self, attack: str, peer: str, way: str, n: int) -> dict[str, Any]:
        """Return all that decides a row: another value of any makes another row."""
        comparison = self.comparisons()[attack]
        return {
            "attack": attack, "peer": peer, "way": way, "n": n, "repeat": self.repeat,
            "quick": self.quick, "title": comparison.title, "dataset": self.lab.dataset,
            "classifier": self.classifier, "weights": self.weights, "peer_version": version(peer),
            "our_version": attacks.VERSIONS[comparison.ours.name], "torch": torch.__version__,
            "device": device_name(self.device), "threads": torch.get_num_threads(),
        }  # fmt: skip


def open_bench(
    dataset: str, classifier: str | None, device: str, images: int, repeat: int, quick: bool,
    skip: int = 0,
) -> Bench:  # fmt: skip
    """Return a bench with the first `images` test images that the classifier reads rightly.

    `skip` of those are left out before.

    Raises:
        ValueError: the test split does not hold so many.
    """
    lab = Lab(profile="classroom", dataset=dataset, seed=SEED, device=device)
    name = classifier or CLASSIFIERS[dataset]
    net, test = lab.classifier(name), lab.data.test
    right = (predict(net, test.images) == test.labels).nonzero().flatten()
    if skip + images > len(right):
        after = f" after the first {skip}" * bool(skip)
        raise ValueError(
            f"{images} images were asked for{after}, but {name} reads {len(right)} of the "
            f"{len(test)} test images of {dataset} rightly: ask for fewer"
        )
    x, y = test.images[right], test.labels[right]
    target = random_targets(y, len(lab.data.classes), torch.Generator().manual_seed(SEED))
    x, y, target = (part[skip : skip + images].to(lab.device) for part in (x, y, target))
    return Bench(lab, name, repeat, quick, net, x, y, target, checksum(net))


def checksum(net: nn.Module) -> str:
    """Return a short name of a network's weights."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- one row --------------------------------------------------------------------------------------


def measure(bench: Bench, attack: str, peer: str, way: str, n: int, progress: Progress) -> Row:
    """Return the row of one peer beside ours; where the peer fails, the row says so."""
    settings = bench.settings(attack, peer, way, n)
    row = Row(key_of(settings), attack, peer, way, n, settings, made=circumstances())
    comparison = bench.comparisons()[attack]
    call = comparison.peers[peer]
    try:
        batch = n if way == "best" else int(way)
        if way == "best" and not bench.quick and peer not in comparison.one_by_one:
            batch = best_batch(bench, call, n, progress)
        progress(0, bench.repeat, f"{peer}, batch {batch}: passes")
        theirs = look(bench, comparison, call, batch, n)
    except Exception as error:  # whatever a library raises is its own result
        row.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return row
    ours = our_look(bench, attack, n if way == "best" else batch, n)
    row.ours, row.theirs = replace(ours.side, seconds=[]), theirs.side
    loops = [1 if bench.quick else math.ceil(SHORTEST / it.seconds) for it in (ours, theirs)]
    in_turn(bench, row, (comparison.call_ours, call), loops, progress)
    if not bench.quick:
        hold_against_bound(bench, row)
        remember(bench, row, ours)
    both = ((ours.images, ours.judged), (theirs.images, theirs.judged))
    return compare(row, bench.x[:n].cpu(), *both)


def our_look(bench: Bench, attack: str, batch: int, n: int) -> Look:
    """Return what a run of ours shows: the same beside every peer, so it is done once."""
    if (attack, batch) not in bench.seen:
        comparison = bench.comparisons()[attack]
        bench.seen[attack, batch] = look(bench, comparison, comparison.call_ours, batch, n)
    return bench.seen[attack, batch]


def look(bench: Bench, comparison: Comparison, call: Call, batch: int, n: int) -> Look:
    """Run an attack, count its passes and judge its images. This warms everything up, too."""
    net, began = Counting(bench.net).eval(), time.perf_counter()
    images = run(bench, call, batch, n, net).detach().float().cpu()
    seconds = time.perf_counter() - began
    side = Side(batch, forward=net.forward_passes / n, backward=net.backward_passes / n)
    x, y, target = (part[:n].cpu() for part in (bench.x, bench.y, bench.target))
    aim = target if comparison.targeted else None
    judged = counted(bench.net, x, images, y, aim, comparison.eps)
    return Look(describe(side, x, images, judged), images, judged, seconds)


def in_turn(
    bench: Bench, row: Row, calls: tuple[Call, Call], loops: Sequence[int], progress: Progress
) -> None:
    """Time ours, theirs, ours, theirs …, and fill in what follows from it."""
    assert row.ours
    assert row.theirs
    sides = (row.ours, row.theirs)
    for turn in range(bench.repeat):
        for side, call, times in zip(sides, calls, loops, strict=True):
            progress(turn, bench.repeat, f"batch {side.batch}: pair {turn + 1}")
            side.seconds.append(clock(bench, call, side.batch, row.n, times))
    for side in sides:
        side.ms = 1000 * median(side.seconds) / row.n
    row.ratio = ratio_of_pairs(row.ours.seconds, row.theirs.seconds)


def hold_against_bound(bench: Bench, row: Row) -> None:
    """Fill in what share of the time the passes alone would take, with their costs measured now."""
    if row.attack not in bench.costs:
        bench.costs[row.attack] = pass_costs(bench)
    costs = bench.costs[row.attack]
    for side in (row.ours, row.theirs):
        assert side
        side.share = 1000 * bound(side.forward, side.backward, costs) / side.ms
    row.made["pass_costs_us"] = [1e6 * cost for cost in costs]


def remember(bench: Bench, row: Row, ours: Look) -> None:
    """Fill in the growth of memory, measured on one batch; ours once for each of its batches."""
    assert row.ours
    assert row.theirs
    if ours.side.mib is None:
        ours.side.mib = memory(bench, row.attack, "unfool", ours.side.batch)
    row.ours.mib = ours.side.mib
    row.theirs.mib = memory(bench, row.attack, row.peer, row.theirs.batch)


def circumstances() -> dict[str, Any]:
    """Return when and from what a row was made, and how busy the machine was just before."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "git": git_commit(), "versions": versions(), "load": load}


# --- running an attack ----------------------------------------------------------------------------


def run(bench: Bench, call: Call, batch: int, n: int, net: nn.Module | None = None) -> Tensor:
    """Attack the first n images, `batch` in each call, from the same random state."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    parts = (part[:n].split(batch) for part in (bench.x, bench.y, bench.target))
    try:
        return torch.cat([call(net or bench.net, *rows) for rows in zip(*parts, strict=True)])
    finally:  # several libraries leave gradients behind, or another mode
        bench.net.zero_grad(set_to_none=True)
        bench.net.eval().requires_grad_(True)


def clock(bench: Bench, call: Call, batch: int, n: int, loops: int = 1) -> float:
    """Return the seconds that one attack on n images takes, the mean of `loops`."""
    synchronize(bench.device)
    began = time.perf_counter()
    for _ in range(loops):
        run(bench, call, batch, n)
    synchronize(bench.device)
    return (time.perf_counter() - began) / loops


def best_batch(bench: Bench, call: Call, n: int, progress: Progress) -> int:
    """Return the batch with the least time per image, each tried on one batch or 64 images.

    More than n images are no batch; n itself is always tried.
    """
    sizes = sorted({size for size in BATCHES[bench.device.type] if size < n} | {n})
    clock(bench, call, sizes[0], sizes[0])  # imports, first allocations
    found = {}
    for done, size in enumerate(sizes):
        progress(done, len(sizes), f"trying batch {size}")
        few = min(n, max(size, 64))
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            found[size] = clock(bench, call, size, few) / few
    return min(found, key=lambda size: found[size])


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one: it works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Counting(nn.Module):
    """A network that counts the images passing forward and backward through it.

    A module around it, not a hook on it: ART calls the layers of an nn.Sequential one by one.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forward_passes, self.backward_passes = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        self.forward_passes += len(logits)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)


def pass_costs(bench: Bench) -> tuple[float, float]:
    """Return the seconds per image of a forward and of an input gradient, each at its best batch.

    The gradient's own forward is taken off; the weights are out of the graph.
    """

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            bench.net(x)

    def both(x: Tensor) -> None:
        x = x.detach().requires_grad_(True)
        torch.autograd.grad(bench.net(x).sum(), x)

    bench.net.requires_grad_(False)
    sizes = sorted({min(size, len(bench.x)) for size in (8, *BATCHES[bench.device.type])})
    try:
        least = [
            min(cost(bench, work, bench.x[:size]) for size in sizes) for work in (forward, both)
        ]
    finally:
        bench.net.requires_grad_(True)
    return least[0], least[1] - least[0]


def cost(bench: Bench, work: Callable[[Tensor], None], x: Tensor) -> float:
    """Return the seconds per image of `work`: the median of five timings of 0.1 s."""
    work(x)
    times = []
    for _ in range(5):
        synchronize(bench.device)
        began, loops = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1:
            work(x)
            synchronize(bench.device)
            loops += 1
        times.append((time.perf_counter() - began) / loops)
    return float(np.median(times)) / len(x)


# --- memory ---------------------------------------------------------------------------------------


def memory(bench: Bench, attack: str, library: str, n: int) -> float | None:
    """Return by how many MiB memory grows while one batch of n is attacked; None if that fails.

    On a GPU the largest allocation; on a CPU the resident set, in a fresh process, because what an
    earlier attack has freed would else be used again and not be seen.
    """
    if bench.device.type == "cuda":
        return growth(bench, attack, library, n)
    where = ("--dataset", bench.lab.dataset, "--classifier", bench.classifier)
    command = [sys.executable, "-m", "benchmarks.attacks", *where, "--memory", attack, library]
    environment = {**os.environ, "UNFOOL_PROGRESS": "off", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(n)], cwd=REPO, env=environment, capture_output=True, text=True
    )
    try:
        return float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        return None


def growth(bench: Bench, attack: str, library: str, n: int) -> float:
    """Return by how many MiB the memory of this process, or of its GPU, grows at most."""
    comparison = bench.comparisons()[attack]
    call = comparison.call_ours if library == "unfool" else comparison.peers[library]
    run(bench, call, 2, 2)  # what is imported or set up once is not the attack's
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
        run(bench, call, n, n)
        return (torch.cuda.max_memory_allocated(bench.device) - before) / 2**20
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: hand back what was freed, or it is used unseen
    with highest() as peak:
        run(bench, call, n, n)
    return (peak[1] - peak[0]) / 2**20


@contextmanager
def highest() -> Iterator[list[int]]:
    """Yield [bytes at the beginning, most bytes seen], sampled every millisecond."""
    process, stop = psutil.Process(), threading.Event()
    now = process.memory_info().rss
    peak = [now, now]

    def watch() -> None:
        while not stop.wait(0.001):
            peak[1] = max(peak[1], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak[1] = max(peak[1], process.memory_info().rss)


def device_name(device: torch.device) -> str:
    """Return what the numbers were measured on: the GPU's name, or the CPU's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"
