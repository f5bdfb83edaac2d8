"""unfool doctor: says what is there, and each fault that it can find is planted once."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unfool import cli, doctor
from unfool.doctor import Line, as_text, report


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("UNFOOL_DATA", raising=False)


def line(name: str) -> Line:
    return next(line for line in report() if line.name == name)


def test_this_machine_is_fine() -> None:
    lines = report()
    assert [entry.name for entry in lines if not entry.ok] == []
    assert len({entry.name for entry in lines}) == len(lines) == 10
    assert torch.__version__ in line("torch").value
    assert "3600 / 400 / 1000" in line("digits").value


def test_text_shows_faults_remedies_and_a_verdict() -> None:
    good, bad = Line("a", "here"), Line("b", "gone", ok=False, remedy="fetch it")
    assert as_text([good]).splitlines()[-1] == "Everything that the course needs is here."
    text = as_text([good, bad])
    assert "FAULT  b          gone" in text
    assert "fetch it" in text
    assert text.splitlines()[-1] == "1 of 2 need your attention."


def test_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "report", lambda: [Line("a", "here")])
    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "report", lambda: [Line("a", "gone", ok=False)])
    assert cli.main(["doctor"]) == 1
    assert "gone" in capsys.readouterr().out


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError("libcudart.so: cannot open shared object file")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    found = line("torch")
    assert not found.ok
    assert "libcudart.so" in found.value
    assert "course.py setup" in found.remedy


def test_versions_are_held_against_the_lock() -> None:
    lock = "pytest==0.1 \\\n    --hash=x\ntorch==1.0 ; a\ntorch==%s ; b\nno-such==1\n"
    wanted = doctor.locked_versions(lock % torch.__version__.partition("+")[0])
    assert wanted["pytest"] == {"0.1"}
    assert len(wanted["torch"]) == 2
    assert doctor.differences(wanted, ["torch"]) == []
    wrong = doctor.differences(wanted, ["pytest", "torch", "no-such"])
    assert len(wrong) == 2
    assert "(lock: 0.1)" in wrong[0]
    assert wrong[1] == "no-such is missing (lock: 1)"


def test_wrong_version_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(doctor.REPO / "requirements.in", tmp_path)
    lock = (doctor.REPO / "requirements.lock").read_text()
    (tmp_path / "requirements.lock").write_text(lock)
    monkeypatch.setattr(doctor, "REPO", tmp_path)
    assert line("packages").ok
    (tmp_path / "requirements.lock").write_text(lock.replace("\nscipy==", "\nscipy==9", 1))
    assert not line("packages").ok
    assert line("packages").value.startswith("scipy ")


def test_damaged_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import unfool.datasets.digits as digits

    monkeypatch.setattr(digits, "MNIST5K", tmp_path / "mnist5k.npz")
    found = line("digits")
    assert not found.ok
    assert str(tmp_path) in found.value


def test_full_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNFOOL_DATA", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    assert f"mnist in {tmp_path}" not in line("full sets").value
    (raw / "train-images-idx3-ubyte").touch()
    assert f"mnist in {tmp_path}" in line("full sets").value
    assert line("full sets").ok
    monkeypatch.setenv("UNFOOL_DATA", str(tmp_path / "absent"))
    assert not line("full sets").ok


def test_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert line("store").value.endswith("store, 0 MB")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_bytes(bytes(2_000_000))
    assert line("store").value.endswith("store, 2 MB")
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "store" / "x" / "below-a-file"))
    assert not line("store").ok
    assert "UNFOOL_STORE" in line("store").remedy


def test_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * 10**9))
    assert line("free disk") == Line("free disk", "20.0 GB where the store lies")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 10**8))
    assert not line("free disk").ok


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "CGROUP_MEMORY", limit)
    total = doctor.memory_bytes()
    for text, expected in (("max\n", total), ("1000\n", 1000), ("9" * 30, total)):
        limit.write_text(text)
        assert doctor.memory_bytes() == expected
    monkeypatch.delattr(doctor.os, "sysconf")
    assert doctor.memory_bytes() is None
    assert line("memory").ok


def test_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, total_memory = "Some Card", 8 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CPU" in line("GPU").value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    assert line("GPU").value == "Some Card, 8.0 GB"
