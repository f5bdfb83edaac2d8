"""The capstone: every student gets a purifier of their own, and breaks it knowing everything.

Each purifier is trained with a seed of its own on FGSM's images, so that nobody can hand in a
neighbour's numbers; the students get its weights and the classifier's, not its seed. They write
`attack(model, x, y, eps)`. It is run on digits that they don't have: test digits, turned and moved
under a secret seed. The images that it returns are judged here, apart from the student's code.
"""

from __future__ import annotations

import csv
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from unfool import classifiers, datasets
from unfool.artifacts import load_tensors, load_weights, save_tensors
from unfool.attacks import AttackSettings, pgd
from unfool.defenses import pix2pix
from unfool.evaluation import predict
from unfool.files import write_text
from unfool.notebooks import KERNELSPEC, LANGUAGE_INFO, UsageError, write
from unfool.threats import told

if TYPE_CHECKING:
    from unfool.grading.sandbox import Limits
    from unfool.lab import Lab

EPS = (0.1, 0.15, 0.2)
POINTS = 20.0
IMAGES = 40  # hidden ones per student
PAIRS = 2000  # that a purifier is trained on, once each
CLASSIFIER = "anet"
TOLERANCE = 1e-5  # by which an image may miss its eps
ANSWER, HIDDEN = "answer.safetensors", "hidden.safetensors"


# ------------------------------------------------------------------------------------ for students


def load(folder: Path | str = ".") -> nn.Sequential:
    """Return the defended classifier, purifier first, from the two weights files in `folder`."""
    tensors, known = load_tensors(Path(folder) / "purifier.safetensors")
    with torch.random.fork_rng(devices=[]):  # its first weights are overwritten at once
        purifier = pix2pix.UNet(1, known["width"])
    purifier.load_state_dict(tensors)
    classifier = classifiers.build(CLASSIFIER, (1, 28, 28))
    load_weights(classifier, Path(folder) / "classifier.safetensors")
    return nn.Sequential(purifier, classifier).eval()


