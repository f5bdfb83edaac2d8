"""What is committed under results/, and the figures that the README takes from it."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unfool.artifacts import REPO, load_tensors
from unfool.evaluation import Record, read_records
from unfool.lab import Lab
from unfool.profiles import PROFILES

RESULTS = REPO / "results"
LIMIT = 30_000_000  # bytes of all committed weights


def committed(name: str) -> list[Record]:
    return read_records(RESULTS / "records" / name)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(record: Record, key: str) -> str:
    value = getattr(record, f"{key}_accuracy")
    low, high = getattr(record, f"{key}_low"), getattr(record, f"{key}_high")
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


def missing_rows(readme: str, records: list[Record]) -> list[str]:
    """The three accuracies of each record stand together in one row of the README's table."""
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    missing = []
    for record in records:
        wanted = [with_interval(record, k) for k in ("end_to_end", "defended_clean")]
        if record.recovered_accuracy:
            wanted.append(with_interval(record, "recovered"))
        if not any(all(text in row for text in wanted) for row in rows):
            missing.append(f"{record.dataset} {record.defense}: {wanted}")
    return missing


def finished(name: str, classifier: str) -> list[Record]:
    """Return a classifier's committed records but those of a purifier on its way."""
    of = [r for r in committed(name) if r.classifier == classifier]
    return [r for r in of if "after" not in r.defense_settings]


@pytest.mark.parametrize(
    ("name", "classifier"), [("classroom.jsonl", "anet"), ("desk-table2.jsonl", "anet-mnist")]
)
def test_readme_prints_the_committed_records(name: str, classifier: str) -> None:
    readme = (REPO / "README.md").read_text("utf-8")
    # A defence measured twice: the last counts.
    every = {r.defense: r for r in finished(name, classifier) if r.attack == "fgsm"}
    records = {defense: every[defense] for defense in ("none", "threshold", "pix2pix")}
    assert missing_rows(readme, list(records.values())) == []
    doctored = readme.replace(with_interval(records["pix2pix"], "end_to_end"), "99.9 [99.0, 100.0]")
    assert missing_rows(doctored, list(records.values())) != []  # the control


def absent(readme: str, records: list[Record]) -> list[str]:
    """What of the desk's Table 2 the README does not print, attack by attack."""
    of = {(r.attack, r.defense): r for r in records}
    names = {"fgsm": "FGSM", "deepfool": "DeepFool", "jsma": "JSMA", "carlini_wagner_l2": "C&W"}
    lines = []
    for attack, name in names.items():
        mine = [of[attack, defense] for defense in ("threshold", "denoiser", "pix2pix")]
        cells = " | ".join(with_interval(r, "recovered") for r in mine)
        fooled = percent(mine[0].attack_success or 0)
        lines.append(rf"\| {name} \({re.escape(fooled)} %\) \| [\d.]+ \| {re.escape(cells)} \|")
    return [line for line in lines if not re.search(line, readme)]


@pytest.mark.parametrize("classifier", ["anet-mnist", "bnet-mnist"])
def test_readme_prints_the_desk_under_each_attack(classifier: str) -> None:
    readme = (REPO / "README.md").read_text("utf-8")
    records = finished("desk-table2.jsonl", classifier)
    assert absent(readme, records) == []
    (jsma,) = [r for r in records if (r.attack, r.defense) == ("jsma", "pix2pix")]
    doctored = readme.replace(with_interval(jsma, "recovered"), "99.9 [99.8, 100.0]")
    assert len(absent(doctored, records)) == 1  # the control


def test_readme_says_by_how_much_the_purifier_leads() -> None:
    """The paired differences' middles are differences of recorded shares."""
    readme = (REPO / "README.md").read_text("utf-8")
    told = re.search(r"Bnet's purifier recovers (.*?); paired", readme)
    assert told is not None
    printed = re.findall(r"\+(\d+\.\d) (?:points )?\[−?[\d.]+, [\d.]+\]", told[1])
    records = finished("desk-table2.jsonl", "bnet-mnist")
    leads = []
    for attack in ("fgsm", "deepfool", "jsma", "carlini_wagner_l2"):
        of = {r.defense: r.recovered_accuracy or 0 for r in records if r.attack == attack}
        assert len(of) == 8
        ours = of.pop("pix2pix")
        leads.append(ours - max(of.values()))
    assert printed == [percent(lead) for lead in leads]


