"""What `test_faults.py` kills: each action can be called again, and then ends as if unbroken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unfool import batch
from unfool.artifacts import REPO, Store, save_tensors, sha256_of
from unfool.disk import told_if_full
from unfool.evaluation import Record, append_record, read_sound_records
from unfool.files import write_text
from unfool.grids import Job, dump
from unfool.lab import Lab

LINES = (REPO / "results" / "records" / "seeds.jsonl").read_text().splitlines()[:3]


def artifact(root: Path) -> None:
    """Build one artifact with checkpoints, twice the same."""

    def build(folder: Path) -> None:
        for step in range(2):
            save_tensors(folder / "checkpoint.safetensors", {"x": torch.full((9,), step)}, {})
            write_text(folder / f"note-{step}.txt", f"{step}\n")
        save_tensors(folder / "weights.safetensors", {"x": torch.arange(99)}, {"history": [1]})

    Store(root / "store").get("thing", {"name": "killed"}, build)


def records(root: Path) -> None:
    """Append the records that are not there yet, as `make_records.py` does."""
    path = root / "records.jsonl"
    for line in LINES:
        there = read_sound_records(path)[0] if path.exists() else []
        record = Record(**json.loads(line))
        if (record.classifier, record.defense) not in [(r.classifier, r.defense) for r in there]:
            append_record(record, path)


def job(root: Path) -> None:
    """One experiment of the batch, its notebook replaced by what it leaves."""
    name = "experiment-0"
    with told_if_full(root, batch.AGAIN_WHEN_FREE):  # as `batch.run` does
        write_text(root / "plan.json", dump([Job(name, "experiment", "90", {}, records=3)]))

    def papermill(path: Path, output: Path, parameters: dict[str, Any]) -> None:
        write_text(output, "{}")
        for line in LINES:
            append_record(Record(**json.loads(line)), Path(os.environ["UNFOOL_RECORDS"]))

    batch._papermill = papermill
    batch.one(name, root)


def careless(root: Path) -> None:
    """The control: writes in place what `records` appends, and believes that a file is whole."""
    path = root / "records.jsonl"
    if not path.exists():
        for line in LINES:
            with path.open("a") as file:
                file.write(line + "\n")


def training(root: Path) -> None:
    Lab("smoke", store=Store(root / "store")).classifier("d")  # a quick one


def attack(root: Path) -> None:
    lab = Lab("smoke", store=Store(root / "store"))
    lab.adversarial_set("deepfool")


def purifier(root: Path) -> None:
    lab = Lab("smoke", store=Store(root / "store"))
    from unfool.attacks import paper_attacks

    lab.defense("pix2pix", attacks=paper_attacks("mnist5k")[:1])


def measured(root: Path) -> None:
    """Measure what is not in the records yet."""
    path = root / "records.jsonl"
    os.environ["UNFOOL_RECORDS"] = str(path)
    lab = Lab("smoke", store=Store(root / "store"))
    for name in ("fgsm", "deepfool"):
        there = [r.attack for r in read_sound_records(path)[0]] if path.exists() else []
        if name not in there:
            lab.evaluate(None, lab.adversarial_set(name))


ACTIONS: dict[str, Callable[[Path], None]] = {
    "artifact": artifact, "records": records, "job": job, "careless": careless,
    "training": training, "attack": attack, "purifier": purifier, "measured": measured,
}  # fmt: skip


# What is made beforehand, and killed in a test of its own.
BEFORE: dict[str, Callable[[Path], object]] = {
    "attack": lambda root: Lab("smoke", store=Store(root / "store")).classifier("anet"),
    "purifier": lambda root: Lab("smoke", store=Store(root / "store")).adversarial_set(
        "fgsm", split="train"
    ),
}


def problems(action: str, root: Path, wanted: Any) -> Any:
    """With `wanted` None, what the action left; "half": what is corrupt; else what differs."""
    store, lines = root / "store", [*root.glob("*.jsonl"), *root.glob("records/*.jsonl")]
    found = []
    sealed = [
        folder
        for kind in (store.iterdir() if store.exists() else ())
        if kind.name not in ("building", "locks", "damaged")
        for folder in kind.iterdir()
    ]
    for folder in sealed:
        fault = Store(store)._fault(folder)
        found += [f"{folder.name}: {fault}"] if fault else []
    whole = [p for p in lines if not p.name.startswith(".")]
    kept = {p: [_stable(r) for r in read_sound_records(p)[0]] for p in whole}
    if wanted == "half":
        # A line that a kill cut short is skipped by whoever reads; a file of a job is whole.
        return found + [f"{p.name}: {len(v)} records" for p, v in kept.items()
                        if p.parent.name == "records" and len(v) != len(LINES)]  # fmt: skip
    left = {
        "files": {
            str(p.relative_to(store)): sha256_of(p)
            for folder in sealed for p in folder.iterdir() if p.name != "manifest.json"
        },
        "records": {str(p.relative_to(root)): v for p, v in kept.items()},
    }  # fmt: skip
    if wanted is None:
        return left
    leftover = list((store / "building").iterdir()) if (store / "building").exists() else []
    found += [f"left in building/: {p.name}" for p in leftover]
    return found if left == wanted else [*found, f"{left} instead of {wanted}"]


def _stable(record: Record) -> str:
    body = asdict(record)
    for name in ("seconds", "git", "versions"):
        body.pop(name)
    return json.dumps(body, sort_keys=True)
