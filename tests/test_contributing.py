"""CONTRIBUTING.md: the defence that it adds is a whole program, and it writes its record."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from unfool.artifacts import REPO
from unfool.evaluation import read_records

PAGE = (REPO / "CONTRIBUTING.md").read_text("utf-8")


def defence_of(page: str) -> str:
    """The one block of Python in the section "Adding a defence"."""
    section = page.split("\n## Adding a defence\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(block)


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
    assert problems(block.replace("images.shape[-2:]", "5")) == ["it raised RuntimeError"]


def test_what_the_page_names_is_there() -> None:
    section = PAGE.split("\n## Adding a defence\n")[1].split("\n## ")[0]
    for path in re.findall(r"`((?:lib|tests)/[\w/.]+)`", section):
        assert (REPO / path).exists(), path
    lab = (REPO / "lib" / "unfool" / "lab.py").read_text("utf-8")
    for name in re.findall(r"`(_\w+)", section):
        assert f"def {name}(" in lab, name
    assert "`_ready(" in section
    assert "def _unready(" not in lab  # the control
