"""Where something is computed: the device that was asked for, or why it cannot be had."""

from __future__ import annotations

import torch


def find_device(wanted: torch.device | str) -> torch.device:
    """Return the device asked for; "auto" is a GPU where there is one, else the CPU.

    Raises:
        ValueError: a GPU is asked for and there is none: nothing falls back in silence.
    """
    name = str(wanted)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} was asked for, but torch sees no GPU: use device='cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r} was asked for, but there are {torch.cuda.device_count()} GPUs"
        )
    return device
