"""Where a NaN or an infinity of the result came from."""

from __future__ import annotations

import numpy as np

from ema_cli.errors import EmaError, NonFinite
from ema_cli.files import read_at
from ema_cli.hints import excluding
from ema_cli.invocation import another
from ema_cli.regions import stretches
from ema_cli.tasks import Flaw, Piece, Source
from ema_cli.tensors import Checkpoint, Tensor, numpy_dtype
from ema_cli.text import command, shorten
from ema_cli.verifying import check
from ema_cli.work import Work


def explain(work: Work, flaw: Flaw, state: str = "") -> EmaError:
    """Return the error that names the first checkpoint and the tensor of a non-finite value.

    `state` is that of an update, once it is bound to its settings.
    """
    piece = flaw.piece
    coefficients = piece.accumulators[flaw.accumulator].coefficients
    for source, coefficient in zip(piece.sources, coefficients, strict=True):
        value = _value(work, piece, source, flaw.element)
        if coefficient and not np.isfinite(value):
            checkpoint, tensor = _locate(work, piece, source, flaw.element)
            return check(checkpoint, tensor) or NonFinite(
                f"{shorten(checkpoint.path, 1000)}: tensor '{shorten(tensor.name)}' holds "
                f"{value}, the first non-finite value",
                _leave_out(tensor, state),
            )
    _, tensor = _locate(work, piece, piece.sources[-1], flaw.element)
    return NonFinite(
        f"tensor '{shorten(tensor.name)}': every input is finite, but the average is not in "
        f"{flaw.dtype}",
        _wider(flaw.dtype) + _let_pass(state),
    )


def _leave_out(tensor: Tensor, state: str) -> str:
    exclude = excluding(tensor.name)
    if state:  # which checkpoints are taken is no setting of it
        return (
            f"leave the checkpoint out with --steps or --glob, or begin another state: {exclude} "
            f"or --non-finite allow with {command('--state', another(state))}"
        )
    return (
        f"leave the checkpoint out with --steps or --glob, copy the tensor with {exclude}, or "
        f"{_let_pass(state)}"
    )


def _let_pass(state: str) -> str:
    elsewhere = f" in another state, {command('--state', another(state))}" if state else ""
    return f"let it pass with --non-finite allow{elsewhere}"


def _wider(dtype: str) -> str:
    return "write a wider type with --dtype float32, or " if dtype == "float16" else ""


def _offset(piece: Piece, source: Source, element: int) -> int:
    """Return where in its file an element of a piece lies."""
    width = numpy_dtype(source.dtype).itemsize
    return next(stretches(source.offset, source.grid, width, piece.start + element, 1))[0]


def _value(work: Work, piece: Piece, source: Source, element: int) -> float:
    dtype = numpy_dtype(source.dtype)
    stamp = work.inputs[source.file]
    raw = read_at(stamp.path, _offset(piece, source, element), dtype.itemsize)
    if source.swap:
        raw.reverse()
    return float(np.frombuffer(raw, dtype)[0])


def _has(tensor: Tensor, distance: int) -> bool:
    """Whether an element of a tensor lies `distance` bytes after its first one."""
    left = distance // max(tensor.dtype.bits // 8, 1)
    steps = sorted(zip(tensor.strides, tensor.shape, strict=False), reverse=True)
    for stride, length in steps:
        left -= min(left // stride, length - 1) * stride if stride else 0
    return not tensor.strides or left == 0


def _locate(work: Work, piece: Piece, source: Source, element: int) -> tuple[Checkpoint, Tensor]:
    """Return the checkpoint and the tensor that an element of a piece belongs to."""
    offset = _offset(piece, source, element)
    around: list[tuple[Checkpoint, Tensor]] = []
    k, file = work.of_file(source.file)
    checkpoint = work.checkpoints[k]
    for tensor in checkpoint.index.tensors:
        for its_file, start, n_bytes in tensor.extents:
            if its_file == file and start <= offset < start + n_bytes:
                if _has(tensor, offset - start):
                    return checkpoint, tensor
                around.append((checkpoint, tensor))
    if around:  # views whose strides do not nest: one of them
        return around[0]
    raise LookupError(f"byte {offset} of input {source.file}")
