"""Where TensorFlow checkpoints lie: prefixes and their files, SavedModels, state files.

A checkpoint is the prefix of ``PREFIX.index`` and ``PREFIX.data-00000-of-00001`` …; the graph it
belongs to may lie in ``PREFIX.meta``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ema_cli.errors import InputError, UnsupportedInput
from ema_cli.files import open_input, read_at, read_exact, read_small
from ema_cli.formats.tensorflow import statefile, table
from ema_cli.formats.tensorflow.spans import Read
from ema_cli.formats.tensorflow.wire import Malformed
from ema_cli.hints import PERMISSION
from ema_cli.text import shorten

NAME = "tensorflow"
SUFFIX = ".index"
META_SUFFIX = ".meta"
STATE_FILE = "checkpoint"
SAVED_MODEL = "saved_model.pb"
# Where the prefix of a SavedModel's variables lies in its folder.
IN_SAVED_MODEL = os.path.join(os.sep, "variables", "variables")
STEM = "model.ckpt"

_STATE_LIMIT = 16 << 20
V1 = "a checkpoint in TensorFlow's old V1 format, which is not read: save it again as V2"
_HUGGING_FACE = ".safetensors.index"
_DATA = re.compile(r"(.+)\.data-\d{5,}-of-\d{5,}", re.DOTALL)


def stem_of(name: str) -> str | None:
    """Return the prefix that a file called `name` belongs to by its name alone, or None."""
    match = _DATA.fullmatch(name)
    if match:
        return match[1]
    for suffix in (SUFFIX, META_SUFFIX):
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix)
    return None


def prefix_of(path: str) -> str | None:
    """Return the prefix that `path` means: itself, or that of one of its files; None if neither."""
    if _has_index(path):
        return path
    stem = stem_of(path)
    return stem if stem is not None and _has_index(stem) else None


def _has_index(prefix: str) -> bool:
    """Whether the file called as the index of a prefix is one, or lies beside its data."""
    path = prefix + SUFFIX
    return os.path.isfile(path) and (ends_as_table(path) or has_data(prefix))


def prefix_in(folder: str) -> str | None:
    """Return the prefix of the one checkpoint that `folder` stands for, or None.

    A SavedModel or its ``variables`` folder; the latest of a state file; the only index.
    """
    found = prefixes(folder)
    only = found[0] if len(found) == 1 else None
    return saved_model_in(folder) or latest_in(folder) or only


def saved_model_in(folder: str) -> str | None:
    """Return the prefix of the SavedModel whose folder, or folder of variables, this is."""
    outer = os.path.join(folder, "variables", "variables")
    if os.path.isfile(os.path.join(folder, SAVED_MODEL)) and os.path.isfile(outer + SUFFIX):
        return outer
    inner = os.path.join(folder, "variables")
    return inner if prefixes(folder) == [inner] else None


def prefixes(folder: str) -> list[str]:
    """Return the prefixes of all checkpoints directly in `folder`, sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{shorten(folder, 1000)}: cannot list: {reason}", PERMISSION) from error
    with_data = {match[1] for name in names if (match := _DATA.fullmatch(name))}
    stems = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
    return [
        os.path.join(folder, stem)
        for stem in stems
        if stem
        and not stem.startswith(".")
        and not (stem + SUFFIX).endswith(_HUGGING_FACE)
        and (stem in with_data or ends_as_table(os.path.join(folder, stem + SUFFIX)))
    ]


def has_data(prefix: str) -> bool:
    """Whether a file beside the index of `prefix` holds its data."""
    folder, stem = os.path.split(prefix)
    with os.scandir(folder or ".") as entries:
        return any((m := _DATA.fullmatch(entry.name)) and m[1] == stem for entry in entries)


def files_of(prefix: str) -> list[str]:
    """Return the files that stand under a prefix: its index first, then its data."""
    folder, stem = os.path.split(prefix)
    try:
        names = sorted(os.listdir(folder or "."))
    except FileNotFoundError:
        return []
    data = [name for name in names if (m := _DATA.fullmatch(name)) and m[1] == stem]
    index = [stem + SUFFIX] if stem + SUFFIX in names else []
    return [os.path.join(folder, name) for name in index + data]


def state_in(folder: str) -> statefile.State | None:
    """Return what the state file of `folder` says, or None where it has none that can be read."""
    path = os.path.join(folder, STATE_FILE)
    if not os.path.isfile(path):
        return None
    try:
        return statefile.parse(read_small(path, _STATE_LIMIT))
    except (InputError, Malformed):
        return None


def latest_in(folder: str) -> str | None:
    """Return the prefix that the state file of `folder` calls the latest, if it is still there.

    A path that leads elsewhere is that of a folder that was moved: the same name is tried here.
    """
    state = state_in(folder)
    if state is None or not state.latest or "\0" in state.latest:
        return None
    prefix = os.path.join(folder, os.path.basename(state.latest))
    return prefix if os.path.isfile(prefix + SUFFIX) else None


def data_suffix(shard: int, shards: int) -> str:
    """Return what follows the prefix in the name of a data file."""
    return f".data-{shard:05}-of-{shards:05}"


def ends_as_table(path: str) -> bool:
    """Whether the file ends as a table does: an index, or a checkpoint of the first format."""
    start = os.path.getsize(path) - len(table.MAGIC) if os.path.isfile(path) else -1
    return start >= 0 and read_at(path, start, len(table.MAGIC)) == table.MAGIC


def is_v1(path: str) -> bool:
    """Whether `path` is a checkpoint of TensorFlow's first format: one file, itself a table."""
    return not path.endswith(SUFFIX) and ends_as_table(path)


def v1_refusal(path: str) -> UnsupportedInput:
    """Return the error that tells how to convert a checkpoint of the first format."""
    return UnsupportedInput(
        f"{shorten(path, 1000)}: {V1}",
        "convert it with TensorFlow: restore it with tf.compat.v1.train.Saver and save it again "
        "with write_version=tf.compat.v1.train.SaverDef.V2",
    )


@contextmanager
def reading(path: str) -> Iterator[Read]:
    """Yield a function (offset, count) -> bytes of the file `path`."""
    fd = open_input(path)

    def read(offset: int, count: int) -> bytes:
        data = bytearray(count)
        read_exact(fd, memoryview(data), offset, path)
        return bytes(data)

    try:
        yield read
    finally:
        os.close(fd)
