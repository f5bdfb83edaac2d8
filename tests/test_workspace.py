"""work/: new and updated files arrive, what the learner changed is never touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from unfool import workspace
from unfool.workspace import sync

NAME = "notebooks/01_see.ipynb"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    write(root / NAME, "one")
    write(root / "notebooks/02_fool.ipynb", "[back](01_see.ipynb) [ex](../exercises/ex01.ipynb)")
    write(root / "exercises/ex01.ipynb", "exercise")
    return root


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def texts(folder: Path) -> dict[str, str]:
    """Name → text of every file but the record."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    found.pop(workspace.RECORD, None)
    return found


def test_first_copy_is_the_source(source: Path, work: Path) -> None:
    lines = sync(source, work)
    assert texts(work) == texts(source)
    assert [line.split()[0] for line in lines[:-1]] == ["new"] * 3
    assert sync(source, work) == [f"{work}: up to date"]


def test_links_between_copies_lead_somewhere(source: Path, work: Path) -> None:
    sync(source, work)
    page = work / "notebooks/02_fool.ipynb"
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert len(links) == 2
    assert all((page.parent / link).is_file() for link in links)


def test_unchanged_file_is_updated(source: Path, work: Path) -> None:
    sync(source, work)
    write(source / NAME, "two")
    lines = sync(source, work)
    assert lines[0] == f"updated  {NAME}"
    assert texts(work) == texts(source)


def test_changed_file_is_never_overwritten(source: Path, work: Path) -> None:
    sync(source, work)
    write(work / NAME, "mine")
    before = texts(work)
    assert sync(source, work) == [f"{work}: up to date; kept as you changed them: 1"]
    assert texts(work) == before  # nothing newer: nothing is put beside it

    write(source / NAME, "two")
    lines = sync(source, work)
    assert lines[0].startswith(f"kept     {NAME}")
    assert "01_see.new.ipynb" in lines[0]
    assert texts(work) == before | {"notebooks/01_see.new.ipynb": "two"}
    assert len(sync(source, work)) == 1  # said once


def test_new_version_that_was_worked_in_is_kept_too(source: Path, work: Path) -> None:
    sync(source, work)
    write(work / NAME, "mine")
    write(source / NAME, "two")
    sync(source, work)
    write(source / NAME, "three")
    sync(source, work)  # 01_see.new.ipynb is as it was handed out: replaced
    assert texts(work)["notebooks/01_see.new.ipynb"] == "three"
    write(work / "notebooks/01_see.new.ipynb", "mine, too")
    write(source / NAME, "four")
    sync(source, work)
    found = texts(work)
    assert found[NAME] == "mine"
    assert found["notebooks/01_see.new.ipynb"] == "mine, too"
    assert found["notebooks/01_see.new2.ipynb"] == "four"


def test_learner_who_takes_the_new_version_is_up_to_date(source: Path, work: Path) -> None:
    sync(source, work)
    write(work / NAME, "mine")
    write(source / NAME, "two")
    sync(source, work)
    (work / "notebooks/01_see.new.ipynb").replace(work / NAME)
    write(source / NAME, "three")
    sync(source, work)
    assert texts(work) == texts(source)


def test_deleted_file_comes_back_fresh(source: Path, work: Path) -> None:
    sync(source, work)
    (work / NAME).unlink()
    assert sync(source, work)[0] == f"new      {NAME}"
    assert texts(work) == texts(source)


@pytest.mark.parametrize("record", [None, "", "[1]", '{"notebooks/01'])
def test_without_its_record_nothing_is_replaced(
    source: Path, work: Path, record: str | None
) -> None:
    sync(source, work)
    write(work / NAME, "mine")
    (work / workspace.RECORD).unlink()
    if record is not None:
        write(work / workspace.RECORD, record)
    write(source / "exercises/ex01.ipynb", "newer")
    sync(source, work)
    found = texts(work)
    assert found[NAME] == "mine"
    assert found["exercises/ex01.ipynb"] == "exercise"
    assert found["exercises/ex01.new.ipynb"] == "newer"


def test_hidden_files_are_not_handed_out(source: Path, work: Path) -> None:
    write(source / "notebooks/.ipynb_checkpoints/01_see-checkpoint.ipynb", "old")
    write(source / "notebooks/__pycache__/x.pyc", "")
    write(source / "exercises/README.md", "for those who write exercises")
    sync(source, work)
    assert len(texts(work)) == 3
    assert len(texts(source)) == 6


def test_crash_leaves_the_old_file_whole(
    source: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(source, work)
    before = texts(work)
    write(source / NAME, "two")

    def crash(*_: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="stopped"):
            sync(source, work)
    assert texts(work) == before  # and no scratch file is left
    sync(source, work)
    assert texts(work) == texts(source)
