"""The Python that runs the peer of PyTorch's users; the project itself does without torch."""

import functools
import os
import subprocess
from typing import NamedTuple

from bench.datasets import ROOT

VARIABLE = "EMA_AVG_BENCH_TORCH"
BESIDE = ".venv-interop/bin/python"
ASK = "from importlib.metadata import version; print(version('torch'))"


class Peer(NamedTuple):
    """An interpreter that can import torch, and of which version."""

    python: str
    version: str


@functools.cache
def torch_peer() -> Peer | None:
    """Return the Python with torch that the environment names or that lies beside the project."""
    python = os.path.abspath(os.environ.get(VARIABLE) or ROOT / BESIDE)
    try:
        found = subprocess.run((python, "-c", ASK), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Peer(python, found.stdout.strip())
