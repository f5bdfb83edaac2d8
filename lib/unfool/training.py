"""One short training loop for everything that is trained here: classifiers, purifiers, GANs.

The loop does not know what it trains. It is given modules, their optimizers and a `step` that takes
a batch and updates them; it shuffles, counts, saves, resumes and stops when a loss is not a number.

Every epoch draws its random numbers from (seed, epoch) alone. So nothing but weights and optimizer
state has to be saved, and a run that was killed ends bit-equal to one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from unfool.artifacts import load_checkpoint, save_tensors
from unfool.progress import Progress, silent

VERSION = 1
Step = Callable[..., Mapping[str, Tensor]]
"""A batch, one tensor per argument -> scalar losses by name, after the weights were updated."""
History = list[dict[str, float]]
"""Mean losses, one dict per epoch."""


def fit(
    step: Step,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    data: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    learning_rate: Callable[[float], float] | None = None,
    mixed_precision: bool = False,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> History:
    """Train in place and return the mean losses of each epoch.

    Args:
        step: called as `step(*batch)`; see `Step`.
        modules: all that has weights or running statistics; put in train mode, left in eval mode.
        optimizers: all that has state.
        data: tensors (N, …) of equal length, cut into batches along the first axis; they are
            moved to the modules' device batch by batch.
        epochs: passes over the data.
        batch_size: rows per step; a last batch that is smaller is used too, unless it has 1 row
            (batch norm cannot learn from one).
        seed: of shuffling and of what the modules draw (dropout).
        learning_rate: factor on each optimizer's own rate, a function of the share of all steps
            that is done (0 to 1); constant by default.
        mixed_precision: bfloat16 autocast; refused on a processor that can't compute in it (see
            `computes_bfloat16`), where it would change results and save nothing.
        checkpoint: file that is written after every epoch and resumed from when it is there; a
            damaged one is set aside, with a warning.
        after_epoch: called with the number of epochs done, modules in eval mode; again for the
            same epoch if a run is killed before its checkpoint.
        progress: called after every step.

    Raises:
        ValueError: empty or unequal data, or a setting out of range.
        FloatingPointError: a loss was not finite; the message says at which step. The checkpoint
            of the last whole epoch is kept.
    """
    device = next(p for m in modules.values() for p in m.parameters()).device
    _check(data, epochs, batch_size, mixed_precision, device)
    batches = _count_batches(len(data[0]), batch_size)
    base_rates = {k: [g["lr"] for g in o.param_groups] for k, o in optimizers.items()}
    history = _resume(checkpoint, modules, optimizers)
    for epoch in range(len(history), epochs):
        _train_mode(modules, True)
        losses: list[Mapping[str, Tensor]] = []
        checked = 0  # losses looked at so far; on a GPU every look waits for it, so not every step
        with torch.random.fork_rng(devices=_gpu(device)):
            _seed(device, _epoch_seed(seed, epoch))
            order = torch.randperm(len(data[0]))
            for index in range(batches):
                if learning_rate is not None:
                    done = (epoch * batches + index) / (epochs * batches)
                    _set_rates(optimizers, base_rates, learning_rate(done))
                rows = order[index * batch_size : (index + 1) * batch_size]
                batch = [tensor[rows].to(device, non_blocking=True) for tensor in data]
                with _precision(device, mixed_precision):
                    losses.append(step(*batch))
                if device.type == "cpu" or index % 50 == 49 or index == batches - 1:
                    checked = _stop_if_not_finite(losses, checked, epoch * batches, checkpoint)
                _tell(progress or silent, epoch, epochs, index, batches, losses)
        _train_mode(modules, False)
        history.append(_means(losses))
        if after_epoch is not None:  # before the checkpoint: what it keeps must not be skipped
            after_epoch(epoch + 1)
        if checkpoint is not None:
            _save(checkpoint, modules, optimizers, history)
    _train_mode(modules, False)
    return history


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; chosen on validation images, never on test images.

    Attributes:
        optimizer: "adam", or "sgd" (Nesterov momentum 0.9, weight decay 5e-4).
        rate: learning rate at the start.
        schedule: "cosine" to zero, or "constant".
        batch_size: images per step.
        shift: largest random shift of an image, in pixels.
        flip: half of the images are mirrored, at random; for photographs, never for digits.
        erase: side of a grey square that covers a random place of each image, in pixels (DeVries
            and Taylor 2017, cutout).
        smoothing: share of each label that is spread over all classes (Szegedy et al. 2016).
        longer: epochs for each one that the profile has.
    """

    optimizer: str = "adam"
    rate: float = 1e-3
    schedule: str = "cosine"
    batch_size: int = 64
    shift: int = 1
    flip: bool = False
    erase: int = 0
    smoothing: float = 0.0
    longer: int = 1

    def as_key(self) -> dict[str, Any]:
        """Return what tells it apart in a store's key.

        What came later than the first recipes is named only where it is set: what was trained
        before is found again.
        """
        usual = {"flip": False, "erase": 0, "smoothing": 0.0, "longer": 1}
        return {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}


