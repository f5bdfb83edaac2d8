"""Random numbers of each image's own, whatever batch it stands in and however long it stays."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def seeds_for(x: Tensor, generator: Generator | None) -> Tensor:
    """Return a seed for each image, (N,) int64 on the CPU, from `generator`, else one of seed 0.

    Drawn before the batch is cut into chunks, and small however much the images will draw.
    """
    generator = generator or Generator().manual_seed(0)
    return torch.randint(2**62, x.shape[:1], generator=generator, device=generator.device).cpu()


def generators(seeds: Tensor) -> list[Generator]:
    """Return a fresh generator for each seed, on the CPU, so that a GPU draws the same."""
    return [Generator().manual_seed(seed) for seed in seeds.tolist()]


def uniform(own: list[Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return numbers in [-1, 1), `shape` from each generator: (n, *shape), where `like` lies."""
    drawn = torch.empty(len(own), *shape)
    for row, generator in zip(drawn, own, strict=True):
        row.uniform_(-1, 1, generator=generator)
    return drawn.to(like.device)
