"""The house: lock, environments, package, Makefile and licences agree with each other."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import course
import unfool
from benchmarks.peers import PEERS
from unfool.doctor import direct_names, locked_versions

REPO = course.HERE
LOCK = (REPO / "requirements.lock").read_text(encoding="utf-8")
WANTED = (REPO / "requirements.in").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))

TOP = (
    "README.md", "LICENSE", "LICENSE-TEXT", "CITATION.cff", "CONTRIBUTING.md", "course.py",
    "Makefile", "pyproject.toml", "requirements.in", "requirements.lock", "environment.yml",
    ".ci/run", "notebooks", "exercises/README.md", "solutions/README.md", "data/README.md",
    "data/LICENSE", "data/mnist5k.npz", "lib/unfool", "tests",
    "benchmarks/README.md", "requirements-bench.txt", "workflow/README.md", "workflow/Snakefile",
)  # fmt: skip


def missing(root: Path) -> list[str]:
    return [name for name in TOP if not (root / name).exists()]


def test_everything_stands_where_it_belongs(tmp_path: Path) -> None:
    assert missing(REPO) == []
    assert missing(tmp_path) == list(TOP)


# --- the lock -------------------------------------------------------------------------------------

ADDRESS = re.compile(r"://|--(extra-)?index-url|--find-links|^-[if]\b|\s@\s|^-e\b", re.MULTILINE)
PINNED = re.compile(r"^([a-z0-9][a-z0-9.-]*)==\S+( ; .+)?$")


def lock_problems(text: str) -> list[str]:
    """What is wrong with a lock: every requirement is one version with hashes, and no address."""
    problems = [f"address: {found.group()!r}" for found in ADDRESS.finditer(text)]
    for entry in re.sub(r"\s*\\\n\s+", " ", text).splitlines():
        requirement, *hashes = entry.split(" --hash=")
        if not PINNED.match(requirement.strip()):
            problems.append(f"not one version: {requirement!r}")
        elif not hashes:
            problems.append(f"no hash: {requirement}")
        problems += [
            f"odd hash: {value}"
            for value in hashes
            if not re.fullmatch("sha256:[0-9a-f]{64}", value)
        ]
    return problems


def test_lock() -> None:
    assert lock_problems(LOCK) == []
    assert LOCK.count("\n") > 1000


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        ("--index" + "-url https://example.invalid/simple\n", "address"),
        ("--find-links wheels\n", "address"),
        ("six @ file.whl\n", "address"),
        ("six==1.17.0\n", "no hash"),
        ("six>=1.17.0 \\\n    --hash=sha256:" + "0" * 64 + "\n", "not one version"),
        ("six==1.17.0 \\\n    --hash=md5:" + "0" * 32 + "\n", "odd hash"),
    ],
)
def test_doctored_lock_is_seen(planted: str, problem: str) -> None:
    assert any(found.startswith(problem) for found in lock_problems(planted + LOCK))


def pin_problems(requirements: str, lock: str) -> list[str]:
    """What requirements.in asks for and the lock does not hold, or holds in another version."""
    locked = locked_versions(lock)
    pins = locked_versions(requirements)
    problems = [
        f"{name} is not locked" for name in direct_names(requirements) if name not in locked
    ]
    return problems + [
        f"{name}: {locked[name]}, asked for {versions}"
        for name, versions in pins.items()
        if name in locked and locked[name] != versions
    ]


def test_lock_holds_what_is_asked_for() -> None:
    assert pin_problems(WANTED, LOCK) == []
    assert len(direct_names(WANTED)) > 20
    assert pin_problems(WANTED + "no-such-package\n", LOCK) == ["no-such-package is not locked"]
    assert len(pin_problems(WANTED.replace("scipy==", "scipy==9"), LOCK)) == 1


def test_lock_of_the_benchmarks() -> None:
    """Exact versions with hashes of what the course's lock lacks, and of every library compared."""
    extra = (REPO / "requirements-bench.txt").read_text(encoding="utf-8")
    build = (REPO / "benchmarks" / "build-constraints.txt").read_text(encoding="utf-8")
    assert lock_problems(extra) == lock_problems(build) == []
    assert set(locked_versions(extra)) & set(locked_versions(LOCK)) == set()
    compared = {package for _, package in PEERS.values()}
    assert compared - set(locked_versions(LOCK + extra)) == set()
    assert compared - set(locked_versions(LOCK)) == {"adv-lib", "torchattacks"}  # the control


