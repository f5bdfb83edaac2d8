"""What every check shares: call a stranger's function safely, draw inputs, say what is wrong.

A check is a function of an `Answer` and a `Draw`. It calls the answer on inputs that it draws,
compares what comes back with a reference of its own, and raises `Wrong` with a sentence that says
where to look. It returns when it found nothing.
"""

from __future__ import annotations

import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

Known = Mapping[str, Tensor | float]
"""Sentence → what a function returns that makes the mistake which the sentence names."""
Hints = Known | Callable[[], Known]
"""The same, or a function that computes it: only a wrong answer then pays for it."""

Check = Callable[["Answer", "Draw"], None]
TASKS: dict[str, Check] = {}
"""Every graded task's check, by the name that the notebooks use."""


class Wrong(Exception):
    """What is wrong with an answer: one sentence for the learner."""


def task(name: str) -> Callable[[Check], Check]:
    """Register a check under its task's name, such as "ex02_fgsm"."""

    def register(check: Check) -> Check:
        TASKS[name] = check
        return check

    return register


# --------------------------------------------------------------------------- the learner's function


class Answer:
    """The learner's function, called so that it can neither stop nor soil the notebook.

    What it prints is dropped. Exceptions, a forgotten `return` and inputs that were changed in
    place become `Wrong`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *inputs: Any, may_change: Sequence[int] = ()) -> Any:
        """Return what the function returns; `may_change` are the places of inputs it may alter."""
        kept = [None if i in may_change else _copy(one) for i, one in enumerate(inputs)]
        try:
            with _quiet():
                result = self.function(*inputs)
        except (Exception, SystemExit) as error:
            said = (str(error).strip().splitlines() or [""])[0][:160]
            raise Wrong(f"your function stops with {type(error).__name__}: {said}") from None
        for place, (before, now) in enumerate(zip(kept, inputs, strict=True)):
            if place not in may_change and not _equal(before, now):
                raise Wrong(
                    f"your function changes its input {self._name(place)} in place: "
                    "work on a copy, or on the result of an expression"
                )
        if result is None:
            raise Wrong("your function returns nothing (None): does it end with `return`?")
        return result

    def _name(self, place: int) -> str:
        try:
            names = list(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):
            names = []
        return f"`{names[place]}`" if place < len(names) else f"number {place + 1}"


@contextmanager
def _quiet() -> Iterator[None]:
    nowhere = io.StringIO()
    with (
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")
        yield


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        return {k: v.clone() for k, v in value.state_dict().items()}
    if isinstance(value, list | tuple):
        return [_copy(one) for one in value]
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return value


def _equal(before: Any, now: Any) -> bool:
    if isinstance(now, Tensor):
        flags = before.requires_grad == now.requires_grad
        return flags and before.shape == now.shape and torch.equal(before, now)
    if isinstance(now, nn.Module):
        state = now.state_dict()
        return before.keys() == state.keys() and all(
            torch.equal(v, before[k]) for k, v in state.items()
        )
    if isinstance(now, list | tuple):
        return len(before) == len(now) and all(map(_equal, before, now))
    if isinstance(now, dict):
        return list(before) == list(now) and all(_equal(before[k], now[k]) for k in now)
    return before is now or bool(before == now)


# ----------------------------------------------------------------------------------- drawing inputs


class Draw:
    """Random inputs of one check, all from one seed; the global random state is left alone."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return float32 values between `low` and `high`."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal float32 values."""
        return torch.randn(shape, generator=self.generator)

    def whole(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def number(self, low: float, high: float) -> float:
        """Return a number between `low` and `high`, with two decimals, as people write them."""
        return round(float(self.uniform(1, low=low, high=high)), 2)

    def labels(self, n: int, classes: int) -> Tensor:
        """Return n classes, (n,) int64."""
        return torch.randint(classes, (n,), generator=self.generator)

    def mask(self, *shape: int, share: float = 0.5) -> Tensor:
        """Return bool values of which about `share` are True, at least one of either kind."""
        flat = self.uniform(math.prod(shape)) < share
        if len(flat) > 1:
            place = torch.randperm(len(flat), generator=self.generator)
            flat[place[0]], flat[place[1]] = True, False
        return flat.view(shape)

    def classifier(self, *image: int, classes: int = 4) -> nn.Sequential:
        """Return a small smooth random classifier of images of this shape, in eval mode.

        On noise it names every class about as often.
        """
        size = math.prod(image)
        first, last = nn.Linear(size, 12), nn.Linear(12, classes)
        with torch.no_grad():
            first.weight.copy_(self.normal(12, size) * (3 / size**0.5))
            last.weight.copy_(self.normal(classes, 12))
            first.bias.copy_(0.3 * self.normal(12))
            last.bias.zero_()
            net = nn.Sequential(nn.Flatten(), first, nn.Tanh(), last).eval()
            last.bias.copy_(-net(self.uniform(64, *image)).mean(0))
        return net


# ------------------------------------------------------------------------------- looking at results


def same(
    got: Any,
    wanted: Tensor | float,
    where: str,
    hints: Hints | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Raise `Wrong` unless `got` is `wanted`, with the sentence of the mistake that it shows.

    Args:
        got: what the learner's function returned.
        wanted: the reference; a float asks for a number.
        where: where to look, for a mistake that no hint knows.
        hints: known mistakes; the first one whose value equals `got` gives the message.
        tolerance: absolute, and relative to the reference.
    """
    found = got.detach() if isinstance(got, Tensor) else got
    if not isinstance(wanted, Tensor):
        found, wanted = _number(got), torch.tensor(wanted, dtype=torch.float64)
    if _close(found, wanted, tolerance, strict=True):
        return
    known = hints() if callable(hints) else hints or {}
    for sentence, value in known.items():
        if _close(found, torch.as_tensor(value), tolerance):
            raise Wrong(sentence)
    tensor(got if wanted.ndim else found, tuple(wanted.shape), wanted.dtype)
    raise Wrong(f"{_first_difference(found, wanted, tolerance)}: {where}")


