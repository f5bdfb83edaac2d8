"""What became of a defence of your own: in words, as rows, as one HTML page that needs no other.

See `own.judge`, whose result is told here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from unfool.attacks import AttackSettings
from unfool.evaluation import Record, append_record, append_rows, paired_difference, wilson
from unfool.figures import Figure, lines
from unfool.files import write_text
from unfool.lab import Lab, records_path
from unfool.own import Case, Judgement, judge, one_line
from unfool.provenance import git_commit, versions
from unfool.report import escaped, facts_html, page, results_html, results_table, table_html

WORST = "worst of all"
WHO = {
    "noise": "knows nothing: random corners of the ball",
    "transfer": "knows the classifier: gradients of it alone",
    "surrogate": "knows the classifier and the design: gradients through a defence of their own",
    "black-box": "knows nothing, may ask for scores",
    "white-box": "knows everything: gradients through the defence",
    WORST: "an image counts only if it is right under each of them",
}
"""Who attacks, by level, in the words of the page."""

GUARDS = (
    "Who knows less must not win",
    "a larger eps and more steps must not fool fewer",
    "twice the steps must gain next to nothing",
    "at eps 1, where any image is allowed, nothing may stay right",
    "the loss needs a gradient",
    "answers must not change from look to look, unless attackers average them",
    "nor with the images beside it",
    "what fools a stand-in (BPDA, EOT) must fool the defence",
    "the attack must return the best image that it met",
    "it must have finished",
    "it must find adversarial images that were planted (binarisation test)",
)
"""What the guards ask, in plain words."""


def evaluate(
    defense: str, classifier: str, dataset: str, images: int, eps: Sequence[float] | None,
    bpda: str, eot: int | None, surrogate: str | None, profile: str, seed: int, device: str,
    path: Path | None, out: Path | None,
) -> str:  # fmt: skip
    """Do what `unfool evaluate` asks for: judge, write, and return what it prints.

    Raises:
        UsageError: something cannot be measured; then nothing was written.
    """
    with one_line():
        lab = Lab(profile=profile, dataset=dataset, seed=seed, device=device)
    judged = judge(
        lab, defense, classifier, images=images, eps=eps, bpda=bpda, eot=eot, path=path,
        surrogate=surrogate, out=records_path().parent if out is None else out,
    )  # fmt: skip
    page = write(judged, out)
    return f"{as_text(judged)}\n\nrecords and rows: {page.parent}\npage: {page}"


def verdict(judged: Judgement) -> tuple[str, list[str]]:
    """Return the verdict in one line, and what it rests on, a sentence each."""
    case, found = judged.case, judged.found
    told = [
        f"Unattacked, {_share(found.clean)} of {len(case.x)} images are read rightly; by "
        f"{case.classifier} alone, {_share(judged.alone.clean)}.",
        _blind(judged),
    ]
    more, less = [], []
    for eps, worst, bare in zip(
        case.eps, found.worst, judged.alone.right["white-box"], strict=True
    ):
        gain, low, high = paired_difference(worst, bare)
        more += [f"{eps:g}"] if low > 0 else []
        less += [f"{eps:g}"] if high < 0 else []
        told.append(
            f"At eps {eps:g}, {_share(worst)} withstand every attacker, without the defence "
            f"{_share(bare)}: {100 * gain:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]."
        )
    told.append(_washed(judged))
    if found.warnings:
        n = len(found.warnings)
        told.append(
            f"{n} guard{'s speak' if n > 1 else ' speaks'}: the numbers under attack are upper "
            "bounds, and not to be reported before the attack is mended."
        )
    return _head(judged, more, less), told


def _head(judged: Judgement, more: Sequence[str], less: Sequence[str]) -> str:
    """Return the verdict, given the sizes at which more or less is left than without a defence."""
    if judged.found.warnings:
        return "Not measured yet: the attack failed, which is no robustness"
    if judged.case.before is None:
        return "This is the classifier alone"
    if more or less:
        sides = [f"more at eps {', '.join(more)}"] if more else []
        sides += [f"less at eps {', '.join(less)}"] if less else []
        rest = len(more) + len(less) < len(judged.case.eps)
        return (
            f"Against attackers who know it, it holds {' and '.join(sides)}"
            f"{', and elsewhere no more' if rest else ''} than the classifier alone"
        )
    return "An attacker who knows it gets past it: it adds nothing that these images show"


def _blind(judged: Judgement) -> str:
    """Say what attackers left who don't know the defence."""
    own = [r for r in judged.records if r.defense == judged.case.defense]
    least = min(own, key=lambda r: r.end_to_end_accuracy)
    return (
        f"Under attackers who don't know it, at least "
        f"{_percent(least.end_to_end_accuracy, least.end_to_end_low, least.end_to_end_high)} of "
        f"all images are read rightly ({least.attack})."
    )


