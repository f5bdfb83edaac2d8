"""Real faults: SIGKILL at every file operation, a full disk, a read-only one, two at one store.

The file operations are found by tracing: an audit hook counts each one under the watched folder,
and in a second run the process kills itself just before the k-th. What is forked is one process
that has torch loaded and has computed nothing yet, so a kill costs a fraction of a second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unfool import batch, grids
from unfool.artifacts import REPO, Store, save_tensors
from unfool.lab import Lab

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def killed_everywhere(action: str, root: Path, points: str = "all") -> tuple[int, int, list[str]]:
    """Return how many operations there are, at how many it was killed, and what went wrong."""
    env = {**environment(), "UNFOOL_STORE": str(root / "store")}
    script = Path(__file__).with_name("kill_everywhere.py")
    command = [sys.executable, str(script), action, str(root), points]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    print(done.stderr[-3000:])
    assert done.returncode == 0
    there, killed, *faults = done.stdout.splitlines()
    return int(there), int(killed), faults


AT_WORK = """
import sys
from pathlib import Path
from fault_actions import ACTIONS
print("ready", flush=True)
for action in ("purifier", "measured"):
    ACTIONS[action](Path(sys.argv[1]))
"""


def environment() -> dict[str, str]:
    """What a process needs to find the library and `fault_actions`, on one thread."""
    paths = os.pathsep.join([str(REPO / "lib"), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("action", ["artifact", "records", "job"])
def test_kill_9_at_every_file_operation(action: str, tmp_path: Path) -> None:
    there, killed, faults = killed_everywhere(action, tmp_path / "root")
    assert faults == []
    assert killed == there >= 3


def test_the_control_a_careless_writer_is_caught(tmp_path: Path) -> None:
    _, _, faults = killed_everywhere("careless", tmp_path / "root")
    assert faults != []


def test_kill_9_at_five_moments_of_a_training(tmp_path: Path) -> None:
    there, killed, faults = killed_everywhere("training", tmp_path / "root", "5")
    assert faults == []
    assert there > killed == 5


@pytest.mark.parametrize("action", ["training", "attack"])
def test_kill_9_at_a_random_moment(action: str, tmp_path: Path) -> None:
    """By the clock: in the midst of the work, too, and not only where files are touched."""
    _, killed, faults = killed_everywhere(action, tmp_path / "root", "seed=0")
    assert faults == []
    assert killed == 1


@pytest.mark.long
@pytest.mark.parametrize("action", ["training", "attack", "purifier"])
def test_kill_9_at_every_file_operation_of_the_lab(action: str, tmp_path: Path) -> None:
    there, killed, faults = killed_everywhere(action, tmp_path / "root")
    assert faults == []
    assert killed == there
    print(f"{action}: killed before each of {there} file operations")


@pytest.mark.long
def test_kill_9_at_fifty_random_moments(tmp_path: Path) -> None:
    """Of a process that trains, attacks and measures: by the clock and not by its operations.

    The clock starts when torch is loaded, and the moments are spread over what an unbroken run
    takes here, so that they hit the work on a slow machine, too.
    """
    from fault_actions import problems

    def start(root: Path) -> subprocess.Popen[bytes]:
        root.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", AT_WORK, str(root)], stdout=subprocess.PIPE,
            env={**environment(), "UNFOOL_STORE": str(root / "store")},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    process, begun = start(tmp_path / "whole"), time.monotonic()
    assert process.wait() == 0
    takes = time.monotonic() - begun
    whole = problems("measured", tmp_path / "whole", None)
    draw, root, kills, ended = random.Random(0), tmp_path / "broken", 0, 0
    while kills < 50:
        process = start(root)
        try:
            process.wait(draw.uniform(0, 0.7 * takes))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert problems("measured", root, "half") == []
        else:
            assert problems("measured", root, whole) == []
            shutil.rmtree(root)
            ended += 1
    assert start(root).wait() == 0
    assert problems("measured", root, whole) == []
    assert ended >= 3  # the kills were spread over several whole runs, and not over one beginning
    print(f"50 kills over {ended + 1} runs of {takes:.1f} s")


# --- places ---------------------------------------------------------------------------------------


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own; skips where it cannot be had."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"no small disk can be had: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_what_was_begun_is_taken_up(tmp_path: Path) -> None:
    import torch

    def build(folder: Path) -> None:
        if not (folder / "first.safetensors").exists():
            save_tensors(folder / "first.safetensors", {"x": torch.arange(100)}, {})
        save_tensors(folder / "second.safetensors", {"x": torch.zeros(200_000)}, {})

    with tmpfs(tmp_path / "disk", "1m") as disk:
        filler = disk / "filler"
        filler.write_bytes(b"\0" * 600_000)
        store = Store(disk / "store")
        with pytest.raises(OSError, match="is full; free some, or set UNFOOL_STORE") as caught:
            store.get("thing", {"name": "big"}, build)
        assert str(disk) in str(caught.value)
        assert not list((disk / "store").glob("thing/*"))
        assert (disk / "store" / "building").exists()
        assert not list((disk / "store" / "building").rglob("*.part"))
        filler.unlink()
        folder = store.get("thing", {"name": "big"}, build)
        assert sorted(p.name for p in folder.iterdir()) == [
            "first.safetensors", "manifest.json", "second.safetensors",
        ]  # fmt: skip


def test_a_disk_that_is_full_at_any_page_or_file(tmp_path: Path) -> None:
    """Of an artifact, of records, of a job; the control is a writer that is careless."""
    wanted = ("artifact", "records", "job", "careless")
    with tmpfs(tmp_path / "disk", "64m") as disk:
        script = Path(__file__).with_name("full_everywhere.py")
        done = subprocess.run(
            [sys.executable, str(script), str(disk), *wanted], capture_output=True, text=True,
            env={**environment(), "UNFOOL_STORE": str(disk / "root" / "store")}, check=False,
        )  # fmt: skip
    print(done.stderr[-5000:])
    found = json.loads(done.stdout)
    assert list(found) == list(wanted)
    for name in wanted[:-1]:
        times, faults = found[name]
        assert faults == []
        assert times >= 3
    assert any("instead of" in fault for fault in found["careless"][1])
    assert any("said OSError" in fault for fault in found["careless"][1])


def test_a_read_only_store_is_read_and_not_written(tmp_path: Path) -> None:
    """Even by root, on a disk that is mounted so."""
    with tmpfs(tmp_path / "disk", "4m") as disk:
        made = Store(disk / "store").get("thing", {"name": "a"}, lambda f: (f / "x").touch())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = Store(disk / "store")
        assert store.get("thing", {"name": "a"}, lambda f: None) == made
        with pytest.raises(PermissionError, match="set UNFOOL_STORE to a folder of yours"):
            store.get("thing", {"name": "b"}, lambda f: (f / "x").touch())


def test_a_truncated_artifact_is_named_and_made_anew_the_same(tmp_path: Path) -> None:
    def weights() -> Path:
        return next((tmp_path / "store" / "classifier").glob("anet*/weights.safetensors"))

    Lab("smoke", store=Store(tmp_path / "store")).classifier("anet")
    whole = weights().read_bytes()
    with weights().open("rb+") as file:
        file.truncate(len(whole) // 2)
    with pytest.warns(UserWarning, match=r"is damaged \(weights.safetensors has .* made anew"):
        Lab("smoke", store=Store(tmp_path / "store")).classifier("anet")
    assert weights().read_bytes() == whole
    assert len(list((tmp_path / "store" / "damaged").iterdir())) == 1


# --- two at one store -----------------------------------------------------------------------------


def test_two_batches_on_one_store_make_what_they_share_once(tmp_path: Path) -> None:
    grid = tmp_path / "one.yaml"
    grid.write_text("rows: [{profile: smoke, attacks: [fgsm], defense: none}]\n")
    jobs = grids.plan(grid)
    shared = next(j for j in jobs if j.kind == "classifier")
    outs = [tmp_path / "first", tmp_path / "second"]
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    command = [sys.executable, "-m", "unfool.batch", shared.name]
    both = []
    for out in outs:
        out.mkdir()
        (out / "plan.json").write_text(grids.dump(jobs))
        both.append(subprocess.Popen(command, cwd=out, env=env))
    assert [process.wait() for process in both] == [0, 0]
    assert all(batch.result_of(shared, out).exists() for out in outs)
    root = Path(os.environ["UNFOOL_STORE"])
    assert len(list((root / "classifier").iterdir())) == 1
    assert not list((root / "building").iterdir())
    assert not (root / "damaged").exists()
    manifest = json.loads(next((root / "classifier").glob("*/manifest.json")).read_text())
    assert manifest["config"]["classifier"] == "anet"


@pytest.mark.long
def test_two_whole_batches_on_one_store(tmp_path: Path) -> None:
    from test_batch import FOUR, LIMIT, problems, start

    grid = tmp_path / "four.yaml"
    grid.write_text(FOUR)
    outs = [tmp_path / "first", tmp_path / "second"]
    both = [start(grid, out) for out in outs]
    assert [process.wait(LIMIT) for process in both] == [0, 0]
    assert [problems(out) for out in outs] == [[], []]
