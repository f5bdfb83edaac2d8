"""`unfool evaluate`: an own defence, classifier and data set through the ladder, and bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import masks
import victims
from test_report import Fetched
from unfool import cli, own, own_page, threats
from unfool.evaluation import read_records, read_rows
from unfool.lab import Lab
from unfool.notebooks import UsageError

QUICK = masks.QUICK
GRID = (0.05, 0.12)
HERE = """
import sys; sys.path.insert(0, {tests!r})
import torch
from torch import nn
import masks, victims

class Mean(nn.Module):
    def forward(self, x):
        return nn.functional.avg_pool2d(x, 3, 1, 1)

class Needs(nn.Module):
    def __init__(self, size):
        super().__init__()

class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("lost")

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class Crops(nn.Module):
    def forward(self, x):
        return x[..., 1:]

class Bright(nn.Module):
    def forward(self, x):
        return 2 * x

class Nan(nn.Module):
    def forward(self, x):
        return x / x

class Remembers(nn.Module):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return x / self.calls

class Shouts(Mean):
    def rejects(self, x):
        return x.mean()

class Hard(nn.Module):
    def forward(self, x):
        return (x > 0.5).float()

def learned():
    return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid()).eval()

def net():
    return nn.Sequential(nn.AvgPool2d(2), victims.small_net()).eval()

def soft():
    return nn.Sequential(net(), nn.Softmax(1)).eval()

def nine():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 9)).eval()

def shuffled():
    return nn.Sequential(net(), Turned()).eval()

class Turned(nn.Module):
    def forward(self, logits):
        return logits.roll(1, dims=1)

def dropping():
    return nn.Sequential(nn.Dropout(0.5), net()).train()

def normed():
    return nn.Sequential(nn.BatchNorm2d(1), nn.Hardtanh(0, 1)).train()

number = 7
"""


@pytest.fixture(autouse=True)
def _short(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threats, "WATCHED", 4)
    monkeypatch.setattr(threats, "PLANTED", 8)
    monkeypatch.setattr(own, "attackers", lambda case: QUICK)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    from unfool.artifacts import Store

    return Lab("smoke", store=Store(tmp_path_factory.mktemp("store")))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with the user's modules."""
    (tmp_path / "code").mkdir()
    text = HERE.replace("{tests!r}", repr(str(Path(__file__).parent)))
    (tmp_path / "code" / "my_own_module.py").write_text(text)
    (tmp_path / "code" / "my_broken_module.py").write_text("import numpy\n1 / 0\n")
    (tmp_path / "code" / "my_lacking_module.py").write_text("import no_such_package_here\n")
    return tmp_path / "code"


def net() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), victims.small_net()).eval()


def judged(lab: Lab, defense: nn.Module, **more: Any) -> own.Judgement:
    return own.judge(lab, defense, net(), images=24, eps=GRID, **more)


# --- what is told ---------------------------------------------------------------------------------


def test_a_mask_is_warned_of_on_its_page_and_an_honest_defence_is_not(
    lab: Lab, tmp_path: Path
) -> None:
    pages = {}
    for defense in (masks.Smooth(), masks.Shattered()):
        found = judged(lab, defense.eval())
        page = own_page.write(found, tmp_path / type(defense).__name__)
        pages[type(defense).__name__] = page.read_text("utf-8")
        assert Fetched(pages[type(defense).__name__]).found == []
    honest, masked = pages["Smooth"], pages["Shattered"]
    assert "Warning:" not in honest
    assert "All silent" in honest
    assert "Warning:</b> an attacker who knows less fools more" in masked
    assert "Not measured yet" in masked
    assert "Not measured yet" not in honest
    for page in (honest, masked):
        assert re.search(r'<img alt="right, % against ε = 0\.05, 0\.12\. noise: [^"]+"', page)
        for word in ("What was not tested", "control", "threshold", "black-box", "[", "24"):
            assert word in page
        assert "prefers-color-scheme: dark" in page


class Wary(masks.Smooth):
    """Refuses what is bright."""

    def rejects(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3)) > 0.15


