"""How good an attack is, how good a defence is, and how sure we are of it.

Three accuracies are kept apart, because the paper reports only the first:

* recovered: of the images that the attack turned from right to wrong, the share that the defended
  classifier gets right. It says nothing of what the defence breaks.
* end to end: over all test images, attacked where the classifier was right, the share that the
  defended classifier gets right.
* defended clean: over all test images, unattacked, the same.

A defence that also refuses images is scored twice. The three above ask what it makes of all images,
refused or not. Where refusing an attacked image counts as success, refusing a clean one counts as
failure: `recovered_or_rejected` and `accepted_clean_accuracy` belong together.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unfool.disk import append, told_if_full

SCHEMA = 1
Kind = TypeVar("Kind")
CPU_CHUNK = 64
DETECTION = ("recovered_or_rejected", "accepted_clean_accuracy", "false_positive_rate")


@dataclass(frozen=True)
class AdversarialSet:
    """Attacked images beside the clean ones they were made from.

    Attributes:
        x, x_adv: (N, C, H, W) float32 in [0, 1].
        y: true classes (N,), int64.
        target: classes that a targeted attack aimed at (N,), or None.
        attacked: (N,) bool: the classifier was right on x, so there was something to attack.
        success: (N,) bool: attacked, and the classifier is wrong on x_adv (on the target, where
            there is one).
        attack, attack_settings, classifier, dataset, fingerprint, split, seed: where it is from.
        classes: what the labels 0, 1, … mean; () where nobody said.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    attacked: Tensor
    success: Tensor
    target: Tensor | None = None
    attack: str = ""
    attack_settings: Mapping[str, Any] = field(default_factory=dict)
    classifier: str = ""
    dataset: str = ""
    fingerprint: str = ""
    split: str = ""
    seed: int = 0
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def first(self, n: int) -> AdversarialSet:
        """Return the first n images, for a defence that is slow; all of them if there are fewer."""
        target = None if self.target is None else self.target[:n]
        return replace(
            self, x=self.x[:n], x_adv=self.x_adv[:n], y=self.y[:n], target=target,
            attacked=self.attacked[:n], success=self.success[:n],
        )  # fmt: skip


