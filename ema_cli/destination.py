"""Where an output goes: whether it may go there, and how it gets its name in the end.

A single file is published by one rename; a folder is renamed whole; of several files under one
prefix the index, without which the others mean nothing, comes last. With ``--overwrite`` what
stood there waits beside it until the new output stands.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence

from ema_cli import durable, hints, provenance
from ema_cli.blueprint import Layout
from ema_cli.errors import OutputExists, StorageError, storage_errors
from ema_cli.formats import FORMATS, folders, tensorflow
from ema_cli.states.directory import is_state
from ema_cli.tensors import Stamp
from ema_cli.text import shorten

# ---------------------------------------------------------------------------- before the work


def check_destination(layout: Layout, inputs: Iterable[Stamp], *, overwrite: bool) -> None:
    """Raise `OutputExists` unless the output may be written.

    An output that is one of the inputs, or holds one, is refused whatever `overwrite` says; an
    existing one is refused without it. A folder is only replaced when it looks like a checkpoint.
    """
    path = layout.path.rstrip("/")
    shown = shorten(path, 1000)
    _refuse_state(path, shown)
    paths = standing(layout)
    _refuse_inputs(paths or [path], shown, inputs)
    if layout.kind != "folder" and os.path.isdir(path) and not paths[1:]:
        row = FORMATS[layout.format]
        inside = os.path.join(shown, f"average{row.suffix}" if layout.kind == "file" else "")
        raise OutputExists(
            f"{shown}: expected the name of a new {row.title}, found a directory", f"-o {inside}"
        )
    if not paths:
        return
    if not overwrite:
        raise exists(shown)
    check_replaceable(layout)


def _refuse_state(path: str, shown: str) -> None:
    """Raise `OutputExists` for an output that is a state, or would lie inside one."""
    above = os.path.realpath(path)
    while True:
        if is_state(above):
            raise OutputExists(
                f"{shown}: inside a state: {shorten(above, 1000)}",
                "write to another directory with -o",
            )
        if os.path.dirname(above) == above:
            return
        above = os.path.dirname(above)


def standing(layout: Layout) -> list[str]:
    """Return the paths that the output would replace; the index of a prefix comes first."""
    path = layout.path.rstrip("/")
    if layout.kind == "prefix":
        return tensorflow.files_of(path)
    try:
        os.lstat(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{shorten(path, 1000)}: {os.strerror(error.errno or 0)}") from error
    return [path]


def exists(shown: str) -> OutputExists:
    """Return the error for an output that is there already."""
    return OutputExists(f"{shown}: exists already", "replace it with --overwrite")


def _refuse_inputs(paths: Sequence[str], shown: str, inputs: Iterable[Stamp]) -> None:
    reals = [os.path.realpath(path) for path in paths]
    for stamp in inputs:
        source = os.path.realpath(stamp.path)
        for path, real in zip(paths, reals, strict=True):
            inside = source == real or source.startswith(real + os.sep)
            if inside or (os.path.exists(path) and _same_file(path, stamp)):
                raise OutputExists(
                    f"{shown}: is an input, or holds one: {shorten(stamp.path, 1000)}",
                    hints.OTHER_NAME,
                )


def _same_file(path: str, stamp: Stamp) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(path, stamp.path)
    return False


def check_replaceable(layout: Layout) -> None:
    """Raise `OutputExists` when what stands there is not what an output may replace."""
    if layout.kind == "folder":
        _check_folder(layout.path.rstrip("/"))
        return
    for path in standing(layout):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OutputExists(
                f"{shorten(path, 1000)}: only a regular file can be replaced", hints.OTHER_NAME
            )


def _check_folder(path: str) -> None:
    """A folder is deleted when it is replaced: never one that may hold something else."""
    shown = shorten(path, 1000)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise OutputExists(f"{shown}: expected a folder to replace, found a file", hints.OTHER_NAME)
    with os.scandir(path) as listing:
        entries = list(listing)
    own = folders.own_files(path)
    foreign = next(
        (e.name for e in entries if e.name not in own or not e.is_file(follow_symlinks=False)), None
    )
    if entries and (foreign is not None or not folders.is_checkpoint(path)):
        what = f"it holds '{shorten(foreign)}'" if foreign else "it holds no checkpoint"
        raise OutputExists(
            f"{shown}: only a folder with nothing but a checkpoint is replaced, and {what}",
            "write to another name with -o, or remove the folder yourself",
        )


# ---------------------------------------------------------------------------- repair


def aside_of(destination: str) -> str:
    """Return where what stood at `destination` waits while it is replaced."""
    return durable.beside(destination, durable.ASIDE_SUFFIX)


def _moving_of(prefix: str) -> str:
    return durable.beside(prefix, durable.MOVING_SUFFIX)


def repair(layout: Layout, *, keep: bool = False) -> None:
    """Undo what a process left that was killed while it published or replaced this output.

    `keep`: what it had finished stays under its temporary name, to be gone on with.
    """
    if layout.kind == "file":
        return  # one rename leaves nothing half done
    destination = layout.path.rstrip("/")
    root = durable.beside(destination, durable.TEMPORARY_SUFFIX)
    traces = [aside_of(destination)]
    if layout.kind == "prefix":
        traces += [_moving_of(destination), root]
    if not any(durable.exists(path) for path in traces):
        return
    lock = durable.create_locked_directory(root, empty=False)
    try:
        with storage_errors(destination, "cannot repair"):
            if layout.kind == "prefix":
                _remove_unfinished(destination, root, keep=keep)
            restore(layout)
    finally:
        if keep:
            durable.remove_empty([root])
        else:
            durable.remove(root)
        os.close(lock)


def _remove_unfinished(prefix: str, root: str, *, keep: bool) -> None:
    """Remove the data files that a killed process gave their names, when its index got none."""
    if durable.exists(prefix + tensorflow.SUFFIX) or durable.exists(_moving_of(prefix)):
        return
    waiting = os.listdir(root)
    if os.path.basename(prefix) + tensorflow.SUFFIX not in waiting:
        return
    _remove_staged(prefix, waiting, root if keep else "")


def _remove_staged(prefix: str, waiting: Sequence[str] = (), back_to: str = "") -> None:
    """Remove the files that a staged provenance names, but for those that have no name yet.

    Nothing else that lies there: it may be somebody's checkpoint on its way.
    """
    for path, n_bytes in provenance.staged_files(prefix):
        made = os.path.basename(path) not in waiting and os.path.isfile(path)
        if made and os.path.getsize(path) == n_bytes:
            if back_to:
                os.rename(path, os.path.join(back_to, os.path.basename(path)))
            else:
                os.unlink(path)


def restore(layout: Layout) -> None:
    """Finish what a killed replacement left, under the lock of its temporary directory."""
    destination = layout.path.rstrip("/")
    aside = aside_of(destination)
    if layout.kind == "prefix":
        _restore_prefix(destination, aside)
    elif not durable.exists(aside):
        return
    elif durable.exists(destination):
        durable.remove(aside)
    else:
        os.rename(aside, destination)


def _restore_prefix(prefix: str, aside: str) -> None:
    """Put the files of a replaced prefix back unless the new index stands.

    As long as they are being moved, here or there, nothing new stands beside them.
    """
    moving = _moving_of(prefix)
    if durable.exists(aside):
        if durable.exists(prefix + tensorflow.SUFFIX):
            durable.remove(aside)
            return
        _remove_staged(prefix)
        os.rename(aside, moving)
    if not durable.exists(moving):
        return
    for name in sorted(os.listdir(moving), key=lambda name: name.endswith(tensorflow.SUFFIX)):
        os.rename(os.path.join(moving, name), os.path.join(os.path.dirname(prefix), name))
    durable.sync_directory(os.path.dirname(prefix))
    os.rmdir(moving)


# ---------------------------------------------------------------------------- publication


def rename(layout: Layout, root: str, *, overwrite: bool) -> None:
    """Give the finished output its name: the point after which it exists.

    Args:
        layout: of the output.
        root: its temporary file or directory.
        overwrite: replace what stands there; else that is an error at any moment.
    """
    destination = layout.path.rstrip("/")
    if layout.kind == "prefix":
        _rename_prefix(layout, root, destination, overwrite)
    elif not overwrite:
        try:
            durable.rename_new(root, destination)
        except FileExistsError:  # it appeared while we worked
            raise exists(shorten(destination, 1000)) from None
    elif layout.kind == "file" or not durable.exists(destination):
        os.replace(root, destination)
    else:
        check_replaceable(layout)  # again: something may have been put there
        aside = aside_of(destination)
        os.rename(destination, aside)
        try:
            os.rename(root, destination)
        except BaseException:
            os.rename(aside, destination)
            raise


def _rename_prefix(layout: Layout, root: str, prefix: str, overwrite: bool) -> None:
    old = standing(layout)
    if old and not overwrite:
        raise exists(shorten(prefix, 1000))
    check_replaceable(layout)
    try:
        if old:
            _move_aside(old, prefix)
        for file in layout.files:  # the index last: without it the others are no checkpoint
            if file.name == tensorflow.SUFFIX:
                durable.sync_directory(os.path.dirname(prefix))
            _rename_new(_made(root, prefix, file.name), prefix + file.name, prefix)
    except BaseException:
        for file in reversed(layout.files):
            if not durable.exists(_made(root, prefix, file.name)):  # it has its name already
                os.unlink(prefix + file.name)
        _restore_prefix(prefix, aside_of(prefix))
        raise


def _move_aside(old: Sequence[str], prefix: str) -> None:
    """Move the files of a prefix away, its index first; complete under the name of `aside_of`."""
    moving = _moving_of(prefix)
    os.mkdir(moving)
    for path in old:
        os.rename(path, os.path.join(moving, os.path.basename(path)))
    os.rename(moving, aside_of(prefix))


def _made(root: str, prefix: str, name: str) -> str:
    return os.path.join(root, os.path.basename(prefix) + name)


def _rename_new(made: str, path: str, prefix: str) -> None:
    try:
        durable.rename_new(made, path)
    except FileExistsError:
        raise exists(shorten(prefix, 1000)) from None
