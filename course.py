#!/usr/bin/env python3
"""Set up and run the course, with nothing but Python 3.11+ and its standard library.

    python3 course.py run       the notebooks, one line each, and an HTML report
    python3 course.py help      everything else

The first call makes the folder .venv; later calls find it and start at once. This file must still
*parse* on an old Python 3, so that it can say what is wrong: no `match`, no `:=`.
"""

import sys

MINIMUM = (3, 11)


def too_old(version):
    """One sentence for a Python that is too old, or None."""
    if tuple(version[:2]) >= MINIMUM:
        return None
    return (
        f"course.py: Unfool needs Python 3.11 or newer; {sys.executable} is Python "
        f"{version[0]}.{version[1]}. Install a newer one (from your system's packages or "
        "python.org) and call it by its name: python3.11 course.py ..."
    )


if too_old(sys.version_info):
    sys.exit(too_old(sys.version_info))

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
LOCK = HERE / "requirements.lock"
STAMP = VENV / "unfool-setup.txt"  # written last: without it .venv is unfinished
BUSY = HERE / ".venv.lock"
LINUX = sys.platform.startswith("linux")
NEEDED_GB = 6.0 if LINUX else 2.5  # .venv measures 5.2 GB on Linux (CUDA libraries come along)
BENCH_VENV = HERE / ".venv-bench"  # the libraries that only benchmarks need; .venv stays as it is
BENCH_PYTHON = BENCH_VENV / BIN.name / PYTHON.name
BENCH_LOCK = HERE / "requirements-bench.txt"
BENCH_BUILD = HERE / "benchmarks" / "build-constraints.txt"  # visdom needs an old setuptools
BENCH_STAMP = BENCH_VENV / STAMP.name
WHEELS = HERE / "wheels"  # in a bundle: everything is installed from here, without a network
BUNDLED_STORE = HERE / "store"  # in a bundle: trained networks, only read
NOT_BUNDLED = {
    ".git",
    ".venv",
    ".venv-bench",
    ".venv.lock",
    ".hypothesis",
    "build",
    "work",
    "solutions",
    "tests",
    "wheels",
    "store",
}
HEARTBEAT_SECONDS = 15.0
KERNEL_ENV = {  # of every notebook's kernel
    # Threads that wait asleep instead of spinning: where another program wants a core too, training
    # is several times as fast; on an idle machine it makes no difference that we could measure.
    "OMP_WAIT_POLICY": "PASSIVE",
    # glibc keeps freed memory instead of handing large blocks back and zeroing them anew at every
    # layer. Other C libraries ignore these two names.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
CACHE_HINT = "what has been downloaded is kept"


class Trouble(Exception):
    """Something that the user can mend; its text is all that is printed."""


# --- the environment of everything that is started ------------------------------------------------


def child_env(**more: str) -> dict[str, str]:
    """Environment for a child: the .venv first, bytecode allowed, nothing of the user's site."""
    env = dict(os.environ)
    # Without bytecode every kernel compiles torch anew; PYTHONHOME breaks any venv.
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME"):
        env.pop(name, None)
    env["PATH"] = str(BIN) + os.pathsep + env.get("PATH", "")
    env["VIRTUAL_ENV"] = str(VENV)
    env["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel in the user's home wins over ours
    env["PYTHONNOUSERSITE"] = "1"
    env["PYTHONUTF8"] = "1"
    env["PIP_USER"] = "0"
    env.update(bundle_env())
    env.update(more)
    return env


def bundle_env() -> dict[str, str]:
    """What makes a bundle need nothing from outside; empty in a checkout."""
    env = {}
    if WHEELS.is_dir():
        env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS)}
        env |= {"UV_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_FIND_LINKS": str(WHEELS)}
    if BUNDLED_STORE.is_dir() and "UNFOOL_SHARED_STORE" not in os.environ:
        env["UNFOOL_SHARED_STORE"] = str(BUNDLED_STORE)
    return env


