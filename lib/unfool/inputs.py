"""What attacks, defences and the lab share: check what is given, freeze a model and restore it.

An attack checks its settings and inputs first, then hands `in_chunks`, which goes chunk by chunk, a
function that attacks a slice of the batch:

    check_inputs(x, y, target)
    check_number("eps", eps, 0)
    return in_chunks(lambda rows: ..., model, x, y, target, progress=progress, name="fgsm")
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import Any

import torch
from torch import Generator, Tensor, nn

from unfool.progress import Progress

# Measured on 2 cores, anet and resnet8: 64 images at once cost a tenth to a quarter less per image
# than 32. From 128 on activations are so large that they are returned to the system after every
# pass and faulted in anew, which costs half as much again and more. A GPU takes all that fit.
CPU_CHUNK = 64
GPU_CHUNK = 4096
BPDA = "nn.Sequential(bpda(defense), classifier) lends it one, see unfool.attacks.bpda"


# --- the caller's model ---------------------------------------------------------------------------


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and its parameters out of the graph; give it back as it was.

    An attack needs the gradient of the image only. Leaving the weights out of the graph saves a
    quarter of the time and leaves no `.grad` behind.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@dataclass
class Gradients:
    """What came back through a model: whether any was asked for, and whether any was not zero."""

    asked: bool = False
    useful: bool = False


@contextmanager
def attacked(model: nn.Module) -> Iterator[Gradients]:
    """As `frozen`, for who needs a gradient: the first pass that gives none is refused.

    Yields what `warn_of_rounding` asks. Costs no pass.

    Raises:
        ValueError: see `check_gradient`.
    """
    seen = Gradients()

    def back(gradient: Tensor) -> None:
        seen.useful = seen.useful or bool(gradient.any())

    def enter(_module: nn.Module, inputs: Any) -> Any:
        if not (torch.is_grad_enabled() and inputs[0].requires_grad) or seen.useful:
            return None
        seen.asked, images = True, inputs[0].view_as(inputs[0])
        images.register_hook(back)  # of what the model gives alone, not of other terms of a loss
        return (images, *inputs[1:])

    def leave(_module: nn.Module, inputs: Any, logits: Tensor) -> None:
        if torch.is_grad_enabled() and inputs[0].requires_grad and not logits.requires_grad:
            for hook in hooks:
                hook.remove()
            check_gradient(model, inputs[0])

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        with frozen(model):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def in_chunks(
    attack: Callable[[slice], Tensor],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    *,
    progress: Progress | None = None,
    name: str = "",
) -> Tensor:
    """Attack the batch chunk by chunk with the model frozen; return all images, detached.

    Checks the model, and the classes against it, in the first pass. A GPU that runs out of memory
    gets half the chunk, so `attack` must give the same for the same rows when called again: random
    numbers are drawn beforehand.

    Args:
        attack: attacks the images of a slice of `x` and returns them, (n, C, H, W).
        model, x, y, target: as given to the attack, already seen by `check_inputs`.
        progress: called as `progress(images done, all images, name)` after each chunk.
    """
    chunk = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
    done, start = [x[:0].detach().clone()], 0
    with attacked(model) as seen, checked(model, x, y, target):
        while start < len(x):
            try:
                done.append(attack(slice(start, start + chunk)).detach())
            except torch.cuda.OutOfMemoryError:
                if chunk == 1:
                    raise
                chunk = (min(chunk, len(x)) + 1) // 2
                continue
            start = min(start + chunk, len(x))
            if progress is not None:
                progress(start, len(x), name)
    result = torch.cat(done)
    warn_of_rounding(seen, x, result)
    return result


# --- bad input ------------------------------------------------------------------------------------


def check_inputs(x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
    """Refuse what is no batch of images with a class, and if given another target class, for each.

    Raises:
        TypeError, ValueError: with the value and the remedy.
    """
    check_images(x)
    check_labels(y, x)
    if target is not None:
        check_labels(target, x, "target")
        if (target == y).any():
            raise ValueError(
                f"target equals y for {int((target == y).sum())} images: aim at another class"
            )


def refuse_target(target: Tensor | None, name: str, why: str) -> None:
    """Refuse a target where the attack `name` can take none, because `why`."""
    if target is not None:
        raise ValueError(
            f"{name} takes no target, because {why}: leave target out, or use an attack that takes "
            "one, such as bim, pgd or carlini_wagner_l2"
        )


def need_target(target: Tensor | None, name: str) -> Tensor:
    """Return the target; refuse to go on without one."""
    if target is None:
        raise ValueError(
            f"{name} needs target, a class per image (N,) int64 that is not y; "
            "unfool.attacks.random_targets(y, classes) draws them"
        )
    return target


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False
) -> None:
    """Refuse a setting that is no finite number from `low` to `high` (both allowed)."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise TypeError(f"{name} must be {kind}, not {value!r} ({type(value).__name__})")
    if not (low <= float(value) <= high and math.isfinite(value)):
        limits = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        finite = " and finite" if value == math.inf else ""
        raise ValueError(f"{name} must be {limits}{finite}, not {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_images(x: Tensor) -> None:
    """Refuse what is no batch of images in [0, 1], and say how to mend it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}: use torch.as_tensor(x)")
    if x.dtype != torch.float32:
        hint = "x.float() / 255" if x.dtype == torch.uint8 else "x.float()"
        raise TypeError(f"x must be float32 with pixels in [0, 1], not {x.dtype}: use {hint}")
    if x.ndim != 4:
        hint = ": one image needs x.unsqueeze(0)" if x.ndim == 3 else ""
        raise ValueError(f"x must have shape (N, C, H, W), not {tuple(x.shape)}{hint}")
    low, high = x.aminmax() if x.numel() else (0, 1)
    if low >= 0 and high <= 1:  # never true of NaN, which aminmax passes on: one look is enough
        return
    if not torch.isfinite(x).all():
        raise ValueError(
            f"x holds {int((~torch.isfinite(x)).sum())} pixels that are NaN or infinite"
        )
    raise ValueError(
        f"pixels must lie in [0, 1], but x spans [{low:.3g}, {high:.3g}]: divide by 255 or undo "
        "the normalisation (put it inside the model)"
    )


def check_labels(y: Tensor, x: Tensor, name: str = "y") -> None:
    """Refuse what is no class index per image of x."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, not {type(y).__name__}: use torch.as_tensor({name})"
        )
    if y.ndim == 2 and y.shape[1] > 1:
        raise TypeError(f"{name} looks one-hot {tuple(y.shape)}: use {name}.argmax(1)")
    if y.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 class indices, not {y.dtype}: use {name}.long()")
    if y.shape != x.shape[:1]:
        hint = f": use {name}.squeeze(1)" if y.ndim == 2 else ": one class index per image"
        raise ValueError(f"{name} must have shape ({len(x)},), not {tuple(y.shape)}{hint}")
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device} and x on {x.device}: move one with .to(device)")


