"""`Lab`: the one object a notebook needs.

It knows the profile, the data set, the seed and the device. Classifiers, adversarial sets and
defences are built when they are first asked for and found in the store from then on; how, says
`unfool.building`. It calls the rooms below it and does no numerics of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unfool import __version__, building, classifiers, threats, training
from unfool.artifacts import REPO, Store
from unfool.attacks import AttackSettings, paper_attacks
from unfool.committed import committed_weights
from unfool.datasets import Dataset, Split, check_unseen, load
from unfool.defenses import DEFENSES, wgan_gp
from unfool.devices import find_device
from unfool.evaluation import (
    AdversarialSet,
    Record,
    accuracy,
    append_record,
    measure,
    read_records,
    read_rows,
)
from unfool.figures import Figure
from unfool.inputs import check_device, check_number
from unfool.profiles import Profile, profile_of
from unfool.progress import shown
from unfool.provenance import git_commit, versions


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
                of committed weights, such as "anet-mnist" (see `unfool.committed`).
            relu_logits: the paper's ReLU on the logits; see `unfool.classifiers`. "anet+relu" is
                the same by name.

        Raises:
            ValueError: neither a classifier nor committed weights of that name.
        """
        wanted = f"{name}+relu" if relu_logits else name
        name = wanted.removesuffix("+relu")
        relu_logits = name != wanted
        if wanted not in self._loaded:
            net, known = building.classifier(self, name, relu_logits)
            self._known[net] = known
            if self.device.type == "cpu":  # with channels last, convolutions take a sixth less time
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._loaded[wanted] = net.to(self.device).eval()
        return self._loaded[wanted]

    def key_of(self, classifier: str) -> str:
        """Return what all that is made from a classifier is found again by."""
        key: str = self._known[self.classifier(classifier)]["key"]
        return key

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
        self._refuse_seen(self.classifier(classifier), split)
        part = self.split(split)
        most = self.profile.images(wanted.name, split) if images is None else images
        check_number("images", most, 1, whole=True)
        part = part.first(min(len(part), most))
        made = building.adversarial(self, wanted, classifier, split, part)
        return AdversarialSet(
            part.images, made["x_adv"], part.labels, made["attacked"], made["success"],
            target=made.get("target"), attack=wanted.name, attack_settings=wanted.settings,
            classifier=classifier,
            dataset=self.data.name, fingerprint=self.data.fingerprint, split=split, seed=self.seed,
            classes=self.data.classes,
        )  # fmt: skip

    def _settings(self, attack: str | AttackSettings, override: dict[str, Any]) -> AttackSettings:
        if isinstance(attack, AttackSettings):
            return replace(attack, settings={**attack.settings, **override})
        papers = {a.name: a.settings for a in paper_attacks(self.dataset)}
        return AttackSettings(attack, {**papers.get(attack, {}), **override})

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
                "bnet-mnist", that ships with the course (see `unfool.committed`).
        """
        if name not in DEFENSES:
            raise ValueError(f"unknown defence {name!r}: choose from {', '.join(DEFENSES)}")
        if name == "none":
            return None
        made, known = building.defense(self, name, classifier, attacks, settings)
        self._known[made] = known
        return made

    def gan(self, **settings: Any) -> wgan_gp.Generator:
        """Return a generator of images like the training images: a WGAN-GP, in eval mode.

        Args:
            settings: override the profile's, e.g. `epochs=2`; see `wgan_gp.Settings`.
        """
        made, known = building.gan(self, replace(self.profile.gan, **settings))
        self._known[made] = known
        return made

    def pairs(
        self, seen: Sequence[AttackSettings], *, classifier: str = "anet"
    ) -> tuple[Tensor, Tensor]:
        """Return the pairs (adversarial, clean) that a purifier is trained on, all attacks pooled.

        The sign family gives a pair for every image; of other attacks, those that succeeded.
        """
        x, y, _ = building.labelled_pairs(self, classifier, seen)
        return x, y

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
            transfer: must be True where the set was made on another classifier (of another seed is
                another) or data set, or the defence trained for one.
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
        trained_here = classifier.removesuffix("+relu") in classifiers.CLASSIFIERS
        if not transfer and trained_here and adversarial.seed != self.seed:
            raise ValueError(
                f"this adversarial set was made with seed {adversarial.seed}, on another "
                f"{classifier!r} than that of seed {self.seed}: pass transfer=True if that is what "
                "you want to measure"
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

    # --- what is refused ---

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

    def _refuse_seen(self, net: nn.Module, split: str, dataset: str = "") -> None:
        if split == "test":
            check_unseen(self._known[net]["trained_on"], dataset or self.dataset)


def records_path() -> Path:
    """Return where records are appended: `$UNFOOL_RECORDS`, else `results/local/records.jsonl`."""
    own = os.environ.get("UNFOOL_RECORDS")
    return Path(own).expanduser() if own else REPO / "results" / "local" / "records.jsonl"


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
