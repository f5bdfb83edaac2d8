"""What a notebook of the course looks like, as rules: each takes a notebook and lists problems.

`RULES` hold for one notebook alone, `glossary_problems` and `link_problems` for all together.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import statistics
import warnings
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.warnings import DuplicateCellId, MissingIDFieldWarning

from unfool.notebooks import WIDGET, outputs

LIBRARY = Path(__file__).resolve().parents[1] / "lib"
NOTEBOOK_NAME = r"\d\d_\w+\.ipynb"
GOALS_START_WITH = """
apply attack break build calculate change choose classify combine compare compute construct
count critique decide defend define derive describe design detect distinguish draw estimate
evaluate explain expose find fool give identify implement interpret judge justify list
locate make mark measure name order place plot point predict prove rank read recognise
reproduce run say select show sketch solve spell state tell test train translate use verify
weigh write
"""
VERBS = set(GOALS_START_WITH.split())
MAX_PARAMETERS, MAX_LINES, MEDIAN_LINES, MAX_CELLS = 8, 20, 6, 32
MAX_OF_UNIT = 12  # parameters of the batch's unit, which has no acts
MAX_WORDS, MAX_IDEA_WORDS, MAX_BYTES = 1300, 120, 1_000_000
CLOSING = ("## Try it", "## Exercises", "## Quiz", "## Summary", "## Further reading")
NETWORK = {"urllib", "requests", "http", "socket", "ftplib", "aiohttp", "httpx"}


# -------------------------------------------------------------------------------------- helpers


def read(path: Path) -> NotebookNode:
    """Read a notebook as it is: what nbformat would repair with a warning is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingIDFieldWarning)
        warnings.simplefilter("error", DuplicateCellId)
        nb: NotebookNode = nbformat.read(path, as_version=4)
    return nb


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tagged(nb: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in code_cells(nb) if tag in tags(cell)]