def test_records_and_rows_are_those_of_the_course(lab: Lab, tmp_path: Path) -> None:
    found = judged(lab, Wary().eval(), out=tmp_path)
    page = own_page.write(found, tmp_path)
    records = read_records(tmp_path / "records.jsonl")
    assert {r.attack for r in records} == {"fgsm", "deepfool", "jsma", "carlini_wagner_l2"}
    assert [r.defense for r in records[:7]] == [
        "none", "threshold", "bits", "median", "blur", "jpeg", "Wary"
    ]  # fmt: skip
    assert all(r.n_images == 24 and r.id and r.classifier == "Sequential" for r in records)
    assert all(r.recovered_accuracy == 0 for r in records if r.defense == "none")
    rows = read_rows(tmp_path / "threats.jsonl")
    levels = {row["level"] for row in rows if row["defense"] == "Wary"}
    assert levels == {*threats.LEVELS, "worst of all"} - {"surrogate"}
    controls = [(row["defense"], row["eps"]) for row in rows if row.get("control")]
    assert controls == [("none", 0.05), ("none", 0.12), *((w, 0.12) for w in own.WASHERS)]
    assert all(row["low"] <= row["accuracy"] <= row["high"] and row["n"] == 24 for row in rows)
    assert page == tmp_path / "Wary-before-Sequential-on-mnist5k.html"
    assert page.exists()
    assert not list(tmp_path.glob(".unfinished*"))
    text = page.read_text("utf-8")
    assert "It also refuses images" in text
    assert "aim to pass its detector" in text
    assert any(r.rejected for r in records if r.defense == "Wary")
    assert not any(r.rejected for r in records if r.defense != "Wary")


def test_the_verdict_says_what_the_numbers_say(lab: Lab) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0, 1)

    state = torch.get_rng_state()
    head, told = own_page.verdict(judged(lab, Nothing()))
    assert torch.equal(torch.get_rng_state(), state)
    assert head.endswith("it adds nothing that these images show")
    assert "+0.0 points" in told[2]
    found = judged(lab, masks.Smooth().eval())
    everything, nothing = torch.ones_like(found.found.worst), torch.zeros_like(found.found.worst)
    half = torch.stack([everything[0], nothing[1]])
    for kept, alone, said in [
        (everything, nothing, "it holds more at eps 0.05, 0.12 than the classifier alone"),
        (half, nothing, "it holds more at eps 0.05, and elsewhere no more than"),
        (nothing, half, "it holds less at eps 0.05, and elsewhere no more than"),
        (half, half.flip(0), "it holds more at eps 0.05 and less at eps 0.12 than"),
    ]:
        found.found.right.update(dict.fromkeys(found.found.right, kept))
        found.alone.right["white-box"] = alone
        assert said in own_page.verdict(found)[0]


def test_what_was_measured_is_not_measured_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense, done = masks.Noise(), []
    real = threats._Trial._attacked

    def counted(self: Any, level: str, *rest: Any, **more: Any) -> Tensor:
        done.append(level)
        if len(done) == 5:
            raise KeyboardInterrupt
        return real(self, level, *rest, **more)

    straight = judged(lab, defense)
    monkeypatch.setattr(threats._Trial, "_attacked", counted)
    with pytest.raises(KeyboardInterrupt):
        judged(lab, defense, out=tmp_path)
    assert len(list(tmp_path.glob(".unfinished-*/defence/*.safetensors"))) == 6  # noise, too
    resumed = judged(lab, defense, out=tmp_path)
    assert done[5:].count("transfer") == 0 == done[5:].count("noise")
    assert done.count("black-box") == 2
    for level, right in straight.found.right.items():
        assert torch.equal(right, resumed.found.right[level])
    assert straight.found.warnings == resumed.found.warnings
    assert straight.records[-1].end_to_end_accuracy == resumed.records[-1].end_to_end_accuracy


def test_another_defence_does_not_find_this_ones_measurements(lab: Lab) -> None:
    x = lab.data.test.images[:8]
    kinds = [masks.Smooth(), masks.Smooth(), masks.Noise(), masks.Detached(), nn.Identity(), net()]
    prints = [own.fingerprint(module.eval(), x) for module in kinds]
    assert prints[0] == prints[1]
    assert len(set(prints)) == len(kinds) - 1
    changed = net()
    next(changed.parameters()).data[0] += 0.01
    assert own.fingerprint(changed, x) != prints[-1]