def test_the_trial_with_more_images_is_told_as_recorded() -> None:
    text = (REPO / "results" / "README.md").read_text("utf-8")
    section = text.split("## A trial")[1].split("\n## ")[0]
    ours, best = section.split("The best of")
    share: dict[str, dict[str, Record]] = {}
    for r in committed("trial.jsonl"):
        share.setdefault(r.attack, {})[r.defense] = r
    for of in share.values():
        purifier = of.pop("pix2pix")
        assert purifier.defense_settings["images"] == 2000
        assert len(of) == 7
        interval = with_interval(purifier, "recovered").replace(" [", " % [", 1)
        assert interval in ours or interval.replace(" %", "") in ours
        assert percent(max(r.recovered_accuracy or 0 for r in of.values())) in best


def detector_problems(rows: list[dict[str, Any]]) -> list[str]:
    """What in MagNet's rows is missing, or says that to know the detectors doesn't help."""
    at = {(r["false_positives"], r["attacker"], r["eps"]): r for r in rows}
    problems = ["a row is there twice"] if len(at) < len(rows) else []
    for share in (0.01, 0.05):
        for eps in (0.05, 0.1, 0.15, 0.2, 0.3):
            pair = [at.get((share, who, eps)) for who in ("reader", "reader and detectors")]
            if None in pair:
                problems.append(f"{share}, {eps} is missing")
                continue
            blind, both = (row for row in pair if row)
            if both["accuracy"] > blind["accuracy"] or both["accepted"] < blind["accepted"]:
                problems.append(f"{share}, {eps}: who knows the detectors does worse")
    return problems


def test_detectors_rows_are_whole() -> None:
    rows = Lab("smoke").committed_rows("detectors")
    assert detector_problems(rows) == []
    assert detector_problems(rows[1:]) == ["0.01, 0.05 is missing"]  # the control


def known_problems(readme: str, rows: list[dict[str, Any]]) -> list[str]:
    """What of the README's table of attackers is not as in the rows."""
    of = {(r["defense"], r["level"]): r for r in rows if r["eps"] == 0.15}
    names = {"none": "none", "threshold": "`x > 0.5`", "adversarial_pgd": "PGD training",
             "pix2pix": "purifier"}  # fmt: skip
    problems = []
    for defense, name in names.items():
        levels = [of[defense, level] for level in ("transfer", "white-box")]
        without, through = (str(round(100 * row["accuracy"])) for row in levels)
        wanted = f"| {name} | {'' if defense == 'none' else without + ' '}| {through} |"
        if wanted not in readme or {row["n"] for row in levels} != {100}:
            problems.append(wanted)
    return problems


def test_readme_says_what_an_attacker_does_who_knows() -> None:
    readme, rows = (REPO / "README.md").read_text("utf-8"), Lab("smoke").committed_rows("threats")
    assert known_problems(readme, rows) == []
    flattered = readme.replace("| purifier | 98 | 18 |", "| purifier | 98 | 81 |")
    assert known_problems(flattered, rows) == ["| purifier | 98 | 18 |"]


def test_seeds_reach_what_is_claimed() -> None:
    """Three seeds each; the README's means."""
    readme = (REPO / "README.md").read_text("utf-8")
    for classifier, least in {"anet": 0.96, "bnet": 0.97}.items():
        found = {
            r.seed: r.clean_accuracy for r in committed("seeds.jsonl") if r.classifier == classifier
        }
        assert sorted(found) == [0, 1, 2]
        mean = sum(found.values()) / 3
        assert mean >= least
        assert re.search(rf"\| {classifier.title()}, `mnist5k`.*\b{percent(mean)}\b", readme)


def washer_problems(records: list[Record]) -> list[str]:
    """What in the washers' records is not three seeds of every cell, or not as notebook 05 says."""
    recovered: dict[tuple[str, str, str], dict[int, float]] = {}
    for r in records:
        cell = recovered.setdefault((r.dataset, r.defense, r.attack), {})
        cell[r.seed] = r.recovered_accuracy or 0.0
    problems = [f"{cell}: seeds {sorted(v)}" for cell, v in recovered.items() if len(v) != 3]
    problems += [f"{r.defense} saw {r.attack}" for r in records if r.saw_attack_in_training]
    mean = {cell: sum(v.values()) / len(v) for cell, v in recovered.items()}
    for dataset, defense, attack, least, most in [
        ("mnist5k", "threshold", "fgsm", 0.85, 1.0),
        ("mnist5k", "threshold", "deepfool", 0.9, 1.0),
        ("mnist5k", "threshold", "carlini_wagner_l2", 0.9, 1.0),
        ("mnist5k", "threshold", "jsma", 0.0, 0.5),
        ("mnist-m", "threshold", "fgsm", 0.0, 0.6),
    ]:
        if not least <= mean.get((dataset, defense, attack), -1) <= most:
            problems.append(f"{dataset} {defense} {attack} is not within {least} to {most}")
    return problems


