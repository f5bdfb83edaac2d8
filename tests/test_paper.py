"""The paper's tables and figures: each printed cell, a verdict for each, in step with the files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from unfool import multiverse, paper
from unfool.artifacts import REPO
from unfool.attacks import paper_attacks
from unfool.cli import main
from unfool.evaluation import Record, read_records
from unfool.figures import Figure
from unfool.profiles import PROFILES

FOUR = {a.name: a.settings for a in paper_attacks("mnist")}
PURIFIER = PROFILES["desk"].purifier.named()
PRINTED = {2: 783.58, 3: 663.20, 4: 774.17, 5: 644.19, 6: 2763.5}  # sums, taken from the text
WITHOUT: dict[str, Any] = {"defense_settings": {}, "learned_from": [], "trained_for": ""}


def desk(attack: str = "fgsm", recovered: float = 0.98, **change: Any) -> Record:
    """A record of a whole purifier before anet, as `make_records.py desk-table2` leaves it."""
    one = read_records(REPO / "results" / "records" / "classroom.jsonl")[0]
    fields: dict[str, Any] = dict(
        dataset="mnist", profile="desk", classifier="anet-mnist", made_on="anet-mnist",
        trained_for="anet-mnist", defense="pix2pix", defense_settings=PURIFIER, attack=attack,
        attack_settings=FOUR[attack], learned_from=list(FOUR), n_success=2000, n_attacked=2000,
        recovered_accuracy=recovered, seed=0,
    )  # fmt: skip
    return replace(one, **(fields | change))


def rows(number: int, records: list[Record], *start: str) -> list[dict[str, str]]:
    table = paper.tables(records)[number - 1]
    found = [r for r in table.rows if r[: len(start)] == start]
    return [dict(zip(table.head, row, strict=True)) for row in found]


def test_every_printed_cell_is_there() -> None:
    cells = paper.printed()
    count = {n: sum(c["table"] == str(n) for c in cells) for n in range(1, 7)}
    assert count == {1: 4, 2: 8, 3: 8, 4: 8, 5: 8, 6: 48}
    for number, total in PRINTED.items():
        mine = [float(c["percent"]) for c in cells if c["table"] == str(number)]
        assert sum(mine) == pytest.approx(total)
    assert all(0 < float(c["percent"]) < 100 for c in cells)
    assert {c["attack"] for c in cells} == {"", *FOUR}
    assert {c["column"] for c in cells if c["table"] == "6"} == set(paper.DEFENSES)


def test_a_cell_has_what_was_measured_and_the_verdict() -> None:
    records = [
        desk("fgsm", 0.9873),
        desk("jsma", 0.78, l0_median=41.0),
        desk("fgsm", 0.5, **WITHOUT | {"defense_settings": {"level": 0.5}}, defense="threshold"),
        desk("deepfool", 0.9744, n_success=1000),
    ]
    (fgsm,), (jsma,) = rows(2, records, "Anet", "FGSM"), rows(2, records, "Anet", "JSMA")
    assert (fgsm["verdict"], fgsm["x > 0.5"], fgsm["seeds"]) == ("reproduced", "50.0", "1")
    assert fgsm["best washer"] == "x > 0.5: 50.0"
    assert fgsm["ours"].startswith("98.73 [")
    assert fgsm["paper"] == "98.73"
    assert (jsma["verdict"], jsma["size"]) == ("differs", "41 pixels")
    assert rows(2, records, "Anet", "DeepFool")[0]["verdict"] == "undecided"
    assert rows(2, records, "Anet", "C&W")[0]["verdict"] == "untested at this scale"
    assert rows(2, records, "Bnet", "FGSM")[0]["verdict"] == "untested at this scale"


@pytest.mark.parametrize(
    "change",
    [
        {"defense_settings": {**PURIFIER, "after": 3}},  # not its end
        {"defense_settings": {**PURIFIER, "lam": 10.0}},  # an ablation
        {"learned_from": ["fgsm"]},  # not the pooled one
        {"attack_settings": {"eps": 0.3}},  # another attack
        {"trained_for": "bnet-mnist"},  # another classifier's
        {"made_on": "bnet-mnist"},
    ],
)
def test_what_is_not_the_papers_purifier_is_no_result(change: dict[str, Any]) -> None:
    assert rows(2, [desk(**change)], "Anet", "FGSM")[0]["verdict"] == "untested at this scale"


def test_a_smaller_scale_is_shown_and_not_compared() -> None:
    small = desk(
        "fgsm", 0.9873, profile="classroom", dataset="mnist5k", classifier="anet", made_on="anet",
        trained_for="anet", defense_settings=PROFILES["classroom"].purifier.named(),
    )  # fmt: skip
    (row,) = rows(2, [small], "Anet", "FGSM")
    assert (row["verdict"], row["scale"]) == ("not comparable", "classroom, mnist5k")
    (row,) = rows(2, [small, desk("fgsm", 0.9873)], "Anet", "FGSM")  # the larger one counts
    assert (row["verdict"], row["scale"]) == ("reproduced", "desk, mnist")


def test_a_smaller_network_on_the_jpeg_copy_is_shown_and_not_compared() -> None:
    name = "resnet20-cifar10-jpeg"
    fields: dict[str, Any] = dict(
        dataset=paper.JPEG, classifier=name, made_on=name, trained_for=name,
        attack_settings={"eps": 0.1}, learned_from=["fgsm", "deepfool"],
    )  # fmt: skip
    guided = desk("fgsm", 0.8282, **fields, defense_settings=PURIFIER | {"mu": 1.0})
    (row,) = rows(3, [guided], "Rnet", "FGSM")
    assert (row["verdict"], row["scale"]) == ("not comparable", "desk, cifar10-jpeg.zip, resnet20")
    assert (row["best washer"], row["trained further"]) == ("–", "–")
    alone = fields | {"learned_from": [], "trained_for": ""}
    beside = [
        desk("fgsm", 0.1, **alone, defense="bits", defense_settings={"bits": 3}),
        desk("fgsm", 0.3, **alone, defense="jpeg", defense_settings={"quality": 75}),
        desk("fgsm", 0.5, **fields, defense="finetuned", defense_settings={}),
    ]
    (row,) = rows(3, [guided, *beside], "Rnet", "FGSM")
    assert (row["best washer"], row["trained further"]) == ("JPEG 75: 30.0", "50.0")
    plain = desk("fgsm", 0.8282, **fields)  # without the guided loss it isn't the paper's
    paper_own = replace(guided, dataset="cifar10")  # nor on its data, of this size
    for other in (plain, paper_own):
        assert rows(3, [other], "Rnet", "FGSM")[0]["verdict"] == "untested at this scale"
    assert rows(3, [guided], "Dnet", "FGSM")[0]["verdict"] == "untested at this scale"


def test_seeds_are_joined_and_none_counts_twice() -> None:
    records = [desk("fgsm", 0.98 + 0.001 * seed, seed=seed) for seed in range(3)]
    (row,) = rows(2, [*records, records[0]], "Anet", "FGSM")
    assert row["seeds"] == "3"
    assert row["ours"].startswith("98.10 [")


def test_both_readings_of_a_transferred_cell_stand_beside_the_raw_images() -> None:
    away = {"attack": "deepfool", "made_on": "bnet-mnist"}
    records = [
        desk(recovered=0.9724, **away, classifier="bnet-mnist"),
        desk(recovered=0.5, **away),
        desk(
            recovered=0.25,
            **away,
            defense="none",
            defense_settings={},
            learned_from=[],
            trained_for="",
        ),
    ]
    read = {row["read by"]: row for row in rows(4, records, "Bnet/Anet", "DeepFool")}
    assert (read["Bnet"]["verdict"], read["Bnet"]["raw"]) == ("reproduced", "–")
    assert (read["Anet"]["verdict"], read["Anet"]["raw"]) == ("differs", "25.0")
    assert {r["verdict"] for r in rows(4, records, "Anet/Bnet")} == {"untested at this scale"}


def test_table_6_is_over_all_images_and_compares_only_what_the_paper_measured() -> None:
    strong = {"attack_settings": {"eps": 0.3}, "classifier": "d", "made_on": "d"}
    learned = {"learned_from": ["fgsm", "carlini_wagner_l2"], "trained_for": "d"}
    records = [
        desk(**strong, **learned, end_to_end_accuracy=0.983, n_images=10_000),
        desk(**strong, defense="magnet", defense_settings={}, learned_from=[], trained_for="",
             end_to_end_accuracy=0.094),
    ]  # fmt: skip
    read = {row["column"]: row for row in rows(6, records, "FGSM", "D")}
    assert read["our method"]["verdict"] == "reproduced"
    assert read["our method"]["ours"].startswith("98.30")
    assert read["MagNet"]["verdict"] == "not comparable"  # copied, of another attacker
    assert read["Defense-GAN"]["verdict"] == "untested at this scale"
    washed = desk(**strong, **WITHOUT, defense="threshold", end_to_end_accuracy=0.613)
    table = paper.tables([*records, washed])[5]
    assert table.beside is not None
    head, (own,) = table.beside
    told = dict(zip(head, own, strict=True))
    assert told["x > 0.5"].startswith("61.30 [")
    assert told["purifier"].startswith("98.30 [")
    assert told["APE-GAN"] == "–"
    assert table.verdicts == paper.tables(records)[5].verdicts  # no printed cell is added
    assert paper.tables([])[5].beside is None


def test_table_6_takes_no_shorter_search_for_defense_gan() -> None:
    a = {"attack_settings": {"eps": 0.3}, "classifier": "a", "made_on": "a", **WITHOUT}
    whole = {"steps": 200, "restarts": 10, "rate": 10.0, "momentum": 0.7}
    short, long = (
        desk(**a | {
            "defense": "defense_gan", "defense_settings": whole | {"steps": steps},
            "end_to_end_accuracy": share,
        })
        for steps, share in ((50, 0.6), (200, 0.5))
    )  # fmt: skip
    for records in ([short, long], [long, short]):
        read = {row["column"]: row for row in rows(6, records, "FGSM", "A")}
        assert read["Defense-GAN"]["ours"].startswith("50.00 [")
    assert {row["ours"] for row in rows(6, [short], "FGSM", "A")} == {"–"}


def test_table_6_says_what_magnet_refused() -> None:
    fields: dict[str, Any] = dict(
        WITHOUT, attack_settings={"eps": 0.3}, defense="magnet",
        defense_settings={"false_positives": 0.01}, recovered_or_rejected=1.0,
    )  # fmt: skip
    records = [
        desk(**fields, classifier=name, made_on=name, n_success=800, rejected=k,
             false_positive_rate=alarms)
        for name, k, alarms in (("a", 800, 0.016), ("b", 700, 0.02))
    ]  # fmt: skip
    said = paper.tables(records)[5].told
    assert "1 % of false alarms asked for (1.6 to 2.0 % of these clean images)" in said
    assert "refused 1,500 of 1,600 of FGSM's (100.0 % right or refused)." in said
    assert paper.tables([])[5].told == ""


def test_without_any_record_everything_is_untested() -> None:
    for table in paper.tables([]):
        assert set(table.verdicts) == {"untested at this scale"}
        assert {len(row) for row in table.rows} == {len(table.head)}
    assert not any(isinstance(f, Figure) for f in paper.paper_figures([]).values())


def test_damaged_lines_are_named_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    (tmp_path / "records").mkdir()
    good = json.dumps(asdict(desk()))
    lines = [good, good[: len(good) // 2], json.dumps({**asdict(desk()), "schema": 2}), "[]", "\0"]
    (tmp_path / "records" / "mine.jsonl").write_text("\n".join(lines) + "\n")
    records, skipped = paper.gather()
    assert len(records) == 1
    assert [s.split("mine.jsonl, ")[1].split(" is")[0] for s in skipped] == [
        "line 2", "line 3", "line 4", "line 5",
    ]  # fmt: skip
    assert "schema 2, not 1" in skipped[1]
    monkeypatch.setattr(paper, "table_files", lambda *_: {})
    assert main(["tables"]) == 0
    said = capsys.readouterr().out
    page = paper.skipped_html(skipped)  # as it stands on the page of the tables
    assert paper.skipped_html([]) == ""  # the control
    for text in (said, page):
        assert "4 lines skipped" in text
        assert "mine.jsonl, line 2" in text


# --- the committed files ----------------------------------------------------------------------


def stale(files: dict[str, str]) -> list[str]:
    """Which of the files are not on the disk as they would be written now."""
    return [name for name, text in files.items() if (paper.RESULTS / name).read_text() != text]


def test_the_committed_tables_are_in_step_with_the_records() -> None:
    records, skipped = paper.gather()
    assert skipped == []

    def files(of: list[Record]) -> dict[str, str]:
        return paper.table_files(paper.tables(of), multiverse.cells(of, paper.printed()))

    assert stale(files(records)) == [], "run `unfool tables` and commit what it wrote"
    assert files(records) == files(records)  # twice the same
    lost = stale(files([r for r in records if r.attack != "fgsm"]))  # the control
    assert {"tables/table2.md", "tables/multiverse.md"} <= set(lost)


def test_the_committed_figures_are_in_step_with_the_records() -> None:
    records, _ = paper.gather()
    made = paper.paper_figures(records)
    assert stale(paper.figure_files(made)) == [], "run `unfool figures` and commit what it wrote"
    drawn = {paper.file_of(n) for n, figure in made.items() if isinstance(figure, Figure)}
    there = {p.name for p in (paper.RESULTS / "figures").glob("*.png")}
    assert drawn == there - {"course.png", "scale.png"}  # of notebook 00, of benchmarks/scale.py
    lost = [r for r in records if r.defense_settings.get("after") != 2]  # the control
    assert stale(paper.figure_files(paper.paper_figures(lost))) == ["figures/README.md"]


def test_the_figures_are_written_twice_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, the second time into a folder that is still empty."""
    records, _ = paper.gather()
    fewer = [r for r in records if r.defense_settings.get("after") != 2]

    def written(to: str, of: list[Record]) -> dict[str, bytes]:
        monkeypatch.setattr(paper, "RESULTS", tmp_path / to)
        (tmp_path / to).mkdir()
        monkeypatch.setattr(paper, "gather", lambda _: (of, []))
        _, paths = paper.write_figures()
        return {path.name: path.read_bytes() for path in paths}

    first = written("first", records)
    assert first == written("second", records)
    there = {p.name for p in (REPO / "results" / "figures").iterdir()}
    assert first.keys() == there - {"course.png", "scale.png"}
    assert first["figure5a.png"] != written("third", fewer)["figure5a.png"]  # the control


def test_a_block_is_replaced_and_its_marks_are_needed() -> None:
    text = "a\n<!-- tables: made by `unfool tables` -->\nold\n<!-- end of tables -->\nb\n"
    new = paper.between(text, "tables", "new \\1\n")
    assert new == text.replace("old\n", "new \\1\n")
    assert paper.between(new, "tables", "new \\1\n") == new
    with pytest.raises(ValueError, match="put these two lines"):
        paper.between("nothing", "tables", "new")
