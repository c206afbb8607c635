"""Child process that does only what cannot be avoided: read every byte once, write the result once.

It prints its own time as JSON, without the start of the interpreter. Nothing is parsed and nothing
is computed, so no averaging program with the same access pattern can be much faster.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path


def open_for(stack: ExitStack, path: Path, flags: int) -> int:
    """Open a file that is closed when the stack unwinds."""
    descriptor = os.open(path, flags, 0o644)
    stack.callback(os.close, descriptor)
    return descriptor


def on_all_cores(work: Callable[[], None]) -> None:
    """Run the same function once per available core and wait for all of them."""
    threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_then_write(inputs: list[int], outputs: list[int], size: int, block: int) -> None:
    """Read all inputs on all cores, and afterwards write the results on one."""
    ends = [os.fstat(descriptor).st_size for descriptor in inputs]
    places = iter(
        [(fd, at) for fd, end in zip(inputs, ends, strict=True) for at in range(0, end, block)]
    )

    def read() -> None:
        buffer = [memoryview(bytearray(block))]
        for descriptor, offset in places:
            os.preadv(descriptor, buffer, offset)

    on_all_cores(read)
    buffer = memoryview(bytearray(block))
    for descriptor in outputs:
        for offset in range(0, size, block):
            os.pwrite(descriptor, buffer[: size - offset], offset)


def read_and_write(inputs: list[int], outputs: list[int], size: int, block: int) -> None:
    """Read a block of every input and write that block at once: writing hides behind reading."""
    offsets: Iterator[int] = iter(range(0, size, block))

    def work() -> None:
        buffer = memoryview(bytearray(block))
        for offset in offsets:
            for descriptor in inputs:
                os.preadv(descriptor, [buffer], offset)
            for descriptor in outputs:
                os.pwrite(descriptor, buffer[: size - offset], offset)

    on_all_cores(work)


def measure(
    inputs: list[Path], outputs: list[Path], block: int, *, overlap: bool
) -> dict[str, float]:
    """Do the work and return the seconds it took, and how much of that was waiting for fsync."""
    began = time.perf_counter()
    partials = [path.with_suffix(".partial") for path in outputs]
    with ExitStack() as stack:
        sources = [open_for(stack, path, os.O_RDONLY) for path in inputs]
        size = os.fstat(sources[0]).st_size
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        targets = [open_for(stack, path, flags) for path in partials]
        for descriptor in targets:
            os.posix_fallocate(descriptor, 0, size)
        (read_and_write if overlap else read_then_write)(sources, targets, size, block)
        written = time.perf_counter()
        for descriptor in targets:
            os.fsync(descriptor)
        synced = time.perf_counter()
        for partial, path in zip(partials, outputs, strict=True):
            os.replace(partial, path)
    return {"seconds": time.perf_counter() - began, "fsync": synced - written}


def main() -> int:
    """Measure once and print the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.limit", description=__doc__)
    parser.add_argument("--block", type=int, required=True, help="bytes per read and write")
    parser.add_argument("--overlap", action="store_true", help="write while reading")
    parser.add_argument("--output", type=Path, action="append", required=True)
    parser.add_argument("inputs", type=Path, nargs="+")
    options = parser.parse_args()
    print(
        json.dumps(measure(options.inputs, options.output, options.block, overlap=options.overlap))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
