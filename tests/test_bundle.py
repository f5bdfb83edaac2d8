"""The bundle: it holds what it must, and installs and runs without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import course

OFFLINE = ("unshare", "--user", "--map-root-user", "--net", "--")
LO = "ip link set lo up && exec"  # kernels talk over the loopback, which a new network has down


def offline(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a network that holds nothing but this machine."""
    kept = ("PATH", "HOME", "LANG")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env["UV_CACHE_DIR"] = str(folder.parent / "empty-cache")
    full = [*OFFLINE, "sh", "-c", f"{LO} {command}"]
    return subprocess.run(full, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_checkout_asks_the_index_and_a_bundle_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(course, "BUNDLED_STORE", tmp_path / "store")
    monkeypatch.delenv("UNFOOL_SHARED_STORE", raising=False)
    assert course.bundle_env() == {}
    (tmp_path / "wheels").mkdir()
    (tmp_path / "store").mkdir()
    env = course.child_env()
    assert env["UV_NO_INDEX"] == env["PIP_NO_INDEX"] == env["UV_OFFLINE"] == "1"
    assert env["UV_FIND_LINKS"] == env["PIP_FIND_LINKS"] == str(tmp_path / "wheels")
    assert env["UNFOOL_SHARED_STORE"] == str(tmp_path / "store")
    monkeypatch.setenv("UNFOOL_SHARED_STORE", "elsewhere")
    assert course.child_env()["UNFOOL_SHARED_STORE"] == "elsewhere"


def test_what_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    for name in (
        "solutions", "tests", "notebooks", "work", ".git", "data/store", "lib/store", ".hypothesis",
        "results/local", "lib/local",
    ):  # fmt: skip
        (home / name).mkdir(parents=True)
        (home / name / "file").touch()
    (home / ".venv.lock").touch()
    monkeypatch.setattr(course, "HERE", home)
    course.copy_course(tmp_path / "out", with_solutions=False)
    found = {
        p.parent.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/**/file")
    }
    assert found == {"notebooks", "lib/store", "lib/local"}
    assert not (tmp_path / "out" / ".venv.lock").exists()
    course.copy_course(tmp_path / "all", with_solutions=True)
    assert (tmp_path / "all" / "solutions" / "file").exists()


def test_only_finished_networks_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "store"))
    with pytest.raises(course.Trouble, match="make run"):
        course.copy_store(tmp_path / "out")
    for name in ("classifier/key", "building/x", "locks", "damaged/key"):
        (tmp_path / "store" / name).mkdir(parents=True)
    (tmp_path / "store" / "classifier" / "key" / "weights").touch(mode=0o600)
    course.copy_store(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classifier"]
    if os.name != "nt":  # all may read it
        assert (tmp_path / "out" / "classifier" / "key" / "weights").stat().st_mode & 0o044 == 0o044


@pytest.mark.long
@pytest.mark.skipif(not course.LINUX or not shutil.which("ip"), reason="needs Linux and iproute2")
def test_installs_and_runs_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if offline("true", tmp_path).returncode:
        pytest.skip("this machine lets nobody cut off the network (unshare)")
    links = offline("ip -o link", tmp_path).stdout.splitlines()
    assert len(links) == 1  # the loopback
    (tmp_path / "trained" / "classifier").mkdir(parents=True)
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "trained"))
    bundle = tmp_path / "bundle"
    try:
        assert course.verb_bundle(["--out", str(bundle)]) == 0
    except course.Trouble as trouble:
        if "could not be reached" in str(trouble):
            pytest.skip("no package index, which a bundle is filled from")
        raise
    done = offline(f"{sys.executable} course.py run 00 02 07 --profile smoke", bundle)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "3 ok, 0 FAILED" in done.stdout
    python = bundle / ".venv" / "bin" / "python"
    exercise = "exercises/ex02_one_step.ipynb build/ex02.ipynb"
    done = offline(f"{python} -m papermill {exercise} --cwd exercises -k python3", bundle)
    assert done.returncode == 0, done.stderr[-2000:]
    executed = nbformat.read(bundle / "build" / "ex02.ipynb", as_version=4)
    printed = "".join(o.get("text", "") for c in executed.cells for o in c.get("outputs", []))
    assert printed.count("not yet: ex02_") == 6
