"""How a lab makes what it is asked for: classifiers, adversarial sets, a GAN, defences.

Each is kept in the store under a config that names all that it depends on; where it is not there
yet, it is trained first. A module comes with what the lab is to know of it: its settings, its key
and its history, as records name them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from unfool import attacks, classifiers, training
from unfool.artifacts import artifact_key, load_checkpoint, load_tensors, save_tensors
from unfool.attacks import ATTACKS, AttackSettings, paper_attacks, random_targets
from unfool.committed import (
    PURIFIER,
    committed_weights,
    key_of,
    load_classifier,
    load_purifier,
)
from unfool.datasets import Split
from unfool.defenses import (
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
from unfool.evaluation import predict
from unfool.inputs import check_choice, check_number
from unfool.progress import Progress, shown

if TYPE_CHECKING:
    from unfool.lab import Lab

BLOCK = 512  # images that an attack may lose if it is killed

Known = dict[str, Any]
"""What a lab keeps of a module: its "name", "key", "history", "settings" and so on."""

Trained = tuple[nn.Module, training.History]
Module = TypeVar("Module", bound=nn.Module)


# --- classifiers ----------------------------------------------------------------------------------


def classifier(lab: Lab, name: str, relu_logits: bool) -> tuple[nn.Module, Known]:
    """Return a classifier by its name or that of committed weights; see `Lab.classifier`."""
    if name in classifiers.CLASSIFIERS:
        return _trained(lab, name, relu_logits)
    if name not in committed_weights():
        raise classifiers.unknown(name, [*classifiers.CLASSIFIERS, *committed_weights()])
    net, made = load_classifier(name, lab.data)
    known = made | {"key": key_of(name), "name": name, "trained_on": made["dataset"]}
    if relu_logits:
        return nn.Sequential(net, nn.ReLU()), known | {"key": f"{known['key']}+relu"}
    return net, known


def _trained(lab: Lab, name: str, relu_logits: bool) -> tuple[nn.Module, Known]:
    data, part = lab.data, _training_images(lab)
    net = classifiers.build(
        name, data.shape, len(data.classes), seed=lab.seed, relu_logits=relu_logits
    )
    recipe = training.recipe_for(name, data.name)
    epochs = lab.profile.classifier_epochs * recipe.longer
    config = _config(
        lab, f"{name}-relu" if relu_logits else name, classifiers.VERSION, training.VERSION,
        classifier=name, relu_logits=relu_logits, images=len(part), epochs=epochs,
        recipe=recipe.as_key(),
        dataset=data.name,  # not its path: a folder that was moved is the same
    )  # fmt: skip

    def fit(**run: Any) -> Trained:
        net.to(lab.device)
        return net, training.train_classifier(
            net, part.images, part.labels, recipe, epochs=epochs, **run
        )

    known = _from_store(lab, "classifier", config, net, fit)
    return net, known | {"name": name, "trained_on": lab.dataset}


def _architecture(classifier: str) -> str:
    """Return the key of `CLASSIFIERS` of "anet+relu", or of weights such as "anet-mnist"."""
    return classifier.removesuffix("+relu").split("-")[0]


# --- adversarial sets -----------------------------------------------------------------------------


def adversarial(
    lab: Lab, wanted: AttackSettings, classifier: str, split: str, part: Split
) -> dict[str, Tensor]:
    """Attack images of a split through a classifier.

    Returns:
        "x_adv" (N, C, H, W), "attacked" and "success" (N,), see `evaluation.AdversarialSet`; and
        where the target is "random", the classes drawn: "target" (N,).
    """
    config = {
        "name": f"{wanted.name}-{classifier}-{lab.data.name}-{split}",
        "attack": wanted.name,
        "settings": wanted.settings,
        "classifier": lab.key_of(classifier),
        "fingerprint": lab.data.fingerprint,
        "split": split,
        "images": len(part),
        "seed": lab.seed,
        "version": [attacks.VERSIONS[wanted.name], lab.device.type],
    }

    def build(folder: Path) -> None:
        with shown(f"{wanted.name} on {classifier}, {split}") as progress:
            made = attacked(lab, lab.classifier(classifier), wanted, part, folder, progress)
        save_tensors(folder / "set.safetensors", made, {})

    size = part.images.numel() * 4 * 2
    with shown(str(config["name"])) as progress:
        folder = lab.store.get("adversarial", config, build, needs_bytes=size, progress=progress)
    return load_tensors(folder / "set.safetensors")[0]


def attacked(
    lab: Lab, net: nn.Module, wanted: AttackSettings, part: Split, folder: Path, progress: Progress
) -> dict[str, Tensor]:
    """Attack images in blocks, each saved in `folder`: a run that was killed takes up there.

    The sign family is quick and draws its starts image after image: it runs in one go.
    """
    x, y = part.images, part.labels
    generator = torch.Generator().manual_seed(lab.seed)
    settings, made = dict(wanted.settings), {}
    if settings.get("target") == "random":
        made["target"] = random_targets(y, len(lab.data.classes), generator)
    block = len(x) if wanted.name in attacks.SIGN_FAMILY else BLOCK
    done: list[Tensor] = []
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        file = folder / f"checkpoint-{start}.safetensors"
        if made:
            settings["target"] = made["target"][rows].to(lab.device)
        if start:  # what a block draws must not depend on whether others were drawn in this run
            generator = torch.Generator().manual_seed(lab.seed + start)
        kept = load_checkpoint(file)
        if kept is None:
            x_adv = ATTACKS[wanted.name](
                net, x[rows].to(lab.device), y[rows].to(lab.device), generator=generator,
                progress=_from(start, len(x[rows]), len(x), progress), **settings,
            )  # fmt: skip
            save_tensors(file, {"x_adv": x_adv.cpu()}, {})
            kept = load_tensors(file)
        done.append(kept[0]["x_adv"])
    x_adv = torch.cat(done)
    right, read = predict(net, x) == y, predict(net, x_adv)
    hit = read == made["target"] if made else read != y
    return made | {"x_adv": x_adv, "attacked": right, "success": right & hit}


def _from(start: int, size: int, total: int, progress: Progress) -> Progress:
    """Return what an attack calls on `size` images from `start` on, to tell of all images.

    Attacks that search count searches times images, so it is their share that is passed on.
    """
    return lambda done, of, note: progress(start + size * done // max(1, of), total, note)


def labelled_pairs(
    lab: Lab, classifier: str, seen: Sequence[AttackSettings], most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a defence learns from: (adversarial, clean, true classes), all attacks pooled.

    Args:
        lab, classifier: whose training images are attacked, and through what.
        seen: the attacks. Of the sign family every image counts, of others those that succeeded.
        most: so many images of each attack, instead of the profile's number.
    """
    parts = []
    for attack in seen:
        usual = lab.profile.images(attack.name, "train")
        made = lab.adversarial_set(
            attack, classifier=classifier, split="train", images=max(usual, most or 0)
        )
        made = made.first(most or len(made))
        always = attack.name in attacks.SIGN_FAMILY
        keep = torch.ones_like(made.success) if always else made.success
        parts.append((made.x_adv[keep], made.x[keep], made.y[keep]))
    x, y, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return x, y, labels


