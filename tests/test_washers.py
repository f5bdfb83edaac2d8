"""The washers: what each does to an image, and what strengths they refuse."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, median_filter
from torch import Tensor, nn

from unfool.defenses import DEFENSES, WASHERS, BitDepth, Blur, Jpeg, Median, Threshold

STRENGTHS: dict[str, list[nn.Module]] = {
    "threshold": [Threshold(0.0), Threshold(), Threshold(1.0)],
    "bits": [BitDepth(bits) for bits in range(1, 9)],
    "median": [Median(3), Median(5)],
    "blur": [Blur(0.3), Blur(), Blur(2.0)],
    "jpeg": [Jpeg(1), Jpeg(), Jpeg(95)],
}
EACH = [pytest.param(w, id=f"{k}-{i}") for k, ws in STRENGTHS.items() for i, w in enumerate(ws)]


def images(n: int = 3, channels: int = 1, height: int = 14, width: int = 17) -> Tensor:
    """Values over the whole range, some exactly 0, 0.5 and 1."""
    x = torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :3] = torch.tensor([0.0, 0.5, 1.0])
    return x


def smooth(channels: int = 1, size: int = 32) -> Tensor:
    """A slope: what JPEG stores well."""
    return torch.linspace(0.1, 0.9, size).expand(2, channels, size, size).contiguous()


# --- what all of them promise ---------------------------------------------------------------------


def promise_problems(washer: nn.Module, x: Tensor) -> list[str]:
    """How a washer breaks what `unfool.defenses` promises of it."""
    before = x.clone()
    y = washer(x)
    if y.shape != x.shape or y.dtype != x.dtype:
        return [f"{x.dtype} {tuple(x.shape)} became {y.dtype} {tuple(y.shape)}"]
    problems = []
    if float(y.min()) < 0 or float(y.max()) > 1:
        problems.append("left [0, 1]")
    if not torch.equal(x, before):
        problems.append("changed its input")
    if not torch.equal(washer(x), y):
        problems.append("is random")
    if not torch.allclose(washer(x[:1]), y[:1], atol=1e-6):
        problems.append("depends on the batch")
    if list(washer.parameters()) or list(washer.buffers()):
        problems.append("has something to learn")
    return problems


@pytest.mark.parametrize("washer", EACH)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_washer_maps_images_to_images(washer: nn.Module, channels: int) -> None:
    assert promise_problems(washer, images(channels=channels)) == []
    assert promise_problems(washer, torch.ones(1, channels, 16, 16)) == []


class Faulty(nn.Module):
    def __init__(self, wash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.wash = wash

    def forward(self, x: Tensor) -> Tensor:
        return self.wash(x)


@pytest.mark.parametrize(
    ("wash", "problem"),
    [
        (lambda x: x + 0.1, "left [0, 1]"),
        (lambda x: x.mul_(0.5), "changed its input"),
        (lambda x: x * torch.rand(()), "is random"),
        (lambda x: x / x.numel(), "depends on the batch"),
        (lambda x: x.double(), "became torch.float64"),
        (lambda x: x[..., 1:], "became torch.float32 (3, 1, 14, 16)"),
    ],
)
def test_a_broken_promise_is_seen(wash: Callable[[Tensor], Tensor], problem: str) -> None:
    assert any(problem in found for found in promise_problems(Faulty(wash), images()))


def test_every_washer_is_named_and_tested() -> None:
    assert WASHERS.keys() == STRENGTHS.keys()
    assert WASHERS.keys() < DEFENSES.keys()
    for name, washers in STRENGTHS.items():
        assert {type(washer) for washer in washers} == {WASHERS[name]}


# --- one by one -----------------------------------------------------------------------------------


def test_threshold_is_strict() -> None:
    row = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0]).view(1, 1, 1, 5)
    assert Threshold()(row).flatten().tolist() == [0, 0, 0, 1, 1]
    assert Threshold(0.0)(row).flatten().tolist() == [0, 1, 1, 1, 1]
    assert not Threshold(1.0)(row).any()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_counted(bits: int) -> None:
    x = torch.linspace(0, 1, 4001).view(1, 1, 1, -1)
    y = BitDepth(bits)(x)
    assert len(y.unique()) == 2**bits
    assert float((y - x).abs().max()) == pytest.approx(0.5 / (2**bits - 1), abs=1e-5)  # no further
    assert torch.equal(BitDepth(bits)(y), y)  # what was rounded stays


def test_one_bit_is_the_threshold_and_eight_are_a_file() -> None:
    x = images(channels=3)
    assert torch.equal(BitDepth(1)(x), Threshold()(x))
    assert not torch.equal(BitDepth(2)(x), Threshold()(x))
    assert torch.equal(BitDepth(8)(x), (x * 255).round().to(torch.uint8).float() / 255)


@pytest.mark.parametrize("size", [3, 5])
def test_median_is_scipys(size: int) -> None:
    x = images(channels=3)
    expected = np.stack([[median_filter(c, size, mode="mirror") for c in i] for i in x.numpy()])
    assert np.array_equal(Median(size)(x).numpy(), expected)
    assert not np.array_equal(Median(8 - size)(x).numpy(), expected)  # the control: 5 for 3


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_scipys(sigma: float) -> None:
    x = images(channels=3)
    reach = max(1, round(3 * sigma))
    expected = np.stack(
        [[gaussian_filter(c, sigma, mode="mirror", radius=reach) for c in i] for i in x.numpy()]
    )
    assert np.allclose(Blur(sigma)(x).numpy(), expected, atol=1e-6)
    assert not np.allclose(Blur(1.1 * sigma)(x).numpy(), expected, atol=1e-3)


def test_a_stronger_blur_leaves_less_contrast() -> None:
    spread = [float(Blur(sigma)(images()).std()) for sigma in (0.3, 0.6, 1.2, 2.0)]
    assert spread == sorted(spread, reverse=True)
    assert torch.equal(Blur()(torch.ones(1, 1, 9, 9)).round(decimals=5), torch.ones(1, 1, 9, 9))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_a_slope_and_its_channels(channels: int) -> None:
    x = smooth(channels)
    assert float((Jpeg(95)(x) - x).abs().max()) < 0.02
    error = [float((Jpeg(quality)(images(2, channels)) - images(2, channels)).abs().mean())
             for quality in (95, 75, 10)]  # fmt: skip
    assert error == sorted(error)
    assert error[0] > 0.001
    if channels == 3:
        red = torch.zeros(1, 3, 16, 16)
        red[:, 0] = 1
        assert float((Jpeg(95)(red) - red).abs().max()) < 0.05  # not read as blue, not turned


def test_jpeg_is_a_files_bytes() -> None:
    x, file = images(1), io.BytesIO()
    Image.fromarray((x[0, 0] * 255).round().to(torch.uint8).numpy()).save(file, "JPEG", quality=30)
    with Image.open(file) as read:
        kept = np.array(read)
    assert np.array_equal((Jpeg(30)(x)[0, 0] * 255).round().numpy(), kept)
    assert not np.array_equal((Jpeg(31)(x)[0, 0] * 255).round().numpy(), kept)


def test_what_gradients_they_pass() -> None:
    """As the docstrings say: none, zero, or a real one."""
    for name, washer in {k: v[1] for k, v in STRENGTHS.items()}.items():
        x = images().requires_grad_(True)
        y = washer(x)
        assert y.requires_grad == (name in ("bits", "median", "blur")), name
        if y.requires_grad:
            y.square().sum().backward()
            assert x.grad is not None
            assert bool(x.grad.any()) == (name != "bits"), name


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.5), "level is a pixel value in [0, 1], not 1.5"),
        (lambda: Threshold(float("nan")), "level is a pixel value in [0, 1], not nan"),
        (lambda: BitDepth(0), "bits is a whole number from 1 to 8, not 0"),
        (lambda: BitDepth(9), "bits is a whole number from 1 to 8, not 9"),
        (lambda: BitDepth(2.5), "bits is a whole number from 1 to 8, not 2.5"),  # type: ignore[arg-type]
        (lambda: BitDepth(True), "bits is a whole number from 1 to 8, not True"),
        (lambda: Median(2), "size is an odd number of pixels, 3 or more, not 2"),
        (lambda: Median(1), "size is an odd number of pixels, 3 or more, not 1"),
        (lambda: Median(3.0), "size is an odd number of pixels, 3 or more, not 3.0"),  # type: ignore[arg-type]
        (lambda: Blur(0), "sigma is a width in pixels, above 0 and at most 8, not 0"),
        (lambda: Blur(9.0), "sigma is a width in pixels, above 0 and at most 8, not 9.0"),
        (lambda: Blur(float("nan")), "above 0 and at most 8, not nan"),
        (lambda: Jpeg(0), "quality is a whole number from 1 to 95, not 0"),
        (lambda: Jpeg(96), "quality is a whole number from 1 to 95, not 96"),
        (lambda: Jpeg(7.5), "quality is a whole number from 1 to 95, not 7.5"),  # type: ignore[arg-type]
        (lambda: Jpeg()(images(channels=2)), "JPEG has 1 or 3 channels, not 2"),
        (lambda: Blur(5.0)(images()), "an image of 14x17 pixels has no 15 to mirror at its border"),
        (lambda: Median(29)(images()), "has no 14 to mirror at its border: lower the washer's"),
    ],
)
def test_a_strength_that_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_largest_strengths_are_taken() -> None:
    """The control of the refusals: one step inside each border works."""
    x = images()
    for washer in (Threshold(1.0), BitDepth(1), BitDepth(8), Median(27), Blur(4.4), Jpeg(1)):
        assert washer(x).shape == x.shape
