"""What all tests share: places of their own outside the checkout, toy images, a toy classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch is imported by those who need it: many tests do without
    from torch import Tensor, nn

    from unfool.artifacts import Store


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the checkout's store, records or progress, or reads the user's."""
    monkeypatch.setenv("UNFOOL_STORE", str(tmp_path / "unfool" / "store"))
    monkeypatch.setenv("UNFOOL_RECORDS", str(tmp_path / "unfool" / "records.jsonl"))
    monkeypatch.setenv("UNFOOL_PROGRESS", str(tmp_path / "unfool-progress.log"))
    monkeypatch.delenv("UNFOOL_SHARED_STORE", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    from unfool.artifacts import Store

    return Store(tmp_path / "store")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The same number of threads everywhere: sums of floats depend on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy() -> tuple[Tensor, Tensor]:
    """60 noisy images (1, 8, 8) of three classes: where the bright band is."""
    import torch

    labels = torch.arange(60) % 3
    images = 0.25 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in range(3):
        images[labels == k, :, :, 2 * k + 1 : 2 * k + 3] += 0.7
    return images, labels


@pytest.fixture
def tiny() -> Callable[[int], nn.Module]:
    """Function of a seed: a random classifier of three classes with batch norm and dropout."""
    import torch
    from torch import nn

    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                nn.Flatten(), nn.Dropout(0.5), nn.Linear(96, 3),
            )  # fmt: skip

    return make
