"""Grids: what they expand to, what is shared, and that every fault is told before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unfool import grids
from unfool.attacks import paper_attacks
from unfool.notebooks import REPO, UsageError

GOOD: dict[str, Any] = {
    "common": {"profile": "smoke", "attacks": ["fgsm"]},
    "rows": [{"classifier": ["anet", "bnet"], "defense": ["none", "threshold"], "seed": [0, 1]}],
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def with_row(**row: Any) -> dict[str, Any]:
    return {"common": GOOD["common"], "rows": [row]}


def test_axes_are_multiplied_and_what_is_shared_is_made_once(tmp_path: Path) -> None:
    jobs = grids.plan(written(tmp_path, GOOD))
    kinds = {kind: [j for j in jobs if j.kind == kind] for kind in grids.KINDS}
    assert [len(kinds[k]) for k in grids.KINDS] == [4, 4, 0, 8]  # 2 classifiers × 2 seeds
    assert len({j.name for j in jobs}) == len(jobs)
    before: set[str] = set()
    for job in jobs:  # a job stands after what it needs
        assert set(job.needs) <= before
        before.add(job.name)
    assert {j.records for j in kinds["experiment"]} == {1}
    assert all(j.seconds > 0 and j.mem_mb > 0 and j.minutes > 0 for j in jobs)
    path = tmp_path / "plan.json"
    path.write_text(grids.dump(jobs))
    assert list(grids.load(path).values()) == jobs


def test_epochs_of_one_purifier_share_it(tmp_path: Path) -> None:
    jobs = grids.plan(written(tmp_path, with_row(defense="pix2pix", settings={"after": [1, 2]})))
    (purifier,) = [j for j in jobs if j.kind == "defense"]
    experiments = [j for j in jobs if j.kind == "experiment"]
    assert len(experiments) == 2
    assert all(purifier.name in j.needs for j in experiments)
    assert len(purifier.needs) == 2  # the classifier and its attacked training images
    alone = grids.plan(written(tmp_path, with_row(defense="pix2pix")))
    assert not [j for j in alone if j.kind == "defense"]  # shared by nobody
    assert alone[-1].seconds > experiments[0].seconds


def test_the_defence_of_another_classifier_needs_that_ones_images(tmp_path: Path) -> None:
    row = with_row(classifier="anet", made_on="anet", trained_for="bnet", defense="pix2pix")
    names = [j.name for j in grids.plan(written(tmp_path, row))]
    assert [n.split("-mnist5k")[0] for n in names] == [
        "anet", "bnet", "fgsm-anet-test", "fgsm-bnet-train", "anet-pix2pix",
    ]  # fmt: skip


def test_committed_weights_are_nobodys_job(tmp_path: Path) -> None:
    row = with_row(dataset="mnist", classifier="anet-mnist")
    assert [j.kind for j in grids.plan(written(tmp_path, row))] == ["adversarial", "experiment"]


def test_attacks_are_the_papers_or_ones_own() -> None:
    assert tuple(grids.attack_list("mnist5k", ["paper"])) == paper_attacks("mnist5k")
    fgsm, cw = grids.attack_list("mnist5k", [{"fgsm": {"eps": 0.3}}, "carlini_wagner_l2"])
    assert fgsm.settings == {"eps": 0.3}
    assert cw == paper_attacks("mnist5k")[3]


def test_what_is_learned_from_may_differ_from_what_is_tested(tmp_path: Path) -> None:
    tested = ["fgsm", {"deepfool": {"overshoot": 0.2}}]
    row = with_row(attacks=tested, defense="pix2pix", settings={"lam": [1.0, 10.0], "images": 9},
                   variants=[{}, {"statistics": "batch"}])  # fmt: skip
    for learns, sets, names in (
        (["paper"], 2 + 4, ["fgsm", "deepfool", "jsma", "carlini_wagner_l2"]),
        (["each"], 2 + 2, ["fgsm"]),
        ([], 2 + 2, ["fgsm", "deepfool"]),
    ):
        row["rows"][0]["learns"] = learns
        jobs = grids.plan(written(tmp_path, row))
        experiments = [j for j in jobs if j.kind == "experiment"]
        assert [j.records for j in experiments] == [4, 4]  # 2 attacks × 2 variants
        assert sum(j.kind == "adversarial" for j in jobs) == sets
        assert not [j for j in jobs if j.kind == "defense"]
        seen = grids.lessons("mnist5k", tested, learns, "fgsm")
        assert [a.name for a in seen] == names
        (deepfool,) = grids.lessons("mnist5k", tested, learns, "deepfool")[-1:]
        if learns == ["each"]:  # with the paper's settings
            assert deepfool == paper_attacks("mnist5k")[1]


def job(name: str, seconds: float, *needs: str, gpus: int = 0) -> grids.Job:
    return grids.Job(name, "experiment", "", {}, needs, seconds=seconds, gpus=gpus)


def test_expected_time_follows_the_job_graph() -> None:
    fork = [job("a", 5), job("b", 3, "a"), job("c", 4, "a"), job("d", 2, "b", "c")]
    assert grids.makespan(fork, 1) == 14  # the sum
    assert grids.makespan(fork, 2) == 11  # a, c, d: the longest chain
    assert grids.makespan(fork, 9) == 11
    assert grids.makespan(fork[1:], 2) == 6  # a is done
    assert grids.makespan([job(str(k), 1) for k in range(7)], 2) == 4
    mixed = [job("a", 5, gpus=1), job("b", 5, gpus=1), job("c", 5)]
    assert grids.makespan(mixed, 2, gpus=1) == 10
    assert grids.makespan(mixed, 2, gpus=2) == 5
    assert grids.makespan([], 2) == 0


def test_readme_tells_the_hours_of_each_grid_and_of_the_whole_paper() -> None:
    from benchmarks.hours import each, table

    readme = (REPO / "workflow" / "README.md").read_text("utf-8")
    for made, row in ((each(), "| `table2` |"), (table(), "| 2, 4, 6: digits, `desk` |")):
        assert made in readme, "run benchmarks/hours.py and put its tables there"
        assert made not in readme.replace(row, "| digits |")  # the control


def test_networks_that_train_longer_on_photographs_cost_more(tmp_path: Path) -> None:
    """The seconds of a classifier follow the epochs that it is trained for."""

    def work(classifier: str, dataset: str) -> float:
        row = with_row(profile="desk", classifier=classifier, dataset=dataset)
        (job, *_) = grids.plan(written(tmp_path, row))
        assert job.kind == "classifier"
        return job.seconds - grids._costs()["start"]

    assert work("densenet40", "cifar10") == pytest.approx(3 * 5 / 6 * work("densenet40", "mnist"))
    assert work("a", "cifar10") == pytest.approx(5 / 6 * work("a", "mnist"))  # the control
    inside, named = (tmp_path / "cifar10" / "pets", tmp_path / "cifar10-small")
    for folder in (inside, named):
        folder.mkdir(parents=True)
    seconds = [work("densenet40", f"folder:{folder}") for folder in (named, inside)]
    assert seconds[0] == pytest.approx(3 * seconds[1])  # the path has no say, the name has


def test_another_notebook_has_its_own_parameters(tmp_path: Path) -> None:
    content = {"notebook": "11_attacker", "rows": [{"profile": "smoke", "seed": [0, 1]}]}
    jobs = grids.plan(written(tmp_path, content))
    assert [j.notebook for j in jobs] == ["11_attacker"] * 2
    assert jobs[0].parameters["eps"] == 0.15  # its own default


@pytest.mark.parametrize("name", sorted(path.stem for path in grids.GRIDS.glob("*.yaml")))
def test_committed_grids_are_sound(name: str) -> None:
    assert grids.plan(name)
    assert (grids.GRIDS / f"{name}.yaml").read_text().startswith("# ")


BAD = {
    "an unknown attack": (with_row(attacks=["fgms"]), r"unknown attack 'fgms' \(did you mean fgsm"),
    "its setting": (with_row(attacks=[{"fgsm": {"epsilon": 1}}]), "unknown setting of fgsm 'eps"),
    "an unknown classifier": (with_row(classifier="anett"), "unknown classifier 'anett'.*anet-mni"),
    "an unknown defence": (with_row(defense="pix"), "unknown defence 'pix'.*choose from none, thr"),
    "an unknown data set": (with_row(dataset="mnist6k"), r"data set 'mnist6k' \(did you mean mnis"),
    "an unknown profile": (with_row(profile="big"), "unknown profile 'big': choose from smoke"),
    "a lesson's unknown profile": (
        {"notebook": "02", "rows": [{"profile": "tiny"}]}, "unknown profile 'tiny': choose from sm"
    ),
    "a setting in words": (
        with_row(defense="pix2pix", settings={"width": "wide"}),
        "setting width must be a whole number, not 'wide'",
    ),
    "an unknown device": (with_row(device="gpu"), "unknown device 'gpu': choose auto, cpu, cuda"),
    "a defence's setting": (
        with_row(defense="bits", settings={"bit": 3}),
        r"unknown setting of bits 'bit' \(did you mean bits",
    ),
    "an unknown lesson": (with_row(learns=["fgms"]), r"unknown attack 'fgms' \(did you mean fgsm"),
    "no variant": (with_row(variants=[]), r"variants must be a list of settings, such as \[{}"),
    "a variant that needs training": (
        with_row(defense="pix2pix", variants=[{"lam": 1}]),
        "unknown variant 'lam': choose from after, statistics",
    ),
    "a setting of none": (with_row(settings={"x": 1}, defense="none"), "setting of none 'x'"),
    "a doubled row": ({**GOOD, "rows": GOOD["rows"] * 2}, "row 2 doubles anet-none.*take one"),
    "a doubled value": (with_row(seed=[1, 1]), "row 1 doubles"),
    "an empty axis": (with_row(seed=[]), "row 1: the axis seed is empty: give it a value"),
    "an empty setting": (with_row(defense="bits", settings={"bits": []}), "axis bits is empty"),
    "no attack": (with_row(attacks=[]), "attacks must be a list of names, such as"),
    "a seed in words": (with_row(seed="zero"), "seed must be a whole number from 0 on, not 'zero'"),
    "a seed below 0": (with_row(seed=[0, -1]), "seed must be a whole number from 0 on, not -1"),
    "half a seed": (with_row(seed=0.5), "seed must be a whole number from 0 on, not 0.5"),
    "an undeclared parameter": (with_row(epochs=3), "90_experiment has no parameter 'epochs'"),
    "a parameter's type": (with_row(defense=3), "parameter 'defense' must be a string"),
    "settings that are none": (with_row(settings=[3]), "settings must be names: values, not"),
    "an unknown key": ({**GOOD, "row": []}, "unknown key 'row': known are notebook, resources"),
    "an unknown resource": ({**GOOD, "resources": {"ram": 1}}, "unknown resource 'ram': choose"),
    "no memory": ({**GOOD, "resources": {"mem_mb": 0}}, "mem_mb must be a whole number from 1 on"),
    "an unknown notebook": ({**GOOD, "notebook": "77"}, "unknown notebook '77': there are"),
    "no rows": ({"rows": []}, "needs `rows:`, a list"),
    "no mapping": ("just words", "needs `rows:`, a list"),
    "no YAML": ("rows: [", "is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_one_line_with_the_remedy(fault: str, tmp_path: Path) -> None:
    content, message = BAD[fault]
    with pytest.raises(UsageError, match=message) as caught:
        grids.plan(written(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert "grid mine" in str(caught.value)


def test_an_unknown_grid_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown grid 'smok': there are .*smoke"):
        grids.plan("smok")
    assert grids.plan(written(tmp_path, GOOD))  # the control: a good one passes
