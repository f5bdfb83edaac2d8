"""What a defence is worth against attackers who know more and more of it.

A threat model says what the attacker knows, what he may ask, and how far he may move a pixel.
`threat_levels` measures one defence against five of them on the same images, and asks every guard
of `guards` whether the strongest was as strong as he could be: what a failed attack leaves right is
only an upper bound of the accuracy. Explained in notebooks 11 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from unfool import guards
from unfool.attacks import ATTACKS, AttackSettings
from unfool.attacks._draws import generators, seeds_for, uniform
from unfool.attacks.adaptive import Eot
from unfool.attacks.sign import check_eps
from unfool.evaluation import defended, predict
from unfool.inputs import (
    check_device,
    check_gradient,
    check_inputs,
    check_number,
    frozen,
)
from unfool.progress import Progress

LEVELS = {
    "noise": ("nothing", "none"),
    "transfer": ("f", "gradients"),
    "surrogate": ("f+design", "gradients"),
    "black-box": ("nothing", "scores"),
    "white-box": ("everything", "gradients"),
}
"""What each attacker knows and may ask, in the words of `evaluation.Record`."""

WATCHED = 8  # images that are attacked one by one, for the guards that watch
TRIED = 4  # images that show what a module is
PLANTED = 16  # images of the binarisation test
BPDA = "pass attacked=nn.Sequential(bpda(defense), classifier), see unfool.attacks.bpda"


@dataclass(frozen=True)
class Threats:
    """A defence against each attacker.

    Attributes:
        eps: the sizes, E of them, in units of the [0, 1] range.
        clean: images that are right unattacked, (N,) bool.
        right: by level, images that are right unattacked and attacked, (E, N) bool.
        warnings: what the guards say.
    """

    eps: tuple[float, ...]
    clean: Tensor
    right: dict[str, Tensor]
    warnings: tuple[str, ...]

    @property
    def worst(self) -> Tensor:
        """Return which images are right under every attacker, (E, N) bool."""
        return torch.stack(list(self.right.values())).all(dim=0)

    def table(self) -> list[dict[str, Any]]:
        """Return a row per level and eps: level, knowledge, access, eps, n, accuracy in [0, 1]."""
        rows = [(name, *LEVELS[name], right) for name, right in self.right.items()]
        rows.append(("worst of all", "", "", self.worst))
        return [
            {
                "level": name, "knowledge": knowledge, "access": access, "eps": eps,
                "n": len(self.clean), "accuracy": float(right[i].float().mean()),
            }
            for name, knowledge, access, right in rows
            for i, eps in enumerate(self.eps)
        ]  # fmt: skip


@dataclass(frozen=True)
class Attackers:
    """What each attacker does, all settings but eps; see `threat_levels`.

    Attributes:
        draws: random corners that "noise" tries, at least 1.
        transfer: of "transfer" and "surrogate", on a model of theirs.
        black_box: an attack that asks for scores only.
        white_box: an attack with a setting `steps`, which a guard doubles.
    """

    draws: int = 10
    transfer: AttackSettings = field(default_factory=lambda: AttackSettings("pgd"))
    black_box: AttackSettings = field(
        default_factory=lambda: AttackSettings("square", {"queries": 1000})
    )
    white_box: AttackSettings = field(
        default_factory=lambda: AttackSettings("apgd", {"steps": 40, "targets": 3})
    )

    def __post_init__(self) -> None:
        check_number("draws", self.draws, 1, whole=True)
        if "steps" not in self.white_box.settings:
            raise ValueError(
                f"white_box {self.white_box.name} has no steps among its settings: a guard doubles "
                "them, so say how many"
            )


def threat_levels(
    classifier: nn.Module,
    defense: nn.Module | None,
    x: Tensor,
    y: Tensor,
    *,
    eps: Sequence[float] = (0.05, 0.1, 0.15, 0.3),
    surrogate: nn.Module | None = None,
    attacked: nn.Module | Sequence[nn.Module] = (),
    attackers: Attackers | None = None,
    levels: Collection[str] = tuple(LEVELS),
    guarded: bool = True,
    seed: int = 0,
    memory: MutableMapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Threats:
    """Measure a defence against attackers of growing knowledge, in L-infinity, on the same images.

    "noise" knows nothing: the worst of some random corners of the ball. "transfer" attacks the
    classifier alone, "surrogate" the classifier behind a defence that he trained himself,
    "black-box" asks the defended classifier for scores, "white-box" climbs its gradient. An image
    that is wrong unattacked is wrong at every level. Explained in notebook 11.

    Args:
        classifier: images (N, C, H, W) in [0, 1] -> logits.
        defense: images -> images before it, or a model in its place; None: the classifier alone.
        x: images (N, C, H, W), float32 in [0, 1]; y: true classes (N,), int64.
        eps: sizes of the ball, growing, above 0 and up to 1.
        surrogate: a defence like `defense`; without it its level is left out.
        attacked: what the white-box attacker climbs in place of the defended classifier, where that
            has no good gradient: `nn.Sequential(bpda(defense), classifier)`, `eot(...)`. Of several
            an image must withstand all; the guards look at the first.
        attackers: their attacks; by default PGD, Square with 1,000 queries and a quick APGD.
        levels: which of `LEVELS` to measure; guards need "white-box".
        guarded: whether to ask the guards, which takes about as long again as the white box. Of a
            randomised defence not all can be asked, and they allow for chance.
        seed: of all attacks, and of a randomised defence. The global random state stays as it was.
        memory: what was measured is put here and not measured again, so that a run which was
            stopped goes on where it was. Give each defence and each setting a memory of its own.
        progress: called as `progress(attacks done, all, level)`.

    Raises:
        TypeError, ValueError: an input is not as above; the defence is not fit to be measured, see
            `check_defense`; no gradient reaches the images, and the message names the module.
    """
    check_inputs(x, y)
    check_grid(eps)
    _check_levels(levels, guarded)
    for name, module in (
        ("the classifier", classifier), ("the defence", defense), ("the surrogate", surrogate)
    ):  # fmt: skip
        if module is not None:
            check_device(module, x, name)
    if defense is not None:
        check_defense(defense, x)
    whole = defended(classifier, defense)
    climbed = [attacked] if isinstance(attacked, nn.Module) else list(attacked) or [whole]
    for model in climbed:
        check_gradient(model, x, BPDA)
    trial = _Trial(whole, x, y, tuple(eps), attackers or Attackers(), seed, progress, memory)
    near = [] if surrogate is None else [defended(classifier, surrogate)]
    victims = {
        "noise": [whole], "transfer": [classifier], "surrogate": near, "black-box": [whole],
        "white-box": climbed,
    }  # fmt: skip
    with seeded(seed):
        return trial.run({name: victims[name] for name in LEVELS if name in levels}, guarded)


def k50(points: Mapping[int, float], *, floor: float = 0.0) -> float | None:
    """Return how many images halve the accuracy that an attacker without any leaves.

    Between two measured numbers the accuracy is taken to be linear in log(1 + n).

    Args:
        points: the accuracy that an attacker with n images leaves, by n; n = 0 must be there.
        floor: ask for half-way from n = 0 down to this accuracy instead, such as what the attacker
            with the weights leaves: a defence that holds out against him has no other K50.

    Returns:
        The smallest such n, 0 or more; None where no measured accuracy is as low.

    Raises:
        ValueError: there is no accuracy at n = 0.
    """
    if 0 not in points:
        raise ValueError(f"k50 halves the accuracy at n = 0, and {sorted(points)} lack it: add it")
    half = (points[0] + floor) / 2
    for a, b in pairwise(sorted(points)):
        if points[b] <= half:
            share = (points[a] - half) / (points[a] - points[b]) if points[a] > half else 0.0
            return math.expm1(math.log1p(a) + share * (math.log1p(b) - math.log1p(a)))
    return None


@dataclass
class _Trial:
    whole: nn.Module
    x: Tensor
    y: Tensor
    eps: tuple[float, ...]
    by: Attackers
    seed: int
    progress: Progress | None
    memory: MutableMapping[str, Tensor] | None
    done: int = 0

    def run(self, victims: dict[str, list[nn.Module]], guarded: bool) -> Threats:
        self.total = len(self.eps) * sum(len(models) for models in victims.values())
        clean, right = predict(self.whole, self.x) == self.y.cpu(), {}
        for level, models in victims.items():
            if models:
                each = [clean & self._withstands(level, models, eps) for eps in self.eps]
                right[level] = torch.stack(each)
        if not guarded:
            return Threats(self.eps, clean, right, ())
        if self.progress is not None:
            self.progress(self.total, self.total, "guards")
        warnings = self._warnings(victims["white-box"], clean, right)
        return Threats(self.eps, clean, right, tuple(warnings))

    def _warnings(
        self, climbed: list[nn.Module], clean: Tensor, right: dict[str, Tensor]
    ) -> Iterator[str]:
        yield from (said for said in self._all_guards(climbed, clean, right) if said)

    def _all_guards(
        self, climbed: list[nn.Module], clean: Tensor, right: dict[str, Tensor]
    ) -> Iterator[str | None]:
        """Yield what each guard says; the costly ones look at the first model that was climbed."""
        best, model = right["white-box"], climbed[0]
        random = guards.differing(self.whole, self.x) > 0
        slack = guards.chance(len(self.x)) if random else guards.POINTS
        yield guards.weaker_attacker_wins(right, self.eps, slack=slack)
        yield guards.more_succeeds_less(list(best), self.eps, slack=slack)
        yield guards.zero_gradients(model, self.x, self.y)
        yield guards.random_without_eot(model, self.x)
        if not clean.any():
            yield "no image is right unattacked: there was nothing to attack"
            return
        # Where about half of the images fall there is most to win and to lose.
        half = (best.float().mean(dim=1) - clean.float().mean() / 2).abs()
        middle, steps = int(half.argmin()), int(self.by.white_box.settings["steps"])
        more = clean & self._withstands("white-box", climbed, self.eps[middle], steps=2 * steps)
        yield guards.steps_still_gain(best[middle], more, steps, slack)
        yield guards.more_succeeds_less([best[middle], more], [steps, 2 * steps], "steps", slack)
        left = self._withstands("white-box", climbed, 1.0)[clean]
        yield guards.unbounded_fails(left, slack if random else 0.0)
        if not random:  # these need the same answer twice
            yield guards.batch_matters(self.whole, self.x)
            yield from self._watching_guards(model, clean, best[middle], self.eps[middle])

    def _watching_guards(
        self, model: nn.Module, clean: Tensor, right: Tensor, eps: float
    ) -> Iterator[str | None]:
        attack = self._attack(self.by.white_box, eps)
        if model is not self.whole:
            x_adv = attack(model, self.x, self.y)
            fools = [predict(m, x_adv) != self.y.cpu() for m in (model, self.whole)]
            yield guards.does_not_carry_over(clean & fools[0], fools[1])
        hard = right.nonzero().flatten()[:WATCHED].to(self.x.device)
        watched = guards.watch(model, attack, self.x[hard], self.y[hard])
        yield guards.silent_success(watched)
        yield guards.still_climbing(watched)
        some = clean.nonzero().flatten()[:PLANTED].to(self.x.device)
        found = guards.binarise(model, attack, self.x[some], eps=eps, seed=self.seed)
        yield guards.planted_is_missed(found)

    def _withstands(self, level: str, models: list[nn.Module], eps: float, **more: Any) -> Tensor:
        """Return which images the whole model gets right, attacked on each of the models.

        A randomised defence draws the same whether or not others were measured in this run, and so
        does an `eot` with a seed of its own.
        """
        key = "-".join([level, f"{eps:g}", *(f"{k}={v}" for k, v in more.items())])
        if self.memory is not None and key in self.memory:
            self._tell(level, len(models))
            return self.memory[key]
        for part in nn.ModuleList(models).modules():
            if isinstance(part, Eot):
                part.restart()
        with seeded(self.seed):
            noise = level == "noise"
            right = self._noise(eps) if noise else self._attacked(level, models, eps, **more)
        if self.memory is not None:
            self.memory[key] = right
        return right

    def _attacked(self, level: str, models: list[nn.Module], eps: float, **more: Any) -> Tensor:
        kinds = {"black-box": self.by.black_box, "white-box": self.by.white_box}
        attack = self._attack(kinds.get(level, self.by.transfer), eps, **more)
        right = torch.ones(len(self.x), dtype=torch.bool)
        for model in models:
            x_adv = attack(model, self.x, self.y)
            right &= predict(self.whole, x_adv) == self.y.cpu()
            self._tell(level)
        return right

    def _attack(self, wanted: AttackSettings, eps: float, **more: Any) -> guards.Attack:
        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            generator = Generator().manual_seed(self.seed)
            settings = {**wanted.settings, "eps": eps, **more}
            return ATTACKS[wanted.name](model, x, y, generator=generator, **settings)

        return attack

    def _noise(self, eps: float) -> Tensor:
        """Return which images are right at each of some random corners of the ball, (N,) bool."""
        own = generators(seeds_for(self.x, Generator().manual_seed(self.seed)))
        right = torch.ones(len(self.x), dtype=torch.bool)
        for _ in range(self.by.draws):
            moved = self.x + eps * uniform(own, tuple(self.x.shape[1:]), self.x).sign()
            right &= predict(self.whole, moved.clamp(0, 1)) == self.y.cpu()
        self._tell("noise")
        return right

    def _tell(self, level: str, attacks: int = 1) -> None:
        self.done += attacks
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, level)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what a randomised defence draws from, and put the global random state back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


# --- bad input ------------------------------------------------------------------------------------


def check_grid(eps: Sequence[float]) -> None:
    """Refuse sizes that do not grow, or do not lie above 0 and up to 1."""
    if not len(eps):
        raise ValueError("eps is empty: give at least one size, such as [0.05, 0.1, 0.15]")
    for size in eps:
        check_eps(size)
    if eps[0] == 0:
        raise ValueError("eps starts with 0, which attacks nothing: leave it out")
    if any(b <= a for a, b in pairwise(eps)):
        raise ValueError(f"eps must grow, not {list(eps)}: use sorted(set(eps))")


def _check_levels(levels: Collection[str], guarded: bool) -> None:
    unknown = [name for name in levels if name not in LEVELS]
    if unknown or not levels:
        raise ValueError(f"unknown levels {unknown}: choose from {', '.join(LEVELS)}")
    if guarded and "white-box" not in levels:
        raise ValueError('guards look at "white-box": add it to levels, or pass guarded=False')


def check_defense(defense: nn.Module, images: Tensor) -> None:
    """Refuse a defence that cannot be measured fairly; it stays as it was, and so does chance.

    Args:
        defense: images -> images, or with `replaces_classifier` images -> logits.
        images: some to try it on, (N, C, H, W) in [0, 1].

    Raises:
        ValueError: it returns another shape or type, or NaN; it leaves [0, 1]; it holds a state
            from one call to the next; it is in train mode and that makes a difference.
    """
    _check_module(defense, images, lambda out: check_output(defense, images[:4], out))


def check_classifier(classifier: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse a classifier that cannot be attacked fairly; it stays as it was, and so does chance.

    Args:
        classifier: images -> logits.
        images: some to try it on, (N, C, H, W) in [0, 1].
        classes: how many the data have.

    Raises:
        ValueError: it returns no logits of these classes, or NaN, or probabilities; it holds a
            state from one call to the next; it is in train mode and that makes a difference.
    """
    _check_module(classifier, images, lambda out: check_answers(classifier, out, classes))


