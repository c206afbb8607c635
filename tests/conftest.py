"""Fixtures every test shares: a clean environment and the real training run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Where a change is judged, the same examples every time; elsewhere new ones. Machines are noisy,
# so no example has a deadline.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A shell lets its background jobs ignore Ctrl-C, and so would the programs that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing the developer's shell says may change what a test sees."""
    for name in list(os.environ):
        if name.startswith("EMA_AVG_") or name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def digits_run() -> Path:
    """Twenty single-file float32 checkpoints, steps 100 to 2000."""
    return ROOT / "fixtures" / "digits" / "run"


@pytest.fixture(scope="session")
def digits_bf16() -> Path:
    """The same run as sharded bfloat16 folders."""
    return ROOT / "fixtures" / "digits" / "bf16"
