"""The HTML report can be read offline, formulas and links included."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from unfool.notebooks import Result, lessons
from unfool.report import Formulas, build, mathml, rebuild, results_table, without_network

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
TEXT = """# What does it see?

[← 00](00_start.ipynb) · [02 →](02_second.ipynb#there) · [the paper](https://example.org/a_b)

Softmax is $e^{z_i} / \\sum_j e^{z_j}$, and *so* is `$code_x$`; it costs \\$5 or $6.

$$x' = x + \\epsilon \\cdot \\mathrm{sign}(\\nabla_x J)$$

<details><summary>Answer</summary>

Because $a < b$.

</details>

```python
price = "$5"; other = "$6"
```
"""


class Fetched(HTMLParser):
    """Collects what a browser would fetch by itself from somewhere else."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = re.findall(r"@import[^;]*|url\(\s*['\"]?(?:https?:)?//[^)]*", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            fetches = name in ("src", "srcset", "data", "poster") or (tag, name) == ("link", "href")
            if fetches and re.match(r"\s*(https?:)?//", value or ""):
                self.found.append(f"{tag} {value}")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    shown = [
        new_output(
            "display_data",
            data={"image/png": PNG, "text/plain": "A dot."},
            metadata={"image/png": {"alt": "A dot."}},
        ),
        new_output(
            "stream", name="stdout", text="Figure 1.\ncheck ok   it is <b>\ncheck no   it\n"
        ),
        new_output("stream", name="stderr", text="a warning with /tmp in it"),
    ]
    code = new_code_cell("check = 1\nprint('$x$')", execution_count=1, outputs=shown)
    one = new_notebook(cells=[new_markdown_cell(TEXT), code])
    two = new_notebook(cells=[new_markdown_cell("# And then?\n\n[← 01](01_first.ipynb)")])
    (root / "executed").mkdir()
    nbformat.write(one, root / "executed/01_first.ipynb")
    nbformat.write(two, root / "executed/02_second.ipynb")
    record = {
        "schema": 1,
        "dataset": "mnist5k",
        "classifier": "anet",
        "attack": "fgsm",
        "device": "cpu",
    }
    record |= {"defense": "pix2pix", "n_attacked": 196, "attack_success": 0.555}
    record |= {"recovered_accuracy": 0.93, "recovered_low": 0.88, "recovered_high": 0.96}
    (root / "records.jsonl").write_text(json.dumps(record) + "\n")
    results = [
        Result("01_first", 3.2, ok=True, drift=["check ok   <a> → check ok   b"]),
        Result("02_second", 1.0, ok=False, error="cell 2: ValueError: bad"),
        Result("03_gone", 1.0, ok=False, error="papermill ended without a word"),
    ]
    about = {"started": "2026-01-01 10:00", "parameters": {"seed": 3}, "machine": "a <laptop>"}
    (root / "run.json").write_text(json.dumps({**about, "results": [vars(r) for r in results]}))
    (root / "report").mkdir()
    (root / "report/old.html").touch()
    page = build(results, root / "executed", root / "records.jsonl", root / "report", about)
    assert page == root / "report/index.html"
    return page.parent


def page(report: Path, name: str) -> str:
    return (report / f"{name}.html").read_text(encoding="utf-8")


def test_nothing_is_fetched(report: Path) -> None:
    pages = list(report.glob("*.html"))
    assert len(pages) == 3
    for path in pages:
        assert Fetched(path.read_text(encoding="utf-8")).found == []


@pytest.mark.parametrize(
    "planted",
    [
        '<script src="https://cdn.example.org/MathJax.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        '<img alt="" src="http://example.org/a.png">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>body { background: url(https://example.org/a.png) }</style>",
    ],
)
def test_what_is_fetched_is_seen(report: Path, planted: str) -> None:
    assert len(Fetched(page(report, "01_first") + planted).found) == 1


def test_formulas_are_mathml_and_code_is_not(report: Path) -> None:
    text = page(report, "01_first")
    formulas = re.findall(r"<math .*?</math>", text)
    assert len(formulas) == 3
    for formula in formulas:
        ElementTree.fromstring(formula)
    assert sum('display="block"' in formula for formula in formulas) == 1
    assert "<code>$code_x$</code>" in text
    assert "it costs $5 or $6." in text
    assert "\\epsilon" not in text
    assert not re.search("[\ufdd0\ufdd1]", text)


@pytest.mark.parametrize("tex", [r"\nosuchcommand x", r"\frac{1}{"])
def test_unreadable_formula_is_shown_as_code(tex: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        mathml(tex, "inline")
    formulas = Formulas("01_first")
    with pytest.warns(UserWarning, match="01_first: .*shown as code"):
        assert formulas.put_back(formulas.take_out(f"a ${tex}$ b")) == f"a <code>{tex}</code> b"


@pytest.mark.parametrize("text", ["it costs $5 and $10", "`$a$` and ``$b`$``", "~~~\n$a$\n~~~\n"])
def test_dollars_that_are_no_formulas(text: str) -> None:
    formulas = Formulas("01_first")
    assert formulas.put_back(formulas.take_out(text)) == text


def test_links_between_notebooks(report: Path) -> None:
    text = page(report, "01_first")
    assert '<a href="02_second.html#there">02 →</a>' in text
    assert ".ipynb" not in text
    assert re.search(r'<span class="absent"[^>]*>← 00</span>', text)
    assert 'href="https://example.org/a_b"' in text
    assert text.count('href="index.html"') == 2
    assert 'rel="next" href="02_second.html"' in text
    assert 'rel="prev" href="01_first.html"' in page(report, "02_second")


def test_outputs(report: Path) -> None:
    text = page(report, "01_first")
    assert '<span class="check ok"><b>check ok</b> it is &lt;b&gt;</span>' in text
    assert '<span class="check bad"><b>check no</b> it</span>' in text
    assert "a warning with" not in text
    assert 'alt="A dot."' in text


def test_index(report: Path) -> None:
    text = page(report, "index")
    for expected in (
        '<a href="01_first.html">What does it see?</a>',
        "check ok   &lt;a&gt; → check ok   b",
        "cell 2: ValueError: bad",
        "<td>03_gone<ul",
        "<dd>a &lt;laptop&gt;</dd>",
        "seed = 3",
        "93.0 <small>[88.0, 96.0]</small>",
        "3 notebooks were run, 1 of them to their end",
    ):
        assert expected in text


def test_report_is_replaced_as_a_whole(report: Path) -> None:
    assert not (report / "old.html").exists()
    (report / "old.html").touch()
    assert rebuild(report.parent) == report / "index.html"
    assert not (report / "old.html").exists()
    assert [p.name for p in report.parent.iterdir() if p.name.startswith(".")] == []


def test_committed_notebooks_make_an_offline_report(tmp_path: Path) -> None:
    notebooks = lessons()
    assert notebooks
    results = [Result(path.stem, 0.0, ok=True) for path in notebooks]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*shown as code")
        build(results, notebooks[0].parent, tmp_path / "none", tmp_path / "report")
    for path in notebooks:
        text = (tmp_path / "report" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert Fetched(text).found == []


def test_variants_of_a_defence_are_told_apart() -> None:
    def row(**settings: object) -> dict[str, object]:
        return {
            "dataset": "d", "classifier": "c", "attack": "a", "defense": "pix2pix",
            "defense_settings": {"mu": 0.0, "skips": True} | settings, "n_attacked": 9,
        }  # fmt: skip

    table = results_table([row(), row(mu=1.0), row(skips=False), row(mu=1.0), row()])
    assert [line[3] for line in table] == ["pix2pix", "pix2pix (mu=1)", "pix2pix (skips=False)"]
    assert [line[3] for line in results_table([{"defense": "none"}])] == ["none"]


def test_a_foreign_page_needs_no_network() -> None:
    fetched = '<script src="https://cdn.example.invalid/mathjax.js"> </script>'
    settings = '<script type="text/x-mathjax-config">\n inlineMath: [["$", "$"]]\n</script>'
    own = "<script>let price = '$5$';</script>"
    code = "<pre>cost = '$x$'</pre>"
    page = f"{fetched}{settings}{own}<p>For $a &lt; b$ and $$c$$, 5 $ each</p>{code}"
    made = without_network(page, "ex")
    assert "src=" not in made
    assert "inlineMath" not in made
    assert own in made
    assert code in made
    assert made.count("<math") == 2
    assert "5 $ each" in made
    hostile = without_network("<p>$&lt;script&gt;alert(1)&lt;/script&gt;$</p>", "ex")
    assert "<script" not in hostile
    assert "<math" in hostile
    assert 'src="https' in page  # the control