def check_answers(classifier: nn.Module, out: Tensor, classes: int) -> None:
    """Refuse what a classifier returns, unless it is logits; see `check_classifier`."""
    name = type(classifier).__name__
    if out.ndim != 2 or out.shape[1] != classes:
        raise ValueError(
            f"{name} returns {tuple(out.shape)}, and the data have {classes} classes: return "
            f"logits (N, {classes})"
        )
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{name} returns NaN or infinity: mend its forward() or its weights")
    if bool((out >= 0).all()) and bool(((out.sum(dim=1) - 1).abs() < 1e-4).all()):
        raise ValueError(
            f"{name} returns probabilities (>= 0, sum 1), through which attacks fail: return "
            "logits, without the last Softmax"
        )


def _check_module(module: nn.Module, images: Tensor, check: Callable[[Tensor], None]) -> None:
    """Refuse a module with a state, or in a train mode that matters; `check` sees its output."""
    name, some = type(module).__name__, images[:4]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    try:
        with frozen(module):
            first = _seen(module, some)
            check(first)
            _seen(module, some.flip(0) / 2)
            again = _seen(module, some)
        changed = [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]
        as_given = _seen(module, some)
    finally:
        module.load_state_dict(before)
    moody = _differ(as_given, first)
    training = any(part.training for part in module.modules())
    if changed or _differ(first, again) or (moody and not training):
        what = f"its {changed[0]!r} changed" if changed else "the second answer was another"
        raise ValueError(
            f"{name} holds a state between calls ({what} on the same images with the same random "
            "numbers): let forward() depend on its input and torch's global random state alone"
        )
    if moody:
        raise ValueError(f"{name} is in train mode: call {name}.eval() first")


