"""What a number was measured with: versions, and the commit of the checkout."""

from __future__ import annotations

import platform
import subprocess

import torch

from unfool import __version__
from unfool.artifacts import REPO


def versions() -> dict[str, str]:
    """Return the versions that a record names."""
    return {"unfool": __version__, "torch": torch.__version__, "python": platform.python_version()}


def git_commit() -> str:
    """Return the checkout's commit, with "+" when files differ from it; empty outside of git."""
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
