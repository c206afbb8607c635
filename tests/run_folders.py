"""Run directories for the tests of `ema_cli.runs`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from helpers import write_checkpoint

from ema_cli.runs import Run, find
from ema_cli.search import Choice

W = {"w": np.float32([1])}


def step_files(folder: Path, *steps: int) -> Path:
    """Write ``model-step-N.safetensors`` for each step; ``w`` holds the step."""
    for step in steps:
        write_checkpoint(folder / f"model-step-{step}.safetensors", {"w": np.float32([step])})
    return folder


def step_folders(folder: Path, *steps: int) -> Path:
    """Write ``checkpoint-N/model.safetensors`` for each step."""
    for step in steps:
        write_checkpoint(
            folder / f"checkpoint-{step}" / "model.safetensors", {"w": np.float32([step])}
        )
    return folder


def search(*paths: Path, **choice: Any) -> Run:
    """Return the run that these paths make."""
    return find([str(path) for path in paths], Choice(**choice))


def passed_over(run: Run) -> dict[str, tuple[str, bool]]:
    """Return what was passed over by name: the reason and whether it is exit code 3."""
    return {os.path.basename(p.path): (p.reason, p.unusable) for p in run.passed_over}
