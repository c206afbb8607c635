"""What this machine gives us: cores, and the versions that go into provenance and --version."""

from __future__ import annotations

import importlib.metadata
import os
import platform

_CGROUP_QUOTA = "/sys/fs/cgroup/cpu.max"


def default_workers() -> int:
    """Return the number of cores this process may use: affinity and cgroup quota respected."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    try:
        with open(_CGROUP_QUOTA, encoding="ascii") as file:
            quota, period = file.read().split()[:2]
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(cores, 1)


def version() -> str:
    """Return the version of ema-avg."""
    try:
        return importlib.metadata.version("ema-avg")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Return what a bug report needs: the versions of everything that touches the numbers."""
    found = {"ema-avg": version(), "python": platform.python_version()}
    for package in ("numpy", "ml_dtypes", "safetensors", "fastcrc", "click", "rich"):
        found[package] = importlib.metadata.version(package)
    return found
