"""The project held against real TensorFlow: what it writes is restored by it, bit for bit.

`make interop` runs these tests in an environment of their own, which holds TensorFlow beside the
project, as that of somebody who evaluates what was averaged does. Where TensorFlow cannot be
imported they fail; none is skipped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before TensorFlow is imported: no messages, no GPU, and sums in one order.
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")
# The writer of checkpoints that TensorFlow reads and never writes.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support import GRAPH, PARTITIONED, tool


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing the developer's shell says may change what a test sees."""
    for name in list(os.environ):
        if name.startswith("EMA_AVG_") or name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def average(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the average of graph/, decay 0.9, as the tool writes it unasked."""
    folder = tmp_path_factory.mktemp("average")
    tool("run", GRAPH, "-o", f"{folder}/", "--decay", "0.9")
    return folder


@pytest.fixture(scope="session")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the average of partitioned/, accumulated as TensorFlow does."""
    folder = tmp_path_factory.mktemp("partitioned")
    tool("run", PARTITIONED, "-o", f"{folder}/", "--decay", "0.9", "--shadow-dtype", "same")
    return folder