# --- what sees no attack --------------------------------------------------------------------------


def gan(lab: Lab, settings: wgan_gp.Settings) -> tuple[wgan_gp.Generator, Known]:
    """Return a generator of images like the training images; see `Lab.gan`."""
    part = _training_images(lab)
    config = _config(
        lab, "wgan_gp", wgan_gp.VERSION, training.VERSION,
        images=len(part), settings=asdict(settings),
    )  # fmt: skip

    def fit(**run: Any) -> Trained:
        return wgan_gp.train(part.images, settings, device=lab.device, **run)

    generator = _blank(wgan_gp.Generator, lab.data.shape, settings.latent, settings.width)
    known = _from_store(lab, "gan", config, generator, fit)
    return generator.to(lab.device).eval(), known | {"name": "wgan_gp"}


def defense(
    lab: Lab, name: str, classifier: str, seen: Sequence[AttackSettings] | None,
    settings: dict[str, Any],
) -> tuple[nn.Module, Known]:  # fmt: skip
    """Return a defence of `DEFENSES`, but for "none"; see `Lab.defense`."""
    if name in WASHERS:
        return _washer(name, settings)
    if name == "denoiser":
        return _denoiser(lab, settings)
    if name == "defense_gan":
        return _defense_gan(lab, settings)
    if name == "magnet":
        return _magnet(lab, classifier, settings)
    if name.startswith("adversarial_"):
        kind = name.removeprefix("adversarial_")
        return _adversarially_trained(lab, classifier, kind, settings)
    if name == "pix2pix" and settings.pop("committed", False):
        return _shipped_purifier(lab, classifier, [*settings, *(["attacks"] if seen else [])])
    seen = tuple(seen) if seen is not None else paper_attacks(lab.dataset)
    if name == "finetuned":
        return _finetuned(lab, classifier, seen, **settings)
    if name == "ape_gan":
        return _ape_gan(lab, classifier, seen, settings)
    return _purifier(lab, classifier, seen, **settings)