def _washed(judged: Judgement) -> str:
    best = max(judged.washers, key=lambda name: int(judged.washers[name].sum()))
    eps = judged.case.eps[judged.case.middle]
    return (
        f"The best washer, which learned nothing, is {best}: {_share(judged.washers[best])} "
        f"withstand a white box at eps {eps:g}."
    )


def as_text(judged: Judgement) -> str:
    """Return verdict, ladder and warnings for a terminal or a notebook."""
    head, told = verdict(judged)
    table = [("right, %", *(f"eps {eps:g}" for eps in judged.case.eps))]
    for name, shares in accuracies(judged).items():
        table.append((name, *(f"{100 * share:.0f}" for share in shares)))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    guards = [f"guard: {said}" for said in judged.found.warnings] or ["guards: all silent"]
    return "\n".join([f"{head}.", *told, "", *rows, "", *guards])


def accuracies(judged: Judgement) -> dict[str, list[float]]:
    """Return the share of images that stay right at each eps, by level, and of the control."""
    right = {**judged.found.right, WORST: judged.found.worst}
    right["control: no defence"] = judged.alone.right["white-box"]
    return {name: each.float().mean(dim=1).tolist() for name, each in right.items()}


def figure(judged: Judgement) -> Figure:
    """Draw accuracy against eps, a line per level, and the classifier alone."""
    shares = accuracies(judged)
    shares["no defence"] = shares.pop("control: no defence")
    shares.pop(WORST)
    n = len(judged.found.clean)
    whiskers = {
        name: [wilson(round(share * n), n) for share in shares[name]]
        for name in ("white-box", "no defence")
    }
    return lines(
        judged.case.eps, shares, intervals=whiskers, xlabel="ε", ylabel="right, %",
        caption=f"{judged.case.defense} before {judged.case.classifier} by what the attacker "
        f"knows; {n} images, bands are 95 % intervals.",
    )  # fmt: skip


def rows(judged: Judgement) -> list[dict[str, Any]]:
    """Return a JSON row per level and eps, controls included, like `results/threats.jsonl`."""
    case, by = judged.case, judged.by
    about = {
        "defense": case.defense, "classifier": case.classifier, "dataset": case.lab.data.name,
        "fingerprint": case.lab.data.fingerprint, "profile": case.lab.profile.name,
        "seed": case.lab.seed, "device": str(case.lab.device), "bpda": case.bpda, "eot": case.eot,
        "settings": case.lab.settings_of(case.before),
        "clean": float(judged.found.clean.float().mean()), "versions": versions(),
        "git": git_commit(),
    }  # fmt: skip
    attacks: dict[str, Any] = {
        "noise": {"name": "noise", "settings": {"draws": by.draws}}, WORST: {},
        "transfer": asdict(by.transfer), "surrogate": asdict(by.transfer),
        "black-box": asdict(by.black_box),
        "white-box": asdict(by.white_box),
    }  # fmt: skip
    found: list[dict[str, Any]] = [about | row for row in judged.found.table()]
    for row in found:
        if row["level"] == "white-box":
            row |= {"guards": "all", "warnings": list(judged.found.warnings)}
    for name, eps, right in _controls(judged):
        cell: dict[str, Any] = {
            "level": "white-box", "knowledge": "everything", "access": "gradients", "eps": eps,
            "n": len(right), "accuracy": float(right.float().mean()),
        }  # fmt: skip
        plain: dict[str, Any] = {
            "defense": name,
            "bpda": "",
            "eot": None,
            "settings": {},
            "control": True,
        }
        found.append(about | plain | cell | {"guards": "none"})
    for row in found:
        right, n = round(row["accuracy"] * row["n"]), row["n"]
        low, high = wilson(right, n)
        row |= {"accuracy": right / n, "low": low, "high": high, "attack": attacks[row["level"]]}
    return found


