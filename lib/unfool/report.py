"""The HTML report of a run: an index and a page for each executed notebook, readable offline.

Formulas become MathML when the page is built, styles stand in the page, figures are embedded, so
that the folder can be copied to a stick or mailed and nothing is missing.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from unfool.notebooks import Result, UsageError, outputs

if TYPE_CHECKING:
    from nbformat import NotebookNode

STYLE = Path(__file__).with_name("report.css")
PAPERMILL_MARK = "papermill-error-cell-tag"

# Code comes first, so that a dollar in it is passed over; then what a backslash protects.
_MARKED = re.compile(
    r"(?P<code>^(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^(?P=fence)[`~]*[ \t]*$"
    r"|(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
    r"|<(?P<tag>pre|code)\b.*?</(?P=tag)>)"
    r"|(?P<escaped>\\\$)"
    r"|\$\$(?P<block>.+?)\$\$"
    r"|\$(?P<inline>(?!\s)(?:\\.|[^$\\`])+?)(?<!\s)\$(?!\d)"
    r"|(?P<dollar>\$)",
    flags=re.DOTALL | re.MULTILINE,
)


def build(
    results: Sequence[Result],
    executed: Path,
    records: Path,
    out: Path,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report and return its index page.

    Args:
        results: what became of each notebook; pages are made for those that left one.
        executed: folder of the executed notebooks.
        records: JSON lines of the evaluations of this run; may be absent.
        out: folder of the report, replaced as a whole when the new one is complete.
        about: when, profile, machine, versions: shown above the table as they are.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    import nbformat  # here: a batch, which has no notebook to read, need not wait for it

    pages = [result.name for result in results if (executed / f"{result.name}.ipynb").exists()]
    notebooks = {n: nbformat.read(executed / f"{n}.ipynb", as_version=4) for n in pages}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".report.") as temporary:
        new = Path(temporary) / "report"
        new.mkdir()
        for name, nb in notebooks.items():
            text = _notebook_page(name, nb, pages)
            (new / f"{name}.html").write_text(text, encoding="utf-8")
        if records.exists():
            shutil.copy(records, new / "records.jsonl")
        index = _index_page(results, notebooks, *read_records(records), about or {})
        (new / "index.html").write_text(index, encoding="utf-8")
        _swap(new, out, Path(temporary) / "old")
    return out / "index.html"


def rebuild(run: Path) -> Path:
    """Build the report of an earlier run again, from the folder that it wrote.

    Raises:
        UsageError: there is no finished run in that folder.
    """
    if not (run / "run.json").exists():
        raise UsageError(f"no finished run in {run}: `unfool run` makes one")
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    results = [Result(**result) for result in about.pop("results")]
    return build(results, run / "executed", run / "records.jsonl", run / "report", about)


def _swap(new: Path, out: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    new.rename(out)


# ------------------------------------------------------------------------------------ one notebook


def _notebook_page(name: str, nb: NotebookNode, pages: Sequence[str]) -> str:
    from nbconvert import HTMLExporter

    formulas = Formulas(name)
    marked = [cell for cell in nb.cells if PAPERMILL_MARK in cell.metadata.get("tags", [])]
    for cell in marked[:1]:  # its banner at the top; the second mark stands where it stopped
        nb.cells.remove(cell)
    for cell in marked[1:]:
        cell.source = "**The run stopped at the next cell.**"

    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas.take_out(cell.source)
        elif cell.cell_type == "code":
            cell.outputs = outputs(cell)
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(nb)
    body = _badges(_links(formulas.put_back(body), pages))
    body = body.replace("<pre>", '<pre tabindex="0">')  # wide code scrolls, by the keyboard too
    return page(title_of(nb) or name, body, _navigation(name, pages))


def title_of(nb: NotebookNode) -> str:
    """The question in the first heading, without its mark-up; empty if there is none."""
    for cell in nb.cells:
        found = re.search(r"^# +(.+)$", cell.source, flags=re.MULTILINE)
        if cell.cell_type == "markdown" and found:
            return found[1].strip()
    return ""


class Formulas:
    """Takes formulas out of markdown before it is rendered and puts MathML in afterwards.

    Markdown would read `_` and `*` in them as emphasis. `$` in code and `\\$` are left alone.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._kept: list[str] = []

    def take_out(self, markdown: str) -> str:
        """Markdown with a mark in the place of each formula."""
        return _MARKED.sub(self._replace, markdown)

    def put_back(self, page: str) -> str:
        """The rendered page with MathML in the place of each mark."""
        return re.sub(r"\ufdd0(\d+)\ufdd1", lambda found: self._kept[int(found[1])], page)

    def _replace(self, found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        if found["escaped"] or found["dollar"]:
            return self._keep("$")  # nbconvert would pair it with the next one
        if found["block"]:
            return self._keep(self._mathml(found["block"].strip(), "block"))
        return self._keep(self._mathml(found["inline"], "inline"))

    def _keep(self, text: str) -> str:
        self._kept.append(text)
        return f"\ufdd0{len(self._kept) - 1}\ufdd1"

    def _mathml(self, tex: str, display: str) -> str:
        try:
            return mathml(tex, display)
        except ValueError as error:
            warnings.warn(f"{self.name}: {error}; shown as code", stacklevel=2)
            return f"<code>{html.escape(tex)}</code>"


_IN_PAGE = re.compile(
    r"(?P<kept><(?P<tag>pre|code|script|style)\b.*?</(?P=tag)>)"
    r"|\$\$(?P<block>[^$]+?)\$\$|\$(?P<inline>[^$<\n]+?)\$",
    re.DOTALL,
)


def without_network(page: str, name: str) -> str:
    """A foreign exporter's page with MathML for its formulas, and without the scripts it fetches.

    What cannot be turned into MathML is shown as code, with a warning that names `name`.
    """
    formulas = Formulas(name)

    def redraw(found: re.Match[str]) -> str:
        if found["kept"]:
            return found[0]
        tex, display = (found["block"], "block") if found["block"] else (found["inline"], "inline")
        return formulas._mathml(html.unescape(tex).strip(), display)

    scripts = r'<script[^>]*\bsrc="https?:[^"]*"[^>]*>\s*</script>'
    mathjax = r'<script type="text/x-mathjax-config">.*?</script>'
    bare = re.sub(f"{scripts}|{mathjax}", "", page, flags=re.DOTALL)
    return _IN_PAGE.sub(redraw, bare)


def mathml(tex: str, display: str) -> str:
    """A TeX formula as MathML; `display` is "inline" or "block".

    Raises:
        ValueError: the formula, or a command in it, cannot be turned into MathML.
    """
    from latex2mathml.converter import convert

    try:
        made: str = convert(tex, display=display)
        unread = "\\" in "".join(ElementTree.fromstring(made).itertext())
    except Exception as error:  # the converter raises many kinds, with hardly a word in them
        raise ValueError(f"cannot read the formula {tex!r} ({type(error).__name__})") from error
    if unread:
        raise ValueError(f"unknown command in the formula {tex!r}")
    return made


def _links(page: str, pages: Sequence[str]) -> str:
    """Point links between notebooks to their pages; a notebook that was not run gets none."""

    def point(found: re.Match[str]) -> str:
        name, anchor, text = found["name"], found["anchor"] or "", found["text"]
        if name in pages:
            return f'<a href="{name}.html{anchor}">{text}</a>'
        return f'<span class="absent" title="not part of this run">{text}</span>'

    pattern = r'<a href="(?:\./)?(?P<name>\w+)\.ipynb(?P<anchor>#[^"]*)?"[^>]*>(?P<text>.*?)</a>'
    return re.sub(pattern, point, page, flags=re.DOTALL)


def _badges(page: str) -> str:
    """Set check lines in printed text apart: green where the claim held."""

    def badge(found: re.Match[str]) -> str:
        verdict, claim = found["verdict"], found["claim"]
        kind = verdict if verdict in ("ok", "seen") else "bad"
        return f'<span class="check {kind}"><b>check {verdict}</b> {claim}</span>'

    def block(found: re.Match[str]) -> str:
        line = r"^check (?P<verdict>\S+)[ \t]+(?P<claim>.*)$\n?"
        return found[1] + re.sub(line, badge, found[2], flags=re.MULTILINE) + found[3]

    pattern = r'(<div class="[^"]*output_stdout[^"]*">\s*<pre>)(.*?)(</pre>)'
    return re.sub(pattern, block, page, flags=re.DOTALL)


def _navigation(name: str, pages: Sequence[str]) -> str:
    at = pages.index(name)
    links = ['<a href="index.html">All notebooks</a>']
    if at > 0:
        links.insert(0, f'<a rel="prev" href="{pages[at - 1]}.html">← {pages[at - 1]}</a>')
    if at + 1 < len(pages):
        links.append(f'<a rel="next" href="{pages[at + 1]}.html">{pages[at + 1]} →</a>')
    return f'<nav aria-label="Notebooks">{"".join(links)}</nav>'


# ------------------------------------------------------------------------------------------ index


def _index_page(
    results: Sequence[Result],
    notebooks: Mapping[str, NotebookNode],
    records: Sequence[Mapping[str, Any]],
    skipped: Sequence[str],
    about: Mapping[str, Any],
) -> str:
    failed = sum(not result.ok for result in results)
    lead = f"{len(results)} notebooks were run, {len(results) - failed} of them to their end."
    parts = ["<h1>Unfool: a run of the notebooks</h1>", f'<p class="lead">{lead}</p>']
    parts += [facts_html(about, records)]
    parts += ["<h2>Notebooks</h2>", _status_table(results, notebooks)]
    if records:
        parts += [
            "<h2>Results</h2>",
            "<p>Accuracies in percent; in brackets, 95 % Wilson intervals. <i>n</i> images were "
            "attacked; <i>recovered</i> is over the successful attacks only, <i>end to end</i> "
            "over all test images, <i>clean</i> over clean images through the defence.</p>",
            results_html(results_table(records)),
            '<p><a href="records.jsonl">All records of this run</a> (JSON lines).</p>',
        ]
    parts += [skipped_html(skipped)]
    return page("Unfool: a run of the notebooks", "\n".join(parts), "", kind="index")


def facts_html(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """A list of facts, and the devices that the records name."""
    devices = sorted({str(record["device"]) for record in records if record.get("device")})
    facts = {**about, **({"device": ", ".join(devices)} if devices else {})}
    facts = {key: value for key, value in facts.items() if value not in ("", None, {})}
    items = [f"<dt>{escaped(key)}</dt><dd>{escaped(_shown(facts[key]))}</dd>" for key in facts]
    return f'<dl class="facts">{"".join(items)}</dl>' if items else ""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {value[key]}" for key in value)
    return str(value)


def _status_table(results: Sequence[Result], notebooks: Mapping[str, NotebookNode]) -> str:
    rows = []
    for result in results:
        nb = notebooks.get(result.name)
        title = escaped(title_of(nb) if nb else "") or result.name
        name = f'<a href="{result.name}.html">{title}</a>' if nb else title
        status = '<b class="good">ok</b>' if result.ok else '<b class="bad">failed</b>'
        told = [result.error, *result.drift] if result.error else result.drift
        detail = "".join(f"<li>{escaped(line)}</li>" for line in told)
        detail = f'<ul class="detail">{detail}</ul>' if detail else ""
        number = f"<td>{escaped(result.name[:2])}</td><td>{name}{detail}</td>"
        rows.append(
            f'<tr>{number}<td class="num">{result.seconds:.1f} s</td><td>{status}</td></tr>'
        )
    head = '<tr><th></th><th>Question</th><th class="num">Time</th><th>Run</th></tr>'
    return table_html(head, rows)


def results_html(table: Sequence[tuple[str, ...]]) -> str:
    """The rows of `results_table` as an HTML table."""

    def cell(column: int, text: str) -> str:
        share, _, spread = text.partition(" [")
        small = f" <small>[{escaped(spread)}</small>" if spread and column > 4 else ""
        return (
            f'<td class="num">{escaped(share)}{small}</td>'
            if column > 3
            else f"<td>{escaped(text)}</td>"
        )

    heads = [
        f'<th class="num">{c}</th>' if i > 3 else f"<th>{c}</th>" for i, c in enumerate(COLUMNS)
    ]
    rows = ["".join(cell(i, text) for i, text in enumerate(row)) for row in table]
    return table_html(f"<tr>{''.join(heads)}</tr>", [f"<tr>{row}</tr>" for row in rows])


def table_html(head: str, rows: Sequence[str]) -> str:
    """A table of ready rows, which scrolls where the page is narrow."""
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


# ------------------------------------------------------------------------------------------- skin


def page(title: str, body: str, navigation: str = "", kind: str = "lesson") -> str:
    """Return an HTML page in the course's dress, readable offline; `body` is HTML."""
    top = f"<header>{navigation}</header>" if navigation else ""
    foot = f"<footer>{navigation}</footer>" if navigation else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{notebook_style()}</style>\n</head>\n"
        f'<body class="{kind}">\n{top}\n<main>\n{body}\n</main>\n{foot}\n</body>\n</html>\n'
    )


def notebook_style() -> str:
    """The styles of a page that holds a notebook's cells."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="xcode").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    night = f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    return f"{light}\n{night}{STYLE.read_text(encoding='utf-8')}"


def escaped(text: str) -> str:
    """Plain text for HTML."""
    return html.escape(str(text))


# ---------------------------------------------------------------------------- the table of results


NAMES = ("dataset", "classifier", "attack", "defense")
COLUMNS = (*NAMES, "n", "success %", "recovered %", "end to end %", "clean %")


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The evaluations of a run, and a sentence on each line that is none of schema 1.

    A kill may have cut a line short; the table does without it, and says so.
    """
    if not path.exists():
        return [], []
    from unfool.evaluation import read_sound_fields  # not above: it needs torch

    return read_sound_fields(path)


def joined(paths: Sequence[Path]) -> str:
    """The lines of all files that are there; half a line at an end spoils no other file's first."""
    texts = [path.read_text("utf-8") for path in paths if path.exists()]
    return "".join(f"{text}\n" if text and not text.endswith("\n") else text for text in texts)


def skipped_lines(skipped: Sequence[str]) -> list[str]:
    """What is said of lines that are no records: each by name, and how many; [] for none."""
    count = [f"{len(skipped)} lines skipped: mend them or delete them"] if skipped else []
    return [*(f"skipped: {line}" for line in skipped), *count]


def skipped_html(skipped: Sequence[str]) -> str:
    """The same as HTML; "" for none."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in skipped_lines(skipped))
    return f'<h2>Damaged records</h2>\n<ul class="skipped">{items}</ul>\n' if items else ""


def results_table(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows under `COLUMNS`, percentages with their 95 % Wilson intervals, each row once.

    A defence that was measured in several settings bears what differs from its first ones.
    """
    from unfool.evaluation import changes  # not above: it needs torch, which the rest does not

    rows = []
    usual: dict[tuple[str, str], Mapping[str, Any]] = {}
    for record in records:
        names = {key: str(record.get(key) or "–") for key in NAMES}
        settings = record.get("defense_settings") or {}
        first = usual.setdefault((names["dataset"], names["defense"]), settings)
        changed = changes(settings, first)
        names["defense"] += f" ({changed})" if changed else ""
        shares = [
            _percent(record, "attack_success"),
            _percent(record, "recovered_accuracy", "recovered"),
            _percent(record, "end_to_end_accuracy", "end_to_end"),
            _percent(record, "defended_clean_accuracy", "defended_clean"),
        ]
        rows.append((*names.values(), str(record.get("n_attacked", "–")), *shares))
    return list(dict.fromkeys(rows))


def _percent(record: Mapping[str, Any], key: str, interval: str = "") -> str:
    value = record.get(key)
    if value is None:
        return "–"
    low, high = record.get(f"{interval}_low"), record.get(f"{interval}_high")
    spread = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f}{spread}"


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False
) -> str:
    """A table in Markdown, a line each; `right` aligns all columns but the first to the right."""
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def as_text(rows: Sequence[tuple[str, ...]]) -> str:
    """The table in columns, for a terminal."""
    table = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