@torch.no_grad()
def outputs(
    model: nn.Module, images: Tensor, *, chunk: int | None = None,
    ask: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return `model(images)` on the CPU, computed in eval mode, without gradient, in chunks.

    `images` may lie elsewhere than the model: they are moved chunk by chunk. On a GPU that runs out
    of memory the chunk is halved until it fits. `ask` is a method of the model's to call instead.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _outputs(model, images, chunk, ask or model)
    finally:
        for module, training in modes.items():
            module.training = training


def predict(model: nn.Module, images: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the class with the largest logit, (N,) int64, on the CPU; see `outputs`.

    Raises:
        ValueError: logits of an image are NaN, which no class is the largest of.
    """
    if len(images) == 0:
        return torch.empty(0, dtype=torch.int64)
    logits = outputs(model, images, chunk=chunk)
    if lost := int(logits.isnan().flatten(1).any(dim=1).sum()):
        raise ValueError(
            f"{type(model).__name__} returns NaN for {lost} of {len(images)} images: look for a "
            "division by zero, or for weights that are NaN"
        )
    return logits.argmax(dim=1)


def rejected(defense: nn.Module | None, images: Tensor) -> Tensor:
    """Return which images a defence refuses, (N,) bool: none, unless it has `rejects(images)`."""
    rejects = getattr(defense, "rejects", None)
    if defense is None or rejects is None:
        return torch.zeros(len(images), dtype=torch.bool)
    return outputs(defense, images, ask=rejects)


def _outputs(
    model: nn.Module, images: Tensor, chunk: int | None, ask: Callable[[Tensor], Tensor]
) -> Tensor:
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    chunk = chunk or (CPU_CHUNK if device.type == "cpu" else 4096)
    while True:
        try:
            return torch.cat([ask(part.to(device)).cpu() for part in images.split(chunk)])
        except torch.cuda.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk = (chunk + 1) // 2


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose predicted class is the label, in [0, 1]."""
    if len(images) == 0:
        raise ValueError("accuracy of no images is undefined: the split is empty")
    return int((predict(model, images) == labels.cpu()).sum()) / len(images)


@dataclass
class Passes:
    """How many images went forward and back through a network.

    A gradient is a pass back, and so is a second one of the same output.
    """

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Return both together."""
        return self.forward + self.backward


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    """Count the passes of images through `model` while the block runs.

    An attack's cost, the same on every machine: `with counted(net) as passes: …`, then
    `passes.total`. The model itself must be called, not the layers that it is made of.
    """
    passes = Passes()

    def back(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    def forward(module: nn.Module, inputs: Any, logits: Tensor) -> None:
        passes.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(back)

    hook = model.register_forward_hook(forward)
    try:
        yield passes
    finally:
        hook.remove()


def distortion(x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """Return each image's perturbation size, (N,) each: "l0", "l1" (mean), "l2", "linf".

    l0 counts changed pixels (a pixel of several channels counts once); l1 is the mean absolute
    difference in units of the [0, 1] range, as the paper's Figures 7 and 8 plot it; l2 and linf are
    the usual norms.
    """
    delta = (x_adv - x).abs()
    flat = delta.flatten(1)
    return {
        "l0": (delta > 0).any(dim=1).flatten(1).sum(dim=1),
        "l1": flat.mean(dim=1),
        "l2": flat.norm(dim=1),
        "linf": flat.amax(dim=1),
    }


# --- how sure we are ------------------------------------------------------------------------------


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share of `right` out of `n` (Wilson 1927)."""
    if not 0 <= right <= n:
        raise ValueError(f"a share needs 0 <= right <= n, not {right} of {n}")
    if n == 0:
        return 0.0, 1.0
    z = _z(confidence)
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula is exact, but floating point leaves a hair.
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def mcnemar(right_a: Tensor, right_b: Tensor) -> float:
    """Return the exact two-sided p-value that two classifiers are equally good on the same images.

    Args:
        right_a, right_b: (N,) bool, in the same order: was image i classified rightly?
    """
    from scipy.stats import binomtest

    only_a, only_b = _discordant(right_a, right_b)
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(
    right_a: Tensor, right_b: Tensor, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return accuracy a minus accuracy b on the same images, with its interval (low, high).

    Only images on which the two differ count, so it is much narrower than two separate intervals.
    Bonett and Price 2012: one image is added to each of the two discordant cells.
    """
    only_a, only_b = _discordant(right_a, right_b)
    n = len(right_a)
    if n == 0:
        raise ValueError("a paired difference of no images is undefined")
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = _z(confidence) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (only_a - only_b) / n, max(-1.0, p - q - half), min(1.0, p - q + half)


def mean_of_seeds(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of one value per seed, with Student's interval (low, high).

    For a paired difference give each seed's difference: what the two share cancels out.

    Raises:
        ValueError: fewer than two seeds, whose spread is unknown.
    """
    from scipy.stats import t

    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more, not {len(values)}")
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _discordant(right_a: Tensor, right_b: Tensor) -> tuple[int, int]:
    if right_a.shape != right_b.shape or {right_a.dtype, right_b.dtype} != {torch.bool}:
        raise ValueError(
            "two bool tensors over the same images are compared, not "
            f"{right_a.dtype} {tuple(right_a.shape)} and {right_b.dtype} {tuple(right_b.shape)}"
        )
    return int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())


def _z(confidence: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One evaluation, schema 1: one JSON line. Every accuracy is a share in [0, 1].

    Attributes:
        dataset, fingerprint: of the images, which need not be what the classifier was trained on.
        profile, classifier, seed: what was measured on.
        defense, defense_settings: what stood before the classifier; "none" is nothing.
        trained_for: the classifier whose images, or whose say, the defence was trained with; ""
            where no classifier took part.
        learned_from: the attacks whose images it was trained on.
        saw_attack_in_training: whether this attack is one of them.
        attack, attack_settings: by the attack's own argument names.
        made_on: the classifier that the attack was made on; in records older than the field "".
        knowledge: what the attacker knew: "nothing", "f" (the classifier), "f+design" (and the
            defence's design and data), "everything".
        access: what the attacker could query: "none", "labels", "scores", "gradients".
        n_images: of the split; n_attacked: those that the classifier got right, hence attacked;
            n_success: those that the attack turned wrong (onto the target, where there is one).
        attack_success: n_success of n_attacked.
        l0_median, l2_median, linf_median: perturbation of the successful images; None for none.
            Of an even number it is the smaller of the two in the middle, as torch has it.
        clean_accuracy: of the classifier alone, on clean images.
        recovered_accuracy: over the successes; None where there are none. Intervals are Wilson's.
        end_to_end_accuracy: over all images, attacked where the classifier was right.
        defended_clean_accuracy: over all images, unattacked.
        clean_difference: defended minus undefended on the same clean images; paired interval.
        targeted_outcome: where targeted successes end: "target", "true", "other"; else None.
        rejected: of the n_success, those that a detecting defence refused; 0 if it detects nothing.
        seconds: for the measurement; passes: through the network, None where not counted.
        device, versions, git: what it was measured with; warnings: what a reader must know.
        schema, id: of the format, and of this record (a digest of what is not timing or machine).
        recovered_or_rejected: over the successes: refused, or read rightly; like the next two, None
            for a defence that detects nothing, and in records from before there were such.
        accepted_clean_accuracy: over all images, unattacked: not refused, and read rightly.
        false_positive_rate: over all images, unattacked: refused.
    """

    dataset: str
    fingerprint: str
    profile: str
    classifier: str
    defense: str
    attack: str
    attack_settings: dict[str, Any]
    knowledge: str
    access: str
    seed: int
    n_images: int
    n_attacked: int
    n_success: int
    attack_success: float
    l0_median: float | None
    l2_median: float | None
    linf_median: float | None
    clean_accuracy: float
    recovered_accuracy: float | None
    recovered_low: float
    recovered_high: float
    end_to_end_accuracy: float
    end_to_end_low: float
    end_to_end_high: float
    defended_clean_accuracy: float
    defended_clean_low: float
    defended_clean_high: float
    clean_difference: float
    clean_difference_low: float
    clean_difference_high: float
    targeted_outcome: dict[str, int] | None
    rejected: int
    seconds: float
    passes: int | None
    device: str
    versions: dict[str, str]
    git: str
    warnings: list[str]
    defense_settings: dict[str, Any] = field(default_factory=dict)
    saw_attack_in_training: bool = False
    learned_from: list[str] = field(default_factory=list)
    trained_for: str = ""
    made_on: str = ""
    schema: int = SCHEMA
    id: str = ""
    recovered_or_rejected: float | None = None
    accepted_clean_accuracy: float | None = None
    false_positive_rate: float | None = None


def defended(classifier: nn.Module, defense: nn.Module | None) -> nn.Module:
    """Return the model that answers: images (N, C, H, W) in [0, 1] -> logits.

    A purifier stands before the classifier; a defence that `replaces_classifier` in its place.
    """
    if defense is None:
        return classifier
    if getattr(defense, "replaces_classifier", False):
        return defense
    return nn.Sequential(defense, classifier)


def measure(
    classifier: nn.Module, purifier: nn.Module | None, adversarial: AdversarialSet
) -> dict[str, Any]:
    """Return the measured fields of a `Record` for a defence (None: undefended)."""
    whole_model = defended(classifier, purifier)
    read = _readings(classifier, whole_model, adversarial)
    right = {name: classes == adversarial.y.cpu() for name, classes in read.items()}
    n, success = len(adversarial), adversarial.success.cpu()
    n_success = int(success.sum())
    recovered = int((right["attacked"] & success).sum())
    whole, clean = int(right["attacked"].sum()), int(right["clean"].sum())
    difference = paired_difference(right["clean"], right["undefended"])
    moved = distortion(adversarial.x[success], adversarial.x_adv[success])
    fields = {
        "n_images": n,
        "n_attacked": int(adversarial.attacked.sum()),
        "n_success": n_success,
        "attack_success": n_success / max(1, int(adversarial.attacked.sum())),
        **{f"{k}_median": _median(moved[k]) for k in ("l0", "l2", "linf")},
        "clean_accuracy": int(right["undefended"].sum()) / n,
        "recovered_accuracy": recovered / n_success if n_success else None,
        "end_to_end_accuracy": whole / n,
        "defended_clean_accuracy": clean / n,
        "targeted_outcome": _outcome(read["attacked"], adversarial),
        **_detected(purifier, adversarial, right),
    }
    for name, k, of in [
        ("recovered", recovered, n_success),
        ("end_to_end", whole, n),
        ("defended_clean", clean, n),
    ]:
        fields[f"{name}_low"], fields[f"{name}_high"] = wilson(k, of)
    keys = ("clean_difference", "clean_difference_low", "clean_difference_high")
    return fields | dict(zip(keys, difference, strict=True))


def _detected(
    defense: nn.Module | None, adversarial: AdversarialSet, right: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the fields of a `Record` that count refusing; `right` is of `right_answers`."""
    if not hasattr(defense, "rejects"):
        return {"rejected": 0}
    success = adversarial.success.cpu()
    attacked = rejected(defense, adversarial.x_adv[success])
    clean = rejected(defense, adversarial.x)
    stopped = attacked | right["attacked"][success]
    return {
        "rejected": int(attacked.sum()),
        "recovered_or_rejected": int(stopped.sum()) / len(stopped) if len(stopped) else None,
        "accepted_clean_accuracy": int((right["clean"] & ~clean).sum()) / len(clean),
        "false_positive_rate": int(clean.sum()) / len(clean),
    }


def recovered(
    classifier: nn.Module, purifier: nn.Module | None, adversarial: AdversarialSet
) -> float:
    """Return `recovered_accuracy` alone, a share in [0, 1].

    NaN, with a warning, where the attack fooled nothing: 0 would read as a defence that fails, and
    an error would stop a notebook in the profile `smoke`, where that is no fault.
    """
    right = _recovers(classifier, purifier, adversarial)
    return float(right.float().mean()) if len(right) else _nothing_fooled(adversarial)


def margin(
    classifier: nn.Module,
    purifier: nn.Module,
    rivals: Mapping[str, nn.Module],
    adversarial: AdversarialSet,
) -> tuple[str, float, float, float]:
    """Return the best rival's name and what the purifier recovers beyond it, with its interval.

    The difference is paired: see `paired_difference`. The best is the one that recovers most of
    the very images that are compared, which favours the rivals.

    Raises:
        ValueError: no rivals, or no image that the attack turned wrong.
    """
    if not rivals:
        raise ValueError("rivals is empty: name at least one to compare with")
    if not adversarial.success.any():
        raise ValueError("the attack turned no image wrong: there is nothing to recover")
    theirs = {name: _recovers(classifier, rival, adversarial) for name, rival in rivals.items()}
    best = max(theirs, key=lambda name: int(theirs[name].sum()))
    ours = _recovers(classifier, purifier, adversarial)
    return best, *paired_difference(ours, theirs[best])


def _recovers(
    classifier: nn.Module, purifier: nn.Module | None, adversarial: AdversarialSet
) -> Tensor:
    """Return which of the images that the attack turned wrong are read rightly again, (n,) bool."""
    fooled = adversarial.success.cpu()
    if not fooled.any():
        return fooled[:0]
    read = predict(defended(classifier, purifier), adversarial.x_adv[fooled])
    return read == adversarial.y[fooled].cpu()


MEASURES = {  # an accuracy and the number of images that it is over
    "recovered": ("recovered_accuracy", "n_success"),
    "end_to_end": ("end_to_end_accuracy", "n_images"),
    "clean": ("clean_accuracy", "n_images"),
}


def reproduced(
    records: Sequence[Record], printed: float, margin: float = 0.01, *, measure: str = "recovered"
) -> tuple[str, float, float, float]:
    """Judge whether an accuracy, averaged over seeds, equals a printed one within `margin`.

    Two one-sided tests at 5 % each (Schuirmann 1987), which is to say: the 90 % interval must lie
    inside printed ± margin. Its width joins two sources of chance, the images (Wilson's interval
    for those of one seed, since all seeds see about the same ones) and the seeds (Student's).

    Args:
        records: one per seed, otherwise alike.
        printed: the share in [0, 1] that was published.
        margin: what counts as equal, a share.
        measure: which accuracy, a key of `MEASURES`.

    Returns:
        "reproduced" if the interval lies inside, "differs" if it lies outside, "undecided" if it
        has a foot in both; the mean; the interval's ends.

    Raises:
        ValueError: an unknown measure; no record, or one without a success; or they differ in more
            than the seed.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}: choose from {', '.join(MEASURES)}")
    accuracy, count = MEASURES[measure]
    measured = [getattr(r, accuracy) for r in records]
    shares: list[float] = [share for share in measured if share is not None]
    same = ("dataset", "classifier", "profile", "attack", "attack_settings", "defense",
            "defense_settings", "made_on", "trained_for", "learned_from")  # fmt: skip
    kinds = {json.dumps([getattr(r, name) for name in same], sort_keys=True) for r in records}
    if not records or len(shares) < len(records) or len(kinds) > 1:
        raise ValueError(
            f"{len(records)} records of {len(kinds)} kinds, {len(records) - len(shares)} of them "
            "without a success: give one per seed, of one attack on one defence"
        )
    if len({r.seed for r in records}) < len(records):
        raise ValueError(f"seeds {[r.seed for r in records]}: give one record per seed")
    mean, n = statistics.fmean(shares), min(getattr(r, count) for r in records)
    low, high = wilson(round(mean * n), n, confidence=0.9)
    seeds = 0.0
    if len(shares) > 1:
        seeds = mean - mean_of_seeds(shares, confidence=0.9)[1]
    low = max(0.0, mean - math.hypot(mean - low, seeds))
    high = min(1.0, mean + math.hypot(high - mean, seeds))
    outside = high < printed - margin or low > printed + margin
    inside = printed - margin <= low and high <= printed + margin
    return "reproduced" if inside else "differs" if outside else "undecided", mean, low, high


def drift(purifier: nn.Module, adversarial: AdversarialSet) -> float:
    """Return how far purified images are from the clean ones: mean L1 per pixel, in [0, 1].

    Over the images that were attacked with success; the "defense loss" of the paper's Figure 7.
    NaN, with a warning, where there are none: see `recovered`.
    """
    fooled = adversarial.success.cpu()
    if not fooled.any():
        return _nothing_fooled(adversarial)
    purified = outputs(purifier, adversarial.x_adv[fooled])
    return float((purified - adversarial.x[fooled].cpu()).abs().mean())


def _nothing_fooled(adversarial: AdversarialSet) -> float:
    warnings.warn(
        f"{adversarial.attack or 'the attack'} fooled none of {int(adversarial.attacked.sum())} "
        "attacked images, so what is measured over fooled ones is NaN: make it stronger, or attack "
        "more images",
        stacklevel=3,
    )
    return math.nan


def right_answers(
    classifier: nn.Module, defended: nn.Module, adversarial: AdversarialSet
) -> dict[str, Tensor]:
    """Return which images are classified rightly, (N,) bool each.

    "undefended": clean, by the classifier alone; "clean": clean, by the defended one; "attacked":
    by the defended one, on x_adv where the classifier was right on x, else on x, where nobody
    would attack.
    """
    read = _readings(classifier, defended, adversarial)
    return {name: classes == adversarial.y.cpu() for name, classes in read.items()}


def _readings(
    classifier: nn.Module, defended: nn.Module, adversarial: AdversarialSet
) -> dict[str, Tensor]:
    """Return the classes that `right_answers` compares with the true ones, (N,) int64 each."""
    met = torch.where(adversarial.attacked.view(-1, 1, 1, 1), adversarial.x_adv, adversarial.x)
    return {
        "undefended": predict(classifier, adversarial.x),
        "clean": predict(defended, adversarial.x),
        "attacked": predict(defended, met),
    }


def append_record(record: Record, path: Path) -> Record:
    """Append the record as one line, under a lock; return it with its id filled in."""
    import hashlib

    body = asdict(record) | {"id": ""}
    stable = {k: v for k, v in body.items() if k not in ("seconds", "git", "versions", "device")}
    for name in DETECTION:  # what detects nothing keeps the id that it had before these were there
        if stable[name] is None:
            del stable[name]
    body["id"] = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:12]
    append_rows([body], path)
    return Record(**body)


def append_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Append each row as one JSON line, all of them under one lock.

    Raises:
        DiskFullError: no room; the file is as it was.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    with told_if_full(path.parent, "then run this again"), FileLock(f"{path}.lock"):
        append(path, lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines that are no records, one dict per line.

    Raises:
        ValueError: a line is no JSON object; the message names the file and the line.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no JSON object, delete it: {error}"
            ) from error
    return rows


def rows_about(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file that say all of `about`; none where there is no file yet.

    What measures goes on by it where it was stopped.
    """
    there = read_rows(path) if path.exists() else []
    return [row for row in there if all(row.get(key) == value for key, value in about.items())]


def read_records(path: Path) -> list[Record]:
    """Read a file of records.

    Raises:
        ValueError: a line is no record of schema 1; the message names the file and the line.
    """
    records, problems = read_sound_records(path)
    if problems:
        raise ValueError(problems[0])
    return records


def read_sound_records(path: Path) -> tuple[list[Record], list[str]]:
    """Read the records of a file, and for each line that is none what is wrong with it."""
    return _sound(path, Record)


def read_sound_fields(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """As `read_sound_records`, each a dict: a table needs no more than what it shows."""
    return _sound(path, dict)


def _sound(path: Path, make: Callable[..., Kind]) -> tuple[list[Kind], list[str]]:
    records, problems = [], []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            fields = json.loads(line)
            if fields["schema"] != SCHEMA:
                raise ValueError(f"schema {fields['schema']}, not {SCHEMA}")
            records.append(make(**fields))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}, line {number} is no record of schema 1: {error}")
    return records, problems


def by_change(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records grouped by how their defence's settings differ from the first one's.

    The names are such as "skips=False"; the first group, without a difference, is "unchanged".
    """
    groups: dict[str, list[Record]] = {}
    usual = records[0].defense_settings if records else {}
    for record in records:
        name = changes(record.defense_settings, usual) or "unchanged"
        groups.setdefault(name, []).append(record)
    return groups


def changes(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Return how settings differ from the usual ones, such as "mu=1, skips=False", or "".

    What only the usual ones name, such as the epoch of a purifier's copy, is "without after".
    """
    named = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in settings.items()
        if value != usual.get(key)
    ]
    return ", ".join([*named, *(f"without {key}" for key in usual if key not in settings)])


def _median(values: Tensor) -> float | None:
    return float(values.float().median()) if len(values) else None


def _outcome(attacked: Tensor, adversarial: AdversarialSet) -> dict[str, int] | None:
    """Where targeted successes end behind the defence: on the target, on the truth, elsewhere.

    `attacked` is what the defended classifier reads, of `_readings`.
    """
    if adversarial.target is None:
        return None
    hit = adversarial.success.cpu()
    got = attacked[hit]
    on_target = int((got == adversarial.target[hit].cpu()).sum())
    on_true = int((got == adversarial.y[hit].cpu()).sum())
    return {"target": on_target, "true": on_true, "other": int(hit.sum()) - on_target - on_true}