def _controls(judged: Judgement) -> list[tuple[str, float, Tensor]]:
    case, alone = judged.case, judged.alone.right["white-box"]
    return [
        *(("none", eps, right) for eps, right in zip(case.eps, alone, strict=True)),
        *((name, case.eps[case.middle], right) for name, right in judged.washers.items()),
    ]


def write(judged: Judgement, out: Path | None = None) -> Path:
    """Append records and rows to `out`, by default where records go; return the page's path.

    The page comes last and at once, so that a folder with a page is whole.
    """
    file = records_path() if out is None else out / "records.jsonl"
    page = file.parent / f"{name_of(judged)}.html"
    text = html_page(judged)
    for record in judged.records:
        append_record(record, file)
    append_rows(rows(judged), file.with_name("threats.jsonl"))
    write_text(page, text)
    return page


def name_of(judged: Judgement) -> str:
    """Return a file's name: what was judged, before what, on what."""
    case = judged.case
    words = f"{case.defense} before {case.classifier} on {case.lab.data.name}"
    return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")


# --- the page -------------------------------------------------------------------------------------


def html_page(judged: Judgement) -> str:
    """Return the page; a reader needs no network, no colour and no picture."""
    case = judged.case
    head, told = verdict(judged)
    title = f"{case.defense} before {case.classifier}"
    mark = "bad" if judged.found.warnings else "good"
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="lead"><b class="{mark}">{escaped(head)}.</b></p>',
        f"<ul>{_items(told)}</ul>",
        "<h2>What was judged</h2>", facts_html(_about(judged), []),
        "<h2>Attackers who know more and more</h2>",
        f"<p>Images that are right unattacked and attacked, in percent of n = {len(case.x)}, the "
        "same under each attacker; in brackets, 95 % Wilson intervals. Every attack gives an "
        "upper bound.</p>",
        _figure_html(figure(judged)), _ladder_html(judged),
        "<h2>Guards</h2>", _guards_html(judged),
        "<h2>Attackers who don't know the defence</h2>",
        "<p>The course’s four attacks, made on the classifier alone. <i>Recovered</i> is over "
        "successful attacks only, <i>end to end</i> over all images, <i>clean</i> over clean "
        "images through the defence. Beside it, as controls, nothing and the washers.</p>",
        results_html(results_table([asdict(record) for record in judged.records])),
        _refused_html(judged.records, case.defense),
        "<h2>What was not tested</h2>", f"<ul>{_items(untested(judged))}</ul>",
    ]  # fmt: skip
    return page(title, "\n".join(part for part in parts if part), "", kind="index")


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)


def _about(judged: Judgement) -> dict[str, Any]:
    case, by = judged.case, judged.by
    data = case.lab.data
    through = [f"BPDA ({case.bpda})"] if case.bpda else []
    through += [] if case.eot is None else [f"EOT, {case.eot} draws"]
    return {
        "defence": case.defense,
        "its settings": case.lab.settings_of(case.before),
        "classifier": case.classifier,
        "data": f"{data.name}, {len(data.classes)} classes, {'x'.join(map(str, data.shape))}",
        "images": f"the first {len(case.x)} of {len(data.test)} test images",
        "profile and seed": f"{case.lab.profile.name}, {case.lab.seed}",
        "white box": " through ".join([_spelt(by.white_box), *through]),
        "black box": _spelt(by.black_box),
        "transfer": _spelt(by.transfer),
        "noise": f"{by.draws} draws",
        "device": str(case.lab.device),
        "versions": ", ".join(f"{key} {value}" for key, value in versions().items()),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def _spelt(attack: AttackSettings) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in attack.settings.items())
    return f"{attack.name}, {settings}"


