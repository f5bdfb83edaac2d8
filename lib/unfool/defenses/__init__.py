"""Defences: a purifier is an `nn.Module` from images to images in [0, 1].

`nn.Sequential(purifier, classifier)` is then the defended classifier, and every attack and every
measure works on it unchanged. A defence that is a classifier of its own says so with
`replaces_classifier`, and `evaluation.defended` puts it in the old one's place. A defence that also
refuses images has a method `rejects(images)`, which returns (N,) bool.
"""

from __future__ import annotations

from unfool.defenses.adversarial_training import AdversariallyTrained
from unfool.defenses.ape_gan import ApeGAN
from unfool.defenses.defense_gan import DefenseGAN
from unfool.defenses.finetuned import Finetuned
from unfool.defenses.magnet import MagNet
from unfool.defenses.pix2pix import UNet
from unfool.defenses.washers import WASHERS, BitDepth, Blur, Jpeg, Median, Threshold

__all__ = [
    "DEFENSES", "WASHERS", "AdversariallyTrained", "ApeGAN", "BitDepth", "Blur", "DefenseGAN",
    "Finetuned", "Jpeg", "MagNet", "Median", "Threshold", "UNet",
]  # fmt: skip

DEFENSES: dict[str, str] = {
    "none": "nothing: the classifier alone",
    "threshold": "each pixel turned black or white at `level`; learns nothing",
    "bits": "each pixel rounded to `bits` bits; learns nothing",
    "median": "each pixel replaced by the median of `size` x `size`; learns nothing",
    "blur": "each pixel averaged with its neighbours, `sigma` pixels wide; learns nothing",
    "jpeg": "written as JPEG of `quality` and read back; learns nothing",
    "denoiser": "an autoencoder trained to remove random noise; sees no attack",
    "finetuned": "the classifier itself, trained further on the purifier's pairs; replaces it",
    "adversarial_fgsm": "the classifier trained afresh on FGSM attacks on itself; replaces it",
    "adversarial_pgd": "the classifier trained afresh on PGD attacks on itself; replaces it",
    "magnet": "autoencoders that redraw images and refuse what they cannot redraw; sees no attack",
    "defense_gan": "the nearest image that a GAN can make; sees no attack",
    "ape_gan": "a small GAN trained on the purifier's pairs, without skips or conditions",
    "pix2pix": "the paper's purifier; trained on pairs of adversarial and clean images",
}
"""What each defence is, by the name that `Lab.defense` and records use."""
