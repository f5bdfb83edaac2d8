"""Slides: the tagged cells, nothing fetched, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from unfool.notebooks import LESSONS, UsageError, find, write
from unfool.slides import TAG, export

FETCHED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=(?![\"']?data:)", re.IGNORECASE)


def pictures(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def test_every_lesson_has_slides(tmp_path: Path) -> None:
    pages = export([], tmp_path)
    assert [page.stem for page in pages] == [path.stem for path in find()]
    for page in pages:
        text = page.read_text("utf-8")
        nb = nbformat.read(LESSONS / f"{page.stem}.ipynb", as_version=4)
        tagged = [c for c in nb.cells if TAG in c.metadata.get("tags", [])]
        assert text.count("<section ") == sum(max(1, pictures(c)) for c in tagged)
        assert len(tagged) >= 5
        assert FETCHED.findall(text) == []
        assert "<img" in text
    assert FETCHED.findall('<script src="https://example.invalid/x.js">')  # the control


def test_what_is_on_a_slide(tmp_path: Path) -> None:
    shown = new_output("stream", name="stdout", text="seen\n")
    cells = [
        new_markdown_cell("# Title, $x^2$", metadata={"tags": [TAG]}),
        new_markdown_cell("hidden text"),
        new_code_cell("hidden_code()", outputs=[shown], metadata={"tags": [TAG]}),
    ]
    write(new_notebook(cells=cells), tmp_path / "01_one.ipynb")
    (page,) = export(["01"], tmp_path / "out", tmp_path)
    text = page.read_text("utf-8").split("<main>")[1]
    assert "seen" in text
    assert "<math" in text
    assert "hidden" not in text
    write(new_notebook(cells=cells[1:2]), tmp_path / "02_two.ipynb")
    with pytest.raises(UsageError, match="has no slides"):
        export(["02"], tmp_path / "out", tmp_path)


def test_a_slide_for_each_picture(tmp_path: Path) -> None:
    """With what is printed before the first, and below each."""
    image = new_output("display_data", data={"image/png": "AAAA"})
    outputs = [new_output("stream", name="stdout", text=f"text {n}\n") for n in range(3)]
    mixed = [outputs[0], image, outputs[1], image, outputs[2]]
    cell = new_code_cell("", outputs=mixed, metadata={"tags": [TAG]})
    write(new_notebook(cells=[cell]), tmp_path / "01_one.ipynb")
    (page,) = export(["01"], tmp_path / "out", tmp_path)
    slides = page.read_text("utf-8").split("<section ")[1:]
    assert [[n for n in range(3) if f"text {n}" in slide] for slide in slides] == [[0, 1], [2]]
