"""A defence, a classifier or a data set of your own through the whole ladder: `unfool evaluate`.

`judge` asks first whether they can be measured at all. Then come the attackers who don't know the
defence, as records; those who know more and more, with every guard (`threats.threat_levels`); and
two controls: the classifier alone, and the washers. `own_page` tells it. Explained in notebook 14.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import shutil
import sys
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unfool import threats
from unfool.artifacts import artifact_key, load_tensors, save_tensors
from unfool.attacks import VERSIONS, AttackSettings, bpda, eot, paper_attacks
from unfool.classifiers import CLASSIFIERS
from unfool.committed import committed_weights
from unfool.defenses import WASHERS
from unfool.evaluation import Record, defended, outputs, predict
from unfool.guards import differing
from unfool.inputs import check_gradient, frozen
from unfool.lab import Lab
from unfool.notebooks import UsageError
from unfool.progress import shown
from unfool.running import sole_user
from unfool.threats import Attackers, Threats, threat_levels

IMAGES = 100
GREY, COLOUR = (0.05, 0.1, 0.15, 0.3), (0.01, 0.03, 0.1, 0.3)
ROUNDING = ("threshold", "bits", "jpeg")  # washers whose gradient is zero or none
TRIED = 4  # images that show what a module is


@dataclass(frozen=True)
class Case:
    """What is judged, ready to be attacked.

    Attributes:
        lab: whose data, device and seed.
        classifier, defense: their names.
        net: the classifier; before: the defence before it, None for none.
        x, y: the first test images, (N, C, H, W), and their classes, on the device.
        eps: sizes of the attacks, growing.
        bpda: "identity", or "" where the defence has a gradient of its own.
        eot: draws that an attacker of a randomised defence averages; None where he takes one.
        copy: a defence like this one that an attacker trained; None where there is none.
    """

    lab: Lab
    classifier: str
    defense: str
    net: nn.Module
    before: nn.Module | None
    x: Tensor
    y: Tensor
    eps: tuple[float, ...]
    bpda: str
    eot: int | None
    copy: nn.Module | None = None

    @property
    def middle(self) -> int:
        """Return the place in `eps` of the size that the verdict is about."""
        return len(self.eps) // 2

    @property
    def random(self) -> bool:
        """Return whether two looks at the same images differ."""
        with threats.seeded(0):
            return differing(defended(self.net, self.before), self.x) > 0

    @property
    def attacked(self) -> nn.Module:
        """Return what the attacker climbs who knows everything."""
        model = defended(self.net, self.before)
        if self.bpda and self.before is not None:
            model = nn.Sequential(bpda(self.before), self.net)
        return model if self.eot is None else eot(model, self.eot, seed=self.lab.seed)


@dataclass(frozen=True)
class Judgement:
    """What became of it.

    Attributes:
        case: what was judged.
        by: what the attackers of the ladder did.
        records: of attackers who don't know the defence: for each attack the classifier alone, the
            washers, and last the defence.
        found: the defence against those who know more and more, with what the guards say.
        alone: the classifier alone against the white box.
        washers: by name, which images stay right behind it at the middle eps, (N,) bool.
    """

    case: Case
    by: Attackers
    records: list[Record]
    found: Threats
    alone: Threats
    washers: dict[str, Tensor]


def judge(
    lab: Lab,
    defense: str | nn.Module,
    classifier: str | nn.Module = "anet",
    *,
    images: int = IMAGES,
    eps: Sequence[float] | None = None,
    bpda: str = "",
    eot: int | None = None,
    surrogate: str | nn.Module | None = None,
    out: Path | None = None,
    path: Path | None = None,
) -> Judgement:
    """Take a defence before a classifier through the whole ladder.

    Args:
        lab: says the data, the profile, the device and the seed.
        defense: a name of `unfool.defenses.DEFENSES`; "my_module:MyPurifier", a module or whatever
            makes one when called; or the module: images -> images in [0, 1], perhaps with
            `rejects(images)`, or a classifier with `replaces_classifier`.
        classifier: the same, images -> logits; by name as `Lab.classifier` knows them.
        images: how many test images are attacked, the first ones.
        eps: sizes of the attacks in L-infinity, growing, above 0 and up to 1; by default `GREY` or
            `COLOUR`.
        bpda: "identity" for a defence without a useful gradient; see `attacks.bpda`.
        eot: draws to average for a randomised defence, at least 1; see `attacks.eot`.
        surrogate: a defence like `defense` that an attacker trained on images of their own, named
            as `defense` is, or the module; without it that level is left out.
        out: folder in which a run that was stopped finds what it had measured; None keeps nothing.
        path: folder where "my_module" lies, by default the current one.

    Raises:
        UsageError: something cannot be measured; one line with the value and the remedy.
    """
    case = prepare(lab, defense, classifier, images, eps, bpda, eot, path, surrogate)
    by = attackers(case)
    if out is None:
        return _measured(case, by, None)
    work = out / f".unfinished-{_key(case, by)}"
    with sole_user(work):
        judged = _measured(case, by, work)
    shutil.rmtree(work, ignore_errors=True)
    return judged


def attackers(case: Case) -> Attackers:
    """Return what each attacker of the ladder does; in the profile smoke, next to nothing."""
    steps, queries = (40, 300) if case.lab.profile.claims_hold else (5, 20)
    targets = min(3, len(case.lab.data.classes) - 1)
    return Attackers(
        transfer=AttackSettings("pgd", {"steps": steps}),
        black_box=AttackSettings("square", {"queries": queries}),
        white_box=AttackSettings("apgd", {"steps": steps, "targets": targets}),
    )


# --- measuring ------------------------------------------------------------------------------------


class _Kept(UserDict[str, Tensor]):
    """What was measured, each written to a folder as it comes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__()
        self.folder = folder
        for file in folder.glob("*.safetensors"):
            self.data[file.stem] = load_tensors(file)[0]["right"]

    def __setitem__(self, key: str, right: Tensor) -> None:
        save_tensors(self.folder / f"{key}.safetensors", {"right": right}, {})
        self.data[key] = right


