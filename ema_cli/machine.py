"""What this machine gives us: cores, and the versions that go into provenance and --version."""

from __future__ import annotations

import os
import platform
import sys

from ema_cli.version import __version__

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


def versions() -> dict[str, str]:
    """Return the versions of what made the numbers: of the packages that are loaded."""
    found = {"ema-avg": __version__, "python": platform.python_version()}
    for package in ("numpy", "ml_dtypes"):
        if package in sys.modules:
            found[package] = sys.modules[package].__version__
    return found


def all_versions() -> dict[str, str]:
    """Return what a bug report needs: the versions of all packages we use."""
    import importlib.metadata  # slow to import, and needed here only

    packages = ("numpy", "ml_dtypes", "safetensors", "fastcrc", "h5py", "click", "rich")
    return {**versions(), **{name: importlib.metadata.version(name) for name in packages}}