def test_washers_were_measured_with_three_seeds() -> None:
    records = committed("washers.jsonl")
    assert len(records) == 3 * 7 * (4 + 2)
    assert washer_problems(records) == []
    dropped = [r for r in records if (r.defense, r.attack, r.seed) != ("threshold", "jsma", 2)]
    assert washer_problems(dropped) == ["('mnist5k', 'threshold', 'jsma'): seeds [0, 1]"]
    seen = [replace(r, saw_attack_in_training=True) for r in records[:1]]
    assert washer_problems(seen + records[1:]) == ["none saw fgsm"]
    flattered = [
        replace(r, recovered_accuracy=0.99) if (r.defense, r.attack) == ("threshold", "jsma") else r
        for r in records
    ]
    assert washer_problems(flattered) == ["mnist5k threshold jsma is not within 0.0 to 0.5"]


def test_weights_are_small_and_say_what_they_are() -> None:
    paths = sorted((RESULTS / "weights").glob("*.safetensors"))
    least = {"anet-mnist": 0.989, "bnet-mnist": 0.992, "resnet20-cifar10-jpeg": 0.86}
    assert [p.stem for p in paths] == [*list(least)[:2], "pix2pix-bnet-mnist", *list(least)[2:]]
    assert sum(p.stat().st_size for p in paths) < LIMIT
    for path in [p for p in paths if p.stem in least]:
        _, made = load_tensors(path)
        data = made["dataset"].removeprefix("folder:").removesuffix(".zip")
        assert f"{made['classifier']}-{data}" == path.stem
        assert made["test_accuracy"] >= least[path.stem]
        told = REPO / ("README.md" if data == "mnist" else "results/README.md")
        assert percent(made["test_accuracy"]) in told.read_text("utf-8")


def data_folder() -> Path | None:
    folders = [os.environ.get("UNFOOL_DATA"), REPO / "data", REPO.parent / "shared" / "datasets"]
    found = [Path(f) for f in folders if f and (Path(f) / "MNIST" / "raw").is_dir()]
    return found[0] if found else None


@pytest.mark.skipif(data_folder() is None, reason="full MNIST is not here: set UNFOOL_DATA")
def test_weights_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from unfool.evaluation import accuracy

    monkeypatch.setenv("UNFOOL_DATA", str(data_folder()))
    lab = Lab(profile="smoke", dataset="mnist")
    part = lab.data.test.first(1500)
    for name in ("anet-mnist", "bnet-mnist"):
        assert accuracy(lab.classifier(name), part.images, part.labels) >= 0.975
        fresh = lab.classifier(name.split("-")[0])  # the control: hardly trained
        assert accuracy(fresh, part.images, part.labels) < 0.975


