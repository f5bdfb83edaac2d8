"""`Lab`: the one object a notebook needs.

It knows the profile, the data set, the seed and the device; it builds classifiers, adversarial sets
and defences when they are first asked for and finds them in the store from then on. It calls the
rooms below it and does no numerics of its own.
"""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unfool import __version__, attacks, classifiers, threats, training
from unfool.artifacts import REPO, Store, artifact_key, load_checkpoint, load_tensors, save_tensors
from unfool.attacks import ATTACKS, AttackSettings, paper_attacks, random_targets
from unfool.attacks._guard import check_choice, check_device, check_number
from unfool.datasets import Dataset, Split, check_unseen, load
from unfool.defenses import (
    DEFENSES,
    WASHERS,
    adversarial_training,
    ape_gan,
    defense_gan,
    denoiser,
    finetuned,
    magnet,
    pix2pix,
    wgan_gp,
)
from unfool.devices import find_device
from unfool.evaluation import (
    AdversarialSet,
    Record,
    accuracy,
    append_record,
    measure,
    predict,
    read_records,
    read_rows,
)
from unfool.figures import Figure
from unfool.profiles import Profile, profile_of
from unfool.progress import Progress, shown

WEIGHTS = REPO / "results" / "weights"
PURIFIER = "pix2pix-"  # how the names of committed purifiers begin
BLOCK = 512  # images that an attack may lose if it is killed