# --- conda ----------------------------------------------------------------------------------------


def environment_problems(text: str, lock: str) -> list[str]:
    """What in environment.yml differs from the lock: only Python and pip come from conda."""
    problems, python, from_pip = [], None, None
    for entry in yaml.safe_load(text)["dependencies"]:
        if isinstance(entry, dict):
            from_pip = entry.get("pip")
        elif match := re.fullmatch(r"python=(\d+\.\d+)", entry):
            python = match.group(1)
        elif entry != "pip":
            name, _, version = entry.partition("=")
            locked = locked_versions(lock).get(name, set())
            if version.strip("=") not in locked:
                problems.append(f"{entry}: the lock has {sorted(locked) or 'no such package'}")
    if from_pip != ["-r requirements.lock"]:
        problems.append(f"pip installs {from_pip}, not the lock")
    if python != "3.11":
        problems.append(f"Python is {python}; the committed outputs are those of 3.11")
    return problems


def test_environment_is_the_lock() -> None:
    text = (REPO / "environment.yml").read_text(encoding="utf-8")
    assert environment_problems(text, LOCK) == []
    for old, new in (
        ("python=3.11", "python=3.13"),
        ("- -r requirements.lock", "- torch"),
        ("  - pip\n", "  - pip\n  - scipy=0.1\n"),
        ("  - pip\n", "  - pip\n  - no-such-package\n"),
    ):
        assert old in text
        assert len(environment_problems(text.replace(old, new, 1), LOCK)) == 1


# --- the package ----------------------------------------------------------------------------------


def undeclared(project: dict[str, Any], requirements: str) -> set[str]:
    """Names that stand only in pyproject.toml or only in requirements.in."""
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return set(direct_names("\n".join(listed))) ^ set(direct_names(requirements))


def test_package_depends_on_what_is_locked() -> None:
    assert undeclared(PROJECT["project"], WANTED) == set()
    assert undeclared(PROJECT["project"], WANTED + "extra\n") == {"extra"}
    assert undeclared(PROJECT["project"], WANTED.replace("scipy", "")) == {"scipy"}


def test_versions_agree() -> None:
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == PROJECT["project"]["version"] == unfool.__version__
    assert PROJECT["project"]["requires-python"] == f">={course.MINIMUM[0]}.{course.MINIMUM[1]}"
    assert citation["references"][0]["doi"] == "10.1155/2020/3932584"


# --- verbs ----------------------------------------------------------------------------------------


def makefile_problems(text: str) -> list[str]:
    """What in the Makefile is more than a line over course.py, or lacks."""
    rules = dict(re.findall(r"^([\w-]+):.*\n((?:\t.*\n?)*)", text, re.MULTILINE))
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    declared = set(" ".join(phony).split())
    problems = [f"{verb} is no rule" for verb in course.VERBS if verb not in rules]
    problems += [f"{rule} is not phony" for rule in rules if rule not in declared]
    for rule, recipe in rules.items():
        more = r"( \"\$\(SUBMISSIONS\)\"| \$\(GRID\) \$\(PROFILE:%=--profile %\))?"
        line = rf"\t@\$\(PYTHON\) course\.py {re.escape(rule)}{more}( \$\(ARGS\))?\n*"
        if not re.fullmatch(line, recipe) or rule not in course.VERBS:
            problems.append(f"{rule} is not one line over course.py")
    return problems


def test_makefile_is_thin() -> None:
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    assert makefile_problems(text) == []
    assert makefile_problems(text.replace("course.py lab", "course.py run")) != []
    assert makefile_problems(text.replace(" doctor lock", " lock")) == ["doctor is not phony"]
    assert makefile_problems(text + "\nmore: ## x\n\t@echo more\n") != []
    assert makefile_problems(re.sub(r"(?m)^test:.*\n.*\n", "", text)) == ["test is no rule"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_ci_runs_the_readme_command() -> None:
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
