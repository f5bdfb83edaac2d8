"""How large a run is: four sizes, from "does it run" to the paper's scale."""

from __future__ import annotations

from dataclasses import dataclass

from unfool.attacks import SIGN_FAMILY
from unfool.defenses.pix2pix import Settings


@dataclass(frozen=True)
class Profile:
    """Sizes of one run; `PROFILES` holds the four that the course uses.

    Attributes:
        name: smoke, classroom, desk or paper.
        classifier_images: training images of a classifier; None is all.
        classifier_epochs: its passes over them.
        train_images, test_images: images per attack that a purifier is trained on and scored on.
        sign_train_images, sign_test_images: the same for the sign family, whose attacks take one
            to forty passes instead of thousands, so that more of them are affordable.
        purifier: settings of the paper's purifier.
        claims_hold: whether claims about accuracy are asserted. In `smoke` everything is too small
            for them; it only shows that the code runs and is deterministic.
    """

    name: str
    classifier_images: int | None
    classifier_epochs: int
    train_images: int
    test_images: int
    sign_train_images: int
    sign_test_images: int
    purifier: Settings
    claims_hold: bool = True

    def images(self, attack: str, split: str) -> int:
        """Return how many images of a split ("train", "validation", "test") an attack is run on."""
        train, test = (
            (self.sign_train_images, self.sign_test_images)
            if attack in SIGN_FAMILY
            else (self.train_images, self.test_images)
        )
        return train if split == "train" else test


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke", 480, 2, 32, 16, 32, 16,
            Settings(width=8, discriminator_width=8, epochs=2, batch_size=16),
            claims_hold=False,
        ),
        Profile(
            "classroom", None, 10, 400, 200, 2000, 1000,
            Settings(width=16, discriminator_width=16, epochs=6, batch_size=16),
        ),
        Profile(
            "desk", None, 10, 10_000, 2_000, 10_000, 2_000,
            Settings(width=16, discriminator_width=16, epochs=20, batch_size=32),
        ),
        Profile(
            "paper", None, 20, 10_000, 10_000, 10_000, 10_000,
            Settings(width=64, discriminator_width=64, epochs=20, batch_size=32),
        ),
    )
}  # fmt: skip


def profile_of(name: str) -> Profile:
    """Return a profile by name.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose from {', '.join(PROFILES)}")
    return PROFILES[name]