def recipe_for(classifier: str, dataset: str = "") -> Recipe:
    """Return the recipe of a classifier by its name in `unfool.classifiers.CLASSIFIERS`.

    On CIFAR-10, its JPEG copy included, residual and dense networks train for longer, the narrow
    ones most, on photographs that are mirrored and partly covered. Chosen on the copy's validation
    images, with resnet20 and 30 passes: 86.7 % without squares and smoothing, 86.8 with smoothing,
    87.2 with both, and the training images less well known by then.
    """
    if classifier.startswith(("resnet", "densenet")):
        recipe = Recipe("sgd", 0.1, batch_size=128, shift=4)
        if "cifar10" not in dataset:
            return recipe
        longer = 12 if classifier in ("resnet8", "resnet20") else 3
        return replace(recipe, flip=True, erase=8, smoothing=0.1, longer=longer)
    if classifier in ("anet", "bnet"):
        return Recipe()
    return Recipe("adam", 1e-3, "constant", 128, shift=0)  # Defense-GAN's code, whitebox.py


def train_classifier(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    epochs: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> History:
    """Train a classifier in place on images (N, C, H, W) in [0, 1] and labels (N,); see `fit`.

    In colour it computes in bfloat16 on a GPU, and photographs (`recipe.flip`), whose training is
    the one that takes hours, on any processor that can.
    """
    device = next(net.parameters()).device
    if recipe.flip:  # a tenth to a quarter faster on a CPU
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it
    optimizer = optimizer_for(net, recipe)
    fast = images.shape[1] == 3 and (device.type == "cuda" or recipe.flip)
    history = fit(
        classifier_step(net, optimizer, partial(varied, recipe=recipe), recipe.smoothing),
        {"net": net},
        {"net": optimizer},
        [images, labels],
        epochs=epochs,
        batch_size=recipe.batch_size,
        seed=seed,
        learning_rate=cosine if recipe.schedule == "cosine" else None,
        mixed_precision=fast and computes_bfloat16(device),
        checkpoint=checkpoint,
        progress=progress,
    )
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return history


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16: any GPU; a processor with instructions for it.

    The others imitate it, slower than in float32.
    """
    if device.type != "cpu":
        return True
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: no telling
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def optimizer_for(net: nn.Module, recipe: Recipe) -> Optimizer:
    """Return a fresh optimizer of the classifier's weights, as the recipe says."""
    if recipe.optimizer == "sgd":
        return SGD(net.parameters(), recipe.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return Adam(net.parameters(), recipe.rate)


def classifier_step(
    net: nn.Module,
    optimizer: Optimizer,
    vary: Callable[[Tensor], Tensor] | None = None,
    smoothing: float = 0.0,
) -> Step:
    """Return the step of ordinary supervised training: cross-entropy, one update.

    Args:
        net: the classifier; images (N, C, H, W) in [0, 1] -> logits.
        optimizer: of its weights.
        vary: changes each batch of images at random, see `varied`; they are left as they are by
            default.
        smoothing: share of each label that is spread over all classes.
    """

    def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen = vary(images) if vary else images
        loss = nn.functional.cross_entropy(net(seen), labels, label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return step


def varied(images: Tensor, recipe: Recipe) -> Tensor:
    """Mirror, move and partly cover images (N, C, H, W) at random, as the recipe says."""
    images = mirrored(images) if recipe.flip else images
    images = shifted(images, recipe.shift) if recipe.shift else images
    return erased(images, recipe.erase) if recipe.erase else images


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Move each image (N, C, H, W) by its own random offset of at most `pixels`; black comes in."""
    n, channels, height, width = images.shape
    padded = nn.functional.pad(images, [pixels] * 4)
    offsets = torch.randint(0, 2 * pixels + 1, (2, n, 1)).to(images.device)  # drawn on the CPU
    rows = offsets[0] + torch.arange(height, device=images.device)  # (N, H)
    columns = offsets[1] + torch.arange(width, device=images.device)  # (N, W)
    image = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def mirrored(images: Tensor) -> Tensor:
    """Mirror each image (N, C, H, W) left to right with probability one half."""
    which = torch.rand(len(images)).to(images.device) < 0.5  # drawn on the CPU
    return torch.where(which[:, None, None, None], images.flip(3), images)


def erased(images: Tensor, side: int) -> Tensor:
    """Cover a square of each image (N, C, H, W) with grey; its centre is any pixel, at random."""
    n, _, height, width = images.shape
    row, column = (torch.randint(0, size, (n, 1)) for size in (height, width))  # on the CPU
    rows = torch.arange(height) - row + side // 2  # (N, H): 0 to side - 1 inside the square
    columns = torch.arange(width) - column + side // 2
    rows_in, columns_in = ((k >= 0) & (k < side) for k in (rows, columns))
    covered = rows_in[:, None, :, None] & columns_in[:, None, None, :]
    return images.masked_fill(covered.to(images.device), 0.5)


def cosine(done: float) -> float:
    """Learning-rate factor: half a cosine from 1 to 0 (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def constant_then_linear(done: float) -> float:
    """Learning-rate factor: 1 for the first half, then straight to 0 (pix2pix's PyTorch code)."""
    return min(1.0, 2 * (1 - done))


def _check(
    data: Sequence[Tensor], epochs: int, batch_size: int, mixed: bool, device: torch.device
) -> None:
    lengths = [len(tensor) for tensor in data]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"nothing to train on: the data have {lengths or 'no'} rows")
    if len(set(lengths)) > 1:
        raise ValueError(f"the data tensors must have equal lengths, not {lengths}")
    if epochs < 0 or batch_size < 1:
        raise ValueError(f"epochs must be >= 0 and batch_size >= 1, not {epochs} and {batch_size}")
    if mixed and not computes_bfloat16(device):
        raise ValueError(
            "mixed_precision=True is for a GPU or a processor with bfloat16: here leave it off"
        )


def _count_batches(rows: int, batch_size: int) -> int:
    whole, rest = divmod(rows, batch_size)
    return whole + (rest > 1 or whole == 0)


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63  # distinct for any run shorter than a million epochs


def _seed(device: torch.device, seed: int) -> None:
    """Seed the CPU and the device that is used; torch.manual_seed would reseed every GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _gpu(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _precision(device: torch.device, mixed: bool) -> AbstractContextManager[Any]:
    # bfloat16 has float32's range, so no loss scaling is needed.
    return torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()


def _train_mode(modules: Mapping[str, nn.Module], training: bool) -> None:
    for module in modules.values():
        module.train(training)


def _set_rates(
    optimizers: Mapping[str, Optimizer], base: Mapping[str, list[float]], factor: float
) -> None:
    for name, optimizer in optimizers.items():
        for group, rate in zip(optimizer.param_groups, base[name], strict=True):
            group["lr"] = rate * factor


def _stop_if_not_finite(
    losses: Sequence[Mapping[str, Tensor]], checked: int, before: int, checkpoint: Path | None
) -> int:
    """Look at the losses from number `checked` on; return how many have been looked at now."""
    for index in range(checked, len(losses)):
        for name, value in losses[index].items():
            if not torch.isfinite(value):
                kept = f"; the last whole epoch is kept in {checkpoint}" if checkpoint else ""
                raise FloatingPointError(
                    f"the loss {name!r} became {float(value)} at step {before + index}: lower the "
                    f"learning rate or look at the data{kept}"
                )
    return len(losses)


def _tell(
    progress: Progress,
    epoch: int,
    epochs: int,
    index: int,
    batches: int,
    losses: Sequence[Mapping[str, Tensor]],
) -> None:
    done, total = epoch * batches + index + 1, epochs * batches
    if progress is not silent and (done == total or index % 10 == 0):  # .item() waits for a GPU
        note = " ".join(f"{name} {float(value):.3g}" for name, value in losses[-1].items())
        progress(done, total, f"epoch {epoch + 1}/{epochs} {note}")


def _means(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    return {k: float(torch.stack([row[k].float() for row in losses]).mean()) for k in losses[0]}


def _save(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    history: History,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{k}": v for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for row, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{row}/{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(path, tensors, {"history": history})


def _resume(
    path: Path | None, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> History:
    """Load the checkpoint into the modules and optimizers; return the history that it holds."""
    kept = None if path is None else load_checkpoint(path)
    if kept is None:
        return []
    tensors, metadata = kept
    for name, module in modules.items():
        head = f"module/{name}/"
        module.load_state_dict(
            {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
        )
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{name}/"):
                row, field = key.split("/")[2:]
                state.setdefault(int(row), {})[field] = value
        whole = optimizer.state_dict()
        optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
    history: History = metadata["history"]
    return history