def printed_lines(cell: NotebookNode) -> list[str]:
    streams = [o for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    return [line for o in streams for line in o.text.splitlines() if line.strip()]


def heading(cell: NotebookNode) -> str:
    """The first line of a markdown cell if it is a heading, else nothing."""
    first = cell.source.lstrip().split("\n", 1)[0] if cell.cell_type == "markdown" else ""
    return first.strip() if first.startswith("#") else ""


def sections(nb: NotebookNode) -> list[tuple[str, list[NotebookNode]]]:
    """Cells under each `## ` heading; such a heading opens its cell."""
    found: list[tuple[str, list[NotebookNode]]] = []
    for cell in nb.cells:
        if heading(cell).startswith("## "):
            found.append((heading(cell), []))
        if found:
            found[-1][1].append(cell)
    return found


def section(nb: NotebookNode, title: str) -> list[NotebookNode]:
    return next((cells for name, cells in sections(nb) if name == title), [])


def acts(nb: NotebookNode) -> list[tuple[str, list[NotebookNode]]]:
    return [(name, cells) for name, cells in sections(nb) if re.match(r"## \d+\. ", name)]


def text_of(cells: list[NotebookNode]) -> str:
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def prose(markdown: str) -> str:
    """Markdown without code, formulas, tags, addresses of links, and tables."""
    text = re.sub(r"^(```|~~~).*?^\1[ \t]*$", " ", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(`+).+?\1", " ", text, flags=re.DOTALL)
    text = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", " formula ", text, flags=re.DOTALL)
    text = re.sub(r"^\s*\|.*$", " ", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "] ", text)
    return re.sub(r"<[^>]+>", " ", text)


def words(markdown: str) -> int:
    return len(re.findall(r"[^\W_][\w'’.-]*", prose(markdown)))


def tree(cell: NotebookNode) -> ast.Module:
    try:
        return ast.parse(cell.source)
    except SyntaxError:
        return ast.parse("")  # rule `plain` reports it


def assigned(cell: NotebookNode) -> list[tuple[str, ast.expr | None]]:
    """Names and values of the plain assignments at the top level of a cell."""
    found: list[tuple[str, ast.expr | None]] = []
    for node in tree(cell).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.append((node.targets[0].id, node.value))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, node.value))
    return found


def is_literal(node: ast.AST | None) -> bool:
    try:
        ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def names_read(cells: list[NotebookNode]) -> set[str]:
    return {
        node.id
        for cell in cells
        for node in ast.walk(tree(cell))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


# ----------------------------------------------------------------------------- the two first cells


def title(nb: NotebookNode) -> list[str]:
    """Cell 0: a question as the only heading, then one line of links to other notebooks."""
    cell = nb.cells[0]
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if cell.cell_type != "markdown" or len(lines) != 2:
        return ["cell 0 must be a question and one line of links"]
    problems = []
    if not re.fullmatch(r"# [^?]+\?", lines[0]):
        problems.append(f"the title must be one question: {lines[0]!r}")
    links = re.findall(r"\[[^\]]+\]\(([^)]*)\)", lines[1])
    bad = [link for link in links if not re.fullmatch(NOTEBOOK_NAME, link)]
    if not links or bad:
        problems.append(f"the second line must link to notebooks beside this one: {lines[1]!r}")
    return problems


def before_you_start(nb: NotebookNode) -> list[str]:
    """Cell 1: goals as testable verbs, what is needed, minutes, measured compute."""
    source = nb.cells[1].source
    if heading(nb.cells[1]) != "## Before you start":
        return ["cell 1 must be '## Before you start'"]
    labels = ["**Goals**", "**You need**", "**Time**", "**Compute**"]
    places = [source.find(label) for label in labels]
    if -1 in places or places != sorted(places):
        return [f"cell 1 must have, in this order: {', '.join(labels)}"]
    goals, time = source[places[0] : places[1]], source[places[2] : places[3]]
    compute = source[places[3] :]
    bullets = re.findall(r"^\s*[-*] +(.+)$", goals, flags=re.MULTILINE)
    problems = [] if bullets else ["no goals listed"]
    for goal in bullets:
        verb = re.split(r"[\s,]", goal.lower(), maxsplit=1)[0]
        if verb not in VERBS:
            problems.append(f"goal must start with a testable verb, not {verb!r}: {goal!r}")
    problems += [] if re.search(r"\d+ min", time) else ["**Time** must say minutes"]
    problems += [] if re.search(r"\d", compute) else ["**Compute** must be measured"]
    return problems


# ------------------------------------------------------------------------- parameters and set-up


def parameters(nb: NotebookNode) -> list[str]:
    """One cell of at most eight plain literals, all of which papermill sees."""
    from papermill.translators import PythonTranslator

    cells = tagged(nb, "parameters")
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged parameters, must be one"]
    found, statements = assigned(cells[0]), tree(cells[0]).body
    problems = []
    if len(found) != len(statements):
        problems.append("the parameters cell must hold assignments to plain names only")
    most = MAX_PARAMETERS if acts(nb) else MAX_OF_UNIT
    if not 1 <= len(found) <= most:
        problems.append(f"{len(found)} parameters, must be 1 to {most}")
    problems += [f"parameter {n} must be a literal" for n, v in found if not is_literal(v)]
    for node in statements:
        if isinstance(node, ast.AnnAssign) and not isinstance(node.annotation, ast.Name):
            problems.append(f"union or other composed type: {ast.unparse(node)}")
    seen = {p.name for p in PythonTranslator.inspect(cells[0])}
    return problems + [f"papermill does not see parameter {n}" for n, _ in found if n not in seen]


def parameters_read(nb: NotebookNode) -> list[str]:
    """Every parameter is read in a later cell."""
    cells = code_cells(nb)
    start = next((i for i, cell in enumerate(cells) if "parameters" in tags(cell)), None)
    if start is None:
        return []  # rule `parameters` reports it
    used = names_read(cells[start + 1 :])
    return [f"parameter {n} is never read" for n, _ in assigned(cells[start]) if n not in used]


def setup(nb: NotebookNode) -> list[str]:
    """One set-up cell that shows exactly one printed line."""
    cells = tagged(nb, "setup")
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged setup, must be one"]
    shown = outputs(cells[0])
    if len(shown) != 1 or len(printed_lines(cells[0])) != 1:
        return [f"the setup cell must print exactly one line: {printed_lines(cells[0])}"]
    return []


# ----------------------------------------------------------------------------------------- acts


def act_numbers(nb: NotebookNode) -> list[str]:
    """Two to four acts, numbered from 1."""
    numbers = [int(re.match(r"## (\d+)", name)[1]) for name, _ in acts(nb)]  # type: ignore[index]
    if not 2 <= len(numbers) <= 4 or numbers != list(range(1, len(numbers) + 1)):
        return [f"acts must be numbered 1 to 2, 3 or 4: {numbers}"]
    return []


def act_structure(nb: NotebookNode) -> list[str]:
    """Idea, Predict with a folded answer, code, What happened, check: in each act."""
    return [f"{name}: {p}" for name, cells in acts(nb) for p in _act_problems(cells)]


def _act_problems(cells: list[NotebookNode]) -> list[str]:
    def first(label: str) -> int:
        return next((i for i, c in enumerate(cells) if _has(c, label)), -1)

    predict, happened = first("**Predict.**"), first("**What happened.**")
    if predict < 0 or happened < predict:
        return ["must have a cell with **Predict.**, later one with **What happened.**"]
    problems = []
    if not re.search(r"<details.*?<summary.*?</details>", cells[predict].source, re.DOTALL):
        problems.append("the answer to **Predict.** must be folded in <details>")
    between = [c for c in cells[predict:happened] if c.cell_type == "code"]
    if not between:
        problems.append("no code between **Predict.** and **What happened.**")
    if any(c.cell_type == "code" for c in cells[:predict]):
        problems.append("code before **Predict.**: there is nothing left to predict")
    checks = [i for i, c in enumerate(cells) if "check" in tags(c)]
    if checks != [len(cells) - 1] or checks[0] < happened:
        problems.append("must end with its one check cell")
    return problems


def _has(cell: NotebookNode, label: str) -> bool:
    return bool(cell.cell_type == "markdown" and label in cell.source)


def idea_length(nb: NotebookNode) -> list[str]:
    """The idea of an act, what stands before Predict, has 1 to 120 words."""
    problems = []
    for name, cells in acts(nb):
        text = text_of(cells).removeprefix(name).split("**Predict.**")[0]
        if not 1 <= words(text) <= MAX_IDEA_WORDS:
            problems.append(f"{name}: the idea has {words(text)} words, at most {MAX_IDEA_WORDS}")
    return problems


def checks(nb: NotebookNode) -> list[str]:
    """Check cells call `lab.check` and print check lines, nothing else."""
    problems = []
    for cell in tagged(nb, "check"):
        lines = printed_lines(cell)
        bad = [line for line in lines if not re.match(r"check (ok|seen) +\S", line)]
        if "lab.check(" not in cell.source or not lines:
            problems.append(f"a check cell must call lab.check and print: {cell.source[:60]!r}")
        problems += [f"not a check line: {line!r}" for line in bad]
    return problems


# -------------------------------------------------------------------------------------- the end


def closing(nb: NotebookNode) -> list[str]:
    """After the acts: Try it, Exercises, Quiz, Summary, Further reading, in this order."""
    names = [name for name, _ in sections(nb)]
    last_act = max((names.index(name) for name, _ in acts(nb)), default=0)
    if tuple(names[last_act + 1 :]) != CLOSING:
        return [f"after the acts must come {CLOSING}, not {tuple(names[last_act + 1 :])}"]
    return []


def try_it(nb: NotebookNode) -> list[str]:
    """One cell whose knob is one literal that the cell then reads."""
    cells = [cell for cell in section(nb, "## Try it") if "try-it" in tags(cell)]
    if len(cells) != 1 or len(tagged(nb, "try-it")) != 1:
        return ["'## Try it' must have one code cell tagged try-it"]
    knobs = [name for name, value in assigned(cells[0]) if is_literal(value)]
    if len(knobs) != 1 or knobs[0] not in names_read(cells):
        return [f"the knob of Try it must be one literal that is read there: {knobs}"]
    return []


def quiz(nb: NotebookNode) -> list[str]:
    """Five numbered questions, each with a folded answer."""
    text = text_of(section(nb, "## Quiz"))
    folded = len(re.findall(r"<details.*?<summary.*?</details>", text, flags=re.DOTALL))
    asked = re.findall(r"^\s*(?:\*\*|### )?(\d)\. *(?:\*\*)?", text, flags=re.MULTILINE)
    if folded != 5 or asked != list("12345"):
        return [f"quiz: questions 1. to 5. with folded answers; got {asked}, {folded} answers"]
    return []


def summary(nb: NotebookNode) -> list[str]:
    """Bullets, one of which begins with the honest limit."""
    bullets = re.findall(r"^[-*] +(.+)$", text_of(section(nb, "## Summary")), flags=re.MULTILINE)
    limits = [bullet for bullet in bullets if bullet.startswith("**Limit.**")]
    if len(bullets) < 2 or len(limits) != 1:
        return ["the summary must be bullets, one of which begins with **Limit.**"]
    return []


def results(nb: NotebookNode) -> list[str]:
    """One cell tagged results, after the summary."""
    here = [cell for cell in section(nb, "## Summary") if "results" in tags(cell)]
    if len(here) != 1 or len(tagged(nb, "results")) != 1:
        return ["one code cell tagged results must stand between Summary and Further reading"]
    return []


# ----------------------------------------------------------------------------------------- size


def code_size(nb: NotebookNode) -> list[str]:
    """Code cells: median at most 6 lines, none over 20."""
    lengths = [len(cell.source.strip().splitlines()) for cell in code_cells(nb)]
    problems = [f"a code cell of {n} lines, at most {MAX_LINES}" for n in lengths if n > MAX_LINES]
    if lengths and statistics.median(lengths) > MEDIAN_LINES:
        problems.append(f"median code cell {statistics.median(lengths)} lines, at most 6")
    return problems


def cell_count(nb: NotebookNode) -> list[str]:
    """At most 32 cells."""
    return [f"{len(nb.cells)} cells, at most {MAX_CELLS}"] if len(nb.cells) > MAX_CELLS else []


def word_count(nb: NotebookNode) -> list[str]:
    """At most 1,300 words of prose; tables, code and formulas are not counted as such."""
    count = words(text_of(nb.cells))
    return [f"{count} words, at most {MAX_WORDS}"] if count > MAX_WORDS else []


def file_size(nb: NotebookNode) -> list[str]:
    """Less than 1 MB."""
    size = len(json.dumps(nb, indent=1, ensure_ascii=False).encode())  # as nbformat writes it
    return [f"{size} bytes, must be under {MAX_BYTES}"] if size >= MAX_BYTES else []


# ------------------------------------------------------------------------ nothing but plain code


def plain(nb: NotebookNode) -> list[str]:
    """Plain Python: no magics, no shell."""
    problems = []
    for cell in code_cells(nb):
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            problems.append(f"not plain Python (a magic?): {(error.text or '').strip()!r}")
        if "get_ipython" in cell.source:
            problems.append("get_ipython is a magic by another name")
    return problems


def widgets(nb: NotebookNode) -> list[str]:
    """No widgets and no state of them."""
    problems = ["widget state in the metadata"] if "widgets" in nb.metadata else []
    for cell in code_cells(nb):
        if any(WIDGET in output.get("data", {}) for output in cell.outputs):
            problems.append("a widget among the outputs")
        if re.search(r"^\s*(import|from) +ipywidgets", cell.source, flags=re.MULTILINE):
            problems.append("ipywidgets imported")
    return problems


def network(nb: NotebookNode) -> list[str]:
    """No network: neither in code, nor in pictures that a reader's browser would fetch."""
    problems = []
    for cell in code_cells(nb):
        for node in ast.walk(tree(cell)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            problems += [f"{m} imported" for m in modules if m.split(".")[0] in NETWORK]
    pattern = r"!\[[^\]]*\]\(\s*(?:https?:)?//|<(?:img|script|iframe|link)\b[^>]*(?:https?:)?//"
    for cell in nb.cells:
        texts = [cell.source] if cell.cell_type == "markdown" else []
        texts += [str(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", [])]
        if any(re.search(pattern, text) for text in texts):
            problems.append("a picture, script or frame from the network")
    return problems


def absolute_paths(nb: NotebookNode) -> list[str]:
    """No absolute path, in sources or outputs."""
    roots = "home|root|tmp|work|Users|usr|opt|mnt|media|srv|var|private|content|data"
    pattern = rf"(?<![\w.:/~\-])/(?:{roots})/[\w.]+|\b[A-Za-z]:\\+\w+|file://"
    problems = []
    for cell in nb.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
        problems += [
            f"absolute path {found[0]!r}" for t in texts for found in re.finditer(pattern, t)
        ]
    return problems


# ------------------------------------------------------------------------- committed, freshly run


def kernel(nb: NotebookNode) -> list[str]:
    """Kernel python3, language python, format 4.5 with a unique id for every cell."""
    problems = []
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append(f"kernel must be python3: {nb.metadata.get('kernelspec')}")
    if nb.metadata.get("language_info", {}).get("name") != "python":
        problems.append("language_info must name python")
    ids = [cell.get("id") for cell in nb.cells]
    if (nb.nbformat, nb.nbformat_minor) != (4, 5) or None in ids or len(set(ids)) != len(ids):
        problems.append("format must be 4.5, with a unique id for every cell")
    return problems


def committed(nb: NotebookNode) -> list[str]:
    """As `unfool run --update` leaves it: no timings, no injected cell, no standard error."""
    problems = []
    if "papermill" in nb.metadata:
        problems.append("papermill's metadata: commit what `unfool run --update` wrote")
    for cell in nb.cells:
        extra = set(cell.metadata) - {"tags", "nbgrader", "jupyter"}
        problems += [f"cell metadata {key!r}" for key in sorted(extra)]
        problems += ["an injected-parameters cell"] if "injected-parameters" in tags(cell) else []
        if any(o.get("name") == "stderr" for o in cell.get("outputs", [])):
            problems.append("standard error among the outputs")
    return problems


def counts(nb: NotebookNode) -> list[str]:
    """Run freshly from top to bottom: counts 1 to N."""
    found = [cell.execution_count for cell in code_cells(nb)]
    if found != list(range(1, len(found) + 1)):
        return [f"not freshly run from top to bottom: {found}"]
    return []


def errors(nb: NotebookNode) -> list[str]:
    """No error among the outputs, and no cell that is allowed one (papermill would stop at it)."""
    problems = []
    for cell in code_cells(nb):
        problems += [f"error output {o.ename}" for o in cell.outputs if o.output_type == "error"]
        problems += ["tag raises-exception: use try"] if "raises-exception" in tags(cell) else []
    return problems


# -------------------------------------------------------------------------------------- figures


def figures(nb: NotebookNode) -> list[str]:
    """Every picture is a PNG with alt text, followed by a printed caption."""
    problems = []
    for cell in code_cells(nb):
        shown = outputs(cell)
        for output, after in zip_longest(shown, shown[1:]):
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            if kinds:
                problems += _figure_problems(output, after, kinds)
    return problems


def _figure_problems(
    output: NotebookNode, after: NotebookNode | None, kinds: list[str]
) -> list[str]:
    problems = [] if kinds == ["image/png"] else [f"a picture must be a PNG: {kinds}"]
    alt = output.metadata.get("image/png", {}).get("alt", "")
    if not alt.strip() or output.data.get("text/plain") != alt:
        problems.append(f"a picture needs alt text, also as its text/plain: {alt!r}")
    if "image/png" in kinds and base64.b64decode(output.data["image/png"])[1:4] != b"PNG":
        problems.append("image/png is no PNG")
    if after is None or after.output_type != "stream" or not after.text.strip():
        problems.append("a picture must be followed by a printed caption")
    return problems


# ----------------------------------------------------------------------- code that is explained


def sources(nb: NotebookNode) -> list[str]:
    """Code tagged `source:module:name` is the library's, docstrings, types and comments aside."""
    problems = []
    for cell in code_cells(nb):
        for tag in tags(cell):
            if tag.startswith("source:"):
                problems += _source_problems(cell, tag)
    return problems


def _source_problems(cell: NotebookNode, tag: str) -> list[str]:
    _, module, name = [*tag.split(":"), "", ""][:3]
    path = LIBRARY.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return [f"{tag}: no such module"]
    library = _definition(ast.parse(path.read_text(encoding="utf-8")), name)
    shown = _definition(tree(cell), name.rsplit(".", 1)[-1])
    if library is None or shown is None:
        where = "library" if library is None else "cell"
        return [f"{tag}: not defined in the {where}"]
    if _bare(library) != _bare(shown):
        return [f"{tag}: differs from the library; there it reads\n{_bare(library)}"]
    return []


def _definition(where: ast.AST, name: str) -> ast.AST | None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    head, _, rest = name.partition(".")
    for node in getattr(where, "body", []):
        if isinstance(node, kinds) and node.name == head:
            return _definition(node, rest) if rest else node
    return None


def _bare(node: ast.AST) -> str:
    node = ast.parse(ast.unparse(node)).body[0]  # a copy; comments are gone
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            inner.returns = None
        if isinstance(inner, ast.arg):
            inner.annotation = None
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            ast.get_docstring(inner) is not None
        ):
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.unparse(_Unannotated().visit(node))


class _Unannotated(ast.NodeTransformer):
    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


# ---------------------------------------------------------------------------- all notebooks at once


def link_problems(notebooks: Mapping[str, NotebookNode]) -> list[str]:
    """Links to notebooks lead somewhere; the line of links names both neighbours.

    Args:
        notebooks: file name → notebook.
    """
    problems, names = [], sorted(notebooks)
    for place, name in enumerate(names):
        for cell in notebooks[name].cells:
            links = re.findall(r"\]\((\d\d_\w+\.ipynb)", cell.source)
            problems += [f"{name}: no notebook {t}" for t in links if t not in notebooks]
        for other in names[max(place - 1, 0) : place + 2]:
            if other != name and f"]({other})" not in notebooks[name].cells[0].source:
                problems.append(f"{name}: its first cell must link to its neighbour {other}")
    return problems


def glossary(nb: NotebookNode) -> dict[str, str]:
    """Term → number of the notebook where it is first used, from the table in notebook 00."""
    table = r"^\| *term *\| *meaning *\| *first in *\|$\n^\|[-| :]+\|$\n((?:^\|.*\|$\n?)+)"
    found = re.search(table, text_of(nb.cells), flags=re.MULTILINE | re.IGNORECASE)
    rows = found[1].strip().splitlines() if found else []
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    numbers = [re.search(r"\d\d", row[-1]) for row in cells]
    return {
        row[0].strip("*` "): number[0] for row, number in zip(cells, numbers, strict=True) if number
    }


def glossary_problems(notebooks: Mapping[str, NotebookNode]) -> list[str]:
    """A term is bold where it is first used, and no earlier lesson uses it in prose."""
    by_number = {name[:2]: text_of(nb.cells) for name, nb in sorted(notebooks.items())}
    start = next((nb for name, nb in notebooks.items() if name.startswith("00_")), None)
    terms = glossary(start) if start else {}
    problems = [] if terms else ["no glossary in 00: a table of term | meaning | first in"]
    for term, first in terms.items():
        word = rf"(?<![\w-]){re.escape(term)}(?:e?s)?(?![\w-])"
        if first in by_number and not re.search(
            rf"\*\*{word}\*\*", by_number[first], flags=re.IGNORECASE
        ):
            problems.append(f"glossary: **{term}** is not set bold in {first}")
        for number, text in by_number.items():
            if "01" <= number < first and re.search(word, prose(text), flags=re.IGNORECASE):
                problems.append(f"glossary: {term!r} is used in {number}, before {first}")
    return problems


RULES: dict[str, Callable[[NotebookNode], list[str]]] = {
    rule.__name__: rule
    for rule in (
        title,
        before_you_start,
        parameters,
        parameters_read,
        setup,
        act_numbers,
        act_structure,
        idea_length,
        checks,
        closing,
        try_it,
        quiz,
        summary,
        results,
        code_size,
        cell_count,
        word_count,
        file_size,
        plain,
        widgets,
        network,
        absolute_paths,
        kernel,
        committed,
        counts,
        errors,
        figures,
        sources,
    )
}

UNIT_RULES = tuple(  # of the batch's unit, which is no lesson
    rule.__name__
    for rule in (
        parameters, parameters_read, setup, cell_count, word_count, file_size, plain, widgets,
        network, absolute_paths, kernel, committed, counts, errors, figures, sources,
    )
)  # fmt: skip
