"""Set the committed records beside the paper's tables: writes results/table2.md.

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
COLUMNS = """
| attack | fooled | size | `x > 0.5` | denoiser | purifier | seeds | paper | verdict |
|---|---|---|---|---|---|---|---|---|
"""
NAMES = {"fgsm": "FGSM", "deepfool": "DeepFool", "jsma": "JSMA", "carlini_wagner_l2": "C&W"}


def main() -> None:
    """Write the table; say what is missing."""
    source, path = FOLDER / "records" / "desk-table2.jsonl", FOLDER / "table2.md"
    if not source.exists():
        sys.exit(f"{source.name} is not there yet: results/make_records.py desk-table2 makes it")
    write_text(path, table_2(read_records(source)))
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def table_2(records: Sequence[Record]) -> str:
    """Return the table as Markdown; what has no record is said to be untested."""
    lines = [HEAD.format(epochs=EPOCHS)]
    for classifier, printed in TABLE_2.items():
        of = [r for r in records if r.classifier.split("-")[0] == classifier]
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


if __name__ == "__main__":
    main()
