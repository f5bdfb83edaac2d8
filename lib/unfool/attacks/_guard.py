"""What every attack does to its inputs and to the caller's model: check, freeze, restore."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
    if len(x) and not torch.isfinite(x).all():
        raise ValueError(
            f"x holds {int((~torch.isfinite(x)).sum())} pixels that are NaN or infinite"
        )
    if len(x) and (x.min() < 0 or x.max() > 1):
        raise ValueError(
            f"pixels must lie in [0, 1], but x spans [{x.min():.3g}, {x.max():.3g}]: divide by 255 "
            "or undo the normalisation (put it inside the model)"
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


@torch.no_grad()
def count_classes(model: nn.Module, x: Tensor) -> int:
    """Return the number of logits, found by looking at one image; warn of outputs that are none."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device != x.device:
        raise ValueError(
            f"the model is on {parameter.device} and x on {x.device}: move one with .to(device)"
        )
    logits = model(x[:1])
    if logits.ndim != 2:
        raise ValueError(f"the model must return logits (N, classes), not {tuple(logits.shape)}")
    if logits.min() >= 0 and abs(float(logits.sum()) - 1) < 1e-4:
        warnings.warn(
            "the model's outputs are >= 0 and sum to 1, like probabilities; attacks need logits: "
            "leave out its last Softmax",
            stacklevel=4,
        )
    return int(logits.shape[1])


def check_range(y: Tensor, classes: int, name: str = "y") -> None:
    """Refuse class indices that the model has no logit for."""
    if len(y) and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"{name} spans [{int(y.min())}, {int(y.max())}], but the model has {classes} classes: "
            f"indices run from 0 to {classes - 1}"
        )
