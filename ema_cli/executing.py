"""What work needs around it: an executor, and a file for what cannot be read in place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

from ema_cli import durable, spilling
from ema_cli.errors import storage_errors
from ema_cli.work import Work


@contextlib.contextmanager
def executor_of(given: Executor | None, workers: int) -> Iterator[Executor]:
    """Yield the executor that was given, or threads that end with the context."""
    if given is not None:
        yield given
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ema-avg")
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)  # what runs comes to its end, what waits is not begun
        raise
    pool.shutdown()


@contextlib.contextmanager
def spilled(work: Work, beside: str) -> Iterator[Work]:
    """Yield the work with a file for what cannot be read in place, next to the path `beside`."""
    if not work.spill:
        yield work
        return
    root = durable.beside(beside.rstrip("/"), durable.SPILL_SUFFIX)
    with storage_errors(os.path.dirname(root) or ".", "cannot create"):
        made = durable.make_directories(os.path.dirname(root) or ".")
    lock = durable.create_locked_directory(root)
    try:
        inputs = list(work.inputs)
        for k, first in enumerate(work.first_input):
            if first >= 0:
                path = os.path.join(root, str(k))
                files = spilling.spill(work.checkpoints[k], work.spilled[k], path).files
                inputs[first : first + len(files)] = files
        yield dataclasses.replace(work, inputs=tuple(inputs))
    finally:
        durable.remove(root)
        durable.remove_empty(made)
        os.close(lock)
