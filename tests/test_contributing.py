"""CONTRIBUTING.md: the defence that it adds is a whole program, and so are your own modules."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from unfool import cli
from unfool.artifacts import REPO
from unfool.evaluation import read_records

PAGE = (REPO / "CONTRIBUTING.md").read_text("utf-8")


def block_of(page: str, title: str, language: str = "python") -> str:
    """The one block of a language in a section."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (block,) = [text for kind, text in blocks if kind == language]
    return str(block)


def defence_of(page: str) -> str:
    return block_of(page, "Adding a defence")


def problems(block: str) -> list[str]:
    """Run the block; say what it did not do."""
    path = Path(os.environ["UNFOOL_RECORDS"])
    path.unlink(missing_ok=True)
    try:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "a_defence"})
    except Exception as error:
        return [f"it raised {type(error).__name__}"]
    records = read_records(path) if path.exists() else []
    if [r.defense for r in records] != ["Coarse"]:
        return [f"{len(records)} records of the defence"]
    return []


def test_the_defence_of_the_page_runs_and_leaves_a_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNFOOL_PROGRESS", "off")
    block = defence_of(PAGE)
    assert problems(block) == []
    unmeasured = block.split("record = ")[0]
    assert problems(unmeasured) == ["0 records of the defence"]
    assert problems(block.replace("images.shape[-2:]", "5")) == ["it raised ValueError"]


def test_what_the_page_names_is_there() -> None:
    section = PAGE.split("\n## Adding a defence\n")[1].split("\n## ")[0]
    for path in re.findall(r"`((?:lib|tests)/[\w/.]+)`", section):
        assert (REPO / path).exists(), path
    building = (REPO / "lib" / "unfool" / "building.py").read_text("utf-8")
    for name in re.findall(r"`(_\w+)", section):
        assert f"def {name}(" in building, name
    assert "`_ready(" in section
    assert "def _unready(" not in building  # the control


def folder_and_weights(place: Path) -> None:
    """Digits modulo 3 as a folder of images, and a linear classifier of them."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from unfool.datasets import load

    part = load("mnist5k").test
    for i in range(60):
        folder = place / "my_images" / str(part.labels_array[i] % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(part.pixels[i][0]).resize((32, 32)).save(folder / f"{i}.png")
    data = load(f"folder:{place / 'my_images'}")
    x, y = data.test.images.flatten(1), torch.eye(3)[data.test.labels]
    weight = torch.linalg.solve(x.T @ x + 30 * torch.eye(1024), x.T @ (y - 1 / 3)).T
    save_file({"1.weight": weight.contiguous(), "1.bias": torch.zeros(3)},
              place / "my_net.safetensors")  # fmt: skip


def evaluated(place: Path, block: str, command: str) -> list[str]:
    """Follow "Bringing your own" in a folder; return the defences that the records name."""
    (place / "my_module.py").write_text(block)
    words = shlex.split(command)
    assert words[0] == "unfool"
    more = ["--profile", "smoke", "--images", "8", "--eps", "0.1", "--out", str(place / "out")]
    if cli.main([*words[1:], *more]):
        return []
    return sorted({record.defense for record in read_records(place / "out" / "records.jsonl")})


def test_your_own_modules_go_through_the_command_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNFOOL_PROGRESS", "off")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder_and_weights(tmp_path)
    block = block_of(PAGE, "Bringing your own")
    command = block_of(PAGE, "Bringing your own", "")
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    assert "my_module:Contrast" in evaluated(tmp_path, block, command)
    assert "Contrast before my_module:net" in next((tmp_path / "out").glob("*.html")).read_text()
    monkeypatch.delitem(sys.modules, "my_module")
    assert evaluated(tmp_path, block.replace("torch.sigmoid", "torch.exp"), command) == []
    assert "leaves [0, 1]" in capsys.readouterr().err
