"""A builder whose code changes must raise its VERSION, or the store would hand out stale results.

`builder_versions.json` holds each builder's VERSION and the sha256 of its code, comments and
docstrings dropped. After a change: raise the VERSION and run

    python tests/test_versions.py --update

which refuses a change of code at an unchanged VERSION, unless `--same-result` says that what is
built stays the same, bit for bit.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "lib" / "unfool"
TABLE = Path(__file__).with_name("builder_versions.json")
COMMAND = "python tests/test_versions.py --update"

ROUNDS = [
    "attacks/_rounds.py", "attacks/_descent.py", "attacks/_pool.py", "inputs.py",
]  # fmt: skip

# Builder -> the name of its version, and the files whose code decides what it builds.
BUILDERS: dict[str, tuple[str, list[str]]] = {
    "classifiers": ("VERSION", ["classifiers.py"]),
    "training": ("VERSION", ["training.py"]),
    "attacks.sign": ("VERSION", ["attacks/sign.py", "inputs.py"]),
    "attacks.deepfool": (
        "VERSION", ["attacks/deepfool.py", "attacks/_pool.py", "inputs.py"],
    ),
    "attacks.jsma": ("VERSION", ["attacks/jsma.py", "attacks/_pool.py", "inputs.py"]),
    "attacks.carlini_wagner": (
        "VERSION",
        ["attacks/carlini_wagner.py", "attacks/_descent.py", "attacks/_pool.py",
         "inputs.py"],
    ),
    "attacks.carlini_wagner_l0": ("VERSION", ["attacks/carlini_wagner_l0.py", *ROUNDS]),
    "attacks.carlini_wagner_linf": ("VERSION", ["attacks/carlini_wagner_linf.py", *ROUNDS]),
    "attacks.lbfgs": (
        "VERSION",
        ["attacks/lbfgs.py", "attacks/_descent.py", "attacks/_pool.py", "inputs.py"],
    ),
    "defenses.denoiser": ("VERSION", ["defenses/denoiser.py"]),
    "attacks.ead": (
        "VERSION",
        [
            "attacks/ead.py", "attacks/_nearest.py", "attacks/_descent.py",
            "attacks/carlini_wagner.py",
            "attacks/_pool.py", "inputs.py",
        ],
    ),
    "attacks.ddn": (
        "VERSION",
        [
            "attacks/ddn.py", "attacks/_nearest.py", "attacks/_descent.py",
            "attacks/deepfool.py", "attacks/_pool.py", "inputs.py",
        ],
    ),
    "attacks.fmn": (
        "VERSION",
        [
            "attacks/fmn.py", "attacks/_nearest.py", "attacks/_descent.py",
            "inputs.py",
        ],
    ),
    "attacks.apgd": (
        "VERSION",
        ["attacks/apgd.py", "attacks/_draws.py", "attacks/_descent.py", "attacks/sign.py",
         "inputs.py"],
    ),
    "attacks.black_box": (
        "VERSION",
        ["attacks/black_box.py", "attacks/_draws.py", "attacks/_descent.py", "attacks/sign.py",
         "inputs.py"],
    ),
    "attacks.square": (
        "VERSION",
        ["attacks/square.py", "attacks/_draws.py", "attacks/_descent.py", "inputs.py"],
    ),
    "defenses.pix2pix": ("VERSION", ["defenses/pix2pix.py"]),
    "defenses.finetuned": ("VERSION", ["defenses/finetuned.py"]),
    "defenses.wgan_gp": ("VERSION", ["defenses/wgan_gp.py"]),
    "defenses.adversarial_training": ("VERSION", ["defenses/adversarial_training.py"]),
    "defenses.ape_gan": ("VERSION", ["defenses/ape_gan.py"]),
    "defenses.magnet": ("VERSION", ["defenses/magnet.py"]),
    "datasets.digits": ("MNIST_M_VERSION", ["datasets/digits.py", "datasets/base.py"]),
    "datasets.full": ("CIFAR10_VERSION", ["datasets/full.py", "datasets/base.py"]),
    "datasets.folder": ("VERSION", ["datasets/folder.py", "datasets/base.py"]),
}  # fmt: skip
Entry = dict[str, Any]  # {"version": int, "code": sha256}


class _Bare(ast.NodeTransformer):
    """Drop docstrings, the VERSION itself, and how this Python spells an f-string."""

    def __init__(self, version: str) -> None:
        self.version = version

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [line for line in body if not self._dropped(line)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
        if isinstance(node, ast.JoinedStr):
            return ast.Call(ast.Name("f", ast.Load()), node.values, [])
        if isinstance(node, ast.FormattedValue):
            form = [node.format_spec] if node.format_spec else []
            return ast.Tuple([node.value, ast.Constant(node.conversion), *form], ast.Load())
        return node

    def _dropped(self, line: ast.AST) -> bool:
        if isinstance(line, ast.Expr):
            return isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
        return assigned(line) == self.version


def assigned(line: ast.AST) -> str:
    """Name that a line assigns to, or ""."""
    targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else ""


def code_of(source: str, version: str) -> str:
    """Source without what cannot change a result: comments, layout, docstrings, its version."""
    return ast.unparse(ast.fix_missing_locations(_Bare(version).visit(ast.parse(source))))


def version_of(source: str, name: str) -> int:
    for line in ast.parse(source).body:
        if assigned(line) == name:
            value: int = ast.literal_eval(line.value)  # type: ignore[attr-defined]
            return value
    raise ValueError(f"no {name} in the source")


def entry_of(sources: list[str], version: str) -> Entry:
    code = "\n".join(code_of(source, version) for source in sources)
    return {
        "version": version_of(sources[0], version),
        "code": hashlib.sha256(code.encode()).hexdigest(),
    }


def found() -> dict[str, Entry]:
    return {
        builder: entry_of([(LIBRARY / f).read_text("utf-8") for f in files], name)
        for builder, (name, files) in BUILDERS.items()
    }


def stale(accepted: dict[str, Entry], now: dict[str, Entry]) -> list[str]:
    """Builders whose code changed while their VERSION did not."""
    return [
        builder
        for builder, entry in now.items()
        if builder in accepted
        and entry["code"] != accepted[builder]["code"]
        and entry["version"] == accepted[builder]["version"]
    ]


def complaints(accepted: dict[str, Entry], now: dict[str, Entry]) -> list[str]:
    """What to do for each builder that is not as accepted."""
    old = stale(accepted, now)
    unfiled = [b for b in now.keys() | accepted.keys() if now.get(b) != accepted.get(b)]
    return [
        f"unfool.{builder}: the code changed and {BUILDERS[builder][0]} did not; raise it and run "
        f"`{COMMAND}` (or add --same-result if what it builds stays the same, bit for bit)"
        if builder in old
        else f"unfool.{builder}: not as filed in {TABLE.name}; run `{COMMAND}`"
        for builder in sorted(unfiled)
    ]


def update(
    accepted: dict[str, Entry], now: dict[str, Entry], same_result: bool
) -> dict[str, Entry]:
    """The table to file now; refuses a change of code at an unchanged version."""
    old = stale(accepted, now)
    if old and not same_result:
        raise SystemExit("refused:\n" + "\n".join(c for c in complaints(accepted, now)))
    return now


def filed() -> dict[str, Entry]:
    table: dict[str, Entry] = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {}
    return table


# --- the test -------------------------------------------------------------------------------------


def test_every_builders_code_is_the_one_filed_with_its_version() -> None:
    assert complaints(filed(), found()) == []


def versions_in(library: Path) -> set[str]:
    return {
        ".".join(path.relative_to(library).with_suffix("").parts)
        for path in library.rglob("*.py")
        for line in ast.parse(path.read_text("utf-8")).body
        if assigned(line) == "VERSION" or assigned(line).endswith("_VERSION")
    }


def test_every_module_with_a_version_is_filed() -> None:
    assert versions_in(LIBRARY) == BUILDERS.keys()


# --- that it can fail -----------------------------------------------------------------------------

SOURCE = '''"""What it makes."""
VERSION = 3
"""Raised when it changes."""
RATE = 0.5  # half


def make(x: int) -> str:
    """Make it."""
    # say how much
    return f"{x * RATE:.2f} of {x!r}"


class Thing:
    """Only words."""
'''


def entry(source: str) -> dict[str, Entry]:
    return {"training": entry_of([source], "VERSION")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # half", "  # one half"),
        ("    # say how much\n", ""),
        ('"""Make it."""', '"""Make it, and tell."""'),
        ('    """Make it."""\n', ""),
        ('"""What it makes."""\n', ""),
        ('"""Raised when it changes."""\n', ""),
        ("def make(x: int) -> str:", "def make(\n    x: int,\n) -> str:"),
    ],
)
def test_words_and_layout_do_not_count(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert entry(SOURCE.replace(old, new)) == entry(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.5", "RATE = 0.25"), ("x * RATE", "RATE * x"), (":.2f", ":.3f"), ("!r", "!s"),
        (" of ", " for "), ("def make(x: int)", "def make(x: int = 1)"), ("class Thing", "class T"),
    ],
)  # fmt: skip
def test_doctored_code_is_seen_and_refused(old: str, new: str) -> None:
    doctored = SOURCE.replace(old, new)
    (complaint,) = complaints(entry(SOURCE), entry(doctored))
    assert "unfool.training: the code changed and VERSION did not" in complaint
    assert COMMAND in complaint
    with pytest.raises(SystemExit, match=r"unfool\.training"):
        update(entry(SOURCE), entry(doctored), same_result=False)
    assert update(entry(SOURCE), entry(doctored), same_result=True) == entry(doctored)
    raised = doctored.replace("VERSION = 3", "VERSION = 4")
    (complaint,) = complaints(entry(SOURCE), entry(raised))
    assert "not as filed" in complaint
    assert update(entry(SOURCE), entry(raised), same_result=False) == entry(raised)


def test_a_builder_that_is_not_filed_is_named() -> None:
    (complaint,) = complaints({}, entry(SOURCE))
    assert "unfool.training: not as filed" in complaint


def test_a_new_version_alone_must_be_filed() -> None:
    raised = SOURCE.replace("VERSION = 3", "VERSION = 4")
    assert entry(raised)["training"]["code"] == entry(SOURCE)["training"]["code"]
    assert complaints(entry(SOURCE), entry(raised))


def test_a_version_that_is_not_filed_is_found(tmp_path: Path) -> None:
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "new.py").write_text("VERSION: int = 1\n", encoding="utf-8")
    (tmp_path / "old.py").write_text("def f():\n    VERSION = 1\n", encoding="utf-8")
    assert versions_in(tmp_path) == {"attacks.new"}


def main() -> None:
    parser = argparse.ArgumentParser(description="File the versions and code of the builders.")
    parser.add_argument("--update", action="store_true", required=True)
    parser.add_argument("--same-result", action="store_true", help="the code builds the same bits")
    table = update(filed(), found(), parser.parse_args().same_result)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    versions = ", ".join(f"{builder} {entry['version']}" for builder, entry in table.items())
    print(f"{TABLE.name}: {versions}")


if __name__ == "__main__":
    sys.exit(main())
