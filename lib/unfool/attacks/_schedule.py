"""What the attacks that search for c share: presets with settings overridden, and the next c."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unfool.inputs import check_choice, check_number

S = TypeVar("S", bound=Any)  # a frozen dataclass with fields steps, lr and c, perhaps searches


def schedule_of(presets: dict[str, S], preset: str, **given: Any) -> S:
    """Return a preset with those settings overridden that are not None, or refuse them."""
    check_choice("preset", preset, tuple(presets))
    schedule = replace(presets[preset], **{k: v for k, v in given.items() if v is not None})
    for name in ("searches", "steps"):
        if hasattr(schedule, name):
            check_number(name, getattr(schedule, name), 1, whole=True)
    for name in ("lr", "c"):
        check_number(name, getattr(schedule, name), 0)
        if getattr(schedule, name) == 0:
            raise ValueError(f"{name} must be > 0: with 0 nothing would ever move")
    return schedule


def bisect_c(hit: Tensor, c: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next c of each image, the largest that failed and the smallest that did not.

    Ten times the last c until one succeeds, from then on the middle of the two. All (n,); `high` is
    infinite while none has succeeded.
    """
    high, low = torch.where(hit, c, high), torch.where(hit, low, c)
    return torch.where(high.isinf(), 10 * c, (low + high) / 2), low, high