class Lab:
    """Builds on demand, finds in the store, and shows.

    Args:
        profile: "smoke", "classroom", "desk" or "paper"; see `unfool.profiles`.
        dataset: a name of `unfool.datasets.NAMES`, or "folder:PATH".
        seed: of everything random: initial weights, shuffling, random targets.
        device: "cpu", "cuda", "cuda:1", …; "auto" takes a GPU where there is one, and says so.
        store: where artifacts are kept; by default `$UNFOOL_STORE`, else `data/store`.

    Raises:
        TypeError, ValueError: an unknown profile or data set, a seed that is no whole number from 0
            on, or a GPU that is not there.
    """

    # Of all labs: a defence that another one made must not pass for one without a past.
    _known: ClassVar[WeakKeyDictionary[nn.Module, dict[str, Any]]] = WeakKeyDictionary()

    def __init__(
        self,
        profile: str = "classroom",
        dataset: str = "mnist5k",
        seed: int = 0,
        device: str = "cpu",
        store: Store | None = None,
    ) -> None:
        self.profile: Profile = profile_of(profile)
        check_number("seed", seed, 0, whole=True)
        self.seed = seed
        self.device = find_device(device)
        self.store = store or Store()
        self.dataset = dataset
        with shown(f"loading {dataset}") as progress:
            self.data: Dataset = load(dataset, store=self.store, progress=progress)
        self.records: list[Record] = []
        self._loaded: dict[str, nn.Module] = {}

    def __repr__(self) -> str:
        """Return the one line that a notebook's setup cell prints."""
        return (
            f"unfool {__version__} · profile {self.profile.name} · {self.data.name} "
            f"{'x'.join(map(str, self.data.shape))}, {len(self.data.train)} training and "
            f"{len(self.data.test)} test images · seed {self.seed} · {self.device}"
        )

    # --- what is built ---

    def classifier(self, name: str = "anet", *, relu_logits: bool = False) -> nn.Module:
        """Return a trained classifier in eval mode on the device.

        Args:
            name: a key of `unfool.classifiers.CLASSIFIERS`, trained here on first use; or the name
                of committed weights, such as "anet-mnist" (see `committed_weights`).
            relu_logits: the paper's ReLU on the logits; see `unfool.classifiers`. "anet+relu" is
                the same by name.

        Raises:
            ValueError: neither a classifier nor committed weights of that name.
        """
        wanted = f"{name}+relu" if relu_logits else name
        name = wanted.removesuffix("+relu")
        relu_logits = name != wanted
        if wanted not in self._loaded:
            if name not in classifiers.CLASSIFIERS and name in committed_weights():
                net, known = self._committed(name, relu_logits)
            elif name in classifiers.CLASSIFIERS:
                net, known = self._trained(name, relu_logits)
            else:
                raise classifiers.unknown(name, [*classifiers.CLASSIFIERS, *committed_weights()])
            net.to(self.device).eval()
            self._known[net] = known
            self._loaded[wanted] = net
        return self._loaded[wanted]

    def adopt(self, module: nn.Module, name: str, key: str = "") -> nn.Module:
        """Let records name a module of your own, and if it is a classifier let `name` stand for it.

        Args:
            module: a classifier or a defence, in eval mode, on the lab's device.
            name: not one that the course uses.
            key: of a classifier, all that it does depends on; what it is attacked with is found
                again by it.

        Raises:
            ValueError: the name is taken; or a classifier, tried on a few images, is on another
                device, fails, or is refused by `threats.check_classifier`, such as one of another
                number of classes than the data.
        """
        if name in {*DEFENSES, *classifiers.CLASSIFIERS, *committed_weights()}:
            raise ValueError(f"{name!r} is a name of the course: give yours another")
        if key:
            self._try(module, self.data.train.first(threats.TRIED).images, classifies=True)
        self._known[module] = {
            "name": name, "key": f"own:{key}", "trained_on": "", "settings": {}, "attacks": [],
        }  # fmt: skip
        if key:
            self._loaded[name] = module
        return module

    def history(self, module: nn.Module) -> training.History:
        """Return the mean training losses, one dict per epoch, of what this lab has built.

        Raises:
            ValueError: nothing was trained here, as of a washer or of a module of yours.
        """
        known = self._known.get(module, {})
        if "history" not in known:
            raise ValueError(
                f"{type(module).__name__} has no history of losses: ask for that of a classifier, "
                "a GAN or a defence that a lab has trained"
            )
        history: training.History = known["history"]
        return history

    def settings_of(self, defense: nn.Module | None) -> dict[str, Any]:
        """Return the settings that a defence's records name: {} for none and for one of yours."""
        known = {} if defense is None else self._known.get(defense, {})
        return dict(known.get("settings", {}))

    def accuracy(self, classifier: str = "anet", split: str = "test") -> float:
        """Return the share of a split's images that the classifier gets right."""
        net = self.classifier(classifier)
        self._refuse_seen(net, split)
        part = self.split(split)
        return accuracy(net, part.images, part.labels)

    def split(self, name: str) -> Split:
        """Return "train", "validation" or "test" of the data set."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"unknown split {name!r}: choose from train, validation, test")
        part: Split = getattr(self.data, name)
        return part

    def adversarial_set(
        self, attack: str | AttackSettings, *, classifier: str = "anet", split: str = "test",
        images: int | None = None, **settings: Any,
    ) -> AdversarialSet:  # fmt: skip
        """Return images of a split attacked through a classifier.

        Args:
            attack: a name of `unfool.attacks.ATTACKS`, with the paper's settings for this data set.
            classifier: the classifier under attack.
            split: "train", "validation" or "test".
            images: how many of it, the first ones; by default the profile says.
            settings: override the attack's, e.g. `eps=0.3`; `target="random"` draws a wrong class
                for each image.

        Raises:
            ValueError: an unknown attack, classifier or split, or a target of the caller's own.
        """
        wanted = self._settings(attack, settings)
        _check_target(wanted)
        net = self.classifier(classifier)
        self._refuse_seen(net, split)
        part = self.split(split)
        most = self.profile.images(wanted.name, split) if images is None else images
        check_number("images", most, 1, whole=True)
        part = part.first(min(len(part), most))
        config = {
            "name": f"{wanted.name}-{classifier}-{self.data.name}-{split}",
            "attack": wanted.name,
            "settings": wanted.settings,
            "classifier": self._known[net]["key"],
            "fingerprint": self.data.fingerprint,
            "split": split,
            "images": len(part),
            "seed": self.seed,
            "version": [attacks.VERSIONS[wanted.name], self.device.type],
        }

        def build(folder: Path) -> None:
            with shown(f"{wanted.name} on {classifier}, {split}") as progress:
                made = self._attack(net, wanted, part, folder, progress)
            save_tensors(folder / "set.safetensors", made, {})

        size = part.images.numel() * 4 * 2
        with shown(config["name"]) as progress:
            folder = self.store.get(
                "adversarial", config, build, needs_bytes=size, progress=progress
            )
        made, _ = load_tensors(folder / "set.safetensors")
        return AdversarialSet(
            part.images, made["x_adv"], part.labels, made["attacked"], made["success"],
            target=made.get("target"), attack=wanted.name, attack_settings=wanted.settings,
            classifier=classifier,
            dataset=self.data.name, fingerprint=self.data.fingerprint, split=split, seed=self.seed,
            classes=self.data.classes,
        )  # fmt: skip

    def defense(
        self, name: str, *, classifier: str = "anet",
        attacks: Sequence[AttackSettings] | None = None, **settings: Any,
    ) -> nn.Module | None:  # fmt: skip
        """Return a defence: a module from images to images, or None for "none".

        Args:
            name: a key of `unfool.defenses.DEFENSES`.
            classifier: the classifier that it is to protect; "pix2pix", "ape_gan" and "finetuned"
                are trained on attacks on it, "adversarial_fgsm" and "adversarial_pgd" are fresh
                networks of its kind, and in colour "magnet" asks it.
            attacks: those whose images the first three are trained on; by default
                `paper_attacks(dataset)`. Adversarial training makes its own; the others see none.
            settings: a washer's strength, e.g. `bits=3` (see `unfool.defenses.washers`); or what
                overrides the profile's, e.g. `epochs=2` (see `Settings` in the defence's module).
                "pix2pix" and "finetuned" take `images=400`: so many of each attack are learned
                from, instead of the profile's number. "pix2pix" takes three more; two cost nothing
                once it is trained: `after=2`, as it was after so many epochs, and
                `statistics="batch"` (see `pix2pix.with_batch_statistics`); and, instead of all
                others, `committed=True`: the purifier of a committed classifier, such as
                "bnet-mnist", that ships with the course (see `committed_purifiers`).
        """
        if name not in DEFENSES:
            raise ValueError(f"unknown defence {name!r}: choose from {', '.join(DEFENSES)}")
        if name == "none":
            return None
        if name in WASHERS:
            return self._washer(name, settings)
        if name == "denoiser":
            return self._denoiser(settings)
        if name == "defense_gan":
            return self._defense_gan(settings)
        if name == "magnet":
            return self._magnet(classifier, settings)
        if name.startswith("adversarial_"):
            kind = name.removeprefix("adversarial_")
            return self._adversarially_trained(classifier, kind, settings)
        if name == "pix2pix" and settings.pop("committed", False):
            return self._committed_purifier(
                classifier, [*settings, *(["attacks"] if attacks else [])]
            )
        seen = tuple(attacks) if attacks is not None else paper_attacks(self.dataset)
        if name == "finetuned":
            return self._finetuned(classifier, seen, **settings)
        if name == "ape_gan":
            return self._ape_gan(classifier, seen, settings)
        return self._purifier(classifier, seen, **settings)

    def gan(self, **settings: Any) -> wgan_gp.Generator:
        """Return a generator of images like the training images: a WGAN-GP, in eval mode.

        Args:
            settings: override the profile's, e.g. `epochs=2`; see `wgan_gp.Settings`.
        """
        return self._generator(replace(self.profile.gan, **settings))

    # --- what is measured ---

    def evaluate(
        self, defense: nn.Module | None, adversarial: AdversarialSet, *, classifier: str = "anet",
        transfer: bool = False, passes: int | None = None, append: bool = True,
    ) -> Record:  # fmt: skip
        """Return one record: the defence before the classifier, on an adversarial set.

        The record is also appended to the file of `records_path`.

        Args:
            defense: what `Lab.defense` returned, or any module from images to images; None is none.
            adversarial: what `Lab.adversarial_set` returned.
            classifier: the classifier that is defended.
            transfer: must be True where the set was made on another classifier or data set, or the
                defence trained for one.
            passes: what the attack took, where somebody counted; see `evaluation.counted`.
            append: whether to write the record down at once.

        Raises:
            ValueError: a set or a defence of others without `transfer`, or one that does not fit:
                images of another size or of other classes; or a module of yours that fails, is on
                another device, or is refused by `threats.check_defense`: one that returns no images
                (no logits), that holds a state between calls, or whose train mode matters.
        """
        known = {"name": "none"} if defense is None else self._known.get(defense, {})
        if not transfer and adversarial.classifier != classifier:
            raise ValueError(
                f"this adversarial set was made on {adversarial.classifier!r}, not on "
                f"{classifier!r}: pass transfer=True if that is what you want to measure"
            )
        if not transfer and adversarial.fingerprint != self.data.fingerprint:
            raise ValueError(
                f"this adversarial set was made from {adversarial.dataset!r}, not from "
                f"{self.data.name!r}: pass transfer=True if that is what you want to measure"
            )
        if not transfer and known.get("classifier") not in (None, "", classifier):
            raise ValueError(
                f"this defence was trained for {known['classifier']!r}, not for {classifier!r}: "
                "pass transfer=True if that is what you want to measure"
            )
        if not transfer and known.get("fingerprint") not in (None, self.data.fingerprint):
            raise ValueError(
                f"this defence was trained on {known['dataset']!r}, not on {self.data.name!r}: "
                "pass transfer=True if that is what you want to measure"
            )
        net = self.classifier(classifier)
        self._refuse_seen(net, adversarial.split, adversarial.dataset)
        self._check_fit(defense, known, adversarial)
        start = time.perf_counter()
        fields = measure(net, defense, adversarial)
        record = Record(
            dataset=adversarial.dataset,
            fingerprint=adversarial.fingerprint,
            profile=self.profile.name,
            classifier=classifier,
            defense=known.get("name", type(defense).__name__),
            defense_settings=self.settings_of(defense),
            saw_attack_in_training=adversarial.attack in known.get("attacks", []),
            learned_from=list(known.get("attacks", [])),
            trained_for=known.get("classifier", ""),
            made_on=adversarial.classifier,
            attack=adversarial.attack,
            attack_settings=dict(adversarial.attack_settings),
            knowledge="f",  # attacks here know the classifier and nothing of the defence
            access="gradients",
            seed=self.seed,
            seconds=time.perf_counter() - start,
            passes=passes,
            device=str(self.device),
            versions=versions(),
            git=git_commit(),
            warnings=_warnings(fields),
            **fields,
        )
        if append:
            record = append_record(record, records_path())
        self.records.append(record)
        return record

    def _check_fit(
        self, defense: nn.Module | None, known: Mapping[str, Any], adversarial: AdversarialSet
    ) -> None:
        """Refuse images of another size or classes; try a module that was not trained on these."""
        if not len(adversarial):
            raise ValueError("this adversarial set holds no images: nothing can be measured on it")
        shape = tuple(adversarial.x.shape[1:])
        if shape != self.data.shape:
            raise ValueError(
                f"this adversarial set holds images {shape}, but {self.data.name} has "
                f"{self.data.shape}: resize them, or take a lab of {adversarial.dataset!r}"
            )
        if adversarial.classes not in ((), self.data.classes):
            theirs, ours = (
                f"{len(c)} classes ({', '.join((*c[:3], '…')[: len(c)])})"
                for c in (adversarial.classes, self.data.classes)
            )
            raise ValueError(
                f"this adversarial set is of {theirs}, and {self.data.name} of {ours}, so that "
                f"labels don't mean the same: take a lab of {adversarial.dataset!r}, or give both "
                "the same class names"
            )
        if defense is not None and known.get("fingerprint") != self.data.fingerprint:
            classifies = getattr(defense, "replaces_classifier", False)
            self._try(defense, adversarial.x, classifies=classifies)

    def _try(self, module: nn.Module, images: Tensor, *, classifies: bool) -> None:
        """Refuse what fails on the first images or cannot be measured fairly."""
        some = images[: threats.TRIED].to(self.device)
        check_device(module, some, type(module).__name__)
        threats.tried(module, some)
        if classifies:
            threats.check_classifier(module, some, len(self.data.classes))
        else:
            threats.check_defense(module, some)

    def compare(
        self, defenses: Mapping[str, nn.Module | None],
        adversarial: Mapping[str, AdversarialSet], *, classifier: str = "anet",
        transfer: bool = False,
    ) -> dict[str, dict[str, Record]]:  # fmt: skip
        """Return a record of each defence, by its name, on each adversarial set, by its name."""
        return {
            name: {
                attack: self.evaluate(defense, one, classifier=classifier, transfer=transfer)
                for attack, one in adversarial.items()
            }
            for name, defense in defenses.items()
        }

    def committed_records(self, name: str) -> list[Record]:
        """Return the records of `results/records/NAME.jsonl`, which ship with the course."""
        path = REPO / "results" / "records" / f"{name}.jsonl"
        if not path.exists():
            there = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl")))
            raise ValueError(f"no committed records {name!r}: choose from {there}")
        return read_records(path)

    def committed_rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of `results/NAME.jsonl`, measurements that are no records: see there."""
        path = REPO / "results" / f"{name}.jsonl"
        if not path.exists():
            there = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl")))
            raise ValueError(f"no committed rows {name!r}: choose from {there}")
        return read_rows(path)

    # --- what is shown ---

    def check(self, claim: str, holds: bool | Tensor, *, always: bool = False) -> None:
        """Assert a claim of the text and print one stable line.

        In the profile `smoke` everything is too small for claims about accuracy; there it prints
        "seen" instead of asserting, unless `always` says that the claim holds at any size.

        Raises:
            AssertionError: the claim does not hold.
        """
        if not (self.profile.claims_hold or always):
            print(f"check seen {claim}")
        elif bool(holds):
            print(f"check ok   {claim}")
        else:
            raise AssertionError(f"this does not hold here: {claim}")

    def show(self, figure: Figure) -> None:
        """Display a figure with its alt text, and print its caption."""
        from IPython.display import display

        display(
            {"image/png": figure.png(), "text/plain": figure.alt},
            metadata={"image/png": {"alt": figure.alt}},
            raw=True,
        )
        print(f"Figure: {figure.caption}")

    # --- how it is built ---

    def _trained(self, name: str, relu_logits: bool) -> tuple[nn.Module, dict[str, Any]]:
        net = classifiers.build(
            name, self.data.shape, len(self.data.classes), seed=self.seed, relu_logits=relu_logits
        )
        recipe = training.recipe_for(name, self.data.name)
        images = self.profile.classifier_images or len(self.data.train)
        config: dict[str, Any] = {
            "name": f"{name}{'-relu' if relu_logits else ''}-{self.data.name}",
            "classifier": name,
            "relu_logits": relu_logits,
            "dataset": self.data.name,  # not its path: a folder that was moved is the same
            "fingerprint": self.data.fingerprint,
            "images": min(images, len(self.data.train)),
            "epochs": self.profile.classifier_epochs * recipe.longer,
            "recipe": recipe.as_key(),
            "seed": self.seed,
            "version": [classifiers.VERSION, training.VERSION, self.device.type],
        }
        part = self.data.train.first(config["images"])

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            net.to(self.device)
            return net, training.train_classifier(
                net, part.images, part.labels, recipe, epochs=config["epochs"], seed=self.seed,
                checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        known = self._from_store("classifier", config, net, fit)
        return net, known | {"name": name, "trained_on": self.dataset}

    def _purifier(
        self, classifier: str, seen: Sequence[AttackSettings], *, after: int | None = None,
        images: int | None = None, statistics: str = "running", **override: Any,
    ) -> nn.Module:  # fmt: skip
        check_choice("statistics", statistics, ("running", "batch"))
        if images is not None:
            check_number("images", images, 1, whole=True)
        settings = replace(self.profile.purifier, **override)
        after = settings.epochs if after is None else after
        if not 1 <= after <= settings.epochs:
            raise ValueError(
                f"after={after} is no epoch of a purifier that is trained for {settings.epochs}: "
                f"choose 1 to {settings.epochs}, or raise epochs"
            )
        net = self.classifier(classifier)
        config = {
            "name": f"pix2pix-{classifier}-{self.data.name}",
            **self._lessons(net, seen, pix2pix.VERSION, images),
            "kept": "every epoch",
            "settings": settings.named(),
        }
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
            generator = pix2pix.UNet(self.data.shape[0], settings.width, settings.skips)

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            x, y, labels = self._labelled_pairs(seen, classifier, images)

            def keep(done: int, generator: nn.Module) -> None:
                save_tensors(checkpoint.with_name(_epoch_file(done)), generator.state_dict(), {})

            return pix2pix.train(
                x, y, settings, seed=self.seed, device=self.device,
                guide=pix2pix.guided_by(net, settings.guide) if settings.mu else None,
                labels=labels if settings.mu and settings.guide == "label" else None,
                checkpoint=checkpoint, after_epoch=keep, progress=progress,
            )  # fmt: skip

        known = self._from_store(
            "purifier", config, generator, fit, copies=settings.epochs, epoch=after
        )
        named = settings.named() | ({"after": after} if after < settings.epochs else {})
        named |= {"images": images} if images else {}
        if statistics == "batch":
            generator = pix2pix.with_batch_statistics(generator)
            named["statistics"] = statistics
        names = [attack.name for attack in seen]
        return self._ready(generator, known, "pix2pix", named, names, classifier)

    def _lessons(
        self, net: nn.Module, seen: Sequence[AttackSettings], version: int,
        most: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return what decides a defence that learns from attacks on `net`, but for its settings."""
        there = min(most, len(self.data.train)) if most else 0
        counts = {a.name: there or self.profile.images(a.name, "train") for a in seen}
        return {
            "classifier": self._known[net]["key"],
            "fingerprint": self.data.fingerprint,
            "attacks": [asdict(attack) for attack in seen],
            "images": counts,
            "seed": self.seed,
            "version": [
                version, training.VERSION, self.device.type,
                *(attacks.VERSIONS[a.name] for a in seen),
            ],
        }  # fmt: skip

    def _finetuned(
        self, classifier: str, seen: Sequence[AttackSettings], *, images: int | None = None,
        **override: Any,
    ) -> nn.Module:  # fmt: skip
        """Train on the purifier's pairs, on as many images as it sees."""
        if images is not None:
            check_number("images", images, 1, whole=True)
        usual = {"epochs": max(1, self.profile.purifier.epochs // 2)}
        settings = finetuned.Settings(**{**usual, **override})
        net = self.classifier(classifier)
        recipe = training.recipe_for(_architecture(classifier), self.data.name)
        config = {
            "name": f"finetuned-{classifier}-{self.data.name}",
            **self._lessons(net, seen, finetuned.VERSION, images),
            "recipe": recipe.as_key(),
            "settings": asdict(settings),
        }
        made = finetuned.Finetuned(copy.deepcopy(net))

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            x, y, labels = self._labelled_pairs(seen, classifier, images)
            return finetuned.train(
                net, x, y, labels, recipe, settings, seed=self.seed,
                checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        known = self._from_store("classifier", config, made, fit)
        named = asdict(settings) | ({"images": images} if images else {})
        names = [attack.name for attack in seen]
        return self._ready(made, known, "finetuned", named, names, classifier)

    def _ape_gan(
        self, classifier: str, seen: Sequence[AttackSettings], override: dict[str, Any]
    ) -> nn.Module:
        settings = replace(self.profile.ape_gan, **override)
        config = {
            "name": f"ape_gan-{classifier}-{self.data.name}",
            **self._lessons(self.classifier(classifier), seen, ape_gan.VERSION),
            "parts": pix2pix.VERSION,
            "settings": asdict(settings),
        }
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
            made = ape_gan.ApeGAN(self.data.shape[0], settings.width)

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            return ape_gan.train(
                *self.pairs(seen, classifier=classifier), settings, seed=self.seed,
                device=self.device, checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        known = self._from_store("purifier", config, made, fit)
        names = [attack.name for attack in seen]
        return self._ready(made, known, "ape_gan", asdict(settings), names, classifier)

    def _adversarially_trained(
        self, classifier: str, kind: str, override: dict[str, Any]
    ) -> nn.Module:
        """Train fresh weights like the classifier's, on its images; eps is the paper's.

        Without a ReLU on the logits, also where the classifier has one.
        """
        eps = paper_attacks(self.dataset)[0].settings["eps"]
        settings = replace(self.profile.adversarial, **{"eps": eps, **override, "kind": kind})
        architecture = _architecture(classifier)
        net = classifiers.build(
            architecture, self.data.shape, len(self.data.classes), seed=self.seed
        ).to(self.device)
        recipe = training.recipe_for(architecture, self.data.name)
        part = self._training_images()
        config = {
            "name": f"adversarial-{kind}-{architecture}-{self.data.name}",
            "classifier": architecture,
            "fingerprint": self.data.fingerprint,
            "images": len(part),
            "recipe": recipe.as_key(),
            "settings": asdict(settings),
            "seed": self.seed,
            "version": [
                adversarial_training.VERSION, denoiser.VERSION, classifiers.VERSION,
                training.VERSION, attacks.VERSIONS[kind], self.device.type,
            ],
        }  # fmt: skip

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            return adversarial_training.train(
                net, part.images, part.labels, recipe, settings, seed=self.seed,
                checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        made = adversarial_training.AdversariallyTrained(copy.deepcopy(net))
        known = self._from_store("classifier", config, made, fit)
        name = f"adversarial_{kind}"
        return self._ready(made, known, name, asdict(settings), [kind])

    def _defense_gan(self, override: dict[str, Any]) -> nn.Module:
        """Search among the images of this lab's GAN."""
        settings = replace(self.profile.defense_gan, **override)
        made = defense_gan.DefenseGAN(copy.deepcopy(self.gan()), settings, seed=self.seed)
        return self._ready(made, {}, "defense_gan", asdict(settings), [])

    def _magnet(self, classifier: str, override: dict[str, Any]) -> nn.Module:
        settings = replace(self.profile.magnet, **override)
        part = self._training_images()
        config = {
            "name": f"magnet-{self.data.name}",
            "fingerprint": self.data.fingerprint,
            "images": len(part),
            "settings": settings.of_training(),
            "seed": self.seed,
            "version": [magnet.VERSION, denoiser.VERSION, training.VERSION, self.device.type],
        }
        with torch.random.fork_rng(devices=[]):  # their first weights are overwritten at once
            nets = magnet.autoencoders(self.data.shape[0])

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            return magnet.train(
                part.images, settings, seed=self.seed, device=self.device,
                checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        known = self._from_store("purifier", config, nets, fit)
        made = magnet.MagNet(
            nets.to(self.device), self.data.validation.images, joint=settings.joint,
            false_positives=settings.false_positives,
            classifier=None if self.data.shape[0] == 1 else self.classifier(classifier),
        )  # fmt: skip
        asked = "" if self.data.shape[0] == 1 else classifier
        return self._ready(made, known, "magnet", asdict(settings), [], asked)

    def _ready(
        self, module: nn.Module, known: Mapping[str, Any], name: str, settings: Mapping[str, Any],
        seen: Sequence[str], classifier: str = "",
    ) -> nn.Module:  # fmt: skip
        """Return a defence in eval mode on the device, and keep what its records say of it."""
        about = {
            "name": name, "settings": dict(settings), "attacks": list(seen),
            "classifier": classifier, "dataset": self.data.name,
            "fingerprint": self.data.fingerprint,
        }  # fmt: skip
        self._known[module] = {**known, **about}
        return module.to(self.device).eval()

    def _training_images(self) -> Split:
        """Return the images that classifiers and GANs of this profile are trained on."""
        part = self.data.train
        return part.first(min(len(part), self.profile.classifier_images or len(part)))

    def _washer(self, name: str, settings: dict[str, Any]) -> nn.Module:
        module = WASHERS[name](**settings)
        # A record names the strength where the default was taken, too.
        known = {key: getattr(module, key) for key in signature(WASHERS[name]).parameters}
        self._known[module] = {"name": name, "settings": known, "attacks": []}
        return module

    def _denoiser(self, override: dict[str, Any]) -> nn.Module:
        """Train on as many clean images as a purifier gets of one attack, with its schedule."""
        like = self.profile.purifier
        shared = {key: getattr(like, key) for key in ("width", "epochs", "batch_size", "rate")}
        eps = paper_attacks(self.dataset)[0].settings["eps"]
        settings = denoiser.Settings(**{"size": eps, **shared, **override})
        part = self.data.train.first(min(len(self.data.train), self.profile.sign_train_images))
        config = {
            "name": f"denoiser-{self.data.name}",
            "fingerprint": self.data.fingerprint,
            "images": len(part),
            "settings": asdict(settings),
            "seed": self.seed,
            "version": [denoiser.VERSION, pix2pix.VERSION, training.VERSION, self.device.type],
        }
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
            net = pix2pix.UNet(self.data.shape[0], settings.width)

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            return denoiser.train(
                part.images, settings, seed=self.seed, device=self.device,
                checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        known = self._from_store("purifier", config, net, fit)
        return self._ready(net, known, "denoiser", asdict(settings), [])

    def _generator(self, settings: wgan_gp.Settings) -> wgan_gp.Generator:
        part = self._training_images()
        config = {
            "name": f"wgan_gp-{self.data.name}",
            "fingerprint": self.data.fingerprint,
            "images": len(part),
            "settings": asdict(settings),
            "seed": self.seed,
            "version": [wgan_gp.VERSION, training.VERSION, self.device.type],
        }
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
            generator = wgan_gp.Generator(self.data.shape, settings.latent, settings.width)

        def fit(checkpoint: Path, progress: Any) -> tuple[nn.Module, training.History]:
            return wgan_gp.train(
                part.images, settings, seed=self.seed, device=self.device,
                checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        known = self._from_store("gan", config, generator, fit)
        generator.to(self.device).eval()
        self._known[generator] = known | {"name": "wgan_gp"}
        return generator

    def pairs(
        self, seen: Sequence[AttackSettings], *, classifier: str = "anet"
    ) -> tuple[Tensor, Tensor]:
        """Return the pairs (adversarial, clean) that a purifier is trained on, all attacks pooled.

        The sign family gives a pair for every image; of other attacks, those that succeeded.
        """
        x, y, _ = self._labelled_pairs(seen, classifier)
        return x, y

    def _labelled_pairs(
        self, seen: Sequence[AttackSettings], classifier: str, most: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for attack in seen:
            usual = self.profile.images(attack.name, "train")
            made = self.adversarial_set(
                attack, classifier=classifier, split="train", images=max(usual, most or 0)
            )
            made = made.first(most or len(made))
            keep = (
                torch.ones_like(made.success)
                if attack.name in attacks.SIGN_FAMILY
                else made.success
            )
            parts.append((made.x_adv[keep], made.x[keep], made.y[keep]))
        x, y, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return x, y, labels

    def _from_store(
        self, kind: str, config: Mapping[str, Any], module: nn.Module,
        fit: Callable[[Path, Any], tuple[nn.Module, training.History]],
        *, copies: int = 0, epoch: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Load `module` from the store, training it first where it is not there.

        `copies` is how often `fit` saves the weights beside the final ones, `epoch` the one of
        these copies that is wanted.
        """

        def build(folder: Path) -> None:
            with shown(f"training {config['name']}") as progress:
                trained, history = fit(folder / "checkpoint.safetensors", progress)
            save_tensors(folder / "weights.safetensors", trained.state_dict(), {"history": history})

        # 4 bytes each for weights, Adam's two moments, spare ones while files are renamed.
        size = (20 + 4 * copies) * sum(p.numel() for p in module.parameters())
        with shown(str(config["name"])) as progress:
            folder = self.store.get(kind, config, build, needs_bytes=size, progress=progress)
        tensors, metadata = load_tensors(folder / "weights.safetensors")
        history = metadata["history"]
        if epoch is not None and epoch < len(history):
            tensors, _ = load_tensors(folder / _epoch_file(epoch))
        module.load_state_dict(tensors)
        return {"key": artifact_key(config), "history": history[:epoch]}

    def _committed(self, name: str, relu_logits: bool) -> tuple[nn.Module, dict[str, Any]]:
        path = WEIGHTS / f"{name}.safetensors"
        tensors, made = load_tensors(path)
        if missing := {"classifier", "shape", "classes", "dataset"} - made.keys():
            raise ValueError(
                f"{path} does not say its {', '.join(sorted(missing))}: write it anew with "
                "unfool.lab.commit_weights, or restore it with git"
            )
        if tuple(made["shape"]) != self.data.shape:
            raise ValueError(
                f"{name} takes images of shape {tuple(made['shape'])}, but {self.data.name} has "
                f"{self.data.shape}: choose one of CLASSIFIERS, which is trained here"
            )
        if made["classes"] != len(self.data.classes):
            raise ValueError(
                f"{name} tells {made['classes']} classes apart, but {self.data.name} has "
                f"{len(self.data.classes)}: choose one of CLASSIFIERS, which is trained here"
            )
        net = classifiers.build(made["classifier"], self.data.shape, made["classes"])
        # Committed weights are bfloat16 to be small; they are used in float32.
        try:
            net.load_state_dict(_in_float32(tensors))
        except RuntimeError as error:
            raise ValueError(
                f"{path} holds no weights of {made['classifier']!r} for images {self.data.shape} "
                f"and {made['classes']} classes ({' '.join(str(error).split())[:200]}): write it "
                "anew with unfool.lab.commit_weights, or restore it with git"
            ) from error
        key = f"committed:{name}"
        if relu_logits:
            net, key = nn.Sequential(net, nn.ReLU()), f"{key}+relu"
        return net, made | {"key": key, "name": name, "trained_on": made["dataset"]}

    def _committed_purifier(self, classifier: str, others: Sequence[str]) -> nn.Module:
        """Load a purifier that ships with the course; it is as it is, so nothing can be set."""
        if others:
            raise ValueError(
                f"committed=True takes a purifier as it ships, so {', '.join(others)} can't be "
                "set: leave it out, or leave committed out to train your own"
            )
        if classifier not in committed_purifiers():
            raise ValueError(
                f"no purifier of {classifier!r} ships with the course: choose classifier from "
                f"{', '.join(committed_purifiers()) or 'none'}, or train one without committed=True"
            )
        path = WEIGHTS / f"{PURIFIER}{classifier}.safetensors"
        tensors, made = load_tensors(path)
        again = "write it anew with unfool.lab.commit_purifier, or restore it with git"
        if missing := {"settings", "attacks", "dataset", "fingerprint"} - made.keys():
            raise ValueError(f"{path} does not say its {', '.join(sorted(missing))}: {again}")
        if made["fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"the committed purifier of {classifier!r} has learned from {made['dataset']!r}, "
                f"and this lab holds {self.data.name!r}: take Lab(dataset={made['dataset']!r}), or "
                "train one without committed=True"
            )
        settings = pix2pix.Settings(**made["settings"])
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
            generator = pix2pix.UNet(self.data.shape[0], settings.width, settings.skips)
        try:
            generator.load_state_dict(_in_float32(tensors))
        except RuntimeError as error:
            raise ValueError(
                f"{path} holds no purifier of width {settings.width} "
                f"({' '.join(str(error).split())[:200]}): {again}"
            ) from error
        known = {"key": f"committed:{path.stem}", "history": made.get("history", [])}
        named = settings.named() | {"committed": True}
        return self._ready(generator, known, "pix2pix", named, made["attacks"], classifier)

    def _attack(
        self, net: nn.Module, wanted: AttackSettings, part: Split, folder: Path, progress: Any
    ) -> dict[str, Tensor]:
        """Attack a split in blocks, each saved in `folder`: a run that was killed takes up there.

        The sign family is quick and draws its starts image after image: it runs in one go.
        """
        x, y = part.images, part.labels
        generator = torch.Generator().manual_seed(self.seed)
        settings, made = dict(wanted.settings), {}
        if settings.get("target") == "random":
            made["target"] = random_targets(y, len(self.data.classes), generator)
        block = len(x) if wanted.name in attacks.SIGN_FAMILY else BLOCK
        done: list[Tensor] = []
        for start in range(0, len(x), block):
            rows = slice(start, start + block)
            file = folder / f"checkpoint-{start}.safetensors"
            if made:
                settings["target"] = made["target"][rows].to(self.device)
            if start:  # what a block draws must not depend on whether others were drawn in this run
                generator = torch.Generator().manual_seed(self.seed + start)
            kept = load_checkpoint(file)
            if kept is None:
                x_adv = ATTACKS[wanted.name](
                    net, x[rows].to(self.device), y[rows].to(self.device), generator=generator,
                    progress=_from(start, len(x[rows]), len(x), progress), **settings,
                )  # fmt: skip
                save_tensors(file, {"x_adv": x_adv.cpu()}, {})
                kept = load_tensors(file)
            done.append(kept[0]["x_adv"])
        x_adv = torch.cat(done)
        attacked, read = predict(net, x) == y, predict(net, x_adv)
        hit = read == made["target"] if made else read != y
        return made | {"x_adv": x_adv, "attacked": attacked, "success": attacked & hit}

    def _settings(self, attack: str | AttackSettings, override: dict[str, Any]) -> AttackSettings:
        if isinstance(attack, AttackSettings):
            return replace(attack, settings={**attack.settings, **override})
        papers = {a.name: a.settings for a in paper_attacks(self.dataset)}
        return AttackSettings(attack, {**papers.get(attack, {}), **override})

    def _refuse_seen(self, net: nn.Module, split: str, dataset: str = "") -> None:
        if split == "test":
            check_unseen(self._known[net]["trained_on"], dataset or self.dataset)


def _architecture(classifier: str) -> str:
    """Return the key of `CLASSIFIERS` of "anet+relu", or of weights such as "anet-mnist"."""
    return classifier.removesuffix("+relu").split("-")[0]


def records_path() -> Path:
    """Return where records are appended: `$UNFOOL_RECORDS`, else `results/local/records.jsonl`."""
    own = os.environ.get("UNFOOL_RECORDS")
    return Path(own).expanduser() if own else REPO / "results" / "local" / "records.jsonl"


def commit_purifier(lab: Lab, classifier: str) -> Path:
    """Write a committed classifier's purifier, of the lab's profile, to `results/weights/`.

    As bfloat16; the metadata say what it was made from. `Lab.defense("pix2pix", classifier=...,
    committed=True)` loads it.

    Raises:
        ValueError: the classifier's own weights are not committed, so nobody could use it.
    """
    if classifier not in committed_weights():
        raise ValueError(
            f"the weights of {classifier!r} are not committed: choose from "
            f"{', '.join(committed_weights()) or 'none'}, or commit it first (commit_weights)"
        )
    net = lab.defense("pix2pix", classifier=classifier)
    assert net is not None
    small = _in_bfloat16(net.state_dict())
    known = lab._known[net]
    made = {
        "settings": known["settings"],
        "attacks": known["attacks"],
        "classifier": classifier,
        "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint,
        "profile": lab.profile.name,
        "seed": lab.seed,
        "history": lab.history(net),
        "device": str(lab.device),
        "versions": versions(),
    }
    path = WEIGHTS / f"{PURIFIER}{classifier}.safetensors"
    save_tensors(path, small, made)
    return path


def commit_weights(lab: Lab, classifier: str) -> Path:
    """Write a trained classifier to `results/weights/CLASSIFIER-DATASET.safetensors`, as bfloat16.

    Of a data set that is somebody's folder only its last name is kept. The metadata say what it was
    made from and how well the rounded weights do on the test split.
    """
    net = lab.classifier(classifier)
    small = _in_bfloat16(net.state_dict())
    rounded = classifiers.build(classifier, lab.data.shape, len(lab.data.classes))
    rounded.load_state_dict(_in_float32(small))
    made = {
        "classifier": classifier,
        "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint,
        "shape": lab.data.shape,
        "classes": len(lab.data.classes),
        "profile": lab.profile.name,
        "seed": lab.seed,
        "recipe": training.recipe_for(classifier, lab.data.name).as_key(),
        "test_accuracy": accuracy(rounded, lab.data.test.images, lab.data.test.labels),
        "history": lab.history(net),
        "device": str(lab.device),
        "versions": versions(),
    }
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    short = lab.data.name.removeprefix("folder:").removesuffix(".zip")
    path = WEIGHTS / f"{classifier}-{short}.safetensors"
    save_tensors(path, small, made)
    return path


def _from(start: int, size: int, total: int, progress: Progress) -> Progress:
    """Return what an attack calls on `size` images from `start` on, to tell of all images.

    Attacks that search count searches times images, so it is their share that is passed on.
    """
    return lambda done, of, note: progress(start + size * done // max(1, of), total, note)


def _epoch_file(done: int) -> str:
    """Where a purifier's weights after so many epochs lie, beside the final ones."""
    return f"epoch-{done:03}.safetensors"


def _in_bfloat16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}


def _in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def committed_weights() -> list[str]:
    """Return the names of the classifiers whose weights ship with the course."""
    names = (path.stem for path in WEIGHTS.glob("*.safetensors"))
    return sorted(name for name in names if not name.startswith(PURIFIER))


def committed_purifiers() -> list[str]:
    """Return the names of the classifiers whose purifier ships with the course."""
    found = WEIGHTS.glob(f"{PURIFIER}*.safetensors")
    return sorted(path.stem.removeprefix(PURIFIER) for path in found)


def versions() -> dict[str, str]:
    """Return the versions that a record names."""
    return {"unfool": __version__, "torch": torch.__version__, "python": platform.python_version()}


def git_commit() -> str:
    """Return the checkout's commit, with "+" when files differ from it; empty outside of git."""
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _check_target(wanted: AttackSettings) -> None:
    """Refuse a target that is no plain value: a set is found again by its settings."""
    target = wanted.settings.get("target")
    if target is None or (isinstance(target, str) and target == "random"):
        return
    given = f"a tensor of shape {tuple(target.shape)}" if isinstance(target, Tensor) else target
    raise ValueError(
        f'target of an adversarial set must be "random" or None, not {given!s}: for classes of '
        f"your own call unfool.attacks.{wanted.name}(net, x, y, target=...)"
    )


def _warnings(fields: Mapping[str, Any]) -> list[str]:
    found = []
    if not fields["n_attacked"]:
        found.append("the classifier gets no image right: there was nothing to attack")
    if fields["n_success"] < 30:
        found.append(f"only {fields['n_success']} successful attacks: recovered accuracy is coarse")
    if fields["attack_success"] < 0.5:
        found.append(
            "the attack fools less than half of the images: a weak attack flatters a defence"
        )
    return found