def _measured(case: Case, by: Attackers, work: Path | None) -> Judgement:
    def ladder(name: str, before: nn.Module | None, climbed: nn.Module, **more: Any) -> Threats:
        memory = None if work is None else _Kept(work / name)
        with shown(f"{name} under attack") as progress:
            return threat_levels(
                case.net, before, case.x, case.y, attacked=climbed, attackers=by,
                seed=case.lab.seed, memory=memory, progress=progress, **more,
            )  # fmt: skip

    found = ladder("defence", case.before, case.attacked, eps=case.eps, surrogate=case.copy)
    control: dict[str, Any] = {"levels": ("white-box",), "guarded": False}
    alone, washers = ladder("none", None, case.net, eps=case.eps, **control), {}
    for name in WASHERS:
        washer = case.lab.defense(name)
        assert washer is not None
        climbed = nn.Sequential(bpda(washer) if name in ROUNDING else washer, case.net)
        there = ladder(name, washer, climbed, eps=[case.eps[case.middle]], **control)
        washers[name] = there.worst[0]
    return Judgement(case, by, _records(case), found, alone, washers)


def _records(case: Case) -> list[Record]:
    """Measure against the course's attacks on the classifier, which don't know the defence."""
    lab, n, made = case.lab, len(case.x), []
    before: dict[str, nn.Module | None] = {"none": None}
    before |= {name: lab.defense(name) for name in WASHERS if name != case.defense}
    before[case.defense] = case.before
    for attack in paper_attacks(lab.dataset):
        adversarial = lab.adversarial_set(attack, classifier=case.classifier, images=n)
        for module in before.values():
            with threats.seeded(lab.seed):
                made.append(
                    lab.evaluate(module, adversarial, classifier=case.classifier, append=False)
                )
    return made


