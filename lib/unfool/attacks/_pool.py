"""A batch that stays full: where an image is finished, the next one takes its place.

Attacks that end at a different step for each image would otherwise pass ever smaller batches
through the network, which costs up to three times as much per image, or drag finished images along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unfool.inputs import CPU_CHUNK, GPU_CHUNK, checked


def step_while_any(step: Callable[[Tensor], None], live: Tensor) -> None:
    """Call `step(rows)` with the first live images until none is left.

    A GPU that runs out of memory gets half as many, so `step` must not change anything before its
    last pass through the network.

    Args:
        step: takes the indices of some images, (n,) int64, and takes each one step further; it
            sets `live` to False where an image is finished.
        live: (N,) bool, where the images are.
    """
    size = pool_size(live)
    while len(rows := live.nonzero().flatten()[:size]):
        try:
            step(rows)
        except torch.cuda.OutOfMemoryError:
            if len(rows) == 1:
                raise
            size = (len(rows) + 1) // 2


def rightly_classified(
    model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None = None
) -> Tensor:
    """Return which images the model gets right, (N,) bool; check the model and the classes first.

    The others are fooled already, and a minimal-norm attack leaves them alone.
    """
    right = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    unseen = torch.ones_like(right)

    @torch.no_grad()
    def look(rows: Tensor) -> None:
        right[rows] = model(x[rows]).argmax(dim=1) == y[rows]
        unseen[rows] = False

    with checked(model, x, y, target):
        step_while_any(look, unseen)
    return right


def pool_size(x: Tensor) -> int:
    """Return how many images are under way at once on the device of x."""
    return CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