def tried(module: nn.Module, images: Tensor, name: str = "") -> Tensor:
    """Return what a module makes of the first images; an error of its own is told as such."""
    some = images[:TRIED]
    some = some.to(next(module.parameters(), some).device)
    try:
        with torch.no_grad(), frozen(module), seeded(0):
            out = module(some)
    except Exception as error:
        raise ValueError(
            f"{name or type(module).__name__} fails on images {tuple(some.shape)} in [0, 1]: "
            f"{told(error)}"
        ) from error
    return _one(module, out).cpu()


def told(error: Exception) -> str:
    """Return an error's kind and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def check_output(defense: nn.Module, images: Tensor, out: Tensor) -> None:
    """Refuse what a defence returns for images, unless it is images; see `check_defense`."""
    name = type(defense).__name__
    if getattr(defense, "replaces_classifier", False):
        return  # the attacks check logits
    if out.shape != images.shape or out.dtype != images.dtype:
        raise ValueError(
            f"{name} returns {tuple(out.shape)} {out.dtype} for images {tuple(images.shape)} "
            f"{images.dtype}: a purifier keeps both; set replaces_classifier = True on a classifier"
        )
    if bool(out.isnan().any()):
        raise ValueError(
            f"{name} returns NaN at {int(out.isnan().sum())} pixels: look for a division by zero "
            "or weights that are NaN"
        )
    if not bool(((out >= 0) & (out <= 1)).all()):
        low, high = out.aminmax()
        raise ValueError(f"{name} leaves [0, 1], to [{low:.3g}, {high:.3g}]: end it with clamp")


@torch.no_grad()
def _seen(module: nn.Module, images: Tensor) -> Tensor:
    with seeded(0):
        return _one(module, module(images)).clone()


def _one(module: nn.Module, out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    raise ValueError(f"{type(module).__name__} returns a {type(out).__name__}: return one Tensor")


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.allclose(a, b, atol=1e-5, equal_nan=True)
