"""What this machine has and what is missing: `unfool doctor`, shown in notebook 00.

Works when torch or another package cannot be imported: then that is what it says.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]  # not from artifacts, which needs torch
SETUP = "run `python course.py setup` in the checkout"
FREE_GB = 1.0  # what the store and the reports of a whole classroom run take, and some air
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")

# Where the full sets lie under $UNFOOL_DATA or data/; one of these is enough to find them.
IDX = "train-images-idx3-ubyte"
FULL_SETS = {
    "mnist": (f"MNIST/raw/{IDX}", f"MNIST/raw/{IDX}.gz", IDX, f"{IDX}.gz"),
    "cifar10": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
}


@dataclass(frozen=True)
class Line:
    """One thing looked at. `ok` is False only when something that the course needs is missing."""

    name: str
    value: str
    ok: bool = True
    remedy: str = ""


def report() -> list[Line]:
    """Look at everything that the course depends on, in a fixed order; never raises."""
    looks: dict[str, Callable[[], Line]] = {
        "Python": _python,
        "packages": _packages,
        "torch": _torch,
        "GPU": _gpu,
        "cores": _cores,
        "memory": _memory,
        "digits": _digits,
        "full sets": _full_sets,
        "store": _store,
        "free disk": _free_disk,
    }
    return [_looked_at(name, look) for name, look in looks.items()]


def as_text(lines: list[Line]) -> str:
    """Return the lines as a table for a terminal, remedies beneath, the verdict last."""
    rows = []
    for line in lines:
        rows.append(f"{'ok   ' if line.ok else 'FAULT'}  {line.name:<10} {line.value}")
        if line.remedy:
            rows.append(f"{'':<18} {line.remedy}")
    faults = sum(not line.ok for line in lines)
    if faults == 0:
        rows.append("Everything that the course needs is here.")
    else:
        rows.append(f"{faults} of {len(lines)} need your attention.")
    return "\n".join(rows)


def _looked_at(name: str, look: Callable[[], Line]) -> Line:
    """Look; a package that cannot be imported, or a file that cannot be read, is a finding."""
    try:
        return look()
    except ImportError as error:
        return Line(name, f"cannot be looked at: {error}", ok=False, remedy=SETUP)
    except (OSError, ValueError) as error:
        return Line(name, str(error), ok=False, remedy="mend what the message names")


def _python() -> Line:
    return Line("Python", f"{platform.python_version()} ({sys.executable})")


def locked_versions(lock: str) -> dict[str, set[str]]:
    """Return name → versions in a lock's text; a name with several belongs to several Pythons."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, re.MULTILINE):
        versions.setdefault(_normalised(name), set()).add(version)
    return versions


def direct_names(requirements: str) -> list[str]:
    """Return the names that a requirements.in asks for."""
    return [_normalised(n) for n in re.findall(r"^([A-Za-z0-9._-]+)", requirements, re.MULTILINE)]


def differences(wanted: dict[str, set[str]], names: list[str]) -> list[str]:
    """Return how the installed packages differ from the lock, one phrase for each."""
    found = []
    for name in names:
        locked = " or ".join(sorted(wanted.get(name, ())))
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is missing (lock: {locked})")
            continue
        # A local label such as +cpu names a build, not a version.
        if have.partition("+")[0] not in wanted.get(name, set()):
            found.append(f"{name} {have} (lock: {locked})")
    return found


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages() -> Line:
    names = direct_names((REPO / "requirements.in").read_text(encoding="utf-8"))
    wanted = locked_versions((REPO / "requirements.lock").read_text(encoding="utf-8"))
    wrong = differences(wanted, names)
    if wrong:
        return Line("packages", "; ".join(wrong), ok=False, remedy=SETUP)
    return Line("packages", f"{len(names)} direct ones, in the versions of requirements.lock")


def _torch() -> Line:
    import torch

    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return Line("torch", f"{torch.__version__}, {cuda}")


def _gpu() -> Line:
    import torch

    if not torch.cuda.is_available():
        return Line("GPU", "none: everything runs on the CPU")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Line("GPU", ", ".join(f"{c.name}, {c.total_memory / 1e9:.1f} GB" for c in cards))


def _cores() -> Line:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Line("cores", f"{cores}, of which torch uses {torch.get_num_threads()}")


def _memory() -> Line:
    total = memory_bytes()
    return Line("memory", f"{total / 1e9:.1f} GB" if total else "unknown on this system")


def memory_bytes() -> int | None:
    """Return the machine's memory, or its container's limit if that is less; None if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(total, int(CGROUP_MEMORY.read_text()))
    except (OSError, ValueError):  # no such file, or it says "max"
        return total


def _digits() -> Line:
    from unfool.datasets import load

    data = load("mnist5k")
    counts = f"{len(data.train)} / {len(data.validation)} / {len(data.test)}"
    return Line("digits", f"mnist5k, whole: {counts} to train / validate / test")


def _full_sets() -> Line:
    from unfool.datasets.full import roots

    found = []
    for name, places in FULL_SETS.items():
        where = next((r for r in roots() if any((r / place).exists() for place in places)), None)
        found.append(f"{name} in {where}" if where else f"{name} not here (optional)")
    return Line("full sets", "; ".join(found))


def _store() -> Line:
    from unfool.artifacts import default_root

    root = default_root()
    remedy = "give yourself the right to write there, or set UNFOOL_STORE to another folder"
    if fault := _write_fault(root):
        return Line("store", f"{root} cannot be written: {fault}", ok=False, remedy=remedy)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return Line("store", f"{root}, {size / 1e6:.0f} MB")


def _free_disk() -> Line:
    from unfool.artifacts import default_root

    free = shutil.disk_usage(_nearest(default_root())).free / 1e9
    remedy = (
        "" if free >= FREE_GB else f"free {FREE_GB:.0f} GB, or set UNFOOL_STORE to another disk"
    )
    return Line("free disk", f"{free:.1f} GB where the store lies", free >= FREE_GB, remedy)


def _nearest(path: Path) -> Path:
    """Return the folder itself, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def _write_fault(folder: Path) -> str:
    """Return why a file cannot be made in `folder` (or where it would be made), or ''."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return ""
    except OSError as error:
        return str(error.strerror)