@contextmanager
def checked(model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None) -> Iterator[None]:
    """Refuse a model that lies elsewhere or returns no logits, and classes that it doesn't have.

    The logits are those of the first pass that is made inside: none is spent on looking.
    """
    check_device(model, x)

    def look(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        hook.remove()
        check_logits(logits.detach(), y, target)

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()


def check_device(model: nn.Module, x: Tensor, name: str = "the model") -> None:
    """Refuse a model any part of which, weight or buffer, lies elsewhere than the images."""
    for part in chain(model.parameters(), model.buffers()):
        if part.device != x.device:
            raise ValueError(
                f"{name} is on {part.device} and x on {x.device}: move one with .to(device)"
            )


def check_gradient(model: nn.Module, x: Tensor, remedy: str = BPDA) -> None:
    """Refuse a model that passes no gradient back to the images, and name the module at fault.

    A gradient that is zero is one: see `warn_of_rounding`. The global random state stays.

    Raises:
        ValueError: with the module's name and the remedy.
    """
    stops: list[str] = []
    devices, gradient = range(torch.cuda.device_count()), None
    with frozen(model), torch.enable_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        images = x[:2].detach().clone().requires_grad_(True)
        hooks = [m.register_forward_hook(_note(stops, path)) for path, m in model.named_modules()]
        try:
            logits = model(images)
        finally:
            for hook in hooks:
                hook.remove()
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits.sum(), images, allow_unused=True)
    if gradient is None:
        where = stops[0] if stops else type(model).__name__
        raise ValueError(
            f"no gradient reaches the images: {where} stops it. A white-box attack needs one: "
            f"{remedy}"
        )