def practice(n: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Return n test digits, (n, 1, 28, 28), and their classes, (n,): to try an attack on."""
    test = datasets.load("mnist5k").test
    return test.images[:n], test.labels[:n]


def success(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> float:
    """Return the share of the images read rightly that x_adv turns wrong within eps and [0, 1]."""
    right = predict(model, x) == y
    return int((_fooled(model, x, x_adv, y, eps) & right).sum()) / max(1, int(right.sum()))


def _fooled(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> Tensor:
    change = (x_adv - x).abs().flatten(1).amax(1)
    inside = (x_adv >= 0).flatten(1).all(1) & (x_adv <= 1).flatten(1).all(1)
    fooled: Tensor = (predict(model, x_adv) != y) & inside & (change <= eps + TOLERANCE)
    return fooled


# --------------------------------------------------------------------------------- making them


def make(lab: Lab, students: Sequence[str], out: Path, *, stream: TextIO) -> None:
    """Write a folder for each student under `out`/students, and what the teacher keeps.

    A student whose folder is there is left alone: a call that was stopped is taken up again.

    Raises:
        UsageError: no students, or a name twice.
    """
    if not students or len(set(students)) < len(students):
        raise UsageError(f"expected student ids, each once; got {len(students)} lines")
    secret = _secret(out / "teacher.json")
    settings = replace(lab.profile.purifier, epochs=1)
    net, (x, y) = lab.classifier(CLASSIFIER), lab.pairs([AttackSettings("fgsm", {"eps": 0.15})])
    for number, student in enumerate(students, start=1):
        started, folder = time.monotonic(), out / "students" / student
        if not (folder / "capstone.ipynb").exists():
            seed = _seed(secret, student)
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randperm(len(x), generator=generator)[:PAIRS]
            purifier, _ = pix2pix.train(x[rows], y[rows], settings, seed=seed)
            folder.mkdir(parents=True, exist_ok=True)
            known = {"width": settings.width, "for": student}
            save_tensors(folder / "purifier.safetensors", purifier.state_dict(), known)
            save_tensors(folder / "classifier.safetensors", net.state_dict(), {})
            write(notebook(), folder / "capstone.ipynb")
        took = time.monotonic() - started
        print(f"[{number:3}/{len(students)}] {student:<16} {took:6.1f} s", file=stream, flush=True)


def roll(path: Path) -> list[str]:
    """Read a class list: an id per line, or a CSV file with the column `id`.

    Raises:
        UsageError: an id that could not name a folder.
    """
    from unfool.grading.submissions import NAME

    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    if lines and "id" in lines[0].split(","):
        lines = [row["id"] for row in csv.DictReader(lines)]
    for name in lines:
        if not NAME.fullmatch(name):
            raise UsageError(f"{path}: {name!r} can't name a folder: letters, digits, . _ @ + -")
    return lines


def _secret(path: Path) -> str:
    if not path.exists():
        write_text(path, json.dumps({"secret": secrets.token_hex(16)}) + "\n")
    return str(json.loads(path.read_text(encoding="utf-8"))["secret"])


def _seed(secret: str, student: str) -> int:
    return int(hashlib.sha256(f"{secret}/{student}".encode()).hexdigest()[:8], 16)


def hidden(secret: str, student: str) -> tuple[Tensor, Tensor]:
    """Return `IMAGES` test digits, turned and moved a little, that one student is judged on."""
    generator = torch.Generator().manual_seed(_seed(secret, f"hidden/{student}"))
    test, n = datasets.load("mnist5k").test, IMAGES
    rows = torch.randperm(len(test.labels), generator=generator)[:n]
    turn, right, down = (2 * torch.rand(3, n, generator=generator) - 1).unbind()
    angle = 0.2 * turn  # 11 degrees; moved by up to 2 pixels
    cos, sin, shift = angle.cos(), angle.sin(), 4 / 28
    top, low = torch.stack([cos, -sin, shift * right], 1), torch.stack([sin, cos, shift * down], 1)
    images = test.images[rows]
    grid = affine_grid(torch.stack([top, low], 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False).clamp(0, 1), test.labels[rows]


# ------------------------------------------------------------------------------------------ scoring


@dataclass
class Score:
    """A student's success at each eps, that of the teacher's PGD, and the points."""

    student: str
    success: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    points: float = 0.0
    note: str = ""


def score(handed: Path, made: Path, limits: Limits, *, stream: TextIO) -> list[Score]:
    """Run each `handed`/STUDENT/capstone.ipynb on its hidden images; write `made`/scores.csv.

    Points are the mean over eps of a student's success relative to PGD's, at most 1, times
    `POINTS`: a purifier that happens to be harder costs its student nothing.
    """
    secret = _secret(made / "teacher.json")
    students = sorted(path.name for path in (made / "students").iterdir() if path.is_dir())
    found = []
    for number, student in enumerate(students, start=1):
        try:
            one = _scored(student, handed / student / "capstone.ipynb", made, secret, limits)
        except Exception as error:  # whatever one hands in, the others are scored
            nothing = [0.0] * len(EPS)
            one = Score(student, nothing, nothing, note=f"not graded: {told(error)}")
        found.append(one)
        rates = " ".join(f"{own:.2f}/{best:.2f}" for own, best in _rates(one))
        line = f"{student:<16} {rates}  {one.points:4.1f} of {POINTS:g}  {one.note}"
        print(f"[{number:3}/{len(students)}] {line}".rstrip(), file=stream, flush=True)
    _table(found, made / "scores.csv")
    return found


def _rates(one: Score) -> Iterator[tuple[float, float]]:
    yield from zip(one.success, one.reference, strict=True)


def _scored(student: str, path: Path, made: Path, secret: str, limits: Limits) -> Score:
    from unfool.grading.submissions import Unreadable, read

    folder, (x, y) = made / "students" / student, hidden(secret, student)
    model = load(folder)
    best = [success(model, x, reference(model, x, y, eps), y, eps) for eps in EPS]
    one = Score(student, [0.0] * len(EPS), best)
    try:
        nb = read(path)
    except Unreadable as error:
        one.note = f"not graded: {error}"
        return one
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    answers, one.note = answered(sources, folder, x, y, limits)
    for place, eps in enumerate(EPS):
        x_adv = answers.get(str(eps))
        if x_adv is not None and x_adv.shape == x.shape and x_adv.dtype == x.dtype:
            # Beyond [0, 1] it counts as not fooled; too far, and the model would return NaN.
            x_adv = x_adv.nan_to_num(2.0).clamp(-1, 2)
            one.success[place] = success(model, x, x_adv, y, eps)
    shares = [min(1.0, own / max(top, 1 / len(y))) for own, top in _rates(one)]
    one.points = round(POINTS * sum(shares) / len(shares), 1)
    return one


def reference(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The attack that full points are measured by: PGD through the whole model, 40 steps."""
    return pgd(model, x, y, eps=eps, generator=torch.Generator().manual_seed(0))


def answered(
    sources: Sequence[str], folder: Path, x: Tensor, y: Tensor, limits: Limits
) -> tuple[dict[str, Tensor], str]:
    """Run a stranger's cells and their `attack` apart; return the images by eps, and a note."""
    from unfool.grading.sandbox import judge

    weights = {f"{n}.safetensors": folder / f"{n}.safetensors" for n in ("purifier", "classifier")}
    cells: list[dict[str, Any]] = [{"source": source} for source in sources]
    cells.append({"attack": list(EPS)})
    found: dict[str, Tensor] = {}
    problem = ""

    def before(scratch: Path) -> None:
        save_tensors(scratch / HIDDEN, {"x": x, "y": y}, {})

    def after(scratch: Path) -> None:
        nonlocal problem
        try:
            path = scratch / ANSWER
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError("the answer is no file")
            found.update(load_tensors(path)[0] if path.exists() else {})
        except (OSError, ValueError) as error:
            problem = str(error)

    report = judge(cells, 0, limits, files=weights, before=before, after=after)
    said = [": ".join(c["error"]) for c in report.cells if c.get("error")]
    return found, "; ".join(filter(None, [report.reason, problem, *said[-1:]]))


def run_attack(attack: Callable[..., Tensor], folder: Path, eps: Sequence[float]) -> None:
    """Call a student's attack on the hidden images; what the jury does, under the warden."""
    tensors, _ = load_tensors(folder / HIDDEN)
    model, x, y = load(folder), tensors["x"], tensors["y"]
    found = {str(e): attack(model, x.clone(), y.clone(), e).detach().clone() for e in eps}
    save_tensors(folder / ANSWER, found, {})


def _table(found: Sequence[Score], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        heads = [f"{what} at {eps}" for what in ("success", "reference") for eps in EPS]
        rows.writerow(["student", *heads, "points", "note"])
        for one in found:
            about = asdict(one)
            numbers = [f"{v:.3f}" for v in [*about["success"], *about["reference"]]]
            rows.writerow([one.student, *numbers, f"{one.points:g}", one.note])


# ------------------------------------------------------------------------------------ the notebook

TEXTS = (
    """# Capstone. Can you break this defence?

`purifier.safetensors` is yours alone: a pix2pix purifier, trained on FGSM's images like all the
others, but with a seed of its own. `classifier.safetensors` is the classifier behind it. You know
everything, so this is the white box of lesson 11.

`model` is both in one: images in, the purifier, the classifier, logits out. `x` and `y` are 40 test
digits and their classes, to practise on.""",
    """## Your attack (20 points)

Write `attack(model, x, y, eps)`, with `x` (N, 1, 28, 28) in [0, 1] and `y` (N,) the true classes.
Return as many images in [0, 1], at most eps from x at every pixel: one beyond either counts as not
fooled.

It is graded on 40 other digits, turned and moved a little, at the same three eps. Full points are
for fooling the model as often as PGD with 40 steps through the whole of it does. There each cell
may take a minute, and your attack three in all; what it needs must be in this notebook.""",
    """## What becomes of it

Eight digits, attacked, and as the purifier hands them on to the classifier.""",
    """## In your own words

Which attacks did you try, what did each reach, and why is the best one better? At most 150
words.""",
    "*Your answer here.*",
)
CELLS = (
    """from unfool.capstone import EPS, load, practice, success

model = load()
x, y = practice()
print(f"{(model(x).argmax(1) == y).sum()} of {len(y)} digits are read rightly")""",
    '''def attack(model, x, y, eps):
    """Return images within eps of x, in [0, 1], that the model misreads."""
    x_adv = x.clone()
    # your code here
    return x_adv''',
    """for eps in EPS:
    share = success(model, x, attack(model, x, y, eps), y, eps)
    print(f"eps {eps}: {share:.0%} fooled")""",
    """from unfool.figures import verdicts
from unfool.lab import Lab

attacked = attack(model, x[:8], y[:8], EPS[-1])
rows = {"clean": x[:8], "attacked": attacked, "purified": model[0](attacked).detach()}
read = {"clean": model(x[:8]).argmax(1), "purified": model(attacked).argmax(1)}
caption = f"your attack at eps {EPS[-1]}; under each image, what the model reads."
Lab().show(verdicts(rows, read, y[:8], "0123456789", caption=caption))""",
)


def notebook() -> Any:
    """What each student gets beside the weights."""
    intro, task, picture, question, answer = TEXTS
    cells = [new_markdown_cell(intro), new_code_cell(CELLS[0]), new_markdown_cell(task)]
    cells += [new_code_cell(CELLS[1]), new_code_cell(CELLS[2]), new_markdown_cell(picture)]
    cells += [new_code_cell(CELLS[3]), new_markdown_cell(question), new_markdown_cell(answer)]
    for place, cell in enumerate(cells):
        cell.id = f"capstone-{place}"
    metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO}
    return new_notebook(cells=cells, metadata=metadata)
