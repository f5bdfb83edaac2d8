"""The notebooks look as the course promises, and each rule of that is shown to bite."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import anatomy
from unfool.notebooks import BATCH_UNIT, KERNELSPEC, LANGUAGE_INFO, LESSONS, REPO, clean, lessons

NOTEBOOKS = {path.name: path for path in lessons()}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
UNIT = {name for name in NOTEBOOKS if name.startswith(BATCH_UNIT)}  # is no lesson
FOLDED = "<details><summary>Answer</summary>\n\nBecause.\n\n</details>"


def test_notebooks_found() -> None:
    assert len(NOTEBOOKS) >= 4
    assert len(NOTEBOOKS) == len(list(LESSONS.glob("*.ipynb"))), "a notebook without a number"


@pytest.mark.parametrize("rule", anatomy.RULES)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name: str, rule: str) -> None:
    nb = anatomy.read(NOTEBOOKS[name])
    if name not in UNIT or rule in anatomy.UNIT_RULES:
        assert anatomy.RULES[rule](nb) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_clean(name: str) -> None:
    nb = anatomy.read(NOTEBOOKS[name])
    assert clean(nb) == nb, f"run `unfool run {name[:2]} --update`"


def test_links_and_glossary() -> None:
    notebooks = {n: anatomy.read(path) for n, path in NOTEBOOKS.items() if n not in UNIT}
    assert anatomy.link_problems(notebooks) == []
    assert anatomy.glossary_problems(notebooks) == []


# --------------------------------------------------------------------------- a good small notebook


def markdown(text: str) -> NotebookNode:
    return new_markdown_cell(text)


def code(source: str, *tags: str, prints: str = "", outputs: list | None = None) -> NotebookNode:
    shown = [new_output("stream", name="stdout", text=prints)] if prints else []
    metadata = {"tags": list(tags)} if tags else {}
    return new_code_cell(source, metadata=metadata, outputs=[*(outputs or []), *shown])


def act(number: int) -> list[NotebookNode]:
    figure = new_output(
        "display_data",
        data={"image/png": PNG, "text/plain": "A line."},
        metadata={"image/png": {"alt": "A line."}},
    )
    return [
        markdown(f"## {number}. An act\n\nAn idea about $x$."),
        markdown(f"**Predict.** Which?\n\n- a\n- b\n\n{FOLDED}"),
        code("shown = seed + 1", prints="Figure 1. A line.\n", outputs=[figure]),
        markdown("**What happened.** It rose."),
        code('lab.check(shown > seed, "it rises")', "check", prints="check ok   it rises\n"),
    ]


def good() -> NotebookNode:
    quiz = "\n\n".join(f"{i}. Why?\n\n{FOLDED}" for i in range(1, 6))
    cells = [
        markdown("# What is seen?\n\n[← 01](01_first.ipynb) · [03 →](03_third.ipynb)"),
        markdown(
            "## Before you start\n\n**Goals**\n\n- explain a line\n- measure it\n\n"
            "**You need** 01.\n\n**Time** 20 minutes.\n\n**Compute** 12 s on 2 cores."
        ),
        code('profile = "classroom"\nseed = 0', "parameters"),
        code("lab = Lab(profile=profile, seed=seed)", "setup", prints="lab: ready\n"),
        *act(1),
        *act(2),
        markdown("## Try it\n\nTurn the knob."),
        code("epsilon = 0.1\nprint(epsilon * 2)", "try-it", prints="0.2\n"),
        markdown("## Exercises\n\nNone."),
        markdown(f"## Quiz\n\n{quiz}"),
        markdown("## Summary\n\n- It rises.\n- **Limit.** Only here."),
        code("lab.results()", "results", prints="recovered 93\n"),
        markdown("## Further reading\n\n[A paper](https://example.org)."),
    ]
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
    metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO}
    return new_notebook(cells=cells, metadata=metadata)


def find(nb: NotebookNode, text: str) -> NotebookNode:
    return next(cell for cell in nb.cells if text in cell.source or text in anatomy.tags(cell))


def edit(text: str, old: str, new: str) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        cell = find(nb, text)
        assert old in cell.source
        cell.source = cell.source.replace(old, new)

    return change


def untag(tag: str) -> Callable[[NotebookNode], None]:
    return lambda nb: find(nb, tag).metadata.pop("tags")


def swap(first: str, second: str) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        one, two = nb.cells.index(find(nb, first)), nb.cells.index(find(nb, second))
        nb.cells[one], nb.cells[two] = nb.cells[two], nb.cells[one]

    return change


def show(where: str, **output: object) -> Callable[[NotebookNode], None]:
    kind = str(output.pop("kind"))
    return lambda nb: find(nb, where).outputs.append(new_output(kind, **output))


def alt(text: str) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        find(nb, "shown = ").outputs[0].metadata["image/png"]["alt"] = text

    return change


def set_(**fields: object) -> Callable[[NotebookNode], None]:
    return lambda nb: nb.metadata.update(nbformat.from_dict(fields))


def prints(text: str, line: str) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        find(nb, text).outputs[-1].text = line

    return change


def add_cells(nb: NotebookNode) -> None:
    more = [markdown("More.") for _ in range(20)]
    for place, cell in enumerate(more):
        cell.id = f"more-{place}"
    nb.cells += more


def explain(body: str) -> Callable[[NotebookNode], None]:
    tag = "source:unfool.notebooks:running_name"

    def change(nb: NotebookNode) -> None:
        cell = find(nb, "shown = ")
        cell.source, cell.metadata["tags"] = f"{body}\nshown = seed", [tag]

    return change


SAME = """def running_name(output):
    # ours
    return output.with_name(f".{output.stem}.running.ipynb")