@pytest.mark.skipif(data_folder() is None, reason="full MNIST is not here: set UNFOOL_DATA")
def test_the_committed_purifier_recovers_what_its_record_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FGSM on the first 2,000 test images, as in the record; bfloat16 may cost a few of them."""
    from unfool.evaluation import measure

    monkeypatch.setenv("UNFOOL_DATA", str(data_folder()))
    lab = Lab(profile="desk", dataset="mnist")
    attacked = lab.adversarial_set("fgsm", classifier="bnet-mnist")
    ready = lab.defense("pix2pix", classifier="bnet-mnist", committed=True)
    (record,) = [
        r for r in finished("desk-table2.jsonl", "bnet-mnist")
        if (r.attack, r.defense) == ("fgsm", "pix2pix")
    ]  # fmt: skip
    assert record.defense_settings | {"committed": True} == lab.settings_of(ready)
    said = record.recovered_accuracy or 0
    for defense, near in ((ready, True), (None, False)):  # the second: the control
        got = measure(lab.classifier("bnet-mnist"), defense, attacked)["recovered_accuracy"]
        assert (abs(got - said) <= 0.01) is near


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text("utf-8"), re.S)
    assert 'profile="classroom"' in example
    exec(compile(example.replace('"classroom"', '"smoke"'), "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_the_readmes_picture_is_the_notebooks() -> None:
    notebook = json.loads((REPO / "notebooks" / "00_start.ipynb").read_text("utf-8"))
    drawn = [
        output["data"]["image/png"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    picture = (RESULTS / "figures" / "course.png").read_bytes()
    assert [base64.b64decode("".join(png)) for png in drawn] == [picture], (
        "copy the figure of notebook 00 to results/figures/course.png"
    )


def test_magnets_false_alarms_are_what_was_asked_for() -> None:
    records = Lab("smoke").committed_records("desk-magnet")
    alarms = [r.false_positive_rate for r in records if r.n_images == 10_000]
    assert all(abs(a - b) < 0.003 for a, b in zip(alarms, (0.01, 0.05), strict=True) if a)


def redrawn_problems(row: dict[str, Any]) -> list[str]:
    """What results/README.md says otherwise than the row of what limits Defense-GAN."""
    n = row["n"]
    said = {
        "clean digits come back": row["right_clean"] > 0.97 * n and row["error_clean"] < 0.01,
        "the search is led off by its goal": row["nearer"] > 0.97 * n
        and row["error_attacked"] < row["error_crossed"],
        "about half are misread": 0.4 < row["right_attacked"] / n < 0.6,
    }
    return [what for what, holds in said.items() if not holds]


def test_what_limits_defense_gan_on_full_mnist() -> None:
    lab = Lab("smoke")
    (row,) = lab.committed_rows("redrawn")
    assert redrawn_problems(row) == []
    assert redrawn_problems(row | {"nearer": 60}) == ["the search is led off by its goal"]
    long, short = (
        r for r in lab.committed_records("desk-defense-gan") if r.defense == "defense_gan"
    )
    assert (long.defense_settings["steps"], short.defense_settings["steps"]) == (200, 50)
    assert long.n_images >= 500
    assert (long.end_to_end_accuracy or 1) < (short.end_to_end_accuracy or 0)
    updates = PROFILES["desk"].gan.epochs * (55_000 // (5 * 50))  # five batches of 50 for each
    assert updates >= 5000


def cifar_problems(section: str, records: list[Record]) -> list[str]:
    """What the section on the JPEG copy says otherwise than its records and profile."""
    of = {(r.defense, r.defense_settings.get("mu"), r.attack): r for r in records}
    two = ("fgsm", "deepfool")
    guided, plain, jpeg, further = (
        [of[name, mu, attack] for attack in two]
        for name, mu in (("pix2pix", 1.0), ("pix2pix", 0.0), ("jpeg", None), ("finetuned", None))
    )
    told = [
        f"recovers {shares[0]} % with μ = 1 and {shares[1]} % with μ = 0, of DeepFool's "
        f"{shares[2]} and {shares[3]} %, where JPEG at quality 75 recovers {shares[4]} %"
        for shares in [[percent(r.recovered_accuracy or 0) for r in (
            guided[0], plain[0], guided[1], plain[1], jpeg[1])]]
    ]  # fmt: skip
    shares = [percent(r.recovered_accuracy or 0) for r in further]
    told.append(f"trained further reads {shares[0]} % of FGSM's and {shares[1]} % of DeepFool's")
    own, its = guided[0].defense_settings, further[0].defense_settings
    most = its.get("images") or PROFILES[further[0].profile].images("deepfool", "train")
    told.append(
        f"{most:,} images of each attack instead of {own['images']:,}, in {its['epochs']} passes "
        f"instead of {own['epochs']}, so as many showings of attacked images"
    )
    if most * its["epochs"] != own["images"] * own["epochs"]:
        told.append("showings differ")
    return [text for text in told if text not in section]


def test_the_section_on_cifar_says_what_was_measured() -> None:
    text = (REPO / "results" / "README.md").read_text("utf-8")
    section = text.split("## CIFAR-10, a JPEG copy")[1].split("\n## ")[0]
    records = committed("cifar.jsonl")
    assert cifar_problems(section, records) == []
    shorter = [
        replace(r, defense_settings=r.defense_settings | {"epochs": 9}) for r in records
    ]  # the control
    assert len(cifar_problems(section, shorter)) == 2
