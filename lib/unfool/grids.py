"""Grids: a file of axes becomes a list of jobs, checked before anything runs.

A grid is a YAML file of rows; each row names parameters of `notebooks/90_experiment.ipynb`, and one
that holds a list is an axis: every combination is a job. What several jobs need (a classifier, an
attacked set, a trained defence) becomes a job of its own, so that it is made once.

What a plan holds is plain JSON, and reading it imports no torch: every job does so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from heapq import heappop, heappush
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from unfool.notebooks import REPO, UsageError, defaults, find, validate_parameters

if TYPE_CHECKING:
    from unfool.attacks import AttackSettings

GRIDS = REPO / "workflow" / "grids"
UNIT = "90_experiment"
KINDS = ("classifier", "adversarial", "defense", "experiment")
KEYS = ("notebook", "resources", "common", "rows")
RESOURCES = {"threads": 1, "mem_mb": 0, "minutes": 0}  # 0: what the profile needs
MEMORY_MB = {"smoke": 1500, "classroom": 3000, "desk": 6000, "paper": 16000}
LEARN_FROM_ATTACKS = ("pix2pix", "ape_gan", "finetuned")
ONE_VALUE = ("attacks", "learns", "variants")  # lists, but no axes
UNTRAINED = ("after", "statistics")  # settings of pix2pix that take no training of their own
COUNTS = ("images", "epochs", "width")  # settings that decide the expected time
COSTS = Path(__file__).with_name("costs.yaml")


@dataclass(frozen=True)
class Job:
    """One process of a batch.

    Attributes:
        name: readable, and different for different parameters: a file name.
        kind: one of `KINDS`.
        notebook: the stem of the notebook that an experiment runs; "" for what is only built.
        parameters: of the notebook, or of what is built.
        needs: names of jobs that must have ended.
        records: how many records it leaves; -1 where the notebook decides.
        seconds: expected on one core, or on the GPU.
        threads, mem_mb, minutes, gpus: what it asks for.
    """

    name: str
    kind: str
    notebook: str
    parameters: dict[str, Any]
    needs: tuple[str, ...] = ()
    records: int = 0
    seconds: float = 0.0
    threads: int = 1
    mem_mb: int = 0
    minutes: int = 0
    gpus: int = 0


def attack_list(dataset: str, wanted: Sequence[Any]) -> list[AttackSettings]:
    """Return attacks as a grid names them.

    Args:
        dataset: its paper's settings are the defaults.
        wanted: names, or mappings from one name to settings that differ, such as
            ["deepfool", {"fgsm": {"eps": 0.3}}]; ["paper"] is the paper's four.

    Raises:
        UsageError: no attack of that name, or a setting that it does not have.
    """
    from unfool.attacks import paper_attacks

    if not isinstance(wanted, list | tuple) or not wanted:
        raise UsageError(f"attacks must be a list of names, such as [fgsm, jsma], not {wanted!r}")
    if list(wanted) == ["paper"]:
        return list(paper_attacks(dataset))
    return [_attack(dataset, one) for one in wanted]


def lessons(
    dataset: str, attacks: Sequence[Any], learns: Sequence[Any], tested: str
) -> list[AttackSettings]:
    """Return the attacks that a defence learns from which is tested under the attack `tested`.

    Args:
        dataset: see `attack_list`.
        attacks: those that are measured; where `learns` is empty, it learns from them.
        learns: its own list of attacks; ["each"] is a defence for each attack, which learns from
            that one with the paper's settings.
        tested: the name of the attack.
    """
    return attack_list(dataset, _seen({"attacks": attacks, "learns": list(learns)}, tested))


def _attack(dataset: str, wanted: Any) -> AttackSettings:
    from inspect import signature

    from unfool.attacks import ATTACKS, AttackSettings, paper_attacks

    given = wanted if isinstance(wanted, Mapping) else {wanted: {}}
    if len(given) != 1 or not isinstance(next(iter(given.values())), Mapping):
        raise UsageError(f"an attack is a name, or one name: {{setting: value}}; got {wanted!r}")
    name, settings = next(iter(given.items()))
    _known("attack", name, ATTACKS)
    for key in settings:
        _known(f"setting of {name}", key, list(signature(ATTACKS[name]).parameters)[3:])
    papers = {a.name: a.settings for a in paper_attacks(dataset)}
    try:
        return AttackSettings(name, {**papers.get(name, {}), **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"attack {name}: {error}") from error


# ------------------------------------------------------------------------------------ reading


def plan(grid: str | Path) -> list[Job]:
    """Return the jobs of a grid: what is shared first, each experiment after what it needs.

    Args:
        grid: a name in `workflow/grids/`, or a path.

    Raises:
        UsageError: one line about what is wrong with the grid, and what to do.
    """
    path = grid_path(grid)
    content = _content(path)
    try:
        (notebook,) = find([str(content.get("notebook", UNIT))])
        known = defaults(notebook)
        resources = _resources(content.get("resources") or {})
        common = content.get("common") or {}
        rows = [{**common, **row} for row in content["rows"]]
        experiments: dict[str, Job] = {}
        for number, row in enumerate(rows, 1):
            for parameters in _expanded(row, number):
                job = _experiment(notebook, parameters, known)
                if job.name in experiments:
                    raise UsageError(f"row {number} doubles {job.name}: take one of the two away")
                experiments[job.name] = job
    except UsageError as error:
        raise UsageError(f"grid {path.stem}: {error}") from None
    jobs = _with_shared(list(experiments.values())) if notebook.stem == UNIT else experiments
    return [_asking(job, resources) for job in jobs.values()]


def grid_path(grid: str | Path) -> Path:
    """Return the file of a grid, by name or by path.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    for path in (GRIDS / f"{grid}.yaml", Path(grid)):
        if path.is_file():
            return path.resolve()
    there = ", ".join(sorted(p.stem for p in GRIDS.glob("*.yaml")))
    raise UsageError(f"unknown grid '{grid}': there are {there}; or give a path to a YAML file")


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise UsageError(f"grid {path.stem} is not YAML: {said}") from None
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise UsageError(f"grid {path.stem}: needs `rows:`, a list of parameters: value")
    for key in content:
        if key not in KEYS:
            raise UsageError(f"grid {path.stem}: unknown key '{key}': known are {', '.join(KEYS)}")
    return content


