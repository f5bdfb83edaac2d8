"""course.py: the set-up in the face of old Pythons, full disks, kills and second callers.

Nothing is installed: the steps are replaced, everything around them is the real thing.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import course

SOURCE = Path(course.__file__)

# A course.py whose two steps write to the file `log`; the second sleeps while `slow` exists.
DRIVER = """
import os, sys, time
sys.path.insert(0, os.getcwd())
import course
def say(text):
    with open("log", "a") as file: file.write(text + "\\n")
def one():
    course.BIN.mkdir(parents=True, exist_ok=True)
    course.PYTHON.touch()
    say("begin %d" % os.getpid())
def two():
    while os.path.exists("slow"): time.sleep(0.02)
    time.sleep(0.2)
    say("end %d" % os.getpid())
course.steps = lambda: [("one", one), ("two", two)]
course.check_disk = lambda: None
{extra}
sys.exit(course.main(sys.argv[1:]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that a set-up looks at."""
    for name in ("course.py", "requirements.lock", "pyproject.toml"):
        shutil.copy(SOURCE.parent / name, tmp_path / name)
    (tmp_path / "driver.py").write_text(DRIVER.format(extra=""))
    return tmp_path


def begin(checkout: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "driver.py", *(arguments or ("setup",))]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=checkout, text=True, stdout=pipe, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    return output


def log(checkout: Path) -> list[str]:
    path = checkout / "log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: object, seconds: float = 10) -> None:
    assert callable(condition)
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


# --- old Pythons ----------------------------------------------------------------------------------


def run_as(version: tuple[int, int, int]) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys, runpy; sys.version_info = {version}; sys.argv = ['course.py', 'help']; "
        f"runpy.run_path({str(SOURCE)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_old_python_is_told_in_one_sentence() -> None:
    old, new = run_as((3, 9, 18)), run_as((3, 11, 0))
    assert old.returncode == 1
    assert "needs Python 3.11 or newer" in old.stderr
    assert "3.9" in old.stderr
    assert len(old.stderr.splitlines()) == 1
    assert new.returncode == 0
    assert "needs Python" not in new.stderr


def test_source_parses_on_old_pythons() -> None:
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 7))
    with pytest.raises(SyntaxError):  # the check does see syntax that is too new
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 7))


# --- disk and tools -------------------------------------------------------------------------------


def with_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gigabytes: float) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=int(gigabytes * 1e9))
    monkeypatch.setattr(course, "VENV", tmp_path / ".venv")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_too_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_free(monkeypatch, tmp_path, 1.5)
    with pytest.raises(course.Trouble) as caught:
        course.check_disk()
    needed = f"{course.NEEDED_GB:.1f} GB are needed"
    for part in ("1.5 GB are free", needed, str(tmp_path), "Free some space"):
        assert part in str(caught.value)
    with_free(monkeypatch, tmp_path, course.NEEDED_GB + 0.1)
    course.check_disk()


def test_disk_of_the_cache_counts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def usage(folder: Path) -> object:
        return shutil._ntuple_diskusage(10**12, 0, 10**9 if folder.name == "cache" else 10**11)

    (tmp_path / "cache").mkdir()
    with_free(monkeypatch, tmp_path, 0)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    course.check_disk()  # one disk: the free room of .venv's is what counts
    monkeypatch.setattr(course, "other_disk", lambda: True)
    with pytest.raises(course.Trouble, match="cache"):
        course.check_disk()


def test_what_a_killed_setup_left_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_free(monkeypatch, tmp_path, 1.5)
    monkeypatch.setattr(course, "size_gb", lambda _: course.NEEDED_GB - 1.4)
    course.check_disk()
    monkeypatch.setattr(course, "size_gb", lambda _: course.NEEDED_GB - 1.6)
    with pytest.raises(course.Trouble, match="too little disk"):
        course.check_disk()


def test_python_without_venv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(course, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(course, "STAMP", tmp_path / ".venv" / "stamp")
    monkeypatch.setattr(course, "step", done.append)
    course.make_venv()
    assert len(done) == 1
    monkeypatch.setattr(course.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(course.Trouble, match="apt install python3-venv"):
        course.make_venv()
    assert len(done) == 1


def test_only_a_finished_venv_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[list[str]] = []
    stamp = tmp_path / "stamp"
    monkeypatch.setattr(course, "STAMP", stamp)
    monkeypatch.setattr(course, "step", made.append)
    monkeypatch.setattr(course, "venv_usable", lambda: True)
    stamp.touch()
    course.make_venv()
    assert made == []
    assert not stamp.exists()  # a kill from here on leaves no stamp, and so ...
    course.make_venv()
    assert len(made) == 1
    assert "--clear" in made[0]
    stamp.touch()
    monkeypatch.setattr(course, "venv_usable", lambda: False)
    course.make_venv()
    assert len(made) == 2


def test_venv_of_another_python_or_place_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    venv = tmp_path / ".venv"
    venv.mkdir()
    monkeypatch.setattr(course, "VENV", venv)
    monkeypatch.setattr(course, "PYTHON", Path(sys.executable))
    major, minor = sys.version_info[:2]
    monkeypatch.setattr(
        course.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0)
    )

    def usable(version: str, place: Path) -> bool:
        (venv / "pyvenv.cfg").write_text(f"version = {version}\ncommand = python -m venv {place}\n")
        return course.venv_usable()

    assert usable(f"{major}.{minor}.0", venv)
    assert not usable(f"{major}.{minor + 1}.0", venv)
    assert not usable(f"{major}.{minor}.0", tmp_path / "elsewhere" / ".venv")
    (venv / "pyvenv.cfg").unlink()
    assert not course.venv_usable()


# --- what a failed step says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("error: Request failed\n  caused by: dns error: failed to lookup address", "reached"),
        ("NewConnectionError(...): [Errno 111] Connection refused", "reached"),
        ("error: failed to write: No space left on device (os error 28)", "disk is full"),
        ("error: hash mismatch for torch", "exit code 3"),
    ],
)
def test_failed_step(output: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"import sys; print({output!r}); sys.exit(3)"
    with pytest.raises(course.Trouble) as caught:
        course.step([sys.executable, "-c", code])
    message = str(caught.value)
    assert output.splitlines()[-1].strip() in message
    assert said in message
    causes = ("could not be reached", "disk is full", "exit code")
    assert sum(cause in message for cause in causes) == 1


def test_mirror_of_pip_is_handed_to_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    listing = ":env:.index-url='b'\nglobal.index-url='a'\nglobal.cert='c'\nglobal.timeout='3'"
    assert course.pip_settings(listing) == {"UV_DEFAULT_INDEX": "b", "SSL_CERT_FILE": "c"}
    assert course.pip_settings("global.timeout='3'") == {}
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine")
    assert course.pip_settings(listing) == {"SSL_CERT_FILE": "c"}


def test_children_write_bytecode_and_find_the_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    env = course.child_env(OMP_NUM_THREADS="1")
    assert "PYTHONDONTWRITEBYTECODE" not in env
    assert env["PATH"].split(os.pathsep)[0] == str(course.BIN)
    assert (
        env["OMP_NUM_THREADS"] == env["PYTHONNOUSERSITE"] == env["JUPYTER_PREFER_ENV_PATH"] == "1"
    )


def test_uv_is_cut_out_of_the_lock_with_its_hashes() -> None:
    lock = (
        "six==1\n    --hash=sha256:a\nuv==2 \\\n    --hash=sha256:b \\\n    --hash=sha256:c\nz==1\n"
    )
    assert course.uv_lines(lock) == "uv==2 \\\n    --hash=sha256:b \\\n    --hash=sha256:c\n"
    assert course.uv_lines(course.LOCK.read_text(encoding="utf-8")).count("--hash=sha256:") > 5
    with pytest.raises(course.Trouble, match="does not name uv"):
        course.uv_lines("six==1\n")


# --- the stamp, kills, two at once ----------------------------------------------------------------


def test_second_call_does_nothing(checkout: Path) -> None:
    assert "about" in ended(begin(checkout))
    began = time.monotonic()
    assert ended(begin(checkout)).startswith("Ready")
    assert time.monotonic() - began < 1
    assert log(checkout) == ["begin", "end"]


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_stamp_follows_the_files(checkout: Path, name: str) -> None:
    ended(begin(checkout))
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    ended(begin(checkout))
    assert log(checkout) == ["begin", "end"] * 2


def test_killed_setup_is_taken_up_again(checkout: Path) -> None:
    (checkout / "slow").touch()
    process = begin(checkout)
    wait_for(lambda: log(checkout) == ["begin"])
    process.kill()
    process.wait()
    assert not (checkout / ".venv" / "unfool-setup.txt").exists()
    (checkout / "slow").unlink()
    output = ended(begin(checkout))
    assert "Another set-up" not in output  # the lock of the dead is free
    assert log(checkout) == ["begin", "begin", "end"]
    assert (checkout / ".venv" / "unfool-setup.txt").exists()


def two_at_once(checkout: Path) -> tuple[str, str]:
    """Outputs of two set-ups, the second begun while the first is at work."""
    (checkout / "slow").touch()
    first = begin(checkout)
    wait_for(lambda: log(checkout) == ["begin"])
    second = begin(checkout)
    time.sleep(0.5)
    (checkout / "slow").unlink()
    return ended(first), ended(second)


def test_two_at_once(checkout: Path) -> None:
    first, second = two_at_once(checkout)
    assert "Another set-up" in second
    assert "Another set-up" not in first
    assert log(checkout) == ["begin", "end"]  # the second found the work done


def test_two_at_once_without_the_lock_collide(checkout: Path) -> None:
    """The negative control: with no lock the test above would fail."""
    extra = "course.try_lock = lambda _: True"
    (checkout / "driver.py").write_text(DRIVER.format(extra=extra))
    two_at_once(checkout)
    assert log(checkout) == ["begin", "begin", "end", "end"]


@pytest.mark.skipif(os.name == "nt", reason="a lock is not inherited on Windows")
def test_step_that_outlives_its_setup_is_waited_for(checkout: Path) -> None:
    holder, begun = checkout / "holder.py", checkout / "begun"
    work = "import time; open('begun', 'w'); time.sleep(5)"
    holder.write_text(
        "import course, sys\n"
        "with course.exclusive():\n"
        f"    course.step([sys.executable, '-c', {work!r}])\n"
    )
    process = subprocess.Popen([sys.executable, str(holder)], cwd=checkout, text=True)
    for _ in range(600):
        if begun.exists():
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert "Another set-up" in ended(begin(checkout))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to hand on")
@pytest.mark.parametrize("handed_on", [True, False])  # without, a child lives on: the control
def test_sigterm_is_handed_on(checkout: Path, handed_on: bool) -> None:
    work = "import time; open('begun', 'w'); time.sleep(3); open('lived_on', 'w')"
    driver = "import course, signal, sys\n"
    if not handed_on:
        driver += "signal.signal = lambda *_: None\n"
    driver += f"sys.exit(course.call([sys.executable, '-c', {work!r}]))\n"
    (checkout / "driver.py").write_text(driver)
    process = subprocess.Popen([sys.executable, "driver.py"], cwd=checkout)
    for _ in range(600):
        if (checkout / "begun").exists():
            break
        time.sleep(0.05)
    process.terminate()
    process.wait()
    time.sleep(4)
    assert (checkout / "lived_on").exists() != handed_on


# --- verbs ----------------------------------------------------------------------------------------


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert course.main([]) == 0
    bare = capsys.readouterr().out
    assert course.main(["help"]) == 0
    assert capsys.readouterr().out == bare
    with pytest.raises(SystemExit) as caught:
        course.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == bare
    for verb in ("setup", "run", "test", "test-all", "lab", "bench", "doctor", "lock", "help"):
        assert f"\n    {verb} " in bare
    with pytest.raises(SystemExit):
        course.main(["run", "--help"])
    assert "--profile smoke" in capsys.readouterr().out


def test_arguments_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(course, "setup", lambda: None)
    monkeypatch.setattr(course, "call", lambda command, **_: called.append(command) or 7)
    assert course.main(["run", "02", "--profile", "smoke", "-p", "seed", "3"]) == 7
    assert called[0][1:] == ["-m", "unfool", "run", "02", "--profile", "smoke", "-p", "seed", "3"]
    with pytest.raises(SystemExit) as caught:
        course.main(["test", "--fast"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        course.main(["tset"])
    assert caught.value.code == 2


def test_one_failed_check_hides_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    def check(name: str, code: int) -> tuple[str, list[str]]:
        return name, [sys.executable, "-c", f"print('ran {name}'); raise SystemExit({code})"]

    assert course.check_all([check("first", 1), check("second", 0)]) == 1
    output = capfd.readouterr().out
    assert "ran first" in output
    assert "ran second" in output
    assert output.splitlines()[-1] == "1 passed, 1 failed"
    assert course.check_all([check("first", 0)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


def test_long_tests_only_in_test_all() -> None:
    short, long = (dict(course.gates(long=value)) for value in (False, True))
    assert set(long) - set(short) == {"long tests"}
    assert long["long tests"][-3:] == ["-m", "long", "-q"]


def test_doctor_installs_nothing(checkout: Path) -> None:
    process = begin(checkout, "doctor")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "course.py setup" in output
    assert log(checkout) == []


# --- the environment of the benchmarks ------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What uv and the shell are asked to do, in a place of their own; nothing is done."""
    calls: list[list[str]] = []
    python = tmp_path / ".venv-bench" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(course, "BENCH_PYTHON", python)
    monkeypatch.setattr(course, "BENCH_STAMP", tmp_path / ".venv-bench" / "stamp")
    monkeypatch.setattr(course, "BUSY", tmp_path / "busy")
    monkeypatch.setattr(course, "setup", lambda: calls.append(["setup"]))
    monkeypatch.setattr(course, "uv", lambda *arguments: calls.append(["uv", *arguments]))
    monkeypatch.setattr(course, "call", lambda command, **_: calls.append(command) or 7)
    return calls


def test_bench_has_an_environment_of_its_own(asked: list[list[str]]) -> None:
    assert course.main(["bench", "--quick", "--attacks", "pgd"]) == 7
    assert asked[0] == ["setup"]
    made = [command for command in asked if command[0] == "uv"]
    assert [command[1:3] for command in made] == [
        ["venv", "--clear"],
        ["pip", "sync"],
        ["pip", "install"],
    ]
    assert made[0][-1] == str(course.BENCH_VENV)
    for command in made[1:]:  # .venv stays as it is
        assert command[command.index("--python") + 1] == str(course.BENCH_PYTHON)
        assert str(course.VENV) + os.sep not in " ".join(command)
    assert "--require-hashes" in made[1]
    bench = [str(course.BENCH_PYTHON), "-m", "benchmarks.attacks", "--quick", "--attacks", "pgd"]
    assert asked[-1] == bench
    assert course.main(["bench", "frontier", "--quick"]) == 7
    assert asked[-1] == [str(course.BENCH_PYTHON), "-m", "benchmarks.frontier", "--quick"]


def test_bench_is_set_up_once_and_again_when_its_files_change(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    course.main(["bench"])
    first = len(asked)
    course.main(["bench"])
    assert len(asked) == first + 2  # setup, and the bench itself
    for name in ("BENCH_LOCK", "BENCH_BUILD"):
        changed = tmp_path / name
        changed.write_text(getattr(course, name).read_text(encoding="utf-8") + "\n")
        monkeypatch.setattr(course, name, changed)
        before = len(asked)
        course.main(["bench"])
        assert len(asked) == before + first


def test_a_step_of_the_bench_that_fails_leaves_no_stamp(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: str) -> None:
        raise course.Trouble("no network")

    monkeypatch.setattr(course, "uv", fails)
    assert course.main(["bench"]) == 1
    assert asked == [["setup"]]
    assert not course.bench_ready()
