"""How fast the purifier trains and purifies, and how much of the machine's convolutions that is.

    .venv/bin/python benchmarks/purifier.py --help

Each row is one combination of width, precision and memory layout. "Share" is the arithmetic of a
step, counted by torch's own counter, per second, as a share of what this machine reaches on one
large convolution alone, measured in the same run. All rows are timed in turn, round by round, so
that a slow moment of the machine hits all of them; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from unfool.defenses.pix2pix import PatchGAN, UNet, train_step
from unfool.files import write_text

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass
class Row:
    """One combination and what was measured; images per second, shares of 1."""

    width: int
    batch: int
    precision: str
    layout: str
    training: float = 0.0
    purifying: float = 0.0
    training_share: float = 0.0
    purifying_share: float = 0.0


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    rows = list(combinations(options))
    best = peak(device)
    threads = torch.get_num_threads()
    print(f"{threads} threads, {device}: one convolution reaches {best:.0f} GFLOP/s")
    jobs = [(row, *prepare(row, device, options.channels)) for row in rows]
    for row, train, purify, _, _ in jobs:
        train(), purify()  # warm up
        print(f"warm: width {row.width}, {row.precision}, {row.layout}", flush=True)
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in jobs]
    for turn in range(options.rounds):
        for (_, train, purify, _, _), (trained, purified) in zip(jobs, seconds, strict=True):
            trained.append(timed(train, device))
            purified.append(timed(purify, device))
        print(f"round {turn + 1} of {options.rounds}", flush=True)
    for (row, _, _, step_flop, pass_flop), (trained, purified) in zip(jobs, seconds, strict=True):
        a, b = statistics.median(trained), statistics.median(purified)
        row.training, row.purifying = row.batch / a, row.batch / b
        row.training_share = step_flop / a / best / 1e9
        row.purifying_share = pass_flop / b / best / 1e9
    print(table(rows))
    if options.out:
        found = {"device": str(device), "threads": threads, "peak_gflops": best}
        write_text(options.out, json.dumps(found | {"rows": [asdict(r) for r in rows]}, indent=1))


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], metavar="W")
    parser.add_argument("--batch", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median counts")
    parser.add_argument("--channels", type=int, default=1, help="1, or 3 for colour")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, too")
    return parser.parse_args()


def combinations(options: argparse.Namespace) -> Iterator[Row]:
    """Every row of the table, unmeasured."""
    for width in options.widths:
        for precision in ("float32", "bfloat16"):
            for layout in LAYOUTS:
                yield Row(width, options.batch, precision, layout)


def prepare(
    row: Row, device: torch.device, channels: int
) -> tuple[Callable[[], object], Callable[[], object], float, float]:
    """Return one training step, one pass of the generator, and the arithmetic of both in FLOP."""
    generator = UNet(channels, row.width)
    discriminator = PatchGAN(channels, row.width)
    for net in (generator, discriminator):
        net.to(device).to(memory_format=LAYOUTS[row.layout])  # type: ignore[call-overload]
    optimizers: dict[str, Optimizer] = {
        name: Adam(net.parameters(), 2e-4)
        for name, net in {"generator": generator, "discriminator": discriminator}.items()
    }
    x = torch.rand(row.batch, channels, 32, 32, device=device)
    x = x.contiguous(memory_format=LAYOUTS[row.layout])

    def precision() -> AbstractContextManager[object]:
        if row.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def train() -> object:
        generator.train()
        with precision():
            return train_step(generator, discriminator, optimizers, x, 1 - x)

    def purify() -> object:
        generator.eval()
        with torch.no_grad(), precision():
            return generator(x)

    return train, purify, flop(train), flop(purify)


def flop(work: Callable[[], object]) -> float:
    """Return the floating-point operations of one call, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak(device: torch.device) -> float:
    """Return GFLOP/s of one large float32 convolution, the best of 20 calls."""
    conv = nn.Conv2d(64, 64, 3, padding=1).to(device).requires_grad_(False)
    x = torch.rand(32, 64, 32, 32, device=device)
    work = flop(lambda: conv(x))
    return max(work / timed(lambda: conv(x), device) for _ in range(20)) / 1e9


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| width | precision | layout | training, images/s | share | purifying, images/s | share |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.width} | {r.precision} | {r.layout} | {r.training:.0f} | {r.training_share:.0%} | "
        f"{r.purifying:.0f} | {r.purifying_share:.0%} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
