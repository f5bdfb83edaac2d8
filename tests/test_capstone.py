"""The capstone: a purifier for each, attacks run apart, scores that can't be talked up."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import nbformat
import pytest
import torch
from torch import Tensor, nn

from unfool import capstone
from unfool.capstone import EPS, POINTS, Score, hidden, load, make, roll, score, success
from unfool.defenses import pix2pix
from unfool.defenses.pix2pix import UNet
from unfool.grading.sandbox import Limits
from unfool.lab import Lab
from unfool.notebooks import UsageError, write
from unfool.profiles import PROFILES
from unfool.training import History

PGD = """import torch
from unfool.attacks import pgd

def attack(model, x, y, eps):
    return pgd(model, x, y, eps=eps, generator=torch.Generator().manual_seed(0))"""
CHEAT = "def attack(model, x, y, eps):\n    return 1 - x"
FORGED = """import os
from unfool.attacks import pgd

def attack(model, x, y, eps):
    os.symlink("/etc/hostname", "answer.safetensors")
    raise SystemExit"""
STUDENTS = {"pgd": PGD, "cheat": CHEAT, "forged": FORGED}


def drawn(x: Tensor, y: Tensor, settings: pix2pix.Settings, *, seed: int) -> tuple[UNet, History]:
    """A purifier that hands the image on, by its outermost skip, and a seed's noise with it."""
    purifier = UNet(1, 8).eval()
    first, last = purifier.downs[0][0].weight, purifier.last[1].weight
    with torch.no_grad():
        first.zero_()
        last.zero_()
        for channel in range(8):  # the four pixels of each square, their light and their dark
            sign, row, column = (1, -1)[channel // 4], 1 + channel % 4 // 2, 1 + channel % 2
            first[channel, 0, row, column] = sign
            last[8 + channel, 0, row, column] = 2 * sign
        last += 0.02 * torch.randn(last.shape, generator=torch.Generator().manual_seed(seed))
    return purifier, []


@pytest.fixture(scope="module", autouse=True)
def few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capstone, "IMAGES", 12)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capstone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFOOL_STORE", str(folder / "store"))
        patch.setattr(pix2pix, "train", drawn)
        make(Lab("smoke"), [*STUDENTS, "absent"], folder / "out", stream=StringIO())
    return folder / "out"


@pytest.fixture(scope="module")
def scores(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Score]:
    handed = tmp_path_factory.mktemp("handed")
    for student, source in STUDENTS.items():
        nb = nbformat.read(made / "students" / student / "capstone.ipynb", as_version=4)
        (cell,) = [c for c in nb.cells if c.source.startswith("def attack")]
        cell.source = source
        del nb.cells[4:7]  # trying it and looking at it take their time
        write(nb, handed / student / "capstone.ipynb")
    found = score(handed, made, Limits(seconds=120), stream=StringIO())
    return {one.student: one for one in found}


def test_scores(scores: dict[str, Score]) -> None:
    assert max(scores["pgd"].reference) > 0
    assert scores["pgd"].success == scores["pgd"].reference
    assert scores["pgd"].points == pytest.approx(
        POINTS * sum(r > 0 for r in scores["pgd"].reference) / len(EPS), abs=0.1
    )
    for student in ("cheat", "forged", "absent"):
        assert scores[student].success == [0.0] * len(EPS)
        assert scores[student].points == 0
    assert "no file" in scores["forged"].note
    assert "not graded" in scores["absent"].note


def test_everyone_has_a_purifier_and_images_of_their_own(made: Path) -> None:
    folders = sorted((made / "students").iterdir())
    weights = {(folder / "purifier.safetensors").read_bytes() for folder in folders}
    assert len(weights) == len(folders) == 4
    one, other = hidden("secret", "a"), hidden("secret", "b")
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[0], hidden("secret", "a")[0])
    assert not torch.equal(one[0], hidden("another", "a")[0])
    assert one[0].min() >= 0
    assert one[0].max() <= 1
    for folder in folders:
        text = "".join(path.read_text("utf-8") for path in folder.glob("*.ipynb"))
        assert "secret" not in text
        assert b"seed" not in (folder / "purifier.safetensors").read_bytes()


def test_a_second_call_makes_nothing_anew(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        profile = PROFILES["smoke"]
        classifier = staticmethod(lambda name: nn.Identity())
        pairs = staticmethod(lambda attacks: (torch.zeros(1), torch.zeros(1)))

    monkeypatch.setattr(pix2pix, "train", None)
    make(Known(), list(STUDENTS), made, stream=StringIO())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        make(Known(), ["new"], made, stream=StringIO())  # type: ignore[arg-type]


def test_success_counts_what_is_within_eps() -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    x, y = torch.full((4, 1, 2, 2), 0.45), torch.tensor([0, 0, 0, 1])
    near, far = x + 0.08, x + 0.3
    assert success(Bright(), x, near, y, 0.1) == 1  # the fourth was misread before
    assert success(Bright(), x, far, y, 0.1) == 0
    assert success(Bright(), x, torch.cat([near[:1], far[1:]]), y, 0.1) == pytest.approx(1 / 3)
    assert success(Bright(), x, x, y, 0.1) == 0


def test_the_weights_are_those_of_the_model(made: Path) -> None:
    model = load(made / "students" / "pgd")
    x, _ = capstone.practice(4)
    assert (model[0](x) - x).abs().mean() < 0.1  # as it was drawn: it hands the image on
    assert not model.training
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_class_list(tmp_path: Path) -> None:
    path = tmp_path / "class.csv"
    path.write_text("id,email\nanna,a@b.c\nben,\n", encoding="utf-8")
    assert roll(path) == ["anna", "ben"]
    path.write_text("anna\n\nben\n", encoding="utf-8")
    assert roll(path) == ["anna", "ben"]
    path.write_text("../anna\n", encoding="utf-8")
    with pytest.raises(UsageError, match="can't name a folder"):
        roll(path)


def test_an_answer_that_breaks_the_scoring_ends_nobody_elses(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(
        sources: object, folder: Path, x: Tensor, y: Tensor, limits: object
    ) -> tuple[dict[str, Tensor], str]:
        if folder.name == "forged":
            raise RuntimeError("of the third")
        far = {"absent": torch.inf, "cheat": 3e38, "pgd": torch.nan}[folder.name]
        return {str(eps): torch.full_like(x, far) for eps in EPS}, ""

    monkeypatch.setattr(capstone, "answered", answered)
    monkeypatch.setattr("unfool.grading.submissions.read", lambda _: capstone.notebook())
    found = {one.student: one for one in score(made, made, Limits(), stream=StringIO())}
    assert [one.points for one in found.values()] == [0, 0, 0, 0]
    assert {name for name, one in found.items() if one.note} == {"forged"}
    assert found["forged"].note == "not graded: RuntimeError: of the third"
