"""Slides of the lessons: the cells tagged `slide`, one page per lesson, readable offline.

A markdown cell is a slide; of a code cell only the outputs are shown. Arrow keys, Page Up and Down
turn the slides; printing the page gives one sheet per slide. Nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from unfool.files import write_text
from unfool.notebooks import UsageError, find, outputs
from unfool.report import Formulas, notebook_style, title_of

TAG = "slide"


def export(names: Sequence[str], out: Path, folder: Path | None = None) -> list[Path]:
    """Write `out`/NN_….html for each lesson, with its committed outputs; return the pages.

    Raises:
        UsageError: an unknown name, or a lesson without a tagged cell.
    """
    pages = []
    for path in find(names, folder):
        nb = nbformat.read(path, as_version=4)
        page = out / f"{path.stem}.html"
        write_text(page, _page(title_of(nb) or path.stem, _slides(nb, path.stem)))
        pages.append(page)
    return pages


def _slides(nb: NotebookNode, name: str) -> list[str]:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    found = []
    tagged = [c for c in nb.cells if TAG in c.metadata.get("tags", [])]
    for cell in (part for c in tagged for part in _parts(c)):
        formulas = Formulas(name)
        if cell.cell_type == "markdown":
            cell.source = formulas.take_out(cell.source)
        body, _ = exporter.from_notebook_node(new_notebook(cells=[cell]))
        body = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', formulas.put_back(body))
        found.append(body.replace("<pre>", '<pre tabindex="0">'))
    if not found:
        raise UsageError(f"{name} has no slides: tag cells with '{TAG}' in JupyterLab's inspector")
    return found


def _parts(cell: NotebookNode) -> list[NotebookNode]:
    """A cell for each picture, with what is printed below it: two don't fit on a slide."""
    if cell.cell_type == "markdown":
        return [cell]
    groups: list[list[NotebookNode]] = [[]]
    for output in outputs(cell):
        if _picture(output) and any(map(_picture, groups[-1])):
            groups.append([])
        groups[-1].append(output)
    return [new_code_cell(outputs=group) for group in groups]


def _picture(output: NotebookNode) -> bool:
    return "image/png" in output.get("data", {})


def _page(title: str, slides: Sequence[str]) -> str:
    parts = "".join(
        f'<section tabindex="-1" aria-label="{number} of {len(slides)}">\n{slide}\n'
        f'<p class="number">{number} / {len(slides)}</p></section>\n'
        for number, slide in enumerate(slides, start=1)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{notebook_style()}{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{parts}</main>\n<script>{TURN}</script>\n</body>\n</html>\n"
    )


STYLE = """
html { scroll-snap-type: y proximity; }
body { padding: 0; font-size: 1.35rem; }
main { max-width: none; padding: 0; }
section { min-height: 100vh; scroll-snap-align: start; position: relative; outline: none;
  display: flex; flex-direction: column; justify-content: center; padding: 3rem 1.5rem; }
section > *, section > .cell { width: 100%; max-width: 62rem; margin: 0 auto; }
section img { display: block; max-width: 100%; width: 58rem; max-height: 78vh;
  object-fit: contain; margin: 0 auto; }
h1 { font-size: 3.2rem; } h2 { font-size: 2.2rem; margin-top: 0; }
section :is(pre, summary, table) { font-size: 1.15rem !important; }
section .number { position: absolute; right: 1.5rem; bottom: 1rem; width: auto;
  font: .9rem var(--plain); color: var(--quiet); }
@media print { section { min-height: 0; height: 100vh; break-after: page; } }
"""
TURN = """
const slides = [...document.querySelectorAll('section')];
const here = () => slides.findIndex(s => s.getBoundingClientRect().bottom > innerHeight / 2);
const step = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, ' ': 1, ArrowLeft: -1, ArrowUp: -1,
  PageUp: -1};
addEventListener('keydown', event => {
  const next = slides[here() + (step[event.key] || 0)];
  if (!step[event.key] || !next || event.target.closest('summary, pre')) return;
  event.preventDefault();
  next.scrollIntoView();
});
"""
