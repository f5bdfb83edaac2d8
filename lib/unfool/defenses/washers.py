"""Defences that learn nothing: they wash an image and pass it on.

They stand beside the purifier in every table of the course, because a defence is worth its
training only by what it adds to them. On MNIST most of a digit's pixels are black or white, and
rounding each pixel removes most small perturbations at once.

Each takes images (N, C, H, W) in [0, 1] and returns the same shape and range. `Threshold` and
`Jpeg` pass no gradient back and that of `BitDepth` is zero. This stops gradients, not attackers:
notebook 12 replaces the gradient by a guess. Compared in notebook 05.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad


class Threshold(nn.Module):
    """Turn pixels above `level` white and all others black (Xu et al. 2018, feature squeezing).

    Values are 0.0 and 1.0. The output depends on no input smoothly, so it carries no gradient.
    """

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        if not 0 <= level <= 1:
            raise ValueError(f"level is a pixel value in [0, 1], not {level}")
        self.level = level

    def forward(self, images: Tensor) -> Tensor:
        return (images > self.level).to(images.dtype)


class BitDepth(nn.Module):
    """Round every value to the nearest of 2**bits even steps from 0 to 1 (Xu et al. 2018).

    bits=1 is `Threshold(0.5)`; bits=8 is what an image file keeps. Its gradient is zero.
    """

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        if not _whole(bits) or not 1 <= bits <= 8:
            raise ValueError(f"bits is a whole number from 1 to 8, not {bits}")
        self.bits = bits

    def forward(self, images: Tensor) -> Tensor:
        steps = 2**self.bits - 1
        return (images * steps).round() / steps


class Median(nn.Module):
    """Replace every pixel by the median of the `size` x `size` pixels around it, per channel.

    The image is mirrored at its border. Xu et al. 2018 use 2x2 and 3x3. The gradient goes to the
    one pixel that was the median.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if not _whole(size) or size < 3 or size % 2 == 0:
            raise ValueError(f"size is an odd number of pixels, 3 or more, not {size}")
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        x = _mirrored(images, self.size // 2)
        around = x.unfold(2, self.size, 1).unfold(3, self.size, 1)  # (N, C, H, W, size, size)
        return around.flatten(-2).median(dim=-1).values


class Blur(nn.Module):
    """Average every pixel with its neighbours, weighted by a Gaussian of `sigma` pixels.

    Weights are cut at three sigma; the image is mirrored at its border.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        if not 0 < sigma <= 8:
            raise ValueError(f"sigma is a width in pixels, above 0 and at most 8, not {sigma}")
        self.sigma = sigma

    def forward(self, images: Tensor) -> Tensor:
        reach = max(1, round(3 * self.sigma))
        steps = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        row = torch.exp(-0.5 * (steps / self.sigma) ** 2)
        row = row / row.sum()
        n, channels, height, width = images.shape
        x = _mirrored(images, reach).reshape(n * channels, 1, height + 2 * reach, width + 2 * reach)
        x = conv2d(conv2d(x, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))
        return x.view(images.shape).clamp(0, 1)  # rounding may leave a weighted mean above 1


class Jpeg(nn.Module):
    """Write every image as an 8-bit JPEG file in memory and read it back (Dziugaite et al. 2016).

    `quality` is libjpeg's, 1 (coarse) to 95 (fine); colour is stored at half resolution (4:2:0).
    Works on the CPU, image by image; the result lies where the input does and carries no gradient.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        if not _whole(quality) or not 1 <= quality <= 95:
            raise ValueError(f"quality is a whole number from 1 to 95, not {quality}")
        self.quality = quality

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"JPEG has 1 or 3 channels, not {images.shape[1]}")
        levels = (images.detach() * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1)
        read = torch.stack([torch.from_numpy(self._kept(image.numpy())) for image in levels])
        return read.permute(0, 3, 1, 2).to(images.device, images.dtype) / 255

    def _kept(self, image: np.ndarray) -> np.ndarray:
        """Return what a JPEG file keeps of an image (H, W, C), uint8."""
        from PIL import Image

        file = io.BytesIO()
        grey = image.shape[2] == 1
        picture = Image.fromarray(image[:, :, 0] if grey else image)
        picture.save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
        with Image.open(file) as read:
            return np.array(read).reshape(image.shape)


WASHERS: dict[str, type[nn.Module]] = {
    "threshold": Threshold,
    "bits": BitDepth,
    "median": Median,
    "blur": Blur,
    "jpeg": Jpeg,
}
"""By the name that `Lab.defense` and records use; each keeps its arguments under their names."""


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mirrored(images: Tensor, reach: int) -> Tensor:
    """Pad (N, C, H, W) by `reach` pixels on each side, mirrored, the border pixel not doubled."""
    if reach >= min(images.shape[-2:]):
        raise ValueError(
            f"an image of {images.shape[-2]}x{images.shape[-1]} pixels has no {reach} to mirror at "
            "its border: lower the washer's strength"
        )
    return pad(images, [reach] * 4, mode="reflect")