"""

MUTATIONS: list[tuple[str, Callable[[NotebookNode], None]]] = [
    ("title", edit("# What is seen?", "?", ".")),
    ("title", edit("# What is seen?", "01_first", "https://example.org/01_first")),
    ("title", edit("# What is seen?", "[← 01]", "And so on.\n\n[← 01]")),
    ("before_you_start", edit("**Goals**", "explain", "understand")),
    ("before_you_start", edit("**Goals**", "20 minutes", "a while")),
    ("before_you_start", edit("**Goals**", "12 s on 2 cores", "little")),
    ("before_you_start", edit("**Goals**", "**You need**", "You need")),
    ("parameters", edit("parameters", "seed = 0", "seed = int(0)")),
    ("parameters", edit("parameters", "seed = 0", "seed: int | None = 0")),
    ("parameters", edit("parameters", "seed = 0", "seed = 0\nprint()")),
    ("parameters", untag("parameters")),
    ("parameters_read", edit("parameters", "seed = 0", "seed = 0\nsead = 1")),
    ("setup", prints("setup", "one\ntwo\n")),
    ("setup", untag("setup")),
    ("act_numbers", edit("## 2. An act", "## 2.", "## 3.")),
    ("act_structure", edit("**Predict.**", "**Predict.**", "Predict.")),
    ("act_structure", edit("**Predict.**", "<details>", "<p>")),
    ("act_structure", swap("**What happened.**", "check")),
    ("act_structure", edit("**What happened.**", "**What happened.**", "So.")),
    ("act_structure", untag("check")),
    ("idea_length", edit("An idea about", "An idea", "An idea" + " and more" * 60)),
    ("checks", prints("check", "fine\n")),
    ("checks", edit("check", "lab.check(", "print(")),
    ("closing", swap("## Exercises", "## Quiz")),
    ("closing", edit("## Exercises", "## Exercises", "## Tasks")),
    ("try_it", edit("try-it", "epsilon = 0.1", "epsilon = 0.1\nsteps = 3")),
    ("try_it", untag("try-it")),
    ("quiz", edit("## Quiz", "5. Why?", "Why?")),
    ("quiz", edit("## Quiz", "<details>", "<p>")),
    ("summary", edit("## Summary", "**Limit.**", "Limit:")),
    ("results", untag("results")),
    ("code_size", edit("shown = ", "shown", "x = 1\n" * 20 + "shown")),
    ("cell_count", add_cells),
    ("word_count", edit("## Exercises", "None.", "word " * 1300)),
    ("file_size", show("shown = ", kind="stream", name="stdout", text="x" * 1_000_000)),
    ("plain", edit("shown = ", "shown", "%time\nshown")),
    ("plain", edit("shown = ", "shown", "!ls\nshown")),
    ("widgets", set_(widgets={"state": {}})),
    ("network", edit("shown = ", "shown", "import urllib.request\nshown")),
    ("network", edit("## Exercises", "None.", "![a cat](https://example.org/cat.png)")),
    ("absolute_paths", edit("shown = ", "seed + 1", 'open("/home/me/file")')),
    ("absolute_paths", edit("## Exercises", "None.", "See C:\\Users\\me.")),
    ("absolute_paths", prints("results", "saved to /tmp/x.json\n")),
    ("kernel", set_(kernelspec={"name": "my-env"})),
    ("kernel", lambda nb: nb.cells[3].update(id="cell-2")),
    ("committed", set_(papermill={})),
    ("committed", lambda nb: nb.cells[3].metadata.update(execution={})),
    ("committed", show("shown = ", kind="stream", name="stderr", text="careful\n")),
    ("counts", lambda nb: nb.cells[3].update(execution_count=7)),
    ("errors", show("results", kind="error", ename="E", evalue="", traceback=[])),
    ("figures", alt("")),
    ("figures", alt("Another text.")),
    ("figures", lambda nb: find(nb, "shown = ").outputs.pop()),
    ("sources", explain(SAME.replace(".running", ".run"))),
    ("sources", explain("def other(): ...")),
]


def failing(nb: NotebookNode) -> set[str]:
    return {name for name, rule in anatomy.RULES.items() if rule(nb)}


def test_good_notebook_passes() -> None:
    nb = good()
    nbformat.validate(nb)
    assert {name: rule(nb) for name, rule in anatomy.RULES.items() if rule(nb)} == {}


def test_explained_code_may_differ_in_comments_types_and_docstring() -> None:
    nb = good()
    explain(SAME)(nb)
    assert failing(nb) == set()


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_each_rule_bites_alone(number: int) -> None:
    rule, mutate = MUTATIONS[number]
    nb = good()
    mutate(nb)
    assert nb != good()
    assert failing(nb) == {rule}


def test_every_rule_has_a_negative_control() -> None:
    assert {rule for rule, _ in MUTATIONS} == set(anatomy.RULES)


# ------------------------------------------------------------------------------- rules across files


def course() -> dict[str, NotebookNode]:
    table = "| term | meaning | first in |\n|---|---|---|\n| logit | a score | 02 |\n"
    texts = {
        "00_start.ipynb": f"[01 →](01_first.ipynb)\n\n{table}",
        "01_first.ipynb": "[00](00_start.ipynb) [02](02_second.ipynb)\n\n`logit` is code here.",
        "02_second.ipynb": "[01](01_first.ipynb)\n\nA **logit** is a score.",
    }
    return {name: new_notebook(cells=[markdown(text)]) for name, text in texts.items()}


def test_links_between_notebooks() -> None:
    assert anatomy.link_problems(course()) == []
    dead = course()
    dead["02_second.ipynb"].cells[0].source += " [07](07_none.ipynb)"
    assert len(anatomy.link_problems(dead)) == 1
    unlinked = course()
    unlinked["00_start.ipynb"].cells[0].source = "No link."
    assert len(anatomy.link_problems(unlinked)) == 1


def test_glossary() -> None:
    assert anatomy.glossary(course()["00_start.ipynb"]) == {"logit": "02"}
    assert anatomy.glossary_problems(course()) == []
    early = course()
    early["01_first.ipynb"].cells[0].source += " Logits are scores."
    assert "before 02" in anatomy.glossary_problems(early)[0]
    plain = course()
    plain["02_second.ipynb"].cells[0].source = "A logit is a score."
    assert "not set bold" in anatomy.glossary_problems(plain)[0]
    none = copy.deepcopy(course())
    none["00_start.ipynb"].cells[0].source = "No table."
    assert "no glossary" in anatomy.glossary_problems(none)[0]


def test_library_is_where_the_rules_look_for_it() -> None:
    assert anatomy.LIBRARY == REPO / "lib"