def call(command: list[str], **env: str) -> int:
    """Run in the checkout, output straight to the terminal; returns the exit code.

    Ctrl-C reaches the child by itself; SIGTERM, as of a queue or a service, is handed on to it.
    """
    sys.stdout.flush()
    with subprocess.Popen(command, cwd=HERE, env=child_env(**env)) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child got it too: let it end what it does
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def heartbeat(stop: threading.Event) -> None:
    """Every few seconds a sign of life with what has been written to the disk so far."""
    started, free = time.monotonic(), shutil.disk_usage(HERE).free
    while not stop.wait(HEARTBEAT_SECONDS):
        written = max(0, free - shutil.disk_usage(HERE).free) / 1e9
        print(f"      ... {time.monotonic() - started:.0f} s, {written:.1f} GB written", flush=True)


def step(command: list[str], **env: str) -> str:
    """Run one command of the set-up and return its output; its large downloads are shown.

    Raises:
        Trouble: with the end of the output, the likely cause and the remedy.
    """
    lines: list[str] = []
    stop = threading.Event()
    threading.Thread(target=heartbeat, args=(stop,), daemon=True).start()
    # close_fds=False hands on the lock of the set-up (see `exclusive`).
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    decoding = {"text": True, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(
        command, cwd=HERE, env=child_env(**env), close_fds=False, **streams, **decoding
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if LARGE.match(line):
                    print("      " + line.strip(), flush=True)
        finally:
            stop.set()
    if process.returncode:
        raise Trouble(explain(lines, process.returncode))
    return "\n".join(lines)


LARGE = re.compile(r"\s*Downloading .*\((\d{3,}\.\d ?M|[\d.]+ ?G)")  # from 100 MB on
UNREACHABLE = re.compile(
    r"dns error|lookup address|name resolution|name or service not known|getaddrinfo"
    r"|connection refused|connection reset|network is unreachable|no route to host"
    r"|newconnectionerror|error sending request|client error \(connect\)|tcp connect error"
    r"|timed? ?out|proxyerror|tunnel error",
    re.IGNORECASE,
)
FULL = re.compile(r"no space left|os error (28|112)\b|errno 28\b", re.IGNORECASE)


def explain(lines: list[str], code: int) -> str:
    """What a failed step means for the user: the end of its output, the cause, the remedy."""
    text = "\n".join(lines)
    shown = "\n".join("    " + line[:200] for line in lines[-10:])
    if FULL.search(text):
        cause = f"the disk is full. Free some space, then call again: {CACHE_HINT}."
    elif UNREACHABLE.search(text):
        cause = (
            "the package index could not be reached. Check the network (and the proxy or mirror "
            f"that pip or uv is set to), then call again: {CACHE_HINT}."
        )
    else:
        cause = f"this step ended with exit code {code}. Call again when its cause is mended."
    return f"{shown}\n\ncourse.py: {cause}"


# --- set-up ---------------------------------------------------------------------------------------


def fingerprint() -> str:
    """What .venv was made from: the lock, the package, this file, the Python and the place."""
    digest = hashlib.sha256(repr((sys.version_info[:3], str(HERE))).encode())
    for path in (LOCK, HERE / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ready() -> bool:
    """Whether .venv is complete and of today's lock."""
    with contextlib.suppress(OSError):
        return PYTHON.exists() and STAMP.read_text(encoding="utf-8") == fingerprint()
    return False


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def size_gb(folder: Path) -> float:
    """Size of a folder's files, in 10^9 bytes; 0 when it is absent."""
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(top, name)).st_size
    return total / 1e9


def nearest(path: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def cache_folder() -> Path:
    """Where uv keeps what it downloads."""
    if os.environ.get("UV_CACHE_DIR"):
        return Path(os.environ["UV_CACHE_DIR"])
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "uv" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"


def other_disk() -> bool:
    """Whether uv's cache lies on another disk than .venv: then files are copied, not linked."""
    return nearest(cache_folder()).stat().st_dev != nearest(VENV).stat().st_dev


def check_disk() -> None:
    """Raise Trouble unless the disks of .venv, and of uv's cache if that is another, have room."""
    wanted = {nearest(VENV): NEEDED_GB - size_gb(VENV)}
    if other_disk():
        wanted[nearest(cache_folder())] = NEEDED_GB - size_gb(cache_folder())
    for folder, gigabytes in wanted.items():
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            raise Trouble(
                f"course.py: too little disk: {free:.1f} GB are free in {folder}, and "
                f"{gigabytes:.1f} GB are needed. Free some space, or move this folder (or, for "
                "the downloads, UV_CACHE_DIR) to a larger disk, then call again."
            )


def try_lock(fd: int) -> bool:
    """Take the operating system's lock on an open file; it goes when its last holder dies."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte past the pid, which stays readable
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.set_inheritable(fd, True)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        print(f"This disk knows no locks ({error}): do not run two set-ups at once.", flush=True)
    return True


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One set-up at a time. A step inherits the lock, so one that outlives a kill is waited for."""
    fd = os.open(BUSY, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(fd):
            os.lseek(fd, 0, os.SEEK_SET)
            owner = os.read(fd, 20).decode().strip() or "unknown"
            print(f"Another set-up, begun by process {owner}, is at work: waiting.", flush=True)
            while not try_lock(fd):
                time.sleep(0.2)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, f"{os.getpid():<19}\n".encode())
        yield
    finally:
        os.close(fd)


def venv_usable() -> bool:
    """Whether .venv was made here by this minor version of Python, with pip in it."""
    try:
        lines = (VENV / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    values = {key.strip(): value.strip() for key, _, value in (x.partition("=") for x in lines)}
    same = values.get("version", "").split(".")[:2] == [str(n) for n in sys.version_info[:2]]
    # A venv that was moved or copied still names its old place in its scripts.
    if not same or not values.get("command", "").endswith(str(VENV)):
        return False
    probe = [str(PYTHON), "-c", "import pip"]
    with contextlib.suppress(OSError):
        return subprocess.run(probe, env=child_env(), capture_output=True).returncode == 0
    return False


def make_venv() -> None:
    """Make .venv with the running Python, unless a finished one is there.

    An unfinished one is made anew: an installer that was killed leaves packages that look whole and
    lack files. The downloads are in uv's cache, so this takes seconds.
    """
    if STAMP.exists() and venv_usable():
        STAMP.unlink()  # unfinished from here on, until the last step is done
        return
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise Trouble(
            f"course.py: this Python ({sys.executable}) cannot make virtual environments. On "
            "Debian or Ubuntu: sudo apt install python3-venv. Elsewhere: install a Python from "
            "python.org. Then call again."
        )
    step([sys.executable, "-m", "venv", "--clear", str(VENV)])


def uv_lines(lock: str) -> str:
    """The entry of uv in the lock, with its hashes, as a requirements file of its own."""
    found = re.search(r"^uv==.*(?:\n[ \t]+.*)*", lock, re.MULTILINE)
    if found is None:
        raise Trouble(f"course.py: {LOCK.name} does not name uv: restore the committed file.")
    return found.group() + "\n"


def install_uv() -> None:
    """Install uv by pip, with the hashes of the lock."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "uv.txt"
        path.write_text(uv_lines(LOCK.read_text(encoding="utf-8")), encoding="utf-8")
        pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        step([*pip, "--require-hashes", "--no-deps", "-r", str(path)])


def pip_settings(listing: str) -> dict[str, str]:
    """The user's mirror and certificate out of `pip config list`, in uv's variables.

    uv reads no pip configuration; a machine set up for pip alone would else go to the wrong place.
    What is set for uv itself wins.
    """
    found: dict[str, str] = {}
    for where in ("global", "install", ":env:"):  # the later wins, as in pip
        for key, value in re.findall(rf"^{where}\.([\w-]+)='(.*)'$", listing, re.MULTILINE):
            found[key] = value
    env = {}
    if "index-url" in found and not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & set(os.environ):
        env["UV_DEFAULT_INDEX"] = found["index-url"]
    if "cert" in found and "SSL_CERT_FILE" not in os.environ:
        env["SSL_CERT_FILE"] = found["cert"]
    return env


def uv(*arguments: str) -> None:
    """Run the .venv's uv on the .venv."""
    env = pip_settings(step([str(PYTHON), "-m", "pip", "config", "list"]))
    if other_disk():
        env.setdefault("UV_LINK_MODE", os.environ.get("UV_LINK_MODE", "copy"))
    step([str(PYTHON), "-m", "uv", *arguments], **env)


def sync_packages() -> None:
    """Bring the packages of .venv to exactly those of the lock."""
    uv("pip", "sync", "--python", str(PYTHON), "--require-hashes", str(LOCK))


def install_package() -> None:
    """Install the package unfool, editable; `sync` has just removed it."""
    flags = ("--no-deps", "--no-build-isolation")
    uv("pip", "install", "--python", str(PYTHON), *flags, "-e", str(HERE))


def install_kernel() -> None:
    """Install the Jupyter kernel `python3` inside .venv."""
    kernel = [str(PYTHON), "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3"]
    for name, value in KERNEL_ENV.items():
        kernel += ["--env", name, value]
    step(kernel)


def steps() -> list[tuple[str, Callable[[], None]]]:
    """The set-up in order; each step may be repeated."""
    return [
        ("virtual environment", make_venv),
        ("uv, by its hashes", install_uv),
        ("packages of requirements.lock", sync_packages),
        ("package unfool", install_package),
        ("Jupyter kernel", install_kernel),
    ]


def run_steps(todo: list[tuple[str, Callable[[], None]]]) -> None:
    """Run steps one after the other, one line with its seconds for each."""
    for number, (title, action) in enumerate(todo, start=1):
        began = time.monotonic()
        print(f"[{number}/{len(todo)}] {title}", flush=True)
        action()
        print(f"      done in {time.monotonic() - began:.1f} s", flush=True)


def announcement() -> str:
    """What the set-up is about to do, in two lines."""
    size = "about 5 GB" if LINUX else "about 2 GB"
    if STAMP.exists():
        first = f"Bringing {VENV} up to date ({size} in all, most of it there)."
    else:
        source = WHEELS if WHEELS.is_dir() else "the package index"
        first = f"Setting up: {size} of packages from {source} into {VENV}."
    return f"{first}\nThis takes minutes at most, as the network allows; it may be interrupted."


def setup() -> None:
    """Make .venv complete, or return at once when it is.

    Raises:
        Trouble: when a step fails; a second call takes up what is there.
    """
    if ready():
        return
    print(announcement(), flush=True)
    began = time.monotonic()
    with exclusive():
        if ready():  # the set-up that was waited for has done it
            return
        check_disk()
        run_steps(steps())
        write_atomically(STAMP, fingerprint())
    print(f"Set up in {time.monotonic() - began:.0f} s.\n", flush=True)


# --- the environment of the benchmarks ------------------------------------------------------------


def bench_fingerprint() -> str:
    """What .venv-bench was made from: all that .venv was, and the files of its own."""
    digest = hashlib.sha256(fingerprint().encode())
    for path in (BENCH_LOCK, BENCH_BUILD):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def bench_ready() -> bool:
    """Whether .venv-bench is complete and of today's files."""
    with contextlib.suppress(OSError):
        made_from = BENCH_STAMP.read_text(encoding="utf-8")
        return BENCH_PYTHON.exists() and made_from == bench_fingerprint()
    return False


def make_bench_venv() -> None:
    """Make an empty .venv-bench with the Python of .venv."""
    uv("venv", "--clear", "--python", str(PYTHON), str(BENCH_VENV))


def sync_bench_packages() -> None:
    """Install exactly what both locks name; what a library itself asks for is not asked.

    torchattacks wants a requests of 2021, which would take Jupyter with it, and runs without.
    """
    build = ("--require-hashes", "--build-constraints", str(BENCH_BUILD))
    uv("pip", "sync", "--python", str(BENCH_PYTHON), *build, str(LOCK), str(BENCH_LOCK))


def install_bench_package() -> None:
    """Install the package unfool, editable, for the benchmarks."""
    flags = ("--no-deps", "--no-build-isolation")
    uv("pip", "install", "--python", str(BENCH_PYTHON), *flags, "-e", str(HERE))


def bench_steps() -> list[tuple[str, Callable[[], None]]]:
    """The set-up of .venv-bench in order."""
    return [
        ("virtual environment .venv-bench", make_bench_venv),
        (f"packages of {LOCK.name} and {BENCH_LOCK.name}", sync_bench_packages),
        ("package unfool", install_bench_package),
    ]


def setup_bench() -> None:
    """Make .venv-bench complete, or return at once when it is; .venv must be there."""
    if bench_ready():
        return
    print(f"Setting up {BENCH_VENV}: the libraries that the benchmarks compare with.", flush=True)
    with exclusive():
        if not bench_ready():
            run_steps(bench_steps())
            write_atomically(BENCH_STAMP, bench_fingerprint())


# --- verbs ----------------------------------------------------------------------------------------


def python(*arguments: str) -> list[str]:
    """A command of the .venv's Python."""
    return [str(PYTHON), *arguments]


def verb_setup(_: list[str]) -> int:
    """Make .venv, or say that it is there."""
    setup()
    print(f"Ready: {VENV}")
    return 0


def verb_run(rest: list[str]) -> int:
    """Run notebooks."""
    setup()
    return call(python("-m", "unfool", "run", *rest))


def gates(long: bool) -> list[tuple[str, list[str]]]:
    """The checks in order: (name, command)."""
    checks = [
        ("ruff check", python("-m", "ruff", "check")),
        ("ruff format", python("-m", "ruff", "format", "--check")),
        ("mypy", python("-m", "mypy")),
        ("unit tests", python("-m", "pytest", "tests", "-n", "2", "-q", "-rs")),
        ("notebook gates", python("tests/gates.py")),
    ]
    if long:
        checks.append(("long tests", python("-m", "pytest", "tests", "-rs", "-m", "long", "-q")))
    return checks


def check_all(checks: list[tuple[str, list[str]]]) -> int:
    """Run every check whatever became of the others, then a table; 1 when one failed."""
    rows = []
    for name, command in checks:
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        code = call(command, OMP_NUM_THREADS="1")
        rows.append((name, time.monotonic() - began, code))
    print(f"\n{'step':<16} {'seconds':>8}  result")
    for name, seconds, code in rows:
        print(f"{name:<16} {seconds:>8.1f}  {'FAILED' if code else 'ok'}")
    failed = sum(1 for _, _, code in rows if code)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def verb_test(_: list[str]) -> int:
    """Run ruff, mypy, the unit tests and the notebook gates."""
    setup()
    return check_all(gates(long=False))


def verb_test_all(_: list[str]) -> int:
    """Run the same and the tests marked `long`."""
    setup()
    return check_all(gates(long=True))


def verb_lab(rest: list[str]) -> int:
    """Open JupyterLab on the copy under work/."""
    setup()
    quiet = {"fetchNews": "false", "checkForUpdates": False}  # no question about news at the start
    settings = {"@jupyterlab/apputils-extension:notification": quiet}
    overrides = VENV / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    write_atomically(overrides, json.dumps(settings, indent=2) + "\n")
    # Teachers grade by command; its menus ("Create Assignment", "Validate") would puzzle learners.
    page = VENV / "etc" / "jupyter" / "labconfig" / "page_config.json"
    page.parent.mkdir(parents=True, exist_ok=True)
    hidden = {"disabledExtensions": {"@jupyter/nbgrader": True}}
    write_atomically(page, json.dumps(hidden, indent=2) + "\n")
    code = call(python("-m", "unfool", "workspace"))
    if code:
        return code
    work = HERE / "work"
    first = sorted((work / "notebooks").glob("00_*.ipynb"))[:1]
    opened = [f"--LabApp.default_url=/lab/tree/notebooks/{path.name}" for path in first]
    return call(python("-m", "jupyterlab", f"--ServerApp.root_dir={work}", *opened, *rest))


def verb_batch(rest: list[str]) -> int:
    """Run a grid of experiments."""
    setup()
    return call(python("-m", "unfool", "batch", *rest))


def verb_batch_dry(rest: list[str]) -> int:
    """Say what a grid would run, and for how long."""
    return verb_batch([*rest, "--dry-run"])


def verb_batch_resume(rest: list[str]) -> int:
    """Take up the batch that was run last."""
    return verb_batch([*rest, "--resume"])


def verb_exercises(rest: list[str]) -> int:
    """Make exercises/ from solutions/."""
    setup()
    return call(python("-m", "unfool", "exercises", *rest))


def verb_grade(rest: list[str]) -> int:
    """Grade a folder of submissions."""
    setup()
    return call(python("-m", "unfool", "grade", *rest))


def verb_capstone(rest: list[str]) -> int:
    """Make a purifier for each student, or score their attacks."""
    setup()
    return call(python("-m", "unfool", "capstone", *rest))


def verb_slides(rest: list[str]) -> int:
    """Make slides of the lessons."""
    setup()
    return call(python("-m", "unfool", "slides", *rest))


def verb_bundle(rest: list[str]) -> int:
    """Fill one folder with all that a room without a network needs."""
    own = argparse.ArgumentParser(prog="course.py bundle")
    own.add_argument("--out", type=Path, default=HERE / "build" / "bundle", metavar="DIR")
    own.add_argument("--solutions", action="store_true", help="with solutions/ and tests/, for you")
    options = own.parse_args(rest)
    setup()
    out = options.out.resolve()
    todo = [
        ("wheels of requirements.lock", lambda: fetch_wheels(out / WHEELS.name)),
        ("the course", lambda: copy_course(out, with_solutions=options.solutions)),
        ("trained networks", lambda: copy_store(out / BUNDLED_STORE.name)),
    ]
    run_steps(todo)
    print(f"{out}: {size_gb(out):.1f} GB. Copy it, then: python3 course.py lab")
    return 0


def fetch_wheels(folder: Path) -> None:
    """Download everything that the lock names, for this Python and this system."""
    pip = python("-m", "pip", "download", "--disable-pip-version-check", "--no-input")
    step([*pip, "--require-hashes", "--no-deps", "-r", str(LOCK), "-d", str(folder)])


def copy_course(out: Path, with_solutions: bool) -> None:
    """Copy the checkout without what was made in it, and without the solutions."""
    kept = {"solutions", "tests"} if with_solutions else set()
    skipped = NOT_BUNDLED - kept
    made = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", ".ipynb_checkpoints")

    def ignore(folder: str, names: list[str]) -> set[str]:
        top = skipped | {out.name} if Path(folder) == HERE else set()
        nested = {HERE / "data": {"store"}, HERE / "results": {"local"}}.get(Path(folder), set())
        return made(folder, names) | ((top | nested) & set(names))

    shutil.copytree(HERE, out, ignore=ignore, dirs_exist_ok=True)


def copy_store(folder: Path) -> None:
    """Copy the finished artifacts of the store: run the notebooks first to have them all."""
    store = Path(os.environ.get("UNFOOL_STORE") or HERE / "data" / "store").expanduser()
    if not store.is_dir():
        raise Trouble(f"course.py: no trained networks in {store}: make run, then call again.")
    unfinished = shutil.ignore_patterns("locks", "building", "damaged", "checkpoint*")
    # copyfile leaves rights behind: a store that only its owner could read becomes one for all.
    copy = shutil.copyfile
    shutil.copytree(store, folder, ignore=unfinished, copy_function=copy, dirs_exist_ok=True)


def verb_doctor(_: list[str]) -> int:
    """Say what this machine has; installs nothing."""
    if ready():
        return call(python("-m", "unfool", "doctor"))
    free = shutil.disk_usage(HERE).free / 1e9
    print(f"Python    {sys.version.split()[0]} ({sys.executable})")
    print(f"disk      {free:.1f} GB free, {NEEDED_GB:.1f} GB needed for the set-up")
    print("set-up    not done, or not of today's lock: python3 course.py setup")
    return 1


def verb_bench(rest: list[str]) -> int:
    """Run the benchmarks in an environment of their own."""
    setup()
    setup_bench()
    path = str(BENCH_PYTHON.parent) + os.pathsep + os.environ.get("PATH", "")
    module, rest = ("frontier", rest[1:]) if rest[:1] == ["frontier"] else ("attacks", rest)
    command = [str(BENCH_PYTHON), "-m", f"benchmarks.{module}", *rest]
    return call(command, PATH=path, VIRTUAL_ENV=str(BENCH_VENV))


def verb_lock(rest: list[str]) -> int:
    """Compile requirements.in into requirements.lock, without any index's address in it."""
    with exclusive():
        if not STAMP.exists():
            run_steps(steps()[:2])
        plain = ("--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--no-header")
        target = ("--universal", "--python-version", "3.11", "--generate-hashes")
        files = ("requirements.in", "-o", LOCK.name)
        uv("pip", "compile", *target, *plain, *rest, *files)
    print(f"Wrote {LOCK.name}. The next command brings .venv up to date.")
    return 0


def verb_help(_: list[str]) -> int:
    """Print this list."""
    parser().print_help()
    return 0


RUN_HELP = """examples:
  course.py run                       every notebook, profile classroom
  course.py run 02 07                 these two
  course.py run --profile smoke       quick: does it run?
  course.py run 02 -p seed 3          with another parameter

What follows `run` goes to `unfool run`; all its options, once set up: unfool run --help."""

BATCH_HELP = """examples:
  course.py batch-dry smoke                    jobs and expected hours, runs nothing
  course.py batch smoke                        on this machine (make: GRID=smoke)
  course.py batch table2 --profile slurm       on a cluster (make: GRID=table2 PROFILE=slurm)
  course.py batch-resume                       the batch that was run last, after a kill

What follows goes to `unfool batch`; all its options, once set up: unfool batch --help.
How to write a grid, use Slurm, what it costs: workflow/README.md."""

BENCH_HELP = """examples:
  course.py bench --quick                      does it run? 2 to 8 images; minutes
  course.py bench --attacks pgd deepfool       these two, beside every library
  course.py bench --attacks cw --peers adv-lib foolbox --images 32 --repeat 3
  course.py bench --dataset mnist-m            resnet8 on colour instead of anet on digits
  course.py bench --device cuda
  course.py bench --save                       and write benchmarks/results/, which is committed
  course.py bench frontier                     how near with how many passes? `frontier --help`

Also --classifier NAME, --fresh (measure again what is there), --out DIR (default results/local).
The first call makes .venv-bench; a call that was stopped is taken up where it was.
What is measured, and how: benchmarks/README.md."""

VERBS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "setup": (verb_setup, "make .venv with everything in it (the other verbs do so, too)", ""),
    "run": (verb_run, "run the notebooks headless; a line each, a table, an HTML report", RUN_HELP),
    "test": (verb_test, "ruff, mypy, unit tests, notebook gates", ""),
    "test-all": (verb_test_all, "the same and the tests that take minutes", ""),
    "lab": (
        verb_lab,
        "JupyterLab on a copy under work/",
        "What follows `lab` goes to JupyterLab, e.g. --no-browser --port 8899.",
    ),
    "exercises": (
        verb_exercises,
        "make exercises/ from solutions/",
        "With --run the solutions are executed first and written back.",
    ),
    "grade": (
        verb_grade,
        "grade a folder of exercises by nbgrader",
        "course.py grade SUBMISSIONS, a folder for each student; all options, once set up: "
        "unfool grade --help.",
    ),
    "batch": (verb_batch, "run a grid of experiments, here or on Slurm", BATCH_HELP),
    "batch-dry": (verb_batch_dry, "the jobs of a grid and expected hours", BATCH_HELP),
    "batch-resume": (verb_batch_resume, "take up the batch that was run last", BATCH_HELP),
    "capstone": (
        verb_capstone,
        "a purifier for each student to break, and the scores",
        "course.py capstone make --students class.txt; course.py capstone score SUBMISSIONS.",
    ),
    "slides": (
        verb_slides,
        "slides of the lessons, in build/slides",
        "course.py slides 02 07; none: every lesson.",
    ),
    "bundle": (
        verb_bundle,
        "one folder for a room without a network",
        "With --out DIR (build/bundle); --solutions adds solutions/ and tests/.",
    ),
    "bench": (verb_bench, "our attacks beside the public libraries', in .venv-bench", BENCH_HELP),
    "doctor": (verb_doctor, "what this machine has", ""),
    "lock": (
        verb_lock,
        "compile requirements.in into requirements.lock",
        "What follows `lock` goes to `uv pip compile`, e.g. --upgrade.",
    ),
    "help": (verb_help, "print this list", ""),
}
TAKES_MORE = {
    *("run", "lab", "exercises", "grade", "capstone", "slides", "bundle", "bench", "lock"),
    *("batch", "batch-dry", "batch-resume"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="course.py",
        description="Set up and run the course. The first call installs everything into .venv.",
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, (_, text, more) in VERBS.items():
        verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    return top


def main(argv: list[str]) -> int:
    """Do one verb; returns the exit code."""
    top = parser()
    known, rest = top.parse_known_args(argv)
    verb = known.verb or "help"
    if rest and verb not in TAKES_MORE:
        top.error(f"`{verb}` takes no arguments, and got: {' '.join(rest)}")
    try:
        return VERBS[verb][0](rest)
    except Trouble as trouble:
        print(trouble, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command takes up where it was.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
