"""The training step of a checkpoint: stored inside, or told by its name. Numbers, never mtimes."""

from __future__ import annotations

import json
import os
import re
from typing import NamedTuple

import numpy as np

from ema_cli import spilling
from ema_cli.checksums import KINDS
from ema_cli.errors import DamagedFile, InputError, UsageError
from ema_cli.files import read_at, read_small
from ema_cli.naming import STEP_NAMES, VALUE_SUFFIX
from ema_cli.tensors import Checkpoint, Tensor, numpy_dtype
from ema_cli.text import shorten

TRAINER_STATE = "trainer_state.json"
_TRAINER_STATE_LIMIT = 16 << 20
_LARGEST_STEP = 1 << 62
_LONGEST_STEP = 18

_SUFFIX = re.compile(r"(?:\.(?:safetensors|index|json|pt|pth|ckpt|bin|h5|keras|npz|weights))+$")
# What looks like a number and is no step: metrics, versions, shard counts, decimals.
_NOISE = re.compile(
    r"-\d{5}-of-\d{5}"
    r"|-v\d+(?=[._-]|$)"
    r"|(?:val_|train_|test_|eval_)?(?:loss|acc|accuracy|wer|bleu|ppl|f1|auc|map|score|metric)"
    r"[=_-]?\d+(?:\.\d+)?"
    r"|\d+\.\d+"
)
# Labels that introduce a step, best first.
_LABELS = tuple(
    re.compile(rf"(?:^|[^a-z])(?:{label})[=_-]?(\d+)(?![\d.]*[a-z]?=)", re.IGNORECASE)
    for label in (r"global[_-]?steps?|steps?", r"iterations?|iters?", r"checkpoint|ckpt|chkpt")
)
_EPOCH = re.compile(r"(?:^|[^a-z])epochs?[=_-]?(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
# What makes a number another one: 1e3, 1,200 and 100k are no steps we can read.
_ODD = re.compile(r"e\d|,\d|[kmgbt](?![a-z])", re.IGNORECASE)


# Also those of TensorFlow's object graphs, and what its optimizers count.
STORED_NAMES = (
    *STEP_NAMES,
    *(name + VALUE_SUFFIX for name in STEP_NAMES),
    *(f"optimizer/{name}{VALUE_SUFFIX}" for name in ("_iterations", "iterations", "iter")),
)


class Step(NamedTuple):
    """A step and where it was found."""

    value: int
    source: str


def step_from_name(name: str, expression: re.Pattern[str] | None = None) -> int | None:
    """Return the step a file or folder name tells, or None.

    Args:
        name: without its directory.
        expression: the user's own ``--step-from``: its first group, or else the whole match.
    """
    if expression is not None:
        found = expression.search(name)
        digits = found and (found[1] if expression.groups else found[0])
        return _number(digits) if digits else None
    text = _NOISE.sub(" ", _SUFFIX.sub("", name))
    for label in _LABELS:
        if match := label.search(text):
            return None if _ODD.match(text, match.end(1)) else _number(match[1])
    epochs = _EPOCH.findall(text)
    numbers = _NUMBER.findall(_EPOCH.sub(" ", text))
    if any(_ODD.match(text, match.end()) for match in _NUMBER.finditer(text)):
        return None
    if len(numbers) == 1:
        return _number(numbers[0])
    return _number(epochs[0]) if not numbers and len(epochs) == 1 else None


def tells_epoch(name: str) -> bool:
    """Whether what a name tells is an epoch, which is no step that could differ from one."""
    text = _NOISE.sub(" ", _SUFFIX.sub("", name))
    return bool(_EPOCH.search(text)) and not _NUMBER.search(_EPOCH.sub(" ", text))


def _number(digits: str) -> int | None:
    """Return the step, or None when no step is that large."""
    return int(digits) if digits.isdecimal() and len(digits) <= _LONGEST_STEP else None


def compile_step_from(text: str | None) -> re.Pattern[str] | None:
    """Return the compiled ``--step-from`` expression; raises `UsageError`."""
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(
            f"--step-from '{shorten(text)}': {error}",
            "a regular expression whose first group is the step: --step-from 'step-([0-9]+)'",
        ) from None


def stored_step(checkpoint: Checkpoint) -> Step | None:
    """Return the step saved in the checkpoint itself, or None.

    A scalar tensor called ``global_step``, ``step`` or ``iterations``; else a number beside the
    tensors; else ``global_step`` of the ``trainer_state.json`` that lies in a checkpoint's folder.
    """
    for name in STORED_NAMES:
        tensor = checkpoint.index.by_name.get(name)
        if tensor is not None:
            value = _scalar(checkpoint, tensor)
            if value is not None:
                return Step(value, f"tensor {name}")
    if checkpoint.told_step is not None and 0 <= checkpoint.told_step[0] < _LARGEST_STEP:
        return Step(*checkpoint.told_step)
    folder = checkpoint.path if os.path.isdir(checkpoint.path) else None
    return _trainer_step(os.path.join(folder, TRAINER_STATE)) if folder else None


def save_counter(checkpoint: Checkpoint) -> int | None:
    """Return how often tf.train.Checkpoint had saved by then: the number in its names."""
    tensor = checkpoint.index.by_name.get(f"save_counter{VALUE_SUFFIX}")
    return None if tensor is None else _scalar(checkpoint, tensor)


def _scalar(checkpoint: Checkpoint, tensor: Tensor) -> int | None:
    """Return the non-negative integer stored in a one-element tensor, or None.

    Its bytes are held against their checksum here: it decides what the weights are.
    """
    if tensor.elements != 1 or tensor.dtype.bits < 8 or tensor.slices:
        return None
    with spilling.readable(checkpoint, [tensor.name]) as read:
        stamp = read.files[tensor.extent.file]
        raw = read_at(stamp.path, tensor.extent.offset, tensor.extent.nbytes)
    place = checkpoint.index.ordinals.get(tensor.extent)
    if checkpoint.checksums is not None and place is not None:
        expected = int(checkpoint.checksums[place])
        if (found := KINDS[checkpoint.index.checksum](memoryview(raw), 0)) != expected:
            reason = f"expected bytes with checksum {expected:08x}, found {found:08x}"
            raise DamagedFile(stamp.path, reason, tensor.name)
    if checkpoint.index.big_endian:
        raw.reverse()
    value = np.frombuffer(raw, numpy_dtype(tensor.dtype.name))[0]
    if tensor.dtype.name in ("bool", "complex64", "complex128"):
        return None
    number = float(value) if tensor.dtype.floating else int(value)
    return int(number) if 0 <= number < _LARGEST_STEP and number == number // 1 else None


def _trainer_step(path: str) -> Step | None:
    if not os.path.isfile(path):
        return None
    try:
        document = json.loads(read_small(path, _TRAINER_STATE_LIMIT))
    except (InputError, ValueError, RecursionError):
        return None
    value = document.get("global_step") if isinstance(document, dict) else None
    return Step(value, TRAINER_STATE) if type(value) is int and 0 <= value < _LARGEST_STEP else None