# --- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"defense": "no_module_of_mine:A"}, r"no module 'no_module_of_mine'.*--path"),
    "no attribute": ({"defense": "my_own_module:Maen"}, r"no 'Maen'; did you mean 'Mean'\?"),
    "no colon": ({"defense": "pix2pics"}, "unknown defence 'pix2pics'"),
    "half a name": ({"defense": "my_own_module:"}, "must read my_module:attribute"),
    "broken": ({"defense": "my_broken_module:A"}, "cannot be imported: ZeroDivisionError"),
    "lacking": ({"defense": "my_lacking_module:A"}, "cannot be imported: ModuleNotFoundError"),
    "not callable": ({"defense": "my_own_module:number"}, "is a int: name an nn.Module"),
    "arguments": ({"defense": "my_own_module:Needs"}, r"Needs\(\) failed: TypeError"),
    "no module made": ({"defense": "torch:get_num_threads"}, "returned a int: return an nn.Module"),
    "raises": ({"defense": "my_own_module:Raises"}, r"fails on images \(4, 1, 28, 28\).*KeyError"),
    "pair": ({"defense": "my_own_module:Pair"}, "returns a tuple: return one Tensor"),
    "shape": ({"defense": "my_own_module:Crops"}, r"returns \(4, 1, 28, 27\)"),
    "range": ({"defense": "my_own_module:Bright"}, r"leaves \[0, 1\], to \[0, 2\].*clamp"),
    "nan": ({"defense": "my_own_module:Nan"}, "returns NaN at"),
    "state": ({"defense": "my_own_module:Remembers"}, "holds a state between calls"),
    "rejects": (
        {"defense": "my_own_module:Shouts"},
        r"rejects returns \(\) torch.float32.*\(N,\) torch.bool",
    ),
    "train mode": ({"defense": "my_own_module:normed"}, "is in train mode"),
    "no gradient": ({"defense": "my_own_module:Hard"}, "Hard .*BPDA.*--bpda identity"),
    "bpda of nothing": ({"defense": "none", "bpda": "identity"}, "stands for a purifier"),
    "copy of nothing": (
        {"defense": "none", "surrogate": "my_own_module:Mean"},
        "purifier of the attacker's",
    ),
    "nothing to copy": ({"surrogate": "my_own_module:Mean"}, "no surrogate: .*nothing to train"),
    "a copy that rounds": (
        {"defense": "my_own_module:learned", "surrogate": "my_own_module:Hard"},
        "bpda.surrogate",
    ),
    "softmax": ({"classifier": "my_own_module:soft"}, "returns probabilities.*logits"),
    "classes": ({"classifier": "my_own_module:nine"}, r"returns \(4, 9\).*10 classes"),
    "all wrong": ({"classifier": "my_own_module:shuffled"}, "reads none of 16 images rightly"),
    "drops": ({"classifier": "my_own_module:dropping"}, "is in train mode"),
    "no net": ({"classifier": "znet"}, "unknown classifier 'znet'"),
    "own kind": ({"defense": "adversarial_pgd"}, "'my_own_module:net' is none"),
    "falling": ({"eps": [0.2, 0.1]}, r"eps must grow, not \[0.2, 0.1\]"),
    "of 255": ({"eps": [8.0, 16.0]}, "give 8/255"),
    "no size": ({"eps": []}, "eps is empty"),
    "no image": ({"images": 0}, "images must be 1 or more, not 0"),
    "no sample": ({"eot": 0}, "samples must be >= 1, not 0"),
    "no data": ({"dataset": "mnist6k"}, "unknown data set 'mnist6k'"),
    "no folder": ({"dataset": "folder:nowhere"}, "nowhere does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(
    name: str, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = BAD[name]
    wanted = {"defense": "my_own_module:Mean", "classifier": "my_own_module:net", "images": 16}
    command = ["evaluate", "--profile", "smoke", "--path", str(mine), "--out", str(tmp_path / "o")]
    for key, value in {**wanted, **given}.items():
        command += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if name == "no size":  # argparse refuses it first
        with pytest.raises(UsageError, match=message):
            own.prepare(Lab("smoke"), "none", net(), eps=[])
        return
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("unfool: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "o").exists()


def test_noise_from_torch_is_chance_and_not_state(lab: Lab, mine: Path) -> None:
    """The control of the one above: what may be measured is let through."""
    case = own.prepare(lab, masks.Noise(), net(), 16, eot=3)
    assert case.random
    assert not own.prepare(lab, "blur", net(), 16).random
    names = "my_own_module:Hard", "my_own_module:net"
    hard = own.prepare(lab, *names, 16, bpda="identity", path=mine)
    assert hard.classifier == "my_own_module:net"
    assert (hard.eps, hard.middle) == (own.GREY, 2)


class Scale(nn.Module):
    """A purifier with something to train."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return (self.factor * images).clamp(0, 1)


def test_an_attackers_own_copy_is_a_level_of_its_own(lab: Lab) -> None:
    with_copy = judged(lab, Scale(0.9), surrogate=Scale(0.8))
    without = judged(lab, Scale(0.9))
    assert set(with_copy.found.right) - set(without.found.right) == {"surrogate"}
    same = judged(lab, Scale(0.9), surrogate=Scale(0.9)).found.right["surrogate"]
    assert int(same.sum()) <= int(with_copy.found.right["surrogate"].sum())
    assert any("--surrogate" in line for line in own_page.untested(without))
    assert not any("surrogate" in line for line in own_page.untested(with_copy))
    assert any("nothing to train" in line for line in own_page.untested(judged(lab, masks.Noise())))
    rows = [row for row in own_page.rows(with_copy) if row["level"] == "surrogate"]
    assert [(row["knowledge"], row["attack"]["name"]) for row in rows] == [
        ("f+design", QUICK.transfer.name)
    ] * len(GRID)


def test_names_of_the_course_are_not_taken(lab: Lab) -> None:
    with pytest.raises(ValueError, match="'anet' is a name of the course"):
        lab.adopt(net(), "anet")


@pytest.mark.parametrize("classes", [5, 12])
def test_a_classifier_of_other_classes_is_not_adopted(lab: Lab, classes: int) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, classes)).eval()
    with pytest.raises(ValueError, match=rf"\(4, {classes}\), and the data have 10 classes: r"):
        lab.adopt(other, "other", "a key")
    with pytest.raises(ValueError, match="unknown classifier 'other'"):
        lab.classifier("other")
    with pytest.raises(ValueError, match=r"Sequential is on meta and x on cpu: .*\.to\(device"):
        lab.adopt(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).to("meta"), "other", "a key")
    right = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()  # the control
    assert lab.adopt(right, f"of ten, not {classes}", "a key") is right


def folder_of(path: Path, lab: Lab, n: int = 60) -> Path:
    for i, (pixels, label) in enumerate(
        zip(lab.data.test.pixels[:n], lab.data.test.labels_array[:n], strict=True)
    ):
        (path / str(label % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(path / str(label % 3) / f"{i}.png")
    return path


def test_the_command_writes_a_page_of_own_images(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    own_net: Callable[[], str],
) -> None:  # fmt: skip
    images = folder_of(tmp_path / "digits", lab)
    out = tmp_path / "out"
    command = ["evaluate", "--defense", "blur", "--classifier", own_net(), "--images", "12",
               "--dataset", f"folder:{images}", "--profile", "smoke", "--eps", "0.05", "0.1",
               "--path", str(tmp_path), "--out", str(out)]  # fmt: skip
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "worst of all" in said
    page = Path(said.strip().splitlines()[-1].removeprefix("page: "))
    assert page.parent == out
    assert "folder:digits, 3 classes, 1x32x32" in page.read_text("utf-8")
    kept = json.loads((out / "threats.jsonl").read_text("utf-8").splitlines()[0])
    assert kept["dataset"] == "folder:digits"


@pytest.fixture
def own_net(tmp_path: Path) -> Callable[[], str]:
    """Write a module with a linear classifier of three classes of digits."""

    def write() -> str:
        (tmp_path / "my_three.py").write_text(
            "import torch\nfrom torch import nn\nfrom unfool.datasets import load\n\n"
            "def net():\n"
            "    part = load('mnist5k').train\n"
            "    x = nn.functional.interpolate(part.images[:900], size=32).flatten(1)\n"
            "    y = nn.functional.one_hot(part.labels[:900] % 3, 3).float()\n"
            "    layer = nn.Linear(1024, 3)\n"
            "    gram = x.T @ x + 30 * torch.eye(1024)\n"
            "    layer.weight.data = torch.linalg.solve(gram, x.T @ (y - 1 / 3)).T\n"
            "    layer.bias.data.zero_()\n"
            "    return nn.Sequential(nn.Flatten(), layer).eval()\n"
        )
        return "my_three:net"

    return write


RECIPE = """
from torch import nn
from torchvision.models import resnet18


class Grey(nn.Module):
    def forward(self, images):
        return images.expand(-1, 3, -1, -1)


def net():
    return nn.Sequential(Grey(), resnet18(weights=None, num_classes=3)).eval()
"""


@pytest.mark.long
def test_a_classifier_from_outside_is_ten_lines(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_resnet.py").write_text(RECIPE)
    (tmp_path / "my_hot_resnet.py").write_text(RECIPE.replace(".eval()", ".train()"))
    data = f"folder:{folder_of(tmp_path / 'digits', lab)}"
    command = ["evaluate", "--defense", "blur", "--dataset", data, "--profile", "smoke", "--eps",
               "0.01", "0.02", "--images", "12", "--path", str(tmp_path), "--out",
               str(tmp_path / "out"), "--classifier"]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert cli.main([*command, "my_resnet:net"]) == 0
    assert "before my_resnet:net" in next((tmp_path / "out").glob("*.html")).read_text("utf-8")
    assert cli.main([*command, "my_hot_resnet:net"]) == 2
    assert "is in train mode" in capsys.readouterr().err
