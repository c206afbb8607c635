"""HDF5 files with something added, and the canaries beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from attacks import REFUSED, STEM, Attack, Ends, Values, canary

H5 = ".weights.h5"
W = np.float32([[1, 2, 3], [4, 5, 6]])
B = np.float32([0.5, -2, 8])
VARS = "layers/dense/vars"
SOUND: Values = {f"{VARS}/0": W, f"{VARS}/1": B}
GIB = 1 << 30
File = Any


def sound(file: File) -> None:
    """Fill a file as Keras 3 does."""
    file[f"{VARS}/0"] = W
    file[f"{VARS}/1"] = B


def of_file(
    name: str,
    item: int,
    what: str,
    fill: Callable[[File, Path], None],
    *words: str,
    ends: Ends = REFUSED,
    values: Values | None = None,
    suffix: str = H5,
    **options: Any,
) -> Attack:
    """Return an attack that is a sound file to which something was added."""

    def build(folder: Path) -> Path:
        path = folder / f"{STEM}{suffix}"
        with h5py.File(path, "w", **options) as file:
            sound(file)
            fill(file, folder)
        return path

    return Attack(name, (item,), what, build, ends, words, values or SOUND)


def secret(folder: Path) -> Path:
    """Return an HDF5 file of the canary, which links could lead to."""
    return canary(folder) / "secret.h5"


def plugins(folder: Path) -> Path:
    """Return a folder where HDF5 would look for filters, if it did."""
    return canary(folder) / "plugins"


def lay_canaries(folder: Path) -> None:
    """Make what no attack may reach: a folder of files and of plugins."""
    beside = canary(folder)
    os.makedirs(plugins(folder))
    (beside / "secret.bin").write_bytes(bytes(range(64)))
    with h5py.File(beside / "secret.h5", "w") as file:
        file["secret"] = np.float32([41, 42, 43, 44])
        file["dense/vars/0"] = W
