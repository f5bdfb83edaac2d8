"""How long work tells what it is doing: one callback type, three ways to show it.

Nothing below `Lab` and the command line prints; a builder calls `progress(done, total, note)` and
does not know whether a bar, a log file or nobody listens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, note)`; `total` may be 0 where it is not known."""

LOG_EVERY = 2.0  # seconds between two lines of a log file


def silent(done: int, total: int, note: str) -> None:
    """Show nothing."""


@contextmanager
def shown(label: str) -> Iterator[Progress]:
    """Yield a callback that shows progress as `$UNFOOL_PROGRESS` asks.

    Unset: a bar (a widget in JupyterLab), gone when the work is done. `off`: nothing. A path: lines
    appended to that file, so that an executed notebook holds no trace of whether it had to wait.
    """
    where = os.environ.get("UNFOOL_PROGRESS", "")
    if where == "off":
        yield silent
    elif where:
        yield _to_file(Path(where), label)
    else:
        with _bar(label) as progress:
            yield progress


def _to_file(path: Path, label: str) -> Progress:
    last = 0.0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_EVERY and done != total:
            return
        last = now
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{label}: {done}/{total or '?'} {note}".rstrip() + "\n")

    return progress


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from tqdm.auto import tqdm

    # Made at the first call only: what is found in the store must leave no empty bar behind.
    bars: list[tqdm] = []

    def progress(done: int, total: int, note: str) -> None:
        if not bars:
            bars.append(tqdm(desc=label, total=total or None, leave=False))
        bar = bars[0]
        bar.total = total or None
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()
