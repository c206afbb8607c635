"""What several test files need: writing checkpoints by hand, reading results, running commands."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
NAMES = {code: name for name, code in CODES.items()}
BF16 = np.dtype(ml_dtypes.bfloat16)


def dtype_of(name: str) -> np.dtype:
    """Return the NumPy dtype called `name`, ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def raw_safetensors(header: bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """Return a safetensors file with this header, well formed or not."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def write_checkpoint(
    path: Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write arrays (or scalars) as a safetensors file in the given order, by hand."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, value in tensors.items():
        array = np.asarray(value)
        raw = array.tobytes()
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    path.write_bytes(raw_safetensors(text, data))
    return path


def read_checkpoint(path: Path | str) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, read without the package under test."""
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[begin:end], dtype_of(NAMES[entry["dtype"]]))
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def write_run(folder: Path, values: Sequence[Mapping[str, Any]], gap: int = 100) -> Path:
    """Write one checkpoint per mapping, ``model-step-100.safetensors`` and so on."""
    for k, tensors in enumerate(values, start=1):
        write_checkpoint(folder / f"model-step-{k * gap}.safetensors", tensors)
    return folder


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def cmd(*args: str | os.PathLike[str], code: int = 0, stdin: str = "") -> Outcome:
    """Run a command through ``main()`` and check its exit code."""
    from ema_cli.cli import main

    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            found = main([os.fspath(arg) for arg in args])
    finally:
        sys.stdin = before
    outcome = Outcome(found, out.getvalue(), err.getvalue())
    assert found == code, f"exit code {found}, expected {code}\n{outcome.out}\n{outcome.err}"
    assert "Traceback" not in outcome.err
    return outcome


def bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class Failing:
    """A function that fails at its call number `nth`; threads may call it."""

    def __init__(self, function: Callable[..., Any], nth: int, code: int) -> None:
        self.function, self.nth, self.code = function, nth, code
        self.calls: list[None] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(None)
        if len(self.calls) == self.nth:
            raise OSError(self.code, os.strerror(self.code))
        return self.function(*args, **kwargs)