def _resources(given: Mapping[str, Any]) -> dict[str, int]:
    for key, value in given.items():
        _known("resource", key, RESOURCES)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"resource {key} must be a whole number from 1 on, not {value!r}")
    return {**RESOURCES, **given}


def _expanded(row: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """All combinations of a row's axes; a list of `ONE_VALUE` is one value, and no axis."""
    settings = row.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise UsageError(f"row {number}: settings must be names: values, not {settings!r}")
    no_axes = (*ONE_VALUE, "settings")
    axes = {key: _values(value) for key, value in row.items() if key not in no_axes}
    inner = {key: _values(value) for key, value in settings.items()}
    for key, values in [*axes.items(), *inner.items()]:
        if not values:
            raise UsageError(f"row {number}: the axis {key} is empty: give it a value, or drop it")
    fixed = {key: row[key] for key in ONE_VALUE if key in row}
    for outer in product(*axes.values()):
        for chosen in product(*inner.values()):
            own = {"settings": dict(zip(inner, chosen, strict=True))} if inner else {}
            yield {**dict(zip(axes, outer, strict=True)), **fixed, **own}


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _known(what: str, name: Any, choices: Any) -> None:
    from difflib import get_close_matches

    if name in choices:
        return
    near = get_close_matches(str(name), list(choices), n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"unknown {what} '{name}'{meant}: choose from {', '.join(choices)}")


# -------------------------------------------------------------------------------------- jobs


def _experiment(notebook: Path, given: Mapping[str, Any], known: Mapping[str, Any]) -> Job:
    """The job of one combination; its parameters are complete and checked."""
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed must be a whole number from 0 on, not {seed!r}")
    own = {**known, **validate_parameters(notebook, given, known)}
    from unfool.profiles import PROFILES

    _known("profile", own.get("profile", "classroom"), PROFILES)
    if notebook.stem != UNIT:
        name = _name(
            f"{notebook.stem[:2]}-s{own.get('seed', 0)}", {"notebook": notebook.stem, **own}
        )
        return Job(name, "experiment", notebook.stem, own, records=-1, seconds=_costs()["lesson"])
    _check(own)
    slug = f"{own['classifier']}-{own['defense']}-{own['dataset']}-s{own['seed']}"
    count = len(attack_list(own["dataset"], own["attacks"])) * len(own["variants"])
    return Job(_name(slug, own), "experiment", notebook.stem, own, records=count)


def _check(own: Mapping[str, Any]) -> None:
    """Refuse names that nothing bears, and settings that the defence does not have."""
    from unfool.classifiers import CLASSIFIERS
    from unfool.committed import committed_weights
    from unfool.datasets import NAMES
    from unfool.defenses import DEFENSES

    if not str(own["dataset"]).startswith("folder:"):
        _known("data set", own["dataset"], NAMES)
    for key in ("classifier", "made_on", "trained_for"):
        if own[key] or key == "classifier":
            plain = str(own[key]).removesuffix("+relu")  # the paper's last layer
            _known(key, plain, [*CLASSIFIERS, *committed_weights()])
    _known("defence", own["defense"], DEFENSES)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", own["device"]):
        raise UsageError(f"unknown device '{own['device']}': choose auto, cpu, cuda or cuda:N")
    for key in own["settings"]:
        _known(f"setting of {own['defense']}", key, settings_of(own["defense"]))
        value = own["settings"][key]
        if key in COUNTS and (not isinstance(value, int) or isinstance(value, bool)):
            raise UsageError(f"setting {key} must be a whole number, not {value!r}")
    _check_variants(own["variants"], settings_of(own["defense"]))
    for tested in attack_list(own["dataset"], own["attacks"]):
        lessons(own["dataset"], own["attacks"], own["learns"], tested.name)


def _check_variants(variants: Any, settings: Sequence[str]) -> None:
    if not variants or not all(isinstance(one, Mapping) for one in variants):
        raise UsageError(
            f"variants must be a list of settings, such as [{{}}, {{statistics: batch}}], not "
            f"{variants!r}"
        )
    for one in variants:
        for key in one:
            _known("variant", key, [name for name in settings if name in UNTRAINED])


def settings_of(defense: str) -> list[str]:
    """Return the names of the settings that `Lab.defense` takes for a defence."""
    from dataclasses import fields
    from inspect import signature

    from unfool.defenses import (
        WASHERS,
        adversarial_training,
        ape_gan,
        defense_gan,
        denoiser,
        finetuned,
        magnet,
        pix2pix,
    )  # fmt: skip

    if defense == "none":
        return []
    if defense in WASHERS:
        return list(signature(WASHERS[defense]).parameters)
    trained: dict[str, Any] = {
        "denoiser": denoiser, "finetuned": finetuned, "magnet": magnet, "ape_gan": ape_gan,
        "defense_gan": defense_gan, "pix2pix": pix2pix,
    }  # fmt: skip
    names = [f.name for f in fields(trained.get(defense, adversarial_training).Settings)]
    own = ("images", *UNTRAINED) if defense == "pix2pix" else ()
    return [*own, *(name for name in names if name != "kind")]


def _name(slug: str, parameters: Mapping[str, Any]) -> str:
    text = json.dumps(parameters, sort_keys=True)
    short = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")[:50]
    return f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _with_shared(experiments: list[Job]) -> dict[str, Job]:
    """Add what the experiments share, made once, before those that need it."""
    from unfool.defenses import WASHERS

    wanted = Counter(_defense(job.parameters).name for job in experiments)
    shared: dict[str, Job] = {}
    done: dict[str, Job] = {}
    for job in experiments:
        own = job.parameters
        first = [_classifier(own, own["classifier"]), *_sets(own, own["made_on"], "test")]
        defense = _defense(own)
        taught = _taught(own) if own["defense"] in LEARN_FROM_ATTACKS else []
        if own["defense"] in ("none", *WASHERS):
            last: list[Job] = []
        elif wanted[defense.name] > 1 and own["learns"] != ["each"]:
            last = [replace(defense, needs=_names([*_upstream(defense), *taught]))]
        else:
            last = []
        # What must be there for `defense` is kept by the experiment where that is not shared.
        for one in (*first, *taught, *last):
            for part in (*_upstream(one), one):
                shared.setdefault(part.name, part)
        needs = _names([*first, *(last or taught)])
        done[job.name] = replace(job, needs=needs, seconds=_seconds(job, alone=not last))
    shared = {name: job for name, job in shared.items() if not _ships(job)}
    ordered = {j.name: j for kind in KINDS for j in shared.values() if j.kind == kind} | done
    return {
        name: replace(job, needs=tuple(n for n in job.needs if n in ordered))
        for name, job in ordered.items()
    }


def _ships(job: Job) -> bool:
    """Whether it is committed weights, which nobody has to train."""
    from unfool.committed import committed_weights

    return job.kind == "classifier" and job.parameters["classifier"] in committed_weights()


def _names(jobs: Sequence[Job]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(job.name for job in jobs))


def _upstream(job: Job) -> list[Job]:
    if job.kind == "classifier" or not job.parameters["classifier"]:
        return []
    return [_classifier(job.parameters, job.parameters["classifier"])]


def _built(kind: str, slug: str, own: Mapping[str, Any], **more: Any) -> Job:
    keys = ("dataset", "profile", "seed", "device")
    parameters = {**{key: own[key] for key in keys}, **more}
    job = Job(_name(f"{slug}-{own['dataset']}-s{own['seed']}", parameters), kind, "", parameters)
    return replace(
        job, needs=_names(_upstream(job)), seconds=_costs()["start"] + _work(kind, parameters)
    )


def _classifier(own: Mapping[str, Any], name: str) -> Job:
    return _built("classifier", name, own, classifier=name)


def _taught(own: Mapping[str, Any]) -> list[Job]:
    """The attacked sets that an experiment's defence, or one of its defences, learns from."""
    tested = [a.name for a in attack_list(own["dataset"], own["attacks"])]
    parts = [
        _sets({**own, "attacks": _seen(own, name)}, own["trained_for"], "train") for name in tested
    ]
    return list({job.name: job for part in parts for job in part}.values())


def _seen(own: Mapping[str, Any], tested: str) -> list[Any]:
    """The attacks that a defence learns from, as a grid names them; see `lessons`."""
    return [tested] if own["learns"] == ["each"] else own["learns"] or own["attacks"]


def _sets(own: Mapping[str, Any], classifier: str, split: str) -> list[Job]:
    name = classifier or own["classifier"]
    return [
        _built(
            "adversarial", f"{a.name}-{name}-{split}", own,
            classifier=name, attack=a.name, settings=dict(a.settings), split=split,
        )
        for a in attack_list(own["dataset"], own["attacks"])
    ]  # fmt: skip


def _defense(own: Mapping[str, Any]) -> Job:
    """The job that trains an experiment's defence; an epoch's copy comes with the whole."""
    owner = own["trained_for"] or own["classifier"]
    owner = "" if own["defense"] in ("denoiser", "defense_gan") else owner  # they ask none
    seen = own["learns"] or own["attacks"] if own["defense"] in LEARN_FROM_ATTACKS else []
    settings = {k: v for k, v in own["settings"].items() if k not in UNTRAINED}
    return _built(
        "defense", f"{own['defense']}-{owner}", own,
        classifier=owner, defense=own["defense"], settings=settings, attacks=seen,
    )  # fmt: skip


def _asking(job: Job, resources: Mapping[str, int]) -> Job:
    """Add what the job asks for; ten times its expected time, because a limit ends it."""
    profile = str(job.parameters.get("profile", "classroom"))
    return replace(
        job,
        threads=resources["threads"],
        mem_mb=resources["mem_mb"] or MEMORY_MB[profile],
        minutes=resources["minutes"] or max(30, int(10 * job.seconds / 60)),
        gpus=int(str(job.parameters.get("device", "cpu")) not in ("cpu", "auto")),
    )


# -------------------------------------------------------------------------------- expected time


@cache
def _costs() -> dict[str, Any]:
    costs: dict[str, Any] = yaml.safe_load(COSTS.read_text("utf-8"))
    return costs


def _seconds(job: Job, *, alone: bool) -> float:
    """Expected seconds of an experiment; `alone` where its defence is trained in it."""
    own, costs = job.parameters, _costs()
    seconds = float(costs["start"] + costs["kernel"])
    return seconds + (_work("defense", _defense(own).parameters) if alone else 0.0)


def _work(kind: str, own: Mapping[str, Any]) -> float:
    """Expected seconds of building something: images × passes × what one costs."""
    from unfool.profiles import profile_of
    from unfool.training import recipe_for

    costs, profile = _costs(), profile_of(own["profile"])
    if str(own["device"]).startswith("cuda"):
        return _work(kind, {**own, "device": "cpu"}) / float(costs["gpu"])
    images = {"mnist": 60_000, "cifar10": 50_000}.get(str(own["dataset"]), 3600)
    network = re.split(r"[-+]", str(own.get("classifier", "")))[0]
    factor = float(costs["network"].get(network, 1.0))
    if kind == "classifier":
        seen = min(images, profile.classifier_images or images)
        name = Path(own["dataset"]).name  # as in `Lab`: what a folder lies in does not count
        epochs = profile.classifier_epochs * recipe_for(network, name).longer
        return float(costs["training_pass"]) * factor * seen * epochs
    if kind == "adversarial":
        count = min(images, profile.images(own["attack"], own["split"]))
        return float(costs["attack"].get(own["attack"], 0.05)) * factor * count
    if own["defense"] not in costs["defense"]:
        return 0.0
    purifier = profile.purifier
    seen = own["attacks"] if own["attacks"] != ["each"] else []
    most = min(images, own["settings"].get("images", images))
    pairs = sum(
        min(most, profile.images(a.name, "train"))
        for a in attack_list(own["dataset"], seen or ["paper"])
    )
    epochs = own["settings"].get("epochs", purifier.epochs)
    width = own["settings"].get("width", purifier.width) / 16
    return float(costs["defense"][own["defense"]]) * pairs * epochs * width**1.5


def makespan(jobs: Sequence[Job], cores: int, gpus: int = 1) -> float:
    """Return the expected seconds of a plan: a job begins when what it needs is done, and has room.

    Args:
        jobs: a plan; what a job needs and is not among them counts as done.
        cores: on which jobs without a GPU run, as many at once as their threads leave room for.
        gpus: on which the others run, one on each.
    """
    names = {job.name for job in jobs}
    waiting = {job.name: set(job.needs) & names for job in jobs}
    threads = max((job.threads for job in jobs), default=1)
    free = {False: [0.0] * max(1, cores // threads), True: [0.0] * gpus}
    ready = [(0.0, k, job) for k, job in enumerate(jobs) if not waiting[job.name]]
    last, count = 0.0, len(jobs)
    while ready:
        since, _, job = heappop(ready)
        room = free[job.gpus > 0]
        end = max(since, heappop(room)) + job.seconds
        heappush(room, end)
        last = max(last, end)
        for other in jobs:
            if job.name in waiting[other.name]:
                waiting[other.name].remove(job.name)
                if not waiting[other.name]:
                    heappush(ready, (end, count := count + 1, other))
    return last


# ------------------------------------------------------------------------------- plans as files


def dump(jobs: Sequence[Job]) -> str:
    """Return a plan as JSON text."""
    return json.dumps([asdict(job) for job in jobs], indent=1, sort_keys=True) + "\n"


def load(path: Path) -> dict[str, Job]:
    """Return the jobs of a plan by name."""
    rows = json.loads(path.read_text("utf-8"))
    return {row["name"]: Job(**{**row, "needs": tuple(row["needs"])}) for row in rows}
