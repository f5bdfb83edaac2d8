"""Plug-in for nbval (`-p replay_rules`): pictures are compared too, standard error is not.

Standard error holds warnings with addresses and process numbers in them; a picture that differs
is a difference like any other.
"""

from __future__ import annotations

import pytest

COMPARED_TOO = {"image/png"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        notebook = item.parent
        skipped = getattr(notebook, "skip_compare", None)
        if skipped is not None:
            notebook.skip_compare = {*skipped, "stderr"} - COMPARED_TOO  # type: ignore[union-attr]
