"""Binder: repo2docker's files in .binder/, which stand before environment.yml at the top."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import course
from unfool.notebooks import find

BINDER = course.HERE / ".binder"


def lessons(script: str) -> list[str]:
    """The lessons that the image is built with networks for."""
    found = re.search(r"unfool run ([\d ]+) --out", script)
    return found.group(1).split() if found else []


def test_what_repo2docker_reads() -> None:
    """Python's version is that of environment.yml; nothing else is installed but by the lock."""
    asked = re.search(r"python=([\d.]+)", (course.HERE / "environment.yml").read_text("utf-8"))
    assert asked is not None
    assert (BINDER / "runtime.txt").read_text("utf-8") == f"python-{asked.group(1)}\n"
    assert sorted(path.name for path in BINDER.iterdir()) == ["postBuild", "runtime.txt"]
    assert os.access(BINDER / "postBuild", os.X_OK)
    names = lessons((BINDER / "postBuild").read_text("utf-8"))
    assert len(find(names)) == len(names) >= 3
    assert lessons("unfool run") == []


@pytest.mark.long
@pytest.mark.skipif(not course.LINUX or not shutil.which("bash"), reason="Binder runs Linux")
def test_the_image_is_built(tmp_path: Path) -> None:
    clone, prefix = tmp_path / "clone", tmp_path / "binders-own"
    course.copy_course(clone, with_solutions=False)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
    own = {"HOME": str(tmp_path), "UV_CACHE_DIR": str(tmp_path / "cache")}  # it is emptied
    env = {**kept, **pip, **own, "NB_PYTHON_PREFIX": str(prefix)}
    done = subprocess.run(
        [clone / ".binder" / "postBuild"], cwd=clone, env=env, capture_output=True, text=True
    )
    if done.returncode and "could not be reached" in done.stderr:
        pytest.skip("no package index, which Binder installs from")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = lessons((BINDER / "postBuild").read_text("utf-8"))
    assert f"{len(names)} ok, 0 FAILED" in done.stdout
    spec = json.loads((prefix / "share/jupyter/kernels/python3/kernel.json").read_text("utf-8"))
    assert spec["argv"][0] == str(clone / ".venv" / "bin" / "python")
    store = clone / "data" / "store"
    assert {"classifier", "purifier"} <= {path.name for path in store.iterdir()}
    assert not (clone / "build").exists()
    assert not list((tmp_path / "cache").rglob("*.whl"))
