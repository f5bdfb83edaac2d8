"""In a real browser: JupyterLab as a learner meets it, and pages that all can read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest

from browser import CONTROL, PROGRAM, SHIFT, Browser, browser, until
from classroom import all_tasks
from unfool.notebooks import LESSONS, REPO, Result
from unfool.report import build
from unfool.workspace import sync

PICTURES = REPO / "build" / "screenshots"
AXE = "axe-core@4.14.1"
QUIET = {"fetchNews": "false", "checkForUpdates": False}
NB = "window.opened"
CELLS = f"{NB}.content.model.sharedModel.toJSON().cells"

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium: apt-get install chromium (.ci/run does, as root)"
)


# --------------------------------------------------------------------------------------- JupyterLab


@contextmanager
def lab(work: Path, folder: Path) -> Iterator[str]:
    """JupyterLab on `work`; yields its address."""
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET), encoding="utf-8")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"]
    command += [f"--ServerApp.root_dir={work}", "--ServerApp.port=0", "--allow-root"]
    command += [f"--LabApp.user_settings_dir={folder / 'settings'}", "--IdentityProvider.token=t"]
    command += [f"--LabApp.workspaces_dir={folder / 'workspaces'}"]
    own = {"JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTER_PREFER_ENV_PATH": "1"}
    env = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    try:
        runtime = folder / "runtime"
        found = until(lambda: list(runtime.glob("jpserver-*.json")) if runtime.exists() else [])
        yield f"http://127.0.0.1:{until(lambda: json.loads(found[0].read_text()))['port']}"
    finally:
        server.terminate()  # ends the kernels, too
        server.wait(30)


def open_notebook(page: Browser, address: str, name: str) -> None:
    page.open(f"{address}/lab?token=t&reset")
    until(lambda: page.run("!!window.jupyterapp"))
    app = "window.jupyterapp"
    page.run(f"{app}.restored.then(() => true)")
    opened = f"{app}.commands.execute('docmanager:open', {{path: '{name}', factory: 'Notebook'}})"
    page.run(f"{opened}.then(found => {{ {NB} = found; {app}.shell.activateById(found.id) }})")
    until(lambda: page.run(f"{NB}.sessionContext.session?.kernel?.status === 'idle'"))


def run_all(page: Browser) -> list[dict[str, Any]]:
    """Run all cells to the end; returns the code cells with their outputs."""
    page.run("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    return [cell for cell in page.run(CELLS) if cell["cell_type"] == "code"]


def kinds(cells: list[dict[str, Any]]) -> set[str]:
    """What kinds of outputs there are: "error", "stream", "image/png", …"""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return {o["output_type"] for o in outputs} | {k for o in outputs for k in o.get("data", {})}


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(o.get("text", "")) for o in cell["outputs"])


def smoke(path: Path) -> None:
    """Set the copy's profile to smoke, as a learner may."""
    nb = nbformat.read(path, as_version=4)
    (cell,) = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = cell.source.replace('"classroom"', '"smoke"')
    nbformat.write(nb, path)


def test_a_learner_at_work(tmp_path: Path) -> None:
    work = tmp_path / "work"
    sync(REPO, work)
    smoke(work / "notebooks" / "00_start.ipynb")
    with lab(work, tmp_path) as address, browser(tmp_path / "chromium") as page:
        open_notebook(page, address, "notebooks/00_start.ipynb")
        page.run("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        assert "image/png" not in kinds(page.run(f"{CELLS}.filter(c => c.outputs)"))
        cells = run_all(page)
        assert "error" not in kinds(cells), cells
        assert "image/png" in kinds(cells)
        figure = next(i for i, c in enumerate(page.run(CELLS)) if "image/png" in kinds_of(c))
        page.run(f"{NB}.content.scrollToItem({figure}, 'center')")
        seen = "[...document.querySelectorAll('.jp-RenderedImage img')].filter(i => i.naturalWidth)"
        until(lambda: page.run(f"{seen}.length"))
        page.picture(PICTURES / "lab-00.png")

        open_notebook(page, address, "exercises/ex02_one_step.ipynb")
        assert "error" not in kinds(run_all(page))
        solve_first_task(page)
        page.picture(PICTURES / "lab-ex02.png")
        page.press("s", CONTROL)
        path = work / "exercises" / "ex02_one_step.ipynb"
        until(lambda: "right: ex02_worst_gain" in path.read_text("utf-8"))


def kinds_of(cell: dict[str, Any]) -> set[str]:
    return kinds([cell]) if cell.get("outputs") else set()


def solve_first_task(page: Browser) -> None:
    """Type the answer as a learner does, run both cells by the keyboard, see the check turn."""
    cells = page.run(CELLS)
    place = next(i for i, c in enumerate(cells) if "def worst_gain" in "".join(c["source"]))
    assert printed(cells[place + 1]).startswith("not yet: ex02_worst_gain")
    page.run(f"{NB}.content.activeCellIndex = {place}; {NB}.content.mode = 'edit'")
    until(lambda: page.run("document.activeElement.classList.contains('cm-content')"))
    page.press("a", CONTROL)
    page.type(all_tasks()["ex02_worst_gain"].code.source)
    page.press("Enter", SHIFT)
    page.run(f"{NB}.content.activeCellIndex = {place + 1}")
    page.press("Enter", SHIFT)
    until(lambda: printed(page.run(CELLS)[place + 1]) == "right: ex02_worst_gain\n")


# ------------------------------------------------------------------------------------- for everyone


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which npm fetches."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("no npm, which fetches axe-core: pages were not looked at")
    command = ["npm", "pack", "--silent", AXE]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip("npm can't fetch axe-core: pages were not looked at")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member
        return member.read().decode()


def faults(page: Browser, axe: str, address: str) -> list[str]:
    """Serious and critical faults that axe finds in a page: "rule: first place"."""
    page.open(address)
    page.run(axe)
    found = page.run("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']} ({len(v['nodes'])}): {v['nodes'][0]['html'][:150]}" for v in grave]


BAD = """<!DOCTYPE html><html lang="en"><head><title>t</title></head><body><main><h1>h</h1>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
<p style="color: #bbb; background: #fff">pale</p></main></body></html>"""


def test_pages_have_no_serious_fault(axe: str, tmp_path: Path) -> None:
    names = ["02_one_step", "07_purifier"]
    results = [Result(name, 1.0, ok=True) for name in names]
    report = build(results, LESSONS, tmp_path / "none.jsonl", tmp_path / "report", {})
    (tmp_path / "bad.html").write_text(BAD, encoding="utf-8")
    with browser(tmp_path / "chromium") as page:
        control = faults(page, axe, f"file://{tmp_path / 'bad.html'}")
        assert [fault.split(" ")[0] for fault in control] == ["color-contrast", "image-alt"]
        for path in (report, *(report.parent / f"{name}.html" for name in names)):
            assert faults(page, axe, f"file://{path}") == [], path.name
            page.picture(PICTURES / f"report-{path.stem}.png")
