"""How large a run is: four sizes, from "does it run" to the paper's scale."""

from __future__ import annotations

from dataclasses import dataclass

from unfool.attacks import SIGN_FAMILY
from unfool.defenses import adversarial_training, ape_gan, defense_gan, magnet, wgan_gp
from unfool.defenses.pix2pix import Settings


@dataclass(frozen=True)
class Profile:
    """Sizes of one run; `PROFILES` holds the four that the course uses.

    Attributes:
        name: smoke, classroom, desk or paper.
        classifier_images: training images of a classifier and of a GAN; None is all.
        classifier_epochs: its passes over them.
        train_images, test_images: images per attack that a purifier is trained on and scored on.
        sign_train_images, sign_test_images: the same for the sign family, whose attacks take one
            to forty passes instead of thousands, so that more of them are affordable.
        purifier: settings of the paper's purifier.
        gan: settings of the WGAN-GP that makes images from noise.
        defense_gan: how an image is sought among those that this GAN can make.
        magnet: of MagNet's autoencoders and thresholds.
        adversarial: settings of adversarial training; its kind and eps are set where it is used.
        ape_gan: settings of APE-GAN.
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
    gan: wgan_gp.Settings
    defense_gan: defense_gan.Settings
    magnet: magnet.Settings
    adversarial: adversarial_training.Settings
    ape_gan: ape_gan.Settings
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
            name="smoke",
            classifier_images=480,
            classifier_epochs=2,
            train_images=32,
            test_images=16,
            sign_train_images=32,
            sign_test_images=16,
            purifier=Settings(width=8, discriminator_width=8, epochs=2, batch_size=16),
            gan=wgan_gp.Settings(width=4, epochs=2),
            defense_gan=defense_gan.Settings(steps=5, restarts=2),
            magnet=magnet.Settings(epochs=1, rate=1e-2, false_positives=0.01, joint=True),
            adversarial=adversarial_training.Settings(steps=2, warmup=0.5, epochs=1),
            ape_gan=ape_gan.Settings(width=4, epochs=2, batch_size=16),
            claims_hold=False,
        ),
        Profile(
            name="classroom",
            classifier_images=None,
            classifier_epochs=10,
            train_images=400,
            test_images=200,
            sign_train_images=3600,
            sign_test_images=1000,
            # So few steps need a larger rate than pix2pix's 2e-4; chosen on validation images.
            purifier=Settings(width=16, discriminator_width=16, epochs=6, batch_size=16, rate=1e-3),
            # 600 updates of the generator instead of 200,000: small, and ten times the rate.
            gan=wgan_gp.Settings(width=8, epochs=40, rate=1e-3),
            defense_gan=defense_gan.Settings(steps=60, restarts=4),
            magnet=magnet.Settings(
                epochs=30, batch_size=64, rate=1e-2, false_positives=0.01, joint=True
            ),
            adversarial=adversarial_training.Settings(steps=5, warmup=0.5, epochs=6),
            ape_gan=ape_gan.Settings(width=32, epochs=6, batch_size=32, rate=1e-3),
        ),
        Profile(
            name="desk",
            classifier_images=None,
            classifier_epochs=10,
            train_images=10_000,
            test_images=2_000,
            sign_train_images=10_000,
            sign_test_images=2_000,
            purifier=Settings(width=16, discriminator_width=16, epochs=20, batch_size=32),
            gan=wgan_gp.Settings(width=32, epochs=23),  # 5,060 updates of the generator
            defense_gan=defense_gan.Settings(),
            magnet=magnet.Settings(false_positives=0.01, joint=True),
            adversarial=adversarial_training.Settings(steps=10, warmup=0.2, epochs=10),
            ape_gan=ape_gan.Settings(epochs=20),
        ),
        Profile(
            name="paper",
            classifier_images=None,
            classifier_epochs=20,
            train_images=10_000,
            test_images=10_000,
            sign_train_images=10_000,
            sign_test_images=10_000,
            purifier=Settings(width=64, discriminator_width=64, epochs=20, batch_size=32),
            gan=wgan_gp.Settings(epochs=834),  # 200,000 updates of the generator on full MNIST
            defense_gan=defense_gan.Settings(),
            magnet=magnet.Settings(),
            adversarial=adversarial_training.Settings(),
            ape_gan=ape_gan.Settings(),
        ),
    )
}


def profile_of(name: str) -> Profile:
    """Return a profile by name.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose from {', '.join(PROFILES)}")
    return PROFILES[name]