def _figure_html(drawn: Figure) -> str:
    image = f'<img alt="{escaped(drawn.alt)}" src="data:image/png;base64,{drawn.png()}">'
    return (
        f'<figure><div class="output_png">{image}</div>'
        f"<figcaption>{escaped(drawn.caption)}</figcaption></figure>"
    )


def _ladder_html(judged: Judgement) -> str:
    sizes = judged.case.eps
    cells: dict[tuple[str, str, bool], dict[float, str]] = {}
    for row in rows(judged):
        share = f"{100 * row['accuracy']:.1f} <small>[{100 * row['low']:.1f}, "
        share += f"{100 * row['high']:.1f}]</small>"
        key = row["level"], row["defense"], row.get("control", False)
        cells.setdefault(key, {})[row["eps"]] = share
    heads = "".join(f'<th class="num">eps {eps:g}</th>' for eps in sizes)
    made = []
    for (level, defense, control), shares in cells.items():
        name = escaped("nothing" if defense == "none" else defense)
        name += " <small>control</small>" if control else ""
        who = f"<b>{level}</b><br><small>{WHO[level]}</small>"
        filled = "".join(f'<td class="num">{shares.get(eps, "–")}</td>' for eps in sizes)
        made.append(f"<tr><td>{who}</td><td>{name}</td>{filled}</tr>")
    return table_html(f"<tr><th>attacker</th><th>before the classifier</th>{heads}</tr>", made)


def _guards_html(judged: Judgement) -> str:
    asked = f"<p>They look for signs that the attack failed. {'; '.join(GUARDS)}.</p>"
    said = judged.found.warnings
    if not said:
        return (
            f'{asked}<p><b class="good">All silent.</b> That is no proof, but some known faults '
            "fewer.</p>"
        )
    items = "".join(f'<li><b class="bad">Warning:</b> {escaped(one)}</li>' for one in said)
    return f"{asked}<ul>{items}</ul>"


def _refused_html(records: Sequence[Record], defense: str) -> str:
    told = [
        f"{r.attack}: of {r.n_success} images that fool the classifier it refuses {r.rejected}, "
        f"of clean ones {100 * (r.false_positive_rate or 0):.1f} %; refused or right: "
        f"{100 * (r.recovered_or_rejected or 0):.1f} %."
        for r in records
        if r.defense == defense and r.false_positive_rate is not None
    ]
    return f"<p>It also refuses images:</p><ul>{_items(told)}</ul>" if told else ""


def untested(judged: Judgement) -> list[str]:
    """Return what the verdict leaves open, a sentence each."""
    case = judged.case
    found = [
        *_no_surrogate(case),
        "Other sizes than L-infinity, once the attacker knows the defence.",
        "Stronger white boxes: more steps, restarts, AutoAttack, an attack made for this defence.",
        f"Other images than these {len(case.x)}, other seeds than {case.lab.seed}: how the defence "
        "would differ if it were trained again.",
        "Whether the classifier or the defence has seen these test images: only you know.",
    ]
    if hasattr(case.before, "rejects"):
        found.append("Attackers who aim to pass its detector: the ladder takes all it refuses for "
                     "read.")  # fmt: skip
    if case.bpda:
        found.append("Other stand-ins than the identity, such as a smooth copy of the defence.")
    if case.random:
        found.append("It draws at random, so the guards that need the same answer twice were not "
                     "asked.")  # fmt: skip
    return found


def _no_surrogate(case: Case) -> Iterator[str]:
    """Say why no attacker trained a copy of the defence, if none did."""
    before = case.before
    if before is None or getattr(before, "replaces_classifier", False) or case.copy is not None:
        return
    if any(True for _ in before.parameters()):
        yield (
            "Attackers who train a defence like yours on data of their own (lesson 11): train one "
            "with other images and another seed, and give it as --surrogate."
        )
    else:
        yield "No surrogate: the defence has nothing to train, who knows its design has it."


def _share(right: Tensor) -> str:
    k, n = int(right.sum()), len(right)
    return _percent(k / n, *wilson(k, n))


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