def _washer(name: str, settings: dict[str, Any]) -> tuple[nn.Module, Known]:
    module = WASHERS[name](**settings)
    # A record names the strength where the default was taken, too.
    strength = {key: getattr(module, key) for key in signature(WASHERS[name]).parameters}
    return module, {"name": name, "settings": strength, "attacks": []}


def _denoiser(lab: Lab, override: dict[str, Any]) -> tuple[nn.Module, Known]:
    """Train on as many clean images as a purifier gets of one attack, with its schedule."""
    like = lab.profile.purifier
    shared = {key: getattr(like, key) for key in ("width", "epochs", "batch_size", "rate")}
    eps = paper_attacks(lab.dataset)[0].settings["eps"]
    settings = denoiser.Settings(**{"size": eps, **shared, **override})
    part = lab.data.train.first(min(len(lab.data.train), lab.profile.sign_train_images))
    config = _config(
        lab, "denoiser", denoiser.VERSION, pix2pix.VERSION, training.VERSION,
        images=len(part), settings=asdict(settings),
    )  # fmt: skip

    def fit(**run: Any) -> Trained:
        return denoiser.train(part.images, settings, device=lab.device, **run)

    net = _blank(pix2pix.UNet, lab.data.shape[0], settings.width)
    known = _from_store(lab, "purifier", config, net, fit)
    return _ready(lab, net, known, "denoiser", asdict(settings), [])


def _magnet(lab: Lab, classifier: str, override: dict[str, Any]) -> tuple[nn.Module, Known]:
    settings = replace(lab.profile.magnet, **override)
    part = _training_images(lab)
    config = _config(
        lab, "magnet", magnet.VERSION, denoiser.VERSION, training.VERSION,
        images=len(part), settings=settings.of_training(),
    )  # fmt: skip

    def fit(**run: Any) -> Trained:
        return magnet.train(part.images, settings, device=lab.device, **run)

    nets = _blank(magnet.autoencoders, lab.data.shape[0])
    known = _from_store(lab, "purifier", config, nets, fit)
    grey = lab.data.shape[0] == 1
    made = magnet.MagNet(
        nets.to(lab.device), lab.data.validation.images, joint=settings.joint,
        false_positives=settings.false_positives,
        classifier=None if grey else lab.classifier(classifier),
    )  # fmt: skip
    return _ready(lab, made, known, "magnet", asdict(settings), [], "" if grey else classifier)


def _defense_gan(lab: Lab, override: dict[str, Any]) -> tuple[nn.Module, Known]:
    """Search among the images of this lab's GAN."""
    settings = replace(lab.profile.defense_gan, **override)
    made = defense_gan.DefenseGAN(copy.deepcopy(lab.gan()), settings, seed=lab.seed)
    return _ready(lab, made, {}, "defense_gan", asdict(settings), [])


# --- what learns from attacks ---------------------------------------------------------------------


def _adversarially_trained(
    lab: Lab, classifier: str, kind: str, override: dict[str, Any]
) -> tuple[nn.Module, Known]:
    """Train fresh weights like the classifier's, on its images; eps is the paper's.

    Without a ReLU on the logits, also where the classifier has one.
    """
    eps = paper_attacks(lab.dataset)[0].settings["eps"]
    settings = replace(lab.profile.adversarial, **{"eps": eps, **override, "kind": kind})
    name, part = _architecture(classifier), _training_images(lab)
    net = classifiers.build(name, lab.data.shape, len(lab.data.classes), seed=lab.seed)
    net.to(lab.device)
    recipe = training.recipe_for(name, lab.data.name)
    config = _config(
        lab, f"adversarial-{kind}-{name}",
        adversarial_training.VERSION, denoiser.VERSION, classifiers.VERSION, training.VERSION,
        attacks.VERSIONS[kind],
        classifier=name, images=len(part), recipe=recipe.as_key(), settings=asdict(settings),
    )  # fmt: skip

    def fit(**run: Any) -> Trained:
        return adversarial_training.train(net, part.images, part.labels, recipe, settings, **run)

    made = adversarial_training.AdversariallyTrained(copy.deepcopy(net))
    known = _from_store(lab, "classifier", config, made, fit)
    return _ready(lab, made, known, f"adversarial_{kind}", asdict(settings), [kind])


