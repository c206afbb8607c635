"""Write ``state-1``: a state as version 1 of the format has it, and what must come of it for ever.

    python tests/golden/make_state.py DIRECTORY

The directory gets ``state``, which averages three checkpoints, and ``run`` with the next two.
``expected.json`` holds the SHA-256 of every tensor after three and after five checkpoints, which
NumPy computed here by the formulas of ``docs/architecture.md``, not the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)

STEPS = (100, 200, 300, 400, 500)
CONSUMED = 3
MEAN, EMA = "mean", "smooth"
DECAY = 0.75  # its powers are exact, whatever a machine's pow makes of others
SETTINGS = {"average": [MEAN, f"{EMA}=ema:{DECAY}"], "zero_debias": True}
_CODES = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}


def checkpoint(step: int) -> dict[str, Array]:
    """Return the tensors of a step: integers in, one multiplication, the same bits anywhere."""
    numbers = (np.arange(30) * 37 + step * 11) % 1009 - 504
    weight = numbers.astype(np.float32) * np.float32(0.01)
    half = (numbers[:5].astype(np.float32) * np.float32(0.3)).astype(BF16)
    return {"weight": weight.reshape(6, 5), "half": half, "seen": np.array([step, -step])}


def write(path: pathlib.Path, step: int) -> pathlib.Path:
    """Write the checkpoint of a step as a safetensors file."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in checkpoint(step).items():
        offsets = [len(data), len(data) + array.nbytes]
        code = _CODES[array.dtype.name]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    os.utime(path, ns=(step * 10**9, step * 10**9))
    return path


def mixed(shadow: Array, value: Array, coefficient: np.float32) -> Array:
    """Return ``shadow - (shadow - value) * coefficient``, each operation rounded to float32."""
    return np.subtract(shadow, np.multiply(np.subtract(shadow, value), coefficient))


def averages(steps: tuple[int, ...]) -> dict[str, dict[str, Array]]:
    """Return both averages over the checkpoints of some steps, and what is copied of the last."""
    found: dict[str, dict[str, Array]] = {MEAN: {}, EMA: {}, "biased": {}}
    seen = checkpoint(steps[-1])["seen"]
    for name in ("weight", "half"):
        values = [checkpoint(step)[name] for step in steps]
        wide = [value.astype(np.float32) for value in values]
        mean = wide[0]  # its coefficient is 1: copied
        for k, value in enumerate(wide[1:], start=2):
            mean = mixed(mean, value, np.float32(1 / k))
        biased = np.zeros_like(mean)
        omd = np.float32(1) - np.float32(DECAY)
        for value in wide:
            biased = mixed(biased, value, omd)
        factor = np.float32(1) - np.float32(float(np.float32(1) - omd) ** len(steps))
        found[MEAN][name] = mean.astype(values[0].dtype)
        found[EMA][name] = np.divide(biased, factor).astype(values[0].dtype)
        found["biased"][name] = biased.astype(values[0].dtype)
    return {**found, MEAN: {**found[MEAN], "seen": seen}, EMA: {**found[EMA], "seen": seen}}


def digests(steps: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of every tensor of both averages, and of the biased shadows."""
    return {
        average: {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in arrays.items()}
        for average, arrays in averages(steps).items()
    }


def main() -> None:
    """Make the state as a user would: one checkpoint, then two more."""
    import ema_cli  # nothing else here depends on it

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True)
    os.chdir(directory)
    old = [write(pathlib.Path("run", f"model-{step}.safetensors"), step) for step in STEPS]
    for group in (old[:1], old[:CONSUMED]):
        ema_cli.average_run(group, state="state", **SETTINGS)  # type: ignore[arg-type]
    for path in old[:CONSUMED]:
        path.unlink()
    pathlib.Path("state", "LOCK").unlink()
    expected = {
        "files": {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(pathlib.Path().rglob("*"))
            if path.is_file()
        },
        "after": {str(n): digests(STEPS[:n]) for n in (CONSUMED, len(STEPS))},
    }
    text = json.dumps(expected, indent=1, sort_keys=True)
    pathlib.Path("expected.json").write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
