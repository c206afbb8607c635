"""Where a NaN or an infinity of the result came from."""

from __future__ import annotations

import os

import numpy as np

from ema_cli import kernel
from ema_cli.engine import Flaw, Source
from ema_cli.errors import NonFinite
from ema_cli.files import open_input, read_exact
from ema_cli.plan import Plan
from ema_cli.tensors import numpy_dtype
from ema_cli.text import shorten


def explain(plan: Plan, flaw: Flaw) -> NonFinite:
    """Return the error that names the first checkpoint and the tensor of a non-finite value."""
    coefficients = flaw.piece.accumulators[flaw.accumulator].coefficients
    for source, coefficient in zip(flaw.piece.sources, coefficients, strict=True):
        value = _value(plan, source, flaw.element)
        if coefficient and not np.isfinite(float(value)):
            where, tensor = _locate(plan, source, flaw.element)
            return NonFinite(
                f"{where}: tensor '{tensor}' holds {float(value)}, the first non-finite value",
                "leave the checkpoint out with --steps or --glob, copy the tensor with --exclude, "
                "or let it pass with --non-finite allow",
            )
    where, tensor = _locate(plan, flaw.piece.sources[-1], flaw.element)
    return NonFinite(
        f"tensor '{tensor}': every input is finite, but the average is not in {flaw.dtype}",
        _wider(flaw.dtype) + "let it pass with --non-finite allow",
    )


def _wider(dtype: str) -> str:
    return "write a wider type with --dtype float32, or " if dtype == "float16" else ""


def _value(plan: Plan, source: Source, element: int) -> kernel.Array:
    dtype = numpy_dtype(source.dtype)
    stamp = plan.inputs[source.file]
    raw = bytearray(dtype.itemsize)
    fd = open_input(stamp.path)
    try:
        read_exact(fd, memoryview(raw), source.offset + element * dtype.itemsize, stamp.path)
    finally:
        os.close(fd)
    value: kernel.Array = np.frombuffer(raw, dtype)[0]
    return value


def _locate(plan: Plan, source: Source, element: int) -> tuple[str, str]:
    """Return the printable checkpoint path and tensor name of an element of a piece."""
    offset = source.offset + element * numpy_dtype(source.dtype).itemsize
    for k, first in enumerate(plan.first_input):
        checkpoint = plan.run.checkpoints[k]
        if first < 0 or not first <= source.file < first + len(checkpoint.files):
            continue
        for tensor in checkpoint.index.tensors:
            file, start, nbytes = tensor.extent
            if first + file == source.file and start <= offset < start + nbytes:
                return shorten(checkpoint.path, 1000), shorten(tensor.name)
    return "", ""