def _finetuned(
    lab: Lab, classifier: str, seen: Sequence[AttackSettings], *, images: int | None = None,
    **override: Any,
) -> tuple[nn.Module, Known]:  # fmt: skip
    """Train on the purifier's pairs, on as many images as it sees."""
    usual = {"epochs": max(1, lab.profile.purifier.epochs // 2)}
    settings = finetuned.Settings(**{**usual, **override})
    recipe = training.recipe_for(_architecture(classifier), lab.data.name)
    config = _config_of_pairs(
        lab, "finetuned", finetuned.VERSION, classifier, seen, images,
        recipe=recipe.as_key(), settings=asdict(settings),
    )  # fmt: skip
    net = lab.classifier(classifier)

    def fit(**run: Any) -> Trained:
        pairs = labelled_pairs(lab, classifier, seen, images)
        return finetuned.train(net, *pairs, recipe, settings, **run)

    made = finetuned.Finetuned(copy.deepcopy(net))
    known = _from_store(lab, "classifier", config, made, fit)
    named = asdict(settings) | ({"images": images} if images else {})
    return _ready(lab, made, known, "finetuned", named, _names(seen), classifier)


def _ape_gan(
    lab: Lab, classifier: str, seen: Sequence[AttackSettings], override: dict[str, Any]
) -> tuple[nn.Module, Known]:
    settings = replace(lab.profile.ape_gan, **override)
    config = _config_of_pairs(
        lab, "ape_gan", ape_gan.VERSION, classifier, seen,
        parts=pix2pix.VERSION, settings=asdict(settings),
    )  # fmt: skip

    def fit(**run: Any) -> Trained:
        pairs = lab.pairs(seen, classifier=classifier)
        return ape_gan.train(*pairs, settings, device=lab.device, **run)

    made = _blank(ape_gan.ApeGAN, lab.data.shape[0], settings.width)
    known = _from_store(lab, "purifier", config, made, fit)
    return _ready(lab, made, known, "ape_gan", asdict(settings), _names(seen), classifier)


def _purifier(
    lab: Lab, classifier: str, seen: Sequence[AttackSettings], *, after: int | None = None,
    images: int | None = None, statistics: str = "running", **override: Any,
) -> tuple[nn.Module, Known]:  # fmt: skip
    """Train the paper's purifier; the weights after each epoch are kept beside the final ones."""
    check_choice("statistics", statistics, ("running", "batch"))
    settings = replace(lab.profile.purifier, **override)
    after = settings.epochs if after is None else after
    if not 1 <= after <= settings.epochs:
        raise ValueError(
            f"after={after} is no epoch of a purifier that is trained for {settings.epochs}: "
            f"choose 1 to {settings.epochs}, or raise epochs"
        )
    config = _config_of_pairs(
        lab, "pix2pix", pix2pix.VERSION, classifier, seen, images,
        kept="every epoch", settings=settings.named(),
    )  # fmt: skip
    net = lab.classifier(classifier)

    def fit(checkpoint: Path, **run: Any) -> Trained:
        x, y, labels = labelled_pairs(lab, classifier, seen, images)

        def keep(done: int, generator: nn.Module) -> None:
            save_tensors(checkpoint.with_name(_epoch_file(done)), generator.state_dict(), {})

        return pix2pix.train(
            x, y, settings, device=lab.device,
            guide=pix2pix.guided_by(net, settings.guide) if settings.mu else None,
            labels=labels if settings.mu and settings.guide == "label" else None,
            checkpoint=checkpoint, after_epoch=keep, **run,
        )  # fmt: skip

    generator = _blank(pix2pix.UNet, lab.data.shape[0], settings.width, settings.skips)
    known = _from_store(
        lab, "purifier", config, generator, fit, copies=settings.epochs, epoch=after
    )
    named = settings.named() | ({"after": after} if after < settings.epochs else {})
    named |= {"images": images} if images else {}
    if statistics == "batch":
        generator = pix2pix.with_batch_statistics(generator)
        named["statistics"] = statistics
    return _ready(lab, generator, known, "pix2pix", named, _names(seen), classifier)


def _shipped_purifier(lab: Lab, classifier: str, others: Sequence[str]) -> tuple[nn.Module, Known]:
    """Load a purifier that ships with the course; it is as it is, so nothing can be set."""
    if others:
        raise ValueError(
            f"committed=True takes a purifier as it ships, so {', '.join(others)} can't be "
            "set: leave it out, or leave committed out to train your own"
        )
    generator, made = load_purifier(classifier, lab.data)
    known = {"key": key_of(f"{PURIFIER}{classifier}"), "history": made.get("history", [])}
    named = pix2pix.Settings(**made["settings"]).named() | {"committed": True}
    return _ready(lab, generator, known, "pix2pix", named, made["attacks"], classifier)


# --- what they share ------------------------------------------------------------------------------


def _config(lab: Lab, name: str, *versions: int, **more: Any) -> dict[str, Any]:
    """Return all that weights depend on: the store's key is a digest of it."""
    return {
        "name": f"{name}-{lab.data.name}",
        "fingerprint": lab.data.fingerprint,
        "seed": lab.seed,
        "version": [*versions, lab.device.type],
        **more,
    }


def _config_of_pairs(
    lab: Lab, name: str, version: int, classifier: str, seen: Sequence[AttackSettings],
    most: int | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the config of what learns from `labelled_pairs`."""
    if most is not None:
        check_number("images", most, 1, whole=True)
    there = min(most, len(lab.data.train)) if most else 0
    config = _config(
        lab, f"{name}-{classifier}", version, training.VERSION,
        classifier=lab.key_of(classifier),
        attacks=[asdict(attack) for attack in seen],
        images={a.name: there or lab.profile.images(a.name, "train") for a in seen},
        **more,
    )  # fmt: skip
    config["version"] += [attacks.VERSIONS[attack.name] for attack in seen]
    return config


def _training_images(lab: Lab) -> Split:
    """Return the images that classifiers and GANs of this profile are trained on."""
    part = lab.data.train
    return part.first(min(len(part), lab.profile.classifier_images or len(part)))


def _names(seen: Sequence[AttackSettings]) -> list[str]:
    return [attack.name for attack in seen]


def _blank(make: Callable[..., Module], *arguments: Any) -> Module:
    """Make a module whose first weights are overwritten at once: the random state stays."""
    with torch.random.fork_rng(devices=[]):
        return make(*arguments)


def _from_store(
    lab: Lab, kind: str, config: Mapping[str, Any], module: nn.Module, fit: Callable[..., Trained],
    *, copies: int = 0, epoch: int | None = None,
) -> Known:  # fmt: skip
    """Load `module` from the store, training it first where it is not there.

    Args:
        lab, kind, config: whose store, and where in it.
        module: where the weights are loaded into.
        fit: trains; called with `seed`, `checkpoint` and `progress`, and only where it must be: to
            find something in the store costs neither an attack nor the conversion of images.
        copies: how often `fit` saves the weights beside the final ones.
        epoch: the one of these copies that is wanted.
    """

    def build(folder: Path) -> None:
        with shown(f"training {config['name']}") as progress:
            checkpoint = folder / "checkpoint.safetensors"
            trained, history = fit(seed=lab.seed, checkpoint=checkpoint, progress=progress)
        save_tensors(folder / "weights.safetensors", trained.state_dict(), {"history": history})

    # 4 bytes each for weights, Adam's two moments, spare ones while files are renamed.
    size = (20 + 4 * copies) * sum(p.numel() for p in module.parameters())
    with shown(str(config["name"])) as progress:
        folder = lab.store.get(kind, config, build, needs_bytes=size, progress=progress)
    tensors, metadata = load_tensors(folder / "weights.safetensors")
    history = metadata["history"]
    if epoch is not None and epoch < len(history):
        tensors, _ = load_tensors(folder / _epoch_file(epoch))
    module.load_state_dict(tensors)
    return {"key": artifact_key(config), "history": history[:epoch]}


def _epoch_file(done: int) -> str:
    """Where a purifier's weights after so many epochs lie, beside the final ones."""
    return f"epoch-{done:03}.safetensors"


def _ready(
    lab: Lab, module: nn.Module, known: Known, name: str, settings: Mapping[str, Any],
    seen: Sequence[str], classifier: str = "",
) -> tuple[nn.Module, Known]:  # fmt: skip
    """Return a defence in eval mode on the device, and with `known` what its records say of it."""
    about = {
        "name": name, "settings": dict(settings), "attacks": list(seen),
        "classifier": classifier, "dataset": lab.data.name,
        "fingerprint": lab.data.fingerprint,
    }  # fmt: skip
    return module.to(lab.device).eval(), {**known, **about}