def tensor(got: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what the function returned, detached, if it is a finite tensor of this kind."""
    if not isinstance(got, Tensor):
        raise Wrong(f"your function returns a {type(got).__name__}, and a tensor is asked for")
    if tuple(got.shape) != shape:
        raise Wrong(f"the result has shape {tuple(got.shape)}, and it must be {shape}")
    if got.dtype != dtype:
        raise Wrong(f"the result is {got.dtype}, and it must be {dtype}")
    if not torch.isfinite(got).all():
        raise Wrong("the result holds NaN or infinity: where do you divide, or take a logarithm?")
    return got.detach()


def pair(got: Any, what: str) -> tuple[Any, Any]:
    """Return the two things that the function returned, named by `what`."""
    if isinstance(got, Tensor) and got.shape == (2,):
        return got[0], got[1]
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(f"return two things, {what}, not {type(got).__name__}")
    return got[0], got[1]


def _number(got: Any) -> Tensor:
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.detach().item()
    if isinstance(got, Tensor) or not isinstance(got, Real):
        kind = f"tensor of shape {tuple(got.shape)}" if isinstance(got, Tensor) else None
        raise Wrong(f"return one number, not a {kind or type(got).__name__}")
    return torch.tensor(float(got), dtype=torch.float64)


def _close(one: Any, other: Tensor, tolerance: float, strict: bool = False) -> bool:
    if not isinstance(one, Tensor) or one.shape != other.shape or one.is_complex():
        return False
    if strict and one.dtype != other.dtype:
        return False
    near = torch.isclose(one.double(), other.double(), atol=tolerance, rtol=tolerance)
    return bool(near.all())


def _first_difference(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    if not wanted.ndim:
        return f"you return {found.item():.4g}, and {wanted.item():.4g} is right"
    far = ~torch.isclose(found.double(), wanted.double(), atol=tolerance, rtol=tolerance)
    place = tuple(far.nonzero()[0].tolist())
    left, right = found[place].item(), wanted[place].item()
    shown = f"{left:.4g}, and {right:.4g}" if found.is_floating_point() else f"{left}, and {right}"
    count = f"{int(far.sum())} of {far.numel()} values differ"
    return f"{count}, at {list(place)} you return {shown} is right"
