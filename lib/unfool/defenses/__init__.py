"""Defences: a purifier is an `nn.Module` from images to images in [0, 1].

`nn.Sequential(purifier, classifier)` is then the defended classifier, and every attack and every
measure works on it unchanged.
"""

from __future__ import annotations

from unfool.defenses.pix2pix import UNet
from unfool.defenses.washers import Threshold

__all__ = ["DEFENSES", "Threshold", "UNet"]

DEFENSES: dict[str, str] = {
    "none": "nothing: the classifier alone",
    "threshold": "each pixel rounded to 0 or 1; learns nothing",
    "pix2pix": "the paper's purifier; trained on pairs of adversarial and clean images",
}
"""What each defence is, by the name that `Lab.defense` and records use."""