def _key(case: Case, by: Attackers) -> str:
    """Return what the measurements depend on: another defence must not find this one's."""
    modules = [module for module in (case.net, case.before, case.copy) if module is not None]
    config = {
        "name": f"{case.defense}-{case.classifier}",
        "modules": [fingerprint(module, case.x) for module in modules],
        "data": [case.lab.data.fingerprint, len(case.x)],
        "attacks": [list(case.eps), asdict(by), case.bpda, case.eot, VERSIONS],
        "seed": [case.lab.seed, case.lab.device.type],
    }
    return artifact_key(config)


def fingerprint(module: nn.Module, x: Tensor) -> str:
    """Return the sha256 of a module's weights, its answers, their gradients, its source file."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + _bytes(tensor))
    with frozen(module), torch.enable_grad(), threats.seeded(0):
        images = x[:TRIED].detach().clone().requires_grad_(True)
        out = module(images)
        digest.update(_bytes(out))
        if out.requires_grad:
            weights = torch.arange(out.numel(), device=out.device).reshape(out.shape).sin()
            (slope,) = torch.autograd.grad((weights * out).sum(), images, allow_unused=True)
            digest.update(b"" if slope is None else _bytes(slope))
    with threats.seeded(0):
        digest.update(_bytes(outputs(module, x)))
    try:
        source = inspect.getsourcefile(type(module))
    except TypeError:  # of a class in a notebook
        source = None
    if source and Path(source).exists():
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


# --- what is yours --------------------------------------------------------------------------------


def prepare(
    lab: Lab, defense: str | nn.Module, classifier: str | nn.Module, images: int = IMAGES,
    eps: Sequence[float] | None = None, bpda: str = "", eot: int | None = None,
    path: Path | None = None, surrogate: str | nn.Module | None = None,
) -> Case:  # fmt: skip
    """Find what is to be judged and refuse what cannot be measured; see `judge`."""
    with one_line():
        if images < 1:
            raise ValueError(f"images must be 1 or more, not {images}")
        if bpda not in ("", "identity"):
            raise ValueError(f"bpda must be 'identity', or left out, not {bpda!r}")
        sizes = tuple((GREY if lab.data.shape[0] == 1 else COLOUR) if eps is None else eps)
        threats.check_grid(sizes)
        part = lab.data.test.first(min(images, len(lab.data.test)))
        x, y = part.images.to(lab.device), part.labels.to(lab.device)
        name, net = _classifier(lab, classifier, x, y, path)
        title, before = _defense(lab, defense, name, x, path)
        copy = None if surrogate is None else _surrogate(surrogate, title, net, before, x, path)
        case = Case(lab, name, title, net, before, x, y, sizes, bpda, eot, copy)
        _check_climbable(case)
    return case


def _classifier(
    lab: Lab, wanted: str | nn.Module, x: Tensor, y: Tensor, path: Path | None
) -> tuple[str, nn.Module]:
    if isinstance(wanted, str) and ":" not in wanted:
        name, net = wanted, lab.classifier(wanted)
    else:
        name, net = _module(wanted, path)
        net.to(lab.device)
        threats.tried(net, x, name)
        threats.check_classifier(net, x, len(lab.data.classes))
        threats.check_answers(net, outputs(net, x), len(lab.data.classes))
        check_gradient(net, x, "let the classifier be differentiable")
        lab.adopt(net, name, fingerprint(net, x))
    if not bool((predict(net, x) == y.cpu()).any()):
        classes = ", ".join(lab.data.classes[:5])
        raise ValueError(
            f"{name} reads none of {len(x)} images rightly: is it trained, on classes in this "
            f"order ({classes}{', …' if len(lab.data.classes) > 5 else ''}), on pixels in [0, 1]?"
        )
    return name, net


def _defense(
    lab: Lab, wanted: str | nn.Module, classifier: str, x: Tensor, path: Path | None
) -> tuple[str, nn.Module | None]:
    if isinstance(wanted, str) and ":" not in wanted:
        known = {*CLASSIFIERS, *committed_weights()}
        if wanted.startswith(("adversarial_", "finetuned")) and classifier not in known:
            raise ValueError(
                f"{wanted} trains a network of the course's own kinds, and {classifier!r} is none: "
                f"choose a classifier from {', '.join(CLASSIFIERS)}"
            )
        return wanted, lab.defense(wanted, classifier=classifier)
    name, module = _module(wanted, path)
    module.to(lab.device)
    threats.tried(module, x, name)
    threats.check_defense(module, x)
    with threats.seeded(0):
        out = outputs(module, x)
    if getattr(module, "replaces_classifier", False):
        threats.check_classifier(module, x, len(lab.data.classes))
        threats.check_answers(module, out, len(lab.data.classes))
    else:
        threats.check_output(module, x.cpu(), out)
    _check_rejects(name, module, x[:TRIED])
    return name, lab.adopt(module, name)


def _surrogate(
    wanted: str | nn.Module, defense: str, net: nn.Module, before: nn.Module | None, x: Tensor,
    path: Path | None,
) -> nn.Module:  # fmt: skip
    """Return the attacker's copy of a purifier; refuse one of what has nothing to train."""
    if before is None or getattr(before, "replaces_classifier", False):
        raise ValueError(f"a surrogate is a purifier of the attacker's, and {defense} is none")
    if not any(True for _ in before.parameters()):
        raise ValueError(f"no surrogate: {defense} has nothing to train, who knows it has it")
    name, module = _module(wanted, path)
    module.to(x.device)
    threats.tried(module, x, name)
    threats.check_defense(module, x)
    check_gradient(nn.Sequential(module, net), x, "attack through bpda(surrogate)")
    return module


