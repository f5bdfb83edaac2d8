"""One-line defences that learn nothing: they wash an image and pass it on.

They stand beside the purifier in every table of the course, because a defence is worth its
training only by what it adds to them. On MNIST most of a digit's pixels are black or white, and
rounding each pixel removes most small perturbations at once.
"""

from __future__ import annotations

from torch import Tensor, nn


class Threshold(nn.Module):
    """Round every pixel to 0 or 1: one bit of depth (Xu et al. 2018, feature squeezing).

    (N, C, H, W) in [0, 1] -> the same shape, values 0.0 and 1.0. Its gradient is zero almost
    everywhere, which stops gradients, not attackers: see notebook 12.
    """

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        if not 0 <= level <= 1:
            raise ValueError(f"level is a pixel value in [0, 1], not {level}")
        self.level = level

    def forward(self, images: Tensor) -> Tensor:
        return (images > self.level).to(images.dtype)
