"""Set the committed records beside the paper's tables: writes results/table2.md and table4.md.

    .venv/bin/python results/make_tables.py

The last epoch counts, as fixed beforehand. `evaluation.reproduced` says what the verdicts mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from unfool.artifacts import REPO, write_text
from unfool.evaluation import Record, read_records, reproduced

FOLDER = REPO / "results"
EPOCHS = 20
TABLE_2 = {
    "anet": {"fgsm": 0.9873, "deepfool": 0.9844, "jsma": 0.9825, "carlini_wagner_l2": 0.9539},
    "bnet": {"fgsm": 0.9870, "deepfool": 0.9868, "jsma": 0.9888, "carlini_wagner_l2": 0.9651},
}
TABLE_4 = {  # (made on, purifier of)
    ("anet", "bnet"): dict(zip(TABLE_2["anet"], (0.9813, 0.9836, 0.9806, 0.9411), strict=True)),
    ("bnet", "anet"): dict(zip(TABLE_2["anet"], (0.9756, 0.9724, 0.9689, 0.9382), strict=True)),
}
HEAD = """# The paper's Table 2 on full MNIST

Recovered accuracy in %: of the test images that the attack turned wrong, the share that is read
rightly again. Profile `desk`: U-Net width 16, {epochs} epochs, 10,000 training and 2,000 test
images per attack. The paper names neither its attacks' settings nor its sizes; ours are in the
records.

- "reproduced": the 90 % interval lies within one point of the paper's figure (two one-sided tests);
  "differs": outside; "undecided": a foot in both, so more images or seeds are needed.
- "fooled": of the images that the classifier read rightly. "Size": median L2 of the successes, and
  median number of changed pixels for JSMA.
- `x > 0.5` and the denoiser have seen no attack.
"""
HEAD_4 = """# The paper's Table 4 on full MNIST

Images made on one classifier, purified by the purifier of the other. Recovered accuracy in %, of
the images that fooled the classifier they were made on. The paper doesn't say which classifier
reads the purified images, so both do; "raw" is what it reads of the very same images without a
purifier. Profile `desk`: U-Net width 16, {epochs} epochs, 2,000 test images per attack. Verdicts as
in `table2.md`.
"""
COLUMNS_4 = """
| attack | read by | raw | `x > 0.5` | purifier | seeds | paper | verdict |
|---|---|---|---|---|---|---|---|
"""
COLUMNS = """
| attack | fooled | size | `x > 0.5` | denoiser | purifier | seeds | paper | verdict |
|---|---|---|---|---|---|---|---|---|
"""
NAMES = {"fgsm": "FGSM", "deepfool": "DeepFool", "jsma": "JSMA", "carlini_wagner_l2": "C&W"}


def main() -> None:
    """Write the tables; say what is missing."""
    for number, table in {2: table_2, 4: table_4}.items():
        source = FOLDER / "records" / f"desk-table{number}.jsonl"
        if not source.exists():
            sys.exit(
                f"{source.name} is not there yet: results/make_records.py {source.stem} makes it"
            )
        path = FOLDER / f"table{number}.md"
        write_text(path, table(read_records(source)))
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def table_2(records: Sequence[Record]) -> str:
    """Return the table as Markdown; what has no record is said to be untested."""
    lines = [HEAD.format(epochs=EPOCHS)]
    for classifier, printed in TABLE_2.items():
        of = [r for r in records if short(r.classifier) == classifier]
        lines += [f"\n## {classifier}\n", COLUMNS]
        lines += [row(attack, claim, of) for attack, claim in printed.items()]
        last = [r for r in of if final(r)]
        if last:
            before = fmean(r.clean_accuracy for r in last)
            after = fmean(r.defended_clean_accuracy for r in last)
            lines.append(f"\nClean accuracy: {before:.2%}; purified {after:.2%}.\n")
    return "".join(lines)


def final(record: Record) -> bool:
    """Whether this is the whole purifier."""
    return record.defense == "pix2pix" and (
        record.defense_settings.get("epochs") == EPOCHS and "after" not in record.defense_settings
    )


def row(attack: str, claim: float, records: Sequence[Record]) -> str:
    """Return one line: what was measured under an attack, beside what the paper prints."""
    mine = [r for r in records if r.attack == attack]
    last = [r for r in mine if final(r)]
    if not last:
        gap = " | ".join(["-"] * 6)
        return f"| {NAMES[attack]} | {gap} | {claim:.2%} | not run |\n"
    verdict, mean, low, high = reproduced(last, claim)
    size = fmean((r.l0_median if attack == "jsma" else r.l2_median) or 0 for r in last)
    rivals = [
        f"{fmean(r.recovered_accuracy or 0 for r in found):.1%}" if found else "-"
        for found in ([r for r in mine if r.defense == d] for d in ("threshold", "denoiser"))
    ]
    fooled = fmean(r.attack_success for r in last)
    cells = [
        NAMES[attack], f"{fooled:.1%} of {last[0].n_attacked}",
        f"{size:.0f} pixels" if attack == "jsma" else f"{size:.2f}", *rivals,
        f"{mean:.2%} [{low:.2%}, {high:.2%}]", str(len(last)), f"{claim:.2%}", verdict,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |\n"


def table_4(records: Sequence[Record]) -> str:
    """Return Table 4 as Markdown, with both readings of it."""
    lines = [HEAD_4.format(epochs=EPOCHS)]
    for (made, other), printed in TABLE_4.items():
        lines += [f"\n## {made}/{other}: made on {made}, purified by {other}'s\n", COLUMNS_4]
        for attack, claim in printed.items():
            mine = [r for r in records if r.attack == attack and short(r.made_on) == made]
            lines += [crossed_row(attack, reader, claim, mine, other) for reader in (made, other)]
    return "".join(lines)


def short(classifier: str) -> str:
    """Return "anet" for "anet-mnist"."""
    return classifier.split("-")[0]


def crossed_row(
    attack: str, reader: str, claim: float, records: Sequence[Record], owner: str
) -> str:
    """Return one line: what a classifier reads of an attack's images, raw and purified."""
    read = [r for r in records if short(r.classifier) == reader]
    last = [r for r in read if final(r) and short(r.trained_for) == owner]
    head = f"| {NAMES[attack]} | {reader} | "
    if not last:
        return head + " | ".join(["-"] * 4) + f" | {claim:.2%} | untested at this scale |\n"
    verdict, mean, low, high = reproduced(last, claim)
    shares = [
        fmean(r.recovered_accuracy or 0 for r in read if r.defense == name)
        for name in ("none", "threshold")
    ]
    cells = [*(f"{share:.1%}" for share in shares), f"{mean:.2%} [{low:.2%}, {high:.2%}]"]
    return head + " | ".join([*cells, str(len(last)), f"{claim:.2%}", verdict]) + " |\n"


if __name__ == "__main__":
    main()