def _check_rejects(name: str, module: nn.Module, some: Tensor) -> None:
    rejects = getattr(module, "rejects", None)
    if rejects is None:
        return
    with torch.no_grad(), frozen(module), threats.seeded(0):
        out = rejects(some)
    if not isinstance(out, Tensor) or out.shape != (len(some),) or out.dtype != torch.bool:
        what = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name}.rejects returns {what} for {len(some)} images: return (N,) torch.bool"
        )


def _check_climbable(case: Case) -> None:
    replaces = getattr(case.before, "replaces_classifier", False)
    if case.bpda and (case.before is None or replaces):
        raise ValueError(f"bpda={case.bpda!r} stands for a purifier, and {case.defense} is none")
    remedy = "BPDA lends it one: --bpda identity (in Python bpda='identity')"
    check_gradient(case.attacked, case.x, remedy)


def _module(wanted: str | nn.Module, path: Path | None) -> tuple[str, nn.Module]:
    """Return a name and a module: given, or imported from "my_module:attribute"."""
    if isinstance(wanted, nn.Module):
        return type(wanted).__name__, wanted
    found = _imported(wanted, (path or Path()).resolve())
    if isinstance(found, nn.Module):
        return wanted, found
    if not callable(found):
        raise ValueError(
            f"{wanted} is a {type(found).__name__}: name an nn.Module, its class, or a function "
            "that makes one"
        )
    try:
        made = found()
    except Exception as error:
        raise ValueError(
            f"{wanted}() failed: {threats.told(error)}; it is called without arguments and must "
            "return an nn.Module"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{wanted}() returned a {type(made).__name__}: return an nn.Module")
    return wanted, made


def _imported(wanted: str, path: Path) -> Any:
    name, _, attribute = wanted.partition(":")
    if not name or not attribute:
        raise ValueError(f"{wanted!r} must read my_module:attribute, or be a name of the course")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))  # it stays: a module may import others when it is called
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise ValueError(f"{name} cannot be imported: {threats.told(error)}") from error
        raise ValueError(
            f"no module {name!r} in {path}: go where {name}.py lies, or give --path"
        ) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be imported: {threats.told(error)}") from error
    if not hasattr(module, attribute):
        own = [n for n in vars(module) if not n.startswith("_")]
        close = get_close_matches(attribute, own, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(own[:8])}"
        raise ValueError(f"{name} has no {attribute!r}; {hint}")
    return getattr(module, attribute)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what is wrong with an input into an error that the command line shows in one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
