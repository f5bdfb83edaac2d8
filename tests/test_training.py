"""The training loop: it learns, resumes bit-equal, stops on NaN, refuses what cannot be meant.

Run as a script it is the process that is killed: `python test_training.py KIND CHECKPOINT`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from unfool import training
from unfool.artifacts import load_tensors, save_tensors
from unfool.defenses import pix2pix
from unfool.progress import Progress
from unfool.training import (
    Recipe,
    classifier_step,
    cosine,
    erased,
    fit,
    mirrored,
    recipe_for,
    shifted,
    train_classifier,
)

LIBRARY = Path(training.__file__).parents[1]
EPOCHS = 5
BATCHES = 4  # per epoch: 60 rows in batches of 16
Make = Callable[[int], nn.Module]
Toy = tuple[Tensor, Tensor]


class Interrupted(Exception):
    """Stands for Ctrl-C in the middle of an epoch."""


def job(kind: str, checkpoint: Path | None, progress: Progress | None = None) -> tuple[str, str]:
    """Train a small network of a kind; return the sha256 of its weights, and its history."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)
    torch.rand(int(time.time()) % 7)  # the global random state is none of the loop's business
    if kind == "pix2pix":
        settings = pix2pix.Settings(width=2, discriminator_width=2, epochs=EPOCHS, batch_size=16)
        big = nn.functional.interpolate(images, 32)
        net, history = pix2pix.train(
            big, big.round(), settings, seed=3, checkpoint=checkpoint, progress=progress
        )
        return digest(net), str(history)
    torch.manual_seed(5)
    classifier = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(216, 3),
    )  # fmt: skip
    recipe = Recipe("sgd" if kind == "sgd" else "adam", 1e-2, "cosine", 16, shift=1)
    history = train_classifier(
        classifier, images, labels, recipe,
        epochs=EPOCHS, seed=3, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return digest(classifier), str(history)


def digest(net: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


KINDS = ["adam", "sgd", "pix2pix"]


# --- it learns ------------------------------------------------------------------------------------


def test_the_loss_falls_and_every_epoch_is_told(tiny: Make, toy: Toy) -> None:
    net, (images, labels) = tiny(0), toy
    told: list[tuple[int, int, str]] = []
    history = train_classifier(
        net, images, labels, Recipe("adam", 2e-2, "cosine", 16, shift=0), epochs=8,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert len(history) == 8
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert float((net(images).argmax(1) == labels).float().mean()) > 0.9
    assert not any(module.training for module in net.modules())
    assert told[-1][:2] == (8 * BATCHES, 8 * BATCHES)
    assert "epoch 8/8 loss" in told[-1][2]


def test_no_epochs_change_nothing(tiny: Make, toy: Toy) -> None:
    net = tiny(0)
    assert train_classifier(net, *toy, Recipe(), epochs=0) == []
    assert digest(net) == digest(tiny(0))
    assert not net.training


def test_the_seed_decides(tiny: Make, toy: Toy) -> None:
    def run(seed: int) -> str:
        net = tiny(0)
        train_classifier(net, *toy, Recipe(batch_size=16), epochs=2, seed=seed)
        return digest(net)

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("fails", [False, True])
def test_the_global_random_state_stays(tiny: Make, toy: Toy, fails: bool) -> None:
    def progress(*_: object) -> None:
        if fails:
            raise Interrupted

    torch.manual_seed(11)
    before = torch.get_rng_state()
    try:
        train_classifier(tiny(0), *toy, Recipe(batch_size=16), epochs=1, progress=progress)
    except Interrupted:
        assert fails
    assert torch.equal(torch.get_rng_state(), before)


def test_recipes_are_chosen_by_name() -> None:
    assert recipe_for("resnet8").optimizer == "sgd"
    assert recipe_for("anet") == Recipe()
    assert recipe_for("b").shift == 0
    for dataset in ("cifar10", "folder:/data/cifar10-jpeg.zip"):
        photographs = recipe_for("resnet20", dataset)
        assert (photographs.flip, photographs.erase, photographs.longer) == (True, 8, 12)
        assert recipe_for("densenet40", dataset).longer == 3
        assert not recipe_for("anet", dataset).flip
    assert not recipe_for("resnet8", "mnist-m").flip


def test_a_recipe_without_the_newer_fields_has_the_key_it_had() -> None:
    old = {"optimizer": "adam", "rate": 1e-3, "schedule": "cosine", "batch_size": 64, "shift": 1}
    assert Recipe().as_key() == old
    assert Recipe(flip=True).as_key() == old | {"flip": True}
    newer = {"longer": 3, "erase": 8, "smoothing": 0.1}
    assert Recipe(**newer).as_key() == old | newer


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.arange(400 * 4.0).view(400, 1, 2, 2)
    torch.manual_seed(0)
    seen = mirrored(images)
    same = (seen == images).flatten(1).all(dim=1)
    turned = (seen == images.flip(3)).flatten(1).all(dim=1)
    assert bool((same ^ turned).all())
    assert 150 < int(turned.sum()) < 250


def test_only_a_recipe_that_says_so_mirrors() -> None:
    images = torch.zeros(8, 1, 4, 4)
    images[..., 0] = 1  # a bar on the left

    def bars(recipe: Recipe) -> set[int]:
        seen: set[int] = set()
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        net.register_forward_pre_hook(
            lambda _, given: seen.update(given[0].sum(dim=(1, 2)).argmax(dim=1).tolist())
        )
        train_classifier(net, images, torch.zeros(8, dtype=torch.long), recipe, epochs=2)
        return seen

    assert bars(Recipe(shift=0, flip=True)) == {0, 3}
    assert bars(Recipe(shift=0)) == {0}  # the control


def test_a_square_covers_each_image_somewhere() -> None:
    torch.manual_seed(0)
    images = torch.ones(500, 3, 12, 10)
    covered = erased(images, 4) == 0.5
    assert bool((covered == covered[:, :1]).all())  # all channels alike
    heights = covered[:, 0].any(dim=2).sum(dim=1)
    widths = covered[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(heights * widths, covered[:, 0].sum(dim=(1, 2)))  # a rectangle
    assert set(heights.tolist()) == set(widths.tolist()) == {2, 3, 4}  # less at the border
    assert bool(covered.flatten(1).any(dim=0).all())  # no pixel is safe
    assert torch.equal(images, torch.ones(500, 3, 12, 10))  # the caller's are left alone


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_spreads_a_label_over_all_classes(smoothing: float, tiny: Make, toy: Toy) -> None:
    images, labels = toy
    net = tiny(0).eval()  # no dropout: the same logits twice
    classes = net(images[:1]).shape[1]
    soft = (1 - smoothing) * nn.functional.one_hot(labels, classes) + smoothing / classes
    expected = -(soft * net(images).log_softmax(dim=1)).sum(dim=1).mean()
    loss = classifier_step(net, SGD(net.parameters(), 0.1), smoothing=smoothing)(images, labels)[
        "loss"
    ]
    torch.testing.assert_close(loss, expected.detach())


def test_photographs_are_learned_in_any_layout_and_left_in_the_usual_one() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
    images[labels == 1] *= 0.3
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    recipe = Recipe("sgd", 0.1, batch_size=16, shift=1, flip=True, erase=2, smoothing=0.1)
    train_classifier(net, images, labels, recipe, epochs=20)
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in net.parameters())
    assert float((net(images).argmax(dim=1) == labels).float().mean()) > 0.9


def test_rates_follow_the_schedule(toy: Toy) -> None:
    images, labels = toy
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    optimizer = SGD(net.parameters(), 0.5)
    inner, rates = classifier_step(net, optimizer), []

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rates.append(optimizer.param_groups[0]["lr"])
        return dict(inner(x, y))

    fit(
        step, {"net": net}, {"net": optimizer}, [images, labels],
        epochs=2, batch_size=16, learning_rate=cosine,
    )  # fmt: skip
    assert rates == [0.5 * cosine(i / (2 * BATCHES)) for i in range(2 * BATCHES)]


def test_the_ends_of_the_cosine() -> None:
    assert [cosine(0.0), cosine(0.5), cosine(1.0)] == pytest.approx([1, 0.5, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (3, [3]), (1, [1])],  # 9: one row is left over
)
def test_a_last_batch_of_one_row_is_skipped(rows: int, sizes: list[int]) -> None:
    net, seen = nn.Linear(1, 1), []

    def step(batch: Tensor) -> dict[str, Tensor]:
        seen.append(batch.flatten().tolist())
        return {"loss": torch.zeros(())}

    data = torch.arange(float(rows)).view(-1, 1)
    fit(step, {"net": net}, {}, [data], epochs=1, batch_size=4)
    assert [len(batch) for batch in seen] == sizes
    assert len({row for batch in seen for row in batch}) == sum(sizes)  # none twice


def test_every_epoch_has_an_order_of_its_own() -> None:
    net, seen = nn.Linear(1, 1), []

    def step(batch: Tensor) -> dict[str, Tensor]:
        seen.append(batch.tolist())
        return {"loss": torch.zeros(())}

    fit(step, {"net": net}, {}, [torch.arange(40.0)], epochs=3, batch_size=40)
    assert len({tuple(order) for order in [*seen, sorted(seen[0])]}) == 4  # and none is sorted


def test_rows_stay_together() -> None:
    net = nn.Linear(1, 1)

    def step(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        assert torch.equal(a * 2, b)
        return {"loss": a.mean()}

    data = torch.arange(10.0)
    history = fit(step, {"net": net}, {}, [data, data * 2], epochs=1, batch_size=5)
    assert history == [{"loss": 4.5}]


# --- resume ---------------------------------------------------------------------------------------


def stop_after(epochs: int) -> Progress:
    """Interrupt after this many whole epochs, in the first step of the next one."""

    def progress(done: int, total: int, note: str) -> None:
        if done > epochs * BATCHES:
            raise Interrupted

    return progress


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal_at_every_epoch(kind: str, tmp_path: Path, one_thread: None) -> None:
    unbroken = job(kind, None)
    for epochs in range(1, EPOCHS):
        checkpoint = tmp_path / f"checkpoint-{epochs}.safetensors"
        with pytest.raises(Interrupted):
            job(kind, checkpoint, stop_after(epochs))
        assert len(load_tensors(checkpoint)[1]["history"]) == epochs
        assert job(kind, checkpoint) == unbroken


@pytest.mark.parametrize("lost", ["exp_avg", "running_mean"])
def test_a_checkpoint_without_its_state_ends_elsewhere(
    lost: str, tmp_path: Path, one_thread: None
) -> None:
    """Negative control: the comparison above sees a lost optimizer state or statistic."""
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        job("adam", checkpoint, stop_after(2))
    tensors, metadata = load_tensors(checkpoint)
    doctored = {k: v * 0 if k.endswith(lost) else v for k, v in tensors.items()}
    assert any(k.endswith(lost) for k in tensors)
    save_tensors(checkpoint, doctored, metadata)
    assert job("adam", checkpoint)[0] != job("adam", None)[0]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, one_thread: None) -> None:
    checkpoint, steps = tmp_path / "checkpoint.safetensors", []
    whole = job("adam", checkpoint)
    assert job("adam", checkpoint, lambda *step: steps.append(step)) == whole
    assert steps == []


@pytest.mark.parametrize("kind", ["adam", "pix2pix"])
def test_kill_9_then_again_ends_bit_equal(kind: str, tmp_path: Path, one_thread: None) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    command = [sys.executable, __file__, kind, str(checkpoint)]
    path = os.pathsep.join([str(LIBRARY), os.environ.get("PYTHONPATH", "")])
    victim = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert victim.stdout is not None
    for line in victim.stdout:
        if line.startswith("epoch 3/"):
            break
    victim.kill()
    victim.communicate(timeout=30)
    assert victim.returncode != 0  # killed, not done
    assert len(load_tensors(checkpoint)[1]["history"]) in (2, 3)
    assert job(kind, checkpoint) == job(kind, None)


# --- it stops, it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    value: float, tmp_path: Path, toy: Toy
) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    optimizer = Adam(net.parameters(), 1e-3)
    inner, steps = classifier_step(net, optimizer), 0
    checkpoint = tmp_path / "checkpoint.safetensors"
    after: list[str] = []

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == BATCHES + 2:  # the second step of the second epoch
            return {"loss": torch.tensor(value)}
        return dict(inner(x, y))

    with pytest.raises(FloatingPointError, match=rf"'loss' became {value} at step 5:.*kept in"):
        fit(
            step, {"net": net}, {"net": optimizer}, list(toy), epochs=3, batch_size=16,
            checkpoint=checkpoint, after_epoch=lambda _: after.append(digest(net)),
        )  # fmt: skip
    assert steps == BATCHES + 2
    tensors, metadata = load_tensors(checkpoint)
    assert len(metadata["history"]) == 1
    kept = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    kept.load_state_dict(
        {k.removeprefix("module/net/"): v for k, v in tensors.items() if k.startswith("module/")}
    )
    assert [digest(kept)] == after


def test_bad_pixels_stop_at_the_first_step(tiny: Make, toy: Toy) -> None:
    images, labels = toy[0].clone(), toy[1]
    images[:] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 0"):
        train_classifier(tiny(0), images, labels, Recipe(), epochs=1)


def test_data_that_cannot_be_trained_on_are_refused(tiny: Make, toy: Toy) -> None:
    images, labels = toy
    for data, message in [
        ((images[:0], labels[:0]), "nothing to train on"),
        ((images, labels[:-1]), r"equal lengths, not \[60, 59\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_classifier(tiny(0), *data, Recipe(), epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, not 1 and 0"),
        ({"epochs": -1}, "epochs must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, int], message: str, tiny: Make, toy: Toy
) -> None:
    net = tiny(0)
    optimizer = SGD(net.parameters(), 0.1)
    arguments = {"epochs": 1, "batch_size": 16} | settings
    with pytest.raises(ValueError, match=message):
        fit(classifier_step(net, optimizer), {"n": net}, {"n": optimizer}, list(toy), **arguments)
    assert digest(net) == digest(tiny(0))


def test_bfloat16_is_refused_where_the_processor_imitates_it(
    tiny: Make, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny(0)
    step = classifier_step(net, SGD(net.parameters(), 0.1))
    run = {"epochs": 1, "batch_size": 16, "mixed_precision": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with pytest.raises(ValueError, match="mixed_precision=True is for a GPU or a processor"):
        fit(step, {"n": net}, {}, list(toy), **run)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert len(fit(step, {"n": net}, {}, list(toy), **run)) == 1


# --- shifts ---------------------------------------------------------------------------------------


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """The image (C, H, W) moved by whole pixels, black coming in; pixel by pixel."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[:, i, j] = image[:, i - down, j - right]
    return result


def offset_of(image: Tensor, result: Tensor, pixels: int) -> tuple[int, int] | None:
    steps = range(-pixels, pixels + 1)
    found = [(d, r) for d in steps for r in steps if torch.equal(moved(image, d, r), result)]
    return found[0] if found else None


def test_shifts_are_pure_translations_of_at_most_so_many_pixels() -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 2, 5, 7)
    found = [offset_of(a, b, 1) for a, b in zip(images, shifted(images, 1), strict=True)]
    assert None not in found
    assert len(set(found)) == 9  # every offset occurs, each image has its own
    wide = [offset_of(a, b, 1) for a, b in zip(images, shifted(images, 2), strict=True)]
    assert None in wide  # the search does tell further ones


def test_no_shift_is_no_change() -> None:
    images = torch.rand(4, 1, 6, 6)
    assert torch.equal(shifted(images, 0), images)


if __name__ == "__main__":
    torch.set_num_threads(1)

    def slowly(done: int, total: int, note: str) -> None:
        print(note, flush=True)
        time.sleep(0.05)

    print(job(sys.argv[1], Path(sys.argv[2]), slowly))


def test_a_damaged_checkpoint_is_trained_anew(tiny: Make, toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"

    def trained(checkpoint: Path | None) -> list[Tensor]:
        net = tiny(0)
        train_classifier(net, *toy, Recipe(batch_size=16), epochs=2, checkpoint=checkpoint)
        return [v.detach() for v in net.parameters()]

    whole = trained(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="is damaged"):
        again = trained(file)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