def _note(stops: list[str], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, out: Any) -> None:
        came = any(isinstance(i, Tensor) and i.requires_grad for i in inputs)
        if came and isinstance(out, Tensor) and not out.requires_grad:
            stops.append(f"{type(module).__name__}" + (f" ({path})" if path else ""))

    return note


def warn_of_rounding(seen: Gradients, x: Tensor, x_adv: Tensor) -> None:
    """Warn where no image was moved and every gradient was exactly zero, as rounding makes it.

    That may be no fault: networks saturate, and whoever looks for such a mask wants to see one.
    """
    if seen.asked and not seen.useful and torch.equal(x, x_adv):
        warnings.warn(
            f"the attack moved none of {len(x)} images, because every gradient was zero: does a "
            f"module round? {BPDA}",
            stacklevel=levels_up_to_the_caller(),
        )


def check_logits(logits: Tensor, y: Tensor, target: Tensor | None) -> None:
    """Refuse what is no logits of these classes; warn of probabilities."""
    if logits.ndim != 2:
        raise ValueError(f"the model must return logits (N, classes), not {tuple(logits.shape)}")
    if like_probabilities(logits):
        warnings.warn(
            "the model's outputs are >= 0 and sum to 1, like probabilities; attacks need logits: "
            "leave out its last Softmax",
            stacklevel=levels_up_to_the_caller(),
        )
    check_range(y, logits.shape[1])
    if target is not None:
        check_range(target, logits.shape[1], "target")


def like_probabilities(logits: Tensor) -> bool:
    """Whether a model's outputs (N, classes) are none that attacks can use; one image tells."""
    first = logits[:1]
    return bool(first.min() >= 0) and abs(float(first.sum()) - 1) < 1e-4


def levels_up_to_the_caller() -> int:
    """Return the `stacklevel`, where this is called, of the line that called the attack.

    An attack may run through another one and through torch's wrappers: what counts is the outermost
    frame of the attacks.
    """
    caller, frame, level = 1, inspect.currentframe(), 0
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith((__name__, "unfool.attacks")):
            caller = level + 1
        frame, level = frame.f_back, level + 1
    return caller


def check_range(y: Tensor, classes: int, name: str = "y") -> None:
    """Refuse class indices that the model has no logit for."""
    if len(y) and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"{name} spans [{int(y.min())}, {int(y.max())}], but the model has {classes} classes: "
            f"indices run from 0 to {classes - 1}"
        )


# --- random numbers -------------------------------------------------------------------------------


def uniform_noise(x: Tensor, size: float, generator: Generator | None) -> Tensor:
    """Return noise like x, uniform in [-size, size], drawn image by image in their order.

    From `generator`, else from one of seed 0: the global random state is neither read nor moved.
    Drawn where the generator lives, so that a CPU generator gives a GPU the same noise.
    """
    generator = generator or torch.Generator().manual_seed(0)
    noise = torch.empty(x.shape, device=generator.device)
    return noise.uniform_(-size, size, generator=generator).to(x.device)


def random_targets(y: Tensor, classes: int, generator: Generator | None = None) -> Tensor:
    """Return a class for each image, (N,) int64, drawn uniformly from all but its own.

    The paper aims JSMA and Carlini and Wagner's attack at such targets.

    Args:
        y: true classes (N,), int64.
        classes: how many there are, at least 2.
        generator: draws them, in the order of the images; by default one of seed 0.
    """
    check_number("classes", classes, 2, whole=True)
    check_range(y, classes)
    generator = generator or torch.Generator().manual_seed(0)
    shift = torch.randint(1, classes, y.shape, generator=generator, device=generator.device)
    return (y + shift.to(y.device)) % classes
